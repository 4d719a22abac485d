"""Rows of the inference log: one model, one window of time, one arm, at most so many rows in memory.

The transformer writes a small file every few seconds, so a day is thousands of files. A file whose rows all lie outside the
window is known by its Parquet footer; `InferenceLog` remembers the footers' times, so that a later window opens new files
only. Files are read in batches, and beyond `rows_max` a sample is kept (kept_rows.py), so memory does not grow with traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from hafnium_contract.inference_log import FEATURE_PREFIX, FIXED
from hafnium_monitoring.errors import LogReadError
from hafnium_monitoring.kept_rows import LabelledSample, UniformSample
from hafnium_monitoring.log_places import LogFile, log_places

CANDIDATE_ARMS = frozenset({"candidate", "shadow"})
STABLE_ARMS = frozenset({"stable"})
ALL_ARMS = CANDIDATE_ARMS | STABLE_ARMS
BATCH_ROWS = 65_536
_KEYS = ("time", "model_digest", "arm")
_PARTITION_SLACK = timedelta(days=1)
"""A file lies in the folder of the day when it was begun; its rows may be of the day before or after."""
_TIME = pa.timestamp("us", tz="UTC")
_CLOCK_SLACK = timedelta(minutes=10)
"""The log's clock and the file system's may differ by this much."""

pc: Any = pyarrow.compute  # its functions are made at import, so type checkers can't see them

Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Selection:
    """Which rows: `start` ≤ time < `end`, so that windows that touch share no row."""

    digest: str
    version: str
    arms: frozenset[str]
    start: datetime
    end: datetime


def candidate_arms(digest: str, stable_digest: str | None) -> frozenset[str]:
    """The marks that rows of a model may have that is compared with another (None: with none).

    KServe's canary, and a gateway that can't set headers per backend, leave every live row marked `stable`: so the model that made a score
    says which arm it is of, as for the rollout's score gates. Only where both arms have one model the mark is all that there is.
    """
    return CANDIDATE_ARMS if digest == stable_digest else ALL_ARMS


@dataclass(frozen=True)
class LogRows:
    """Rows of one selection. Every array has `kept` rows, in the log's order (but for a sample with `positives`)."""

    total: int
    """Rows that the log holds."""
    kept: int
    """Rows here: all, or a sample."""
    features: dict[str, Float32s]
    """Feature → encoded values, NaN = missing."""
    score: Float32s
    degraded: npt.NDArray[np.bool_]
    """Whether the answer named any feature as degraded."""
    request_id: npt.NDArray[np.object_]
    time: npt.NDArray[np.float64]
    """Seconds since 1970-01-01 UTC."""
    weight: npt.NDArray[np.float64]
    """How many rows of the log each stands for."""


class InferenceLog:
    """One or more logs (one per InferenceService), each a folder or an s3:// URI, read as one."""

    def __init__(self, logs: Sequence[Path | str]) -> None:
        self._places = log_places(logs)
        self._times: dict[LogFile, tuple[datetime, datetime] | None] = {}

    def missing(self) -> tuple[str, ...]:
        """Logs that aren't there."""
        return tuple(p.name for p in self._places if p.missing())

    def count(self, wanted: Selection) -> int:
        """Rows of the selection. Raises LogReadError as `read` does."""
        return sum(len(t) for t in self._tables(wanted, []))

    def read(
        self, wanted: Selection, features: Sequence[str], *, rows_max: int, seed: int, positives: Callable[[], pa.Array] | None = None,
    ) -> LogRows:
        """Rows of the selection with these features; a uniform sample beyond `rows_max`, which depends on `seed` only.

        `positives`: the sample is to be judged by labels, and keeps the rows of these requests (`LabelledSample`).

        Raises LogReadError, which names the file, when a file of this model version is not a log file, is damaged, or holds
        rows of the model without one of the features.
        """
        columns = ["request_id", "time", "score", "degraded", *(FEATURE_PREFIX + name for name in features)]
        rng = np.random.default_rng(seed)
        sample = UniformSample(rows_max, rng) if positives is None else LabelledSample(rows_max, rng, positives)
        total = 0
        for table in self._tables(wanted, columns):
            total += len(table)
            sample.add(table)
        kept = sample.kept()
        if not kept:
            empty = np.zeros(0, np.float32)
            return LogRows(
                0, 0, dict.fromkeys(features, empty), empty, empty.astype(np.bool_), np.zeros(0, np.object_), np.zeros(0), np.zeros(0),
            )
        table = pa.concat_tables(t for t, _ in kept)
        lengths = pc.fill_null(pc.list_value_length(table["degraded"]), 0)
        return LogRows(
            total=total, kept=len(table),
            features={name: _floats(table[FEATURE_PREFIX + name]) for name in features},
            score=_floats(table["score"]),
            degraded=np.asarray(lengths.to_numpy()) > 0,
            request_id=np.asarray(table["request_id"].to_numpy(), np.object_),
            time=np.asarray(table["time"].cast(_TIME).cast(pa.int64()).to_numpy(), np.float64) / 1e6,
            weight=np.repeat([w for _, w in kept], [len(t) for t, _ in kept]),
        )

    def _tables(self, wanted: Selection, columns: list[str]) -> Iterator[pa.Table]:
        """Matching rows, batch by batch, `columns` only."""
        for found in self._files(wanted):
            try:
                yield from self._file_tables(found, wanted, columns)
            except FileNotFoundError:
                # Retention removed it between listing and opening: its rows are gone, which is not a damaged log.
                self._times.pop(found, None)
            except (pa.ArrowException, OSError, _ForeignError) as e:
                if _written_before(found, wanted.start - _CLOCK_SLACK):
                    continue  # a torn or foreign file of an earlier window: it was reported then, and must not blind this one
                raise LogReadError(
                    f"{found.name}: not a readable file of the inference log ({_line(e)}); move it away, or find out who wrote it"
                ) from e

    def _file_tables(self, found: LogFile, wanted: Selection, columns: list[str]) -> Iterator[pa.Table]:
        # No file stays open between batches of different files, and none is mapped: it may be deleted at any time.
        with pq.ParquetFile(found.place.source(found)) as file:
            names = set(file.schema_arrow.names)
            lacking = [c for c in (*_KEYS, "request_id", "score", "degraded") if c not in names]
            if lacking:
                raise _ForeignError(f"column {lacking[0]!r} is missing")
            if found not in self._times:
                self._times[found] = _time_range(file)
            if not _overlaps(self._times[found], wanted):
                return
            present = [c for c in columns if c in names]
            for batch in file.iter_batches(BATCH_ROWS, columns=[*_KEYS, *(c for c in present if c not in _KEYS)]):
                table = pa.Table.from_batches([batch])
                table = table.filter(_mask(table, wanted))
                if len(table) == 0:
                    continue
                for column in columns:
                    if column not in names:
                        raise LogReadError(f"{found.name}: rows of model {wanted.digest[:15]}… lack the column {column!r}")
                yield as_logged(table.select(columns or ["arm"]))

    def _files(self, wanted: Selection) -> list[LogFile]:
        """Files that may hold rows of the selection, oldest first."""
        found: list[LogFile] = []
        day = (wanted.start.astimezone(UTC) - _PARTITION_SLACK).date()
        last = (wanted.end.astimezone(UTC) + _PARTITION_SLACK).date()
        while day <= last:
            when = datetime(day.year, day.month, day.day, tzinfo=UTC)
            for place in self._places:
                found += place.files(when, wanted.version)
            day += timedelta(days=1)
        listed = set(found)
        self._times = {p: t for p, t in self._times.items() if p in listed}  # bounded by what the disk holds
        return sorted((p for p in found if p not in self._times or _overlaps(self._times[p], wanted)), key=lambda p: p.order)


class _ForeignError(Exception):
    """A Parquet file, but not one of an inference log."""


def as_logged(table: pa.Table) -> pa.Table:
    """The columns in the log's own types, so that files go together that were merged by hand and differ in details of their schemas.

    Raises ArrowException for what is no such value. Times without a zone are UTC, as pandas and Spark write them.
    """
    for i, name in enumerate(table.column_names):
        wanted = pa.float32() if name.startswith(FEATURE_PREFIX) else FIXED.field(name).type
        column = table.column(i)
        if column.type != wanted:
            column = column.cast(wanted, safe=wanted != _TIME)  # nanoseconds are cut to microseconds
        table = table.set_column(i, pa.field(name, wanted), column)
    return table


def _written_before(file: LogFile, when: datetime) -> bool:
    """Whether the file was last changed before `when`, so that it can't hold rows of later times."""
    changed = file.place.changed(file)
    return changed is None or changed < when


def _mask(table: pa.Table, wanted: Selection) -> pa.ChunkedArray:
    time = table["time"].cast(_TIME, safe=False)
    inside = pc.and_(
        pc.greater_equal(time, pa.scalar(wanted.start, _TIME)), pc.less(time, pa.scalar(wanted.end, _TIME)),
    )
    arms = pc.is_in(table["arm"].cast(pa.string()), value_set=pa.array(sorted(wanted.arms)))
    return pc.and_(pc.and_(inside, pc.equal(table["model_digest"].cast(pa.string()), wanted.digest)), arms)


def _time_range(file: pq.ParquetFile) -> tuple[datetime, datetime] | None:
    """Smallest and largest time by the footer; None when the footer doesn't say (the rows are then read)."""
    column = file.schema_arrow.names.index("time")
    times: list[datetime] = []
    for group in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(group).column(column).statistics
        if statistics is None or not statistics.has_min_max:
            return None
        low, high = statistics.min, statistics.max
        if not isinstance(low, datetime) or not isinstance(high, datetime) or low.tzinfo is None or high.tzinfo is None:
            return None
        times += [low, high]
    return (min(times), max(times)) if times else None


def _overlaps(times: tuple[datetime, datetime] | None, wanted: Selection) -> bool:
    return times is None or (times[0] < wanted.end and times[1] >= wanted.start)


def _floats(column: pa.ChunkedArray) -> Float32s:
    """float32 with NaN for null."""
    return np.asarray(pc.fill_null(column.cast(pa.float32()), float("nan")).to_numpy(), np.float32)


def _line(e: Exception) -> str:
    """The first line of a library's message: Arrow appends pages of context."""
    return str(e).strip().split("\n", 1)[0][:200]
