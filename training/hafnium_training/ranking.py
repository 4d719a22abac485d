"""ROC-AUC, PR-AUC and precision at the top, exact with ties and with row weights (so that a bootstrap is a change of weights).

Own code because the search calls it after every epoch and the bootstrap hundreds of times, where scikit-learn's checks cost
more than the sums; tests hold it against scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Metric = Callable[["Ranked", "Floats | None"], float]


class Ranked:
    """Labels and scores sorted once, best score first; the weights of each measurement follow that order."""

    def __init__(self, y: npt.NDArray[np.int8], score: npt.NDArray[np.floating]) -> None:
        order = np.argsort(-score.astype(np.float64), kind="stable")
        self.order = order
        self.score: Floats = score[order].astype(np.float64)
        self.y: Floats = y[order].astype(np.float64)
        last = np.ones(len(order), bool)
        last[:-1] = self.score[1:] != self.score[:-1]
        self.last = np.flatnonzero(last)
        """Last row of each run of equal scores: thresholds lie only there."""

    def counts(self, weight: Floats | None = None) -> tuple[Floats, Floats]:
        """Weighted true and false positives when everything down to each distinct score is called positive."""
        w = np.ones_like(self.y) if weight is None else weight
        return np.cumsum(w * self.y)[self.last], np.cumsum(w * (1.0 - self.y))[self.last]


def roc_auc(ranked: Ranked, weight: Floats | None = None) -> float:
    """Probability that a positive scores above a negative (ties half). NaN when a class is absent. `weight`: in score order."""
    true, false = ranked.counts(weight)
    if len(true) == 0 or true[-1] <= 0 or false[-1] <= 0:
        return float("nan")
    t, f = np.concatenate([[0.0], true]), np.concatenate([[0.0], false])
    return float(np.sum(np.diff(f) * (t[1:] + t[:-1]) / 2.0) / (t[-1] * f[-1]))


def pr_auc(ranked: Ranked, weight: Floats | None = None) -> float:
    """Average precision: Σ (recall step) · precision. NaN without positives."""
    true, false = ranked.counts(weight)
    if len(true) == 0 or true[-1] <= 0:
        return float("nan")
    called = true + false
    precision = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    return float(np.sum(np.diff(true, prepend=0.0) * precision) / true[-1])


def precision_at(ranked: Ranked, count: int) -> float:
    """Share of positives among the `count` highest scores (fewer rows: among all). Ties in the order of the rows."""
    return float(ranked.y[:count].mean()) if len(ranked.y) else float("nan")


def average_precision(y: npt.NDArray[np.int8], score: npt.NDArray[np.floating]) -> float:
    """PR-AUC of labels and scores."""
    return pr_auc(Ranked(y, score))
