"""What a running predictor answers, over each protocol, to good requests and to bad ones."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
from hafnium_servers import Reply, Server, http
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import parse_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.v2_binary import LENGTH_HEADER, decode_answer, request_header
from hafnium_testing import synthetic_matrix

V1 = "/v1/models/m:predict"
V2 = "/v2/models/m/infer"
COLUMNS = 15
Matrix = np.ndarray[Any, np.dtype[np.float32]]


def ask_binary(server: Server, matrix: Matrix, headers: dict[str, str] | None = None) -> Reply:
    header = request_header(*matrix.shape)
    sent = {LENGTH_HEADER: str(len(header)), "content-type": "application/octet-stream", **(headers or {})}
    return http("POST", server.url + V2, header + matrix.tobytes(), sent)


def score_binary(server: Server, matrix: Matrix) -> tuple[Matrix, Matrix]:
    reply = ask_binary(server, matrix)
    assert reply.status == 200, reply.body
    return decode_answer(reply.body, reply.headers[LENGTH_HEADER], len(matrix))


def rows_of(matrix: Matrix) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in matrix]


def v2_json(matrix: Matrix) -> dict[str, Any]:
    data = [v for row in rows_of(matrix) for v in row]
    return {"id": "q1", "inputs": [{"name": "features", "shape": list(matrix.shape), "datatype": "FP32", "data": data}]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 5).flatmap(lambda n: hnp.arrays(
    np.float32, (n, COLUMNS), elements=st.floats(-1e6, 1e6, width=32) | st.just(float("nan")))))
def test_binary_route_and_sdk_route_give_the_same_scores(server: Server, matrix: Matrix) -> None:
    score, interval = score_binary(server, matrix)
    reply = server.post(V1, {"instances": rows_of(matrix)})
    assert reply.status == 200, reply.body
    assert np.array_equal(np.array(reply.json["predictions"], np.float32), score)
    assert np.array_equal(np.array(reply.json["intervals"], np.float32), interval)
    assert ((interval[:, 0] <= score) & (score <= interval[:, 1])).all()


def test_a_row_scores_the_same_alone_and_in_a_batch(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 64, seed=5)
    together, _ = score_binary(server, matrix)
    alone = np.array([score_binary(server, matrix[k : k + 1])[0][0] for k in range(len(matrix))])
    assert np.array_equal(together, alone)
    assert together.std() > 0


def test_v2_json_gives_the_same_scores(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 3, seed=2, missing=0.0)
    reply = server.post(V2, v2_json(matrix))
    assert reply.status == 200, reply.body
    by_name = {o["name"]: o for o in reply.json["outputs"]}
    score, interval = score_binary(server, matrix)
    assert np.array_equal(np.array(by_name["score"]["data"], np.float32), score)
    assert by_name["interval"]["shape"] == [3, 2]
    assert np.array_equal(np.array(by_name["interval"]["data"], np.float32).reshape(3, 2), interval)
    assert reply.json["id"] == "q1"
    assert reply.json["model_version"] == "7"


def test_binary_input_with_json_output_and_an_id(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 2, seed=3)
    header = json.dumps({"id": "x", "inputs": [{"name": "features", "shape": [2, COLUMNS], "datatype": "FP64",
                                                "parameters": {"binary_data_size": 2 * COLUMNS * 8}}]}).encode()
    body = header + matrix.astype(np.float64).tobytes()
    reply = http("POST", server.url + V2, body, {LENGTH_HEADER: str(len(header))})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert reply.json["id"] == "x"
    assert np.array_equal(np.array(reply.json["outputs"][0]["data"], np.float32), score_binary(server, matrix)[0])


def test_grpc_gives_the_same_scores_and_says_which_model(
    server: Server, grpc_port: int, contract: ModelContract, bundle: Bundle,
) -> None:
    matrix = synthetic_matrix(contract, 4, seed=4)
    one = InferInput("features", list(matrix.shape), "FP32")
    one.set_data_from_numpy(matrix)
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(InferRequest("m", [one]).to_grpc(), timeout=20)
        score = np.frombuffer(answer.raw_output_contents[0], np.float32)
        assert answer.parameters["x-hafnium-contract"].string_param == bundle.contract.digest
        assert answer.model_version == "7"
        short = InferInput("features", [1, 3], "FP32")
        short.set_data_from_numpy(np.zeros((1, 3), np.float32))
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(InferRequest("m", [short]).to_grpc(), timeout=20)
    assert np.array_equal(score, score_binary(server, matrix)[0])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert "[1 to 1000, 15]" in refused.value.details()  # type: ignore[attr-defined]


def test_every_answer_says_which_model_and_contract_gave_it(server: Server, bundle: Bundle, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 1, seed=0)
    replies = [ask_binary(server, matrix), server.post(V1, {"instances": rows_of(matrix)}), server.post(V2, v2_json(matrix)),
               server.post(V1, {"instances": []}), server.post(V2, b"{"), server.get("/v1/models/m/contract")]
    assert [r.status for r in replies] == [200, 200, 200, 400, 400, 200]
    for reply in replies:
        assert reply.headers["x-hafnium-contract"] == bundle.contract.digest
        assert reply.headers["x-hafnium-model-version"] == "7"
        assert reply.headers["x-hafnium-model-digest"] == bundle.manifest.digest


def test_contract_is_served_whole(server: Server, bundle: Bundle) -> None:
    served = server.get("/v1/models/m/contract").json
    assert parse_contract(served["contract"]).digest == bundle.contract.digest == served["contract_digest"]
    assert served["model_digest"] == bundle.manifest.digest


@pytest.mark.parametrize("route", ["binary", "v1", "v2"])
def test_row_of_another_contract_gets_409(server: Server, contract: ModelContract, bundle: Bundle, route: str) -> None:
    matrix = synthetic_matrix(contract, 1, seed=0, missing=0.0)
    for digest, status in (("sha256:" + "0" * 64, 409), (bundle.contract.digest, 200)):
        headers = {"x-hafnium-contract": digest}
        reply = {
            "binary": lambda h: ask_binary(server, matrix, h),
            "v1": lambda h: server.post(V1, {"instances": rows_of(matrix)}, h),
            "v2": lambda h: server.post(V2, v2_json(matrix), h),
        }[route](headers)
        assert reply.status == status
        if status == 409:
            assert reply.headers["content-type"] == "application/problem+json"
            assert bundle.contract.digest in reply.json["detail"]


def test_deadline_that_is_over_gets_504(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 1, seed=0)
    assert ask_binary(server, matrix, {"x-hafnium-deadline-ms": "0"}).status == 504
    assert ask_binary(server, matrix, {"x-hafnium-deadline-ms": "500"}).status == 200


@pytest.mark.parametrize(("body", "said"), [
    ({"instances": [[1.0] * 14]}, r"instances[0]: expected a list of 15 numbers, got 14 values"),
    ({"instances": [[1.0] * 14 + ["x"]]}, r"instances[0][14]: expected a number or null, got 'x'"),
    ({"instances": [{"a": 1}]}, r"instances[0]: expected a list of 15 numbers, got dict"),
    ({"instances": []}, "at least one row"),
    ({"rows": 1}, "instances"),
    ([1, 2], "instances"),
    ({"instances": [[0.0] * 14 + [1e300]]}, "hour_of_day"),
    ({"instances": [[0.0] * 15] * 1001}, "from 1 to 1000"),
], ids=["narrow", "text", "object", "empty", "other key", "list", "beyond float32", "too many rows"])
def test_v1_says_what_is_wrong(server: Server, body: Any, said: str) -> None:
    reply = server.post(V1, body)
    assert reply.status == 400
    assert said in reply.json["detail"]


def tensor(**changes: Any) -> bytes:
    one = {"name": "features", "shape": [1, 15], "datatype": "FP32", "parameters": {"binary_data_size": 60}}
    return json.dumps({"inputs": [{k: v for k, v in {**one, **changes}.items() if v is not ...}]}).encode()


@pytest.mark.parametrize(("header", "length", "said"), [
    (tensor(), "zz", "inference-header-content-length"),
    (tensor(), "99999", "inference-header-content-length"),
    (tensor(), "-1", "inference-header-content-length"),
    (b"{nonsense", None, "not JSON"),
    (b"[1]", None, "expected an object"),
    (b'{"inputs": 3}', None, "expected one input"),
    (b'{"inputs": [3]}', None, "expected one input"),
    (b'{"id": 3}', None, "id: expected a string"),
    (tensor(name="x"), None, "inputs[0].name"),
    (tensor(datatype="INT8"), None, "inputs[0].datatype"),
    (tensor(shape=[1, 14]), None, "inputs[0].shape"),
    (tensor(shape=[True, 15]), None, "inputs[0].shape"),
    (tensor(shape=[0, 15]), None, "from 1 to 1000"),
    (tensor(shape=[2, 15]), None, "binary_data_size: expected 120"),
    (tensor(parameters=...), None, "binary_data_size: expected 60"),
    (tensor(data="x"), None, "list of numbers"),
    (tensor(data=[1.0]), None, "expected 15 numbers"),
    (tensor(data=["x"] * 15), None, "expected numbers"),
])
def test_binary_route_says_what_is_wrong(server: Server, header: bytes, length: str | None, said: str) -> None:
    reply = http("POST", server.url + V2, header + b"\0" * 60, {LENGTH_HEADER: length or str(len(header))})
    assert reply.status == 400
    assert said in reply.json["detail"]


def test_infinity_is_refused_with_its_place(server: Server) -> None:
    matrix = np.zeros((3, COLUMNS), np.float32)
    matrix[2, 4] = np.inf
    reply = ask_binary(server, matrix)
    assert reply.status == 400
    assert "features[2][4] (geo_risk_score)" in reply.json["detail"]


def test_body_beyond_the_limit_gets_413(server: Server) -> None:
    assert server.post(V1, b" " * 200_001).status == 413
    chunked = http("POST", server.url + V1, iter([b" " * 150_000] * 2), {"transfer-encoding": "chunked"})  # type: ignore[arg-type]
    assert chunked.status == 413


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["instances", "inputs", "name", "shape", "datatype", "data", "features", "id", "parameters"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()),
    path=st.sampled_from([V1, V2]),
    kind=st.sampled_from(["application/json", "application/octet-stream", "text/plain", "application/cloudevents+json", ""]),
    extra=st.sampled_from([{}, {LENGTH_HEADER: "7"}, {LENGTH_HEADER: "x"}, {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "t"}]),
)
@example(body=b"[Infinity]", path=V2, kind="application/json", extra={})
@example(body=b'{"inputs": [{"data": [1e999, NaN]}]}', path=V2, kind="application/json", extra={})
def test_garbage_is_never_our_fault(server: Server, body: bytes, path: str, kind: str, extra: dict[str, str]) -> None:
    reply = http("POST", server.url + path, body, {"content-type": kind, **extra})
    assert reply.status == 400, (reply.status, reply.body)
    assert reply.headers["content-type"] == "application/problem+json"


def test_model_can_not_be_unloaded_over_http(server: Server) -> None:
    assert server.post("/v2/repository/models/m/unload", {}).status == 501
    assert server.get("/v2/health/ready").status == 200


def test_kserve_paths_and_metrics(server: Server, contract: ModelContract, bundle: Bundle) -> None:
    ask_binary(server, synthetic_matrix(contract, 1, seed=0))
    server.post(V1, {"instances": []})
    assert server.get("/v2/health/live").json == {"live": True}
    assert server.get("/v1/models/m").json["ready"] is True
    assert server.get("/v2/models/m").json["inputs"][0]["shape"] == [-1, COLUMNS]
    assert server.get("/v1/models/other").status == 404
    text = server.get("/metrics").body.decode()
    labels = 'component="predictor",model_name="unified-risk",model_version="7"'
    assert f"inference_requests_total{{{labels}}}" in text
    assert f'inference_errors_total{{{labels},type="bad_request"}}' in text
    assert "model_prediction_latency_seconds_count" in text
    assert bundle.manifest.digest in text
