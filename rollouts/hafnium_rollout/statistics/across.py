"""Scores of two arms that answered *different* requests, as differences that betting.py can judge.

In shadow both models score the same request and the difference is theirs alone. With live traffic each request has one answer, so
each score of the smaller arm is compared with the mean of a block of the larger arm's scores from about the same time. Blocks don't
share a score, so the differences are independent given the look; each lies in [−1, 1]; and its mean is that of candidate − stable as
long as requests are routed by chance. That is all that the bets need: no normal limit, no least number of samples, and a mean that
moves with the hour moves both sides of every difference. What it costs is the spread of the scores themselves: where pairs need
400 requests, this needs thousands.

Paper: Waudby-Smith & Ramdas 2024, section on two-sample tests by betting; blocks instead of single partners use all of the larger arm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def differences(candidate: Sequence[float], stable: Sequence[float]) -> tuple[float, ...]:
    """Candidate − stable, one per score of the smaller arm. Both in order of time and from the same time; every score is used once.

    Where the boundaries of blocks lie depends on the two numbers of scores only, never on a score. Raises ValueError for a score
    outside [0, 1].
    """
    if not candidate or not stable:
        return ()
    c, s = np.asarray(candidate, dtype=np.float64), np.asarray(stable, dtype=np.float64)
    for values in (c, s):
        if not bool(np.all((values >= 0.0) & (values <= 1.0))):
            raise ValueError("a score lies outside [0, 1]")
    count = min(c.size, s.size)
    means = [np.add.reduceat(v, edges := np.arange(count) * v.size // count) / np.diff(np.append(edges, v.size)) for v in (c, s)]
    return tuple((means[0] - means[1]).tolist())
