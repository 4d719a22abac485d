"""Clients that others wrote: NVIDIA's tritonclient and KServe's own, over HTTP and gRPC."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton_http
from hafnium_servers import Server
from kserve import InferInput, InferRequest, InferResponse
from kserve.inference_client import InferenceGRPCClient, InferenceRESTClient, RESTConfig
from tritonclient.utils import InferenceServerException

from hafnium_contract.model_contract import ModelContract
from hafnium_contract.wire import CONTRACT_HEADER
from hafnium_testing import synthetic_matrix

Matrix = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def matrix(contract: ModelContract) -> Matrix:
    return synthetic_matrix(contract, 5, seed=8, missing=0.1)


@pytest.fixture(scope="module")
def expected(server: Server, matrix: Matrix) -> tuple[Matrix, Matrix]:
    rows = [[None if np.isnan(v) else float(v) for v in row] for row in matrix]
    answer = server.post("/v1/models/m:predict", {"instances": rows}).json
    return np.array(answer["predictions"], np.float32), np.array(answer["intervals"], np.float32)


def output(answer: Any, name: str) -> Matrix:
    """An output of tritonclient's result or of KServe's response."""
    return np.asarray(answer.get_output_by_name(name).as_numpy() if isinstance(answer, InferResponse) else answer.as_numpy(name))


def same(answer: Any, expected: tuple[Matrix, Matrix]) -> None:
    for name, tensor in zip(("score", "interval"), expected, strict=True):
        assert np.array_equal(output(answer, name).reshape(tensor.shape), tensor)


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
def test_tritonclient_over_http(
    server: Server, contract: ModelContract, matrix: Matrix, expected: tuple[Matrix, Matrix], binary_in: bool, binary_out: bool,
) -> None:
    sent = matrix if binary_in else np.nan_to_num(matrix)  # JSON has no NaN, and this client writes one
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("m")
        assert client.get_model_metadata("m")["inputs"][0]["name"] == "features"
        given = triton_http.InferInput("features", list(sent.shape), "FP32")
        given.set_data_from_numpy(sent, binary_data=binary_in)
        wanted = [triton_http.InferRequestedOutput(n, binary_data=binary_out) for n in ("score", "interval")]
        answer = client.infer("m", [given], outputs=wanted, request_id="t-1")
        assert answer.get_response()["id"] == "t-1"
        assert answer.get_response()["model_name"] == contract.name
        if binary_in:
            same(answer, expected)
        else:
            assert answer.as_numpy("score").shape == (5,)
        wrong = triton_http.InferInput("features", [1, 3], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
        with pytest.raises(InferenceServerException, match="shape"):
            client.infer("m", [wrong])


def test_tritonclient_over_http_many_at_once(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 40, seed=3)
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=8) as client:
        waiting: list[Any] = []
        for row in matrix:
            given = triton_http.InferInput("features", [1, matrix.shape[1]], "FP32")
            given.set_data_from_numpy(row.reshape(1, -1))
            waiting.append(client.async_infer("m", [given]))
        scores = [float(w.get_result().as_numpy("score")[0]) for w in waiting]
    rows = [[None if np.isnan(v) else float(v) for v in row] for row in matrix]
    assert scores == server.post("/v1/models/m:predict", {"instances": rows}).json["predictions"]


def test_tritonclient_over_grpc(
    server: Server, grpc_port: int, matrix: Matrix, expected: tuple[Matrix, Matrix], tmp_path: Path,
) -> None:
    np.save(tmp_path / "in.npy", matrix)
    script = Path(__file__).parents[1] / "support" / "hafnium_triton_grpc.py"
    subprocess.run([sys.executable, script, str(grpc_port), tmp_path / "in.npy", tmp_path / "out.npz"], check=True, timeout=60)
    with np.load(tmp_path / "out.npz") as answer:
        assert np.array_equal(answer["score"], expected[0])
        assert np.array_equal(answer["interval"], expected[1])
        assert str(answer["id"]) == "g-1"
        assert str(answer["wrong"]) == "StatusCode.INVALID_ARGUMENT"


def request(matrix: Matrix, *, binary: bool) -> InferRequest:
    given = InferInput("features", list(matrix.shape), "FP32")
    given.set_data_from_numpy(matrix, binary_data=binary)
    return InferRequest(model_name="m", infer_inputs=[given])


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
async def test_kserve_s_rest_client(server: Server, matrix: Matrix, expected: tuple[Matrix, Matrix], binary: bool) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=20))
    assert await client.is_server_live(server.url)
    assert await client.is_server_ready(server.url)
    assert await client.is_model_ready(server.url, "m")
    sent = matrix if binary else np.nan_to_num(matrix)
    answer = await client.infer(server.url, request(sent, binary=binary), model_name="m")
    assert isinstance(answer, InferResponse)
    if binary:
        same(answer, expected)
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", retries=0, timeout=20))
    rows = np.nan_to_num(matrix).tolist()
    plain = await v1.infer(server.url, {"instances": rows}, model_name="m")
    assert isinstance(plain, dict)
    again = await client.infer(server.url, request(np.nan_to_num(matrix), binary=True), model_name="m")
    assert np.array_equal(np.array(plain["predictions"], np.float32), output(again, "score").reshape(-1))
    await client.close()
    await v1.close()


async def test_kserve_s_grpc_client(server: Server, grpc_port: int, matrix: Matrix, expected: tuple[Matrix, Matrix]) -> None:
    client = InferenceGRPCClient(url=f"127.0.0.1:{grpc_port}")
    assert await client.is_server_live()
    assert await client.is_model_ready("m")
    answer = await client.infer(request(matrix, binary=True))
    same(answer, expected)
    assert CONTRACT_HEADER in answer.parameters
    await client.close()
