"""A real Redis for tests, on a free port of 127.0.0.1, without persistence."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from hafnium_servers import free_port


class Redis:
    """`with` starts and stops it."""

    def __init__(self, folder: Path, *options: str) -> None:
        program = shutil.which("redis-server")
        if program is None:
            said = "no redis-server here (Debian: apt-get install redis-server)"
            if os.environ.get("CI"):
                pytest.fail(said)
            pytest.skip(said)
        self.port = free_port()
        self._argv = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                      "--dir", str(folder), *options]
        self._log = folder / f"redis-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """As Feast's connection_string."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._argv, stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + 20.0
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as s:
                    s.sendall(b"PING\r\n")
                    if s.recv(64):  # +PONG, or that it wants a password first
                        return self
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"Redis did not start:\n{self._log.read_text()}")

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL; what it held is gone."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def stall(self) -> None:
        """It keeps its connections and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
