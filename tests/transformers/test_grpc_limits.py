"""V2 over gRPC has the limits of HTTP: what is too much is refused at once, in gRPC's words, and says when to come again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import grpc
import pytest
from hafnium_servers import Server, free_port, predictor, stopped, transformer, wait_until
from kserve import InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import synthetic_rows

pytestmark = pytest.mark.slow
FLOOD = Path(__file__).parents[1] / "support" / "hafnium_triton_flood.py"
KINDS = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
PATIENT = ["--deadline_ms", "60000", "--lookup_timeout_ms", "10000", "--breaker_failures_max", "1000"]
LIMIT = 4
WAIT_S = 60.0


def tensors(row: dict[str, Any], rows: int = 1) -> list[dict[str, Any]]:
    """The fields of a row as V2's inputs, `rows` times."""
    fields = {**row["entity"], **row["features"], "event_time": row["event_time"]}
    return [{"name": n, "shape": [rows], "datatype": KINDS[type(v)], "data": [v] * rows} for n, v in fields.items()]


def message(row: dict[str, Any], rows: int = 1) -> Any:
    return InferRequest("m", [InferInput(**one) for one in tensors(row, rows)]).to_grpc()


@contextmanager
def grpc_chain(bundle: Bundle, folder: Path, repo: Path, *args: str) -> Iterator[tuple[Server, Server, Any, int]]:
    """Predictor, transformer, a stub and the port of the transformer."""
    port = free_port()
    given = [*PATIENT, "--enable_grpc", "true", "--grpc_port", str(port), *args]
    with predictor(bundle.path, folder) as behind, transformer(behind.port, folder, repo=repo, args=given) as front:
        behind.wait()
        front.wait()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(WAIT_S)
            yield behind, front, GRPCInferenceServiceStub(channel), port


@dataclass(frozen=True)
class Narrow:
    """A chain that takes `LIMIT` requests at a time."""

    behind: Server
    front: Server
    stub: Any
    port: int


@pytest.fixture(scope="module")
def narrow(bundle: Bundle, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Narrow]:
    with grpc_chain(bundle, tmp_path_factory.mktemp("narrow"), repo, "--in_flight_max", str(LIMIT)) as made:
        yield Narrow(*made)


def counted(server: Server, name: str, kind: str = "") -> float:
    """A counter of the transformer."""
    lines = [x for x in server.get("/metrics").body.decode().splitlines() if x.startswith(f"{name}{{") and kind in x]
    return sum(float(x.split()[-1]) for x in lines)


def code_of(call: Any) -> Any:
    """How a call ended."""
    error = call.exception(WAIT_S)
    return grpc.StatusCode.OK if error is None else error.code()


def refused(stub: Any, asked: Any, *metadata: tuple[str, str]) -> Any:
    """The error of a call."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(asked, timeout=WAIT_S, metadata=metadata)
    return caught.value


def score_of(answer: Any) -> float:
    found = {o.name: o for o in answer.outputs}["score"]
    return float(found.contents.fp32_contents[0])


def test_calls_beyond_the_limit_are_refused_while_those_in_progress_still_wait(narrow: Narrow, contract: ModelContract) -> None:
    asked, stub = message(synthetic_rows(contract, 1, seed=3)[0]), narrow.stub
    right = score_of(stub.ModelInfer(asked, timeout=WAIT_S))
    before = [counted(narrow.front, "inference_requests_total"), counted(narrow.front, "inference_errors_total", "overloaded")]
    with stopped(narrow.behind):
        calls = [stub.ModelInfer.future(asked, timeout=WAIT_S) for _ in range(10 * LIMIT)]
        wait_until(lambda: sum(c.done() for c in calls) == 9 * LIMIT)  # the predictor hangs: nobody waited for it
        over = [c for c in calls if c.done()]
        assert {code_of(c) for c in over} == {grpc.StatusCode.UNAVAILABLE}
        for c in over:
            trailing = dict(c.trailing_metadata())
            assert (trailing["retry-after"], trailing["grpc-retry-pushback-ms"]) == ("1", "1000")
            assert "Overloaded" in c.details()
        assert stub.ServerLive(messages.ServerLiveRequest(), timeout=WAIT_S).live
    assert [score_of(c.result(WAIT_S)) for c in calls if c not in over] == pytest.approx([right] * LIMIT, abs=1e-6)
    after = [counted(narrow.front, "inference_requests_total"), counted(narrow.front, "inference_errors_total", "overloaded")]
    assert [y - x for x, y in zip(before, after, strict=True)] == [10 * LIMIT, 9 * LIMIT]
    assert score_of(stub.ModelInfer(asked, timeout=WAIT_S)) == right


def test_tritonclient_under_overload_gets_right_scores_or_a_refusal(narrow: Narrow, contract: ModelContract, tmp_path: Path) -> None:
    row = synthetic_rows(contract, 1, seed=4)[0]
    (tmp_path / "in.json").write_text(json.dumps({"inputs": tensors(row), "calls": 400, "timeout_s": 60}))
    right = score_of(narrow.stub.ModelInfer(message(row), timeout=WAIT_S))
    overloads = counted(narrow.front, "inference_errors_total", "overloaded")
    with subprocess.Popen([sys.executable, FLOOD, str(narrow.port), tmp_path / "in.json", tmp_path / "out.json"]) as flood:
        try:
            # Fast servers and slow clients may never meet in an overload: a predictor that stands still for a moment makes one.
            with stopped(narrow.behind):
                wait_until(lambda: counted(narrow.front, "inference_errors_total", "overloaded") > overloads, WAIT_S)
            assert flood.wait(timeout=150) == 0
        finally:
            flood.kill()
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 400
    assert {f["status"] for f in found} == {"", "StatusCode.UNAVAILABLE"}
    # Rows that come together are scored together, and a matrix product may round otherwise than one of a single row.
    assert [f["score"][0] for f in found if not f["status"]] == pytest.approx([right] * sum(not f["status"] for f in found), abs=1e-6)
    assert score_of(narrow.stub.ModelInfer(message(row), timeout=WAIT_S)) == right


def test_a_message_that_never_comes_takes_nobodys_place_and_is_given_up(narrow: Narrow, contract: ModelContract) -> None:
    row, over = synthetic_rows(contract, 1, seed=6)[0], threading.Event()

    def nothing() -> Iterator[Any]:
        over.wait(WAIT_S)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{narrow.port}") as channel:
        silent = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer", messages.ModelInferRequest.SerializeToString)
        try:
            waiting = [silent.future(nothing(), metadata=[("x-hafnium-deadline-ms", "5000")]) for _ in range(2 * LIMIT)]
            for _ in range(8):
                assert narrow.stub.ModelInfer(message(row), timeout=WAIT_S).model_version == "7"
            assert {code_of(c) for c in waiting} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        finally:
            over.set()
        assert code_of(silent.future(iter(()))) == grpc.StatusCode.INVALID_ARGUMENT


def test_clients_rows_bytes_deadlines_and_failures_have_the_meaning_that_http_gives_them(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=5)[0]
    args = ["--rate_limit_per_s", "0.5", "--rate_limit_burst", "3", "--batch_rows_max", "10", "--body_bytes_max", "20000"]
    with grpc_chain(bundle, tmp_path, repo, *args) as (behind, front, stub, _port):
        for _ in range(3):
            stub.ModelInfer(message(row), timeout=WAIT_S, metadata=[("x-api-key", "mine")])
        limited = refused(stub, message(row), ("x-api-key", "mine"))
        assert limited.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(limited.trailing_metadata())
        assert 1 <= int(trailing["retry-after"]) <= 2
        assert 0 < int(trailing["grpc-retry-pushback-ms"]) <= 2000
        stub.ModelInfer(message(row, 3), timeout=WAIT_S, metadata=[("x-api-key", "yours")])
        assert refused(stub, message(row, 2), ("x-api-key", "yours")).code() == grpc.StatusCode.RESOURCE_EXHAUSTED, "rows count, not calls"
        large = [("x-api-key", "more than the burst")]
        assert len(stub.ModelInfer(message(row, 4), timeout=WAIT_S, metadata=large).outputs) > 0, "a full bucket lets any batch through"
        assert refused(stub, message(row), *large).code() == grpc.StatusCode.RESOURCE_EXHAUSTED, "and has a debt"

        many = refused(stub, message(row, 11), ("x-api-key", "rows"))
        assert (many.code(), "1 to 10 rows" in many.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        large = refused(stub, message({**row, "event_time": "x" * 30_000}), ("x-api-key", "bytes"))
        assert large.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        bad = refused(stub, message({**row, "features": {**row["features"], "nobody": 1}}), ("x-api-key", "bad"))
        assert (bad.code(), "nobody" in bad.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)

        for name in ("RepositoryModelUnload", "RepositoryModelLoad"):
            with pytest.raises(grpc.RpcError) as caught:
                getattr(stub, name)(getattr(messages, f"{name}Request")(model_name="m"), timeout=WAIT_S)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        stub.ModelInfer(message(row), timeout=WAIT_S, metadata=[("x-api-key", "still there")])

        with stopped(behind):
            late = refused(stub, message(row), ("x-api-key", "late"), ("x-hafnium-deadline-ms", "200"))
            assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert "Deadline exceeded" in late.details()
        behind.kill()
        gone = refused(stub, message(row), ("x-api-key", "gone"))
        assert (gone.code(), dict(gone.trailing_metadata())["retry-after"]) == (grpc.StatusCode.UNAVAILABLE, "1")
        counts = {kind: counted(front, "inference_errors_total", f'type="{kind}"') for kind in ("rate_limited", "deadline", "invalid_row")}
        assert counts == {"rate_limited": 3, "deadline": 1, "invalid_row": 1}


def test_sigterm_ends_new_calls_at_once_and_waits_for_those_in_hand(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    """One grace period for HTTP and gRPC: calls taken while HTTP drained had a second one, which no pod has time for."""
    row = synthetic_rows(contract, 1, seed=7)[0]
    with grpc_chain(bundle, tmp_path, repo) as (behind, front, stub, _port), ThreadPoolExecutor(1) as pool:
        right = score_of(stub.ModelInfer(message(row), timeout=WAIT_S))
        assert front.process is not None
        with stopped(behind):
            over_http = pool.submit(front.post, "/v1/score", row)
            over_grpc = stub.ModelInfer.future(message(row), timeout=WAIT_S)
            sleep(1.0)  # both are in hand: nothing that could be seen says so while the predictor hangs
            front.process.terminate()

            def no_more_taken() -> bool:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ModelInfer(message(row), timeout=0.5)
                return bool(caught.value.code() == grpc.StatusCode.UNAVAILABLE)

            wait_until(no_more_taken, 10.0)
            assert not over_http.done()
            assert not over_grpc.done()
        assert over_http.result(WAIT_S).status == 200
        assert score_of(over_grpc.result(WAIT_S)) == pytest.approx(right, abs=1e-6)
        assert front.process.wait(WAIT_S) == 0
