"""One run at a time: two loops on one evidence folder would judge the same rows twice, and share one alpha."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hafnium_monitoring.errors import BusyError


@contextmanager
def evidence_lock(folder: Path) -> Generator[None]:
    """Holds `<folder>/.drift.lock`. Raises BusyError when another process does; the kernel frees it when that one dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".drift.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BusyError(f"{folder}: another drift run writes here; wait for it, or end it first") from e
        yield
