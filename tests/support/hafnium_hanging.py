"""Files that hang: whoever opens one waits in the kernel, as with a server of files that doesn't answer."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hanging(file: Path) -> Generator[None]:
    """Nobody gets the file open until the end of the block: a lease on it is held here. Linux breaks it after 45 s."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel says that somebody waits
    fd = os.open(file, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(fd)
        signal.signal(signal.SIGIO, before)
