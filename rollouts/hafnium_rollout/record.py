"""The record of a rollout as files: one folder per rollout, numbered JSON-lines files, finished ones compressed, oldest removed.

    <folder>/00000007.jsonl.gz   finished
    <folder>/00000008.jsonl      being written

A record that can't be written must never stop the guard over a candidate: the writer says so and begins anew at the next turn. On a
cluster turns wait in record_queue.py for a thread that writes them.
What a crash leaves half written is skipped by the reader, which goes on at the next `start`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, cast

from hafnium_contract.whole_files import sync_folder
from hafnium_rollout.actions import Decision
from hafnium_rollout.errors import RecordError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.record_lines import Decoder, Gap, Lines, RecordedTurn, Start, TurnEncoder, quiet
from hafnium_rollout.status import RolloutStatus

PLAIN, PACKED = ".jsonl", ".jsonl.gz"
LINE_BYTES_MAX = 64 * 1024 * 1024
"""A start line holds a status (below 1 MB) and a first turn its findings (5,000 of 3 kB at most). More than this is no record."""


@dataclass(frozen=True)
class RecordLimits:
    """How much is kept of each rollout."""

    file_bytes_max: int = 8 * 1024 * 1024
    """A file is finished and compressed at this size. A turn of four gates, one of them with twenty score pairs, is 1.6 kB: 7 h of looks
    every five seconds, packed in a fifth of a second."""
    total_bytes_max: int = 64 * 1024 * 1024
    """Files of one rollout together; beyond it the oldest goes. Such turns packed are 0.3 of that: eight days of looks every five seconds,
    24 of the operator's every fifteen; without scores several times as long."""


class RecordFiles:
    """The files of one rollout's record. Not for two processes at once: the controller that holds the lease writes."""

    def __init__(self, folder: Path, limits: RecordLimits | None = None, *, durable: bool = False) -> None:
        """`durable`: what was appended is on the disk, also after a power cut, and stays there when its file is finished."""
        self._folder = folder
        self._limits = limits or RecordLimits()
        self._durable = durable
        self._file: Path | None = None
        self._base = 0
        self._broken = False
        """Lines are missing: only a start can be read after them."""
        self.full = False
        """A file is finished when the next start comes; somebody should let one come."""

    def append(self, lines: Lines) -> bool:
        """Whether the lines are in the record now. They are not when nobody could read them: what they build on isn't there.

        Raises OSError; then nothing is written until lines with a start come.
        """
        if self._broken and not lines.begins:
            return False
        try:
            path = self._path()
            size = path.stat().st_size if path.is_file() else 0
            if lines.begins and size - self._base > self._limits.file_bytes_max:
                self._pack(path)
                path, size = self._next(path), 0
            if not size and not lines.begins:
                raise FileNotFoundError(f"{path} is gone, and what follows builds on it")
            text = lines.text
            with path.open("a+b") as f:
                if size and _last_byte(f) != b"\n":
                    text = b"\n" + text  # a crash cut the last line off
                f.write(text)
                if self._durable:
                    f.flush()
                    os.fsync(f.fileno())
            if self._durable:
                sync_folder(self._folder)  # each time: who made the file may have been killed before it came so far
        except OSError:
            self._broken, self._file = True, None
            raise
        if not size:
            self._base = len(text)
        self._file, self._broken = path, False
        self.full = size + len(text) - self._base > self._limits.file_bytes_max
        return True

    def missed(self) -> None:
        """Lines were dropped on their way here: what follows builds on them."""
        self._broken = True

    def _path(self) -> Path:
        if self._file is not None:
            return self._file
        new = [f for f in (self._folder, *self._folder.parents) if not f.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._durable:
            for folder in new:
                sync_folder(folder.parent)
        files = record_files(self._folder)
        if not files:
            return self._folder / f"{1:08d}{PLAIN}"
        return files[-1] if files[-1].name.endswith(PLAIN) else self._next(files[-1])

    def _next(self, path: Path) -> Path:
        return path.with_name(f"{_number(path) + 1:08d}{PLAIN}")

    def _pack(self, path: Path) -> None:
        """Compresses a finished file beside its place, and removes the oldest files beyond the limit.

        The copy is on the disk, under its name, before the original goes: a power cut leaves one of them.
        """
        packed = path.with_name(path.name.removesuffix(PLAIN) + PACKED)
        staging = packed.with_name(f".{packed.name}.new")
        with path.open("rb") as source, staging.open("wb") as target:
            with gzip.open(target, "wb", compresslevel=3) as packing:
                shutil.copyfileobj(source, packing)
            target.flush()
            os.fsync(target.fileno())
        staging.replace(packed)
        sync_folder(self._folder)
        path.unlink()
        files = record_files(self._folder)
        sizes = [f.stat().st_size for f in files]
        while len(files) > 1 and sum(sizes) > self._limits.total_bytes_max:
            files.pop(0).unlink()
            sizes.pop(0)


class RecordWriter:
    """Writes turns of one rollout at once, by whoever asks."""

    def __init__(self, folder: Path, limits: RecordLimits | None = None) -> None:
        self._files = RecordFiles(folder, limits)
        self._encoder = TurnEncoder(hafnium_version())

    def write(
        self, rollout: ModelRollout, before: RolloutStatus, seen: Observation, now: datetime, decision: Decision,
    ) -> bool:
        """Records one turn; returns whether it was worth it. Raises OSError."""
        if quiet(before, decision):
            return False
        if self._files.full:
            self._encoder.begin_anew()
        try:
            self._files.append(self._encoder.lines(rollout, before, seen, now, decision))
        except OSError:
            self._encoder.begin_anew()
            raise
        return True


def hafnium_version() -> str:
    """Of the installed distribution; `unknown` when it runs from a source tree without one."""
    try:
        return version("hafnium-serving")
    except PackageNotFoundError:
        return "unknown"


def _last_byte(f: IO[bytes]) -> bytes:
    f.seek(-1, os.SEEK_END)
    return f.read(1)


def _number(path: Path) -> int:
    return int(path.name.split(".")[0])


def record_files(folder: Path) -> list[Path]:
    """The record's files, oldest first. A plain file beside its packed copy (a crash between the two steps) is left out."""
    found = {p for p in folder.glob("*.jsonl*") if p.name.endswith((PLAIN, PACKED)) and p.name.split(".")[0].isdigit()}
    double = {p for p in found if p.name.endswith(PLAIN) and p.with_name(p.name.removesuffix(PLAIN) + PACKED) in found}
    return sorted(found - double, key=_number)


def files_of_run(folder: Path, run_id: str) -> list[Path]:
    """The newest files that can hold turns of the run: back to the one that begins with another run. Empty: not in the record."""
    out: list[Path] = []
    for file in reversed(record_files(folder)):
        out.insert(0, file)
        start = next((e for e in read_record(file) if isinstance(e, Start)), None)
        if start is not None and start.status.run_id != run_id:
            break
    return out


def read_record(path: Path) -> Iterator[Start | RecordedTurn | Gap]:
    """Entries of a record: a folder, or one of its files. Raises RecordError when there is none, or it has another schema."""
    files = record_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise RecordError(f"{path}: no record of a rollout; the controller writes one from its first turn on")
    yield from read_files(files)


def read_files(files: Iterable[Path]) -> Iterator[Start | RecordedTurn | Gap]:
    """Entries of these files of a record, in this order."""
    for file in files:
        decoder = Decoder(str(file))
        try:
            with (gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")) as f:
                yield from _entries(file, cast("IO[bytes]", f), decoder)
        except FileNotFoundError:
            continue  # packed or removed by the controller while we read: its lines are gone or come again
        except _DAMAGE as e:
            yield Gap(str(file), f"can't be read: {e}")
        except RecordError:
            damage = _damage(file)
            if not damage:
                raise
            yield Gap(str(file), f"can't be read: {damage}")


_DAMAGE = (OSError, EOFError, zlib.error)


def _damage(file: Path) -> str:
    """What is wrong with a packed file as such; '' when nothing is. Its check sum comes after the lines."""
    if not file.name.endswith(PACKED):
        return ""
    try:
        with gzip.open(file, "rb") as f:
            while f.read(1 << 20):
                pass
    except _DAMAGE as e:
        return str(e)
    return ""


def _entries(file: Path, f: IO[bytes], decoder: Decoder) -> Iterator[Start | RecordedTurn | Gap]:
    number = 0
    while text := f.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(text) > LINE_BYTES_MAX:
            raise RecordError(f"{file}:{number}: a line of more than {LINE_BYTES_MAX} bytes; this is no record of a rollout")
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            decoder.lost()
            yield Gap(f"{file}:{number}", "half a line, cut off by a crash or still being written")
            continue
        if not isinstance(line, dict):
            raise RecordError(f"{file}:{number}: not a line of a record")
        entry = decoder.entry(cast("dict[str, Any]", line))
        if entry is not None:
            yield entry
