"""Conditions that the cluster side adds to those of `decide`: can this rollout be done here, and is the object understood? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from hafnium_rollout.kubernetes.capabilities import Finding
from hafnium_rollout.observation import Observation
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


VERIFIED = "ModelVerified"
"""The candidate's pods and spec say that they are the model which the rollout means."""


def verified(status: RolloutStatus, before: RolloutStatus, seen: Observation, generation: int, now: datetime) -> Condition | None:
    """What is known about the model that the candidate serves. After the end it stays as it was last said; None before the first."""
    candidate = status.candidate
    found = (seen.services or {}).get(candidate.service) if candidate is not None else None
    under_way = status.step is not None or status.rollback is not None or (status.phase == "Pending" and bool(status.run_id))
    if candidate is None or found is None or not under_way:
        return next((c for c in before.conditions if c.type == VERIFIED), None)
    value: Literal["True", "False", "Unknown"]
    if found.wrong_model:
        value, reason, message = "False", "WrongModel", f"{candidate.service}: {found.wrong_model}"
    elif found.serves:
        value, reason, message = "True", "PodsSaySo", f"pods of {candidate.service} say that they serve {candidate.digest[:19]}"
    elif found.unasked:
        value, reason, message = "Unknown", "NotAsked", f"{candidate.service} gains no weight until it is known: {found.unasked}"
    else:
        value, reason = "Unknown", "NotSaid"
        message = f"no pod of {candidate.service} says which model it serves (model_info in Prometheus)"
    return Condition(type=VERIFIED, status=value, observed_generation=generation, reason=reason,
                     message=message[:MESSAGE_CHARACTERS_MAX], last_transition_time=now)


def with_condition(status: RolloutStatus, before: RolloutStatus, wanted: Condition) -> RolloutStatus:
    """The status with the condition in its place; its time is that of its last change."""
    old = next((c for c in before.conditions if c.type == wanted.type), None)
    if old is not None and old.status == wanted.status:
        wanted = wanted.model_copy(update={"last_transition_time": old.last_transition_time})
    return status.model_copy(update={"conditions": (*(c for c in status.conditions if c.type != wanted.type), wanted)})
