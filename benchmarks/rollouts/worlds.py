"""What the traffic of a rollout looks like: six worlds in which the candidate is no worse, and the harm that it may do.

Times are those of a rollout in time-lapse: two hours at 5 %, two hours at 25 %, a look every 30 s, 100 requests/s. Everything that
moves the base (a day's wave, an incident, a doubling) hits both arms alike; the incident and the step lie where the weight changes,
which is where rules that sum up rates per arm break. Counts are binomial given the share of their look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LOOK_S = 30.0
RATE = 100.0
REQUESTS = int(RATE * LOOK_S)
BASE = 0.01
"""Share of bad requests."""
P99_MS = 90.0
LATENCY_SD = 0.4
"""Latency is log-normal with this standard deviation of the logarithm."""
BOUNDS_MS = (50.0, 75.0, 100.0, 150.0, 250.0)
"""Histogram bounds around p99, as hafnium_contract.metric_names has them."""
WORLDS = ("constant", "wave", "incident", "step", "retries", "noise")
_PER_WAVE = 480
_ATTEMPTS = 4
_AGAIN = 0.9
_CLUMP = np.array([(1 - _AGAIN) * _AGAIN**i for i in range(_ATTEMPTS - 1)] + [_AGAIN ** (_ATTEMPTS - 1)])
"""Retries: a fault fails the next attempt with 90 %, up to four attempts: chance of 1, 2, 3, 4 failures. φ is 3.7 at weight ½."""
_CLUMP_MEAN = float(_CLUMP @ np.arange(1, _ATTEMPTS + 1))


@dataclass(frozen=True)
class Harm:
    """What is wrong with the candidate. All zero: nothing."""

    errors: float = 0.0
    """Additional share of bad requests."""
    latency: float = 1.0
    """Factor on every latency, and so on p99."""
    slow: float = 0.0
    """Additional share of requests that take long (200 ms), whatever else."""
    score: float = 0.0
    """Shift of the mean score."""
    drift: float = 0.0
    """PSI of one feature between the arms."""
    from_look: int = 0
    live_only: bool = False
    """It doesn't show in shadow."""


@dataclass(frozen=True)
class Arms:
    """Per look (last axis): share of faults and shift of ln(latency), of both arms."""

    bad_stable: Floats
    bad_candidate: Floats
    late_stable: Floats
    late_candidate: Floats


def arms(world: str, rng: np.random.Generator, shape: tuple[int, int], change: int, harm: Harm) -> Arms:
    """Shares for `shape` = (rollouts, looks); the weight changes at look `change`."""
    rollouts, looks = shape
    at = np.arange(looks)
    bad = np.full(shape, BASE)
    late = np.zeros(shape)
    if world == "wave":
        wave = np.sin(2 * math.pi * (at / _PER_WAVE + rng.random((rollouts, 1))))
        bad, late = bad * (1 + 0.6 * wave), 0.15 * wave
    elif world == "incident":
        during = (at >= change - 10) & (at < change + 10)
        bad = np.where(during, 0.10, bad)
        late = np.where(during, 0.5, late)
    elif world == "step":
        bad = np.where(at >= change - 10, 2 * BASE, bad)
        late = np.where(at >= change - 10, 0.2, late)
    arm_bad = [bad, bad]
    arm_late = [late, late]
    if world == "noise":
        arm_bad = [bad * np.exp(_blocks(rng, shape, 10, 0.4)) for _ in range(2)]
        arm_late = [late + _blocks(rng, shape, 4, 0.1) for _ in range(2)]
    on = at >= harm.from_look
    return Arms(
        arm_bad[0], np.minimum(arm_bad[1] + harm.errors * on, 1.0), arm_late[0], arm_late[1] + math.log(harm.latency) * on)


def _blocks(rng: np.random.Generator, shape: tuple[int, int], length: int, sd: float) -> Floats:
    """Normal noise that stays for `length` looks."""
    count = -(-shape[1] // length)
    return np.repeat(rng.normal(0.0, sd, (shape[0], count)), length, axis=1)[:, :shape[1]]


def slower_than(bound_ms: float, late: Floats | float) -> Floats:
    """Share of requests that take longer than the bound when ln(latency) is shifted by `late`."""
    z99 = 2.3263478740408408
    return np.asarray(ndtr(-(z99 + (math.log(bound_ms / P99_MS) - late) / LATENCY_SD)))


def bad_counts(world: str, rng: np.random.Generator, requests: Ints, share: Floats) -> tuple[Ints, Ints]:
    """(bad, total) as the gateway counts them: attempts. In the world of retries one fault makes up to four bad ones."""
    if world != "retries":
        return rng.binomial(requests, share), requests
    faults = rng.binomial(requests, share / _CLUMP_MEAN)
    clumps = rng.multinomial(faults, _CLUMP)
    bad = clumps @ np.arange(1, _ATTEMPTS + 1)
    more = clumps @ np.minimum(np.arange(1, _ATTEMPTS + 1), _ATTEMPTS - 1)
    return bad, requests + more


def slow_counts(rng: np.random.Generator, requests: Ints, late: Floats, slow: float = 0.0) -> Ints:
    """Requests above each of BOUNDS_MS, [..., bound]: nested, as a histogram's are."""
    out: list[Ints] = []
    left, before = requests, np.ones_like(late)
    for bound in BOUNDS_MS:
        share = slower_than(bound, late)
        if bound < 200.0:
            share = share + (1.0 - share) * slow
        left = rng.binomial(left, np.minimum(share / before, 1.0))
        out.append(left)
        before = share
    return np.stack(out, axis=-1)


def p99(requests: Ints, slow: Ints) -> Floats:
    """p99 as histogram_quantile computes it: linear inside the bucket that holds it."""
    bounds = (0.0, *BOUNDS_MS)
    above = np.concatenate([requests[..., None], slow], axis=-1).astype(np.float64)
    wanted = 0.01 * requests
    out = np.full(requests.shape, BOUNDS_MS[-1])
    for i in range(len(BOUNDS_MS) - 1, -1, -1):
        hi, lo = above[..., i + 1], above[..., i]
        inside = (hi <= wanted) & (lo > wanted)
        part = np.divide(lo - wanted, lo - hi, out=np.zeros_like(lo), where=lo > hi)
        out = np.where(inside, bounds[i] + part * (bounds[i + 1] - bounds[i]), out)
    return out
