"""Betting on paired score differences: how far does the candidate's score lie from the stable one's on the same request?

Differences D = score_candidate − score_stable lie in [−1, 1]. Against "the mean is at most c" a gambler bets the share λ of
their money on D > c each time: money × (1 + λ(D − c)), with 0 ≤ λ < 1/(1 + c), so that money never runs out. If the mean is at
most c, expected money never grows, whatever the distribution is (skewed, discrete, mostly zero) and however long one looks.
The mean over a grid of λ replaces the choice of one. Money ≥ 1/alpha disproves "at most c".

The same is run for a grid of c on both sides, so that bounds are read off: they are grid points, rounded outwards.

Paper: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting" (JRSS B 86); chapter on grids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

STAKES = (0.99, 0.6, 0.35, 0.2, 0.1, 0.05, 0.02)
"""Shares of the largest allowed bet. Below 1, so that a single extreme difference never ruins the gambler for good."""
_MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
DIFFERENCES_MAX = 20_000
"""Per look. More than that decides anyway; the rest would only cost time."""


_PRODUCT_MAX = 64
"""Factors multiplied before a logarithm: each lies in [.01, 3], so their product is far from the limits of a float."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BettingState:
    """ln of the money of each gambler: `above[i·len(STAKES)+j]` bets with stake j that the mean is above means[i]."""

    means: tuple[float, ...]
    """The grid of means that are bet against."""
    above: tuple[float, ...]
    """ln of the money of those who bet on more."""
    below: tuple[float, ...]
    """ln of the money of those who bet on less."""
    count: int = 0
    """Pairs of scores so far."""
    total: float = 0.0
    """Sum of their differences."""
    squares: float = 0.0
    """Sum of their squared differences."""


def begin(margin: float, harmless: float) -> BettingState:
    """A fresh state whose grid holds 0, ±margin, ±harmless and multiples of the margin between −1 and 1."""
    if not 0 < margin < 1 or not 0 <= harmless < 1:
        raise ValueError(f"margin must lie in (0, 1) and harmless in [0, 1), got {margin} and {harmless}")
    positive = {m * margin for m in _MULTIPLES if m * margin < 1.0} | {harmless} - {0.0}
    means = tuple(sorted({0.0} | positive | {-c for c in positive}))
    zeros = (0.0,) * (len(means) * len(STAKES))
    return BettingState(means, zeros, zeros)


def add(state: BettingState, differences: Sequence[float]) -> BettingState:
    """New pairs' differences, each in [−1, 1] and each pair once. Raises ValueError for others."""
    if not differences:
        return state
    d: npt.NDArray[np.float64] = np.asarray(differences[:DIFFERENCES_MAX], dtype=np.float64)
    if not bool(np.all(np.isfinite(d))) or float(np.max(np.abs(d))) > 1.0 + 1e-9:
        raise ValueError("a score difference lies outside [−1, 1]")
    d = np.clip(d, -1.0, 1.0)
    c = np.asarray(state.means)[:, None]
    stakes = np.asarray(STAKES)
    above = (np.asarray(state.above) + _log_growth(d, c, stakes / (1.0 + c))).tolist()
    below = (np.asarray(state.below) + _log_growth(d, c, -stakes / (1.0 - c))).tolist()
    return replace(
        state, above=tuple(above), below=tuple(below), count=state.count + len(d),
        total=state.total + float(np.sum(d)), squares=state.squares + float(np.sum(d * d)),
    )


def _log_growth(d: _Floats, c: _Floats, bets: _Floats) -> _Floats:
    """Σ ln(1 + bet·(d − c)) per mean and stake, flat. The logarithm is taken of products, which is eight times quicker."""
    slope = bets.ravel()
    start = 1.0 - (bets * c).ravel()
    grown = np.zeros(slope.size)
    for i in range(0, d.size, _PRODUCT_MAX):
        grown += np.log(np.multiply.reduce(start + d[i:i + _PRODUCT_MAX, None] * slope, axis=0))
    return grown


def log_e_above(state: BettingState, c: float) -> float:
    """ln of the e-value against "mean ≤ c". `c` must be a point of the grid."""
    return _log_mean(_of(state, state.above, c))


def log_e_below(state: BettingState, c: float) -> float:
    """ln of the e-value against "mean ≥ c". `c` must be a point of the grid."""
    return _log_mean(_of(state, state.below, c))


def lower_bound(state: BettingState, alpha: float) -> float:
    """Largest grid point that the mean is proven to lie above; −1 when none is."""
    goal = math.log(1.0 / alpha)
    proven = [c for c in state.means if log_e_above(state, c) >= goal]
    return max(proven, default=-1.0)


def upper_bound(state: BettingState, alpha: float) -> float:
    """Smallest grid point that the mean is proven to lie below; 1 when none is."""
    goal = math.log(1.0 / alpha)
    proven = [c for c in state.means if log_e_below(state, c) >= goal]
    return min(proven, default=1.0)


def missing_for_pass(state: BettingState, margin: float, alpha: float) -> int | None:
    """About how many more pairs prove |mean| < margin if the mean stays as seen. None: it won't come."""
    mean = state.total / state.count if state.count else 0.0
    goal = math.log(1.0 / alpha) + math.log(len(STAKES))
    square = state.squares / state.count if state.count else 0.0
    needs: list[float] = []
    for values, c, room in ((state.below, margin, margin - mean), (state.above, -margin, mean + margin)):
        if room <= 0:
            return None
        spread = square - 2.0 * mean * c + c * c  # mean of (D − c)²; ln(1 + x) ≈ x − x²/2 for the small bets that win here
        best = math.inf
        for stake, money in zip(STAKES, _of(state, values, c), strict=True):
            bet = stake / (1.0 - margin)
            growth = bet * room - bet * bet * spread / 2.0
            if growth > 0:
                best = min(best, max(goal - money, 0.0) / growth)
        needs.append(best)
    worst = max(needs)
    return math.ceil(worst) if math.isfinite(worst) else None


def _of(state: BettingState, values: tuple[float, ...], c: float) -> tuple[float, ...]:
    i = state.means.index(c)
    return values[i * len(STAKES):(i + 1) * len(STAKES)]


def _log_mean(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values) / len(values))
