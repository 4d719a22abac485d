"""How much more request counts vary than independent requests would: the dispersion φ, measured before the rollout.

Retries, keep-alive and a noisy pod make bad requests come in clumps. Every rule for independent requests then fails (363 to
968 false rollbacks of 1,000 in the simulations). Counts divided by φ repair it. φ is measured where there is no candidate yet,
between two pseudo-arms of the stable model (two of its pods, or requests by an even and an odd hash), over a day or more, and
frozen: measuring it on the rollout's own data lets the harm hide in it.

The residual is Mantel and Haenszel's (1959), so that a base rate that moves for both pseudo-arms cancels; ΣU²/ΣV is the
moment estimate of overdispersion (McCullagh & Nelder 1989, section 4.5) over blocks as long as the clumps may last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
BLOCKS_S = (30.0, 120.0, 300.0, 600.0, 1800.0)
"""Lengths of clumps that are looked for; the largest φ among them counts."""
BLOCKS_MIN = 20
"""A mean of fewer squares than this is mostly noise."""
NOISE_TAIL = 1.4
"""By how much noise of a whole arm counts more than its variance. φ repairs exp(X)'s mean for noise whose tail is a normal's; that of
load, neighbours and collectors is longer. With log-normal noise of .4 false rollbacks fall from 7 to 1 of 1,000 (ADR 19)."""


@dataclass(frozen=True, slots=True)
class ArmsLook:
    """Bad and total requests of two arms between two scrapes."""

    bad_a: float
    total_a: float
    bad_b: float
    total_b: float


@dataclass(frozen=True, slots=True)
class Measured:
    """φ and the weight (share of arm a) at which it was measured; for other weights see `at_weight`."""

    phi: float
    weight: float
    blocks: int
    """Blocks of the length that gave the largest φ."""


def measure(looks: Sequence[ArmsLook], look_s: float) -> Measured:
    """φ from the stable arm's history of equally long looks. Raises ValueError when it is too short to say anything."""
    if look_s <= 0:
        raise ValueError(f"a look lasts longer than nothing, got {look_s} s")
    a, n, k, bad_a = _arrays(looks)
    total_a, total = float(a.sum()), float(n.sum())
    if total <= 0 or not 0 < total_a < total:
        raise ValueError("the history holds no requests in one of the two pseudo-arms")
    some, several = n > 0, n > 1
    residuals = np.where(some, bad_a - a * k / np.where(some, n, 1.0), 0.0)
    variances = np.where(several, a * (n - a) * k * (n - k) / np.where(several, n * n * (n - 1.0), 1.0), 0.0)
    best: tuple[float, int] | None = None
    for length in sorted({max(length, look_s) for length in BLOCKS_S}):
        size = max(1, round(length / look_s))
        count = len(looks) // size
        if count < BLOCKS_MIN:
            continue
        squares = float((residuals[:count * size].reshape(count, size).sum(axis=1) ** 2).sum())
        variance = float(variances[:count * size].sum())
        if variance > 0 and (best is None or squares / variance > best[0]):
            best = (squares / variance, count)
    if best is None:
        raise ValueError(
            f"{len(looks)} looks of {look_s:g} s are too few, or hold no bad request; needed: {BLOCKS_MIN} blocks with some"
        )
    return Measured(max(1.0, best[0]), total_a / total, best[1])


def _arrays(looks: Sequence[ArmsLook]) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """Per look: requests of arm a, of both, bad ones of both, bad ones of arm a."""
    table = np.array([(x.bad_a, x.total_a, x.bad_b, x.total_b) for x in looks], dtype=np.float64).reshape(-1, 4)
    return table[:, 1], table[:, 1] + table[:, 3], table[:, 0] + table[:, 2], table[:, 0]


def at_weight(phi: float, weight_measured: float, weight: float, clump: float | None = None) -> float:
    """φ at the candidate's share `weight` (0..1). Never below 1.

    Clumps within one arm (retries, keep-alive) make the same φ at every weight. Noise of a whole arm (a slow pod) grows with what the
    arm gets: its part of φ is proportional to w(1−w), and counts `NOISE_TAIL` times. `clump` is the part of φ that doesn't depend on the
    weight. Without it the cause is unknown and the larger of the two answers is taken: φ itself, or all of φ − 1 as an arm's noise.
    """
    if not 0 < weight_measured < 1:
        raise ValueError(f"the weight at which φ was measured lies between 0 and 1, got {weight_measured}")
    phi = max(phi, 1.0)
    if not 0 < weight < 1:
        return 1.0 if weight <= 0 else phi
    scale = NOISE_TAIL * weight * (1.0 - weight) / (weight_measured * (1.0 - weight_measured))
    if clump is None:
        return 1.0 + (phi - 1.0) * max(scale, 1.0)
    fixed = min(max(clump, 1.0), phi)
    return fixed + (phi - fixed) * scale


def clump_of(large: Measured, small: Measured) -> float:
    """The part of φ that doesn't depend on the weight, from two measurements: at a share near ½, and at one as small as the first step.

    Solves φ(w) = clump + s·w(1−w). A φ that is smaller at the larger share (chance) is all clump.
    """
    v_large, v_small = (x.weight * (1.0 - x.weight) for x in (large, small))
    if v_large <= v_small:
        raise ValueError(f"the first measurement needs the more even split, got shares {large.weight:g} and {small.weight:g}")
    slope = max(large.phi - small.phi, 0.0) / (v_large - v_small)
    return min(max(small.phi - slope * v_small, 1.0), large.phi)
