"""One turn of deciding: the arguments that every rule takes, and the few ways in which a rule may change the status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from hafnium_contract.durations import format_duration
from hafnium_rollout.actions import Action, Event
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation, RouteSeen, ServiceSeen
from hafnium_rollout.status import ModelSeen, PodRestarts, RollbackStatus, RolloutStatus, RouteWanted, StepStatus
from hafnium_rollout.steps import Step

ROUTES_BEFORE_MAX = 8
"""The oldest is kept in any case: for want of pods it may be the one that still stands."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What is wanted, what was, what is seen, and when. `events` gathers what this turn has to tell."""

    rollout: ModelRollout
    status: RolloutStatus
    seen: Observation
    now: datetime
    events: tuple[Event, ...] = ()

    def update(self, **changes: Any) -> Turn:
        """The same turn with fields of the status replaced."""
        return replace(self, status=self.status.model_copy(update=changes))

    def say(self, name: str, reason: str, message: str, *, alert: bool = False) -> Turn:
        """Something happened: it becomes an event, and the status' reason and message."""
        turn = replace(self, events=(*self.events, Event(name, reason, message, alert)))
        return turn.update(reason=reason, message=message)

    @property
    def step_spec(self) -> Step | None:
        """What the current step asks for: the step of the spec that gives as much as this one does.

        Steps may be edited under way. An index would then name another step: one that waits for less, or for other gates. Where no step
        gives as much any more, it is the next lower one with live traffic, else the lowest: never a shadow step for a share of requests.
        """
        if self.status.step is None:
            return None
        steps, weight = self.rollout.spec.strategy.steps, reached(self.status.step)
        with_weight = [s for s in steps if s.weight is not None]
        lower = [s for s in with_weight if s.live_weight < weight]
        return next((s for s in steps if s.live_weight == weight), lower[-1] if lower else with_weight[0])

    def step_above(self, weight: int) -> int:
        """Index of the lowest step of the spec that gives more than `weight`; the last one, if none does."""
        steps = self.rollout.spec.strategy.steps
        return next((i for i, s in enumerate(steps) if s.live_weight > weight), len(steps) - 1)

    def step_at_most(self, weight: int) -> int | None:
        """Index of the highest step of the spec that gives no more than `weight`."""
        found = [i for i, s in enumerate(self.rollout.spec.strategy.steps) if s.live_weight <= weight]
        return found[-1] if found else None

    def service(self, model: ModelSeen | None) -> ServiceSeen | None:
        """The running service of a model, if the list could be read and it is in it."""
        if model is None or self.seen.services is None:
            return None
        return self.seen.services.get(model.service)

    @property
    def candidate_ready(self) -> bool:
        """It serves, and it serves the wanted model."""
        found = self.service(self.status.candidate)
        return found is not None and found.ready and self.status.candidate is not None and (
            found.digest == self.status.candidate.digest and not found.wrong_model)

    @property
    def missing_approvals(self) -> str:
        """What is missing, in a sentence with the reason; empty when nothing is."""
        missing = [s for s in self.rollout.spec.approvals.required if s not in self.seen.approvals]
        if not missing:
            return ""
        refused = f" (not counted: {'; '.join(self.seen.approvals_refused)})" if self.seen.approvals_refused else ""
        return f"approvals are missing: {', '.join(missing)}{refused}"


def reached(step: StepStatus) -> int:
    """Percent that the climb has come to, also while that is withheld (no room, blind at the first weight); 0 is shadow."""
    return step.weight_desired if step.weight_entered is None else step.weight_entered


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rule's answer: the turn after it, and what to do."""

    turn: Turn
    actions: tuple[Action, ...] = ()


def hold(turn: Turn, reason: str, message: str) -> Outcome:
    """Nothing moves, and the status says why."""
    return Outcome(turn.update(reason=reason, message=message))


def normal(route: RouteSeen | RouteWanted) -> RouteWanted:
    """A route as what it does: a candidate without traffic or copies is no candidate."""
    if route.candidate is None or (route.weight == 0 and not route.shadow) or route.candidate == route.stable:
        return RouteWanted(stable=route.stable)
    return RouteWanted(stable=route.stable, candidate=route.candidate, weight=route.weight, shadow=route.shadow)


def want_route(turn: Turn, route: RouteWanted) -> Turn:
    """Sets the intent. What may stand there until it is seen is remembered, so that our own cut-off write is no stranger's."""
    status = turn.status
    if status.route is not None and normal(status.route) == normal(route):
        return turn
    before = () if status.route_confirmed else status.route_before
    possible = (*before, status.route) if status.route is not None else before
    kept = (*possible[:1], *possible[1:][-(ROUTES_BEFORE_MAX - 1):])
    return turn.update(route=route, route_confirmed=False, route_before=kept)


def begin_step(turn: Turn, index: int) -> StepStatus:
    """A fresh step status; what was observed stays."""
    spec = turn.rollout.spec.strategy.steps[index]
    old = turn.status.step
    found = turn.service(turn.status.candidate)
    return StepStatus(
        index=index, entered_at=turn.now, weight_desired=spec.live_weight, weight_entered=spec.live_weight,
        weight_observed=old.weight_observed if old else None, shadow_observed=old.shadow_observed if old else False,
        unready_since=old.unready_since if old else None,  # a step down makes a dead candidate no younger
        restarts_before=found.restarts if found else None, pod_restarts_before=as_listed(found.pod_restarts) if found else (),
    )


def withheld(step: StepStatus) -> StepStatus:
    """The step without its live traffic. What it had is remembered: Retry gives no more than that."""
    return step.model_copy(update={"weight_desired": 0, "weight_entered": reached(step), "weight_effective_since": None})


ROOM_SEEN_EVERY = timedelta(seconds=10)


def lacking_room(turn: Turn) -> Turn:
    """Remembers that there is no room for the candidate now; now and then, so that not every turn writes a status."""
    found, known = turn.service(turn.status.candidate), turn.status.room_lacked_at
    if found is None or not found.no_room or (known is not None and turn.now - known < ROOM_SEEN_EVERY):
        return turn
    return turn.update(room_lacked_at=turn.now)


def own_time_since(turn: Turn, start: datetime) -> datetime:
    """From when the candidate's own time to get ready counts: it can't load a model while it has no node."""
    lacked = turn.status.room_lacked_at
    return start if lacked is None else max(start, lacked)


def as_listed(restarts: Mapping[str, int]) -> tuple[PodRestarts, ...]:
    return tuple(PodRestarts(pod=pod, restarts=n) for pod, n in sorted(restarts.items()))


def restarts_in_step(step: StepStatus, found: ServiceSeen) -> int:
    """Of the pod that was restarted most often since the step began: a node that goes down restarts each of its pods once."""
    if found.pod_restarts or step.pod_restarts_before:
        before = {p.pod: p.restarts for p in step.pod_restarts_before}
        return max((n - before.get(pod, 0) for pod, n in found.pod_restarts.items()), default=0)
    return found.restarts - (step.restarts_before or 0)


def start_rollback(turn: Turn, reason: str, message: str, *, reject: bool) -> Turn:
    """Intent of a rollback. The phase changes when it has been observed, not now."""
    rollback = RollbackStatus(reason=reason, message=message, requested_at=turn.now, reject=reject)
    turn = turn.say("Rollback", reason, message, alert=reject).update(rollback=rollback)
    return turn if turn.status.stable is None else want_route(turn, RouteWanted(stable=turn.status.stable.service))


def since(turn: Turn, then: datetime) -> str:
    """Age in whole seconds, as people write it."""
    return format_duration(timedelta(seconds=max(0, round((turn.now - then).total_seconds()))))
