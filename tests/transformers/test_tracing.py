"""A request's trace goes through both hops, and nothing personal with it: real servers, and a collector that reads OTLP's protobuf."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from hafnium_otlp import Collector, SeenSpan
from hafnium_raw_http import RawAnswer, answers
from hafnium_servers import Server, free_port, http, lines_of, predictor, stopped, transformer
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle, synthetic_rows

SCORE, BATCH, V1, V2 = "/v1/score", "/v1/score/batch", "/v1/models/m:predict", "/v2/models/m/infer"
PATIENT = ["--deadline_ms", "20000", "--lookup_timeout_ms", "10000"]
INTERNAL, SERVER, CLIENT = 1, 2, 3


@dataclass(frozen=True)
class Traced:
    predictor: Server
    transformer: Server
    collector: Collector
    contract: ModelContract
    grpc_port: int


@pytest.fixture(scope="module", params=["hot path", "plain"])
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, repo: Path, contract: ModelContract,
) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    hot = ["--hot_path", str(request.param == "hot path")]
    grpc_port = free_port()
    args = [*hot, *PATIENT, "--enable_grpc", "true", "--grpc_port", str(grpc_port), "--batches_in_flight_max", "1"]
    with Collector() as collector, predictor(bundle.path, folder, args=hot, env=collector.env) as behind, transformer(
        behind.port, folder, repo=repo, args=args, env=collector.env,
    ) as front:
        behind.wait()
        front.wait()
        yield Traced(behind, front, collector, contract, grpc_port)


@dataclass(frozen=True)
class Caller:
    """Somebody with a trace of his own."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def headers(self) -> dict[str, str]:
        return {"traceparent": f"00-{self.trace_id}-{self.span_id}-0{int(self.sampled)}"}


def caller(*, sampled: bool = True) -> Caller:
    return Caller(secrets.token_hex(16), secrets.token_hex(8), sampled)


def by_name(spans: list[SeenSpan], service: str) -> dict[str, SeenSpan]:
    found = {s.name: s for s in spans if s.service == service}
    assert len(found) == sum(s.service == service for s in spans)
    return found


def v2_body(row: dict[str, Any]) -> bytes:
    kinds = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
    fields = {**row["entity"], **row["features"], "event_time": row["event_time"]}
    return json.dumps({"inputs": [{"name": n, "shape": [1], "datatype": kinds[type(v)], "data": [v]} for n, v in fields.items()]}).encode()


def test_one_trace_from_the_caller_to_the_predictor(traced: Traced) -> None:
    row, me = synthetic_rows(traced.contract, 1, seed=0)[0], caller()
    reply = traced.transformer.post(SCORE, row, {**me.headers, "tracestate": "shop=till-3", "x-request-id": "order-17"})
    assert reply.status == 200
    assert reply.headers["x-request-id"] == "order-17"
    spans = traced.collector.trace(me.trace_id, 4)
    front = by_name(spans, "hafnium-transformer")
    server, lookup, predict = front["POST /v1/score"], front["lookup"], front["predict"]
    [scored] = by_name(spans, "hafnium-predictor").values()
    assert [server.parent_id, lookup.parent_id, predict.parent_id, scored.parent_id] == \
        [me.span_id, server.span_id, server.span_id, predict.span_id]
    assert [server.kind, lookup.kind, predict.kind, scored.kind] == [SERVER, INTERNAL, CLIENT, SERVER]
    assert {s.trace_state for s in spans} == {"shop=till-3"}
    assert all(s.start_ns <= s.end_ns and not s.links and s.status == 0 for s in spans)
    assert server.start_ns <= lookup.start_ns <= lookup.end_ns <= predict.start_ns <= scored.start_ns <= predict.end_ns <= server.end_ns
    known = http("GET", f"{traced.predictor.url}/v1/models/m/contract").json
    for span in (server, predict, scored):
        assert {k: span.attributes[f"hafnium.model.{k}"] for k in ("name", "version", "digest")} == \
            {"name": known["model_name"], "version": known["model_version"], "digest": known["model_digest"]}
    assert {s.attributes["hafnium.rows"] for s in (server, predict, scored, lookup)} == {1}
    assert {s.attributes["hafnium.request_id"] for s in (server, scored)} == {"order-17"}
    assert [s.attributes["http.response.status_code"] for s in (server, predict, scored)] == [200] * 3
    assert server.attributes["hafnium.degraded"] == reply.json["degraded"]
    assert lookup.attributes["hafnium.rows_without_lookup"] == 0
    assert (scored.name, scored.attributes["http.route"]) == (f"POST {V2}", V2)
    assert server.resource["service.version"]


@pytest.mark.parametrize("path", [BATCH, V1, V2])
def test_rows_of_one_request_are_one_trace_on_every_route(traced: Traced, path: str) -> None:
    rows, me = synthetic_rows(traced.contract, 3, seed=1), caller()
    body: Any = {BATCH: {"requests": [*rows, {}]}, V1: {"instances": rows}, V2: v2_body(rows[0])}[path]
    assert traced.transformer.post(path, body, {**me.headers, "x-request-id": "b-1"}).status == 200
    spans = traced.collector.trace(me.trace_id, 4)
    front = by_name(spans, "hafnium-transformer")
    server = front[f"POST {path}"]
    count = {BATCH: 4, V1: 3, V2: 1}[path]
    assert (server.parent_id, server.attributes["hafnium.rows"], server.attributes["hafnium.rows_failed"]) == \
        (me.span_id, count, int(path == BATCH))
    assert front["predict"].attributes["hafnium.rows"] == min(count, 3)
    [scored] = by_name(spans, "hafnium-predictor").values()
    assert (scored.parent_id, scored.attributes["hafnium.request_id"]) == (front["predict"].span_id, "b-1")


def test_a_grpc_request_carries_its_trace_in_the_metadata(traced: Traced) -> None:
    row, me = synthetic_rows(traced.contract, 1, seed=2)[0], caller()
    inputs = [InferInput(one["name"], one["shape"], one["datatype"], one["data"]) for one in json.loads(v2_body(row))["inputs"]]
    metadata = (("traceparent", me.headers["traceparent"]), ("x-request-id", "g-1"))
    with grpc.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        stub.ModelInfer(InferRequest("m", inputs).to_grpc(), timeout=20, metadata=metadata)
        spans = traced.collector.trace(me.trace_id, 4)
        server = by_name(spans, "hafnium-transformer")["inference.GRPCInferenceService/ModelInfer"]
        assert (server.parent_id, server.attributes["hafnium.request_id"], server.attributes["rpc.system"]) == (me.span_id, "g-1", "grpc")
        wrong = caller()
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(InferRequest("m", inputs[:1]).to_grpc(), timeout=20, metadata=tuple(wrong.headers.items()))
        [refused] = traced.collector.trace(wrong.trace_id, 1)
        assert (refused.attributes["error.type"], refused.attributes["http.response.status_code"]) == ("invalid_row", 422)


def test_what_the_caller_does_not_record_nobody_does(traced: Traced) -> None:
    row = synthetic_rows(traced.contract, 1, seed=3)[0]
    silent, loud = caller(sampled=False), caller()
    for path, body in ((SCORE, row), (BATCH, {"requests": [row]}), (V1, {"instances": [row]})):
        assert traced.transformer.post(path, body, silent.headers).status == 200
    assert traced.transformer.post(SCORE, row, loud.headers).status == 200
    traced.collector.trace(loud.trace_id, 4)
    assert not [s for s in traced.collector.spans if s.trace_id == silent.trace_id]


@pytest.mark.parametrize("headers", [
    [], [b"traceparent: 00-abc-def-01"], [b"traceparent: " + b"0" * 5000], [b"traceparent: 00-" + b"0" * 32 + b"-00f067aa0ba902b7-01"],
    [b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"] * 2,
    [b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\x01"],
], ids=["none", "no ids", "over-long", "zero", "twice", "control character"])
def test_a_trace_that_cannot_be_read_begins_anew(traced: Traced, headers: list[bytes]) -> None:
    own = secrets.token_hex(8)
    body = json.dumps(synthetic_rows(traced.contract, 1, seed=4)[0]).encode()
    status = raw_post(traced.transformer.port, body, [f"x-request-id: {own}".encode(), b"tracestate: a=1", *headers])[0]
    if status == b"400":  # uvicorn refuses a header with a control character before we see it
        assert headers[0].endswith(b"\x01")
        return
    assert status == b"200"
    spans = traced.collector.wait(lambda seen: sum(s.attributes.get("hafnium.request_id") == own for s in seen) == 2)
    [root] = [s for s in spans if s.attributes.get("hafnium.request_id") == own and s.service == "hafnium-transformer"]
    whole = traced.collector.trace(root.trace_id, 4)
    assert root.parent_id == ""
    assert root.trace_id != "4bf92f3577b34da6a3ce929d0e0e4736"
    assert {s.trace_state for s in whole} == {""}


def raw_post(port: int, body: bytes, headers: list[bytes], path: str = SCORE) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head = [b"POST %s HTTP/1.1" % path.encode(), b"host: h", b"content-type: application/json", b"content-length: %d" % len(body), *headers]
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        s.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
        answer = received(s)
    return answer.status_line.split()[1], dict(answer.headers), answer.body


@pytest.mark.parametrize("headers", [
    [b"x-request-id: " + b"a" * 257], [b"x-request-id: a\tb"], [b"x-request-id: caf\xe9"], [b"x-request-id: one", b"x-request-id: two"],
    [b"x-request-id:"], [],
], ids=["over-long", "control character", "not ASCII", "twice", "empty", "none"])
@pytest.mark.parametrize("path", [SCORE, BATCH])
def test_an_id_that_is_malformed_is_replaced_and_goes_no_further(traced: Traced, headers: list[bytes], path: str) -> None:
    row, me = synthetic_rows(traced.contract, 1, seed=5)[0], caller()
    del row["request_id"]
    body = json.dumps(row if path == SCORE else {"requests": [row]}).encode()
    status, answered, _ = raw_post(traced.transformer.port, body, [*headers, f"traceparent: {me.headers['traceparent']}".encode()], path)
    assert status == b"200"
    made = answered[b"x-request-id"].decode()
    assert re.fullmatch("[0-9a-f]{32}", made)
    spans = traced.collector.trace(me.trace_id, 4)
    assert {s.attributes["hafnium.request_id"] for s in spans if s.kind == SERVER} == {made}


def received(s: socket.socket) -> RawAnswer:
    """One answer, whole."""
    raw = b""
    while True:
        part = s.recv(2**20)
        assert part, raw
        raw += part
        head, end, body = raw.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length is not None and len(body) >= int(length[1]):
            [answer] = answers(raw)
            return answer


def together(server: Server, requests: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Requests that arrive at once: the process is stopped until the bytes of all are in its sockets."""
    assert server.process is not None
    sockets = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in requests]
    try:
        for s in sockets:  # accepted, before the process is stopped
            s.sendall(b"GET /health/live HTTP/1.1\r\nhost: h\r\n\r\n")
            received(s)
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            for s, request in zip(sockets, requests, strict=True):
                s.sendall(request)
            time.sleep(0.05)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        found = [received(s) for s in sockets]
        return [(a.status_line.split()[1], a.body) for a in found]
    finally:
        for s in sockets:
            s.close()


def score_request(row: dict[str, Any], request_id: str, who: Caller | None) -> bytes:
    body = json.dumps(row).encode()
    lines = [] if who is None else [f"traceparent: {who.headers['traceparent']}"]
    head = [f"POST {SCORE} HTTP/1.1", "host: h", f"content-length: {len(body)}", f"x-request-id: {request_id}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def test_a_prediction_that_callers_share_is_linked_with_each_of_them(traced: Traced) -> None:
    """Eight that are recorded, four that are not: those must not be seen, nor cost the others their links."""
    count = 12
    rows = synthetic_rows(traced.contract, count, seed=6)
    callers = [caller(sampled=i % 3 != 0) for i in range(count)]
    ids = [f"many-{secrets.token_hex(4)}-{i}" for i in range(count)]
    got = together(traced.transformer, [score_request(r, i, c) for r, i, c in zip(rows, ids, callers, strict=True)])
    assert {status for status, _ in got} == {b"200"}
    recorded = {c.trace_id: c for c in callers if c.sampled}
    assert len(recorded) == 8
    spans = traced.collector.wait(lambda seen: sum(s.name == "POST /v1/score" and s.trace_id in recorded for s in seen) == 8)
    servers = {s.trace_id: s for s in spans if s.name == "POST /v1/score" and s.trace_id in recorded}
    assert all(s.parent_id == recorded[t].span_id for t, s in servers.items())
    ours = {(s.trace_id, s.span_id) for s in servers.values()}
    predicts = [s for s in spans if s.name == "predict" and s.trace_id in recorded]
    reached = {t: [p for p in predicts if p.trace_id == t or (t, s.span_id) in p.links] for t, s in servers.items()}
    assert all(len(found) == 1 for found in reached.values()), "each caller has one prediction"
    if "False" in traced.transformer.argv:  # without the hot path nothing is shared
        assert len(predicts) == 8
        return
    shared = max(predicts, key=lambda p: p.attributes["hafnium.rows"])
    assert shared.attributes["hafnium.rows"] > 2
    assert set(shared.links) <= ours
    assert len(shared.links) > 1
    for trace_id, server in servers.items():
        [mine] = reached[trace_id]
        if mine.trace_id != trace_id:  # it leads to a prediction in another caller's trace, and says when that was over
            assert (mine.trace_id, mine.span_id) in server.links
            assert [name for name, _ in server.events] == ["lookup", "predict"]

    def at_predictor(seen: list[SeenSpan]) -> list[SeenSpan]:
        return [s for s in seen if s.service == "hafnium-predictor" and s.trace_id in recorded]

    everything = traced.collector.wait(lambda seen: len(at_predictor(seen)) == len(predicts))
    behind = at_predictor(everything)
    assert {s.parent_id for s in behind} == {p.span_id for p in predicts}
    assert not [s for s in everything if s.trace_id in {c.trace_id for c in callers if not c.sampled}]
    # every id of the batch, also of those that are not recorded, is at the predictor
    shown = ",".join(s.attributes["hafnium.request_id"] for s in behind).split(",")
    [whole] = [s for s in behind if s.attributes["hafnium.rows"] == shared.attributes["hafnium.rows"]]
    assert len(whole.attributes["hafnium.request_id"].split(",")) == whole.attributes["hafnium.rows"]
    assert {i for i, c in zip(ids, callers, strict=True) if c.sampled} <= set(shown)


def test_a_plain_row_s_prediction_never_carries_somebody_s_explanation(traced: Traced) -> None:
    """Plain and explained rows that arrive at once: each plain caller's prediction has the rows of plain callers and no others."""
    count = 12
    rows = [{**r, "explain": i % 2 == 1} for i, r in enumerate(synthetic_rows(traced.contract, count, seed=12))]
    right = [traced.transformer.post(SCORE, {**r, "explain": False}).json["score"] for r in rows]
    callers = [caller() for _ in rows]
    got = together(traced.transformer, [score_request(r, f"apart-{i}", c) for i, (r, c) in enumerate(zip(rows, callers, strict=True))])
    answers_of = [json.loads(body) for _, body in got]
    assert [a["score"] for a in answers_of] == right, "to the last bit, whoever shares the prediction"
    assert [bool(a.get("explanation")) for a in answers_of] == [r["explain"] for r in rows]
    mine = {c.trace_id: i for i, c in enumerate(callers)}
    spans = traced.collector.wait(lambda seen: sum(s.name == "POST /v1/score" and s.trace_id in mine for s in seen) == count)
    predicts = [s for s in spans if s.name == "predict" and s.trace_id in mine]
    served = {p.span_id: {mine[t] for t, _ in p.links} or {mine[p.trace_id]} for p in predicts}
    assert sorted(i for found in served.values() for i in found) == list(range(count))
    for p in predicts:
        explained = {rows[i]["explain"] for i in served[p.span_id]}
        assert len(explained) == 1, "a batch is plain or explained"
        assert p.attributes["hafnium.rows"] == (len(served[p.span_id]) if explained == {False} else 58 * len(served[p.span_id]))
    everything = traced.collector.wait(
        lambda seen: sum(s.service == "hafnium-predictor" and s.trace_id in mine for s in seen) == len(predicts))
    for scored in (s for s in everything if s.service == "hafnium-predictor" and s.trace_id in mine and "hafnium.run_rows" in s.attributes):
        if not rows[min(served[scored.parent_id])]["explain"]:
            assert scored.attributes["hafnium.run_rows"] < 58, "nor does a run of the model"


def test_a_refused_row_is_no_error_of_the_server_and_its_values_stay_here(traced: Traced) -> None:
    row, me = synthetic_rows(traced.contract, 1, seed=7)[0], caller()
    row["features"]["transaction_amount"] = "secret-amount"
    row["entity"] = dict.fromkeys(row["entity"], "secret-customer")
    reply = traced.transformer.post(SCORE, row, me.headers)
    assert reply.status == 422
    assert "secret-amount" in reply.body.decode(), "the caller is told; the collector is not"
    [span] = traced.collector.trace(me.trace_id, 1)
    assert (span.status, span.attributes["http.response.status_code"], span.attributes["error.type"]) == (0, 422, "invalid_row")
    assert (span.status_message, span.events) == ("", ())
    good, other = synthetic_rows(traced.contract, 1, seed=8)[0], caller()
    good["entity"] = dict.fromkeys(good["entity"], "secret-customer")
    good["features"]["transaction_amount"] = 77.123456
    traced.transformer.post(SCORE, good, other.headers)
    traced.transformer.post(BATCH, {"requests": [good]}, other.headers)
    traced.collector.trace(other.trace_id, 8)
    sent = b"".join(traced.collector.raw)
    assert b"secret" not in sent
    assert b"77.123" not in sent
    for name in traced.contract.request_fields:
        assert name.encode() not in sent


def test_malformed_bodies_and_late_callers_leave_spans_too(traced: Traced) -> None:
    row = synthetic_rows(traced.contract, 1, seed=9)[0]
    for body, headers, status, kind in (
        (b"{", {}, 400, "bad_request"), (row, {"x-hafnium-deadline-ms": "-1"}, 504, "deadline"),
        (row, {"x-hafnium-deadline-ms": "x"}, 400, "bad_request"),
    ):
        me = caller()
        assert traced.transformer.post(SCORE, body, {**me.headers, **headers}).status == status
        [span] = traced.collector.trace(me.trace_id, 1)
        assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (status, kind)
        assert span.status == (2 if status >= 500 else 0)


@pytest.mark.slow
def test_what_is_refused_on_the_hot_path_has_a_span_that_says_why(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=13)[0]
    args = [*PATIENT, "--in_flight_max", "1", "--rate_limit_per_s", "0.001", "--rate_limit_burst", "1", "--body_bytes_max", "5000"]
    with Collector() as collector, predictor(bundle.path, tmp_path, env=collector.env) as behind, transformer(
        behind.port, tmp_path, repo=repo, args=args, env=collector.env,
    ) as front:
        behind.wait()
        front.wait()

        def refused(body: Any, key: str, status: int) -> SeenSpan:
            me = caller()
            assert front.post(SCORE, body, {**me.headers, "x-api-key": key, "x-request-id": key}).status == status
            [span] = collector.trace(me.trace_id, 1)
            assert (span.name, span.kind, span.parent_id) == ("POST /v1/score", SERVER, me.span_id)
            assert (span.attributes["http.response.status_code"], span.attributes["hafnium.request_id"]) == (status, key)
            assert span.attributes["hafnium.model.version"] == "7"
            return span

        assert front.post(SCORE, row, {"x-api-key": "mine"}).status == 200
        limited = refused(row, "mine", 429)
        assert (limited.attributes["error.type"], limited.status) == ("rate_limited", 0)
        large = refused({**row, "padding": "x" * 6000}, "large", 413)
        assert (large.attributes["error.type"], large.status) == ("too_large", 0)
        with stopped(behind), socket.create_connection(("127.0.0.1", front.port), timeout=30) as s:
            s.sendall(score_request(row, "first", None))
            until = time.monotonic() + 30  # until it is in progress; a probe that comes before it waits for its own deadline
            while front.post(SCORE, row, {"x-hafnium-deadline-ms": "50"}).status != 503 and time.monotonic() < until:
                pass
            over = refused(row, "over", 503)
            assert (over.attributes["error.type"], over.status, over.status_message) == ("overloaded", 2, "")


def lines_about(server: Server, wanted: set[str]) -> list[dict[str, Any]]:
    """The lines that name these requests. A request is logged after its answer, so they are waited for."""
    until = time.monotonic() + 20
    while True:
        lines = [(x, wanted & {x.get("request_id", ""), *x.get("request_ids", ())}) for x in lines_of(server)]
        if set().union(*(ids for _, ids in lines)) == wanted:
            return [x for x, ids in lines if ids]
        assert time.monotonic() < until, f"{wanted} are not all in the log:\n{server.log}"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_predictor_that_is_gone_and_one_with_another_contract(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    """503 and 409: what failed shows in the trace, and each caller's id in a log."""
    rows = synthetic_rows(contract, 6, seed=10)
    data = contract.model_dump(mode="json")
    data["version"] = "2"
    newer = make_bundle(tmp_path / "b2", ModelContract.model_validate(data), version="8", bias=-1.5)
    args = [*PATIENT, "--batches_in_flight_max", "1"]
    with Collector() as collector, predictor(bundle.path, tmp_path, env=collector.env) as behind, transformer(
        behind.port, tmp_path, repo=repo, args=args, env=collector.env,
    ) as front:
        behind.wait()
        front.wait()
        behind.kill()
        me = caller()
        assert front.post(SCORE, rows[0], {**me.headers, "x-request-id": "alone"}).status == 503
        spans = by_name(collector.trace(me.trace_id, 3), "hafnium-transformer")
        assert (spans["POST /v1/score"].status, spans["POST /v1/score"].attributes["http.response.status_code"]) == (2, 503)
        assert (spans["predict"].status, spans["predict"].attributes["error.type"]) == (2, "unavailable")
        assert "http.response.status_code" not in spans["predict"].attributes, "nobody answered"
        [line] = lines_about(front, {"alone"})
        assert (line["status"], line["kind"], line["trace_id"]) == (503, "unavailable", me.trace_id)
        callers = [caller() for _ in rows]
        got = together(front, [score_request(r, f"gone-{i}", c) for i, (r, c) in enumerate(zip(rows, callers, strict=True))])
        assert {s for s, _ in got} == {b"503"}
        assert lines_about(front, {f"gone-{i}" for i in range(6)})
        with predictor(newer.path, tmp_path, port=behind.port, env=collector.env) as other:
            other.wait()
            until = time.monotonic() + 30
            while front.get("/health/ready").status != 200 and time.monotonic() < until:
                time.sleep(0.1)
            time.sleep(2.1)  # the breaker's longest pause
            callers = [caller() for _ in rows]
            got = together(front, [score_request(r, f"new-{i}", c) for i, (r, c) in enumerate(zip(rows, callers, strict=True))])
            assert {s for s, _ in got} == {b"200"}
            mine = {c.trace_id for c in callers}
            # Two processes, each of which sends when it likes
            seen = collector.wait(lambda spans: sum(s.name == "POST /v1/score" and s.trace_id in mine for s in spans) == 6 and {
                s.attributes.get("http.response.status_code") for s in spans if s.service == "hafnium-predictor" and s.trace_id in mine
            } >= {200, 409})
            refused = [s for s in seen if s.trace_id in mine and s.attributes.get("http.response.status_code") == 409]
            assert {(s.service, s.name) for s in refused} == {("hafnium-transformer", "predict"), ("hafnium-predictor", f"POST {V2}")}
            assert {s.attributes["error.type"] for s in refused} == {"contract_mismatch"}
            again = [s for s in seen if s.trace_id in mine and s.name == "predict" and s.attributes.get("http.response.status_code") == 200]
            assert {s.attributes["hafnium.model.version"] for s in again} == {"8"}
            logged = [x for x in lines_of(other) if x.get("status") == 409]
            ids = {i for x in logged for i in x["request_id"].split(",")}
            assert ids
            assert ids <= {f"new-{i}" for i in range(6)}
            if len(logged) == 1:
                assert len(ids) == refused[0].attributes.get("hafnium.rows", len(ids))


@pytest.mark.slow
def test_without_tracing_a_readable_trace_goes_through_and_a_malformed_one_does_not(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    """The predictor records here, and the transformer does not: what it passes on is what the predictor's spans show."""
    row = synthetic_rows(contract, 1, seed=11)[0]
    with Collector() as collector, predictor(bundle.path, tmp_path, env=collector.env) as behind, transformer(
        behind.port, tmp_path, repo=repo, args=PATIENT,
    ) as front:
        behind.wait()
        front.wait()
        for path, body in ((SCORE, row), (BATCH, {"requests": [row]}), (V1, {"instances": [row]})):
            me = caller()
            assert front.post(path, body, {**me.headers, "tracestate": "a=1", "x-request-id": "one"}).status == 200
            [span] = collector.trace(me.trace_id, 1)
            assert (span.parent_id, span.trace_state, span.attributes["hafnium.request_id"]) == (me.span_id, "a=1", "one")
            bad = secrets.token_hex(8)
            assert front.post(path, body, {"traceparent": "00-zz", "tracestate": "a=1", "x-request-id": bad}).status == 200
            spans = collector.wait(lambda seen, bad=bad: any(s.attributes.get("hafnium.request_id") == bad for s in seen))
            [root] = [s for s in spans if s.attributes.get("hafnium.request_id") == bad]
            assert (root.parent_id, root.trace_state) == ("", "")
        assert "trace_spans_dropped_total" not in front.get("/metrics").body.decode()
