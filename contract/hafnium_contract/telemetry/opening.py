"""OpenTelemetry's usual environment variables → a Tracing, or a clear word about the variable that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from hafnium_contract.errors import InputError
from hafnium_contract.telemetry.span_export import BoundedProcessor, Dropped
from hafnium_contract.telemetry.spans import GivenIds, Tracing
from hafnium_contract.trace_context import sampling_of

QUEUE_SPANS_MAX = 2048
"""OpenTelemetry's default: about 4 MB. At 1 % of 5,000 requests a second, three spans each, it holds 14 s of a silent collector."""
_EXPORT_SPANS_MAX = 512
"""OpenTelemetry's default, and what its batch processor takes when nothing is said."""


def tracing_from(env: Mapping[str, str], service: str, dropped: Dropped) -> Tracing | None:
    """Raises InputError. None when OTEL_SDK_DISABLED or OTEL_TRACES_EXPORTER=none says so. `service`: its name if nobody gives one."""
    if env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or _one_of(env, "OTEL_TRACES_EXPORTER", ("otlp", "none")) == "none":
        return None
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        _one_of(env, name, ("http/protobuf",))
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        url = env.get(name, "").strip()
        if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
            raise InputError(f"{name}: expected http://HOST:PORT of a collector (OTLP over HTTP, port 4318), got {url[:80]!r}")
    sampling = sampling_of(env)
    queue_spans_max = _whole_number(env, "OTEL_BSP_MAX_QUEUE_SIZE", QUEUE_SPANS_MAX)
    if _whole_number(env, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _EXPORT_SPANS_MAX) > queue_spans_max:
        raise InputError(
            f"OTEL_BSP_MAX_QUEUE_SIZE: {queue_spans_max} spans are fewer than those of one export "
            f"(OTEL_BSP_MAX_EXPORT_BATCH_SIZE, {_EXPORT_SPANS_MAX} by default)"
        )
    _whole_number(env, "OTEL_BSP_SCHEDULE_DELAY", 5_000)
    version = metadata.version("hafnium-serving")
    given = [pair.partition("=")[0].strip() for pair in env.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")]
    named = bool(env.get("OTEL_SERVICE_NAME")) or "service.name" in given
    resource = Resource.create({"service.version": version} if named else {"service.version": version, "service.name": service})
    processor = BoundedProcessor(OTLPSpanExporter(), dropped, queue_spans_max=queue_spans_max)
    ids = GivenIds()
    # Always on: what comes here was decided on already. Not shut down at exit: close() has a limit, the SDK's way has none.
    provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=ids)
    provider.add_span_processor(processor)
    return Tracing(provider, processor, ids, sampling, version)


def _one_of(env: Mapping[str, str], name: str, known: tuple[str, ...]) -> str:
    given = env.get(name, "").strip().lower() or known[0]
    if given not in known:
        raise InputError(f"{name}: expected {' or '.join(known)}, got {given[:40]!r}")
    return given


def _whole_number(env: Mapping[str, str], name: str, default: int) -> int:
    given = env.get(name, "").strip() or str(default)
    if not given.isdecimal() or not 0 < int(given[:10]) <= 1_000_000:
        raise InputError(f"{name}: expected a whole number from 1 to 1000000, got {given[:40]!r}")
    return int(given)
