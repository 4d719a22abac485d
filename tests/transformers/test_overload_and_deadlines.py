"""More than can be answered, and dependencies that hang: everybody gets an answer in time, the accepted the right one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hafnium_raw_http import RawAnswer, ask, connect, read_answer
from hafnium_redis import Redis
from hafnium_servers import chain_of, make_feature_repo, stopped

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import synthetic_rows, synthetic_views
from hafnium_transformer.admission import IN_FLIGHT_MIN, QueueLimit

LIMIT = 4
NEVER_MS = "3600000"
"""The server's own limits, in the tests of a caller's deadline: an answer that comes at all came by the deadline."""


def post(body: bytes, *lines: bytes, path: bytes = b"/v1/score") -> bytes:
    head = b"".join(b"%s\r\n" % line for line in lines)
    return b"POST %s HTTP/1.1\r\nhost: h\r\n%scontent-length: %d\r\n\r\n%s" % (path, head, len(body), body)


def score(answer: RawAnswer) -> float:
    assert answer.status == 200, answer
    return float(json.loads(answer.body)["score"])


@pytest.mark.slow
@pytest.mark.parametrize("hot", ["true", "false"], ids=["hot path", "plain path"])
def test_what_is_too_much_gets_503_at_once_and_what_is_in_progress_its_right_score(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path, hot: str,
) -> None:
    bodies = [json.dumps(r).encode() for r in synthetic_rows(contract, LIMIT, seed=3)]
    args = ["--deadline_ms", "60000", "--in_flight_max", str(LIMIT), "--hot_path", hot, "--breaker_failures_max", "1000"]
    with chain_of(bundle, tmp_path, repo, args) as (behind, front), ExitStack() as stack:
        right = [score(ask(front.port, post(b))) for b in bodies]
        with stopped(behind):
            accepted = [stack.enter_context(connect(front.port)) for _ in bodies]
            for s, body in zip(accepted, bodies, strict=True):
                s.sendall(post(body))
            refused = []
            until = time.monotonic() + 30.0
            while not refused and time.monotonic() < until:  # once all of them are in progress; before, a probe takes a place for 50 ms
                probe = ask(front.port, post(bodies[0], b"x-hafnium-deadline-ms: 50"))
                if probe.status == 503:
                    refused = [ask(front.port, post(bodies[0], b"x-request-id: mine", path=path))
                               for path in (b"/v1/score", b"/v1/score/batch", b"/v1/models/m:predict") for _ in range(5)]
            assert refused
            for answer in refused:  # the predictor still hangs: they did not wait for it
                headers = dict(answer.headers)
                assert answer.status == 503
                assert headers[b"content-type"] == b"application/problem+json"
                assert headers[b"retry-after"] == b"1"
                assert headers[b"x-request-id"] == b"mine"
                assert json.loads(answer.body)["title"] == "Overloaded"
            assert len({(a.status_line, a.body) for a in refused}) == 1
        got = [read_answer(s) for s in accepted]
        answered = [g for g in got if g.status == 200]
        assert len(answered) >= LIMIT - 1  # a probe may have taken the place of one, which then was the one too many
        assert all(g.status in (200, 503) for g in got)
        assert [score(g) for g in got if g.status == 200] == [r for r, g in zip(right, got, strict=True) if g.status == 200]
        assert [score(ask(front.port, post(b))) for b in bodies] == right
        text = front.get("/metrics").body.decode()
        assert 'type="overloaded"' in text


@pytest.mark.slow
@pytest.mark.parametrize("hot", ["true", "false"], ids=["hot path", "plain path"])
def test_every_answer_comes_by_its_deadline_while_predictor_or_store_hangs(
    bundle: Bundle, contract: ModelContract, tmp_path: Path, hot: str,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    body, deadlines = json.dumps(row).encode(), [200, 500, 1000, 1500]
    bodies = {b"/v1/score": body, b"/v1/score/batch": json.dumps({"requests": [row] * 3}).encode(),
              b"/v1/models/m:predict": json.dumps({"instances": [row]}).encode()}
    with Redis(tmp_path) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        args = ["--deadline_ms", NEVER_MS, "--lookup_timeout_ms", NEVER_MS, "--hot_path", hot, "--breaker_failures_max", "1000"]
        with chain_of(bundle, tmp_path, tmp_path / "repo", args) as (behind, front):
            before = score(ask(front.port, post(body)))

            def status_of(case: tuple[bytes, int]) -> int:
                path, ms = case
                answer = ask(front.port, post(bodies[path], b"x-hafnium-deadline-ms: %d" % ms, path=path))
                if answer.status == 200:  # a store that hangs is one without values, as soon as one caller's time has shown that it does
                    said = json.loads(answer.body)
                    assert all(one["degraded"] for one in said.get("results") or said.get("predictions") or [said])
                return answer.status

            def all_in_time(allowed: set[int]) -> None:
                cases = [(path, ms) for path in bodies for ms in deadlines]
                with ThreadPoolExecutor(len(cases)) as pool:
                    assert set(pool.map(status_of, cases)) <= allowed

            with stopped(behind):
                all_in_time({504})
            redis.stall()
            all_in_time({200, 503, 504})
            with stopped(behind):
                all_in_time({503, 504})
            redis.go_on()
            until = time.monotonic() + 30.0
            answer = ask(front.port, post(body))
            while time.monotonic() < until and (answer.status != 200 or json.loads(answer.body)["degraded"]):
                answer = ask(front.port, post(body))
            assert score(answer) == before


def test_a_burst_is_let_in_and_a_standing_queue_shrinks_the_limit_step_by_step() -> None:
    limit = QueueLimit(256, 0.02)
    for k in range(9):
        limit.left(0.05, k * 0.01)  # long, but for less than 0.1 s
    assert limit.now == 256
    limit.left(0.01, 0.09)  # a short one between: not standing
    limit.left(0.05, 0.10)
    limit.left(0.05, 0.19)
    assert limit.now == 256
    limit.left(0.05, 0.21)
    assert limit.now == 192
    limit.left(0.05, 0.22)  # once in an interval
    assert limit.now == 192
    for k in range(100):
        limit.left(0.05, 1.0 + k * 0.11)
    assert limit.now == IN_FLIGHT_MIN


def test_the_limit_grows_back_when_nobody_waits_and_never_beyond_its_setting() -> None:
    limit = QueueLimit(256, 0.02)
    for k in range(30):
        limit.left(0.05, k * 0.11)
    low = limit.now
    limit.left(0.015, 10.0)  # neither long nor short
    assert limit.now == low
    limit.left(0.001, 11.0)
    assert low < limit.now <= low * 1.2
    for k in range(100):
        limit.left(0.001, 12.0 + k * 0.11)
    assert limit.now == 256


def test_a_limit_forgets_a_queue_that_is_gone() -> None:
    limit = QueueLimit(256, 0.02)
    for k in range(30):
        limit.left(0.05, k * 0.11)
    low = limit.now
    limit.forget(3.5)
    assert limit.now == low < 256
    limit.forget(5.0)
    assert limit.now == 256
    limit.left(0.05, 10.0)  # one long wait, and another an hour later, are no standing queue
    limit.left(0.05, 3600.0)
    assert limit.now == 256


def test_a_limit_that_is_set_low_stays_where_it_was_set() -> None:
    limit = QueueLimit(2, 0.02)
    for k in range(30):
        limit.left(0.05, k * 0.11)
    assert limit.now == 2
