"""A handler of a hot route that fails: before its answer the plain way takes the request, behind it nobody answers again."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
import uvloop
from hafnium_raw_http import connect, read_answer

from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.hot_protocol import HotRequest, HotRoutes

PATIENCE_S = 30.0


async def plain(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    answer = b"plain " + body
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


def handler(request: HotRequest) -> bool:
    """Does what the body says."""
    match request.body:
        case b"fails":
            raise OSError("before its answer")
        case b"leaves":
            request.to_plain()
        case b"answers and fails":
            request.respond(b"", b"hot " + request.body)
            raise OSError("behind its answer")
        case b"leaves and fails":
            request.to_plain()
            raise OSError("behind what it left")
        case _:
            request.respond(b"", b"hot alone" if request.alone else b"hot, others are open")
    return True


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    routes = HotRoutes()
    routes.add("/", handler)
    config = uvicorn.Config(plain, http=routes.protocol_class(ConnectionLimits()), lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve([listening]))

    thread = threading.Thread(target=run)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(PATIENCE_S)
    listening.close()


def ask(s: socket.socket, body: bytes) -> bytes:
    s.sendall(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    return read_answer(s).body


@pytest.mark.parametrize(("body", "answer"), [
    (b"fails", b"plain fails"), (b"leaves", b"plain leaves"), (b"answers and fails", b"hot answers and fails"),
    (b"leaves and fails", b"plain leaves and fails"),
])
def test_each_request_has_one_answer_whatever_its_handler_does(port: int, body: bytes, answer: bytes) -> None:
    with connect(port) as s:
        for _ in range(3):
            assert ask(s, body) == answer
            assert ask(s, b"works") == b"hot alone"


def test_a_request_is_alone_while_no_other_connection_is_open(port: int) -> None:
    with connect(port) as one:
        assert ask(one, b"works") == b"hot alone"
        with connect(port) as another:
            assert ask(another, b"works") == b"hot, others are open"
            assert ask(one, b"works") == b"hot, others are open"
