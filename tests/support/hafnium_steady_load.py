"""Clients that ask without a pause over kept-alive connections while a server is stopped, and what they lost by it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from hafnium_raw_http import closed_within, connect, read_answer

_PATIENCE_S = 60.0


class SteadyLoad:
    """`with` starts the clients and waits for them at the end. A client ends when the server closes its connection, or by `finish`."""

    def __init__(self, port: int, requests: Sequence[bytes], clients: int) -> None:
        self._port = port
        self._requests = requests
        self._ending = threading.Event()
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(k,)) for k in range(clients)]
        self.done = 0
        """Answers that came, good or not."""
        self.lost: list[bytes] = []
        """Answers that are no 200, and connections that closed before `ending` was said."""

    def __enter__(self) -> Self:
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.finish()
        for t in self._threads:
            t.join(_PATIENCE_S)

    def ending(self) -> None:
        """From now on the server may close connections between two requests, as each server does that stops."""
        self._ending.set()

    def finish(self) -> None:
        """The clients end after the answer that they wait for."""
        self._finished.set()
        self.ending()

    def wait_for(self, answers: int) -> None:
        """Waits until so many more answers came. Raises AssertionError when they don't."""
        wanted, until = self.done + answers, time.monotonic() + _PATIENCE_S
        while self.done < wanted and time.monotonic() < until:
            time.sleep(0.01)
        assert self.done >= wanted, f"{self.done} answers; lost: {self.lost[:3]}"

    def _client(self, k: int) -> None:
        with connect(self._port) as s:
            while not self._finished.is_set():
                try:
                    s.sendall(self._requests[k % len(self._requests)])
                    first = s.recv(1, socket.MSG_PEEK)
                except ConnectionError:
                    first = b""
                if not first:
                    if not self._ending.is_set():
                        self._lose(b"closed before the signal")
                    return
                try:
                    answer = read_answer(s)
                except (AssertionError, OSError) as e:  # half an answer
                    self._lose(repr(e).encode())
                    return
                if answer.status != 200:
                    self._lose(answer.status_line + b" " + answer.body[:400])
                with self._lock:
                    self.done += 1
                k += 1
                if (b"connection", b"close") in answer.headers:
                    if closed_within(s, _PATIENCE_S):
                        self._lose(b"something came behind the last answer")
                    return

    def _lose(self, what: bytes) -> None:
        with self._lock:
            self.lost.append(what)
