"""Files that are whole or not there: how everything between processes is written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, flushes to disk, and renames: a reader sees the old text or the new, also after a power cut.

    Makes the folder when it is missing. Raises OSError; the old file is then still whole.
    """
    with replacing(path) as f:
        f.write(text.encode())


@contextmanager
def replacing(path: Path) -> Generator[IO[bytes]]:
    """A file to write bytes to that becomes `path` at the end of `with`; see `write_atomically`. Any error leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, staging = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        Path(staging).chmod(0o644)
        Path(staging).replace(path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Names that were made in the folder are on the disk, also after a power cut. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such thing; there is nothing better to do there
            raise
    finally:
        os.close(fd)
