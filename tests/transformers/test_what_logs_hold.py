"""Logs hold ids and no fields, whatever comes in by whichever protocol, and a caller who is refused fills no disk. Both parts over HTTP,
the transformer over gRPC; the predictor's gRPC is with its other tests.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hafnium_servers import Server
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.v2_binary import LENGTH_HEADER
from hafnium_testing import synthetic_rows

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Chain

V1, V2 = "/v1/models/m:predict", "/v2/models/m/infer"
MARK = "MARKER-4711"
LINES_MAX = 10
"""Of a hundred refusals."""


@contextmanager
def written(server: Server) -> Iterator[list[str]]:
    """The lines that the server's log gets meanwhile."""
    before, lines = len(server.log), list[str]()
    yield lines
    time.sleep(0.2)  # what is written behind an answer
    lines += server.log[before:].splitlines()


def tensor(name: str, value: Any, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": datatype, "data": [value]}


def binary(inputs: list[dict[str, Any]]) -> tuple[bytes, dict[str, str]]:
    """The same with the values behind the JSON."""
    tail, made = b"", list[dict[str, Any]]()
    for one in inputs:
        value = one["data"][0]
        data = struct.pack("<d", value) if one["datatype"] == "FP64" else struct.pack("<I", len(value)) + value.encode()
        made.append({**{k: v for k, v in one.items() if k != "data"}, "parameters": {"binary_data_size": len(data)}})
        tail += data
    text = json.dumps({"inputs": made}).encode()
    return text + tail, {LENGTH_HEADER: str(len(text))}


VALUE = [tensor("transaction_amount", -777123.5, "FP64"), tensor("channel", MARK), tensor("customer_id", MARK)]
NAME = [tensor(MARK, 1.0, "FP64"), tensor("customer_id", MARK)]
TWICE = [tensor(MARK, 1.0, "FP64")] * 2


@pytest.mark.parametrize("inputs", [VALUE, NAME, TWICE], ids=["a value", "a name", "a name given twice"])
def test_a_transformers_log_holds_no_field_of_a_request_that_is_refused(chain: Chain, inputs: list[dict[str, Any]]) -> None:
    row = {**synthetic_rows(chain.contract, 1, seed=1)[0], "entity": {"customer_id": MARK, MARK: MARK}}
    row["features"] |= {"transaction_amount": -777123.5, "channel": MARK, MARK: MARK}
    body, headers = binary(inputs)
    made: list[InferInput] = []
    for one in inputs:
        made.append(InferInput(one["name"], [1], one["datatype"]))
        value = one["data"][0]
        made[-1].set_data_from_numpy(np.array([value]) if one["datatype"] == "FP64" else np.array([value.encode()], np.object_))
    with written(chain.transformer) as lines:
        answers = [
            chain.transformer.post(V1, {"instances": [row, row]}), chain.transformer.post(V1, {"instances": [row], MARK: MARK}),
            chain.transformer.post(V1, {MARK: MARK}), chain.transformer.post("/v1/score", row),
            chain.transformer.post(V2, {"inputs": inputs}), chain.transformer.post(V2, body, headers),
            chain.transformer.post(V2, {"inputs": [tensor("transaction_amount", MARK, "FP64")]}),
            chain.transformer.post(V2, {"inputs": [{**tensor("channel", MARK), "datatype": MARK}]}),
            chain.transformer.post(V2, {"inputs": [{**tensor("channel", MARK), "shape": [MARK]}]}),
            chain.transformer.get(f"/v2/models/{MARK}"),
        ]
        with grpc.insecure_channel(f"127.0.0.1:{chain.grpc_port}") as channel, pytest.raises(grpc.RpcError):
            GRPCInferenceServiceStub(channel).ModelInfer(InferRequest("m", made).to_grpc(), timeout=20)
    assert [a.status for a in answers if not 400 <= a.status < 500] == [], answers
    assert [line for line in lines if MARK in line or "777123" in line] == []


@pytest.mark.parametrize("part", ["transformer", "predictor"])
def test_a_hundred_refusals_leave_few_lines(chain: Chain, part: str) -> None:
    server: Server = getattr(chain, part)
    with written(server) as lines:
        for _ in range(50):
            assert server.post(V1, {"instances": [{MARK: MARK}] * 2}).status in (400, 422)
            assert server.post(V2, {"inputs": [tensor(MARK, MARK)]}).status in (400, 422)
    assert len(lines) <= LINES_MAX, lines[:3]


def test_a_predictors_log_holds_no_value_of_a_request_that_is_refused(chain: Chain) -> None:
    columns = len(chain.contract.inputs)
    named = {"name": "features", "shape": [1, columns], "datatype": "FP32"}
    values = [MARK] + [0.0] * (columns - 1)
    size = 4 * columns
    text = json.dumps({"inputs": [{**named, "name": MARK, "parameters": {"binary_data_size": size}}]}).encode()
    with written(chain.predictor) as lines:
        answers = [
            chain.predictor.post(V1, {"instances": [values]}), chain.predictor.post(V1, {"instances": MARK}),
            chain.predictor.post(V1, {MARK: MARK}), chain.predictor.post(V2, {"inputs": [{**named, "data": values}]}),
            chain.predictor.post(V2, {"inputs": [{**named, "data": [values]}]}),
            chain.predictor.post(V2, {"inputs": [{**named, "name": MARK, "data": [0.0] * columns}]}),
            chain.predictor.post(V2, {"inputs": [{**named, "datatype": MARK, "data": [0.0] * columns}]}),
            chain.predictor.post(V2, {"inputs": [{**named, "data": [0.0] * (columns - 1) + [-777123.5e300]}]}),
            chain.predictor.post(V2, text + b"\0" * size, {LENGTH_HEADER: str(len(text))}),
        ]
    assert [a.status for a in answers if not 400 <= a.status < 500] == [], answers
    assert [line for line in lines if MARK in line or "777123" in line] == []
