"""torch → ONNX bytes that are the same in every process and hold nothing of this machine, and the proof that they agree.

torch's exporter writes stack traces, and with them paths, into the nodes' metadata, and names values after its own counters.
All of that is taken out or renamed by position, so the model's digest depends on the model alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import ModelContract
from hafnium_training.graph import RiskModel

OPSET = 20
PARITY_LIMIT = 1e-5
"""Largest difference between a score in torch and in ONNX Runtime."""
BATCHES = (1, 2, 64)
_TRACE_ROWS = 3
"""More than one row: torch would otherwise specialise the batch dimension to 1."""

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """Largest differences found. `batch`: the same row scored alone and among others."""

    score: float
    interval: float
    batch: float
    rows: int

    @property
    def worst(self) -> float:
        return max(self.score, self.interval, self.batch)


class Scorer:
    """A model in ONNX Runtime, single-threaded as the predictor runs it."""

    def __init__(self, model: bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]

    def __call__(self, X: Matrix) -> Scores:
        """float32 [batch, n] → score float32 [batch]."""
        return np.asarray(self.session.run([SCORE_OUTPUT], {INPUT_NAME: X})[0], np.float32)

    def both(self, X: Matrix) -> tuple[Scores, Scores]:
        """float32 [batch, n] → (score [batch], interval [batch, 2])."""
        score, interval = self.session.run([SCORE_OUTPUT, INTERVAL_OUTPUT], {INPUT_NAME: X})
        return np.asarray(score, np.float32), np.asarray(interval, np.float32)


def export_onnx(model: RiskModel, inputs: int) -> bytes:
    """The model's graph as ONNX bytes: `features` float32 [batch, inputs] → `score` [batch], `interval` [batch, 2]."""
    example = torch.zeros(_TRACE_ROWS, inputs, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes=({0: batch},), input_names=[INPUT_NAME],
            output_names=[SCORE_OUTPUT, INTERVAL_OUTPUT], opset_version=OPSET, external_data=False, optimize=True, verbose=False,
        )
    if program is None:
        raise HafniumError("torch.onnx.export gave no program; this torch version can't export the network")
    return canonical(program.model_proto)


def canonical(proto: onnx.ModelProto) -> bytes:
    """Serialised without metadata, comments and internal names; checked. The same graph gives the same bytes."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for message in (proto, proto.graph):
        message.doc_string = ""
        del message.metadata_props[:]
    # torch leaves its own helper functions and shape notes behind, which no node refers to
    called = {node.op_type for node in proto.graph.node}
    unused = [f for f in proto.functions if f.name not in called]
    for function in unused:
        proto.functions.remove(function)
    del proto.graph.value_info[:]
    interface = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    names: dict[str, str] = {name: name for name in interface}
    names[""] = ""
    for i, tensor in enumerate(proto.graph.initializer):
        names.setdefault(tensor.name, f"w{i}")
        tensor.name = names[tensor.name]
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    count = 0
    for i, node in enumerate(proto.graph.node):
        node.name, node.doc_string = f"n{i}", ""
        del node.metadata_props[:]
        for k, name in enumerate(node.input):
            node.input[k] = names[name]
        for k, name in enumerate(node.output):
            if name not in names:
                names[name] = f"v{count}"
                count += 1
            node.output[k] = names[name]
    for value in (*proto.graph.input, *proto.graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    proto.graph.name = "hafnium"
    proto.producer_name, proto.producer_version = "hafnium", ""
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True)


def difficult_rows(contract: ModelContract, X: Matrix, seed: int, count: int = 64) -> Matrix:
    """float32 [rows, n]: sampled rows, and rows with NaN, infinities, ±1e30, bounds, unknown, negative and fractional codes."""
    rng = np.random.default_rng(seed)
    width = len(contract.inputs)
    sample = X[rng.integers(0, len(X), count)]
    bad = sample.copy()
    extremes = np.array([np.nan, 1e30, -1e30, np.inf, -np.inf, 0.0, -1.0, 0.5, 1e9], np.float32)
    bad[rng.random(bad.shape) < 0.4] = 0.0
    hit = rng.random(bad.shape) < 0.4
    bad[hit] = rng.choice(extremes, int(hit.sum()))
    whole = np.repeat(extremes[:, None], width, axis=1)
    bounds = np.zeros((2, width), np.float32)
    for j, f in enumerate(contract.inputs):
        bounds[:, j] = f.range if f.range is not None else (0.0, float(max(len(f.categories), 1)))
    one_off = np.repeat(sample[:1], width, axis=0)
    one_off[np.arange(width), np.arange(width)] = np.nan
    return np.concatenate([sample, bad, whole, bounds, one_off]).astype(np.float32)


def measure_parity(model: RiskModel, scorer: Scorer, rows: Matrix) -> Parity:
    """Scores `rows` in torch and in ONNX Runtime, in batches of 1, 2 and 64, and compares them all.

    Raises HafniumError when a score is not finite or outside [0, 1], or an interval does not contain its score.
    """
    with torch.no_grad():
        expected = [t.numpy() for t in model(torch.tensor(rows))]
    reference = scorer.both(rows)
    score, interval = reference
    if not bool(np.isfinite(score).all() and np.isfinite(interval).all()):
        raise HafniumError("the exported model gives a score that is not finite for a row of extremes")
    inside = (interval[:, 0] <= score) & (score <= interval[:, 1]) & (interval[:, 0] >= 0) & (interval[:, 1] <= 1)
    if not bool(inside.all()):
        raise HafniumError(f"the exported model's interval does not contain the score for {int((~inside).sum())} rows")
    batch = 0.0
    for size in BATCHES:
        for i in range(0, len(rows), size):
            part, band = scorer.both(rows[i:i + size])
            batch = max(
                batch, float(np.abs(part - score[i:i + size]).max()), float(np.abs(band - interval[i:i + size]).max())
            )
    return Parity(
        float(np.abs(expected[0] - score).max()), float(np.abs(expected[1] - interval).max()), batch, len(rows)
    )


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The exporter prints its progress and warns of its own internals; neither is for the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def warm_up() -> None:
    """Loads the exporter by exporting a trivial model: most of an export's time is imports."""
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x
    with _quiet():
        torch.onnx.export(Double(), (torch.zeros(2, 2),), dynamo=True, opset_version=OPSET, external_data=False, verbose=False)
