"""A real HTTP receiver on loopback that can be gone, slow, broken or well, switched while it runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hafnium_rollout_gateway import free_port

LIMIT_S = 60.0


@dataclass(frozen=True)
class Request:
    """What came in, and what was answered: 0 is no whole answer."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def data(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """`mode`: a status to answer, `hang` (no answer), `drip` (a byte now and then), `cut` (closes after the head)."""

    mode: int | str = 200
    headers: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    requests: list[Request] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _release: threading.Event = field(default_factory=threading.Event)
    _server: ThreadingHTTPServer | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def start(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver._handle(self)

            def log_message(self, *_: object) -> None:
                pass

        ThreadingHTTPServer.daemon_threads = True
        self._release.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens any more."""
        self._release.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        mode = self.mode
        status = mode if isinstance(mode, int) else 0
        with self._came:
            self.requests.append(Request(handler.path, dict(handler.headers.items()), body, status))
            self._came.notify_all()
        handler.close_connection = True
        if isinstance(mode, int):
            handler.send_response(mode)
            for name, value in self.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "3")
            handler.end_headers()
            handler.wfile.write(b"ok\n")
        elif mode == "hang":
            self._release.wait(LIMIT_S)
        elif mode == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            try:
                while not self._release.wait(0.02):
                    handler.wfile.write(b"x")
            except OSError:
                return

    def wait_for(self, count: int, status: int | None = None) -> list[Request]:
        """The first requests (answered with `status`), as soon as there are so many."""
        def found() -> list[Request]:
            return [r for r in self.requests if status is None or r.status == status]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= count, LIMIT_S), f"{len(found())} of {count} came"
            return found()[:count]


@contextmanager
def receiver(mode: int | str = 200, *, started: bool = True) -> Generator[Receiver]:
    """A receiver that is stopped at the end, whatever happens."""
    found = Receiver(mode)
    if started:
        found.start()
    try:
        yield found
    finally:
        found.stop()
