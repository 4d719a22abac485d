"""More than one process behind one port: a supervisor that holds the socket, and workers that accept from it.

Each worker is the same command again, told by its environment that it is one. The socket stays open while workers come and go, so
a crash loses what that worker had in hand and nothing else. Metrics of all workers are one: prometheus_client's multiprocess mode, in
a folder that the supervisor makes; the counters of a worker that died stay in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hafnium_contract.lifeline import tied_to_parent

log = logging.getLogger("hafnium.workers")
_SOCKET, _FOLDER, _NUMBER, _COUNT = "HAFNIUM_WORKER_SOCKET", "PROMETHEUS_MULTIPROC_DIR", "HAFNIUM_WORKER", "HAFNIUM_WORKERS_ALL"
_HASH_KEY = "HAFNIUM_ENTITY_HASH_KEY"
BACKLOG = 2048
STOP_SPARE_S = 2.0
"""What a worker needs beside its own limits: to notice SIGTERM, to close, to end Python."""
_LOOK_S = 0.1
_BAD_ARGUMENTS = 2
"""Exit status of a part that can't start as it is configured."""
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.2, 10.0
"""Before a crashed worker is started again; twice as long each time that it did not live for a minute."""
_HEALTHY_S = 60.0


def worker_socket() -> socket.socket | None:
    """The socket to accept from, in a worker; None in a process that is its own."""
    fd = os.environ.get(_SOCKET)
    return None if fd is None else socket.socket(fileno=os.dup(int(fd)))


def is_worker() -> bool:
    """Whether a supervisor started this process."""
    return _SOCKET in os.environ


def say_ready() -> None:
    """Tells the other workers that this one could answer."""
    if is_worker():
        (Path(os.environ[_FOLDER]) / f"ready-{os.environ[_NUMBER]}").touch()


def others_missing() -> int:
    """Workers that were never ready. A pod is ready when each of its workers could answer."""
    if not is_worker():
        return 0
    return int(os.environ[_COUNT]) - len(list(Path(os.environ[_FOLDER]).glob("ready-*")))


class _Worker:
    def __init__(self, number: int, start: Callable[[int], subprocess.Popen[bytes]]) -> None:
        self.number = number
        self._start = start
        self.process = start(number)
        self._began = time.monotonic()
        self._pause_s = _PAUSE_FIRST_S
        self._again_at = 0.0

    def look(self, now: float) -> None:
        """Starts it again when it has died."""
        status = self.process.poll()
        if status is None:
            return
        if not self._again_at:
            lived = now - self._began
            self._pause_s = _PAUSE_FIRST_S if lived > _HEALTHY_S else min(self._pause_s * 2.0, _PAUSE_MAX_S)
            self._again_at = now + self._pause_s
            log.error("worker %d ended with %d after %.0f s; started again in %.1f s", self.number, status, lived, self._pause_s)
            forget(self.process.pid)
        elif now >= self._again_at:
            self._again_at, self._began = 0.0, now
            self.process = self._start(self.number)


def forget(pid: int) -> None:
    """Drops gauges of a process that is gone; its counters stay."""
    from prometheus_client import multiprocess

    with contextlib.suppress(OSError):
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def supervise(module: str, argv: Sequence[str], *, host: str, port: int, workers: int, stop_s: float) -> int:
    """Runs `python -m module argv` `workers` times on one socket until SIGTERM. Returns the exit status: that of the worst worker.

    `stop_s`: seconds that they get after it before they are killed. It has to hold all that their settings let them wait for.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(BACKLOG)
    folder = Path(tempfile.mkdtemp(prefix="hafnium-workers-"))
    environment = {
        **os.environ, _SOCKET: str(listening.fileno()), _FOLDER: str(folder), _COUNT: str(workers),
        # drawn once: each worker would draw its own, and an entity would have as many hashes
        _HASH_KEY: os.environ.get(_HASH_KEY) or secrets.token_hex(32),
    }
    os.environ[_FOLDER] = str(folder)

    def start(number: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *argv], env={**environment, _NUMBER: str(number)}, pass_fds=[listening.fileno()],
            preexec_fn=tied_to_parent(),
        )

    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    running = [_Worker(i, start) for i in range(workers)]
    try:
        while not stopping:
            time.sleep(_LOOK_S)
            if any(worker.process.poll() == _BAD_ARGUMENTS for worker in running):
                break  # it would end so each time
            for worker in running:
                worker.look(time.monotonic())
        listening.close()  # the workers' copies close with them: until then connections wait in the socket's queue
        for worker in running:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + stop_s
        for worker in running:
            try:
                worker.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                log.error("worker %d did not stop within %g s and is killed", worker.number, stop_s)
                worker.process.kill()
        ended = [worker.process.wait() for worker in running]
        return max(0 if status == -signal.SIGTERM else abs(status) for status in ended)  # one that was still starting dies of it
    finally:
        for worker in running:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        shutil.rmtree(folder, ignore_errors=True)
