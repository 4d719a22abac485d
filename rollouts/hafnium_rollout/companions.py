"""What goes along with every turn and decides nothing: the record, notifications, the retraining trigger.

Both loops call `decided` and then `turned` when the status is written and the actions are done or have failed: nothing here may stand
before an action. Whatever goes wrong here is told, once, and never stops the guard over a candidate. Only NotLeading gets through: what
several processes share (the record's files, attempts at retraining, receivers) is the leader's alone.

Nothing here waits for a disk or a receiver: the record is written by a thread of its own (record_queue.py), receivers have one each, and
attempts at retraining are read, made and followed by another. What became of them is told to receivers with the next turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hafnium_contract.errors import HafniumError
from hafnium_rollout.actions import Decision
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.newest_only import NewestOnly
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.notifications.notifier import Notifier
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import RecordLimits
from hafnium_rollout.record_queue import RecordQueue
from hafnium_rollout.retraining.trigger import RetrainingTrigger
from hafnium_rollout.status import HistoryPoint, RolloutStatus

Log = Callable[[dict[str, Any]], None]


def _leads() -> None:
    """On one machine: who holds the folder's lock leads for as long as it runs."""


@dataclass
class Companions:
    """Any of them may be None. Safe between threads as long as one rollout is turned by one of them."""

    log: Log
    record_folder: Callable[[Subject], Path] | None = None
    record_limits: RecordLimits = field(default_factory=RecordLimits)
    notifier: Notifier | None = None
    retraining: RetrainingTrigger | None = None
    fence: Callable[[], None] = _leads
    """Raises NotLeading when another process may be doing the same by now."""
    _known: dict[Subject, object] = field(default_factory=dict[Subject, object])
    """Whom anything was told about; each with what tells it from a later rollout of the same name."""
    _record: RecordQueue | None = None
    _attempts: dict[Subject, tuple[HistoryPoint, ...]] = field(default_factory=dict[Subject, tuple[HistoryPoint, ...]])
    """What was tried about retraining, as last seen."""
    _said: dict[tuple[Subject, str], str] = field(default_factory=dict[tuple[Subject, str], str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.record_folder is not None:
            self._record = RecordQueue(self.record_folder, self.record_limits, lambda: self.fence(), self._say)
        self._retrainer = NewestOnly[Subject]("retraining", self._retraining_failed)

    def start(self) -> None:
        """From now on nothing waits for a volume. Without it everything is done by whoever decided."""
        if self._record is not None:
            self._record.start()
        if self.retraining is not None:
            self._retrainer.start()
        if self.notifier is not None:
            self.notifier.start()

    def lead(self) -> None:
        """From now on this process turns: what another one wrote and sent meanwhile is read anew."""
        if self._record is not None:
            self._record.lead()
        self._retrainer.forget()
        if self.notifier is not None:
            self.notifier.lead()

    def rest(self) -> None:
        """Another process leads, or nobody: what this one knows is of yesterday, and it repeats none of it."""
        if self.notifier is not None:
            self.notifier.rest()

    def stop(self) -> None:
        """A clean end, while this process still leads: what waits is written and sent, for some seconds."""
        if self._record is not None:
            self._record.stop(datetime.now(UTC))
        self._retrainer.stop()
        if self.notifier is not None:
            self.notifier.stop()

    def decided(
        self, rollout: ModelRollout, before: RolloutStatus, seen: Observation, now: datetime, decision: Decision,
    ) -> None:
        """What the turn rests on is recorded, whatever became of its actions. Raises NotLeading."""
        subject = Subject(rollout.metadata.namespace, rollout.name)
        if self._record is None:
            return
        self.fence()
        self._record.put(subject, rollout, before, seen, now, decision)

    def record_lost(self) -> Mapping[Subject, int]:
        """Turns of each rollout that could not be recorded."""
        return self._record.lost() if self._record is not None else {}

    def turned(self, rollout: ModelRollout, status: RolloutStatus, seen: Observation, now: datetime) -> None:
        """Others are told, and a training may be due. Raises NotLeading."""
        subject = Subject(rollout.metadata.namespace, rollout.name)
        self.fence()
        with self._lock:
            life = self._known.setdefault(subject, object())
        trigger = self.retraining
        if trigger is not None:
            def follow() -> None:
                self._try(subject, "RetrainingFailed", "", now, lambda: attempt(trigger))

            def attempt(trigger: RetrainingTrigger) -> None:
                self.fence()  # again: a thread may come to it late
                found = trigger.turn(rollout, status, seen.evidence, now)
                with self._lock:
                    if self._known.get(subject) is life:  # it may be gone by now
                        self._attempts[subject] = found

            if self._retrainer.started:
                self._retrainer.put(subject, follow)
            else:
                follow()
        with self._lock:
            points = self._attempts.get(subject, ())
        if self.notifier is not None:
            if points:
                history = tuple(sorted((*status.history, *points), key=lambda p: p.time))
                status = status.model_copy(update={"history": history})
            self.notifier.offer(subject, status)

    def gone(self, subject: Subject) -> None:
        """The rollout was deleted. Its record stays: it is evidence."""
        if self._record is not None:
            self._record.gone(subject)
        with self._lock:
            self._known.pop(subject, None)
            self._attempts.pop(subject, None)
            self._said = {k: v for k, v in self._said.items() if k[0] != subject}
        if self.notifier is not None:
            self.notifier.gone(subject)

    def keep(self, alive: set[Subject]) -> None:
        """Those that are not among these are gone."""
        recorded = self._record.subjects if self._record is not None else set[Subject]()
        with self._lock:
            gone = (recorded | set(self._known)) - alive
        for subject in gone:
            self.gone(subject)

    def _say(self, level: str, subject: Subject | None, event: str, message: str, now: datetime) -> None:
        about = {"rollout": subject.name} if subject is not None else {}
        self.log({"time": now, "level": level, **about, "event": event, "message": message})

    def _retraining_failed(self, subject: Subject, error: Exception) -> None:
        if isinstance(error, NotLeading):
            return  # the leader's thing by now
        self._say("error", subject, "RetrainingFailed", f"{type(error).__name__}: {error}", datetime.now(UTC))

    def _try(self, subject: Subject, event: str, words: str, now: datetime, do: Callable[[], object]) -> None:
        key = (subject, event)
        try:
            do()
        except NotLeading:
            raise
        except (HafniumError, OSError, ValueError) as e:
            with self._lock:
                known = self._said.get(key)
                if subject in self._known:  # it may be gone by now
                    self._said[key] = str(e)
            if known != str(e):
                self.log({"time": now, "level": "error", "rollout": subject.name, "event": event, "message": f"{words}{e}"})
            return
        with self._lock:
            self._said.pop(key, None)
