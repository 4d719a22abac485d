"""Times in a status that are still to come: whoever wrote them had a wrong clock. Pure.

A node's clock that was an hour ahead and is set right leaves such times behind. Until they are reached no look would count for the step
(so nothing could fail), no gate be blind and no rollback be done. When it really was isn't known, so each of them is now: waits begin anew,
and what was counted stays. Two minutes are borne, since one leader's clock follows another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel

from hafnium_rollout.gates import CLOCK_SKEW_MAX
from hafnium_rollout.status import RolloutStatus

_Part = TypeVar("_Part", bound=BaseModel)
_STEP = ("entered_at", "weight_effective_since", "unready_since")
_ROLLBACK = ("requested_at", "shown_since", "counted_at")
_UNREADY = ("since", "seen_at")
_GATE = ("last_seen_at", "last_data_at")


def set_right(status: RolloutStatus, now: datetime) -> RolloutStatus:
    """The status without times from the future; the same object when there are none."""
    update: dict[str, object] = {
        name: changed for name, part, fields in (
            ("step", status.step, _STEP), ("rollback", status.rollback, _ROLLBACK), ("unready", status.unready, _UNREADY))
        if part is not None and (changed := _now_at_most(part, fields, now)) is not part
    }
    states = [_now_at_most(g.state, _GATE, now) for g in status.gates]
    if any(s is not g.state for s, g in zip(states, status.gates, strict=True)):
        update["gates"] = tuple(g.model_copy(update={"state": s}) for s, g in zip(states, status.gates, strict=True))
    return status.model_copy(update=update) if update else status


def _now_at_most(part: _Part, fields: Sequence[str], now: datetime) -> _Part:
    late = [f for f in fields if (time := getattr(part, f)) is not None and time > now + CLOCK_SKEW_MAX]
    return part.model_copy(update=dict.fromkeys(late, now)) if late else part
