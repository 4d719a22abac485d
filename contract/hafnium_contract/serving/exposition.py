"""`/metrics`: the series of this process, or of all workers together."""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, multiprocess

from hafnium_contract.asgi import Answer


def metrics_answer() -> Answer:
    """Prometheus' text format. KServe's own handler would show one worker's series, whichever is asked."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return Answer(200, ((b"content-type", CONTENT_TYPE_LATEST.encode()),), generate_latest(registry))
