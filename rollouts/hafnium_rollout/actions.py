"""What a decision asks to be done. Each action is idempotent and complete in itself: doing it twice, or after a crash, is safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hafnium_rollout.status import ModelSeen, RolloutStatus


@dataclass(frozen=True, slots=True)
class EnsureCandidate:
    """Make the candidate's InferenceService from the template. It gets no traffic by this."""

    model: ModelSeen
    template: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SetShadow:
    """All answers come from stable; the candidate gets copies."""

    stable: str
    candidate: str


@dataclass(frozen=True, slots=True)
class SetWeight:
    """`weight` percent of answers come from the candidate, 100 − weight from stable."""

    stable: str
    candidate: str
    weight: int


@dataclass(frozen=True, slots=True)
class Promote:
    """The service becomes the only one of the route."""

    service: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """The stable service becomes the only one of the route."""

    stable: str
    candidate: str
    reason: str


@dataclass(frozen=True, slots=True)
class RetireService:
    """Remove a service that this rollout made and that no route names. Its bundle stays."""

    service: str


@dataclass(frozen=True, slots=True)
class LowerPods:
    """The stable service's `minReplicas` becomes what its template says: it was raised for the climb. Nothing is raised by it."""

    service: str
    least: Mapping[str, int]
    """Of each component that has more than that."""


Action = EnsureCandidate | SetShadow | SetWeight | Promote | Rollback | RetireService | LowerPods


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, for history, log and people. `alert`: someone should look."""

    name: str
    reason: str
    message: str
    alert: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Write `status` first, then do `actions` in order. After a crash between any two, deciding again converges."""

    actions: tuple[Action, ...]
    status: RolloutStatus
    requeue_s: float | None
    """Look again this soon; None: at the next regular look."""
    events: tuple[Event, ...] = field(default=())
