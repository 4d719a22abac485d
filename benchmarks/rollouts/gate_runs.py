"""One gate followed through production's `judge` until it says what is waited for: for counts that need a finer look than 30 s."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta

import numpy as np
from climb import START, score_differences

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.observation import Counts, GateLook, Look, Series
from hafnium_rollout.statistics import across
from hafnium_rollout.status import GateStatus

Seen = tuple[GateLook, int]


def until(gate: Gate, wanted: str, draw: Callable[[], Seen], *, weight: int, shadow: bool, alpha_fail: float, units_max: int) -> float:
    """Candidate requests (or pairs) until the verdict `wanted`; inf when it hasn't come within `units_max`."""
    status = GateStatus(name=gate.name, role=gate.role)
    now, units = START, 0
    while units < units_max:
        started, now = now, now + timedelta(seconds=1)
        seen, count = draw()
        units += count
        status = judge(gate, status, Look(started, now, {gate.name: seen}), (), "", _context(now, weight, shadow, alpha_fail))
        if status.verdict == wanted:
            return float(units)
    return float("inf")


def _context(now: datetime, weight: int, shadow: bool, alpha_fail: float) -> GateContext:
    return GateContext(
        now=now, shadow=shadow, weight=weight, digest="", step_since=START, counts_for_pass=True, counts_for_fail=True,
        run_since=START, alpha_fail=alpha_fail, alpha_limit=alpha_fail, fresh=timedelta(minutes=1),
    )


def counted(rng: np.random.Generator, share: float, requests: int, bad_candidate: float, bad_stable: float) -> Callable[[], Seen]:
    """Looks of about `requests` candidate requests, which are `share` of all."""
    total = round(requests / share)

    def draw() -> Seen:
        nc = int(rng.binomial(total, share))
        ns = total - nc
        candidate = Counts(int(rng.binomial(nc, bad_candidate)), nc)
        return GateLook((Series(Counts(int(rng.binomial(ns, bad_stable)), ns), candidate),)), nc

    return draw


def pairs(rng: np.random.Generator, shift: float, count: int = 10) -> Callable[[], Seen]:
    """Looks of `count` pairs of scores whose mean differs by `shift`."""

    def draw() -> Seen:
        series = (Series(Counts(0, count), Counts(0, count)),)
        return GateLook(series, tuple(score_differences(rng, count, shift).tolist())), count

    return draw


def arms(rng: np.random.Generator, shift: float, requests: int = 3000, share: float = 0.05) -> Callable[[], Seen]:
    """Looks of scores across arms: one in five is high, and how many moves by half over an hour, in both arms alike."""
    look = 0

    def draw() -> Seen:
        nonlocal look
        high = 0.2 * (1 + 0.5 * math.sin(2 * math.pi * look / 120))
        look += 1
        nc = int(rng.binomial(requests, share))
        candidate, stable = (np.where(rng.random(n) < p, 0.95, 0.02) for n, p in ((nc, high + shift / 0.93), (requests - nc, high)))
        found = across.differences(candidate.tolist(), stable.tolist())
        return GateLook((Series(Counts(0, requests - nc), Counts(0, nc)),), found), nc

    return draw
