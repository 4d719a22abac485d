"""Status → what there is to tell: events with a stable id, and alerts that last as long as their cause. Pure.

The id of an event depends on nothing but the event, and the event is in the status that was written before anything was sent. So
whoever sends it, and however often, a receiver that remembers ids sees it once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from hafnium_rollout.notifications.settings import Group
from hafnium_rollout.status import HistoryPoint, ModelSeen, RolloutStatus

SCHEMA = "hafnium.dev/notification/v1"
PHASES = frozenset({"Started", "Paused", "Resumed", "Promoted", "RolledBack", "Retry"})
STEPS = frozenset({"StepEntered", "Advanced", "Promote", "SkipStep", "BlindStepDown"})
EVENT_ALERT_LASTS = timedelta(minutes=15)
"""An event without a state of its own (a step down, a change from outside) is an alert for so long: time to be seen and routed."""


_EVENT_ALERTS = (
    ("BlindStepDown", "HafniumRolloutBlind"), ("ExternalChange", "HafniumRolloutChangedOutside"),
    ("RetrainingProposed", "HafniumRetrainingProposed"), ("RetrainingStarted", "HafniumRetrainingStarted"),
    ("RetrainingFailed", "HafniumRetrainingFailed"), ("RetrainingUnknown", "HafniumRetrainingUnknown"),
)


@dataclass(frozen=True, slots=True)
class Subject:
    """Which rollout."""

    namespace: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Notice:
    """One event to be sent."""

    id: str
    subject: Subject
    point: HistoryPoint
    model: Mapping[str, str]
    run_id: str

    def body(self) -> dict[str, Any]:
        """The JSON document of a webhook."""
        p = self.point
        return {
            "schema": SCHEMA, "id": self.id, "time": p.time.isoformat(), "event": p.event, "reason": p.reason, "message": p.message,
            "alert": p.alert, "phase": p.phase, "weight": p.weight, "weightDesired": p.weight_desired, "shadow": p.shadow,
            "rollout": {"namespace": self.subject.namespace, "name": self.subject.name, "runId": self.run_id},
            "candidate": dict(self.model),
        }


def wanted(point: HistoryPoint, groups: Iterable[Group]) -> bool:
    """Does a receiver of these groups get this event?"""
    if point.event == "Look":
        return False
    return any(
        (g == "alerts" and point.alert) or (g == "phases" and point.event in PHASES) or (g == "steps" and point.event in STEPS)
        for g in groups
    )


def notices(subject: Subject, status: RolloutStatus, groups: Sequence[Group]) -> list[Notice]:
    """All events in the history that a receiver of these groups gets, oldest first."""
    candidate = status.taken_back or status.candidate
    model = {} if candidate is None else {"version": candidate.version, "digest": candidate.digest, "storageUri": candidate.storage_uri}
    began = max((p.time for p in status.history if p.event == "Started"), default=None)
    over = None
    if status.taken_back is not None:  # the run ended when the stable model was asked for; what came after that is about no run
        after = [p.time for p in status.history if p.event == "StableAskedAgain" and (began is None or p.time >= began)]
        over = min(after, default=began)
    seen: Counter[tuple[str, str, str]] = Counter()
    out: list[Notice] = []
    for point in status.history:
        if point.event == "Look":
            continue
        what = (point.time.isoformat(), point.event, point.message)
        number, seen[what] = seen[what], seen[what] + 1
        if not wanted(point, groups):
            continue
        text = "\n".join((subject.key, *what, str(number)))
        # Only events of the present run are about the present candidate; an older one that is still unsent must not name it.
        # Nor is the stable model, when it is asked for again, what an unsent one of the run before is about.
        present = (began is None or point.time >= began) and (over is None or point.time < over) and not _of_another(point, candidate)
        out.append(Notice(hashlib.sha256(text.encode()).hexdigest()[:32], subject, point, model if present else {},
                          status.run_id if present else ""))
    return out


def _of_another(point: HistoryPoint, candidate: ModelSeen | None) -> bool:
    """Whether it is about a model that is refused before it begins. `CandidateRejected` begins with the digest that it is about."""
    if point.event == "CandidateRejected":
        return candidate is None or not point.message.startswith(candidate.digest[:19])
    return point.event == "DigestRejected"


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that needs somebody, for as long as it is so."""

    name: str
    severity: str
    since: datetime
    message: str
    subject: Subject
    digest: str
    """Of the candidate, short; of the stable model where a retraining is for it."""

    @property
    def labels(self) -> dict[str, str]:
        """Its identity: nothing in it changes while it lasts."""
        return {"alertname": self.name, "severity": self.severity, "namespace": self.subject.namespace, "rollout": self.subject.name,
                "model_digest": self.digest}


def _short(model: ModelSeen | None) -> str:
    return "" if model is None else model.digest.removeprefix("sha256:")[:8]


def alerts(subject: Subject, status: RolloutStatus, now: datetime) -> list[Alert]:
    """What is so right now."""
    since = {c.type: c.last_transition_time for c in status.conditions if c.status == "True"}
    digest, stable = _short(status.candidate), _short(status.stable)
    out: list[Alert] = []

    def add(name: str, severity: str, start: datetime | None, message: str, about: str = digest) -> None:
        out.append(Alert(name, severity, start or now, message, subject, about))

    if status.rollback is not None and status.rollback.reject:
        add("HafniumRolloutRollingBack", "critical", status.rollback.requested_at, status.rollback.message)
    if status.rollback is not None and status.rollback.overdue:
        add("HafniumRolloutRollbackUnconfirmed", "critical", status.rollback.requested_at,
            f"{status.rollback.message}; {status.rollback.doubt}")
    if status.phase == "Paused" and status.reason != "PausedBySpec":
        add("HafniumRolloutPaused", "warning", since.get("Paused"), status.message)
    if status.phase == "RolledBack" and status.candidate is not None and status.candidate.digest in status.rejected_digests:
        # The status' last word may be about another model by now.
        told = [p.message for p in status.history if p.event == "RolledBack"]
        add("HafniumRolloutRolledBack", "warning", since.get("RolledBack"), told[-1] if told else status.message)
    if status.phase == "Pending" and status.reason == "ModelUnknown":
        called = [p.time for p in status.history if p.event == "ModelUnknown" and (not status.started_at or p.time >= status.started_at)]
        if called:  # before that it may just be its turn to be asked
            add("HafniumRolloutModelUnknown", "warning", called[-1], status.message)
    if status.sample_ratio_message:
        started = [p.time for p in status.history if p.event == "SampleRatioMismatch"]
        add("HafniumRolloutSampleRatioMismatch", "warning", started[-1] if started else None, status.sample_ratio_message)
    for event, name in _EVENT_ALERTS:
        recent = [p for p in status.history if p.event == event and timedelta(0) <= now - p.time <= EVENT_ALERT_LASTS]
        if recent:
            add(name, "warning", recent[0].time, recent[-1].message, stable if event.startswith("Retraining") else digest)
    return out
