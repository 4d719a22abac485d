"""An inference log in a bucket, as a folder of this machine: new files are fetched once, old ones are only names.

Pairs of scores (score_pairs.py) need which files there are and the contents of new ones. Only the partitions of today and yesterday are
listed: a shadow step compares what comes in now. What was there at the first look is never read, so it is an empty file here.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any, cast

from hafnium_rollout.errors import StateError

FILES_PER_LOOK_MAX = 64
"""As many as score_pairs.py reads at a look."""
FILE_BYTES_MAX = 64 * 1024 * 1024
"""The transformer's largest are 5,000 rows: half a megabyte."""


class LogMirror:
    """One place in a bucket. Not safe between threads."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._uri, self._folder = uri, folder
        self._opened: tuple[Any, str] | None = None

    def refresh(self, now: datetime, *, began_anew: bool) -> Path:
        """The folder with what is new. `began_anew`: nobody has read anything yet. Raises StateError."""
        try:
            names = self._names(now)
            missing = [n for n in names if not (self._folder / n).exists()]
            for name in missing if began_anew else missing[:FILES_PER_LOOK_MAX]:
                self._fetch(name, empty=began_anew)
            for old in set(self._known()) - set(names):
                (self._folder / old).unlink(missing_ok=True)
        except Exception as e:
            self._opened = None  # a connection that failed is opened anew
            raise StateError(f"inference log {self._uri.partition('?')[0]}: it can't be read: {e}") from e
        return self._folder

    def _names(self, now: datetime) -> list[str]:
        """Files of the last two days below the place, oldest first."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, prefix = self._open()
        found: list[str] = []
        for day in (now - timedelta(days=1), now):
            selector = FileSelector(f"{prefix}/date={day:%Y-%m-%d}", recursive=True, allow_not_found=True)
            found += [
                str(PurePosixPath(i.path).relative_to(prefix)) for i in cast("list[Any]", filesystem.get_file_info(selector))
                if i.type == FileType.File and i.base_name.startswith("part-") and i.extension == "parquet"]
        return sorted(found, key=lambda n: PurePosixPath(n).name)

    def _known(self) -> list[str]:
        return [str(p.relative_to(self._folder)) for p in self._folder.glob("date=*/model_version=*/part-*.parquet")]

    def _fetch(self, name: str, *, empty: bool) -> None:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if empty:
            target.touch()
            return
        filesystem, prefix = self._open()
        with filesystem.open_input_stream(f"{prefix}/{name}") as f:
            data = f.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise StateError(f"{name} is larger than {FILE_BYTES_MAX} bytes")
        staging = target.with_name(f".{target.name}")
        staging.write_bytes(data)
        staging.replace(target)  # a process that is killed here leaves no half file under a name that counts

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem

            filesystem, prefix = FileSystem.from_uri(self._uri)
            self._opened = (filesystem, prefix.rstrip("/"))
        return self._opened
