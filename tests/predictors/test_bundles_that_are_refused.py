"""A bad bundle is never ready and says why; the process stays up so that the reason can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hafnium_servers import predictor
from onnx import TensorProto, helper
from prometheus_client import CollectorRegistry

from hafnium_contract.bundle import Bundle, bytes_digest, manifest_digest
from hafnium_contract.errors import BundleError, HafniumError, InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_predictor.engine import Engine, load_engine
from hafnium_predictor.errors import ModelFailureError, RowsError
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_testing import logistic_model, make_bundle


def load(path: Path) -> Engine:
    return load_engine(path, PredictorMetrics("m", CollectorRegistry()), rows_max=100, warmup_rows=8)


def with_model(bundle: Bundle, to: Path, model: bytes) -> Path:
    """A bundle whose hashes fit, around another graph."""
    shutil.copytree(bundle.path, to)
    (to / "model.onnx").write_bytes(model)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = bytes_digest(model)
    manifest["digest"] = manifest_digest(manifest)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def narrow(contract: ModelContract) -> onnx.ModelProto:
    data = contract.model_dump(mode="json")
    few = ModelContract.model_validate({**data, "features": data["features"][:3]})
    return logistic_model(few, np.ones(3), 0.0)


def renamed(contract: ModelContract, old: str, new: str) -> onnx.ModelProto:
    model = logistic_model(contract, np.ones(len(contract.inputs)), 0.0)
    for node in model.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    return model


def constant(contract: ModelContract, score: float, interval_width: int = 2) -> onnx.ModelProto:
    """A graph of the right form whose score is score + 0 × the rows' sums."""
    n = len(contract.inputs)
    nodes = [
        helper.make_node("Shape", ["features"], ["shape"], end=1),
        helper.make_node("ConstantOfShape", ["shape"], ["score"], value=helper.make_tensor("s", TensorProto.FLOAT, [1], [score])),
        helper.make_node("Concat", ["shape", "width"], ["wide"], axis=0),
        helper.make_node("ConstantOfShape", ["wide"], ["interval"], value=helper.make_tensor("i", TensorProto.FLOAT, [1], [0.5])),
    ]
    graph = helper.make_graph(
        nodes, "constant", [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", n])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info("interval", TensorProto.FLOAT, ["batch", interval_width])],
        [helper.make_tensor("width", TensorProto.INT64, [1], [interval_width])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("make", "said"), [
    (narrow, "the contract's 15 inputs need"),
    (lambda c: renamed(c, "features", "x"), "expected one input 'features'"),
    (lambda c: renamed(c, "score", "probability"), "output 'score' is missing"),
    (lambda c: constant(c, 0.5, interval_width=3), "output 'interval' is"),
    (lambda c: constant(c, float("nan")), "warm-up failed"),
    (lambda c: constant(c, 1.5), "not in \\[0, 1\\]"),
], ids=["other width", "other input", "no score", "wide interval", "NaN score", "score above 1"])
def test_graph_that_does_not_fit_its_contract_is_refused(
    bundle: Bundle, contract: ModelContract, tmp_path: Path, make: Callable[[ModelContract], onnx.ModelProto], said: str,
) -> None:
    path = with_model(bundle, tmp_path / "b", make(contract).SerializeToString())
    with pytest.raises(BundleError, match=said):
        load(path)


def test_graph_that_is_no_onnx_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="can't load"):
        load(with_model(bundle, tmp_path / "b", b"not a model"))


def test_changed_byte_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "b")
    with (tmp_path / "b" / "model.onnx").open("ab") as f:
        f.write(b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx: changed"):
        load(tmp_path / "b")
    with pytest.raises(InputError, match="no such bundle"):
        load(tmp_path / "nowhere")


def test_engine_refuses_rows_it_can_not_score(bundle: Bundle) -> None:
    engine = load(bundle.path)
    for matrix in (np.zeros((1, 3), np.float32), np.zeros((101, 15), np.float32), np.zeros((0, 15), np.float32)):
        with pytest.raises(RowsError):
            engine.run(matrix)
    with pytest.raises(ModelFailureError, match="ONNX Runtime"):
        engine.run(np.zeros((1, 15), np.float64))  # type: ignore[arg-type]
    score, interval = engine.run(np.full((2, 15), np.nan, np.float32))
    assert score.shape == (2,)
    assert interval.shape == (2, 2)


def test_errors_are_hafniums_and_know_their_status() -> None:
    assert issubclass(RowsError, HafniumError)
    assert RowsError("x").status == 400
    assert ModelFailureError("x").status == 500


@pytest.mark.slow
def test_server_with_a_bad_bundle_lives_is_never_ready_and_says_why(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    path = with_model(bundle, tmp_path / "b", narrow(contract).SerializeToString())
    with predictor(path, tmp_path) as server:
        server.wait("/health/live")
        reply = server.wait("/v2/health/ready", 503)
        for _ in range(50):
            if "loading" not in reply.json["detail"]:
                break
            reply = server.get("/v2/health/ready")
        assert "the contract's 15 inputs need" in reply.json["detail"]
        assert server.get("/health/ready").status == 503
        assert server.get("/v1/models/m").status == 503
        assert server.get("/v1/models/m/contract").status == 503
        scored = server.post("/v1/models/m:predict", {"instances": [[0.0] * 15]})
        assert scored.status == 503
        assert "the contract's 15 inputs need" in scored.json["detail"]
        assert "bundle refused" in server.log
        assert server.get("/health/live").status == 200
        assert server.stop() == 0


@pytest.mark.slow
def test_sigterm_ends_the_server_with_status_0(bundle: Bundle, tmp_path: Path) -> None:
    with predictor(bundle.path, tmp_path) as server:
        server.wait()
        assert server.stop() == 0
        assert "stopped" in server.log


def test_second_contract_needs_no_code(tmp_path: Path) -> None:
    from hafnium_contract.contract_file import load_contract

    contract = load_contract(Path(__file__).parents[2] / "examples" / "creditcard" / "contract.yaml")
    engine = load(make_bundle(tmp_path / "b", contract, rows=50).path)
    assert engine.columns == len(contract.inputs)
