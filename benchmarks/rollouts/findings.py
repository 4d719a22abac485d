"""What the drift job finds in a window of 50 features: the monitoring's own tests and verdict, on binned counts drawn directly."""

from __future__ import annotations

import math

import numpy as np

from hafnium_monitoring.bh import level
from hafnium_monitoring.comparison import Finding, judged
from hafnium_monitoring.psi import psi_test
from hafnium_monitoring.settings import DriftRules
from hafnium_monitoring.verdict import Comparisons, Judgement, judge

FEATURES = 50
BINS = 10
REFERENCE_ROWS = 20_000
ROWS_MAX = 20_000
THRESHOLD = 0.1
MOVED = {"wave": 0.01, "incident": 0.01, "step": 0.01}
"""PSI by which all features leave their reference in both arms: harmless, and never quite zero in production."""


def moved(psi: float) -> np.ndarray:
    """Shares of the bins, a tenth each, after rows moved from the lower half to the upper one by this PSI."""
    # each bin changes by ±e/10, so PSI = e·artanh(e): solved by a few steps of Newton
    e = math.sqrt(psi)
    for _ in range(20):
        e -= (e * math.atanh(e) - psi) / (math.atanh(e) + e / (1 - e * e)) if psi else 0.0
    return np.concatenate([np.full(BINS // 2, 0.1 * (1 - e)), np.full(BINS // 2, 0.1 * (1 + e))])


class Drift:
    """The job's view of one rollout: a reference, and windows of both arms."""

    def __init__(self, rng: np.random.Generator, world: str, drift: float) -> None:
        self.rng = rng
        self.rules = DriftRules()
        self.level = level(self.rules.alpha, self.rules.looks, 2)
        self.shares = moved(MOVED.get(world, 0.0))
        self.candidate_shares = np.tile(self.shares, (FEATURES, 1))
        if drift:
            self.candidate_shares[0] = moved(drift)
        # both models were trained on the same weeks
        self.references = tuple(Finding(f"f{i}", "psi", 0.0, THRESHOLD, 1.0, large=False) for i in range(FEATURES))
        self.reference = rng.multinomial(REFERENCE_ROWS, np.full(BINS, 1.0 / BINS), FEATURES)

    def window(self, rows_candidate: int, rows_stable: int) -> Judgement:
        """The verdict of one window."""
        n, m = min(rows_candidate, ROWS_MAX), min(rows_stable, ROWS_MAX)
        candidate = np.stack([self.rng.multinomial(n, p) for p in self.candidate_shares])
        if m < self.rules.min_rows:  # weight 100: nobody to compare with
            return judge(Comparisons(candidate=self._compare(candidate, self.reference), stable_expected=True, all_traffic=True))
        stable = self.rng.multinomial(m, self.shares, FEATURES)
        return judge(Comparisons(
            candidate=self._compare(candidate, self.reference), stable=self._compare(stable, self.reference),
            between=self._compare(candidate, stable), references=self.references, stable_expected=True,
        ))

    def _compare(self, a: np.ndarray, b: np.ndarray) -> tuple[Finding, ...]:
        found: list[Finding] = []
        for i in range(FEATURES):
            test = psi_test(a[i], b[i], ordered=True, null_psi=self.rules.null_psi)
            found.append(Finding(f"f{i}", "psi", test.psi, THRESHOLD, test.p_value, test.reaches(THRESHOLD)))
        return judged(found, self.level)
