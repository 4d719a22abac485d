"""One comparison of two samples: every feature, the missing and unknown shares, the scores → findings.

A finding counts as drift when both hold:
- it is significant: Benjamini-Hochberg over all tests of this comparison, against harmless movement (not against none);
- it is large: the sample can't rule out the contract's threshold for the feature (`PsiTest.reaches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hafnium_contract.evidence import EvidenceValue
from hafnium_contract.inference_log import logged_features
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_monitoring.bh import benjamini_hochberg
from hafnium_monitoring.psi import SCORE_QUANTILES, Binning, PsiTest, feature_binning, psi_test, quantile_binning
from hafnium_monitoring.samples import Sample
from hafnium_monitoring.settings import DriftRules
from hafnium_monitoring.shares import share_test

SCORE = "score"
NON_FINITE = "non_finite_scores"
Statistic = Literal["psi", "missing_share_change", "unknown_share_change", "degraded_share_change", "non_finite_scores"]


@dataclass(frozen=True)
class Finding:
    """One test's result. `p_value` None: shown, not judged."""

    name: str
    """A feature, `score`, `missing:<feature>`, `unknown:<feature>` or `degraded`."""
    statistic: Statistic
    value: float
    threshold: float | None
    p_value: float | None
    large: bool
    drifted: bool = False

    @property
    def feature(self) -> str:
        return self.name.partition(":")[2] or self.name

    def evidence(self, compared_with: Literal["reference", "stable"], prefix: str = "") -> EvidenceValue:
        return EvidenceValue(
            name=prefix + self.name, statistic=self.statistic, value=self.value, threshold=self.threshold,
            p_value=self.p_value, drifted=self.drifted, compared_with=compared_with,
        )

    def __str__(self) -> str:
        if self.statistic == NON_FINITE:
            return f"scores that are NaN or infinite: {self.value:.0f}"
        if self.statistic == "psi":
            return f"{self.name} (PSI {self.value:.2f})"
        return f"{self.name} ({self.value:+.1%})"


def compare(
    contract: ModelContract, window: Sample, base: Sample, *, rules: DriftRules, level: float,
    ignore: frozenset[str] = frozenset(), judge_score: bool = True, pooled_bins: bool = False,
) -> tuple[Finding, ...]:
    """Compares `window` with `base` on the features that both hold; BH at `level` over all tests.

    `ignore`: features whose PSI is not looked at (their missing share still is). `judge_score`: False shows the score's PSI
    without judging it. `pooled_bins`: bins from both samples together (two arms of one window) instead of from the base.
    """
    found: list[Finding] = []
    for f in logged_features(contract):
        a, b = window.features.get(f.name), base.features.get(f.name)
        if a is not None and b is not None:
            found += _feature_findings(f, a, b, rules, f.name not in ignore, pooled_bins)
    if window.degraded is not None and base.degraded is not None:
        found.append(_share_finding(
            "degraded", "degraded_share_change", int(window.degraded.sum()), window.rows, int(base.degraded.sum()), base.rows,
            rules,
        ))
    bins = quantile_binning(_base(window.score, base.score, pooled_bins), SCORE_QUANTILES)
    found.append(_psi_finding(SCORE, bins, window.score, base.score, rules.score_threshold, rules))
    if not judge_score:
        found[-1] = replace(found[-1], threshold=None, p_value=None)
    broken = int((~np.isfinite(window.score)).sum()) if judge_score else 0
    return (*judged(found, level), *([_non_finite(broken)] if broken else []))


def _non_finite(rows: int) -> Finding:
    """Not a movement that could be harmless, so not a test: a single such score is a decision that nobody made."""
    return Finding(f"non_finite:{SCORE}", NON_FINITE, float(rows), 0.0, None, large=True, drifted=True)


def judged(found: Sequence[Finding], level: float) -> tuple[Finding, ...]:
    """Which of one comparison's tests count as drift: large, and significant by BH at `level` over all that have a p-value."""
    verdicts = iter(benjamini_hochberg([f.p_value for f in found if f.p_value is not None], level))
    return tuple(f if f.p_value is None else replace(f, drifted=bool(next(verdicts)) and f.large) for f in found)


def _base(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], pooled: bool) -> npt.NDArray[np.float32]:
    return np.concatenate([a, b]) if pooled else b


def _feature_findings(
    f: Feature, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], rules: DriftRules, judge: bool, pooled: bool,
) -> list[Finding]:
    found: list[Finding] = []
    if judge and f.drift.test == "psi":
        found.append(_psi_finding(f.name, feature_binning(f, _base(a, b, pooled)), a, b, f.drift.threshold, rules))
    found.append(_share_finding(
        f"missing:{f.name}", "missing_share_change", int(np.isnan(a).sum()), len(a), int(np.isnan(b).sum()), len(b), rules,
    ))
    if f.dtype == "category":
        found.append(_share_finding(
            f"unknown:{f.name}", "unknown_share_change", int((a < 0).sum()), len(a), int((b < 0).sum()), len(b), rules,
        ))
    return found


def _psi_finding(
    name: str, bins: Binning, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], threshold: float, rules: DriftRules,
) -> Finding:
    test: PsiTest = psi_test(bins.counts(a), bins.counts(b), ordered=bins.ordered, null_psi=rules.null_psi)
    return Finding(name, "psi", test.psi, threshold, test.p_value, test.reaches(threshold))


def _share_finding(
    name: str, statistic: Statistic, count: int, total: int, base_count: int, base_total: int, rules: DriftRules,
) -> Finding:
    test = share_test(count, total, base_count, base_total, rules.missing_margin)
    large = abs(test.change) >= rules.missing_threshold
    return Finding(name, statistic, test.change, rules.missing_threshold, test.p_value, large)


ARRIVAL_THRESHOLD = 0.1


def split_changed(window: Sample, base: Sample, *, rules: DriftRules, level: float) -> bool:
    """Whether two arms' requests came at different times of the window.

    With a constant split they can't. When the weight changed inside the window, one arm has more of its end, and everything
    that moves with the clock then differs between equal arms.
    """
    if window.time is None or base.time is None:
        return False
    bins = quantile_binning(np.concatenate([window.time, base.time]))
    test = psi_test(bins.counts(window.time), bins.counts(base.time), ordered=True, null_psi=rules.null_psi)
    return test.p_value <= level and test.reaches(ARRIVAL_THRESHOLD)


def drifted(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(f for f in findings if f.drifted)
