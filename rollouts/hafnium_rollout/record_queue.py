"""Turns on their way into the record: a bounded queue and one thread that writes them, for all rollouts.

A record lies on a volume, and a volume may hang instead of failing (NFS). Then the thread hangs, and no turn with it: the guard over a
candidate never waits for a file. Turns are encoded by whoever decided them, in order, so that what waits is some kilobytes of text and
not a status of megabytes.

What waits is bounded, for each rollout and for all. Beyond it turns are lost, never waited for: they are counted, said, and the next turn
that is written opens with a `start` that tells how many are missing. So what is on disk is always a prefix of what was decided, or says
where it isn't.

The lease is asked once more right before each write, for the term in which the turn was decided: by then another leader may be writing
the same files.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from hafnium_rollout.actions import Decision
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import RecordFiles, RecordLimits, hafnium_version
from hafnium_rollout.record_lines import Lines, TurnEncoder, quiet
from hafnium_rollout.status import RolloutStatus

LAST_S = 5.0
"""So long a clean end waits for what is queued."""
LATE_S = 30.0
"""A write that takes longer than this is said: until the queue is full nobody would notice."""
QUIET_AGAIN_S = 60.0
"""After turns were lost, a rollout that has ended is written down once more, though nothing happens: else its record would never say
how it ended. Tried so often."""
Say = Callable[[str, Subject | None, str, str, datetime], None]
"""(level, about whom, event, message, when)."""


@dataclass(frozen=True, slots=True)
class WaitingLimits:
    """What may wait for a volume. One turn is always taken when nothing else waits, however large it is."""

    rollout_bytes_max: int = 2 * 1024 * 1024
    """Of one rollout: five hours of turns every fifteen seconds, of 1.6 kB each."""
    total_bytes_max: int = 64 * 1024 * 1024
    """Of all: a fifth of what the operator's pod may use. 500 rollouts under way at once get twenty minutes."""


@dataclass(slots=True)
class _Rollout:
    """What is known of one rollout's record. Turned by one thread at a time, written by another."""

    subject: Subject
    encoder: TurnEncoder
    files: RecordFiles
    life: object
    """Told apart from a later rollout of the same name, over terms."""
    waiting_bytes: int = 0
    anew: bool = False
    """The next turn must open with a start."""
    lost: int = 0
    """Turns that no start in the record or in the queue has told yet."""
    failed_at: float | None = None
    said: str = ""
    """The same complaint is made once."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    rollout: _Rollout
    lines: Lines
    told: int
    """Lost turns that its start tells."""
    now: datetime
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """That of the turn: the fence knows its term by it."""


class RecordQueue:
    """`put` never waits for a disk once `start` was called; without it each turn is written at once, by whoever puts it."""

    def __init__(
        self, folder_of: Callable[[Subject], Path], limits: RecordLimits, fence: Callable[[], None], say: Say,
        waiting: WaitingLimits = WaitingLimits(), clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder_of, self._limits, self._fence, self._say = folder_of, limits, fence, say
        self._waiting_limits, self._clock = waiting, clock
        self._rollouts: dict[Subject, _Rollout] = {}
        self._lives: dict[Subject, object] = {}
        self._queue: deque[_Waiting] = deque()
        self._lock = threading.Condition()
        self._bytes = 0
        self._lost: dict[Subject, int] = {}
        self._writing_since: float | None = None
        self._late_said = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- life -----------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def stop(self, now: datetime, wait_s: float = LAST_S) -> None:
        """Writes what is queued, for at most `wait_s`, and says what was not. The thread is a daemon: it ends with the process."""
        if self._thread is None:
            return
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            with self._lock:
                left = len(self._queue) + (self._writing_since is not None)
            self._say("error", None, "RecordGap", f"{left} turns were not written within {wait_s:g} s of the end", now)

    def lead(self) -> None:
        """A new term: another process may have written since, so every rollout begins with a start. What waits is of the old term."""
        with self._lock:
            self._rollouts.clear()

    def gone(self, subject: Subject) -> None:
        """The rollout was deleted. What waits is still written: the record stays, it is evidence."""
        with self._lock:
            self._rollouts.pop(subject, None)
            self._lives.pop(subject, None)
            self._lost.pop(subject, None)

    @property
    def subjects(self) -> set[Subject]:
        """Those that aren't gone yet, of earlier terms too."""
        with self._lock:
            return set(self._lives)

    def lost(self) -> Mapping[Subject, int]:
        """Turns that were not written, per rollout that has a record, since this process began."""
        with self._lock:
            return {s: self._lost.get(s, 0) for s in {*self._rollouts, *self._lost}}

    @property
    def waiting(self) -> int:
        """Turns that are not written yet; the one that is being written is one of them."""
        with self._lock:
            return len(self._queue) + (self._writing_since is not None)

    # --- in ---------------------------------------------------------------------------------------------------------------------

    def put(
        self, subject: Subject, rollout: ModelRollout, before: RolloutStatus, seen: Observation, now: datetime, decision: Decision,
    ) -> None:
        """One turn, on its way into the record if it is worth it."""
        with self._lock:
            if subject not in self._rollouts:
                files = RecordFiles(self._folder_of(subject), self._limits)
                life = self._lives.setdefault(subject, object())
                self._rollouts[subject] = _Rollout(subject, TurnEncoder(hafnium_version()), files, life)
            mine = self._rollouts[subject]
            if quiet(before, decision) and not self._owes(mine):
                return
            full = self._full(mine)
            # A gap lasts until what waits is written: each try would encode a whole status, only to find that it doesn't fit.
            gap = mine.lost > 0 and (mine.waiting_bytes > 0 or self._bytes > self._waiting_limits.total_bytes_max // 2)
            anew, mine.anew, lost = mine.anew, False, mine.lost
        self._tell_late(now)
        if full or gap:
            self._lose(mine, 1, now, "RecordGap", full, say=bool(full))
            return
        if anew:
            mine.encoder.begin_anew()
        try:
            lines = mine.encoder.lines(rollout, before, seen, now, decision, lost=lost)
        except (ValueError, TypeError) as e:
            self._lose(mine, 1, now, "RecordFailed", str(e))
            return
        told = lost if lines.begins else 0
        with self._lock:
            full = self._full(mine, len(lines.text))
            if not full:
                mine.lost -= told
                mine.waiting_bytes += len(lines.text)
                self._bytes += len(lines.text)
                self._queue.append(_Waiting(mine, lines, told, now))
                self._lock.notify_all()
        if full:
            self._lose(mine, 1, now, "RecordGap", full)
        elif self._thread is None:
            self._write(self._next())

    def _owes(self, mine: _Rollout) -> bool:
        """The record doesn't say how it ended, and it's time to try again."""
        return mine.lost > 0 and (mine.failed_at is None or self._clock() - mine.failed_at >= QUIET_AGAIN_S)

    def _full(self, mine: _Rollout, more: int = 0) -> str:
        """Why there is no room; empty when there is."""
        limits = self._waiting_limits
        if mine.waiting_bytes and mine.waiting_bytes + more > limits.rollout_bytes_max:
            return f"{mine.waiting_bytes} bytes of turns of it wait to be written already (at most {limits.rollout_bytes_max})"
        if self._bytes and self._bytes + more > limits.total_bytes_max:
            return f"{self._bytes} bytes of turns of all rollouts wait to be written already (at most {limits.total_bytes_max})"
        return ""

    def _tell_late(self, now: datetime) -> None:
        with self._lock:
            since = self._writing_since
            late = since is not None and self._clock() - since > LATE_S
            tell, self._late_said = late and not self._late_said, late
            waiting = len(self._queue) + 1
        if tell:
            text = f"the volume hasn't taken a turn for more than {LATE_S:g} s; {waiting} wait. Rollouts are guarded on"
            self._say("warning", None, "RecordLate", text, now)

    # --- out --------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._stopping:
                    self._lock.wait()
                if not self._queue:
                    return
            self._write(self._next())

    def _next(self) -> _Waiting:
        with self._lock:
            self._writing_since = self._clock()
            return self._queue.popleft()

    def _write(self, item: _Waiting) -> None:
        """One turn into its file, or into the count of lost ones. Raises nothing: a thread that ends unseen would lose all that follow."""
        mine = item.rollout
        try:
            item.context.run(self._fence)
            written = mine.files.append(item.lines)
        except NotLeading as e:
            mine.files.missed()
            self._lose(mine, 1 + item.told, item.now, "RecordGap", f"{e}; it was decided before", counted=1)
        except Exception as e:  # noqa: BLE001 - see above
            mine.files.missed()  # whatever it was: what waits behind builds on this turn
            self._lose(mine, 1 + item.told, item.now, "RecordFailed", f"{type(e).__name__}: {e}" if not str(e) else str(e), counted=1)
        else:
            if written:
                self._written(mine, item)
            else:
                self._lose(mine, 1 + item.told, item.now, "RecordGap", "what it follows is not in the record", counted=1, say=False)
        finally:
            with self._lock:
                mine.waiting_bytes -= len(item.lines.text)
                self._bytes -= len(item.lines.text)
                self._writing_since = None

    def _written(self, mine: _Rollout, item: _Waiting) -> None:
        with self._lock:
            mine.anew = mine.anew or mine.files.full
            mine.failed_at, told = None, item.told
            mine.said = "" if not mine.lost else mine.said
        if told:
            self._say("info", mine.subject, "RecordResumed", f"the record goes on after {told} turns that are missing", item.now)

    def _lose(
        self, mine: _Rollout, turns: int, now: datetime, event: str, why: str, *, counted: int | None = None, say: bool = True,
    ) -> None:
        """`counted`: how many of them weren't counted as lost before."""
        with self._lock:
            mine.lost += turns
            mine.anew = True
            mine.failed_at = self._clock()
            if self._lives.get(mine.subject) is mine.life:  # else it is gone, and nobody would ever take its count away again
                self._lost[mine.subject] = self._lost.get(mine.subject, 0) + (turns if counted is None else counted)
            # Numbers in it grow from turn to turn: for a full queue the event is the complaint.
            complaint = f"{event}: {why}" if event == "RecordFailed" else event
            say, mine.said = say and mine.said != complaint, complaint if say else mine.said
        if say:
            self._say("error", mine.subject, event, f"this time can't be replayed later: {why}", now)
