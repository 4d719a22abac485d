"""The gateway with the real Envoy: shares, copies, and requests that outlive the servers they were meant for."""

from __future__ import annotations

import collections
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hafnium_contract.errors import InputError
from hafnium_local import envoy
from hafnium_local.envoy import Endpoint, EnvoyFiles, Route, parse_route


class Gateway:
    """Envoy on files in a folder."""

    def __init__(self, folder: Path, tools: Any) -> None:
        self.tools = tools
        self.port, self.admin_port = tools.free_port(), tools.free_port()
        self.files = EnvoyFiles(folder)
        self.folder = folder
        self.files.start(envoy.bootstrap(folder, gateway_port=self.port, admin_port=self.admin_port))
        self.process = subprocess.Popen(envoy.command(folder), stderr=subprocess.DEVNULL)

    def update(self, endpoints: dict[str, Endpoint], *routes: Route, default: str | None = "m") -> None:
        self.files.update(endpoints, routes, default)
        self.tools.eventually(lambda: self.taken("rds.json", "routes") and self.taken("cds.json", "clusters"), "files taken over")

    def taken(self, file: str, kind: str) -> bool:
        wanted = json.loads((self.folder / file).read_text())["version_info"]
        text = f"cluster_manager.cds.version_text|http.gateway.rds.{envoy.ROUTE_CONFIG}.version_text"
        _, body, _ = self.tools.call(f"http://127.0.0.1:{self.admin_port}/stats?filter={text}")
        return f'"{wanted}"' in str(body) and kind != ""

    def wait_healthy(self, *clusters: str) -> None:
        for name in clusters:
            self.tools.eventually(lambda name=name: self.stat(f"cluster.{name}.membership_healthy") >= 1, f"{name} healthy")

    def stat(self, name: str) -> int:
        _, body, _ = self.tools.call(f"http://127.0.0.1:{self.admin_port}/stats?format=json&filter=^{name.replace('.', '%5C.')}$")
        return sum(s["value"] for s in (body or {}).get("stats", []) if "value" in s)

    def score(self, host: str = "x", i: int = 0) -> tuple[int, Any, dict[str, str]]:
        return self.tools.call(f"http://127.0.0.1:{self.port}/v1/score", {"features": {"i": i}}, {"host": host, "x-request-id": f"r{i}"})

    def load(self, count: int, at: dict[int, Callable[[], Any]] | None = None) -> collections.Counter[tuple[int, str, str]]:
        """(status, model version, arm) of `count` requests by eight clients; `at` maps a request's number to a deed."""
        def one(i: int) -> tuple[int, str, str]:
            if at and i in at:
                at[i]()
            status, body, headers = self.score(i=i)
            return status, body.get("model_version", "") if isinstance(body, dict) else str(body), headers.get("x-hafnium-arm", "")
        with ThreadPoolExecutor(8) as pool:
            return collections.Counter(pool.map(one, range(count)))


@pytest.fixture
def gateway(tmp_path: Path, tools: Any) -> Iterator[Gateway]:
    found = Gateway(tmp_path / "envoy", tools)
    try:
        tools.eventually(lambda: tools.call(f"http://127.0.0.1:{found.admin_port}/ready")[0] == 200, "Envoy ready")
        yield found
    finally:
        found.process.kill()
        found.process.wait()


@pytest.fixture
def arms(backend: Any) -> tuple[Any, Any, dict[str, Endpoint]]:
    stable, candidate = backend("--version", "1"), backend("--version", "2")
    return stable, candidate, {"st": Endpoint("st", stable.port), "ca": Endpoint("ca", candidate.port)}


def test_share_of_the_candidate_is_its_weight(gateway: Gateway, arms: Any) -> None:
    _, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 25))
    gateway.wait_healthy("st", "ca")
    found = gateway.load(800)
    assert set(found) == {(200, "1", "stable"), (200, "2", "candidate")}
    spread = 5 * math.sqrt(800 * 0.25 * 0.75)  # five standard deviations: one run in a million is outside
    assert abs(found[200, "2", "candidate"] - 200) < spread


@pytest.mark.parametrize(("weight", "expected"), [(0, (200, "1", "stable")), (100, (200, "2", "candidate"))], ids=["none", "all"])
def test_ends_of_the_scale_are_exact(gateway: Gateway, arms: Any, weight: int, expected: tuple[int, str, str]) -> None:
    gateway.update(arms[2], Route("m", "st", "ca", weight))
    gateway.wait_healthy("st", "ca")
    assert gateway.load(50) == {expected: 50}


def test_shadow_copies_every_score_and_answers_by_the_stable_one(gateway: Gateway, arms: Any) -> None:
    stable, candidate, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 0, shadow=True))
    gateway.wait_healthy("st", "ca")
    assert gateway.load(40) == {(200, "1", "stable"): 40}
    gateway.tools.eventually(lambda: len(candidate.seen()) == 40, "all copies came")
    copies, originals = candidate.seen(), stable.seen()
    assert {c["id"] for c in copies} == {o["id"] for o in originals} == {f"r{i}" for i in range(40)}
    assert all(c["host"].split(":")[0].endswith("-shadow") for c in copies)
    assert {o["host"] for o in originals} == {"x"}


def test_reads_are_not_copied(gateway: Gateway, arms: Any) -> None:
    _, candidate, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 0, shadow=True))
    gateway.wait_healthy("st", "ca")
    before = gateway.stat("cluster.ca.upstream_rq_completed")
    gateway.tools.call(f"http://127.0.0.1:{gateway.port}/seen")
    assert gateway.score()[0] == 200
    gateway.tools.eventually(lambda: len(candidate.seen()) == 1, "the POST was copied")
    assert gateway.stat("cluster.ca.upstream_rq_completed") == before + 1


def test_change_of_weights_under_load_loses_no_request(gateway: Gateway, arms: Any) -> None:
    _, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st"))
    gateway.wait_healthy("st", "ca")
    changes = [(0, True), (5, False), (25, False), (100, False), (0, False), (50, False), (0, True)]
    at = {
        100 + 100 * i: (lambda w=w, s=s: gateway.files.update(endpoints, [Route("m", "st", "ca", w, s)], "m"))
        for i, (w, s) in enumerate(changes)
    }
    found = gateway.load(900, at)
    assert {status for status, _, _ in found} == {200}
    assert {version for _, version, _ in found} == {"1", "2"}


def test_request_that_a_dead_candidate_drops_is_answered_by_the_stable_one(gateway: Gateway, arms: Any) -> None:
    _, candidate, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 50))
    gateway.wait_healthy("st", "ca")
    found = gateway.load(600, {200: candidate.process.kill})
    assert {status for status, _, _ in found} == {200}
    assert found[200, "1", "candidate"] > 0, "saved by the stable model, and still called the candidate's"
    own = f"cluster.ca.endpoint.127.0.0.1_{candidate.port}"
    assert gateway.stat(f"{own}.rq_error") > 0, "counted as the candidate's failures"
    assert gateway.stat(f"cluster.ca.endpoint.127.0.0.1_{endpoints['st'].port}.rq_success") == found[200, "1", "candidate"]
    assert gateway.stat("cluster.st.upstream_rq_retry") == 0


def test_candidate_is_never_the_stable_ones_fallback(gateway: Gateway, arms: Any) -> None:
    stable, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 1))
    gateway.wait_healthy("st", "ca")
    stable.process.kill()
    found = gateway.load(100)
    assert {version for status, version, arm in found if arm == "stable" and status == 200} == set()


@pytest.mark.parametrize("status", [500, 429, 422, 504])
def test_answer_of_the_model_is_passed_on_and_not_tried_again(gateway: Gateway, arms: Any, status: int) -> None:
    stable, _, endpoints = arms
    gateway.update({"st": endpoints["st"]}, Route("m", "st"))
    gateway.wait_healthy("st")
    stable.control(status=status)
    assert gateway.score()[0] == status
    assert len(stable.seen()) == 1


def test_503_is_tried_again_a_bounded_number_of_times(gateway: Gateway, arms: Any) -> None:
    stable, _, endpoints = arms
    gateway.update({"st": endpoints["st"]}, Route("m", "st"))
    gateway.wait_healthy("st")
    stable.control(status=503)
    assert gateway.score()[0] == 503
    assert len(stable.seen()) == 1 + envoy.RETRIES_MAX


def test_large_body_is_passed_on_and_copied(gateway: Gateway, arms: Any) -> None:
    stable, candidate, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 0, shadow=True))
    gateway.wait_healthy("st", "ca")
    body = {"features": {"text": "x" * 3_900_000}}
    assert gateway.tools.call(f"http://127.0.0.1:{gateway.port}/v1/score", body)[0] == 200
    gateway.tools.eventually(lambda: len(candidate.seen()) == 1, "copied")
    assert stable.seen()[0]["features"] == candidate.seen()[0]["features"] == body["features"]


def test_callers_request_id_is_kept_and_a_missing_one_is_made(gateway: Gateway, arms: Any) -> None:
    stable, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st"))
    gateway.wait_healthy("st")
    own = "0f8fad5b-d9cb-469f-a165-70867728950e"
    url = f"http://127.0.0.1:{gateway.port}/v1/score"
    assert gateway.tools.call(url, {}, {"x-request-id": own, "x-hafnium-arm": "forged"})[2]["x-request-id"] == own
    made = gateway.tools.call(url, {})[2]["x-request-id"]
    assert [s["id"] for s in stable.seen()] == [own, made]
    assert {s["arm"] for s in stable.seen()} == {"stable"}
    assert len(made) == 36


def test_route_is_found_by_host_name_and_the_default_takes_the_rest(gateway: Gateway, arms: Any) -> None:
    _, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st"), Route("fraud", "ca"))
    gateway.wait_healthy("st", "ca")
    by_host = {h: gateway.score(h)[1]["model_version"] for h in ("fraud", "fraud:80", "fraud.ns.svc", "fraud-ns.example.com", "m", "other")}
    assert by_host == {"fraud": "2", "fraud:80": "2", "fraud.ns.svc": "2", "fraud-ns.example.com": "2", "m": "1", "other": "1"}


def test_gateways_own_errors_are_problem_documents(gateway: Gateway, arms: Any) -> None:
    gateway.update({}, Route("m", "gone"))
    status, body, headers = gateway.score()
    assert (status, headers["content-type"], body["status"]) == (503, "application/problem+json", 503)


def test_cluster_leaves_after_the_routes_that_named_it(gateway: Gateway, arms: Any) -> None:
    _, _, endpoints = arms
    gateway.update(endpoints, Route("m", "st", "ca", 50))
    gateway.wait_healthy("st", "ca")
    left = {"st": endpoints["st"]}
    assert gateway.files.update(left, [Route("m", "st")], "m") is True
    assert {c["name"] for c in json.loads((gateway.folder / "cds.json").read_text())["resources"]} == {"st", "ca"}
    assert gateway.files.update(left, [Route("m", "st")], "m") is False
    assert {c["name"] for c in json.loads((gateway.folder / "cds.json").read_text())["resources"]} == {"st"}
    gateway.tools.eventually(lambda: gateway.stat("cluster_manager.active_clusters") == 1, "removed")
    assert gateway.load(50) == {(200, "1", "stable"): 50}


def test_envoy_accepts_every_form_that_is_rendered(gateway: Gateway, arms: Any, tools: Any, tmp_path: Path) -> None:
    _, _, endpoints = arms
    tcp = {**endpoints, "tcp": Endpoint("tcp", endpoints["st"].port, None)}
    gateway.update(tcp, Route("m", "st", "ca", 0.5, True), Route("tcp", "tcp", "ca", 3), Route("gone", "a", "b", 50), default=None)
    for name in ("cluster_manager.cds.update_rejected", f"http.gateway.rds.{envoy.ROUTE_CONFIG}.update_rejected"):
        assert gateway.stat(name) == 0
    boot = tmp_path / "with-log"
    files = EnvoyFiles(boot)
    files.start(envoy.bootstrap(boot, gateway_port=1, admin_port=2, access_log=boot / "access.log"))
    argv = [str(envoy.find_envoy()), "--mode", "validate", "-c", str(boot / "bootstrap.json")]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_kills_of_service_and_gateway_lose_no_request_of_a_client_that_tries_again(up: Any, tools: Any, tmp_path: Path) -> None:
    runtime = up(tools.inference_service("m", "--version", "1"))
    runtime.wait_answers("1")
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps({"features": {"i": i}}) + "\n" for i in range(600)))
    done: list[subprocess.CompletedProcess[str]] = []
    argv = [
        sys.executable, "-m", "hafnium_local.replay", "--requests", str(requests), "--url", runtime.url, "--rate", "100",
        "--journal", str(tmp_path / "journal"),
    ]
    thread = threading.Thread(target=lambda: done.append(subprocess.run(argv, capture_output=True, text=True, check=False)))
    thread.start()
    for name in ("backend.py", "bin/envoy", "backend.py", "bin/envoy"):
        before = runtime.child(name)
        tools.eventually(lambda: (tmp_path / "journal").exists(), "the replay runs")
        time.sleep(0.8)
        subprocess.run(["kill", "-9", str(before)], check=True)
        tools.eventually(lambda name=name, before=before: runtime.child(name) not in (0, before), f"{name} is back")
    thread.join()
    summary = json.loads(done[0].stdout)
    assert (summary["ok"], summary["lost"], summary["failed"], summary["refused"]) == (600, 0, 0, 0)
    assert summary["retries"] > 0


@pytest.mark.parametrize(("data", "message"), [
    ([], "expected an object"), ({"name": "a"}, "name and stable"), ({"name": "a", "stable": "b", "x": 1}, "unknown field 'x'"),
    ({"name": "a", "stable": "b", "candidate": 3}, "candidate must be"), ({"name": "a", "stable": "b", "weight": -1}, "from 0 to 100"),
    ({"name": "a", "stable": "b", "shadow": "no"}, "shadow must be"), ({"name": "a", "stable": "b", "weight": 5}, "without a candidate"),
    ({"name": "a", "stable": "b", "weight": True}, "from 0 to 100"),
], ids=str)
def test_route_file_that_is_wrong_says_what(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_route(data, "r.json")
