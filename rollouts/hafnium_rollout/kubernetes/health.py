"""/health/live, /health/ready and /metrics on a port of their own. A standby is ready: it can take over at any moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

Answer = tuple[int, str]


class HealthServer:
    """Answers until `close`. `live` and `ready` return why not; empty when all is well."""

    def __init__(self, host: str, port: int, live: Callable[[], str], ready: Callable[[], str], metrics: Callable[[], bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, metrics(), CONTENT_TYPE_LATEST)
                elif path in ("/health/live", "/health/ready"):
                    why = (live if path == "/health/live" else ready)()
                    self._answer(503 if why else 200, (why or "ok").encode() + b"\n", "text/plain; charset=utf-8")
                else:
                    self._answer(404, b"/health/live, /health/ready, /metrics\n", "text/plain; charset=utf-8")

            def _answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Probes come every few seconds; they are no part of a rollout's story."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
