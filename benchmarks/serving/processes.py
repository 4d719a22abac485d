"""Servers of the benchmark: started on free ports, waited for, measured by what the kernel counts, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_S = 90.0


def end_in_order() -> None:
    """A benchmark that is told to end (SIGTERM) ends like one that is done: what it started is stopped."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def own_environment() -> dict[str, str]:
    """What a server inherits. Feast, when this process imported it, tells prometheus_client by the environment that there are many
    processes; every server would then count in files, which takes several times as long."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PROMETHEUS_MULTIPROC")}


@dataclass
class Process:
    """A server. CPU and memory are those of all its processes."""

    name: str
    argv: Sequence[str]
    port: int
    log: Path
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    ready: str | None = "/"
    cwd: str = "/"
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self.running = subprocess.Popen(
                self.argv, stdout=out, stderr=subprocess.STDOUT, env={**own_environment(), **self.env}, cwd=self.cwd, start_new_session=True
            )

    def wait(self) -> None:
        """Raises RuntimeError with the end of the log when it does not come up."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            assert self.running is not None
            if self.running.poll() is not None:
                break
            try:
                if self.ready is None:
                    with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                        return
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.ready}", timeout=2) as answer:
                    if answer.status < 400:
                        return
            except urllib.error.HTTPError as e:
                if e.code in (404, 405):  # it speaks HTTP and has no such page
                    return
            except OSError:
                pass
            time.sleep(0.1)
        tail = self.log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{self.name} did not come up:\n{tail}")

    def _all(self) -> list[psutil.Process]:
        if self.running is None:
            return []
        try:
            own = psutil.Process(self.running.pid)
            return [own, *own.children(recursive=True)]
        except psutil.Error:
            return []

    def cpu_ns(self) -> int:
        """Nanoseconds that its threads have run, from the scheduler (finer than the ticks of /proc/PID/stat)."""
        total = 0
        for process in self._all():
            for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                try:
                    total += int(path.read_text().split()[0])
                except OSError:
                    continue
        return total

    def rss_mb(self) -> float:
        """Proportional memory: pages that several of its processes share count once."""
        total = 0
        for process in self._all():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total / 2**20

    def suspend(self) -> None:
        """SIGSTOP to all of its processes, parents first, so that none sees a child stand still."""
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        """SIGCONT to all of them, children first."""
        for process in reversed(self._all()):
            with contextlib.suppress(psutil.Error):
                process.resume()

    def stop(self) -> None:
        if self.running is None:
            return
        self.resume()
        everybody = self._all()
        self.running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running.wait(15)
        for process in everybody:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.running.wait(5)
        self.running = None


def python_module(*args: str) -> list[str]:
    """argv of a module of this environment."""
    return [sys.executable, "-m", *args]
