"""The inference log's writer: a bounded queue that the request path appends to, and a thread that makes Parquet of it.

The request path never waits: a full queue drops the row and counts it. The thread never dies: a disk that is full, or a
folder that went away, drops the rows of that file and counts them. What a SIGKILL loses is bounded by the flush time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.records import EntityValue
from hafnium_transformer.plan import Plan

log = logging.getLogger("hafnium.transformer")
_HASH_BYTES = 16
_CLOSE_TIMEOUT_S = 8.0
_COMPLAINT_PAUSE_S = 30.0
"""A disk that stays full is reported this often, not at every flush."""


@dataclass(frozen=True)
class LogRow:
    """One answer, as it was given. `inputs`: the encoded row [n] in contract order."""

    plan: Plan
    request_id: str
    time: datetime
    model_version: str
    model_digest: str
    arm: str
    score: float
    lower: float
    upper: float
    decision: str
    degraded: tuple[str, ...]
    latency_ms: float
    entity: dict[str, EntityValue]
    inputs: npt.NDArray[np.float32]


class EntityHash:
    """Keyed BLAKE2b of an entity: rows of one entity can be grouped, and without the key nobody finds out which it is."""

    def __init__(self, key: str | None) -> None:
        given = key.encode() if key else secrets.token_bytes(32)
        self._key = given if len(given) <= 64 else hashlib.blake2b(given).digest()

    def of(self, entity: dict[str, EntityValue]) -> str | None:
        """32 hex digits; None for a request without an entity."""
        if not entity:
            return None
        text = json.dumps(entity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.blake2b(text.encode(), key=self._key, digest_size=_HASH_BYTES).hexdigest()


class InferenceLog:
    """Writer of one process. `append` is for the event loop, everything else happens in the thread."""

    def __init__(
        self, folder: Path, metrics: TransformerMetrics, *, flush_seconds: float, flush_rows: int, queue_rows_max: int,
        entity_hash: EntityHash, clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder = folder
        self._metrics = metrics
        self._flush_seconds = flush_seconds
        self._flush_rows = flush_rows
        self._queue_rows_max = queue_rows_max
        self._entity_hash = entity_hash
        self._clock = clock
        self._queue: deque[LogRow] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._complained = -_COMPLAINT_PAUSE_S
        self._thread = threading.Thread(target=self._run, name="inference-log", daemon=True)
        self._thread.start()

    def append(self, row: LogRow) -> None:
        """Queues a row, or drops and counts it when the queue is full. Never waits."""
        waiting = len(self._queue)
        if waiting >= self._queue_rows_max or self._closing:
            self._metrics.log_dropped("queue_full")
            return
        self._queue.append(row)
        if waiting + 1 >= self._flush_rows and not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Writes what is queued and ends the thread; gives up (and counts) after a few seconds on a disk that hangs."""
        self._closing = True
        self._wake.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._metrics.log_dropped("shutdown", len(self._queue))
            log.error("inference log: not written in %.0f s, %d rows lost", _CLOSE_TIMEOUT_S, len(self._queue))

    def _run(self) -> None:
        while True:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            closing = self._closing  # read before the queue is emptied: rows after it are refused by append
            while self._queue:
                rows = [self._queue.popleft() for _ in range(min(len(self._queue), self._flush_rows))]
                self._write(rows)
            if closing:
                return

    def _write(self, rows: list[LogRow]) -> None:
        groups: dict[tuple[Any, ...], list[LogRow]] = {}
        for row in rows:
            groups.setdefault((row.time.date(), row.model_version, row.model_digest, row.plan.digest), []).append(row)
        for group in groups.values():
            try:
                self._write_file(group)
            except Exception as e:  # noqa: BLE001 - pyarrow raises many kinds, and a thread that dies would lose all rows
                self._metrics.log_dropped("write_failed", len(group))
                if time.monotonic() - self._complained >= _COMPLAINT_PAUSE_S:
                    self._complained = time.monotonic()
                    log.error("inference log: %d rows dropped: %s: %s", len(group), type(e).__name__, e)
            else:
                self._metrics.log_written.inc(len(group))

    def _write_file(self, rows: list[LogRow]) -> None:
        """Rows of one date and one model → one file, complete or not there."""
        import pyarrow as pa  # 0.4 s to import, and only this thread needs it
        import pyarrow.parquet as pq

        from hafnium_contract.inference_log import FEATURE_PREFIX, log_schema, partition

        plan = rows[0].plan
        matrix = np.stack([r.inputs for r in rows])
        columns: dict[str, Any] = {
            "request_id": [r.request_id for r in rows], "time": [r.time for r in rows],
            "model_name": [plan.contract.name] * len(rows), "model_version": [r.model_version for r in rows],
            "model_digest": [r.model_digest for r in rows], "arm": [r.arm for r in rows], "score": [r.score for r in rows],
            "confidence_lower": [r.lower for r in rows], "confidence_upper": [r.upper for r in rows],
            "decision": [r.decision for r in rows], "degraded": [list(r.degraded) for r in rows],
            "latency_ms": [r.latency_ms for r in rows], "entity_hash": [self._entity_hash.of(r.entity) for r in rows],
        }
        for j in plan.logged_columns:
            columns[FEATURE_PREFIX + plan.contract.inputs[j].name] = matrix[:, j]
        table = pa.table(columns, schema=log_schema(plan.contract))
        target = partition(self._folder, rows[0].time, rows[0].model_version)
        target.mkdir(parents=True, exist_ok=True)
        name = f"part-{self._clock():%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
        temporary = target / f".{name}.tmp"
        try:
            with temporary.open("wb") as f:
                pq.write_table(table, f, compression="zstd")
                f.flush()
                os.fsync(f.fileno())
            temporary.rename(target / f"{name}.parquet")
        finally:
            temporary.unlink(missing_ok=True)
