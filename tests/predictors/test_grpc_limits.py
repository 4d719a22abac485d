"""gRPC at the predictor: calls beyond what a connection may have, messages beyond the limit, and what nobody may do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from hafnium_servers import Server, free_port, predictor, stopped
from kserve import InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import synthetic_matrix

LIMIT = 4
WAIT_S = 60.0


@dataclass(frozen=True)
class Narrow:
    server: Server
    stub: Any
    grpc_port: int


@pytest.fixture(scope="module")
def narrow(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Narrow]:
    port = free_port()
    args = ["--grpc_port", str(port), "--grpc_streams_max", str(LIMIT), "--rows_max", "200", "--body_bytes_max", "20000",
            "--read_timeout_s", "5"]
    with predictor(bundle.path, tmp_path_factory.mktemp("narrow"), args=args) as server:
        server.wait()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(WAIT_S)
            yield Narrow(server, GRPCInferenceServiceStub(channel), port)


def message(matrix: Any) -> Any:
    given = InferInput("features", list(matrix.shape), "FP32")
    given.set_data_from_numpy(matrix)
    return InferRequest("m", [given]).to_grpc()


def score_of(answer: Any) -> list[float]:
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], np.float32).tolist()
    return list(answer.outputs[0].contents.fp32_contents)


def test_a_connection_has_so_many_calls_at_a_time_and_others_are_none_of_its_business(narrow: Narrow, contract: ModelContract) -> None:
    asked, over = message(synthetic_matrix(contract, 2, seed=1)), threading.Event()
    right = score_of(narrow.stub.ModelInfer(asked, timeout=WAIT_S))

    def nothing() -> Iterator[Any]:
        over.wait(WAIT_S)
        yield from ()

    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{narrow.grpc_port}", own_connection) as greedy:
        grpc.channel_ready_future(greedy).result(WAIT_S)
        silent = greedy.stream_unary("/inference.GRPCInferenceService/ModelInfer", messages.ModelInferRequest.SerializeToString)
        try:
            waiting = [silent.future(nothing(), timeout=WAIT_S) for _ in range(LIMIT)]
            mine = GRPCInferenceServiceStub(greedy).ModelInfer.future(asked, timeout=WAIT_S)
            for _ in range(20):
                assert score_of(narrow.stub.ModelInfer(asked, timeout=WAIT_S)) == right
            assert not mine.done(), "it waits at the caller until another of its calls is over"
            assert {c.exception(WAIT_S).code() for c in waiting} == {grpc.StatusCode.DEADLINE_EXCEEDED}, "by --read_timeout_s"
            assert score_of(mine.result(WAIT_S)) == right
        finally:
            over.set()


def test_calls_that_come_together_get_their_scores_or_are_refused_at_once(narrow: Narrow, contract: ModelContract) -> None:
    asked = message(synthetic_matrix(contract, 2, seed=1))
    right = score_of(narrow.stub.ModelInfer(asked, timeout=WAIT_S))
    with stopped(narrow.server):
        calls = [narrow.stub.ModelInfer.future(asked, timeout=WAIT_S) for _ in range(20 * LIMIT)]
    codes = [grpc.StatusCode.OK if (e := c.exception(WAIT_S)) is None else e.code() for c in calls]
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, "HTTP/2's REFUSED_STREAM, which says that nothing was done"
    scored = [c for c, code in zip(calls, codes, strict=True) if code == grpc.StatusCode.OK]
    assert len(scored) >= LIMIT
    assert [score_of(c.result()) for c in scored] == [right] * len(scored)
    assert score_of(narrow.stub.ModelInfer(asked, timeout=WAIT_S)) == right


def test_rows_bytes_and_deadlines(narrow: Narrow, contract: ModelContract) -> None:
    columns = len(contract.inputs)

    def refused(asked: Any, *metadata: tuple[str, str]) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            narrow.stub.ModelInfer(asked, timeout=WAIT_S, metadata=metadata)
        return caught.value.code()

    one = message(np.zeros((1, columns), np.float32))
    assert refused(message(np.zeros((201, columns), np.float32))) == grpc.StatusCode.INVALID_ARGUMENT
    assert refused(message(np.zeros((2000, columns), np.float32))) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused(one, ("x-hafnium-contract", "sha256:other")) == grpc.StatusCode.FAILED_PRECONDITION
    assert refused(one, ("x-hafnium-deadline-ms", "0")) == grpc.StatusCode.DEADLINE_EXCEEDED
    other = messages.ModelInferRequest()
    other.CopyFrom(one)
    other.model_name = "nobody"
    assert refused(other) == grpc.StatusCode.NOT_FOUND
    assert narrow.stub.ModelInfer(one, timeout=WAIT_S).model_version == "7"


def test_the_log_holds_no_value_of_a_call_that_is_refused(narrow: Narrow, contract: ModelContract) -> None:
    before = len(narrow.server.log)
    named, datatype, infinite = (message(np.full((1, len(contract.inputs)), value, np.float32)) for value in (0.0, 0.0, np.inf))
    named.inputs[0].name = "MARKER-4711"
    datatype.inputs[0].datatype = "MARKER-4711"
    texts = InferInput("features", [1, 1], "BYTES")
    texts.set_data_from_numpy(np.array([[b"MARKER-4711"]], np.object_))
    for asked in (named, datatype, infinite, InferRequest("m", [texts]).to_grpc()) * 5:
        with pytest.raises(grpc.RpcError) as caught:
            narrow.stub.ModelInfer(asked, timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, asked
    assert narrow.server.log[before:] == ""


def test_nobody_unloads_the_model_by_grpc(narrow: Narrow, contract: ModelContract) -> None:
    for name in ("RepositoryModelUnload", "RepositoryModelLoad"):
        with pytest.raises(grpc.RpcError) as caught:
            getattr(narrow.stub, name)(getattr(messages, f"{name}Request")(model_name="m"), timeout=WAIT_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert narrow.stub.ModelReady(messages.ModelReadyRequest(name="m"), timeout=WAIT_S).ready
    asked = message(np.zeros((1, len(contract.inputs)), np.float32))
    assert narrow.stub.ModelInfer(asked, timeout=WAIT_S).model_version == "7"
