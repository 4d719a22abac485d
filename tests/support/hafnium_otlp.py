"""A collector for tests: a real HTTP server that takes OTLP's protobuf, as OpenTelemetry's exporters send it, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

WAIT_S = 60.0


@dataclass(frozen=True)
class SeenSpan:
    """A span as it arrived."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    """'' at the root."""
    links: tuple[tuple[str, str], ...]
    """(trace, span)."""
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, Mapping[str, Any]], ...]
    status: int
    """0 unset, 2 error."""
    status_message: str
    trace_state: str
    start_ns: int
    end_ns: int
    resource: Mapping[str, Any]


def _value(v: Any) -> Any:
    kind = v.WhichOneof("value")
    return [_value(x) for x in v.array_value.values] if kind == "array_value" else getattr(v, kind)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {p.key: _value(p.value) for p in pairs}


def parse(body: bytes) -> list[SeenSpan]:
    """The spans of an export request."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    found: list[SeenSpan] = []
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            found += [SeenSpan(
                resource["service.name"], s.name, s.kind, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex(),
                tuple((link.trace_id.hex(), link.span_id.hex()) for link in s.links), _attributes(s.attributes),
                tuple((e.name, _attributes(e.attributes)) for e in s.events), s.status.code, s.status.message, s.trace_state,
                s.start_time_unix_nano, s.end_time_unix_nano, resource,
            ) for s in scope.spans]
    return found


class Collector:
    """`with Collector() as c`: listens on a free port. `delay_s` and `status` say how it misbehaves."""

    def __init__(self, delay_s: float = 0.0, status: int = 200) -> None:
        self.delay_s = delay_s
        self.status = status
        self.requests = 0
        self.raw: list[bytes] = []
        self._spans: list[SeenSpan] = []
        self._lock = threading.Lock()
        self._released = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector._take(self.path, self.headers.get("content-type", ""), body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _take(self, path: str, kind: str, body: bytes) -> None:
        assert (path, kind) == ("/v1/traces", "application/x-protobuf")
        with self._lock:
            self.requests += 1
            self.raw.append(body)
            if self.status == 200:
                self._spans += parse(body)
        if self.delay_s:
            self._released.wait(self.delay_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """What a server needs in its environment to send here, soon."""
        return {"HAFNIUM_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    @property
    def spans(self) -> list[SeenSpan]:
        with self._lock:
            return list(self._spans)

    def wait(self, condition: Callable[[list[SeenSpan]], bool]) -> list[SeenSpan]:
        """Waits until the spans that came are so. Raises AssertionError with those that did come."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            spans = self.spans
            if condition(spans):
                return spans
            time.sleep(0.02)
        raise AssertionError(f"the spans never came to be so: {[(s.service, s.name, s.trace_id, s.attributes) for s in self.spans]}")

    def trace(self, trace_id: str, count: int) -> list[SeenSpan]:
        """The spans of a trace, when that many have come; in the order of their beginning."""
        self.wait(lambda spans: sum(s.trace_id == trace_id for s in spans) >= count)
        found = [s for s in self.spans if s.trace_id == trace_id]
        assert len(found) == count, [(s.service, s.name) for s in found]
        return sorted(found, key=lambda s: s.start_ns)
