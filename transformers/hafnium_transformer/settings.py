"""Settings of the transformer: command line first, then HAFNIUM_<NAME> in the environment, then the default."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from hafnium_contract.errors import InputError
from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.json_log import LogFormat
from hafnium_contract.serving.tracing import FLUSH_S
from hafnium_contract.serving.workers import STOP_SPARE_S
from hafnium_contract.wire import BATCH_ROWS_MAX, BODY_BYTES_MAX
from hafnium_transformer.explanation import Method
from hafnium_transformer.log_target import CLOSE_S, log_target

ENVIRONMENT_PREFIX = "HAFNIUM_"
_NOT_FLAGS = ("sdk_arguments", "entity_hash_key")


class Settings(BaseModel):
    """Each field is also a flag (`--feature_repo`); KServe's own spelling with underscores, because KServe appends flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model_name: str = Field(default="model", pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
    """Name in the URLs, ours and the predictor's: KServe gives both the InferenceService's."""
    predictor_host: str = Field(default="", pattern=r"^[-A-Za-z0-9_.\[\]:]*$")
    """HOST or HOST:PORT of the predictor. KServe appends it."""
    predictor_use_ssl: bool = False
    """Speak TLS to the predictor."""
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
    enable_grpc: bool = False
    """V2 over gRPC for callers. Off: scores are asked for by HTTP, and the server costs seven threads."""
    host: str = "0.0.0.0"  # noqa: S104 - a pod is reached by its address
    """Address to listen on. The local runtime gives 127.0.0.1."""
    feature_repo: Path | None = None
    """Folder with Feast's feature_store.yaml. Needed only when the contract has views."""
    inference_log: str = ""
    """Where the inference log goes: a folder, or s3://BUCKET/PREFIX. Empty: nothing is logged."""
    log_flush_seconds: float = Field(default=10.0, gt=0)
    """Longest time that a row waits in memory: what a SIGKILL can lose. Shorter makes many small files."""
    log_flush_rows: int = Field(default=5_000, ge=1)
    """Rows that make a file at once: 420 kB with 15 inputs. Files of 20,000 rows took no fewer bytes per row (measured)."""
    log_queue_rows_max: int = Field(default=20_000, ge=1)
    """Rows in memory before further ones are dropped and counted: ten seconds of a stalled disk at 2,000
    rows/s, and 18 MB with 15 inputs. When half of them wait, they are written, be they fewer than a file's or not."""
    deadline_ms: float = Field(default=1_000.0, gt=0)
    """Time for a whole answer when the caller gives no x-hafnium-deadline-ms: ten times the p99 that owners ask for."""
    lookup_timeout_ms: float = Field(default=250.0, gt=0)
    """Time for the feature lookup. A store that hangs then counts as one without values: the contract's policy decides."""
    lookup_direct: bool = True
    """Read what Feast wrote without its SDK, on SQLite and on a single Redis. Other stores are read through the SDK anyway."""
    lookup_threads: int = Field(default=1, ge=1, le=8)
    """Threads that call Feast's SDK. Its work is Python, so a second one fights for the GIL and splits the rows that would be
    read together: 1,440-1,630 µs of CPU a request instead of 980-1,090 (SQLite, 8 connections, measured)."""
    lookup_rows_max: int = Field(default=256, ge=1)
    """Rows in one read of the SDK: how long one read may hold the thread, at Feast's 0.15 ms a row about 40 ms."""
    lookup_queue_rows_max: int = Field(default=5_000, ge=1)
    """Rows that may wait for the store; further ones are answered as if it had no values."""
    registry_refresh_s: float = Field(default=60.0, gt=0)
    """Feast's registry is read again this often, in the background. Feast itself would do it inside a request."""
    connection_age_s: float = Field(default=60.0, gt=0)
    """A connection to the predictor is used no longer than this, so that new pods behind its Service get their share."""
    batches_in_flight_max: int = Field(default=2, ge=1)
    """Batches of single rows on their way at a time; rows that come meanwhile leave together. One is looked up while the other is
    scored; more only made the batches smaller (measured)."""
    coalesced_rows_max: int = Field(default=128, ge=1, le=BATCH_ROWS_MAX)
    """Single rows in one such batch."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Retries to the predictor, as a share of requests to it: a struggling one must not be asked twice by everybody."""
    retry_spare: float = Field(default=10.0, ge=0)
    """Retries that are always there: a restart breaks a few connections at once."""
    breaker_failures_max: int = Field(default=5, ge=1)
    """Failures in a row after which predictor or store is left alone for a while."""
    breaker_pause_first_s: float = Field(default=0.2, gt=0)
    """The first such while; each further one is twice as long."""
    breaker_pause_max_s: float = Field(default=2.0, gt=0)
    """The longest: how late a recovery may be noticed."""
    hot_path: bool = True
    """Answer plain requests below ASGI. Off, every byte takes KServe's way: for a comparison, or while in doubt about it."""
    in_flight_max: int = Field(default=256, ge=1)
    """Requests in progress at most; the next gets 503. At the 5,000 requests/s that one process makes it is 50 ms of work."""
    queue_ms_max: float = Field(default=20.0, gt=0)
    """Longest wait of a row for its batch. While rows wait longer for 0.1 s on end, fewer requests than `in_flight_max` are let in (64 at
    least). A fifth of the 100 ms that owners ask for: a row waits for the event loop before it, and for lookup and model after it."""
    batch_rows_max: int = Field(default=BATCH_ROWS_MAX, ge=1, le=BATCH_ROWS_MAX)
    """Rows in one batch; the predictor takes no more."""
    body_bytes_max: int = Field(default=BODY_BYTES_MAX, ge=1024)
    """A body above it gets 413."""
    rate_limit_per_s: float = Field(default=0.0, ge=0)
    """Rows that one client may ask for in a second, on average; then 429 with Retry-After. 0: no limit."""
    rate_limit_burst: float = Field(default=0.0, ge=0)
    """Rows that one client may ask for at once. 0: those of a second."""
    client_header: str = Field(default="x-api-key", pattern=r"^[A-Za-z0-9-]+$")
    """Header that says who asks; without it the address counts, which behind a gateway is the gateway's."""
    clients_max: int = Field(default=10_000, ge=1)
    """Clients that are told apart: 2 MB. Beyond it the one that was silent for longest is forgotten."""
    score_decimals: int = Field(default=0, ge=0, le=9)
    """Decimals of scores and bounds in answers; 0: all that float32 has. Few tell somebody who copies the model by asking it less.
    Decisions and the log go by the whole score."""
    explain_top_k: int = Field(default=5, ge=1)
    """Contributions in an explanation: what a reviewer reads."""
    explain_method: Method = "shapley"
    """`shapley`: sampled Shapley values; they add up to the score. `substitution`: the score less that with one input missing: fewer rows
    to predict, and for one row in four another input comes first (docs/serving.md)."""
    explain_orders: int = Field(default=4, ge=2, le=64, multiple_of=2)
    """Orders in which `shapley` lets inputs become known, in pairs. Each costs a prediction per input, and four times as many halve the
    error; with 4 an explanation of 15 inputs takes a quarter of a millisecond (docs/performance.md)."""
    explain_rows_max: int = Field(default=20, ge=1)
    """Explained rows in one batch: each costs as many predictions as the model has inputs, with `shapley` times the orders."""
    grace_period_s: int = Field(default=20, ge=0)
    """Seconds that requests in flight get on SIGTERM. Log and spans take up to 13 s more: the pod's terminationGracePeriodSeconds has
    to hold its preStop and both."""
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
    entity_hash_key: SecretStr | None = None
    """Key of the hash that stands for the entity in the log; environment only, since flags are seen by everybody.
    Without it each process draws its own: nobody can then join rows of different processes by entity."""
    sdk_arguments: tuple[str, ...] = ()
    """Arguments that are not ours: KServe's SDK gets them, and refuses what it doesn't know either."""

    @property
    def connection_limits(self) -> ConnectionLimits:
        """What one client may cost."""
        return ConnectionLimits(
            self.read_timeout_s, self.write_timeout_s, self.write_total_timeout_s, self.head_bytes_max, self.connections_max)

    @property
    def stop_s(self) -> float:
        """Seconds from SIGTERM until it has ended, whatever hangs: requests in hand, then the log's last rows, then the last spans."""
        return self.grace_period_s + CLOSE_S + FLUSH_S + STOP_SPARE_S


def parse_settings(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
    """Command line and environment → Settings. Raises InputError that names the flag; `--help` exits."""
    parser = argparse.ArgumentParser(prog="hafnium_transformer", description=__doc__, allow_abbrev=False)
    flags = {name: field for name, field in Settings.model_fields.items() if name not in _NOT_FLAGS}
    for name, field in flags.items():
        text = f"{field.description} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text)
    given, rest = parser.parse_known_args(argv)
    from_env = [*flags, "entity_hash_key"]
    values: dict[str, Any] = {name: env[key] for name in from_env if (key := ENVIRONMENT_PREFIX + name.upper()) in env}
    values |= vars(given) | {"sdk_arguments": tuple(rest)}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InputError(f"--{name} (or {ENVIRONMENT_PREFIX}{name.upper()}): {first['msg']}, got {first['input']!r}") from e
    if not settings.predictor_host:
        raise InputError("--predictor_host (or HAFNIUM_PREDICTOR_HOST): missing; expected HOST:PORT of the predictor")
    if settings.inference_log:
        log_target(settings.inference_log)  # a wrong place is said now, not in the log's thread
    return settings
