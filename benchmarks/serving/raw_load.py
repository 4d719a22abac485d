"""Load at a constant rate, whatever the servers do (open loop), or as fast as they answer (closed loop). A process of its own.

wrk asks again only when it has its answer, so a server that is too slow is asked less: it never sees an overload. Here each request
has a moment at which it is due, and its latency counts from that moment. One thread, epoll and plain sockets: about 25 µs of CPU a
request, which it takes from the same machine and reports.

    python raw_load.py PORT PATH BODIES --connections 64 --seconds 5 [--rate 4000]      one line of JSON
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

SEND_EARLY_S = 0.0005
DRAIN_S = 5.0
"""How long late answers are waited for after the last request."""


class Connection:
    """One request at a time."""

    __slots__ = ("due", "fd", "got", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.fd = self.socket.fileno()
        self.got = b""
        self.due = 0.0


def status_of(raw: bytes) -> int:
    """Status of an answer that is whole, else 0."""
    end = raw.find(b"\r\n\r\n")
    if end < 0:
        return 0
    at = raw.find(b"content-length: ", 0, end)
    stop = raw.find(b"\r\n", at)
    return int(raw[9:12]) if len(raw) >= end + 4 + int(raw[at + 16 : stop]) else 0


class Load:
    """Asks, and keeps what came back: latencies in seconds by status."""

    def __init__(self, port: int, requests: list[bytes], connections: int, warm_s: float) -> None:
        self._requests = requests
        self._port = port
        self._poll = select.epoll()
        self._idle: deque[Connection] = deque()
        self._by_fd: dict[int, Connection] = {}
        for _ in range(connections):
            self._open()
        self._warm_s = warm_s
        self.latencies: dict[int, list[float]] = {}
        self.asked = 0
        self.broken = 0
        self.late = 0
        """How often requests were due while no connection was free: they wait in here, and their latency says so."""
        self.cpu_s = 0.0

    def _open(self) -> None:
        connection = Connection(self._port)
        self._by_fd[connection.fd] = connection
        self._poll.register(connection.fd, select.EPOLLIN)
        self._idle.append(connection)

    def _send(self, due: float) -> None:
        connection = self._idle.popleft()
        connection.due = due
        try:
            connection.socket.send(self._requests[self.asked % len(self._requests)])
        except OSError:
            self._break(connection)
        self.asked += 1

    def _break(self, connection: Connection) -> None:
        self.broken += 1
        self._poll.unregister(connection.fd)
        del self._by_fd[connection.fd]
        connection.socket.close()
        self._open()

    def _receive(self, timeout_s: float, counts_from: float) -> int:
        answered = 0
        for fd, _ in self._poll.poll(timeout_s):
            connection = self._by_fd[fd]
            try:
                part = connection.socket.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            if not part:
                self._break(connection)
                continue
            connection.got += part
            status = status_of(connection.got)
            if not status:
                continue
            now = time.perf_counter()
            if connection.due >= counts_from:
                self.latencies.setdefault(status, []).append(now - connection.due)
            connection.got = b""
            self._idle.append(connection)
            answered += 1
        return answered

    def closed(self, seconds: float) -> float:
        """As fast as the answers come. Returns the seconds that were measured."""
        began = time.perf_counter()
        counts_from, until = began + self._warm_s, began + self._warm_s + seconds
        cpu = 0.0
        while (now := time.perf_counter()) < until:
            if now >= counts_from and not cpu:
                cpu = time.process_time()
            while self._idle:
                self._send(time.perf_counter())
            self._receive(0.1, counts_from)
        self.cpu_s = time.process_time() - cpu
        return seconds

    def open(self, seconds: float, rate: float) -> float:
        """`rate` requests a second, due at equal distances. Returns the seconds that were measured."""
        began = time.perf_counter()
        counts_from, until = began + self._warm_s, began + self._warm_s + seconds
        gap, due, cpu = 1.0 / rate, began, 0.0
        while due < until:
            now = time.perf_counter()
            if now >= counts_from and not cpu:
                cpu = time.process_time()
            while due <= now + SEND_EARLY_S and due < until and self._idle:
                self._send(due)
                due += gap
            if due <= now and not self._idle:
                self.late += 1
            self._receive(max(min(due - time.perf_counter(), 0.001), 0.0) if self._idle else 0.01, counts_from)
        self.cpu_s = time.process_time() - cpu
        give_up = time.perf_counter() + DRAIN_S
        while len(self._idle) < len(self._by_fd) and time.perf_counter() < give_up:
            self._receive(0.05, counts_from)
        return seconds

    @property
    def unanswered(self) -> int:
        return len(self._by_fd) - len(self._idle)


def quantile_ms(values: list[float], q: float) -> float:
    """The q-quantile in milliseconds; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] * 1000.0 if ordered else 0.0


def requests_of(path: str, bodies: Path) -> list[bytes]:
    """Whole requests, one for each line of the file."""
    head = b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    return [head % (path.encode(), len(body), body) for line in bodies.read_text().splitlines() if (body := line.encode())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm", type=float, default=1.0, help="seconds before, which don't count")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: closed loop")
    args = parser.parse_args()
    load = Load(args.port, requests_of(args.path, args.bodies), args.connections, args.warm)
    seconds = load.open(args.seconds, args.rate) if args.rate else load.closed(args.seconds)
    statuses = {
        str(status): {"count": len(v), "p50_ms": quantile_ms(v, 0.5), "p99_ms": quantile_ms(v, 0.99), "max_ms": max(v) * 1000.0}
        for status, v in sorted(load.latencies.items())
    }
    print(json.dumps({
        "seconds": seconds, "statuses": statuses, "asked": load.asked, "broken": load.broken, "unanswered": load.unanswered,
        "waited_for_a_connection": load.late, "generator_cpu_share": load.cpu_s / seconds,
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
