"""A bundle in memory: opened, checked against its contract, warmed up, and then only asked for scores.

One thread per session and no spinning: `session.run` takes 10-20 µs for a row, and neither a second thread nor spinning
gained anything (measured), while a spinning one takes the CPU from the server beside it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT, Bundle, open_bundle
from hafnium_contract.errors import BundleError
from hafnium_predictor.errors import ModelFailureError, RowsError
from hafnium_predictor.metrics import PredictorMetrics

Matrix = npt.NDArray[np.float32]
_FLOAT = "tensor(float)"


class Engine:
    """Scores rows with one bundle. Not thread-safe by promise; the event loop's thread is the only caller."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, metrics: PredictorMetrics, rows_max: int) -> None:
        self.bundle = bundle
        self.columns = len(bundle.contract.inputs)
        self.rows_max = rows_max
        self._session = session
        self._metrics = metrics
        self._outputs = [SCORE_OUTPUT, INTERVAL_OUTPUT]

    def run(self, matrix: Matrix) -> tuple[Matrix, Matrix]:
        """Encoded rows [rows, n] (NaN = missing) → score [rows] in [0, 1] and interval [rows, 2].

        Raises RowsError for a wrong shape or an infinite value, ModelFailureError when the graph fails.
        """
        if matrix.ndim != 2 or matrix.shape[1] != self.columns:
            raise RowsError(f"features: expected shape [rows, {self.columns}], got {list(matrix.shape)}")
        if not 1 <= len(matrix) <= self.rows_max:
            raise RowsError(f"features: {len(matrix)} rows; from 1 to {self.rows_max} are taken")
        # One pass that is finite for nearly all requests; a NaN (missing) or an overflow of the sum asks for a closer look
        if not math.isfinite(np.add.reduce(matrix, axis=None)) and (infinite := np.isinf(matrix)).any():
            row, column = np.argwhere(infinite)[0]
            name = self.bundle.contract.input_names[column]
            raise RowsError(f"features[{row}][{column}] ({name}): expected a finite float32 or NaN, got infinity")
        start = time.perf_counter()
        try:
            outputs = cast(list[Matrix], self._session.run(self._outputs, {INPUT_NAME: matrix}))
        except Exception as e:  # ONNX Runtime's errors share no base but Exception
            raise ModelFailureError(f"ONNX Runtime: {str(e)[:300]}") from e
        self._metrics.latency.observe(time.perf_counter() - start)
        score, interval = outputs
        if score.shape != (len(matrix),) or interval.shape != (len(matrix), 2):
            raise ModelFailureError(f"the graph gave score {list(score.shape)} and interval {list(interval.shape)}")
        # Comparisons that are false for NaN too; one number is compared in Python, at a tenth of numpy's cost
        good = 0.0 <= score.item() <= 1.0 if len(score) == 1 else score.min() >= 0.0 and score.max() <= 1.0
        if not good:
            raise ModelFailureError("the graph gave a score that is not in [0, 1]")
        return score, interval


def load_engine(path: Path, metrics: PredictorMetrics, *, rows_max: int, warmup_rows: int) -> Engine:
    """Opens the bundle at `path`, checks its graph against its contract and warms it up.

    Raises InputError or BundleError that says what is wrong with which file.
    """
    bundle = open_bundle(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime's errors share no base but Exception
        raise BundleError(f"{bundle.model_path}: ONNX Runtime can't load it: {str(e)[:300]}") from e
    _check_graph(bundle, session)
    engine = Engine(bundle, session, metrics, rows_max)
    _warm_up(engine, min(warmup_rows, rows_max))
    return engine


def _check_graph(bundle: Bundle, session: ort.InferenceSession) -> None:
    where, columns = bundle.model_path, len(bundle.contract.inputs)
    inputs: list[Any] = list(session.get_inputs())
    found = [i.name for i in inputs]
    if found != [INPUT_NAME]:
        raise BundleError(f"{where}: expected one input {INPUT_NAME!r}, the graph has {found}")
    shape = list(inputs[0].shape)
    if inputs[0].type != _FLOAT or len(shape) != 2 or isinstance(shape[0], int) or shape[1] != columns:
        raise BundleError(
            f"{where}: input {INPUT_NAME!r} is {inputs[0].type} {shape}; the contract's {columns} inputs need "
            f"{_FLOAT} [batch, {columns}]"
        )
    outputs: dict[str, Any] = {o.name: o for o in session.get_outputs()}
    for name, tail in ((SCORE_OUTPUT, []), (INTERVAL_OUTPUT, [2])):
        if name not in outputs:
            raise BundleError(f"{where}: output {name!r} is missing; the graph has {sorted(outputs)}")
        got = outputs[name]
        if got.type != _FLOAT or len(got.shape) != 1 + len(tail) or list(got.shape)[1:] != tail:
            raise BundleError(f"{where}: output {name!r} is {got.type} {got.shape}, expected {_FLOAT} {['batch', *tail]}")


def _warm_up(engine: Engine, rows: int) -> None:
    """Runs one row and a batch; a graph that can't score what is all missing, or all zero, is a bad bundle."""
    try:
        for size in (1, 2, rows):
            for value in (np.nan, 0.0):
                engine.run(np.full((size, engine.columns), value, np.float32))
    except ModelFailureError as e:
        raise BundleError(f"{engine.bundle.model_path}: warm-up failed: {e}") from e
