"""No orphans: a child process that the kernel ends together with its parent, however the parent ends.

Linux only (PR_SET_PDEATHSIG). Elsewhere a killed parent leaves its children behind; docs/limits.md says so.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def tied_to_parent() -> Callable[[], None]:
    """A `preexec_fn` by which a child dies (SIGKILL) with this process. Call it, and start the child, in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children are started from the main thread: PR_SET_PDEATHSIG fires when the forking thread ends")
    parent = os.getpid()

    def tie() -> None:  # runs between fork and exec: nothing but system calls
        if not _LINUX:
            return
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return tie
