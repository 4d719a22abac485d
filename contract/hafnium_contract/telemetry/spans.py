"""Spans of a server: one for each request whose trace is recorded, and its children.

Most requests are not recorded, and their cost is what counts: the decision is made here, from the caller's `traceparent` or a drawn id,
before OpenTelemetry hears of the request (its own way costs 5 to 10 µs for a span that nobody wants). Spans say which model answered,
how many rows, what kind of error; never a value of a feature, an entity, or the text of an error, which may quote the caller's input.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from hafnium_contract.telemetry.span_export import BoundedProcessor
from hafnium_contract.trace_context import TRACEPARENT, TRACESTATE, Sampling, TraceParent, traceparent_of, tracestate_of

Value = str | int | float | bool | Sequence[str]
KINDS = {"internal": SpanKind.INTERNAL, "client": SpanKind.CLIENT}


def nanoseconds(moment: float) -> int:
    """time.perf_counter() of the past → nanoseconds since 1970."""
    return time.time_ns() - int((time.perf_counter() - moment) * 1e9)


class GivenIds(RandomIdGenerator):
    """Ids of spans are drawn; that of a trace was drawn already, for the decision whether it is recorded."""

    def __init__(self) -> None:
        self.trace_id = 0

    def generate_trace_id(self) -> int:
        """The trace that was decided on."""
        return self.trace_id


class LiveSpan:
    """A span that is recorded. It ends once; what comes later is ignored (a row may have been answered before its batch came back)."""

    __slots__ = ("_ended", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._ended = False

    @property
    def trace_id(self) -> str:
        """As logs and tracing systems show it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def child(self, name: str, kind: str, *, start_ns: int | None = None, links: Sequence[LiveSpan] = ()) -> LiveSpan:
        """A span below this one."""
        found = [Link(one._span.get_span_context()) for one in links]
        started = self._tracer.start_span(name, set_span_in_context(self._span, Context()), KINDS[kind], links=found, start_time=start_ns)
        return LiveSpan(self._tracer, started)

    def link(self, other: LiveSpan) -> None:
        """Points at a span of another trace."""
        if not self._ended:
            self._span.add_link(other._span.get_span_context())

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Something that happened now."""
        if not self._ended:
            self._span.add_event(name, dict(attributes))

    def add(self, attributes: Mapping[str, Value]) -> None:
        """Sets attributes."""
        if not self._ended:
            self._span.set_attributes(dict(attributes))

    def end(self, error: str | None = None) -> None:
        """Ends now. `error`: its kind, a word of ours."""
        if self._ended:
            return
        self._ended = True
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def answered(self, status: int, kind: str | None) -> None:
        """Ends the span of a request. By OpenTelemetry's rules a refused request (4xx) is no error of the server."""
        if self._ended:
            return
        self._span.set_attribute("http.response.status_code", status)
        if kind is not None and status < 500:
            self._span.set_attribute("error.type", kind)
        self.end(kind or "internal" if status >= 500 else None)

    def lines(self) -> bytes:
        """Header lines that make the next server's span a child of this one."""
        context = self._span.get_span_context()
        lines = b"%s: 00-%032x-%016x-%02x\r\n" % (TRACEPARENT, context.trace_id, context.span_id, context.trace_flags)
        state = context.trace_state.to_header()
        return lines + b"%s: %s\r\n" % (TRACESTATE, state.encode("ascii")) if state else lines


class Tracing:
    """Decides which requests are recorded, and begins their spans. Used from the event loop only."""

    def __init__(self, provider: TracerProvider, processor: BoundedProcessor, ids: GivenIds, sampling: Sampling, version: str) -> None:
        self._tracer = provider.get_tracer("hafnium", version)
        self._processor = processor
        self._ids = ids
        self._sampling = sampling
        self._random = random.Random(secrets.randbits(256))  # noqa: S311 - ids have to differ, nobody has to fail to guess them

    def close(self, limit_s: float) -> None:
        """Sends what is left, for as long as this at most. Blocks."""
        self._processor.close(limit_s)

    def request(self, headers: Mapping[bytes, bytes], name: str, started: float) -> LiveSpan | None:
        """A server's span of a request; None when it is not recorded. `started`: time.perf_counter() at arrival."""
        given = headers.get(TRACEPARENT)
        parent = None if given is None else traceparent_of(given)
        trace_id = self._random.getrandbits(128) if parent is None else parent.trace_id
        if not self._sampling.keeps(trace_id, parent):
            return None
        return self._begin(headers, name, started, trace_id, parent)

    def accept(self, headers: Mapping[bytes, bytes], name: str, started: float) -> LiveSpan | bytes:
        """A server's span of a request that is recorded, else header lines for the next server: the caller's trace, not sampled, so that it
        is not recorded there either. Without a caller's trace an id is drawn that nobody records. Arguments as for `request`."""
        given = headers.get(TRACEPARENT)
        parent = None if given is None else traceparent_of(given)
        trace_id = self._random.getrandbits(128) if parent is None else parent.trace_id
        if self._sampling.keeps(trace_id, parent):
            return self._begin(headers, name, started, trace_id, parent)
        if parent is None:
            return b"traceparent: 00-%032x-%016x-00\r\n" % (trace_id or 1, trace_id & 0xFFFF_FFFF_FFFF_FFFF or 1)
        lines = b"%s: 00-%032x-%016x-00\r\n" % (TRACEPARENT, parent.trace_id, parent.span_id)
        state = tracestate_of(headers.get(TRACESTATE))
        return lines + b"%s: %s\r\n" % (TRACESTATE, state) if state else lines

    def _begin(
        self, headers: Mapping[bytes, bytes], name: str, started: float, trace_id: int, parent: TraceParent | None,
    ) -> LiveSpan:
        context = Context()
        if parent is None:
            self._ids.trace_id = trace_id or 1
        else:
            state = tracestate_of(headers.get(TRACESTATE)).decode("ascii")
            caller = SpanContext(
                parent.trace_id, parent.span_id, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED if parent.sampled else 0),
                trace_state=TraceState.from_header([state]) if state else TraceState(),
            )
            context = set_span_in_context(NonRecordingSpan(caller), context)
        span = self._tracer.start_span(name, context, SpanKind.SERVER, start_time=nanoseconds(started))
        return LiveSpan(self._tracer, span)
