"""Settings of the predictor: command line first, then HAFNIUM_<NAME> in the environment, then the default."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hafnium_contract.errors import InputError
from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.json_log import LogFormat
from hafnium_contract.serving.tracing import FLUSH_S
from hafnium_contract.serving.workers import STOP_SPARE_S
from hafnium_contract.wire import BATCH_ROWS_MAX, BODY_BYTES_MAX

ENVIRONMENT_PREFIX = "HAFNIUM_"


class Settings(BaseModel):
    """Each field is also a flag (`--model_dir`); KServe's own spelling with underscores, because KServe appends flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model_name: str = Field(default="model", pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
    """Name in the URLs. KServe gives the InferenceService's name; the model's own name is in the bundle."""
    model_dir: Path = Path("/mnt/models")
    """The bundle. The default is where KServe's storage initializer puts it."""
    http_port: int = Field(default=8080, ge=1, le=65535)
    """KServe's default."""
    grpc_port: int = Field(default=8081, ge=1, le=65535)
    """KServe's default."""
    log_format: LogFormat = "json"
    """`json`: an object a line, with the request's id, for a log store. `text`: for a person."""
    tracing: bool = False
    """OpenTelemetry spans to a collector (OTEL_EXPORTER_OTLP_ENDPOINT and its kin). Needs the extra `telemetry`. Off: a recorded
    request costs some 200 µs of CPU, which nobody should pay who has no collector."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes behind the port. One answers thousands of requests a second; more pods spread failures better than more workers."""
    enable_grpc: bool = True
    """Off saves seven threads and 3 MB (measured) where nobody speaks gRPC."""
    grpc_streams_max: int = Field(default=128, ge=1)
    """Calls at a time on one gRPC connection; more wait at the caller, where its deadline counts, or get UNAVAILABLE. At the
    2,500 a second that the SDK's way makes it is 50 ms of work."""
    host: str = "0.0.0.0"  # noqa: S104 - a pod is reached by its address
    """Address to listen on. The local runtime gives 127.0.0.1."""
    hot_path: bool = True
    """Answer plain requests below ASGI. Off, every byte takes KServe's way: for a comparison, or while in doubt about it."""
    body_bytes_max: int = Field(default=BODY_BYTES_MAX, ge=1024)
    """A body above it gets 413. 4 MiB hold 1,000 rows of 1,000 features in binary."""
    rows_max: int = Field(default=BATCH_ROWS_MAX, ge=1)
    """Rows in one request. One thread computes for all, so a large request holds the others up: 1,000 rows of a logistic
    model took 0.24 ms, a network takes more."""
    warmup_rows: int = Field(default=64, ge=1)
    """Rows of the largest warm-up batch. ONNX Runtime plans its memory at the first run of a shape."""
    grace_period_s: int = Field(default=20, ge=0)
    """Seconds that requests in flight get on SIGTERM. Spans take up to 5 s more: the pod's terminationGracePeriodSeconds has to hold its
    preStop and both."""
    keep_alive_s: int = Field(default=65, ge=1)
    """KServe's default. It has to be longer than the proxy before it keeps an idle connection: the proxy must be who closes. A new
    connection on which nothing comes ends after it too."""
    read_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds from a request's first byte to its last; then 408. The longest body takes them at 3.4 Mbit/s; a proxy sends it at once."""
    write_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds in which a client reads nothing of its answers, when more than 64 kB wait for it; then the connection ends. One that reads
    slowly goes on."""
    write_total_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds in which it has to have read them: at 17 kB/s a megabyte, more than the longest answer to a thousand rows. Until then its
    answers take memory."""
    head_bytes_max: int = Field(default=65_536, ge=8_192)
    """Bytes of request line and headers; then 431. Envoy takes 60 KiB, most others 8."""
    connections_max: int = Field(default=1_000, ge=1)
    """Open connections; the next gets 503, but for one that asks for health or metrics: whoever takes all places must not make probes
    fail. An idle connection takes memory and a file; a shell's usual limit is 1,024 files."""
    sdk_arguments: tuple[str, ...] = ()
    """Arguments that are not ours: KServe's SDK gets them, and refuses what it doesn't know either."""

    @property
    def connection_limits(self) -> ConnectionLimits:
        """What one client may cost."""
        return ConnectionLimits(
            self.read_timeout_s, self.write_timeout_s, self.write_total_timeout_s, self.head_bytes_max, self.connections_max)

    @property
    def stop_s(self) -> float:
        """Seconds from SIGTERM until it has ended, whatever hangs: requests in hand, then the last spans."""
        return self.grace_period_s + FLUSH_S + STOP_SPARE_S


def parse_settings(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
    """Command line and environment → Settings. Raises InputError that names the flag; `--help` exits."""
    parser = argparse.ArgumentParser(prog="hafnium_predictor", description=__doc__, allow_abbrev=False)
    own = {name: field for name, field in Settings.model_fields.items() if name != "sdk_arguments"}
    for name, field in own.items():
        text = f"{field.description} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    given, rest = parser.parse_known_args(argv)
    values: dict[str, Any] = {name: env[key] for name in own if (key := ENVIRONMENT_PREFIX + name.upper()) in env}
    values |= vars(given) | {"sdk_arguments": tuple(rest)}
    try:
        return Settings.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InputError(f"--{name} (or {ENVIRONMENT_PREFIX}{name.upper()}): {first['msg']}, got {first['input']!r}") from e
