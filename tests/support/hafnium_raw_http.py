"""Raw bytes to a server and what comes back, to hold two servers against each other."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass

SENTINEL = b"GET /v2/health/live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
"""Sent last: its answer ends the connection, so that nobody has to wait for silence, unless a body swallowed it."""
SILENCE_S = 0.4
_CHANGING = (b"date",)


@dataclass(frozen=True)
class RawAnswer:
    status_line: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    """Sorted, without those that change from second to second."""
    body: bytes

    @property
    def status(self) -> int:
        return int(self.status_line.split()[1])


def connect(port: int, timeout_s: float = 30.0) -> socket.socket:
    """A connection whose bytes leave at once."""
    s = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def read_answer(s: socket.socket) -> RawAnswer:
    """One whole answer. Raises AssertionError when the connection ends before it does."""
    raw = b""
    while not _whole(raw):
        part = s.recv(2**16)
        assert part, f"the connection ended after {raw[:300]!r}"
        raw += part
    return answers(raw)[0]


def ask(port: int, sent: bytes) -> RawAnswer:
    """The answer to one request on a connection of its own."""
    with connect(port) as s:
        s.sendall(sent)
        return read_answer(s)


def closed_within(s: socket.socket, seconds: float) -> bytes:
    """What comes until the server closes. Raises TimeoutError when it does not."""
    raw, until = b"", time.monotonic() + seconds
    while True:
        s.settimeout(max(until - time.monotonic(), 0.01))
        try:
            part = s.recv(2**16)
        except ConnectionError:
            return raw
        if not part:
            return raw
        raw += part


def _whole(raw: bytes) -> bool:
    head, end, body = raw.partition(b"\r\n\r\n")
    if not end:
        return False
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(body) >= int(lengths[0]) if lengths else True


def exchange(port: int, pieces: list[bytes], *, sentinel: bool = True, silence_s: float = SILENCE_S) -> bytes:
    """Sends the pieces in segments of their own and returns everything that came back."""
    with socket.create_connection(("127.0.0.1", port), timeout=5.0) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        try:
            for piece in [*pieces, *([SENTINEL] if sentinel else [])]:
                s.sendall(piece)
                s.settimeout(0.004)  # what has come by now is read, and the server looks at the piece on its own
                with contextlib.suppress(TimeoutError):
                    received += s.recv(2**20)
            s.settimeout(silence_s)
            while part := s.recv(2**20):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


def answers(raw: bytes) -> list[RawAnswer]:
    """Answers one after another; what is cut off is the body of the last."""
    found: list[RawAnswer] = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = [(n.lower(), v.strip()) for n, _, v in (line.partition(b":") for line in lines[1:])]
        length = int(dict(headers).get(b"content-length", b"0"))
        found.append(RawAnswer(lines[0], tuple(sorted(h for h in headers if h[0] not in _CHANGING)), rest[:length]))
        raw = rest[length:]
    return found
