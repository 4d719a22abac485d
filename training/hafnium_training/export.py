"""The exported model as it is served, and the proof that it agrees with what was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import ModelContract
from hafnium_training.graph import RiskModel
from hafnium_training.onnx_graph import model_proto

PARITY_LIMIT = 1e-5
"""Largest difference between a score in torch and in ONNX Runtime."""
BATCHES = (1, 2, 64)

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """Largest differences found. `batch`: the same row scored alone and among others. `against`: what the scores were compared with;
    a model that something else trained can only be compared with itself."""

    score: float
    interval: float
    batch: float
    rows: int
    against: Literal["torch", "itself"] = "torch"

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
    return model_proto(model, inputs).SerializeToString(deterministic=True)


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


def measure_parity(model: RiskModel | None, scorer: Scorer, rows: Matrix) -> Parity:
    """Scores `rows` in torch (when there is a model) and in ONNX Runtime, in batches of 1, 2 and 64, and compares them all.

    Raises HafniumError when a score is not finite or outside [0, 1], or an interval does not contain its score.
    """
    score, interval = scorer.both(rows)
    expected = [score, interval]
    if model is not None:
        with torch.no_grad():
            expected = [t.numpy() for t in model(torch.tensor(rows))]
    if not bool(np.isfinite(score).all() and np.isfinite(interval).all()):
        raise HafniumError("the exported model gives a score or an interval that is not finite for a row of extremes")
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
        float(np.abs(expected[0] - score).max()), float(np.abs(expected[1] - interval).max()), batch, len(rows),
        "itself" if model is None else "torch",
    )
