"""One run at a time: two loops on one evidence folder would judge the same rows twice, and share one alpha."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hafnium_contract.errors import InputError
from hafnium_monitoring.errors import BusyError


@contextmanager
def evidence_lock(folder: Path) -> Generator[None]:
    """Holds `<folder>/.drift.lock`; the kernel frees it when its holder dies.

    Raises BusyError when another process holds it, InputError when there can't be such a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".drift.lock").open("a")
    except OSError as e:
        raise InputError(f"{folder}: can't be used as an evidence folder: {e.strerror}") from e
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BusyError(f"{folder}: another drift run writes here; wait for it, or end it first") from e
        yield
