"""Faults that are injected on purpose, through the real proxy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from hafnium_local.faults import Fault, FaultOptionsError, Spoiler, application, parse_fault


@pytest.fixture
def proxy(backend: Any, tools: Any) -> Iterator[Callable[..., tuple[str, Any, subprocess.Popen[bytes]]]]:
    made: list[subprocess.Popen[bytes]] = []

    def make(*args: str) -> tuple[str, Any, subprocess.Popen[bytes]]:
        behind, port = backend("--version", "1"), tools.free_port()
        argv = [sys.executable, "-m", "hafnium_local.faults", "--listen", str(port), "--upstream", f"127.0.0.1:{behind.port}", *args]
        made.append(subprocess.Popen(argv))
        url = f"http://127.0.0.1:{port}"
        tools.eventually(lambda: tools.call(f"{url}/v2/health/ready")[0] == 200, "proxy ready")
        return url, behind, made[-1]

    yield make
    for p in made:
        p.kill()
        p.wait()


def test_units_multiplies_the_given_features_only(proxy: Any, tools: Any) -> None:
    url, behind, _ = proxy("--fault", "units", "--features", "amount,other", "--factor", "100")
    status, body, _ = tools.call(f"{url}/v1/score", {"features": {"amount": 2.5, "age": 3, "other": "x"}}, {"x-request-id": "a"})
    assert (status, body["features"]) == (200, {"amount": 250.0, "age": 3, "other": "x"})
    assert behind.seen()[0]["id"] == "a"


def test_stale_repeats_the_first_row(proxy: Any, tools: Any) -> None:
    url, behind, _ = proxy("--fault", "stale")
    for amount in (1, 2, 3):
        tools.call(f"{url}/v1/score", {"features": {"amount": amount}})
    assert [s["features"]["amount"] for s in behind.seen()] == [1, 1, 1]


def test_crash_ends_the_process_after_so_many_requests_and_health_checks_do_not_count(proxy: Any, tools: Any) -> None:
    url, behind, process = proxy("--fault", "crash", "--crash-after", "3")
    assert [tools.call(f"{url}/v1/score", {"features": {}})[0] for _ in range(3)] == [200, 200, 0]
    assert process.wait(30) == -9
    assert len(behind.seen()) == 2


def test_crashing_service_is_restarted_counted_and_its_requests_are_saved_by_the_stable_one(up: Any, tools: Any) -> None:
    crash = {"local.hafnium.dev/fault": "crash", "local.hafnium.dev/fault-options": '{"crashAfter": 5}'}
    candidate = tools.inference_service("next", "--version", "2", annotations=crash, labels={"hafnium.dev/rollout": "m"})
    runtime = up(tools.inference_service("m", "--version", "1"), candidate)
    runtime.wait_ready("m", "next")
    runtime.wait_answers("1")
    runtime.route("m", "m", "next", weight=50)
    statuses: list[int] = []

    def crashed_twice() -> bool:
        statuses.append(runtime.score()[0])
        return runtime.service("next")["restarts"] >= 2

    tools.eventually(crashed_twice, "crashes are counted")
    assert set(statuses) == {200}
    assert runtime.service("m")["restarts"] == 0
    assert "next: next-fault: killed by SIGKILL" in runtime.said


async def test_slow_delays_scores_and_passes_the_rest(backend: Any) -> None:
    behind = backend()
    slept: list[float] = []
    app = application(Fault("slow", delay_ms=1.0), f"127.0.0.1:{behind.port}", lambda: slept.append(1.0))
    async with TestClient(TestServer(app)) as client:
        answer = await client.post("/v1/score", json={"features": {"a": 1}}, headers={"host": "m-shadow"})
        assert (answer.status, (await answer.json())["features"]) == (200, {"a": 1})
        assert (await client.get("/v2/health/ready")).status == 200
    assert behind.seen()[0]["host"] == "m-shadow"
    assert slept == []


async def test_crash_calls_its_end_at_the_request_it_promised(backend: Any) -> None:
    behind = backend()
    died: list[int] = []
    app = application(Fault("crash", crash_after=2), f"127.0.0.1:{behind.port}", lambda: died.append(1))
    async with TestClient(TestServer(app)) as client:
        for wanted in ([], [1]):
            await client.post("/v1/score", json={"features": {}})
            assert died == wanted


async def test_service_that_is_away_is_a_503_with_its_reason(tools: Any) -> None:
    app: web.Application = application(Fault("stale"), f"127.0.0.1:{tools.free_port()}", os.abort)
    async with TestClient(TestServer(app)) as client:
        answer = await client.post("/v1/score", json={"features": {}})
        assert answer.status == 503
        assert "can't be reached" in (await answer.json(content_type=None))["detail"]


def test_batches_are_spoilt_row_by_row_and_other_bodies_pass() -> None:
    spoiler = Spoiler(Fault("units", features=("a",), factor=10.0))
    body = b'{"requests": [{"features": {"a": 1}}, {"features": {"a": true}}, 3]}'
    assert spoiler.body("/v1/score/batch", body) == b'{"requests": [{"features": {"a": 10.0}}, {"features": {"a": true}}, 3]}'
    for path, data in (("/v1/score", b"no json"), ("/v1/score", b"[1]"), ("/v2/models/m/infer", b'{"features": {"a": 1}}')):
        assert spoiler.body(path, data) == data


def test_stale_of_one_feature_leaves_the_others() -> None:
    spoiler = Spoiler(Fault("stale", features=("a",)))
    spoiler.body("/v1/score", b'{"features": {"a": 1, "b": 1}}')
    assert spoiler.body("/v1/score", b'{"features": {"a": 2, "b": 2}}') == b'{"features": {"a": 1, "b": 2}}'


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("fire", "{}", "unknown fault"), ("slow", "{", "not JSON"), ("slow", "[]", "must be an object"), ("slow", '{"delay": 1}', "some of"),
    ("units", "{}", "needs `features`"), ("stale", '{"features": "a"}', "list of names"), ("slow", '{"delayMs": -1}', "above 0"),
    ("crash", '{"crashAfter": 1.5}', "whole number"), ("slow", '{"delayMs": true}', "above 0"),
])
def test_wrong_options_are_told(kind: str, options: str, message: str) -> None:
    with pytest.raises(FaultOptionsError, match=message):
        parse_fault(kind, options)


def test_options_survive_the_way_to_the_command_line() -> None:
    fault = parse_fault("units", '{"features": ["a", "b"], "factor": 0.01}')
    assert fault.arguments() == [
        "--fault", "units", "--factor", "0.01", "--delay-ms", "150.0", "--crash-after", "100", "--features", "a,b",
    ]
