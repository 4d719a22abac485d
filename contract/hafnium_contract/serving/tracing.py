"""Whether this server records traces: off by default, and nothing of OpenTelemetry is imported then."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from hafnium_contract import metric_names
from hafnium_contract.errors import InputError

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

log = logging.getLogger("hafnium.tracing")
FLUSH_S = 3.0
"""Time for the last spans when the server stops: grace period and log need the rest of Kubernetes' 30 s."""
_SWITCH_S = 0.0005
"""How long the exporting thread may keep the interpreter while requests wait; Python's 5 ms would show in the p99."""


def open_tracing(
    wanted: bool, service: str, env: Mapping[str, str] = os.environ, registry: CollectorRegistry = REGISTRY,
) -> Tracing | None:
    """None unless `wanted`. Raises InputError when the extra is missing or a variable of OpenTelemetry is wrong."""
    if not wanted:
        return None
    try:
        from hafnium_contract.telemetry.opening import tracing_from
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] not in ("opentelemetry", "google", "requests"):
            raise
        raise InputError(
            f"--tracing (or HAFNIUM_TRACING) is on, but {e.name} is not installed; pip install 'hafnium-serving[telemetry]', "
            "or leave it off"
        ) from e
    metric = metric_names.SPANS_DROPPED
    dropped = Counter(metric.name, metric.help, metric.labels, registry=registry)
    for reason in ("queue_full", "export_failed", "stopped"):
        dropped.labels(reason)  # a rate needs the zero before the first loss
    tracing = tracing_from(env, service, lambda reason, spans: dropped.labels(reason).inc(spans))
    if tracing is None:
        log.info("tracing is switched off by OTEL_SDK_DISABLED or OTEL_TRACES_EXPORTER")
        return None
    sys.setswitchinterval(_SWITCH_S)
    return tracing
