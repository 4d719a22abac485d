"""The end of a turn: history and conditions of the status, so that it explains itself to a person and to `kubectl wait`."""

from __future__ import annotations

from typing import Literal

from hafnium_rollout.actions import Decision
from hafnium_rollout.intake import live_matches
from hafnium_rollout.status import EVENTS_MAX, LOOK_GATES_MAX, Condition, HistoryPoint, RolloutStatus
from hafnium_rollout.turn import Outcome, Turn

REQUEUE_S = 1.0
MESSAGE_CHARACTERS_MAX = 500
"""Of a condition or of one point of the history, of which there are many."""
STATUS_MESSAGE_CHARACTERS_MAX = 2_000
"""Of the one sentence that says where the rollout stands: room for what each of many gates is missing."""
_WORST_FIRST = ("Fail", "Error", "NoData", "Inconclusive")


def finish(before: RolloutStatus, outcome: Outcome) -> Decision:
    """Outcome → Decision, with history and conditions written."""
    turn = outcome.turn
    status = turn.status
    history = _history(before, turn)
    status = status.model_copy(update={
        "history": history, "conditions": _conditions(before, turn), "weight": _weight(status), "gate": worst_gate(status),
        "message": status.message[:STATUS_MESSAGE_CHARACTERS_MAX],
    })
    return Decision(outcome.actions, status, REQUEUE_S if outcome.actions or turn.events else None, turn.events)


def _weight(status: RolloutStatus) -> int:
    return 100 if status.phase == "Promoted" else (status.step.weight_observed or 0) if status.step is not None else 0


def weight_wanted(status: RolloutStatus) -> int:
    """Percent that the candidate should have now: none while it goes back, whatever its step asked for."""
    if status.step is not None and status.rollback is None:
        return status.step.weight_desired
    return 100 if status.phase == "Promoted" else 0


def worst_gate(status: RolloutStatus) -> str:
    """`errors:Inconclusive`: the gate that speaks most against the candidate; `all:Pass`; empty when nothing is under way."""
    if status.step is None or not status.gates:
        return ""
    worst = next((g for v in _WORST_FIRST for g in status.gates if g.verdict == v and g.role != "Advisory"), None)
    return f"{worst.name}:{worst.verdict}" if worst is not None else "all:Pass"


def _history(before: RolloutStatus, turn: Turn) -> tuple[HistoryPoint, ...]:
    status, step = turn.status, turn.status.step
    weight = _weight(status)
    desired = weight_wanted(status)
    shadow = step is not None and step.shadow_observed
    points = [
        HistoryPoint(time=turn.now, event=e.name, weight=weight, weight_desired=desired, shadow=shadow, reason=e.reason,
                     message=e.message[:MESSAGE_CHARACTERS_MAX], phase=status.phase, alert=e.alert)
        for e in turn.events
    ]
    if turn.seen.look is not None and status.gates and step is not None:
        points.insert(0, HistoryPoint.model_validate({  # all gates in one go: an object of each costs twice the time
            "time": turn.now, "event": "Look", "weight": weight, "weight_desired": desired, "shadow": shadow,
            "gates": [{"name": g.name, "verdict": g.verdict, "statistic": g.statistic, "lower": g.lower, "upper": g.upper,
                       "samples": g.samples} for g in status.gates],
        }))
    if not points:
        return before.history
    return _bounded((*before.history, *points), max(100, LOOK_GATES_MAX // max(len(status.gates), 1)))


def _bounded(history: tuple[HistoryPoint, ...], looks_max: int) -> tuple[HistoryPoint, ...]:
    """What happened stays readable however long the rollout takes; looks are thinned, the oldest first."""
    if len(history) <= min(looks_max, EVENTS_MAX):
        return history
    looks = [i for i, p in enumerate(history) if p.event == "Look"]
    gone: set[int] = set(looks[1:len(looks) // 2:2]) if len(looks) > looks_max else set()
    events = [i for i, p in enumerate(history) if p.event != "Look"]
    gone |= set(events[:max(0, len(events) - EVENTS_MAX)])
    return tuple(p for i, p in enumerate(history) if i not in gone) if gone else history


def _conditions(before: RolloutStatus, turn: Turn) -> tuple[Condition, ...]:
    status, step, seen = turn.status, turn.status.step, turn.seen
    old = {c.type: c for c in before.conditions}
    blocking = [g for g in status.gates if g.role != "Advisory"]
    converged = seen.live is not None and status.route is not None and live_matches(seen.live, status.route)
    # Who waits for the model that they ask for must not be told that it is there while another one answers in its place.
    asked, stable = turn.rollout.spec.model.digest, status.stable.digest if status.stable is not None else ""
    refused = status.phase == "Promoted" and asked != stable and asked in status.rejected_digests
    facts: list[tuple[str, bool | None, str, str]] = [
        ("Ready", status.phase == "Promoted" and not refused, "DigestRejected" if refused else status.phase, status.message),
        ("Progressing", status.phase in ("Pending", "Progressing"), status.reason or status.phase, status.message),
        ("GatesPassing", all(g.verdict == "Pass" for g in blocking) if blocking and step else None, "Verdicts",
         ", ".join(f"{g.name} {g.verdict}" for g in blocking)),
        ("DataAvailable", not any(g.verdict in ("NoData", "Error") for g in blocking) if blocking and step else None, "Verdicts",
         "; ".join(f"{g.name}: {g.message}" for g in blocking if g.verdict in ("NoData", "Error")) or "; ".join(seen.problems)),
        ("TrafficConverged", None if seen.live is None else converged, "Gateway",
         "" if converged else "the gateway does not show the wanted route"),
        ("Paused", status.phase == "Paused", status.reason if status.phase == "Paused" else "NotPaused", ""),
        _rolled_back(status),
        ("ExternalChange", status.reason == "ExternalChange", "Route", status.message if status.reason == "ExternalChange" else ""),
    ]
    return tuple(
        _condition(old.get(kind), kind, value, reason, message, turn) for kind, value, reason, message in facts)


def _rolled_back(status: RolloutStatus) -> tuple[str, bool | None, str, str]:
    """Unknown once a rollback is overdue and nobody can tell whether it is done."""
    rollback = status.rollback
    if rollback is None:
        done = status.phase == "RolledBack"
        return "RolledBack", done, status.reason if done else "NotRolledBack", ""
    known = None if rollback.overdue in ("NotShown", "NotCounted") else False
    doubt = f"; {rollback.doubt}" if rollback.overdue else ""
    return "RolledBack", known, rollback.overdue or "RollingBack", f"{rollback.message}{doubt}"


def _condition(
    old: Condition | None, kind: str, value: bool | None, reason: str, message: str, turn: Turn,
) -> Condition:
    text: Literal["True", "False", "Unknown"] = "Unknown" if value is None else "True" if value else "False"
    reason, message, generation = reason or "None", message[:MESSAGE_CHARACTERS_MAX], turn.rollout.metadata.generation
    if old is not None and (old.status, old.reason, old.message, old.observed_generation) == (text, reason, message, generation):
        return old
    changed = old.last_transition_time if old is not None and old.status == text else turn.now
    return Condition(
        type=kind, status=text, observed_generation=generation, reason=reason, message=message, last_transition_time=changed,
    )
