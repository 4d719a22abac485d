"""Spans on their way out: OpenTelemetry's batch processor and OTLP exporter, with the two things that they lack.

A span that is lost is counted, whatever lost it: no room in the queue, a collector that refused or did not answer, the end of the
process. And the end has a limit: the processor alone would wait for a silent collector for 30 s, longer than Kubernetes does.
No request ever waits for a span: the queue is bounded, and a thread sends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

Dropped = Callable[[str, int], None]
"""Counts lost spans: why, how many."""


class _CountingExporter(SpanExporter):
    """Counts the spans that it was given and those that did not arrive. One thread of the processor calls it at a time."""

    def __init__(self, inner: SpanExporter, dropped: Dropped) -> None:
        self._inner = inner
        self._dropped = dropped
        self._given_up = False
        self.taken = 0
        """Spans that left the queue. Only the exporting thread writes it."""
        self.done = 0
        """Spans whose fate is known."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch."""
        count = len(spans)
        self.taken += count
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS and not self._given_up:
                self._dropped("export_failed", count)
            self.done += count
        return result

    def give_up(self) -> int:
        """The process ends: a pause before another try is cut short. Returns how many spans it was still busy with."""
        self._given_up = True
        self._inner.shutdown()
        return self.taken - self.done

    def shutdown(self) -> None:
        """Closes the exporter."""
        if not self._given_up:
            self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Holds nothing back."""
        return True


class BoundedProcessor(SpanProcessor):
    """Queue of ended spans. `on_end` is called from the event loop only."""

    def __init__(self, exporter: SpanExporter, dropped: Dropped, *, queue_spans_max: int) -> None:
        self._exporter = _CountingExporter(exporter, dropped)
        self._dropped = dropped
        self._queue_spans_max = queue_spans_max
        self._queued = 0
        """Spans that went into the queue. Only the event loop writes it."""
        self._closed = False
        self._batches = BatchSpanProcessor(self._exporter, max_queue_size=queue_spans_max)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing to do."""

    def on_end(self, span: ReadableSpan) -> None:
        """Takes a span, or drops it: the queue is full, the process ends."""
        if self._closed:
            self._dropped("stopped", 1)
        elif self._queued - self._exporter.taken >= self._queue_spans_max:
            self._dropped("queue_full", 1)
        else:
            self._queued += 1
            self._batches.on_end(span)

    def close(self, limit_s: float) -> None:
        """Sends what is left, for as long as this at most. What did not leave is counted."""
        self._closed = True
        flushing = threading.Thread(target=self._batches.shutdown, name="spans-flush", daemon=True)
        flushing.start()
        flushing.join(limit_s)
        if flushing.is_alive():
            busy_with = self._exporter.give_up()
            left = self._queued - self._exporter.taken + busy_with
            if left:
                self._dropped("stopped", left)

    def shutdown(self) -> None:
        """Not used: close() has a limit."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Sends what is queued, and waits for it."""
        return self._batches.force_flush(timeout_millis)
