"""Scores on a cluster, in pairs or across the arms: the inference logs of both services, in a mounted folder or a bucket.

Where they are is one setting for all rollouts, with {namespace}, {rollout} and {service} filled in. Both services may write to one
place: rows say which arm they are of and which model made them.

A volume may hang instead of failing. So each read has a thread of its own, which a turn waits for some seconds and then leaves behind: the
gate can't be measured then, and the rollout is guarded on. What a late read found is for the first look after it, so a log that is slow at
every look is measured too, only later.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hafnium_rollout.errors import OnlyAhead, StateError
from hafnium_rollout.kubernetes.log_mirror import LogMirror, Room, Scratch
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import LiveRoute
from hafnium_rollout.score_reading import Reading, ScoreReaders
from hafnium_rollout.status import RolloutStatus

READ_S_MAX = 5.0
"""A turn waits so long for a log. As for a query of Prometheus: what needs longer is as good as gone for this look."""
LATE_MAX = 64
"""Reads that were left behind and hang still, of all rollouts: each is a thread. With so many nobody tries another. As many in all are
kept: one that is over and that no look asks for (its rollout has ended) makes room."""
MIRRORS_MAX = 128
"""Places in buckets that a connection is kept to. Each model has a place of its own, so they become ever more; beyond it the one that was
read longest ago is forgotten, and opened anew when it is asked for."""
_Found = tuple[tuple[float, ...], dict[str, Any]]


class _Read:
    """One read, in a thread that ends with the process, however long its volume hangs."""

    def __init__(self, do: Callable[[], _Found]) -> None:
        self._do = do
        self._found: _Found | Exception | None = None
        self._thread = threading.Thread(target=self._run, name="score-log", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._do()
        except Exception as e:  # noqa: BLE001 - whoever waits is given it
            self._found = e

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self, wait_s: float) -> _Found | None:
        """None: it isn't over yet. Raises what the read raised."""
        self._thread.join(wait_s)
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@dataclass(frozen=True, slots=True)
class _Late:
    """A read that a turn has left behind. What it finds is for a look with the same reader that stands at the same cursor."""

    reading: Reading
    read: _Read


class ScoreLog:
    """Waiting rows per rollout. Safe between threads as long as one rollout is looked at by one of them."""

    def __init__(self, place: str, scratch: Path | None = None, *, read_s_max: float = READ_S_MAX) -> None:
        self._place = place
        self._read_s_max = read_s_max
        self._late: dict[tuple[str, str], _Late] = {}
        """Until one is over its rollout's log is read by nobody else."""
        self._scratch = scratch
        """Where files of a bucket lie while they are read; a folder of the process' own without one."""
        self._own: Scratch | None = None
        self._room = Room()
        self._mirrors: dict[str, LogMirror] = {}
        self._readers = ScoreReaders()
        self._lock = threading.Lock()

    def read(
        self, rollout: ModelRollout, namespace: str, status: RolloutStatus, live: LiveRoute | None, now: datetime,
    ) -> tuple[tuple[float, ...], str, dict[str, Any] | None]:
        """(new differences, why there are none, cursor after them) while scores can be compared; else no cursor."""
        stable, candidate = status.stable, status.candidate
        key = (namespace, rollout.name)
        reading = self._readers.choose(key, rollout, status, live)
        if stable is None or candidate is None or reading is None:
            return (), "", None
        if not self._place:
            return (), "the operator doesn't know where the inference log is (--inference_log)", None
        with self._lock:
            hanging = {k for k, late in self._late.items() if not late.read.over}
            late = self._late.pop(key, None) if key not in hanging else None
        if late is not None and late.reading == reading:
            return self._await(key, late)
        if key in hanging or len(hanging) >= LATE_MAX:
            return (), "the inference log hangs: an earlier read of it has not come back", dict(reading.cursor)
        names, digest = (stable.service, candidate.service), candidate.digest

        def do() -> _Found:
            places = [self._place_of(namespace, rollout.name, s) for s in names]
            known = [reading.cursor.get(arm) for arm in ("stable", "candidate")]
            passed = frozenset(n for names in reading.cursor.get("ahead", {}).values() for n in names)
            with ExitStack() as held:
                # Both arms may write to one place: then what either hasn't read is fetched, and once.
                of_place = {p: [k for k, q in zip(known, places, strict=True) if q == p] for p in places}
                folders = {p: self._folder(p, now, lists, passed, held) for p, lists in of_place.items()}
                return reading.reader.read(folders[places[0]], folders[places[1]], digest, reading.cursor, now)

        return self._await(key, _Late(reading, _Read(do)))

    def give_back(self, rollout: ModelRollout, namespace: str, differences: tuple[float, ...]) -> None:
        """These pairs met no look: they come again with the next one."""
        self._readers.give_back((namespace, rollout.name), differences)

    def _await(self, key: tuple[str, str], late: _Late) -> tuple[tuple[float, ...], str, dict[str, Any]]:
        """What the read found, if it is over in time; else it is left behind."""
        try:
            found = late.read.result(self._read_s_max)
        except StateError as e:
            return (), str(e), e.cursor if isinstance(e, OnlyAhead) else dict(late.reading.cursor)
        if found is not None:
            return found[0], "", found[1]
        with self._lock:
            unclaimed = [k for k, other in self._late.items() if other.read.over]
            for oldest in unclaimed[:max(0, len(self._late) + 1 - LATE_MAX)]:
                del self._late[oldest]
            self._late[key] = late
        return (), f"the inference log was not read within {self._read_s_max:g} s", dict(late.reading.cursor)

    def _place_of(self, namespace: str, rollout: str, service: str) -> str:
        return self._place.replace("{namespace}", namespace).replace("{rollout}", rollout).replace("{service}", service)

    def _folder(self, place: str, now: datetime, known: Sequence[object], passed: Collection[str], held: ExitStack) -> Path:
        """Where the place's new files can be read until `held` ends."""
        if "://" not in place:
            return Path(place)
        with self._lock:
            if self._scratch is None:
                self._own = Scratch(Path(tempfile.gettempdir()))
                self._scratch = self._own.path
            mirror = self._mirrors.pop(place, None) or LogMirror(place, self._scratch, self._room)
            self._mirrors[place] = mirror
            if len(self._mirrors) > MIRRORS_MAX:
                del self._mirrors[next(iter(self._mirrors))]
        return held.enter_context(mirror.unread(now, known, passed))
