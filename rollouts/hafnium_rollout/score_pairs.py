"""Pairs of scores from the inference log: the same request, answered by stable and copied to the candidate in shadow.

Each file is read once. Rows wait in memory, bounded, until their partner comes: the arms flush at their own times. What waits
is lost when the controller restarts, which costs a few pairs and favours nobody; which files were read is in the status, so
no pair is counted twice. `ScoresAcross` does the same for live answers, where no request has two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from hafnium_contract.inference_log import log_files, read_files
from hafnium_rollout.errors import StateError
from hafnium_rollout.statistics import across

NAMES_MAX = 256
"""File names remembered per arm. Names begin with their time; one below the oldest remembered came far too late and is left out."""
FILES_PER_LOOK_MAX = 64
WAITING_MAX = 20_000
_COLUMNS = ["request_id", "arm", "score", "model_digest"]


class ScorePairs:
    """Waiting rows of one rollout's two arms."""

    def __init__(self) -> None:
        self._stable: OrderedDict[str, float] = OrderedDict()
        self._candidate: OrderedDict[str, float] = OrderedDict()

    def forget(self) -> None:
        """Between runs: rows of one candidate are not paired for the next."""
        self._stable.clear()
        self._candidate.clear()

    def read(self, stable: Path, candidate: Path, digest: str, cursor: Mapping[str, Any]) -> tuple[tuple[float, ...], dict[str, Any]]:
        """New differences (candidate − stable) and the cursor after them. Raises StateError when a file can't be read.

        `digest`: the candidate's; rows of another model under the same service name don't count. An empty cursor marks what
        is there as read: those requests came before the shadow step.
        """
        names_stable, new_stable = _new_files(stable, cursor.get("stable"))
        names_candidate, new_candidate = _new_files(candidate, cursor.get("candidate"))
        _add(self._stable, _rows(new_stable, "stable", None))
        _add(self._candidate, _rows(new_candidate, "shadow", digest))
        both = [k for k in self._candidate if k in self._stable]
        differences = tuple(self._candidate.pop(k) - self._stable.pop(k) for k in both)
        return differences, {"stable": names_stable, "candidate": names_candidate}


class ScoresAcross:
    """Scores of both arms' live answers, held back until both logs have come as far: the arms flush at their own times."""

    def __init__(self) -> None:
        self._stable: list[tuple[float, float]] = []
        self._candidate: list[tuple[float, float]] = []

    def forget(self) -> None:
        """Between steps: scores from another weight are another mixture of times."""
        self._stable.clear()
        self._candidate.clear()

    def read(self, stable: Path, candidate: Path, digest: str, cursor: Mapping[str, Any]) -> tuple[tuple[float, ...], dict[str, Any]]:
        """New differences across the arms and the cursor after them; arguments and errors as in ScorePairs.read."""
        names_stable, new_stable = _new_files(stable, cursor.get("stable"))
        names_candidate, new_candidate = _new_files(candidate, cursor.get("candidate"))
        self._stable = sorted([*self._stable, *_timed(new_stable, "stable", None)])[-WAITING_MAX:]
        self._candidate = sorted([*self._candidate, *_timed(new_candidate, "candidate", digest)])[-WAITING_MAX:]
        found: tuple[float, ...] = ()
        if self._stable and self._candidate:
            until = min(self._stable[-1][0], self._candidate[-1][0])
            ready = [[score for time, score in rows if time <= until] for rows in (self._candidate, self._stable)]
            if ready[0] and ready[1]:
                found = across.differences(ready[0], ready[1])
                self._candidate, self._stable = ([x for x in rows if x[0] > until] for rows in (self._candidate, self._stable))
        return found, {"stable": names_stable, "candidate": names_candidate, "live": True}


def _timed(files: Sequence[Path], arm: str, digest: str | None) -> list[tuple[float, float]]:
    """(time in s, score) of the arm's answers."""
    table = _table(files, ["time", *_COLUMNS])
    if table is None:
        return []
    columns = [table.column(name).to_pylist() for name in ("time", "arm", "score", "model_digest")]
    return [
        (time.timestamp(), score) for time, found, score, model in zip(*columns, strict=True)
        if found == arm and time is not None and score is not None and 0.0 <= score <= 1.0 and (digest is None or model == digest)
    ]


def _table(files: Sequence[Path], columns: list[str]) -> pa.Table | None:
    try:
        return read_files(files, columns)
    except (OSError, pa.ArrowException) as e:
        raise StateError(f"inference log: a file can't be read: {e}") from e


def _new_files(folder: Path, known: Any) -> tuple[list[str], list[Path]]:
    """Names to remember, and files not read yet (the oldest first, bounded)."""
    files = log_files(folder)
    if not isinstance(known, list):
        return [p.name for p in files][-NAMES_MAX:], []
    read = [str(n) for n in cast("list[object]", known)]
    done = set(read)
    oldest = min(read) if len(read) >= NAMES_MAX else ""
    new = [p for p in files if p.name not in done and p.name > oldest][:FILES_PER_LOOK_MAX]
    return sorted([*read, *(p.name for p in new)])[-NAMES_MAX:], new


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


def _add(waiting: OrderedDict[str, float], rows: dict[str, float]) -> None:
    waiting.update(rows)
    while len(waiting) > WAITING_MAX:
        waiting.popitem(last=False)
