"""`/metrics`: the series of this process, or of all workers together."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest, multiprocess

from hafnium_contract.asgi import Answer
from hafnium_contract.serving.workers import is_worker


def metrics_answer() -> Answer:
    """Prometheus' text format. KServe's own handler would show one worker's series, whichever is asked.

    What the environment says of PROMETHEUS_MULTIPROC_DIR is no answer to how many there are: Feast sets it when it is imported, to
    an empty folder of its own.
    """
    registry = REGISTRY
    if is_worker():
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return Answer(200, ((b"content-type", CONTENT_TYPE_LATEST.encode()),), generate_latest(registry))
