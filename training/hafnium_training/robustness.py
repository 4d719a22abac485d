"""What the exported model does when its inputs move: directions of the contract, and small noise.

The construction of the network promises the directions; this is the independent check on the file that will be served, which
also covers the exporter, ONNX Runtime's kernels and models that something else has trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import Matrix
from hafnium_contract.model_contract import ModelContract
from hafnium_training.dataset import Dataset
from hafnium_training.losses import causes, moved

if TYPE_CHECKING:
    from collections.abc import Callable

PAIRS_PER_FEATURE = 2_000
SAMPLE_ROWS = 2_000
NOISE_SHARE = 0.01
"""Noise of the sensitivity check, in standard deviations of each numeric input."""



@dataclass(frozen=True)
class Monotonicity:
    """Pairs of rows that differ only in inputs with a direction; a violation is any fall of the score at all."""

    pairs: int
    violations: int
    largest: float
    """Largest fall of the score (rise, for a decreasing feature); 0 when there is none."""
    features: dict[str, int]
    """Violations per feature; `(together)`: all of them moved at once."""


@dataclass(frozen=True)
class Robustness:
    monotonicity: Monotonicity
    causes: dict[str, float]
    """Feature that others are derived from → share of rows whose score falls when it takes a step towards more risk and the
    derived inputs follow. Not guaranteed by construction, see losses.py."""
    noise_mean: float
    """Mean |change of the score| under noise of 1 % of each input's standard deviation."""
    noise_largest: float
    decisions_changed: float
    """Share of rows whose decision that noise changes."""


def random_rows(contract: ModelContract, X: Matrix, count: int, rng: np.random.Generator) -> Matrix:
    """Half real rows, half uniform over the contract's ranges; some values of both missing, some categories unknown."""
    rows = X[rng.integers(0, len(X), count)].copy()
    for j, f in enumerate(contract.inputs):
        made = np.arange(count) % 2 == 1
        if f.dtype == "category":
            rows[made, j] = rng.integers(-1, len(f.categories), int(made.sum()))
        else:
            low, high = f.range if f.range is not None else (0.0, 1.0)
            rows[made, j] = rng.uniform(low, high, int(made.sum()))
    rows[rng.random(rows.shape) < 0.05] = np.nan
    return rows


def measure_monotonicity(
    contract: ModelContract, score: Callable[[Matrix], npt.NDArray[np.float32]], X: Matrix, seed: int,
) -> Monotonicity:
    """Random paired perturbation of each directed input alone and of all together, near and far, also beyond the range."""
    rng = np.random.default_rng(seed)
    directed = [(j, f) for j, f in enumerate(contract.inputs) if f.monotone != "none"]
    worst, total, per_feature = 0.0, 0, dict[str, int]()

    def check(name: str, moves: list[int]) -> None:
        nonlocal worst, total
        low_risk = random_rows(contract, X, PAIRS_PER_FEATURE, rng)
        high_risk = low_risk.copy()
        for j in moves:
            f = contract.inputs[j]
            low, high = f.range if f.range is not None else (0.0, 1.0)
            far = rng.uniform(low - 0.1 * (high - low), high + 0.1 * (high - low), PAIRS_PER_FEATURE)
            near = low_risk[:, j] * (1 + rng.exponential(1e-3, PAIRS_PER_FEATURE)) + rng.exponential(
                1e-4 * (high - low), PAIRS_PER_FEATURE)
            other = np.where(rng.random(PAIRS_PER_FEATURE) < 0.5, far, near).astype(np.float32)
            present = ~np.isnan(low_risk[:, j])
            one, two = low_risk[:, j], other
            bottom, top = np.minimum(one, two), np.maximum(one, two)
            if f.monotone == "decreasing":
                bottom, top = top, bottom
            low_risk[:, j] = np.where(present, bottom, one)
            high_risk[:, j] = np.where(present, top, one)
        fall = score(low_risk).astype(np.float64) - score(high_risk)
        per_feature[name] = int((fall > 0).sum())
        worst, total = max(worst, float(fall.max(initial=0.0))), total + len(fall)

    for j, f in directed:
        check(f.name, [j])
    if len(directed) > 1:
        check("(together)", [j for j, _ in directed])
    return Monotonicity(total, sum(per_feature.values()), worst, per_feature)


def measure_robustness(
    data: Dataset, score: Callable[[Matrix], npt.NDArray[np.float32]], threshold: float, seed: int,
) -> Robustness:
    """On a seeded sample of the dataset's rows."""
    rng = np.random.default_rng(seed)
    sample = data.take(np.sort(rng.permutation(data.rows)[:SAMPLE_ROWS]))
    before = score(sample.X)
    numeric = np.array([f.dtype in ("float", "int") for f in data.contract.inputs])
    noisy = sample.X.astype(np.float64)
    deviation = np.array([np.nanstd(c) if bool(np.isfinite(c).any()) else 0.0 for c in noisy.T])
    noisy += rng.normal(size=noisy.shape) * (NOISE_SHARE * deviation * numeric)
    after = score(noisy.astype(np.float32))
    change = np.abs(after.astype(np.float64) - before)
    fallen = {
        cause: float((score(moved(sample, cause)) < before).mean()) for cause in causes(data.contract)
    }
    return Robustness(
        measure_monotonicity(data.contract, score, data.X, seed), fallen, float(change.mean()), float(change.max()),
        float(((after >= threshold) != (before >= threshold)).mean()),
    )
