"""Has a share (of missing values, of unknown categories, of degraded answers) changed by more than a harmless margin?

Such shares are often 0 in the base, where no normal or chi-square approximation holds, so the test is exact: the base's
share lies, but for a chance γ, below its Clopper-Pearson limit U; the chance of seeing this many under U + margin, plus γ, is
a valid p-value (Berger & Boos 1994). The same downwards. It is a little conservative and never wrong for small counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy import special

_GAMMA = 1e-9
"""Far below any level that BH compares with (0.05 / 100 looks / 1,000 tests = 5e-7), so that it costs no finding."""


@dataclass(frozen=True)
class ShareTest:
    change: float
    """Share in the window minus share in the base, from −1 to 1."""
    p_value: float
    """Two-sided, of |true change| ≤ margin."""


def share_test(count: int, total: int, base_count: int, base_total: int, margin: float) -> ShareTest:
    """Tests |share − base share| ≤ margin. An empty sample gives change 0 and p-value 1."""
    if total == 0 or base_total == 0:
        return ShareTest(0.0, 1.0)
    upper = 1.0 if base_count == base_total else special.betainccinv(base_count + 1, base_total - base_count, _GAMMA)
    lower = 0.0 if base_count == 0 else special.betaincinv(base_count, base_total - base_count + 1, _GAMMA)
    rise = special.bdtrc(count - 1, total, min(1.0, float(upper) + margin))  # P(X ≥ count) of a binomial
    fall = special.bdtr(count, total, max(0.0, float(lower) - margin))
    p = min(1.0, 2.0 * (min(float(rise), float(fall)) + _GAMMA))
    return ShareTest(count / total - base_count / base_total, p)
