"""`hafnium rollout plan`: what to expect of a rollout at the service's request rate, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.statistics import dispersion, plan
from hafnium_rollout.steps import Step

_AT_100 = 0.99
"""A step at weight 100 has nobody to compare with; nothing is planned for it."""


@dataclass(frozen=True, slots=True)
class GatePlan:
    """One counted gate in one step. Times in seconds, from the moment that the weight is seen; None: it doesn't come."""

    step: int
    weight: int
    shadow: bool
    gate: str
    pass_requests: float | None
    pass_s: float | None
    """Median for an equal candidate."""
    pass_s_p90: float | None
    step_s: float | None
    """The longest of minDwell, minSamples and Pass (median)."""
    fail_s: float | None
    """Median for the given regression."""
    missed: float
    """Chance that the given regression isn't failed within the step's expected time."""


def plan_rollout(rollout: ModelRollout, *, rate: float, base: float, regression: float) -> list[GatePlan]:
    """Plans for every counted gate and step.

    `rate`: client requests per second; `base`: share of requests that are bad today (0..1); `regression`: the additional share
    that must not be missed. Raises ValueError for numbers that are none.
    """
    if rate <= 0 or not 0 <= base < 1 or not 0 < regression < 1 or base + regression > 1:
        raise ValueError("rate must be above 0 requests/s, base in [0, 1) and regression above 0, together at most 1")
    parts = alpha_parts(rollout.spec)
    return [
        _gate(i, step, gate, alphas_of(gate, parts)[0], rate, base, regression)
        for i, step in enumerate(rollout.spec.strategy.steps) if step.shadow or step.live_weight < 100
        for gate in rollout.spec.gates if gate.counted
    ]


def expected_s(rollout: ModelRollout, rows: Sequence[GatePlan], *, rate: float) -> float | None:
    """How long an equal candidate takes up to weight 100: in each step its slowest counted gate. None: one of those never passes."""
    total = 0.0
    for index, step in enumerate(rollout.spec.strategy.steps):
        if step.live_weight == 100:
            continue
        waited = {g.name for g in rollout.spec.gates if g.waits_in(step)}
        slowest = _least_s(step, rate)
        for row in rows:
            if row.step != index or row.gate not in waited:
                continue
            if row.step_s is None:
                return None
            slowest = max(slowest, row.step_s)
        total += slowest
    return total


def _share(step: Step) -> float:
    """The candidate's share of what both arms answer."""
    return 0.5 if step.shadow else min(step.live_weight / 100.0, _AT_100)


def _candidate_per_s(step: Step, rate: float) -> float:
    return rate if step.shadow else rate * _share(step)


def _least_s(step: Step, rate: float) -> float:
    """Time that the step takes whatever its gates say."""
    return max(step.min_dwell.total_seconds(), step.min_samples / _candidate_per_s(step, rate))


def _gate(index: int, step: Step, gate: Gate, alpha_fail: float, rate: float, base: float, regression: float) -> GatePlan:
    weight, per_s = _share(step), _candidate_per_s(step, rate)
    d = gate.compare.dispersion
    phi = dispersion.at_weight(d.phi, d.weight, weight, d.clump) if d is not None else 1.0
    alpha = gate.compare.alpha
    median, late = (
        plan.requests_to_pass(base, base, weight, alpha, gate.margin, phi=phi, quantile=q) for q in (0.5, 0.9)
    )
    fail = plan.requests_to_fail(base + regression, base, weight, alpha_fail, harmless=gate.harmless, phi=phi, restarts=d is not None)
    step_s = None if median is None else max(_least_s(step, rate), median / per_s)
    seen = (step_s if step_s is not None else step.deadline.total_seconds()) * per_s
    chance = plan.chance_of_fail(base + regression, base, weight, alpha_fail, seen, harmless=gate.harmless, phi=phi,
                                 restarts=d is not None)
    return GatePlan(
        step=index, weight=step.live_weight, shadow=step.shadow, gate=gate.name, pass_requests=median,
        pass_s=None if median is None else median / per_s, pass_s_p90=None if late is None else late / per_s, step_s=step_s,
        fail_s=None if fail is None else fail / per_s, missed=1.0 - chance,
    )
