"""PSI on quantile bins, with a p-value against harmless movement.

    PSI = Σ (p_i − q_i) ln(p_i / q_i)        over bins i; p: share in the window, q: share in the base

Why these bins: PSI on bins of equal width is blind on heavy-tailed values, since one huge value puts all others into one bin.
The bins here are the base's deciles, so that each holds a tenth of it; a value that is an atom (many rows share it, such as
0) gets a bin of its own, so a feed that is stuck just beside it is seen. Missing is a bin of its own; so is the unknown category.

Why a p-value: PSI of two samples of one population is not 0 but about (bins − 1)(1/n + 1/m). With N = nm/(n + m), the
statistic N·PSI is close to a noncentral chi-square with bins − 1 degrees of freedom and noncentrality N·(true PSI). It is
tested against "the true PSI is at most `NULL_PSI`", because real traffic always moves a little and a large enough window
would prove any of it. The approximation needs counts: bins are merged until each expects at least 5 rows in both samples.
(Measured here: Pearson's statistic instead of N·PSI is up to twice too lenient when one tail grows, see docs/drift.md.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from hafnium_contract.model_contract import Feature

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

NULL_PSI = 0.02
"""Movement up to this is harmless: seasons, the mix of merchants, a day's weather."""
EXPECTED_MIN = 5.0
"""Smallest expected count of a bin in either sample; below it the chi-square approximation breaks."""
DECILES: tuple[float, ...] = tuple(i / 10 for i in range(1, 10))
SCORE_QUANTILES: tuple[float, ...] = (*DECILES, 0.95, 0.99)
"""Scores get bins of their own for the top 5 and 1 percent: that is where the decisions are made."""
BELOW_CONFIDENCE = 0.95
"""An effect is below a threshold only when the sample shows it with this confidence."""


@dataclass(frozen=True)
class Binning:
    """Where values of one feature fall. Bins 0…size−2 are values, bin size−1 is missing (NaN)."""

    edges: Floats
    """Numbers: upper edges, rising; bin i is (edges[i−1], edges[i]]. Empty for a category."""
    categories: int = 0
    """Categories: how many are known; bin 0 is the unknown one, bin 1 + c is code c. 0 for numbers."""

    @property
    def size(self) -> int:
        return (self.categories + 1 if self.categories else len(self.edges) + 1) + 1

    @property
    def ordered(self) -> bool:
        """Neighbouring bins may be merged (numbers); categories have no neighbours."""
        return self.categories == 0

    def counts(self, values: npt.NDArray[np.floating]) -> Counts:
        """Rows per bin, [size]. `values`: [rows], NaN = missing, ±inf falls into the outer bins."""
        missing = np.isnan(values)
        present = values[~missing].astype(np.float64)
        if self.categories:
            known = (present >= 0) & (present < self.categories)
            codes = np.where(known, present, -1.0).astype(np.int64) + 1
        else:
            codes = np.searchsorted(self.edges, present, side="left")
        out = np.bincount(codes, minlength=self.size)
        out[-1] = int(missing.sum())
        return out.astype(np.int64)


def quantile_binning(base: npt.NDArray[np.floating], quantiles: tuple[float, ...] = DECILES) -> Binning:
    """Bins at the base's quantiles. A value that two quantiles share is an atom and gets its own bin."""
    present = base[~np.isnan(base)].astype(np.float64)
    if present.size == 0:
        return Binning(np.zeros(0, np.float64))
    # method=lower: an edge is always a value of the sample, so float32 values compare with it exactly
    cuts, times = np.unique(np.quantile(present, quantiles, method="lower"), return_counts=True)
    below_atoms = np.nextafter(cuts[times > 1], -np.inf)
    return Binning(np.unique(np.concatenate([cuts, below_atoms])))


def feature_binning(feature: Feature, base: npt.NDArray[np.floating]) -> Binning:
    """A category's bins are its codes; a number's or bool's are the base's deciles."""
    if feature.dtype == "category":
        return Binning(np.zeros(0, np.float64), len(feature.categories))
    return quantile_binning(base)


def merge_bins(a: Counts, b: Counts, *, ordered: bool, expected_min: float = EXPECTED_MIN) -> tuple[Counts, Counts]:
    """Merges bins until each expects `expected_min` rows in both samples, under the pooled shares.

    Ordered bins join their neighbour (the missing bin, last, joins the top bin when it is that small); categories that are
    too rare join each other. Always at least one bin. A rare missing or unknown value has a test of its own (shares.py).
    """
    total = int(a.sum() + b.sum())
    if total == 0:
        return a[:1], b[:1]
    expected = (a + b) * (min(int(a.sum()), int(b.sum())) / total)
    # Rarest first for categories: the rare ones then end up together, and the rest of them joins the next rarest.
    order = np.arange(len(a)) if ordered else np.argsort(expected, kind="stable")
    group = np.zeros(len(a), np.int64)
    current, filled = 0, 0.0
    for k in order:
        group[k] = current
        filled += float(expected[k])
        if filled >= expected_min:
            current, filled = current + 1, 0.0
    if filled < expected_min and current > 0:  # what is left over joins the last full group
        group[group == current] = current - 1
    size = int(group.max()) + 1
    return (np.bincount(group, a, size).astype(np.int64), np.bincount(group, b, size).astype(np.int64))


@dataclass(frozen=True)
class PsiTest:
    """PSI of two samples and what follows from it."""

    psi: float
    p_value: float
    """Chance of a PSI this large or larger when the true one is `null_psi`."""
    bins: int
    effective: float
    """nm/(n + m) of the two sample sizes."""

    def reaches(self, threshold: float) -> bool:
        """False only when the sample shows, with 95 % confidence, that the true PSI is below `threshold`.

        "psi > threshold" would miss an effect of exactly the threshold half of the time, at any sample size.
        """
        if self.bins < 2:
            return False
        below = _noncentral_cdf(self.effective * self.psi, self.bins - 1, self.effective * threshold)
        return below > 1.0 - BELOW_CONFIDENCE


def _noncentral_cdf(x: float, degrees: int, noncentrality: float) -> float:
    """P(χ²(degrees, noncentrality) ≤ x). scipy.stats has the same function, and 90 MB more to import."""
    return float(special.chndtr(x, degrees, noncentrality))


def psi_value(a: Counts, b: Counts) -> float:
    """PSI of counts per bin. Half a row is added to each bin, so that an empty one doesn't make it infinite."""
    if len(a) < 2:
        return 0.0
    p = (a + 0.5) / (a.sum() + 0.5 * len(a))
    q = (b + 0.5) / (b.sum() + 0.5 * len(b))
    return float(np.sum((p - q) * np.log(p / q)))


def psi_test(a: Counts, b: Counts, *, ordered: bool, null_psi: float = NULL_PSI) -> PsiTest:
    """Merges the bins of two samples, then PSI and its p-value. An empty sample gives PSI 0 and p-value 1."""
    n, m = int(a.sum()), int(b.sum())
    if n == 0 or m == 0:
        return PsiTest(0.0, 1.0, 1, 0.0)
    a, b = merge_bins(a, b, ordered=ordered)
    effective = n * m / (n + m)
    value = psi_value(a, b)
    if len(a) < 2:
        return PsiTest(value, 1.0, len(a), effective)
    p = 1.0 - _noncentral_cdf(effective * value, len(a) - 1, effective * null_psi)
    return PsiTest(value, max(p, 0.0), len(a), effective)
