"""Data files (CSV, Parquet) → pandas tables whose columns mean what the contract says.

A reader that guesses types is a source of skew: `007` becomes 7, `1e+05` fails in a column that began with whole numbers,
the country `NA` becomes missing, a file cut in half gives a last row of blanks. Here the contract says what each column is, a
row with too few cells is an error, and every message names the file, the column and the next step.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import Feature, FromDerived, FromView, ModelContract
from hafnium_contract.table_text import MISSING_NUMBERS, TRUTH, WHOLE_WITH_FRACTION, is_literal

CSV_BYTES_MAX = 4 * 1024**3
"""A CSV is held in memory at about twice its size; beyond this, Parquet is the right format."""
PARQUET_BYTES_MAX = 16 * 1024**3
"""In memory, of the columns that are read: ROWS_MAX rows of forty columns."""
ROWS_MAX = 50_000_000
"""50 million rows of 20 features are 8 GB as float64: more than one training machine should be asked to hold."""
COLUMNS_MAX = 10_000
_IN_FILE = "columns in the file"
"""Attribute of a frame: also those that were not read, because a misspelt column is one that no contract names."""
TRANSACTIONS = "transactions.parquet"
"""The file of a data folder that holds one row per transaction; `transactions.csv` will do too."""
SAMPLES_SHOWN = 3

_UNIT_US = {"ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6, "d": 86400e6}
_YEARS = (pd.Timestamp("1970-01-01", tz="UTC"), pd.Timestamp("2200-01-01", tz="UTC"))
"""An event outside of these is a wrong unit or origin, and nanoseconds end in 2262."""
_OFFSET = r"^.{10}.*(?:Z|z|[+-]\d\d(?::?\d\d)?)$"
"""An ISO 8601 time with an offset; the first ten characters may hold the hyphens of a date."""


def data_file(path: Path) -> Path:
    """The file with the transactions: `path` itself, or `transactions.parquet` (or .csv) when `path` is a data folder."""
    file = path / TRANSACTIONS if path.is_dir() else path
    if path.is_dir() and not file.is_file() and file.with_suffix(".csv").is_file():
        file = file.with_suffix(".csv")
    if not file.is_file():
        hint = f"; the folder {path} has no {TRANSACTIONS}" if path.is_dir() else ""
        raise InputError(f"{file}: no such file{hint}; expected a .csv or .parquet file, or a folder from `hafnium simulate`")
    return file


def read_table(
    path: Path, contract: ModelContract | None = None, *, text: Iterable[str] = (), literal: Iterable[str] = (),
    also: ModelContract | None = None,
) -> pd.DataFrame:
    """Reads a CSV or Parquet file (or a data folder's transactions) whole.

    With a contract, numeric features are float64, keys, categories, protected attributes and ids are text (blank = missing), bool
    features are 0.0, 1.0 or NaN, whatever the file's own types are; other CSV columns become numbers when all their values are, other
    Parquet columns are not read. Without one, that rule holds for all CSV columns, and Parquet columns stay as they are.
    `text` names more columns that stay text whatever they look like, `literal` those of them in which `1.0` is not `1`; `also` is another
    contract whose columns are read, too.
    Raises InputError when the file is absent, empty, malformed or over the limits.
    """
    file = data_file(path)
    suffix = file.suffix.lower()
    if suffix == ".csv":
        frame = _read_csv(file, _meanings(contract, set(text), set(literal), also), _time_columns(contract) | _time_columns(also))
    elif suffix in (".parquet", ".pq"):
        frame = _read_parquet(file, contract, _meanings(contract, set(text), set(literal), also), also)
    else:
        raise InputError(f"{file}: expected a .csv or .parquet file, got {suffix or 'no extension'}")
    if frame.empty:
        raise InputError(f"{file}: holds no rows")
    return frame


def feature_column(feature: Feature) -> str | None:
    """Column of the flat table with the feature's values; None for a derived feature, which has none."""
    if isinstance(feature.source, FromDerived):
        return None
    return feature.request_field or feature.name


def require_columns(frame: pd.DataFrame, names: Iterable[str], source: str = "data") -> None:
    """Raises InputError that lists each missing column with the likeliest misspelling of it."""
    present = [str(c) for c in frame.columns]
    in_file: tuple[str, ...] = frame.attrs.get(_IN_FILE, ())
    there = [*present, *(c for c in in_file if c not in present)]
    problems: list[str] = []
    for name in dict.fromkeys(names):
        if name in present:
            continue
        lower = {c.lower(): c for c in there}
        near = [lower[m] for m in difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.7)]
        problems.append(f"{name} (is it {near[0]}?)" if near else name)
    if problems:
        shown = ", ".join(there[:30]) + (", …" if len(there) > 30 else "")
        raise InputError(f"{source}: column{'s' if len(problems) > 1 else ''} missing: {', '.join(problems)}; it has: {shown}")


def event_times(contract: ModelContract, frame: pd.DataFrame, source: str = "data") -> pd.Series[pd.Timestamp]:
    """When each row happened: datetime64[us, UTC], in the frame's order. A text without an offset is taken as UTC."""
    spec = contract.data.event_time
    require_columns(frame, [spec.column], source)
    column = frame[spec.column]
    where = f"{source}: column {spec.column}"
    if spec.unit is None:
        times = timestamps(column, where)
    else:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        _refuse(~np.isfinite(numbers), column, where, f"a number (unit {spec.unit})")
        micros = np.round(numbers * _UNIT_US[spec.unit])
        origin = pd.Timestamp(spec.origin)
        first, last = (float((t - origin) // pd.Timedelta(microseconds=1)) for t in _YEARS)
        _refuse((micros < first) | (micros >= last), column, where, f"a moment from 1970 to 2200 (unit {spec.unit}, "
                f"origin {spec.origin:%Y-%m-%d}; are they right in the contract?)")
        start = np.datetime64(spec.origin.astimezone(UTC).replace(tzinfo=None), "us")
        times = pd.Series(start + micros.astype("timedelta64[us]"), index=frame.index).dt.tz_localize("UTC")
    _refuse(times.isna().to_numpy(), column, where, "a time on every row")
    outside = ((times < _YEARS[0]) | (times >= _YEARS[1])).to_numpy()
    _refuse(outside, column, where, "a moment from 1970 to 2200")
    return times.rename("event_time")


def label_times(contract: ModelContract, frame: pd.DataFrame, source: str = "data") -> pd.Series[pd.Timestamp]:
    """When each row's label became known: datetime64[us, UTC]; NaT = not known yet. Never before the event itself."""
    spec = contract.data.label_time
    events = event_times(contract, frame, source)
    if spec.column is None:
        assert spec.delay is not None  # noqa: S101 - the contract's validator guarantees it
        return (events + pd.Timedelta(spec.delay)).dt.as_unit("us").rename("label_time")
    require_columns(frame, [spec.column], source)
    times = timestamps(frame[spec.column], f"{source}: column {spec.column}")
    _refuse((times < events).to_numpy(), frame[spec.column], f"{source}: column {spec.column}",
            f"a time not before {contract.data.event_time.column}")
    return times.rename("label_time")


def labels(contract: ModelContract, frame: pd.DataFrame, source: str = "data") -> npt.NDArray[np.float64]:
    """float64 [rows]: 1, 0, or NaN where the label is blank. Anything else is an InputError."""
    name = contract.data.label.column
    require_columns(frame, [name], source)
    return truths(frame[name], f"{source}: column {name}")


def request_ids(contract: ModelContract, frame: pd.DataFrame, source: str = "data") -> pd.Series[str]:
    """Each row's id as text: the contract's `requestId` column, which must be unique, or else the row number from 0."""
    name = contract.data.request_id
    if name is None:
        return pd.Series(np.arange(len(frame)).astype(str), index=frame.index, dtype=object)
    require_columns(frame, [name], source)
    ids = as_keys(frame[name])
    _refuse(ids.isna().to_numpy(), frame[name], f"{source}: column {name}", "an id on every row")
    _refuse(ids.duplicated().to_numpy(), ids, f"{source}: column {name}", "each id once")
    return ids


def as_keys(column: pd.Series[Any]) -> pd.Series[str]:
    """Keys as text, the form they have in requests: 12.0 (a whole-number column that had a gap) is "12"; blank → None."""
    if pd.api.types.is_float_dtype(column.dtype):
        whole = column.dropna()
        if bool((whole == np.floor(whole)).all()) and bool((whole.abs() < 2**53).all()):
            column = column.astype("Int64")
    return _as_text(column)


def _as_text(column: pd.Series[Any]) -> pd.Series[str]:
    missing = column.isna()
    text = column.astype(object).where(~missing, "").astype(str)
    return text.astype(object).where(~missing & (text != ""), None)


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Meanings:
    """What the contracts say of columns, and all that they name."""

    numbers: frozenset[str]
    bools: frozenset[str]
    texts: frozenset[str]
    literal: frozenset[str]
    """Texts that are as they are written: see `is_literal`."""
    named: frozenset[str]


def _meanings(contract: ModelContract | None, text: set[str], literal: set[str], also: ModelContract | None) -> _Meanings:
    numbers, bools = _typed_columns(contract)
    texts = set() if contract is None else _text_columns(contract)
    literal = literal | _literal_columns(contract)
    named = set() if contract is None else _all_columns(contract)
    if also is not None:  # the first contract says what its own columns are
        n, b = _typed_columns(also)
        numbers, bools, texts = numbers | (n - named), bools | (b - named), texts | (_text_columns(also) - named)
        literal, named = literal | (_literal_columns(also) - named), named | _all_columns(also)
    texts |= text
    numbers, bools = numbers - text, bools - text
    return _Meanings(frozenset(numbers), frozenset(bools), frozenset(texts), frozenset(literal), frozenset(named | text))


def _read_csv(file: Path, meanings: _Meanings, times: set[str]) -> pd.DataFrame:
    size = file.stat().st_size
    if size == 0:
        raise InputError(f"{file}: is empty; expected a header line and rows")
    if size > CSV_BYTES_MAX:
        limit = f"at most {CSV_BYTES_MAX // 1024**3} GiB of CSV"
        raise InputError(f"{file}: {size / 1024**3:.1f} GiB, {limit}; convert it to Parquet")
    header = _header(file)
    types = {name: pa.float64() if name in meanings.numbers else pa.string() for name in header}
    try:
        table = pacsv.read_csv(
            file,
            convert_options=pacsv.ConvertOptions(column_types=types, null_values=list(MISSING_NUMBERS), strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as e:
        raise InputError(f"{file}: {_csv_problem(str(e), header)}") from e
    if table.num_rows > ROWS_MAX:
        raise InputError(f"{file}: {table.num_rows} rows, at most {ROWS_MAX}; give a part of them")
    frame = table.to_pandas()
    for name in header:
        if name in meanings.numbers:
            continue
        text = frame[name].where(frame[name] != "", None)
        if name in meanings.bools:
            frame[name] = truths(text, f"{file}: column {name}")
        elif name in meanings.texts:
            frame[name] = text if name in times or name in meanings.literal else _without_fractions(text)
        else:
            frame[name] = _numbers_if_all_are(text)
    return frame


def _without_fractions(text: pd.Series[Any]) -> pd.Series[Any]:
    """`12.0` → `12` when all values look so: whole numbers with a gap, as a program wrote them that has no gaps in whole numbers."""
    present = text.dropna()
    if len(present) == 0 or not present.iloc[0].endswith(".0") or not present.str.fullmatch(WHOLE_WITH_FRACTION).all():
        return text
    return text.str.removesuffix(".0")


def _header(file: Path) -> list[str]:
    try:
        # one block's worth is enough: the reader stops after the schema
        with pacsv.open_csv(file) as reader:
            names = reader.schema.names
    except (pa.ArrowInvalid, pa.ArrowKeyError) as e:
        raise InputError(f"{file}: {_csv_problem(str(e), [])}") from e
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise InputError(f"{file}: the header names a column twice: {', '.join(repeated)}")
    if len(names) > COLUMNS_MAX:
        raise InputError(f"{file}: {len(names)} columns, at most {COLUMNS_MAX}")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise InputError(f"{file}: the header is one column, {names[0][:60]!r}; expected commas between the columns")
    return names


def _csv_problem(message: str, header: list[str]) -> str:
    """pyarrow's text with the column's name for its number, on one line."""
    def named(m: re.Match[str]) -> str:
        at = int(m.group(1))
        return f"column {header[at]}" if at < len(header) else m.group(0)
    text = re.sub(r"(?:CSV )?column #(\d+)", named, message.strip().splitlines()[0])
    text = text.replace("CSV conversion error to double: invalid value", "expected a number, got")
    return f"malformed CSV: {text}"


def _read_parquet(file: Path, contract: ModelContract | None, meanings: _Meanings, also: ModelContract | None) -> pd.DataFrame:
    try:
        # ParquetFile and not read_table: a folder called `region=1` above the file is no column.
        # ignore_metadata: an index that pandas had stored stays a column.
        with pq.ParquetFile(file) as reader:
            names = tuple(reader.schema_arrow.names)
            columns = _parquet_columns(file, reader, None if contract is None else meanings.named)
            table = reader.read(columns=columns)
        for name in table.column_names:
            _refuse_kind(table.schema.field(name).type, f"{file}: column {name}", number=name in meanings.numbers)
        frame = table.to_pandas(ignore_metadata=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as e:
        raise InputError(f"{file}: not a readable Parquet file: {str(e).splitlines()[0]}") from e
    keep = _time_columns(contract) | _time_columns(also)
    keep |= {c.data.label.column for c in (contract, also) if c is not None}
    for name in columns:
        where = f"{file}: column {name}"
        if name in meanings.numbers:
            frame[name] = _numbers(frame[name], where)
        elif name in meanings.bools:
            frame[name] = truths(frame[name], where)
        elif name in meanings.texts and name not in keep:
            frame[name] = _as_text(frame[name]) if name in meanings.literal else as_keys(frame[name])
    frame.attrs[_IN_FILE] = names
    return frame


def _parquet_columns(file: Path, reader: pq.ParquetFile, wanted: frozenset[str] | None) -> list[str]:
    """Columns to read (None: all). Raises InputError when there are too many, or one of them is there twice."""
    found, names = reader.metadata, reader.schema_arrow.names
    if found.num_rows > ROWS_MAX:
        raise InputError(f"{file}: {found.num_rows} rows, at most {ROWS_MAX}; give a part of them")
    if len(names) > COLUMNS_MAX:
        raise InputError(f"{file}: {len(names)} columns, at most {COLUMNS_MAX}")
    columns = [n for n in names if wanted is None or n in wanted]
    repeated = sorted({n for n in columns if columns.count(n) > 1})
    if repeated:
        raise InputError(f"{file}: names a column twice: {', '.join(repeated)}")
    stored = sum(
        group.column(j).total_uncompressed_size
        for group in (found.row_group(i) for i in range(found.num_row_groups)) for j in range(group.num_columns)
        if group.column(j).path_in_schema.split(".")[0] in columns
    )
    size = max(stored, found.num_rows * len(columns) * 8)
    if size > PARQUET_BYTES_MAX:
        raise InputError(
            f"{file}: {size / 1024**3:.1f} GiB in memory, at most {PARQUET_BYTES_MAX / 1024**3:.0f} GiB; give a part of the rows"
        )
    return columns


def _refuse_kind(kind: pa.DataType, where: str, *, number: bool) -> None:
    """Raises InputError for a type that no column of a flat table has, or that is no number."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise InputError(f"{where}: expected one value a row, got {kind}")
    if number and not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
        or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise InputError(f"{where}: expected numbers, got {kind}")


def _numbers(column: pd.Series[Any], where: str) -> npt.NDArray[np.float64]:
    """float64, blank → NaN; text is read as in a CSV."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(np.float64, na_value=np.nan)
    blank = column.isna() | column.isin(MISSING_NUMBERS)
    found = pd.to_numeric(column.mask(blank), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    _refuse(np.isnan(found) & ~blank.to_numpy(bool), column, where, "a number")
    return found


def _time_columns(contract: ModelContract | None) -> set[str]:
    if contract is None:
        return set()
    times = {contract.data.event_time.column, contract.data.label_time.column}
    return {t for t in times if t is not None}


def _literal_columns(contract: ModelContract | None) -> set[str]:
    """A flat file may have a view's column under the name of its field, too."""
    literal = [f for f in (() if contract is None else contract.features) if is_literal(f)]
    fields = {f.source.field for f in literal if isinstance(f.source, FromView)}
    return fields | {c for f in literal if (c := feature_column(f)) is not None}


def _all_columns(contract: ModelContract) -> set[str]:
    """All that the contract names: a flat file may also have a view's columns under the names of its fields."""
    numbers, bools = _typed_columns(contract)
    fields = {f.source.field for f in contract.features if isinstance(f.source, FromView)}
    return numbers | bools | _text_columns(contract) | fields


def _typed_columns(contract: ModelContract | None) -> tuple[set[str], set[str]]:
    """(columns of numbers, columns of true or false)."""
    if contract is None:
        return set(), set()
    numbers = {feature_column(f) for f in contract.features if f.dtype in ("float", "int")}
    bools = {feature_column(f) for f in contract.features if f.dtype == "bool"}
    if contract.data.event_time.unit is not None:
        numbers.add(contract.data.event_time.column)
    return {n for n in numbers if n is not None}, {n for n in bools if n is not None}


def _text_columns(contract: ModelContract) -> set[str]:
    out = {e.join_key for e in contract.entities} | {p.name for p in contract.protected}
    out |= {c for f in contract.features if f.dtype == "category" and (c := feature_column(f)) is not None}
    out |= {contract.data.event_time.column, contract.data.label.column}
    return out | {c for c in (contract.data.request_id, contract.data.label_time.column) if c is not None}


def _numbers_if_all_are(text: pd.Series[Any]) -> pd.Series[Any]:
    try:
        return pd.to_numeric(text)
    except (ValueError, TypeError):
        return text


# ----------------------------------------------------------------------------------------------------------- parsing


def timestamps(column: pd.Series[Any], where: str) -> pd.Series[pd.Timestamp]:
    """A column of times (timestamps, or ISO 8601 text; without an offset: UTC) → datetime64[us, UTC], blank → NaT."""
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        times = column
    elif pd.api.types.is_numeric_dtype(column.dtype) and column.notna().any():
        raise InputError(f"{where}: holds numbers; the contract must give eventTime a unit and an origin for those")
    else:
        # Two groups: where both forms occur in one call, pandas 2.3 reads a time without an offset with another row's offset.
        text = column.astype(str)
        offset = text.str.contains(_OFFSET)
        parts = [pd.to_datetime(column[rows], format="ISO8601", utc=True, errors="coerce") for rows in (offset, ~offset)]
        times = pd.concat(parts).dt.as_unit("us")
        times = times.set_axis(np.concatenate([np.flatnonzero(offset), np.flatnonzero(~offset)])).sort_index()
        times = times.set_axis(column.index)
        # pandas takes "now" and "today" for the moment at which it reads them: another training set each time
        wrong = (times.isna() | ~text.str.match(r"\s*\d")) & column.notna()
        _refuse(wrong.to_numpy(), column, where, "an ISO 8601 time such as 2026-01-31T12:00:00Z")
    times = times.dt.tz_localize("UTC") if times.dt.tz is None else times.dt.tz_convert("UTC")
    return times.dt.as_unit("us")


def truths(column: pd.Series[Any], where: str) -> npt.NDArray[np.float64]:
    """A column of 0 and 1, or of true and false (also as text) → float64, blank → NaN."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        out = column.to_numpy(np.float64, na_value=np.nan)
        _refuse(~np.isin(out, (0.0, 1.0)) & ~np.isnan(out), column, where, "0 or 1")
        return out
    missing = column.isna()
    out: npt.NDArray[np.float64] = np.asarray(
        column.astype(str).str.strip().str.lower().map(TRUTH).where(~missing), np.float64
    )
    _refuse(np.isnan(out) & ~missing.to_numpy(), column, where, "true, false, 0 or 1")
    return out


def _refuse(wrong: npt.NDArray[np.bool_], column: pd.Series[Any], where: str, expected: str) -> None:
    """Raises InputError when any row is wrong, with how many and the first of them (rows count from 1, without the header)."""
    rows = np.flatnonzero(wrong)
    if len(rows) == 0:
        return
    shown = ", ".join(f"row {i + 1}: {_short(column.iloc[i])}" for i in rows[:SAMPLES_SHOWN])
    raise InputError(f"{where}: expected {expected}; {len(rows)} of {len(wrong)} rows are not so ({shown})")


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:57] + "..."
