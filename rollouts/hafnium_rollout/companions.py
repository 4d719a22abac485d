"""What goes along with every turn and decides nothing: the record, notifications, the retraining trigger.

Both loops call `decided` after the status was written, and `turned` after the actions were done or have failed. Whatever goes
wrong here is told, once, and never stops the guard over a candidate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hafnium_contract.errors import HafniumError
from hafnium_rollout.actions import Decision
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.notifications.notifier import Notifier
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import RecordLimits, RecordWriter
from hafnium_rollout.retraining.trigger import RetrainingTrigger
from hafnium_rollout.status import HistoryPoint, RolloutStatus

Log = Callable[[dict[str, Any]], None]


@dataclass
class Companions:
    """Any of them may be None. Safe between threads as long as one rollout is turned by one of them."""

    log: Log
    record_folder: Callable[[Subject], Path] | None = None
    record_limits: RecordLimits = field(default_factory=RecordLimits)
    notifier: Notifier | None = None
    retraining: RetrainingTrigger | None = None
    _writers: dict[Subject, RecordWriter] = field(default_factory=dict[Subject, RecordWriter])
    _said: dict[tuple[Subject, str], str] = field(default_factory=dict[tuple[Subject, str], str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        if self.notifier is not None:
            self.notifier.start()

    def lead(self) -> None:
        """From now on this process turns: what another one wrote and sent meanwhile is read anew."""
        with self._lock:
            self._writers.clear()
        if self.notifier is not None:
            self.notifier.lead()

    def stop(self) -> None:
        if self.notifier is not None:
            self.notifier.stop()

    def decided(
        self, rollout: ModelRollout, before: RolloutStatus, seen: Observation, now: datetime, decision: Decision,
    ) -> None:
        """Right after the status was written: what it rests on is recorded, whatever becomes of the actions."""
        subject = Subject(rollout.metadata.namespace, rollout.name)
        if self.record_folder is None:
            return
        with self._lock:
            writer = self._writers.setdefault(subject, RecordWriter(self.record_folder(subject), self.record_limits))
        self._try(subject, "RecordFailed", "this time can't be replayed later: ", now,
                  lambda: writer.write(rollout, before, seen, now, decision))

    def turned(self, rollout: ModelRollout, status: RolloutStatus, seen: Observation, now: datetime) -> None:
        """After the actions: others are told, and a training may be due."""
        subject = Subject(rollout.metadata.namespace, rollout.name)
        points: list[HistoryPoint] = []
        trigger = self.retraining
        if trigger is not None:
            self._try(subject, "RetrainingFailed", "", now,
                      lambda: points.extend(trigger.turn(rollout, status, seen.evidence, now)))
        if self.notifier is not None:
            if points:
                history = tuple(sorted((*status.history, *points), key=lambda p: p.time))
                status = status.model_copy(update={"history": history})
            self.notifier.offer(subject, status)

    def gone(self, subject: Subject) -> None:
        """The rollout was deleted. Its record stays: it is evidence."""
        with self._lock:
            self._writers.pop(subject, None)
        if self.notifier is not None:
            self.notifier.gone(subject)

    def keep(self, alive: set[Subject]) -> None:
        """Those that are not among these are gone."""
        for subject in set(self._writers) - alive:
            self.gone(subject)

    def _try(self, subject: Subject, event: str, words: str, now: datetime, do: Callable[[], object]) -> None:
        key = (subject, event)
        try:
            do()
        except (HafniumError, OSError, ValueError) as e:
            with self._lock:
                known, self._said[key] = self._said.get(key), str(e)
            if known != str(e):
                self.log({"time": now, "level": "error", "rollout": subject.name, "event": event, "message": f"{words}{e}"})
            return
        with self._lock:
            self._said.pop(key, None)
