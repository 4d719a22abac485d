"""Pairs of scores from the inference log: the same request, answered by stable and copied to the candidate in shadow.

Each file is read once. Rows wait in memory, bounded, until their partner comes: the arms flush at their own times. What waits
is lost when the controller restarts, which costs a few pairs and favours nobody; which files were read is in the status, so
no pair is counted twice. `ScoresAcross` does the same for live answers, where no request has two.

A status can fail to be written, and then the same files are read again. So what waits is kept for both cursors, the one that was read
from and the one after: whichever the next status has, memory is as it was there, and every score counts once. With any other cursor
(another leader went on meanwhile) nothing is known to wait.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa

from hafnium_contract.inference_log import log_files, read_files
from hafnium_rollout.errors import OnlyAhead, StateError
from hafnium_rollout.gates import CLOCK_SKEW_MAX
from hafnium_rollout.statistics import across

NAMES_MAX = 256
"""File names remembered per arm. Names begin with their time; one below the oldest remembered came far too late and is left out.

Names ahead of the clock are remembered apart (`ahead`) until their time has come: among the others they would soon be the oldest, and every
true name below them. Their files are never read, also then: rows of another time than they say would count for another step.
"""
AHEAD_MAX = 512
"""Names ahead of the clock remembered per arm: of CLOCK_SKEW_MAX, at the four files a second that looks keep up with. Of more, those that
come next must be among them."""
AHEAD_SEEN_MAX = 4096
"""So many files ahead of the clock are counted where each costs something: those of a pod nine hours ahead, one each eight seconds. Of
more only the newest tells whether others come: behind one that is further ahead they are not heard."""
ONLY_AHEAD_LASTS = timedelta(minutes=2)
"""For so long after an arm wrote a file ahead of the clock, and nothing else, its clock is said to be wrong; then nobody asks it. A pod
that is asked flushes every few seconds."""
FILES_PER_LOOK_MAX = 64
WAITING_MAX = 20_000
State = TypeVar("State")
_TIMED = re.compile(r"part-\d{8}T\d{12}-")
_COLUMNS = ["request_id", "arm", "score", "model_digest"]


class _Memory(Generic[State]):
    """What waits, by the cursor of the status that it goes with."""

    def __init__(self) -> None:
        self._states: tuple[tuple[dict[str, Any], State], ...] = ()

    def at(self, cursor: Mapping[str, Any]) -> State | None:
        return next((state for known, state in self._states if known == cursor), None)

    def keep(self, before: Mapping[str, Any], state: State, after: Mapping[str, Any], state_after: State) -> None:
        self._states = ((dict(after), state_after), (dict(before), state))

    @property
    def last(self) -> tuple[dict[str, Any], State] | None:
        return self._states[0] if self._states else None

    def replace_last(self, state: State) -> None:
        self._states = ((self._states[0][0], state), *self._states[1:])


@dataclass(frozen=True, slots=True)
class _Paired:
    stable: Mapping[str, float] = field(default_factory=dict[str, float])
    candidate: Mapping[str, float] = field(default_factory=dict[str, float])
    pending: tuple[float, ...] = ()
    """Differences that met no look yet."""


class ScorePairs:
    """Waiting rows of one rollout's two arms."""

    def __init__(self) -> None:
        self._memory: _Memory[_Paired] = _Memory()

    def knows(self, cursor: Mapping[str, Any]) -> bool:
        """What waits is what goes with this cursor."""
        return self._memory.at(cursor) is not None

    def read(
        self, stable: Path, candidate: Path, digest: str, cursor: Mapping[str, Any], now: datetime | None = None,
    ) -> tuple[tuple[float, ...], dict[str, Any]]:
        """New differences (candidate − stable) and the cursor after them. Raises StateError when a file can't be read, and OnlyAhead, with
        the cursor to go on from, when all that an arm writes of late is ahead of `now` (None: nothing is).

        `digest`: the candidate's; rows of another model under the same service name don't count. An empty cursor marks what
        is there as read: those requests came before the shadow step.
        """
        state = (self._memory.at(cursor) if cursor else None) or _Paired()
        known, new_stable, new_candidate, wrong = _new_files(stable, candidate, cursor, now)
        of_stable = _newest({**state.stable, **_rows(new_stable, "stable", None)})
        of_candidate = _newest({**state.candidate, **_rows(new_candidate, "shadow", digest)})
        both = [k for k in of_candidate if k in of_stable]
        differences = (*state.pending, *(of_candidate.pop(k) - of_stable.pop(k) for k in both))
        after = _cursor(cursor, known, differences)
        self._memory.keep(cursor, state, after, _Paired(of_stable, of_candidate))
        if wrong:
            self.give_back(differences)
            raise OnlyAhead(wrong, after)
        return differences, after

    def give_back(self, differences: tuple[float, ...]) -> None:
        """These met no look: they come again with the next one that goes on from the cursor after them."""
        last = self._memory.last
        if last is not None:
            self._memory.replace_last(replace(last[1], pending=differences[-WAITING_MAX:]))


@dataclass(frozen=True, slots=True)
class _Across:
    stable: Sequence[tuple[float, float]] = ()
    candidate: Sequence[tuple[float, float]] = ()
    pending: tuple[float, ...] = ()


class ScoresAcross:
    """Scores of both arms' live answers, held back until both logs have come as far: the arms flush at their own times."""

    def __init__(self, stable_digest: str = "") -> None:
        """`stable_digest`: the stable model, so that rows of a third one that share its place count for nobody; '' when it isn't known."""
        self._stable_digest = stable_digest
        self._memory: _Memory[_Across] = _Memory()

    def knows(self, cursor: Mapping[str, Any]) -> bool:
        """What waits is what goes with this cursor."""
        return self._memory.at(cursor) is not None

    def read(
        self, stable: Path, candidate: Path, digest: str, cursor: Mapping[str, Any], now: datetime | None = None,
    ) -> tuple[tuple[float, ...], dict[str, Any]]:
        """New differences across the arms and the cursor after them; arguments and errors as in ScorePairs.read.

        Both services may write to one place, and a gateway that can't set headers per backend leaves every row marked `stable`: so the
        model that made a score says which arm it is of. A cursor that nothing is known to wait at is begun anew, as an empty one: what one
        arm has ahead of the other is lost, and comparing from there on would set different times against each other.
        """
        state = self._memory.at(cursor) if cursor else _Across()
        if state is None:
            state, cursor = _Across(), {}
        known, new_stable, new_candidate, wrong = _new_files(stable, candidate, cursor, now)

        def is_stable(model: str) -> bool:
            return model == self._stable_digest if self._stable_digest else model != digest

        of_stable = sorted([*state.stable, *_timed(new_stable, ("stable",), is_stable)])[-WAITING_MAX:]
        mine = _timed(new_candidate, ("candidate", "stable"), lambda model: model == digest)
        of_candidate = sorted([*state.candidate, *mine])[-WAITING_MAX:]
        found = state.pending
        if of_stable and of_candidate:
            until = min(of_stable[-1][0], of_candidate[-1][0])
            ready = [[score for time, score in rows if time <= until] for rows in (of_candidate, of_stable)]
            if ready[0] and ready[1]:
                found += across.differences(ready[0], ready[1])
                of_candidate, of_stable = ([x for x in rows if x[0] > until] for rows in (of_candidate, of_stable))
        after = {**_cursor(cursor, known, found), "live": True}
        self._memory.keep(cursor, state, after, _Across(of_stable, of_candidate))
        if wrong:
            self.give_back(found)
            raise OnlyAhead(wrong, after)
        return found, after

    def give_back(self, differences: tuple[float, ...]) -> None:
        """As in ScorePairs."""
        last = self._memory.last
        if last is not None:
            self._memory.replace_last(replace(last[1], pending=differences[-WAITING_MAX:]))


def _cursor(before: Mapping[str, Any], names: Mapping[str, Any], differences: Sequence[float]) -> dict[str, Any]:
    """The cursor after a read. `taken` grows with each that gave something: without it, differences that come again (they met no look)
    would leave the cursor as it was, and nobody could tell whether they were counted."""
    known = before.get("taken")
    taken = (known if isinstance(known, int) else 0) + bool(differences)
    return {**names, **({"taken": taken} if taken else {})}


def _timed(files: Sequence[Path], marks: Sequence[str], is_its: Callable[[str], bool]) -> list[tuple[float, float]]:
    """(time in s, score) of one arm's answers: of its model, under one of these marks. Copies are never answers."""
    table = _table(files, ["time", *_COLUMNS])
    if table is None:
        return []
    columns = [table.column(name).to_pylist() for name in ("time", "arm", "score", "model_digest")]
    return [
        (time.timestamp(), score) for time, found, score, model in zip(*columns, strict=True)
        if found in marks and time is not None and score is not None and 0.0 <= score <= 1.0 and is_its(model)
    ]


def _table(files: Sequence[Path], columns: list[str]) -> pa.Table | None:
    try:
        return read_files(files, columns)
    except (OSError, pa.ArrowException) as e:
        raise StateError(f"inference log: a file can't be read: {e}") from e


def unread(names: Sequence[str], read: Sequence[str], now: datetime | None = None) -> list[str]:
    """Which of these files, the oldest first, a look reads whose cursor has `read`; bounded."""
    done, oldest, last = set(read), forgotten(read), _last(now)
    return [n for n in names if n not in done and n > oldest and not _is_ahead(n, last)][:FILES_PER_LOOK_MAX]


def forgotten(read: Sequence[str]) -> str:
    """The name up to which files count as read whether the cursor has them or not; empty while it has room for all."""
    return min(read) if len(read) >= NAMES_MAX else ""


def known_names(known: object, now: datetime | None) -> tuple[list[str] | None, list[str]]:
    """What an arm's part of a cursor counts as read, and what of it is ahead of the clock.

    The release before kept both in one list, in which soon only those ahead were left. Which files a full list has forgotten can't be told
    without them, so nothing is known then (None), as at the beginning: what is there came before.
    """
    if not isinstance(known, list):
        return None, []
    read, last = [str(n) for n in cast("list[object]", known)], _last(now)
    wrong = [n for n in read if _is_ahead(n, last)]
    if wrong and len(read) >= NAMES_MAX:
        return None, wrong
    return [n for n in read if not _is_ahead(n, last)], wrong


def ahead(names: Iterable[str], now: datetime | None) -> list[str]:
    """Those of a time that hasn't come, as many as are counted. None: there are none."""
    last = _last(now)
    return _bounded((n for n in names if _is_ahead(n, last)), AHEAD_SEEN_MAX)


def _bounded(names: Iterable[str], most: int) -> list[str]:
    """Of too many the ones whose time comes first, which must not be read when it does, and the last one, for the message."""
    found = sorted(set(names))
    return found if len(found) <= most else [*found[:most - 1], found[-1]]


def _last(now: datetime | None) -> str:
    """Names above it are ahead of the clock. Empty: none is."""
    return f"part-{(now + CLOCK_SKEW_MAX).astimezone(UTC):%Y%m%dT%H%M%S%f}" if now is not None else ""


def _is_ahead(name: str, last: str) -> bool:
    return last != "" and name > last and _TIMED.match(name) is not None


def _new_files(
    stable: Path, candidate: Path, cursor: Mapping[str, Any], now: datetime | None,
) -> tuple[dict[str, Any], list[Path], list[Path], str]:
    """Names to remember, as a part of the cursor; each arm's files that aren't read yet; and what is wrong with an arm's clock."""
    arms = {arm: _files_of(folder, arm, cursor, now) for arm, folder in (("stable", stable), ("candidate", candidate))}
    names: dict[str, Any] = {**{arm: a.names for arm, a in arms.items()}, "heard": {arm: a.heard for arm, a in arms.items()}}
    if any(a.ahead for a in arms.values()):
        names["ahead"] = {arm: a.ahead for arm, a in arms.items()}
        names["ahead_seen"] = {arm: a.ahead_seen for arm, a in arms.items()}
    if only := {arm: a.only_ahead for arm, a in arms.items() if a.only_ahead is not None}:
        names["only_ahead"] = only
    wrong = next((a.ahead[-1] for a in arms.values() if a.only_ahead is not None and a.ahead), None)
    text = "" if wrong is None or now is None else (
        f"inference log: {wrong} is of a time that hasn't come (here it is {now.astimezone(UTC):%Y-%m-%dT%H:%M:%S} UTC), "
        "and nothing else was written lately: such files are not read. The clock of their pod is wrong, or ours; correct it")
    return names, arms["stable"].new, arms["candidate"].new, text


@dataclass(frozen=True, slots=True)
class _ArmFiles:
    names: list[str]
    """To remember as read."""
    ahead: list[str]
    """To remember apart."""
    ahead_seen: list[Any]
    """A name, how many files above it there are, all ahead of the clock, and the newest of them. Names alone can't tell whether others
    came: of too many most are forgotten, and those of one pod may come before those that another, further ahead, has left. Nor can their
    number alone: no more than AHEAD_SEEN_MAX are counted, and some may have been deleted."""
    heard: str
    """The newest name that was never ahead of the clock; empty: none is known."""
    only_ahead: float | None
    """When a look last found new files ahead of the clock and no others; None: never, or long ago, or others came since."""
    new: list[Path]


def _files_of(folder: Path, arm: str, cursor: Mapping[str, Any], now: datetime | None) -> _ArmFiles:
    """`folder` may lack what was read: the cursor has its names."""
    def kept(part: str) -> Any:
        return cast("dict[str, Any]", cursor.get(part) or {}).get(arm)

    files = log_files(folder)
    names = [p.name for p in files]
    last = _last(now)
    here = _last(now - CLOCK_SKEW_MAX) if now is not None else ""
    read, wrong = known_names(cursor.get(arm), now)
    passed = _bounded([*(kept("ahead") or ()), *wrong], AHEAD_MAX)
    due = [n for n in passed if n <= here]  # counted as read from now on; before, they would push all others out
    of_late = [n for n in names if _is_ahead(n, last)]
    later, seen = _bounded({*passed, *of_late} - set(due), AHEAD_MAX), [last, len(of_late), max(of_late, default="")]
    if read is None:
        there = [n for n in names if not _is_ahead(n, last)][-NAMES_MAX:]
        return _ArmFiles(there, later, seen, _newest_until(last, there), None, [])
    wanted = set(unread([n for n in names if n not in passed], read, now))
    heard = kept("heard")
    heard = _newest_until(last, [*wanted, *([str(heard)] if heard is not None else (n for n in read if n not in passed))])
    only = None
    # One pod of several is borne. An arm whose every file is so must not look as if nobody asked it, nor the other way round
    if now is not None and not wanted and heard <= _last(now - CLOCK_SKEW_MAX - ONLY_AHEAD_LASTS):
        only = now.timestamp() if _more_ahead(names, of_late, passed, kept("ahead_seen")) else kept("only_ahead")
        only = only if only is not None and abs(now.timestamp() - only) <= ONLY_AHEAD_LASTS.total_seconds() else None
    return _ArmFiles(sorted({*read, *wanted, *due})[-NAMES_MAX:], later, seen, heard, only, [p for p in files if p.name in wanted])


def _newest_until(last: str, names: Iterable[str]) -> str:
    return max((n for n in names if n <= last), default="")


def _more_ahead(names: Sequence[str], of_late: Sequence[str], passed: Sequence[str], seen: list[Any] | None) -> bool:
    """Whether files ahead of the clock came since the last look. `seen`: None where it saw none, or was one of an older release."""
    if seen is None:
        return any(n not in passed for n in of_late)
    later = [n for n in names if _is_ahead(n, seen[0])]
    newest = seen[2] if len(seen) > 2 else None  # an older release kept none
    return len(later) > seen[1] or (newest is not None and max(later, default="") > newest)


def _rows(files: Sequence[Path], arm: str, digest: str | None) -> dict[str, float]:
    table = _table(files, _COLUMNS)
    if table is None:
        return {}
    columns = {name: table.column(name).to_pylist() for name in _COLUMNS}
    return {
        key: score
        for key, found, score, model in zip(*(columns[n] for n in _COLUMNS), strict=True)
        if found == arm and key and score is not None and 0.0 <= score <= 1.0 and (digest is None or model == digest)
    }


def _newest(waiting: dict[str, float]) -> dict[str, float]:
    """The last ones that came, as many as may wait."""
    return waiting if len(waiting) <= WAITING_MAX else dict(list(waiting.items())[-WAITING_MAX:])
