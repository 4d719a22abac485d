"""New files of an inference log in a bucket, as a folder of this machine for as long as they are read.

Pairs of scores (score_pairs.py) need the contents of files that nobody has read yet. Which were read is in the status' cursor; so only the
others are fetched, as many as one look reads, and nothing is kept after it: a read whose status could not be written is done again. A new
leader thus goes on where the last one stood, however many files lie there. Only today's partitions are listed, yesterday's while they may
have an unread file, and tomorrow's, for a pod whose clock is ahead: a shadow step compares what comes in now.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, cast

from hafnium_rollout.errors import StateError
from hafnium_rollout.score_pairs import NAMES_MAX, ahead, forgotten, known_names, unread

FILE_BYTES_MAX = 64 * 1024 * 1024
"""The transformer's largest are 5,000 rows: half a megabyte."""
LOOK_BYTES_MAX = 64 * 1024 * 1024
"""Of one place at a look: twice what 64 files of the transformer's have at most. What is beyond it counts as not read: it comes next."""
HELD_BYTES_MAX = 512 * 1024 * 1024
"""Of all places that are read at a time. Half of the operator's /tmp, whose other half is for what a killed process could not remove."""

LATE_MAX = timedelta(hours=1)
"""A file lies in the partition of its first row's day and is named when it is written: seconds later, or after the bucket came back."""
_PREFIX = "hafnium-log-"
_TIMED = len("part-20260301T120000")


class Room:
    """How many bytes lie on the disk at a time. Safe between threads."""

    def __init__(self, bytes_max: int = HELD_BYTES_MAX) -> None:
        self._bytes_max, self._held = bytes_max, 0
        self._lock = threading.Lock()

    @contextmanager
    def take(self, size: int) -> Generator[None]:
        """Room for so many bytes. Raises StateError when there isn't: nobody waits here, since reads that hang may hold it."""
        with self._lock:
            if self._held + size > self._bytes_max:
                raise StateError(
                    f"{size} bytes are to be fetched while {self._held} of other reads lie here, and at most {self._bytes_max} may at a "
                    "time; it is tried again at the next look")
            self._held += size
        try:
            yield
        finally:
            with self._lock:
                self._held -= size


class Scratch:
    """A folder of this process' own. What killed ones left beside it is removed: a container that is started again has its old /tmp.

    Whoever uses one holds its lock, which ends with the process, whatever ends that.
    """

    def __init__(self, parent: Path) -> None:
        for left in parent.glob(f"{_PREFIX}*"):
            lock = _locked(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        self._folder = TemporaryDirectory(dir=parent, prefix=_PREFIX)
        self.path = Path(self._folder.name)
        self._lock = _locked(self.path)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None when another has it, or it isn't ours to open."""
    try:
        found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(found)
        return None
    return found


@dataclass(frozen=True, slots=True)
class _File:
    place: str
    """Below the log's place."""
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.place).name


class LogMirror:
    """One place in a bucket. Safe between threads: each read has a folder of its own below `scratch`."""

    def __init__(self, uri: str, scratch: Path, room: Room) -> None:
        self._uri, self._scratch, self._room = uri, scratch, room
        self._opened: tuple[Any, str] | None = None

    @contextmanager
    def unread(self, now: datetime, known: Sequence[object], passed: Collection[str] = ()) -> Generator[Path]:
        """A folder with what isn't read yet, until the block ends. Raises StateError.

        `known`: for each arm that writes here, the names that the cursor has; no list where nobody has read anything yet. Then what is
        there came before, and the newest are empty files: only their names count. `passed`: those that it has as ahead of the clock, which
        are never read, not when their time comes either.
        """
        from pyarrow import ArrowException

        with ExitStack() as held:
            try:
                folder = self._fetched(now, known, passed, held)
            except (OSError, ArrowException, StateError) as e:
                self._opened = None  # a connection that failed is opened anew
                raise StateError(f"inference log {self._uri.partition('?')[0]}: it can't be read: {e}") from e
            yield folder

    def _fetched(self, now: datetime, known: Sequence[object], passed: Collection[str], held: ExitStack) -> Path:
        lists = [read for read, _ in (known_names(k, now) for k in known) if read is not None]
        all_read = "" if len(lists) < len(known) else min((forgotten(read) for read in lists), default="")
        files = self._files(_days(now, all_read))
        names = [f.name for f in files]
        wanted = {n for read in lists for n in unread([n for n in names if n not in passed], read, now)}
        fetched = _first(f for f in files if f.name in wanted)
        held.enter_context(self._room.take(sum(f.size for f in fetched)))
        self._scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(held.enter_context(TemporaryDirectory(dir=self._scratch, prefix="read-")))
        # Of these only the names count: what came before, and what is ahead of the clock or was (their number tells whether more come)
        later = {*ahead(names, now), *passed}
        before = {f.name for f in [f for f in files if f.name not in later][-NAMES_MAX:]} if len(lists) < len(known) else set[str]()
        for file in files:
            if file.name in before or file.name in later:
                _made(folder / file.place).touch()
        for file in fetched:
            _made(folder / file.place).write_bytes(self._contents(file))
        return folder

    def _files(self, days: Sequence[date]) -> list[_File]:
        """Of these days below the place, oldest first."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, prefix = self._open()
        found: list[_File] = []
        for day in days:
            selector = FileSelector(f"{prefix}/date={day:%Y-%m-%d}", recursive=True, allow_not_found=True)
            found += [
                _File(str(PurePosixPath(i.path).relative_to(prefix)), int(i.size))
                for i in cast("list[Any]", filesystem.get_file_info(selector))
                if i.type == FileType.File and i.base_name.startswith("part-") and i.extension == "parquet"]
        return sorted(found, key=lambda f: f.name)

    def _contents(self, file: _File) -> bytes:
        if file.size > FILE_BYTES_MAX:
            raise StateError(f"{file.place} is {file.size} bytes large, expected at most {FILE_BYTES_MAX}")
        filesystem, prefix = self._open()
        with filesystem.open_input_stream(f"{prefix}/{file.place}") as f:
            data = cast("bytes", f.read(file.size + 1))
        if len(data) != file.size:
            raise StateError(f"{file.place} was {file.size} bytes large and is of another size now")
        return data

    def _open(self) -> tuple[Any, str]:
        opened = self._opened
        if opened is None:
            from pyarrow.fs import FileSystem

            filesystem, prefix = FileSystem.from_uri(self._uri)
            self._opened = opened = (filesystem, prefix.rstrip("/"))
        return opened


def _days(now: datetime, all_read: str) -> tuple[date, ...]:
    """Days whose files may be unread, when those up to the name `all_read` count as read. Listing a day costs a call per thousand files.

    Tomorrow's too: an arm whose clock is past midnight must not look as if nobody asked it.
    """
    today = now.astimezone(UTC).date()
    yesterday, tomorrow = today - timedelta(days=1), today + timedelta(days=1)
    try:
        known_until = datetime.strptime(all_read[:_TIMED], "part-%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return yesterday, today, tomorrow
    return (today, tomorrow) if (known_until - LATE_MAX).date() >= today else (yesterday, today, tomorrow)


def _first(files: Iterable[_File]) -> list[_File]:
    """As many as one look takes by their bytes; one at least, or it would never go on."""
    found: list[_File] = []
    size = 0
    for file in files:
        size += file.size
        if found and size > LOOK_BYTES_MAX:
            break
        found.append(file)
    return found


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
