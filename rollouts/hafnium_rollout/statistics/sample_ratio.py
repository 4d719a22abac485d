"""Sample-ratio mismatch: does the candidate get the share of requests that the weights say?

If not, the arms don't see the same population (a cache, a sticky client, a route that someone added), and a comparison of
them answers another question. The e-process is that of tilt.py on counts of requests: with n requests in a look, of which c
went to the candidate at weight w, exp(c·g − n·ln(1 + w(eᵍ−1))) has expectation 1 for every g, and the mean over g on both
sides keeps it. Alpha is .001: a mismatch is a fault of the installation, and a false one stops a good rollout.

Paper: Lindon & Malek 2022, "Anytime-valid inference for multinomial count data" (they use a Dirichlet mixture; a grid is
quicker for shares as small as 5 %, where a mixture spends its mass elsewhere).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.001
ALPHA_DOUBT = 0.01
"""From here on a difference between the arms may well be one between their populations. One of a hundred true splits comes as far."""
ODDS = tuple(sign * math.log(r) for r in (1.05, 1.1, 1.2, 1.5, 2.0, 4.0) for sign in (-1.0, 1.0))


@dataclass(frozen=True, slots=True)
class RatioState:
    """ln of the e-value per odds ratio, and what was counted since it began."""

    sums: tuple[float, ...] = (0.0,) * len(ODDS)
    """ln of the e-value, one per odds ratio."""
    candidate: float = 0.0
    """Requests that the candidate got."""
    requests: float = 0.0
    """Requests that both arms got."""
    expected: float = 0.0
    """Candidate requests that the weights would have given."""


def add(state: RatioState, candidate: float, requests: float, weight: float, *, phi: float = 1.0) -> RatioState:
    """One look: `candidate` of `requests` went to the candidate while its weight was `weight` (0..1, exclusive)."""
    if not 0 <= candidate <= requests or not 0 < weight < 1 or not phi >= 1:
        raise ValueError(f"not counts of one look: {candidate} of {requests} at weight {weight}, dispersion {phi}")
    sums = tuple(
        s + (candidate * g - requests * math.log1p(weight * math.expm1(g))) / phi
        for s, g in zip(state.sums, ODDS, strict=True)
    )
    return RatioState(sums, state.candidate + candidate, state.requests + requests, state.expected + weight * requests)


def log_e(state: RatioState) -> float:
    """ln of the e-value against "the split is as the weights say"."""
    top = max(state.sums)
    return top + math.log(sum(math.exp(s - top) for s in state.sums) / len(state.sums))


def mismatch(state: RatioState, alpha: float = ALPHA) -> bool:
    """The split differs from the weights, proven at alpha."""
    return log_e(state) >= math.log(1.0 / alpha)


def in_doubt(state: RatioState) -> bool:
    """Nothing is proven about the split, but a comparison that rests on it proves nothing about a model either."""
    return mismatch(state, ALPHA_DOUBT)
