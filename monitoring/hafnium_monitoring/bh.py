"""Benjamini-Hochberg: which of many p-values count, when a share alpha of the findings may be false.

A contract has dozens of features, and every look tests each of them; at p < .05 some feature "drifts" in nearly every
window. BH at alpha keeps the expected share of false findings below alpha, and when nothing drifts at all, the chance of any
finding. The looks of a rollout share that chance: each gets alpha / looks (`level`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def level(alpha: float, looks: int, families: int = 1) -> float:
    """The level of one family of tests at one of `looks` looks. Raises ValueError when an argument is out of range."""
    if not 0.0 < alpha < 1.0 or looks < 1 or families < 1:
        raise ValueError(f"alpha must be in (0, 1), looks and families at least 1; got {alpha}, {looks}, {families}")
    return alpha / looks / families


def benjamini_hochberg(p_values: Sequence[float], alpha: float) -> npt.NDArray[np.bool_]:
    """Which hypotheses are rejected at `alpha`, in the order given. NaN is a p-value of 1: no test, no finding."""
    p = np.nan_to_num(np.asarray(p_values, np.float64), nan=1.0)
    if p.size == 0:
        return np.zeros(0, np.bool_)
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= alpha * np.arange(1, p.size + 1) / p.size)
    out = np.zeros(p.size, np.bool_)
    if below.size:
        out[order[: below[-1] + 1]] = True
    return out
