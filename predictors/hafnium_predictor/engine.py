"""A bundle in memory: opened, checked against its contract, warmed up, and then only asked for scores.

One thread per session and no spinning: `session.run` takes 10-20 µs for a row, and neither a second thread nor spinning
gained anything (measured), while a spinning one takes the CPU from the server beside it. Graph optimisation, arena and memory pattern
stay at their defaults: the trained graph is folded before it is written, and switching any of them off gained nothing or lost 15 %.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT, Bundle, open_bundle
from hafnium_contract.errors import BundleError
from hafnium_contract.graph import check_graph
from hafnium_predictor.errors import ModelFailureError, RowsError
from hafnium_predictor.metrics import PredictorMetrics

Matrix = npt.NDArray[np.float32]


class Engine:
    """Scores rows with one bundle. Not thread-safe by promise; the event loop's thread is the only caller."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, metrics: PredictorMetrics, rows_max: int) -> None:
        self.bundle = bundle
        self.columns = len(bundle.contract.inputs)
        self.rows_max = rows_max
        self._session = session
        self._metrics = metrics
        self._outputs = [SCORE_OUTPUT, INTERVAL_OUTPUT]
        self._run_options = ort.RunOptions()  # kept: making one per run costs 1 µs of 20

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
            outputs = cast(list[Matrix], self._session.run(self._outputs, {INPUT_NAME: matrix}, self._run_options))
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
    check_graph(bundle.model_path, bundle.contract, session)
    engine = Engine(bundle, session, metrics, rows_max)
    _warm_up(engine, min(warmup_rows, rows_max))
    return engine


def _warm_up(engine: Engine, rows: int) -> None:
    """Runs one row and a batch; a graph that can't score what is all missing, or all zero, is a bad bundle."""
    try:
        for size in (1, 2, rows):
            for value in (np.nan, 0.0):
                engine.run(np.full((size, engine.columns), value, np.float32))
    except ModelFailureError as e:
        raise BundleError(f"{engine.bundle.model_path}: warm-up failed: {e}") from e
