"""Clients that read slowly get their answers whole; those that don't read, or for too long, are cut off. A real uvicorn, real sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
import uvloop

from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.hot_protocol import HotRequest, HotRoutes
from hafnium_contract.serving.limited_protocol import limited_protocol_class

BODY = bytes(range(256)) * (12 * 4096)
"""12 MB: several times of what two sockets hold."""
PATIENCE_S = 60.0
ASK = b"POST /large HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(BODY))]})
    await send({"type": "http.response.body", "body": BODY})


def large(request: HotRequest) -> bool:
    request.respond(b"", BODY)
    return True


@contextmanager
def serving(limits: ConnectionLimits, *, hot: bool) -> Iterator[int]:
    """A server in a thread; its port."""
    routes = HotRoutes()
    routes.add("/large", large)
    protocol = routes.protocol_class(limits) if hot else limited_protocol_class(limits)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve([listening]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(PATIENCE_S)
        listening.close()


def asked(port: int) -> socket.socket:
    """A client that has asked, and whose system takes 64 kB for it."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    s.settimeout(PATIENCE_S)
    s.connect(("127.0.0.1", port))
    s.sendall(ASK)
    return s


def read(s: socket.socket, part_bytes: int, pause_s: float) -> bytes:
    """The answer's body, a part at a time, to its end or to the connection's."""
    raw = b""
    while len(raw.partition(b"\r\n\r\n")[2]) < len(BODY):
        try:
            part = s.recv(part_bytes)
        except ConnectionError:
            part = b""
        if not part:
            break
        raw += part
        time.sleep(pause_s)
    return raw.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("hot", [True, False], ids=["hot path", "plain path"])
def test_a_client_that_reads_slowly_gets_all_of_it(hot: bool) -> None:
    """It takes several times `write_timeout_s`, and never that long for nothing."""
    with serving(ConnectionLimits(write_timeout_s=1.0, write_total_timeout_s=600.0), hot=hot) as port, asked(port) as s:
        began = time.monotonic()
        assert read(s, 128 * 1024, 0.04) == BODY
        assert time.monotonic() - began > 2.0, "it was to be slow"


@pytest.mark.parametrize("hot", [True, False], ids=["hot path", "plain path"])
def test_a_client_that_reads_nothing_is_cut_off(hot: bool) -> None:
    with serving(ConnectionLimits(write_timeout_s=1.0, write_total_timeout_s=600.0), hot=hot) as port, asked(port) as s:
        time.sleep(4.0)
        assert len(read(s, 2**20, 0.0)) < len(BODY)


def test_a_client_that_stops_in_the_middle_is_cut_off() -> None:
    with serving(ConnectionLimits(write_timeout_s=1.0, write_total_timeout_s=600.0), hot=True) as port, asked(port) as s:
        for _ in range(10):
            s.recv(64 * 1024)
            time.sleep(0.1)
        time.sleep(4.0)
        assert len(read(s, 2**20, 0.0)) < len(BODY)


def test_however_steadily_it_reads_there_is_an_end() -> None:
    with serving(ConnectionLimits(write_timeout_s=1.0, write_total_timeout_s=2.0), hot=True) as port, asked(port) as s:
        assert len(read(s, 16 * 1024, 0.05)) < len(BODY)  # all of it would take forty seconds
