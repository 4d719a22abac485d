"""A collector for the benchmark: takes OTLP over HTTP, counts the bytes and keeps nothing. GET says how many requests with spans came.

As cheap as can be: what is measured is what recording costs the servers, not what a collector costs beside them.
"""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    came = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        Receiver.came += bool(body)
        self._answer(b"", "application/x-protobuf")

    def do_GET(self) -> None:
        self._answer(b"%d" % Receiver.came, "text/plain")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        return


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["BENCH_PORT"])), Receiver).serve_forever()
