"""The floor of one connection: the system calls of a predictor, or of a chain, with `session.run` in it and nothing else. No server.

It reads no header, checks nothing and answers every request alike, so nothing in Python that does the work can be faster. What it
makes over a peer is the most that a ratio to that peer can be on this machine. With more connections it is no floor: it doesn't batch.

BENCH_STORE=HOST:PORT of Redis and BENCH_PREDICTOR make it a chain: ask Redis, then the other one, then answer. BENCH_REFUSE=1 makes
it the floor of a refusal: 503, without a look.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import uvloop
from onnx_session import open_session

BODY = b'{"predictions":[0.0123456789],"intervals":[[0.0012345678,0.0234567891]]}'.ljust(300)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
ASKED = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: h\r\ncontent-length: 250\r\n\r\n".ljust(320)
LOOKUP = b"*10\r\n$5\r\nHMGET\r\n$1\r\nk\r\n" + b"".join(b"$4\r\nf%03d\r\n" % n for n in range(8))


class Hop(asyncio.Protocol):
    """One connection to somebody else; answers come in the order of requests."""

    def __init__(self) -> None:
        self._due: deque[Callable[[], None]] = deque()
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._due:
            self._due.popleft()()

    def ask(self, request: bytes, done: Callable[[], None]) -> None:
        self._due.append(done)
        self.transport.write(request)


class Floor(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, work: Callable[[Callable[[], None]], None], answer: bytes) -> None:
        self._work = work
        self._bytes = answer
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._work(self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(self._bytes)


async def hop_to(address: str) -> Hop:
    host, _, port = address.partition(":")
    _, hop = await asyncio.get_running_loop().create_connection(Hop, host, int(port))
    return hop


async def main() -> None:
    predictor = os.environ.get("BENCH_PREDICTOR")
    answer = ANSWER
    if os.environ.get("BENCH_REFUSE"):
        answer = REFUSAL

        def work(done: Callable[[], None]) -> None:
            done()
    elif predictor:
        store, behind = await hop_to(os.environ["BENCH_STORE"]), await hop_to(predictor)

        def work(done: Callable[[], None]) -> None:
            store.ask(LOOKUP, lambda: behind.ask(ASKED, done))
    else:
        session = open_session()
        row = {session.get_inputs()[0].name: np.zeros((1, session.get_inputs()[0].shape[1]), np.float32)}

        def work(done: Callable[[], None]) -> None:
            session.run(None, row)
            done()

    server = await asyncio.get_running_loop().create_server(lambda: Floor(work, answer), "127.0.0.1", int(os.environ["BENCH_PORT"]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
