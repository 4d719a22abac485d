"""One turn of deciding: the arguments that every rule takes, and the few ways in which a rule may change the status."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from hafnium_contract.durations import format_duration
from hafnium_rollout.actions import Action, Event
from hafnium_rollout.objects import ModelRollout, Step
from hafnium_rollout.observation import Observation, RouteSeen, ServiceSeen
from hafnium_rollout.status import ModelSeen, RollbackStatus, RolloutStatus, RouteWanted, StepStatus

ROUTES_BEFORE_MAX = 8


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
        """The spec of the current step. A spec that lost steps since is read at its last one."""
        steps = self.rollout.spec.strategy.steps
        return None if self.status.step is None else steps[min(self.status.step.index, len(steps) - 1)]

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
            found.digest == self.status.candidate.digest)

    @property
    def missing_approvals(self) -> str:
        """What is missing, in a sentence with the reason; empty when nothing is."""
        missing = [s for s in self.rollout.spec.approvals.required if s not in self.seen.approvals]
        if not missing:
            return ""
        refused = f" (not counted: {'; '.join(self.seen.approvals_refused)})" if self.seen.approvals_refused else ""
        return f"approvals are missing: {', '.join(missing)}{refused}"


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
    possible = (status.route,) if status.route_confirmed else (*status.route_before, *((status.route,) if status.route else ()))
    return turn.update(route=route, route_confirmed=False, route_before=tuple(r for r in possible if r)[-ROUTES_BEFORE_MAX:])


def begin_step(turn: Turn, index: int) -> StepStatus:
    """A fresh step status; what was observed stays."""
    spec = turn.rollout.spec.strategy.steps[index]
    old = turn.status.step
    found = turn.service(turn.status.candidate)
    return StepStatus(
        index=index, entered_at=turn.now, weight_desired=spec.live_weight,
        weight_observed=old.weight_observed if old else None, shadow_observed=old.shadow_observed if old else False,
        restarts_before=found.restarts if found else None,
    )


def start_rollback(turn: Turn, reason: str, message: str, *, reject: bool) -> Turn:
    """Intent of a rollback. The phase changes when it has been observed, not now."""
    rollback = RollbackStatus(reason=reason, message=message, requested_at=turn.now, reject=reject)
    turn = turn.say("Rollback", reason, message, alert=reject).update(rollback=rollback)
    return turn if turn.status.stable is None else want_route(turn, RouteWanted(stable=turn.status.stable.service))


def since(turn: Turn, then: datetime) -> str:
    """Age in whole seconds, as people write it."""
    return format_duration(timedelta(seconds=max(0, round((turn.now - then).total_seconds()))))
