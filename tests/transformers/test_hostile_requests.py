"""Requests that are made to hurt: they cost the others nothing, and are answered in a few words. Both parts."""

from __future__ import annotations

import gc
import json
import re
import socket
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hafnium_raw_http import connect, read_answer
from hafnium_servers import Server, free_port, predictor, transformer
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from prometheus_client import CollectorRegistry

from hafnium_contract.bundle import Bundle
from hafnium_contract.json_nesting import holds_more_than
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.serving.hot_protocol import HeadReader
from hafnium_testing import synthetic_rows
from hafnium_transformer.admission import Admission
from hafnium_transformer.errors import RowInvalidError
from hafnium_transformer.gate import Gate
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.plan import make_plan
from hafnium_transformer.predictor_client import HopLimits, PredictorClient
from hafnium_transformer.rows import UNKNOWN_SHOWN_MAX
from hafnium_transformer.scoring import Scorer
from hafnium_transformer.settings import Settings

SCORE, V1, V2 = "/v1/score", "/v1/models/m:predict", "/v2/models/m/infer"
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
SHORT = 3000
"""Characters that say what is wrong in a request of any size."""


# --- header lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    b"a:" + b" " * 400_000 + b"\x01", b"a:" + b"x " * 200_000 + b"\x01", b"a:" + b"\t" * 400_000 + b"x" + b" " * 400_000 + b"\x7f",
    b"a" * 400_000 + b"\x01",
])
def test_a_line_that_is_wrong_at_its_end_is_read_once(line: bytes) -> None:
    """With an expression that can match in two ways this takes a quarter of an hour: as many looks as the square of its bytes."""
    assert HeadReader().read(b"content-length: 1\r\n" + line) is None


@given(name=st.binary(max_size=4), value=st.lists(st.sampled_from([b" ", b"\t", b"x", b"~", b"!", b":", b"\x01", b"\x7f", b"\xe4", b""])))
@example(b"a", [])
@example(b"a", [b" ", b"x", b" ", b"x", b"\t"])
def test_a_line_is_a_token_and_visible_text_without_the_space_around_it(name: bytes, value: list[bytes]) -> None:
    line = b"x-%s:%s" % (name, b"".join(value))
    assume(b"\r\n" not in line)
    token, _, text = line.partition(b":")
    good = TOKEN.fullmatch(token) is not None and all(b == 9 or 32 <= b <= 126 for b in text)
    found = HeadReader().read(b"content-length: 1\r\n" + line)
    assert found == ({b"content-length": b"1", token.lower(): text.strip(b" \t")} if good else None)


# --- much of it -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["features", "entity", None])
def test_a_thousand_unknown_fields_are_named_by_a_few(chain: Any, place: str | None) -> None:
    row = synthetic_rows(chain.contract, 1, seed=3)[0]
    more = {f"unknown_{i:04}": 1 for i in range(1000)}
    row = {**row, **more} if place is None else {**row, place: {**row[place], **more}}
    answer = chain.transformer.post(SCORE, row)
    assert answer.status == 422
    problems = answer.json["errors"]
    prefix = "" if place is None else f"{place}."
    assert [p["path"] for p in problems[:2]] == [f"{prefix}unknown_0000", f"{prefix}unknown_0001"]
    assert len(problems) == UNKNOWN_SHOWN_MAX + 1
    assert problems[-1]["message"] == f"{1000 - UNKNOWN_SHOWN_MAX} more unknown fields"


@pytest.mark.parametrize("body", [
    {"inputs": [{"name": f"a{i}", "shape": [1], "datatype": "FP32", "data": [1]} for i in range(4000)]},
    {"inputs": [{"name": "a", "shape": [1000], "datatype": "FP64", "data": [1] * 60_000}]},
    {"inputs": [{"name": "a", "shape": [1000, 1], "datatype": "FP64", "data": [[[1] * 60_000]]}]},
], ids=["inputs", "values", "values further inside"])
def test_more_than_a_batch_is_refused_before_the_sdk_converts_it(chain: Any, body: dict[str, Any]) -> None:
    for server in (chain.transformer, chain.predictor):
        answer = server.post(V2, body)
        assert answer.status == 400
        assert "more" in answer.json["detail"]
        assert len(answer.body) < SHORT


def test_the_largest_batch_is_taken_in_every_form(chain: Any) -> None:
    row = synthetic_rows(chain.contract, 1, seed=4)[0]
    small = {k: row[k] for k in ("entity", "features")}
    assert len(chain.transformer.post("/v1/score/batch", {"requests": [small] * 300}).json["results"]) == 300
    fields = {**row["entity"], **row["features"]}
    kinds = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
    inputs = [{"name": n, "shape": [1000], "datatype": kinds[type(v)], "data": [v] * 1000} for n, v in fields.items() if v is not None]
    assert chain.transformer.post(V2, {"inputs": inputs}).status == 200
    columns = len(chain.contract.inputs)
    assert len(chain.predictor.post(V1, {"instances": [[0] * columns] * 1000}).json["predictions"]) == 1000


@given(st.recursive(st.none() | st.integers(), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=1), x, max_size=4)),
       st.integers(0, 12))
def test_what_is_held_is_counted_at_every_level(value: Any, most: int) -> None:
    def held(x: Any) -> int:
        inner = list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else []
        return len(inner) + sum(map(held, inner))

    assert holds_more_than(value, most) == (held(value) > most)


@pytest.mark.parametrize(("path", "expected"), [
    ("/v1/models/m:explain", 501), ("/v2/models/m/versions/1/infer", 501), ("/v2/models/nobody/infer", 404),
    ("/v1/models/nobody:predict", 404), ("/anything", 404),
])
def test_a_body_for_a_route_that_is_not_there_is_not_kept(chain: Any, path: str, expected: int) -> None:
    """Ten times what is taken, without its end: the SDK's app would wait for all of it, and keep it."""
    for server in (chain.transformer, chain.predictor):
        with connect(server.port) as s:
            s.sendall(b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-length: 5000000000\r\n\r\n" % path.encode())
            sent = 0
            s.settimeout(60)
            try:
                while sent < 40_000_000:
                    sent += s.send(b" " * 65536)
            except (ConnectionError, TimeoutError):
                pass
            answer = answered(s)
        assert answer in (expected, None), "None: the connection was reset before it could be read"
        assert server.post(path, {}).status == expected
        assert memory_mb(server) < 1500


def answered(s: socket.socket) -> int | None:
    try:
        return read_answer(s).status
    except (ConnectionError, TimeoutError, OSError, AssertionError):
        return None


def memory_mb(server: Server) -> float:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


# --- what is refused is gone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [
    (SCORE, {"features": {"nonsense": 1}}),
    ("/v1/score/batch", {"requests": [{"features": {"nonsense": 1}}] * 3}),
    ("/v1/score/batch", {"requests": [{"features": {"nonsense": 1}}] * 30}),
    ("/v1/models/model:predict", {"instances": [{"features": {"nonsense": 1}}] * 3}),
])
async def test_a_refused_request_is_freed_without_the_cycle_collector(contract: ModelContract, path: str, body: dict[str, Any]) -> None:
    """It looks once in thousands of requests, and each of these may hold megabytes."""
    settings = Settings(predictor_host="127.0.0.1:1")
    metrics = TransformerMetrics(CollectorRegistry())
    client = PredictorClient("127.0.0.1:1", "model", tls=False, limits=HopLimits())
    scorer = Scorer(settings, client, metrics, None)
    scorer._plan = make_plan(contract)  # pyright: ignore[reportPrivateUsage] - a predictor's, which isn't needed here

    async def inner(*_: Any) -> None:
        raise AssertionError("not the SDK's")

    gate = Gate(inner, scorer, Admission(settings, metrics), metrics, settings)
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    scope = {"type": "http", "path": path, "method": "POST", "headers": [], "client": ("a", 1)}
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            await gate(scope, receive, send)
        alive = sum(isinstance(x, RowInvalidError) for x in gc.get_objects())
    finally:
        gc.enable()
        client.close()
    assert len(statuses) == 20
    assert alive == 0


# --- V2 over gRPC, and its port -------------------------------------------------------------------------------------------------


def test_a_field_that_is_given_twice_is_refused(chain: Any) -> None:
    one = {"name": "transaction_amount", "shape": [1], "datatype": "FP64", "data": [10.0]}
    answer = chain.transformer.post(V2, {"inputs": [one, {**one, "data": [99999.0]}]})
    assert answer.status == 400
    assert "inputs[1].name: 'transaction_amount' is given twice" in answer.json["detail"]


def test_a_text_that_is_cut_off_is_the_callers_mistake(chain: Any) -> None:
    request = messages.ModelInferRequest(model_name="m")
    one = request.inputs.add()
    one.name, one.datatype = "merchant", "BYTES"
    one.shape.append(1)
    request.raw_input_contents.append(np.uint32(5).tobytes()[:3])
    with grpc.insecure_channel(f"127.0.0.1:{chain.grpc_port}") as channel, pytest.raises(grpc.RpcError) as e:
        GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]  # grpc's own error, a call too


@pytest.mark.slow
@pytest.mark.parametrize("part", ["predictor", "transformer"])
def test_a_grpc_port_that_is_taken_ends_the_server_and_says_so(bundle: Bundle, tmp_path: Path, part: str) -> None:
    """It would be ready, and answer half of its callers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        args = ["--enable_grpc", "true", "--grpc_port", str(taken.getsockname()[1])]
        made = predictor(bundle.path, tmp_path, args=args) if part == "predictor" else transformer(free_port(), tmp_path, args=args)
        with made as server:
            assert server.process is not None
            assert server.process.wait(120) == 2
            assert "gRPC can't listen at 127.0.0.1" in server.log
            assert "--grpc_port" in server.log
