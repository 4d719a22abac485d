"""The inference log's writer: a bounded queue that the request path appends to, and a thread that makes Parquet of it.

The request path never waits: a full queue drops the row and counts it. The thread never dies: a disk that is full, or a
folder that went away, drops the rows of that file and counts them. What a SIGKILL loses is bounded by the flush time.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from hafnium_transformer.log_target import CLOSE_S, LogTarget, file_name
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.records import EntityValue
from hafnium_transformer.plan import Plan

log = logging.getLogger("hafnium.transformer")
_HASH_BYTES = 16
_PART_ROWS = 500
_COMPLAINT_PAUSE_S = 30.0
"""A disk that stays full is reported this often, not at every flush."""


class LogBatch(NamedTuple):
    """Answers that were given together, by columns: a third of the work of a tuple for each row, and of turning them round later."""

    plan: Plan
    time: datetime
    model_version: str
    model_digest: str
    request_ids: list[str]
    arms: list[str]
    scores: npt.NDArray[np.float32]
    intervals: npt.NDArray[np.float32]
    """[rows, 2]"""
    decisions: list[str]
    degraded: dict[int, Sequence[str]]
    """Of the rows that did without something."""
    latencies_ms: list[float]
    entities: list[dict[str, EntityValue]]
    inputs: npt.NDArray[np.float32]
    """Encoded rows [rows, n] in contract order."""

    @property
    def rows(self) -> int:
        return len(self.request_ids)

    def first(self, rows: int) -> LogBatch:
        """Only so many of them."""
        return self._replace(
            request_ids=self.request_ids[:rows], arms=self.arms[:rows], scores=self.scores[:rows], intervals=self.intervals[:rows],
            decisions=self.decisions[:rows], degraded={i: names for i, names in self.degraded.items() if i < rows},
            latencies_ms=self.latencies_ms[:rows], entities=self.entities[:rows], inputs=self.inputs[:rows],
        )


class EntityHash:
    """Keyed BLAKE2b of an entity: rows of one entity can be grouped, and without the key nobody finds out which it is."""

    def __init__(self, key: str | None) -> None:
        given = key.encode() if key else secrets.token_bytes(32)
        own = given if len(given) <= 64 else hashlib.blake2b(given).digest()
        self._keyed = hashlib.blake2b(key=own, digest_size=_HASH_BYTES)  # copied for each: the key is a block of its own

    def of(self, entity: dict[str, EntityValue]) -> str | None:
        """32 hex digits; None for a request without an entity."""
        if not entity:
            return None
        keyed = self._keyed.copy()
        keyed.update(orjson.dumps(entity, option=orjson.OPT_SORT_KEYS))
        return keyed.hexdigest()


class InferenceLog:
    """Writer of one process. `append` is for the event loop, everything else happens in the thread."""

    def __init__(
        self, target: LogTarget, metrics: TransformerMetrics, *, flush_seconds: float, flush_rows: int, queue_rows_max: int,
        entity_hash: EntityHash, clock: Callable[[], datetime] = lambda: datetime.now(UTC), close_s: float = CLOSE_S,
    ) -> None:
        self._target = target
        self._metrics = metrics
        self._flush_seconds = flush_seconds
        self._flush_rows = flush_rows
        self._queue_rows_max = queue_rows_max
        self._wake_rows = min(flush_rows, max(queue_rows_max // 2, 1))
        """A queue that never holds a file's rows is written from when it is half full: the other half is for what comes meanwhile."""
        self._entity_hash = entity_hash
        self._clock = clock
        self._close_s = close_s
        self._queue: deque[LogBatch] = deque()
        self._rows_in = 0
        """Rows that were queued, ever; only the event loop writes it."""
        self._rows_out = 0
        """Rows that were taken out, ever; only the thread writes it."""
        self._rows_done = 0
        """Rows whose fate is known: written, or dropped and counted. Only the thread writes it."""
        self._given_up = False
        """Whoever closed it counts what is left as lost; the thread counts nothing any more."""
        self._counting = threading.Lock()
        """Holds these two together."""
        self._wake = threading.Event()
        self._closing = False
        self._complained = -_COMPLAINT_PAUSE_S
        self._thread = threading.Thread(target=self._run, name="inference-log", daemon=True)
        self._thread.start()

    def append(self, batch: LogBatch) -> None:
        """Queues answers, or drops and counts what there is no room for. Never waits."""
        room = 0 if self._closing else self._queue_rows_max - (self._rows_in - self._rows_out)
        count = batch.rows
        if count > room:
            self._metrics.log_dropped("queue_full", count - max(room, 0))
            if room <= 0:
                return
            batch, count = batch.first(room), room
        self._rows_in += count
        self._queue.append(batch)
        if self._rows_in - self._rows_out >= self._wake_rows and not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Writes what is queued and ends the thread; gives up (and counts) after a few seconds on a disk that hangs."""
        self._closing = True
        self._wake.set()
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            with self._counting:
                self._given_up = True
                left = self._rows_in - self._rows_done  # also those of the write that hangs
            self._metrics.log_dropped("shutdown", left)
            log.error("inference log: not written in %g s, %d rows lost", self._close_s, left)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            closing = self._closing  # read before the queue is emptied: rows after it are refused by append
            due = self._rows_in  # what comes while this is written waits for the next time: else each file would have a few rows
            while self._rows_out < due:
                self._write(self._take())
            if closing:
                return

    def _take(self) -> list[LogBatch]:
        """Batches of a file's rows, out of the queue."""
        taken: list[LogBatch] = []
        rows = 0
        while self._queue and rows < self._flush_rows:
            taken.append(self._queue.popleft())
            rows += taken[-1].rows
        self._rows_out += rows
        return taken

    def _write(self, batches: list[LogBatch]) -> None:
        groups: dict[tuple[Any, ...], list[LogBatch]] = {}
        for batch in batches:
            groups.setdefault((batch.time.date(), batch.model_version, batch.model_digest, batch.plan.digest), []).append(batch)
        for group in groups.values():
            count = sum(b.rows for b in group)
            try:
                self._write_file(group)
            except Exception as e:  # noqa: BLE001 - pyarrow raises many kinds, and a thread that dies would lose all rows
                if not self._settled(count, written=False):
                    return
                if time.monotonic() - self._complained >= _COMPLAINT_PAUSE_S:
                    self._complained = time.monotonic()
                    log.error("inference log: %d rows dropped: %s: %s", count, type(e).__name__, e)
            else:
                if not self._settled(count, written=True):
                    return

    def _settled(self, count: int, *, written: bool) -> bool:
        """Counts rows of a write that has ended. False: too late, whoever closed the log has counted them as lost."""
        with self._counting:
            if self._given_up:
                return False
            self._rows_done += count
            if written:
                self._metrics.log_written.inc(count)
            else:
                self._metrics.log_dropped("write_failed", count)
            return True

    def _write_file(self, group: list[LogBatch]) -> None:
        """Batches of one date and one model → one file, complete or not there."""
        import pyarrow as pa  # 0.4 s to import, and only this thread needs it

        from hafnium_contract.inference_log import log_schema

        schema = log_schema(group[0].plan.contract)
        # In parts: each makes Python lists into columns while it holds the interpreter, and requests wait for that long
        parts: list[Any] = []
        begin, rows = 0, 0
        for i, batch in enumerate(group):
            rows += batch.rows
            if rows >= _PART_ROWS or i == len(group) - 1:
                parts.append(pa.RecordBatch.from_pydict(self._columns(group[begin : i + 1]), schema=schema))
                begin, rows = i + 1, 0
                time.sleep(0)
        table = pa.Table.from_batches(parts, schema=schema)
        self._target.write(table, group[0].time, group[0].model_version, file_name(self._clock()))

    def _columns(self, batches: list[LogBatch]) -> dict[str, Any]:
        """Batches of one model → columns of the log."""
        import pyarrow as pa

        from hafnium_contract.inference_log import FEATURE_PREFIX

        plan, sizes = batches[0].plan, [b.rows for b in batches]
        rows = sum(sizes)
        intervals = np.concatenate([b.intervals for b in batches])
        hash_of = self._entity_hash.of
        columns: dict[str, Any] = {
            "request_id": [i for b in batches for i in b.request_ids],
            "time": np.repeat(np.array([b.time.timestamp() * 1e6 for b in batches], np.int64), sizes).view("datetime64[us]"),
            "model_name": pa.repeat(plan.contract.name, rows), "model_version": pa.repeat(batches[0].model_version, rows),
            "model_digest": pa.repeat(batches[0].model_digest, rows), "arm": [a for b in batches for a in b.arms],
            "score": np.concatenate([b.scores for b in batches]),
            "confidence_lower": np.ascontiguousarray(intervals[:, 0]), "confidence_upper": np.ascontiguousarray(intervals[:, 1]),
            "decision": [d for b in batches for d in b.decisions],
            "degraded": [b.degraded.get(i, ()) for b in batches for i in range(b.rows)],
            "latency_ms": [ms for b in batches for ms in b.latencies_ms],
            "entity_hash": [hash_of(e) for b in batches for e in b.entities],
        }
        matrix = np.concatenate([b.inputs for b in batches])
        for j in plan.logged_columns:
            columns[FEATURE_PREFIX + plan.contract.inputs[j].name] = np.ascontiguousarray(matrix[:, j])
        return columns
