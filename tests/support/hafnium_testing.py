"""Real artefacts for tests: a small ONNX bundle over any contract, and requests that fit it.

The model is a logistic one. Everything that a real bundle promises holds: NaN is imputed inside the graph, values are
clamped and scaled inside the graph, monotone directions are respected, every hash fits. Only its skill is missing.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from onnx import TensorProto, helper, numpy_helper

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT, Bundle, bytes_digest, write_bundle
from hafnium_contract.encoding import assemble, encode_column
from hafnium_contract.inference_log import FEATURE_PREFIX, logged_features
from hafnium_contract.model_contract import Feature, FromView, ModelContract

OPSET = 20
EVENT_TIME = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
ENTITIES = 50
"""Synthetic rows name `<join key>-0` to `<join key>-49` for each entity."""

Floats = npt.NDArray[np.float64]


def make_bundle(
    path: Path, contract: ModelContract, version: str = "1", weights: Mapping[str, float] | Sequence[float] | None = None,
    bias: float = -3.0, seed: int = 0, rows: int = 2000,
) -> Bundle:
    """Writes a real bundle at `path`.

    `weights`: per input by name (others 0) or in contract order; None draws them from `seed`, with the sign that each
    feature's monotone direction asks for. Each weight multiplies the input's root-like scaled value in [0, 1].
    `rows`: size of the reference sample.
    """
    vector = _weights(contract, weights, seed)
    model = logistic_model(contract, vector, bias)
    matrix = synthetic_matrix(contract, rows, seed)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    score = np.asarray(session.run([SCORE_OUTPUT], {INPUT_NAME: matrix})[0])
    columns: dict[str, Any] = {
        FEATURE_PREFIX + f.name: pa.array(matrix[:, contract.input_names.index(f.name)], pa.float32())
        for f in logged_features(contract)
    }
    columns["score"] = pa.array(score, pa.float32())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    card = {"schemaVersion": 1, "modelName": contract.name, "modelVersion": version, "owner": contract.owner,
            "description": contract.description, "intendedUse": "tests", "limits": "made by make_bundle, it has no skill"}
    files = {
        "model.onnx": model.SerializeToString(),
        "contract.yaml": yaml.safe_dump(contract.model_dump(mode="json"), sort_keys=False).encode(),
        "evaluation.json": _json({"schemaVersion": 1, "modelName": contract.name, "modelVersion": version,
                                  "metrics": {"meanScore": float(score.mean())}, "rows": rows}),
        "model_card.json": _json(card),
        "model_card.md": (f"# {contract.name} {version}\n\n" + "\n".join(f"- {k}: {v}" for k, v in card.items()) + "\n").encode(),
        "reference.parquet": sink.getvalue(),
        "environment.json": _json({"schemaVersion": 1, "seed": seed, "packages": {"onnx": onnx.__version__}}),
    }
    return write_bundle(
        path, files, contract=contract, model_version=version, data_digest=bytes_digest(f"synthetic {seed}".encode()),
        git_commit="0" * 40, seed=seed, opset=OPSET,
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _weights(contract: ModelContract, weights: Mapping[str, float] | Sequence[float] | None, seed: int) -> Floats:
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(contract.input_names))
        if unknown:
            raise ValueError(f"weights for {unknown}, which are not inputs of {contract.name}")
        return np.array([weights.get(name, 0.0) for name in contract.input_names], np.float64)
    if weights is not None:
        return np.asarray(weights, np.float64)
    drawn = np.random.default_rng(seed).normal(0.0, 1.5, len(contract.inputs))
    for j, f in enumerate(contract.inputs):
        if f.monotone != "none":
            drawn[j] = abs(drawn[j]) * (1.0 if f.monotone == "increasing" else -1.0)
    return drawn


def bounds(feature: Feature) -> tuple[float, float]:
    """Smallest and largest encoded value of a feature."""
    if feature.dtype == "category":
        return -1.0, float(len(feature.categories) - 1)
    return feature.range if feature.range is not None else (0.0, 1.0)


def logistic_model(contract: ModelContract, weights: Floats, bias: float) -> onnx.ModelProto:
    """ONNX graph: impute NaN, clamp to the range, signed fourth root, scale to [0, 1], logistic; interval = logit ∓ 0.5."""
    low, high = (np.array([bounds(f)[k] for f in contract.inputs]) for k in (0, 1))
    numeric = np.array([f.dtype in ("float", "int") for f in contract.inputs])
    impute = np.where(numeric, (low + high) / 2.0, 0.0)
    root_low, root_high = (np.sign(b) * np.abs(b) ** 0.25 for b in (low, high))
    constants = {
        "impute": impute, "low": low, "high": high, "root_low": root_low,
        "root_width": root_high - root_low, "weights": weights.reshape(-1, 1), "bias": np.array(bias),
        "half": np.array(0.5),
    }
    initializers = [numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    nodes = [
        helper.make_node("IsNaN", [INPUT_NAME], ["missing"]),
        helper.make_node("Where", ["missing", "impute", INPUT_NAME], ["filled"]),
        helper.make_node("Max", ["filled", "low"], ["above_low"]),
        helper.make_node("Min", ["above_low", "high"], ["clamped"]),
        helper.make_node("Abs", ["clamped"], ["size"]),
        # Not Log: ONNX Runtime rounds it otherwise in the last lanes of a vector, so a row would score differently alone
        helper.make_node("Sqrt", ["size"], ["second_root"]),
        helper.make_node("Sqrt", ["second_root"], ["root"]),
        helper.make_node("Sign", ["clamped"], ["sign"]),
        helper.make_node("Mul", ["sign", "root"], ["signed_root"]),
        helper.make_node("Sub", ["signed_root", "root_low"], ["shifted"]),
        helper.make_node("Div", ["shifted", "root_width"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logit"]),
        helper.make_node("Sub", ["logit", "half"], ["logit_low"]),
        helper.make_node("Add", ["logit", "half"], ["logit_high"]),
        helper.make_node("Sigmoid", ["logit"], ["score_column"]),
        helper.make_node("Squeeze", ["score_column", "axis"], [SCORE_OUTPUT]),
        helper.make_node("Concat", ["logit_low", "logit_high"], ["logit_interval"], axis=1),
        helper.make_node("Sigmoid", ["logit_interval"], [INTERVAL_OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes, "logistic",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", len(contract.inputs)])],
        [helper.make_tensor_value_info(SCORE_OUTPUT, TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info(INTERVAL_OUTPUT, TensorProto.FLOAT, ["batch", 2])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def synthetic_value(feature: Feature, rng: np.random.Generator) -> Any:
    """A valid raw value of a feature, as a caller would send it or a feature view would hold it."""
    if feature.dtype == "category":
        return feature.categories[int(rng.integers(len(feature.categories)))]
    if feature.dtype == "bool":
        return bool(rng.random() < 0.2)
    low, high = bounds(feature)
    # Wide ranges are drawn on a log scale, as amounts and counts are: uniform draws would never be small.
    wide = high - low > 1000.0
    share = float(rng.random())
    value = low + math.expm1(share * math.log1p(high - low)) if wide else low + share * (high - low)
    value = min(max(value, low), high)
    return int(value) if feature.dtype == "int" else round(value, 6)


def synthetic_rows(contract: ModelContract, rows: int, seed: int) -> list[dict[str, Any]]:
    """Bodies of POST /v1/score that fit the contract; event times rise by a second from EVENT_TIME."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for i in range(rows):
        features = {name: synthetic_value(f, rng) for name, f in contract.request_fields.items()}
        entity = {e.join_key: f"{e.join_key}-{int(rng.integers(ENTITIES))}" for e in contract.entities}
        when = EVENT_TIME + timedelta(seconds=i)
        out.append({"request_id": f"r-{seed}-{i}", "event_time": when.isoformat(), "entity": entity, "features": features})
    return out


def synthetic_views(
    contract: ModelContract, seed: int, event_time: datetime = EVENT_TIME - timedelta(hours=12), entities: int = ENTITIES,
) -> dict[str, list[dict[str, Any]]]:
    """View → rows {join key, event_timestamp, each field}, one row per synthetic entity."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[dict[str, Any]]] = {}
    for view in contract.views:
        key = contract.entity(view.entity).join_key
        rows: list[dict[str, Any]] = []
        for i in range(entities):
            row: dict[str, Any] = {key: f"{key}-{i}", "event_timestamp": event_time}
            for f in contract.features_of(view.name):
                assert isinstance(f.source, FromView)
                row[f.source.field] = synthetic_value(f, rng)
            rows.append(row)
        out[view.name] = rows
    return out


def synthetic_matrix(contract: ModelContract, rows: int, seed: int, missing: float = 0.02) -> npt.NDArray[np.float32]:
    """[rows, n] encoded inputs in contract order; a share `missing` of the cells that may be missing is NaN."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Floats] = {}
    for f in contract.features:
        if f.request_field is None and not isinstance(f.source, FromView):
            continue
        column = encode_column(f, [synthetic_value(f, rng) for _ in range(rows)])
        if f.missing != "reject":
            column[rng.random(rows) < missing] = math.nan
        columns[f.name] = column
    return assemble(contract, columns, EVENT_TIME.timestamp() + np.arange(rows, dtype=np.float64))
