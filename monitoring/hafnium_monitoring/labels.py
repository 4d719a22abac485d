"""Labels of a window's requests, from a Parquet or CSV file that may be far larger than this process's memory.

The file holds every label there is, a window needs some of them. So it is read in batches, each is checked, and only the rows of
the window's requests stay. What is wrong is said with file, column and row number and never with a value: a message becomes
evidence, which more people may read than the labels, and a mistyped cell is often somebody's address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.errors import LabelError

pc: Any = pyarrow.compute  # its functions are made at import, so type checkers can't see them
BATCH_ROWS = 65_536
BLOCK_BYTES = 4 << 20
"""Of a CSV file, read at once. A row must fit in."""
ROWS_MAX = 100_000_000
"""A minute's reading; who has more cuts the file at the event's time."""
BYTES_MAX = 8 << 30
POSITIVES_MAX = 1_000_000
"""Ids that are looked up in a window's log: 50 MB, and five times as many as the rows that are then kept."""
_TIME = pa.timestamp("us", tz="UTC")
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")
"""As training reads labels that are text, without case and blanks around."""
_ZONE = r"^.{10}.*(Z|z|[+-]\d\d(:?\d\d)?)$"
"""Offsets as training knows them, PostgreSQL's `+00` too; not in the first ten characters, where `-31` is a day."""
_AS_ISO = (
    (r"^(\d{4})/(\d\d?)/(\d\d?)", r"\1-\2-\3"),
    (r"^(\d{4}-)(\d-)", r"\10\2"),
    (r"^(\d{4}-\d\d-)(\d)($|[T ])", r"\10\2\3"),
    (r"[T ](\d:)", r" 0\1"),
    (r"(:[\d.]+) ([Z+-])", r"\1\2"),
)
"""What training takes and Arrow doesn't: 2026/1/31 for 2026-01-31, hours of one digit, a blank before the offset."""


@dataclass(frozen=True)
class LabelLimits:
    """What a label file may hold."""

    rows: int = ROWS_MAX
    bytes: int = BYTES_MAX


@dataclass
class _Newest:
    """What is known of one request so far."""

    time: int
    label: float
    row: int
    contradicted_by: int | None = None


def known_labels(
    path: Path, contract: ModelContract, now: datetime, *, answered_by: datetime, wanted: Sequence[str],
    limits: LabelLimits | None = None,
) -> dict[str, float]:
    """Labels (0 or 1) of the `wanted` request ids that are known at `now`; of several the one with the latest label time.

    With a fixed `delay` instead of a label time column, all labels of the window are known once `answered_by` + delay is past.
    Raises LabelError: unreadable, too large, a label that isn't 0 or 1, a time that isn't one, or contradictory labels without
    a later one.
    """
    data, time_column = contract.data, contract.data.label_time.column
    too_early = time_column is None and answered_by + (data.label_time.delay or timedelta(0)) > now
    value_set = pa.array(wanted, pa.string())
    newest: dict[str, _Newest] = {}
    for batch in _batches(path, contract, limits or LabelLimits()):
        keep = pc.and_(pc.is_in(batch.ids, value_set=value_set), pc.and_(pc.is_valid(batch.ids), pc.is_valid(batch.label)))
        if time_column:
            keep = pc.and_(keep, pc.fill_null(pc.less_equal(batch.times, pa.scalar(now, _TIME)), False))
        rows: npt.NDArray[np.int64] = np.flatnonzero(np.asarray(keep.to_numpy(zero_copy_only=False), np.bool_))
        chosen = pa.array(rows)
        at = np.asarray(pc.fill_null(batch.times.cast(pa.int64()).take(chosen), 0).to_numpy(), np.int64)
        truth = np.asarray(batch.label.take(chosen).to_numpy(), np.float64)
        for i, t, y, row in zip(batch.ids.take(chosen).to_pylist(), at.tolist(), truth.tolist(), rows.tolist(), strict=True):
            _note(newest, i, t, y, batch.before + row + 1)
    for found in newest.values():
        if found.contradicted_by is not None:
            why = "at the same label time" if time_column else "and without a label time column nothing says which is newer"
            raise LabelError(
                f"{path}: column {data.label.column!r}: rows {found.row} and {found.contradicted_by} give one request two labels, {why}"
            )
    return {} if too_early else {i: found.label for i, found in newest.items()}


def possible_positives(
    path: Path, contract: ModelContract, now: datetime, *, since: datetime, limits: LabelLimits | None = None,
) -> pa.Array:
    """Request ids with a label 1 that was known between `since` and `now` (without a label time column: any), at most POSITIVES_MAX.

    A later label may say otherwise: these are requests that are worth looking up. Raises LabelError as `known_labels` does.
    """
    found: list[pa.Array] = [pa.array([], pa.string())]
    for batch in _batches(path, contract, limits or LabelLimits()):
        keep = pc.fill_null(pc.equal(batch.label, 1.0), False)
        if contract.data.label_time.column:
            known = pc.and_(pc.greater_equal(batch.times, pa.scalar(since, _TIME)), pc.less_equal(batch.times, pa.scalar(now, _TIME)))
            keep = pc.and_(keep, pc.fill_null(known, False))
        found.append(batch.ids.filter(keep).drop_null())
        if sum(len(ids) for ids in found) >= POSITIVES_MAX:
            break
    return pa.concat_arrays(found)[:POSITIVES_MAX]


def _note(newest: dict[str, _Newest], request: str, time: int, label: float, row: int) -> None:
    """The latest time counts; a contradiction counts until something later is known, in whatever order the file has them."""
    known = newest.get(request)
    if known is None or time > known.time:
        newest[request] = _Newest(time, label, row)
    elif time == known.time and label != known.label:
        known.contradicted_by = row


@dataclass(frozen=True)
class _Where:
    """A batch of a file; `before`: rows of earlier batches. Rows count from 1, without a CSV's header."""

    path: Path
    before: int

    def parsed(
        self, column: pa.ChunkedArray, name: str, expected: str, parse: Callable[[pa.Array], tuple[pa.Array, pa.Array]],
    ) -> pa.Array:
        """`parse` gives the values and which of the rows are wrong; Arrow's own errors quote values, so they are not shown."""
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        try:
            values, wrong = parse(array)
        except pa.ArrowException:
            raise LabelError(f"{self.path}: column {name!r}: expected {expected}; row {self._first(array, parse)} isn't so") from None
        rows = np.flatnonzero(np.asarray(pc.fill_null(wrong, False).to_numpy(zero_copy_only=False), np.bool_))
        if len(rows):
            raise LabelError(
                f"{self.path}: column {name!r}: expected {expected}; row {self.before + int(rows[0]) + 1} isn't so"
                + (f", and {len(rows) - 1} of the {len(array)} rows from there" if len(rows) > 1 else "")
            )
        return values

    def _first(self, array: pa.Array, parse: Callable[[pa.Array], tuple[pa.Array, pa.Array]]) -> int:
        """The row that an error of `parse` is about, by halving."""
        low, high = 0, len(array)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                parse(array.slice(low, middle - low))
                low = middle
            except pa.ArrowException:
                high = middle
        return self.before + low + 1


@dataclass(frozen=True)
class _Batch:
    """Checked rows of a label file. Arrays have one length; without a label time column `times` are null."""

    before: int
    """Rows of earlier batches."""
    ids: pa.Array
    label: pa.Array
    times: pa.Array


def _batches(path: Path, contract: ModelContract, limits: LabelLimits) -> Iterator[_Batch]:
    """The columns that the contract names. Raises LabelError."""
    data = contract.data
    id_column, time_column = data.request_id or "request_id", data.label_time.column
    read = 0
    for table in _tables(path, [id_column, data.label.column, *([time_column] if time_column else [])], limits):
        where = _Where(path, read)
        label = where.parsed(table[data.label.column], data.label.column, "0 or 1", _truths)
        ids = where.parsed(table[id_column], id_column, "text or a whole number", _texts)
        times = pa.nulls(len(table), _TIME)
        if time_column:
            times = where.parsed(table[time_column], time_column, "a time such as 2026-01-31T12:00:00Z", _times)
        yield _Batch(read, ids, label, times)
        read += len(table)


def _none(array: pa.Array) -> pa.Array:
    return pa.array(np.zeros(len(array), np.bool_))


def _plain(array: pa.Array) -> pa.Array:
    """Without dictionary encoding; text as `string`, without blanks around; blank text is null."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_large_string(array.type) or pa.types.is_string(array.type) or str(array.type) == "string_view":
        text = pc.utf8_trim_whitespace(array.cast(pa.string()))
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    return array


def _texts(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    return _plain(array).cast(pa.string()), _none(array)


def _truths(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """float64; null where blank or NaN."""
    plain = _plain(array)
    if pa.types.is_string(plain.type):
        lower = pc.utf8_lower(plain)
        one, zero = (pc.is_in(lower, value_set=pa.array(x)) for x in (_TRUE, _FALSE))
        value = pc.if_else(pc.is_valid(plain), one.cast(pa.float64()), pa.scalar(None, pa.float64()))
        return value, pc.and_(pc.is_valid(plain), pc.invert(pc.or_(one, zero)))
    if pa.types.is_boolean(plain.type):
        return plain.cast(pa.int8()).cast(pa.float64()), _none(array)
    value = plain.cast(pa.float64())
    value = pc.if_else(pc.is_nan(value), pa.scalar(None, pa.float64()), value)
    return value, pc.invert(pc.is_in(value, value_set=pa.array([0.0, 1.0, None])))


def _times(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Microseconds in UTC; without a zone: UTC, as in training. Numbers are refused: nothing says what they count."""
    plain = _plain(array)
    if pa.types.is_string(plain.type):
        # Digits beyond microseconds decide nothing, and nanoseconds since 1970 don't reach far enough.
        text = pc.replace_substring_regex(plain, r"(\.\d{6})\d+", r"\1")
        try:
            return _instants(text), _none(array)
        except pa.ArrowInvalid:  # only then, since rewriting all takes longer than reading them
            for pattern, iso in _AS_ISO:
                text = pc.replace_substring_regex(text, pattern, iso)
            return _instants(text), _none(array)
    if pa.types.is_null(plain.type) or pa.types.is_date(plain.type):
        return plain.cast(pa.timestamp("us")).cast(_TIME), _none(array)
    if pa.types.is_timestamp(plain.type):
        return plain.cast(pa.timestamp("us", tz=plain.type.tz), safe=plain.type.unit != "ns").cast(_TIME), _none(array)
    return pa.nulls(len(plain), _TIME), pc.is_valid(plain)


def _instants(text: pa.Array) -> pa.Array:
    zoned = pc.fill_null(pc.match_substring_regex(text, _ZONE), False)
    nothing = pa.scalar(None, pa.string())
    with_zone = pc.if_else(zoned, text, nothing).cast(_TIME)
    without = pc.if_else(zoned, nothing, text).cast(pa.timestamp("us")).cast(_TIME)
    return pc.coalesce(with_zone, without)


def _tables(path: Path, columns: list[str], limits: LabelLimits) -> Iterator[pa.Table]:
    """The file batch by batch. Raises LabelError without any text of the file in it."""
    try:
        size = path.stat().st_size
        if size > limits.bytes:
            raise LabelError(f"{path}: {size:,} bytes; at most {limits.bytes:,} are read: leave out labels older than the window")
        rows = 0
        for table in _csv(path, columns) if path.suffix.lower() == ".csv" else _parquet(path, columns):
            rows += len(table)
            if rows > limits.rows:
                raise LabelError(f"{path}: more than {limits.rows:,} rows; leave out labels older than the window")
            yield table
    except FileNotFoundError as e:
        raise LabelError(f"{path}: no such file; labels are read from there") from e
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else type(e).__name__
        kind = "CSV" if path.suffix.lower() == ".csv" else "Parquet"
        raise LabelError(f"{path}: labels can't be read as {kind} ({reason})") from None


def _lacking(path: Path, columns: list[str], there: Sequence[str]) -> None:
    lacking = [c for c in columns if c not in there]
    if lacking:
        raise LabelError(f"{path}: column {lacking[0]!r} is missing; the contract names it")


def _parquet(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    # A buffer, so that a row group of the whole file isn't in memory at once
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        _lacking(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            yield pa.Table.from_batches([batch])


def _csv(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """All as text: types guessed from the first block would make a later one an error, and its message quotes the file."""
    ragged: list[tuple[int, int, int | None]] = []

    def odd(row: Any) -> str:
        ragged.append((row.expected_columns, row.actual_columns, row.number))
        return "skip"

    def refuse_ragged() -> None:
        if ragged:
            expected, actual, number = ragged[0]
            which = "a row" if number is None else f"line {number}"
            raise LabelError(f"{path}: {which} has {actual} fields, the header {expected}")

    def skip(row: Any) -> str:
        return "skip"

    with pyarrow.csv.open_csv(
        path, read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
    ) as header:
        _lacking(path, columns, header.schema.names)
    try:
        reader = pyarrow.csv.open_csv(
            path, read_options=pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=odd, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=True, null_values=[""],
            ),
        )
    except pa.ArrowInvalid:
        refuse_ragged()
        raise
    with reader:
        for batch in reader:
            refuse_ragged()
            yield pa.Table.from_batches([batch])
        refuse_ragged()
