"""Is the candidate slower than production? Measured side by side, because a shared machine is never the same twice.

Both models score one row in turn, in short rounds (A B, B A, A B, …): whatever else the machine does hits both alike. Each round
gives one ratio of medians. The candidate is slower only when the lower end of the ratios' confidence interval says so: a busy
neighbour can make the answer wide, not wrong.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from hafnium_contract.encoding import Matrix
from hafnium_training.export import Scorer

ROUNDS = 21
CALLS = 100
WARM_UP = 100


@dataclass(frozen=True)
class Latency:
    """Milliseconds per single row (median over rounds), and the ratio candidate / production with its 95 % interval."""

    candidate_ms: float
    production_ms: float
    ratio: float
    lower: float
    upper: float


def measure_latency(candidate: tuple[Scorer, Matrix], production: tuple[Scorer, Matrix]) -> Latency:
    """Each side: a scorer and rows [≥ 1, n] of its own contract, scored one at a time."""
    for side in (candidate, production):
        _median_ms(*side, WARM_UP)
    ours: list[float] = []
    theirs: list[float] = []
    for i in range(ROUNDS):
        sides = [(ours, candidate), (theirs, production)]
        for found, side in sides if i % 2 == 0 else reversed(sides):
            found.append(_median_ms(*side, CALLS))
    ratios = np.sort(np.array(ours) / np.array(theirs))
    # distribution-free interval of the median: order statistics 6 and 16 of 21 cover 97 %
    return Latency(
        float(np.median(ours)), float(np.median(theirs)), float(np.median(ratios)), float(ratios[5]), float(ratios[-6]),
    )


def _median_ms(scorer: Scorer, X: Matrix, calls: int) -> float:
    taken: list[float] = []
    for i in range(calls):
        row = X[i % len(X)][None, :]
        begin = time.perf_counter_ns()
        scorer(row)
        taken.append((time.perf_counter_ns() - begin) / 1e6)
    return float(np.median(taken))
