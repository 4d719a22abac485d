"""Rows of a CSV or Parquet file → score requests, in blocks: the file may be larger than memory.

A CSV has no types, and a reader that guesses them changes keys: 007 becomes 7, 22 digits become a float. So all of it is read as text,
and means what the contract says, as in training (hafnium_training.tables, which reads a file whole). What can't be that stays the text
that it is: the service refuses that row and says why. Some things are said by whole columns alone (was `12.0` written for 12?), so a CSV
is read twice; a malformed line is found that way before the first request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from hafnium_contract.encoding import category_text
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import EventTime, Feature, ModelContract
from hafnium_contract.table_text import MISSING_NUMBERS, TRUTH, WHOLE_WITH_FRACTION, is_literal

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_YEARS = (datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC))
_FIXED = ("request_id", "event_time")
_MISSING_TIME = r"(?i:[+-]?nan|#?n/a|na|null|none|)"
_NAN = "[+-]?(?i:nan)"
_MISSING_WORD = "|".join(re.escape(word) for word in MISSING_NUMBERS if word.lower() != "nan")
_MISSING_VALUE = f"{_NAN}|{_MISSING_WORD}"
"""In a column of numbers or truths: training's words and no others. `none` beside codes is a category, and then no code is a number."""
_NUMBER = r"(?i:[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf(inity)?)"
"""What float() takes, but for zeros in front: 0763 is a code, and no number."""
_TRUTH = "(?i:true|false|[01](\\.0)?)"

Row = dict[str, Any]

pc: Any = pyarrow.compute  # its functions are made at import, so type checkers can't see them


def table_rows(file: Path, contract: ModelContract | None) -> Iterator[Row]:
    """Score requests of a .csv or .parquet file; what is missing is left out. Raises InputError that says what is wrong with it."""
    try:
        if file.suffix.lower() == ".csv":
            yield from _csv_rows(file, contract)
        else:
            with pq.ParquetFile(file) as parquet:
                convert = _by_contract(parquet.schema_arrow.names, contract, file) if contract is not None else _by_prefix(
                    parquet.schema_arrow.names, file)
                yield from _rows(parquet.iter_batches(batch_size=8192), convert)
    except (OSError, pa.ArrowException) as e:
        raise InputError(f"{file}: can't be read: {e}") from e


def _csv_rows(file: Path, contract: ModelContract | None) -> Iterator[Row]:
    with pacsv.open_csv(file) as reader:
        names = reader.schema.names
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise InputError(f"{file}: the header names a column twice: {', '.join(repeated)}")
    meant: dict[str, Callable[[str], Any]]
    if contract is not None:
        convert = _by_contract(names, contract, file)
        whole = _whole_columns(file, names, dict.fromkeys(_whole_numbers(contract, names), WHOLE_WITH_FRACTION))
        meant = dict.fromkeys(whole, _without_fraction)
    else:
        convert = _by_prefix(names, file)
        features = [n for n in names if n.startswith("features.")]
        numbers = _whole_columns(file, names, dict.fromkeys(features, rf"\s*({_NUMBER}|{_NAN})\s*"), rf"\s*({_MISSING_WORD})\s*")
        others = [f for f in features if f not in numbers]
        truths = _whole_columns(file, names, dict.fromkeys(others, rf"\s*({_TRUTH})\s*"), rf"\s*({_MISSING_VALUE})\s*")
        meant = dict.fromkeys(numbers, _plain_number) | dict.fromkeys(truths, _plain_truth)
    with _texts(file, names) as reader:
        for row in _rows(reader, dict):
            yield convert({k: meant[k](v) if k in meant else v for k, v in row.items()})


def _without_fraction(text: str) -> str:
    return text.removesuffix(".0")


def _plain_number(text: str) -> float | None:
    return None if _is_missing(text, _MISSING_VALUE) else float(text)


def _plain_truth(text: str) -> bool | None:
    return None if _is_missing(text, _MISSING_VALUE) else TRUTH[text.strip().lower()] == 1.0


def _is_missing(text: str, words: str) -> bool:
    """In a column of numbers, truths or times alone: the category or country NA is not missing."""
    return re.fullmatch(words, text.strip()) is not None


def _texts(file: Path, names: list[str]) -> pacsv.CSVStreamingReader:
    return pacsv.open_csv(file, convert_options=pacsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


def _whole_columns(file: Path, names: list[str], patterns: dict[str, str], missing: str = "") -> set[str]:
    """Columns with a value all of whose values match their pattern. What matches `missing` is no value."""
    seen: set[str] = set()
    failed: set[str] = set()
    with _texts(file, names) as reader:
        for batch in reader:
            for name in patterns.keys() - failed:
                column = batch.column(name)
                column = column.filter(pc.invert(pc.match_substring_regex(column, f"^(?:{missing})$")))
                if len(column) == 0:
                    continue
                seen.add(name)
                if not pc.all(pc.match_substring_regex(column, f"^(?:{patterns[name]})$")).as_py():
                    failed.add(name)
    return seen - failed


def _rows(batches: Iterable[pa.RecordBatch], convert: Callable[[Row], Row]) -> Iterator[Row]:
    for batch in batches:
        for row in cast(list[Row], batch.to_pylist()):
            # JSON has no infinity, and training reads one as missing too; a blank is no category and nobody's key
            yield convert({k: v for k, v in row.items() if not _missing(v)})


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and not math.isfinite(value))


def _by_prefix(names: list[str], file: Path) -> Callable[[Row], Row]:
    for name in names:
        if name not in _FIXED and not name.startswith(("entity.", "features.")):
            raise InputError(
                f"{file}: column {name!r}: without a contract, columns are request_id, event_time, entity.NAME and features.NAME; "
                "give --contract to have them told apart by their names"
            )

    def convert(row: Row) -> Row:
        out: Row = {"request_id": _value(row["request_id"])} if "request_id" in row else {}
        if (when := _moment(row.get("event_time"))) is not None:
            out["event_time"] = _value(when)
        for part in ("entity", "features"):
            values = {k.removeprefix(f"{part}."): _value(v) for k, v in row.items() if k.startswith(f"{part}.")}
            out[part] = {k: v for k, v in values.items() if not _missing(v)}
        return out

    return convert


@dataclass(frozen=True)
class _Times:
    """The contract's times in a file, for messages."""

    spec: EventTime
    where: str

    def __call__(self, value: Any) -> Any:
        unit = self.spec.unit
        if isinstance(value, str) and _is_missing(value, _MISSING_TIME):
            return None
        number = _number(value) if unit is not None else value
        if unit is None or not isinstance(number, int | float):
            return _moment(value)
        try:
            when = self.spec.origin + timedelta(seconds=number * _UNIT_S[unit])
        except OverflowError:
            when = None
        if when is None or not _YEARS[0] <= when < _YEARS[1]:
            raise InputError(
                f"{self.where}: expected a moment from 1970 to 2200, got {value} "
                f"(unit {unit}, origin {self.spec.origin:%Y-%m-%d}; are they right in the contract?)"
            )
        return when


def _by_contract(names: list[str], contract: ModelContract, file: Path) -> Callable[[Row], Row]:
    fields = contract.request_fields
    keys = {e.join_key for e in contract.entities}
    if not set(names) & set(fields):
        raise InputError(f"{file}: none of its columns is a request field of {contract.name}: {', '.join(sorted(fields))}")
    time, id_column = contract.data.event_time, contract.data.request_id
    moment = _Times(time, f"{file}: column {time.column}")

    def convert(row: Row) -> Row:
        features = {k: _typed(row[k], fields[k]) for k in fields if k in row}
        out: Row = {
            "entity": {k: _key(row[k]) for k in keys if k in row},
            "features": {k: v for k, v in features.items() if not _missing(v)},
        }
        if id_column is not None and id_column in row:
            out["request_id"] = str(row[id_column])
        if (when := moment(row.get(time.column))) is not None:
            out["event_time"] = _value(when)
        return out

    return convert


def _whole_numbers(contract: ModelContract, names: list[str]) -> set[str]:
    """Columns of text in which `12.0` may stand for 12."""
    found = {e.join_key for e in contract.entities} | {contract.data.request_id}
    found |= {name for name, f in contract.request_fields.items() if f.dtype == "category" and not is_literal(f)}
    return {n for n in names if n in found}


def _key(value: Any) -> Any:
    """A join key as training reads it: a column of whole numbers with gaps comes as floats, and 12.0 is the key 12."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else _value(value)


def _moment(value: Any) -> Any:
    """A text with a time is that time, a date alone its midnight UTC, as in training; any other text is left to the service.
    None: missing."""
    if isinstance(value, str) and _is_missing(value, _MISSING_TIME):
        return None
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d", value):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            return value
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    return value


def _typed(value: Any, feature: Feature) -> Any:
    """A value as the feature's type has it; None: missing."""
    if feature.dtype == "category":
        return category_text(feature, value)
    if feature.dtype == "bool":
        truth = TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
        return bool(truth) if truth in (0, 1) else _value(value)
    number = _number(value)
    if feature.dtype == "int" and isinstance(number, float) and number.is_integer():
        return int(number)
    return number


def _number(value: Any) -> Any:
    """The number that a text, or a decimal, stands for, None for a missing one; anything else as it is."""
    if isinstance(value, str):
        if value in MISSING_NUMBERS:
            return None
        if "_" in value or not value.isascii():  # 1_000 is a number to Python alone
            return value
    elif not isinstance(value, Decimal):
        return _value(value)
    try:
        return float(value)
    except ValueError:
        return value


def _value(value: Any) -> Any:
    """As JSON: times with their zone (UTC when they have none)."""
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).isoformat()
    return value.isoformat() if isinstance(value, date) else value
