"""`hafnium rollout plan`: what to expect of a rollout at the service's request rate, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.statistics import dispersion, plan
from hafnium_rollout.steps import Step


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
    """Median time that the whole step takes: the longest of minDwell, minSamples and the Pass of each gate that it waits for."""
    pauses: bool
    """The step's deadline comes first (or a Pass never): then the rollout pauses, and a person decides."""
    fail_s: float | None
    """Median for the given regression."""
    missed: float
    """Chance that this gate doesn't fail the given regression while the step lasts, up to its deadline."""


def plan_rollout(rollout: ModelRollout, *, rate: float, base: float, regression: float) -> list[GatePlan]:
    """Plans for every counted gate and step below 100 %, where there is somebody to compare with.

    `rate`: client requests per second; `base`: share of requests that are bad today (0..1); `regression`: the additional share
    that must not be missed. Raises ValueError for numbers that are none.
    """
    if rate <= 0 or not 0 <= base < 1 or not 0 < regression < 1 or base + regression > 1:
        raise ValueError("rate must be above 0 requests/s, base in [0, 1) and regression above 0, together at most 1")
    return [row for i, step in _planned_steps(rollout) for row in _step(rollout, i, step, rate, base, regression)]


def expected_s(rollout: ModelRollout, rows: Sequence[GatePlan], *, rate: float) -> float | None:
    """How long an equal candidate takes up to weight 100, without gates that aren't planned. None: it pauses at a deadline before."""
    total = 0.0
    for index, step in _planned_steps(rollout):
        found = next((row for row in rows if row.step == index), None)
        step_s = found.step_s if found is not None else _least_s(step, rate)
        if step_s is None or step_s > step.deadline.total_seconds():
            return None
        total += step_s
    return total


def unplanned(rollout: ModelRollout) -> list[str]:
    """Gates that a step waits for and that no rate foretells: scores, drift and other findings."""
    steps = [step for _, step in _planned_steps(rollout)]
    return [g.name for g in rollout.spec.gates if not g.counted and any(g.waits_in(step) for step in steps)]


def missed_max(rollout: ModelRollout, rows: Sequence[GatePlan]) -> float | None:
    """Chance that a gate doesn't fail the given regression in the whole climb, of the gate for which it is largest. None: no gate that
    counts requests can take a candidate back.

    Evidence for Fail goes on from step to step, so a gate misses at most what its best step alone would miss.
    """
    blocking = [g.name for g in rollout.spec.gates if g.blocking]
    return max((min(r.missed for r in rows if r.gate == name) for name in blocking if any(r.gate == name for r in rows)), default=None)


def _planned_steps(rollout: ModelRollout) -> list[tuple[int, Step]]:
    return [(i, step) for i, step in enumerate(rollout.spec.strategy.steps) if step.live_weight < 100]


def _share(step: Step) -> float:
    """The candidate's share of what both arms answer."""
    return 0.5 if step.shadow else step.live_weight / 100.0


def _candidate_per_s(step: Step, rate: float) -> float:
    return rate if step.shadow else rate * _share(step)


def _least_s(step: Step, rate: float) -> float:
    """Time that the step takes whatever its gates say."""
    return max(step.min_dwell.total_seconds(), step.min_samples / _candidate_per_s(step, rate))


def _step(rollout: ModelRollout, index: int, step: Step, rate: float, base: float, regression: float) -> list[GatePlan]:
    share, per_s, parts = _share(step), _candidate_per_s(step, rate), alpha_parts(rollout.spec)
    counted = [g for g in rollout.spec.gates if g.counted]
    passes = {g.name: [
        plan.requests_to_pass(base, base, share, g.compare.alpha, g.margin, phi=_phi(g, share), quantile=q) for q in (0.5, 0.9)
    ] for g in counted}
    waited = [passes[g.name][0] for g in counted if g.waits_in(step)]
    deadline_s = step.deadline.total_seconds()
    step_s = None if None in waited else max([_least_s(step, rate), *(n / per_s for n in waited if n is not None)])
    seen = per_s * min(deadline_s, step_s if step_s is not None else deadline_s)
    rows: list[GatePlan] = []
    for gate in counted:
        how: dict[str, Any] = {
            "harmless": gate.harmless, "phi": _phi(gate, share), "restarts": gate.compare.dispersion is not None}
        arms = (base + regression, base, share, alphas_of(gate, parts)[0])
        fail, (median, late) = plan.requests_to_fail(*arms, **how), passes[gate.name]
        rows.append(GatePlan(
            step=index, weight=step.live_weight, shadow=step.shadow, gate=gate.name, pass_requests=median,
            pass_s=None if median is None else median / per_s, pass_s_p90=None if late is None else late / per_s, step_s=step_s,
            pauses=step_s is None or step_s > deadline_s, fail_s=None if fail is None else fail / per_s,
            missed=1.0 - plan.chance_of_fail(*arms, seen, **how),
        ))
    return rows


def _phi(gate: Gate, share: float) -> float:
    d = gate.compare.dispersion
    return dispersion.at_weight(d.phi, d.weight, share, d.clump) if d is not None else 1.0
