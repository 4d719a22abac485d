"""The transformer's hot path answers as the plain one does; rows that share a batch keep their own answers, errors and deadlines."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hafnium_raw_http import RawAnswer, answers, exchange
from hafnium_servers import Server, chain_of, predictor, stopped, transformer, wait_until
from hafnium_steady_load import SteadyLoad

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle, synthetic_rows

SCORE, V1 = b"/v1/score", b"/v1/models/m:predict"
PATIENT = ["--deadline_ms", "20000", "--lookup_timeout_ms", "10000"]


@pytest.fixture(scope="module")
def plain(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plain")
    with transformer(
        chain.predictor.port, folder, repo=chain.repo,
        args=["--body_bytes_max", "300000", *PATIENT, "--hot_path", "false"],
    ) as running:
        running.wait()
        yield running


def post(body: bytes, headers: list[bytes] | None = None, path: bytes = SCORE) -> bytes:
    own = headers or []
    ids = [] if any(h.lower().startswith(b"x-request-id") for h in own) else [b"x-request-id: q"]
    head = [b"POST %s HTTP/1.1" % path, b"host: h", b"content-length: %d" % len(body), *ids, *own]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def changed(row: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**row, **changes}).encode()


def instances(rows: Any) -> bytes:
    return json.dumps({"instances": rows}).encode()


def cases(contract: ModelContract) -> dict[str, bytes]:
    row = synthetic_rows(contract, 1, seed=4)[0]
    features = row["features"]
    name = next(f for f in features if isinstance(features[f], float))
    good = json.dumps(row).encode()
    return {
        "a row": post(good),
        "an id of its own": post(changed(row, request_id="mine")),
        "explained": post(changed(row, explain=True)),
        "an unknown entity": post(changed(row, entity=dict.fromkeys(row["entity"], "nobody"))),
        "no entity": post(changed(row, entity={})),
        "an unknown field": post(changed(row, more=1)),
        "a field of the wrong type": post(changed(row, features={**features, name: "x"})),
        "a missing field": post(changed(row, features={k: v for k, v in features.items() if k != name})),
        "a field that is null": post(changed(row, features={**features, name: None})),
        "out of range": post(changed(row, features={**features, name: 1e30})),
        "NaN": post(good.replace(b'"features": {', b'"features": {"x": NaN, ')),
        "a list": post(b"[]"), "no JSON": post(good[:-5]), "nothing": post(b""), "bad UTF-8": post(b'{"\xff": 1}'),
        "an old event": post(changed(row, event_time="2020-01-01T00:00:00Z")),
        "a time without offset": post(changed(row, event_time="2026-01-15T12:00:00")),
        "no time left": post(good, [b"x-hafnium-deadline-ms: 0"]),
        "a deadline that is no number": post(good, [b"x-hafnium-deadline-ms: soon"]),
        "a long id": post(good, [b"x-request-id: " + b"a" * 300]),
        "an arm": post(good, [b"x-hafnium-arm: candidate"]),
        "chunks": post(good, [b"transfer-encoding: chunked"]),
        "a batch": post(json.dumps({"requests": [row, {}]}).encode(), path=b"/v1/score/batch"),
        "V1": post(json.dumps({"instances": [row]}).encode(), path=b"/v1/models/m:predict"),
        **{name: post(body, path=V1) for name, body in {
            "V1, explained": instances([{**row, "explain": True}]), "V1, an id of its own": instances([{**row, "request_id": "mine"}]),
            "V1, rows": instances([row, {**row, "explain": True}, row]), "V1, nobody": instances([{**row, "entity": {}}]),
            "V1, one bad row of three": instances([row, {**row, "more": 1}, row]), "V1, no rows": instances([]),
            "V1, no list": instances({"a": 1}), "V1, a row of numbers": instances([[1.0, 2.0]]), "V1, a row of null": instances([None]),
            "V1, more keys": json.dumps({"instances": [row], "signature_name": "x"}).encode(), "V1, other keys": b'{"inputs": [1]}',
            "V1, not JSON": instances([row])[:-3], "V1, a list": b"[1]", "V1, nothing": b"", "V1, NaN": b'{"instances": [NaN]}',
            "V1, deep": b'{"instances": [' + b"[" * 60 + b"]" * 60 + b"]}", "V1, too many": instances([{}] * 1001),
            "V1, twice the key": b'{"instances": [1], "instances": [%s]}' % good,
            "V1, out of range": instances([{**row, "features": {**features, name: 1e30}}]),
            "V1, unknown entity": instances([{**row, "entity": dict.fromkeys(row["entity"], "nobody")}]),
            "V1, bad UTF-8": b'{"instances": ["\xff"]}',
        }.items()},
        "V1, no time left": post(instances([row]), [b"x-hafnium-deadline-ms: 0"], V1),
        "V1, other label": post(instances([row]), [b"content-type: text/plain"], V1),
        "V1, chunks": post(instances([row]), [b"transfer-encoding: chunked"], V1),
        "V1, a length of tensors": post(instances([row]), [b"inference-header-content-length: 10"], V1),
        "V1, a cloud event": post(instances([row]), [b"ce-id: 1", b"ce-type: x", b"ce-source: y", b"ce-specversion: 1.0"], V1),
        "GET": b"GET /v1/score HTTP/1.1\r\nhost: h\r\n\r\n",
        "two at once": post(good) + post(good),
    }


CASES = [
    "a row", "an id of its own", "explained", "an unknown entity", "no entity", "an unknown field", "a field of the wrong type",
    "a missing field", "a field that is null", "out of range", "NaN", "a list", "no JSON", "nothing", "bad UTF-8", "an old event",
    "a time without offset", "no time left", "a deadline that is no number", "a long id", "an arm", "chunks",
    "a batch", "V1", "GET", "two at once",
    *(f"V1, {name}" for name in (
        "explained", "an id of its own", "rows", "nobody", "one bad row of three", "no rows", "no list", "a row of numbers",
        "a row of null", "more keys", "other keys", "not JSON", "a list", "nothing", "NaN", "deep", "too many", "twice the key",
        "out of range", "unknown entity", "bad UTF-8", "no time left", "other label", "chunks", "a length of tensors", "a cloud event",
    )),
]


def seen(port: int, sent: bytes) -> list[RawAnswer]:
    def stable(a: RawAnswer) -> RawAnswer:
        """Without what is drawn anew for each request."""
        own = tuple(h for h in a.headers if not (h[0] == b"x-request-id" and len(h[1]) == 32) and h[0] != b"content-length")
        body = a.body
        try:
            parsed = json.loads(body)
            if isinstance(parsed, dict) and len(str(parsed.get("request_id", ""))) == 32:
                parsed["request_id"] = "drawn"
            body = json.dumps(parsed).encode()
        except ValueError:
            pass
        return RawAnswer(a.status_line, own, body)

    return [stable(a) for a in answers(exchange(port, [sent], silence_s=5.0))]


@pytest.mark.parametrize("name", CASES)
def test_a_request_gets_the_same_answer_on_both_paths(chain: Any, plain: Server, name: str) -> None:
    made = cases(chain.contract)
    assert sorted(made) == sorted(CASES)
    hot = seen(chain.transformer.port, made[name])
    assert hot == seen(plain.port, made[name])
    assert not any(a.status_line.startswith(b"HTTP/1.1 500") for a in hot)


def test_rows_that_share_a_batch_keep_their_own_answers(chain: Any) -> None:
    rows = synthetic_rows(chain.contract, 60, seed=11)
    alone = [json.loads(answers(exchange(chain.transformer.port, [post(json.dumps(r).encode())]))[0].body) for r in rows]
    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(
            lambda r: json.loads(answers(exchange(chain.transformer.port, [post(json.dumps(r).encode())]))[0].body), rows))
    assert together == alone
    assert len({a["request_id"] for a in together}) == 60


def ask(port: int, body: bytes, headers: list[bytes] | None = None) -> tuple[bytes, float, RawAnswer]:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.sendall(post(body, headers))
        raw = s.recv(2**20)
    [answer] = answers(raw)
    return answer.status_line.split()[1], time.monotonic() - began, answer


@pytest.mark.slow
def test_each_row_has_its_own_deadline_while_the_predictor_hangs(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    body = json.dumps(synthetic_rows(contract, 1, seed=0)[0]).encode()
    args = ["--deadline_ms", "1500", "--breaker_pause_max_s", "0.5"]
    with chain_of(bundle, tmp_path, repo, args) as (behind, front):
        with stopped(behind):
            with ThreadPoolExecutor(8) as pool:
                given = [300, 600, 900, None] * 2
                got = list(pool.map(
                    lambda ms: ask(front.port, body, [] if ms is None else [b"x-hafnium-deadline-ms: %d" % ms]), given))
            assert {status for status, _, _ in got} <= {b"504", b"503"}
            for ms, (_, took, _) in zip(given, got, strict=True):
                assert took < (ms or 1500) / 1000.0 + 0.5
            for _ in range(6):  # by now it is known to hang: nobody waits for it, but for one in a while
                ask(front.port, body, [b"x-hafnium-deadline-ms: 200"])
            refused = [ask(front.port, body) for _ in range(5)]
            assert any(s == b"503" and took < 0.2 and b"asked again in" in a.body for s, took, a in refused)
            assert all(dict(a.headers).get(b"retry-after") for s, _, a in refused if s == b"503")
        wait_until(lambda: ask(front.port, body)[0] == b"200")


@pytest.mark.slow
def test_a_new_contract_behind_the_same_address_is_taken_over_by_rows_in_a_batch(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    rows = synthetic_rows(contract, 20, seed=0)
    data = contract.model_dump(mode="json")
    data["version"] = "2"
    newer = make_bundle(tmp_path / "b2", ModelContract.model_validate(data), version="8", bias=-1.5)
    with chain_of(bundle, tmp_path, repo, PATIENT) as (behind, front):
        behind.kill()
        with predictor(newer.path, tmp_path, port=behind.port) as other:
            other.wait()
            with ThreadPoolExecutor(10) as pool:
                got = list(pool.map(lambda r: ask(front.port, json.dumps(r).encode()), rows))
            assert {json.loads(a.body)["model_version"] for _, _, a in got} == {"8"}


@pytest.mark.slow
def test_one_client_s_limit_is_not_another_s_and_says_when_to_come_again(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    body = json.dumps(row).encode()
    args = [*PATIENT, "--rate_limit_per_s", "0.5", "--rate_limit_burst", "3", "--score_decimals", "2"]
    with chain_of(bundle, tmp_path, repo, args) as (_behind, front):
        mine = [ask(front.port, body, [b"x-api-key: mine"]) for _ in range(4)]
        assert [s for s, _, _ in mine] == [b"200", b"200", b"200", b"429"]
        assert 1 <= int(dict(mine[3][2].headers)[b"retry-after"]) <= 2
        assert ask(front.port, body, [b"x-api-key: yours"])[0] == b"200"
        answer = json.loads(mine[0][2].body)
        assert answer["score"] == round(answer["score"], 2)
        many = front.post("/v1/score/batch", {"requests": [row] * 3}, {"x-api-key": "theirs"})
        assert many.status == 200
        assert front.post("/v1/score/batch", {"requests": [row] * 3}, {"x-api-key": "theirs"}).status == 429
        asked = {"instances": [row] * 3}
        assert [front.post("/v1/models/m:predict", asked, {"x-api-key": "by V1"}).status for _ in range(2)] == [200, 429]
        # Without a key it is the connection's address on both paths, whatever a header says. The batch leaves a debt of a minute
        assert front.post("/v1/score/batch", {"requests": [row] * 30}, {"x-forwarded-for": "10.0.0.1"}).status == 200
        assert front.post("/v1/score", row, {"x-forwarded-for": "10.0.0.2"}).status == 429
        assert ask(front.port, body, [b"x-forwarded-for: 10.0.0.3"])[0] == b"429"
        fields = {**row["entity"], **row["features"]}
        kinds = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
        inputs = [{"name": n, "shape": [4], "datatype": kinds[type(v)], "data": [v] * 4} for n, v in fields.items() if v is not None]
        for path, more in (("/v2/models/m/infer", {"inputs": inputs}), (V1.decode(), {"instances": [row] * 4}),
                           (V1.decode(), {"instances": [row] * 4, "also": 1}), ("/v1/score/batch", {"requests": [row] * 4})):
            key = {"x-api-key": f"more than the burst {path} {len(more)}"}
            assert [front.post(path, more, key).status for _ in range(2)] == [200, 429], path
        assert 'inference_errors_total{component="transformer",model_name="unified-risk",model_version="7",type="rate_limited"} 9.0' \
            in front.get("/metrics").body.decode()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["transformer", "predictor"])
def test_sigterm_under_load_loses_nothing(part: str, bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path) -> None:
    """The transformer finishes what it has; a predictor that is restarted behind it is waited for within the deadline."""
    requests = [post(json.dumps(r).encode()) for r in synthetic_rows(contract, 50, seed=0)]
    with chain_of(bundle, tmp_path, repo, PATIENT) as (behind, front), SteadyLoad(front.port, requests, clients=6) as load:
        load.wait_for(100)
        if part == "transformer":
            load.ending()
            assert front.stop() == 0
        else:  # as a rolling update does it: the new one is ready before the old one is told to stop
            with predictor(bundle.path, tmp_path) as newer:
                newer.wait()
                assert behind.stop() == 0
                load.wait_for(6)  # each of the clients has seen that it is gone
            load.finish()
    if part == "transformer":
        assert not load.lost
    else:  # its address is gone for good here, where a Service would lead to the new one: what was in flight is not lost
        assert all(b"can't be reached" in answer or b"asked again" in answer for answer in load.lost)


def test_what_one_client_sends_behind_a_request_is_none_of_the_others_business(chain: Any) -> None:
    """While a row is due its client sends what no handler expects; the rows that share the batch get their answers all the same."""
    body = json.dumps(synthetic_rows(chain.contract, 1, seed=2)[0]).encode()
    deep = b'{"features": {"transaction_amount": ' + b"[" * 1010 + b"]" * 1010 + b"}}"
    nasty = [post(body, [b"x-hafnium-deadline-ms: " + b"9" * 400]), post(deep), post(body, [b"x-hafnium-deadline-ms: " + b"9" * 5000])]
    port = chain.transformer.port
    stop = threading.Event()

    def attacker(k: int) -> None:
        while not stop.is_set():
            with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
                s.sendall(post(body))
                s.sendall(nasty[k % len(nasty)])
                s.settimeout(0.2)
                try:
                    while s.recv(2**16):
                        pass
                except TimeoutError:
                    pass

    attackers = [threading.Thread(target=attacker, args=(k,)) for k in range(3)]
    for t in attackers:
        t.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda _: ask(port, body)[0], range(120)))
    finally:
        stop.set()
        for t in attackers:
            t.join(20)
    assert set(got) == {b"200"}


def test_pipelined_rows_whose_time_is_over_do_not_stop_the_clock(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    body = json.dumps(synthetic_rows(contract, 1, seed=0)[0]).encode()
    args = ["--deadline_ms", "1000", "--breaker_failures_max", "1000"]
    with chain_of(bundle, tmp_path, repo, args) as (behind, front), stopped(behind):
        sockets = [socket.create_connection(("127.0.0.1", front.port), timeout=10) for _ in range(12)]
        for s in sockets:
            s.sendall(post(body, [b"x-hafnium-deadline-ms: 150"]))
            s.sendall(post(body, [b"x-hafnium-deadline-ms: 150"]))
        for s in sockets:
            raw = b""
            while raw.count(b"HTTP/1.1 504") < 2:
                part = s.recv(2**16)
                assert part
                raw += part
            s.close()
        status, took, _ = ask(front.port, body, [b"x-hafnium-deadline-ms: 150"])
        assert status == b"504"
        assert took < 0.6


def test_a_body_that_never_comes_is_given_up_and_holds_nobody_up(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    body = json.dumps(synthetic_rows(contract, 1, seed=0)[0]).encode()
    args = ["--deadline_ms", "1000", "--in_flight_max", "4", "--lookup_timeout_ms", "900"]
    with chain_of(bundle, tmp_path, repo, args) as (_behind, front):
        sockets = [socket.create_connection(("127.0.0.1", front.port), timeout=10) for _ in range(4)]
        for s in sockets:
            s.sendall(b"POST /v1/score/batch HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{")
        for _ in range(8):  # as many as may be in progress wait for their bodies, and take nobody's place
            assert ask(front.port, body)[0] == b"200"
        for s in sockets:
            assert s.recv(2**16).startswith(b"HTTP/1.1 408")
            s.close()
        assert ask(front.port, body)[0] == b"200"
