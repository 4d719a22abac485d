"""Conditions that the cluster side adds to those of `decide`: can this rollout be done here, and is the object understood? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from hafnium_rollout.kubernetes.capabilities import Finding
from hafnium_rollout.reporting import MESSAGE_CHARACTERS_MAX
from hafnium_rollout.status import Condition, RolloutStatus

ACCEPTED = "Accepted"
"""The spec is understood, its queries too, and the cluster has what it asks for."""


def accepted(found: Sequence[Finding], generation: int, now: datetime) -> Condition:
    """One condition out of all findings."""
    refusing = [f for f in found if f.refuses]
    status: Literal["True", "False"] = "False" if refusing else "True"
    reason = (refusing or list(found))[0].reason if found else "Accepted"
    message = "; ".join(f.message for f in found) or "the cluster has what the rollout asks for"
    return Condition(
        type=ACCEPTED, status=status, observed_generation=generation, reason=reason, message=message[:MESSAGE_CHARACTERS_MAX],
        last_transition_time=now)


def invalid(message: str, generation: int, now: datetime) -> Condition:
    """The spec can't be understood."""
    return Condition(type=ACCEPTED, status="False", observed_generation=generation, reason="SpecInvalid",
                     message=message[:MESSAGE_CHARACTERS_MAX], last_transition_time=now)


def with_condition(status: RolloutStatus, before: RolloutStatus, wanted: Condition) -> RolloutStatus:
    """The status with the condition in its place; its time is that of its last change."""
    old = next((c for c in before.conditions if c.type == wanted.type), None)
    if old is not None and old.status == wanted.status:
        wanted = wanted.model_copy(update={"last_transition_time": old.last_transition_time})
    return status.model_copy(update={"conditions": (*(c for c in status.conditions if c.type != wanted.type), wanted)})
