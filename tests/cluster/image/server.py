"""A model server for tests: answers each request, fails every BAD_EVERY-th (0: none), and counts as transformer and predictor do.

COMPONENT and MODEL_VERSION become labels; SLOW_EVERY-th requests take SLOW_S longer. GET /healthz is not counted.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
BAD_EVERY = int(os.environ.get("BAD_EVERY", "0"))
SLOW_EVERY = int(os.environ.get("SLOW_EVERY", "0"))
SLOW_S = float(os.environ.get("SLOW_S", "0.2"))
VERSION = os.environ.get("MODEL_VERSION", "1")
LABELS = f'component="{os.environ.get("COMPONENT", "predictor")}",model_name="risk",model_version="{VERSION}"'
NUMBER = itertools.count(1)
LOCK = threading.Lock()
COUNTS = {"requests": 0, "errors": 0, "sum": 0.0}
BELOW = dict.fromkeys(BUCKETS_S, 0)


def metrics() -> bytes:
    """The Prometheus text format."""
    with LOCK:
        lines = ["# TYPE inference_requests_total counter", f"inference_requests_total{{{LABELS}}} {COUNTS['requests']}",
                 "# TYPE inference_errors_total counter"]
        if COUNTS["errors"]:  # as a real client does: a series with a label begins with its first event
            lines.append(f'inference_errors_total{{{LABELS},type="internal"}} {COUNTS["errors"]}')
        lines.append("# TYPE inference_duration_seconds histogram")
        lines += [f'inference_duration_seconds_bucket{{{LABELS},le="{b}"}} {n}' for b, n in BELOW.items()]
        lines += [f'inference_duration_seconds_bucket{{{LABELS},le="+Inf"}} {COUNTS["requests"]}',
                  f"inference_duration_seconds_count{{{LABELS}}} {COUNTS['requests']}",
                  f"inference_duration_seconds_sum{{{LABELS}}} {COUNTS['sum']}"]
    return ("\n".join(lines) + "\n").encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def _score(self) -> None:
        began = time.perf_counter()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        number = next(NUMBER)
        bad = BAD_EVERY > 0 and number % BAD_EVERY == 0
        if SLOW_EVERY > 0 and number % SLOW_EVERY == 0:
            time.sleep(SLOW_S)
        took = time.perf_counter() - began
        with LOCK:
            COUNTS["requests"] += 1
            COUNTS["errors"] += bad
            COUNTS["sum"] += took
            for bound in BUCKETS_S:
                BELOW[bound] += took <= bound
        self._answer(500 if bad else 200, f'{{"version": "{VERSION}"}}'.encode(), "application/json")

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, metrics(), "text/plain; version=0.0.4")
        elif self.path == "/healthz":
            self._answer(200, b"ok", "text/plain")
        else:
            self._score()

    do_POST = _score  # noqa: N815 - a name that http.server calls

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-hafnium-model-version", VERSION)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as process 1 nothing else would end it
    ThreadingHTTPServer(("", 8080), Handler).serve_forever()
