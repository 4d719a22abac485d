"""Many values of a store at once: the bytes of Feast's Value messages → columns of encoded numbers.

One value costs protobuf a microsecond and Python a fifth of one; in columns it is a twentieth. Only what is plainly a number of one kind,
or a category or bool of the contract, is read here. Everything else is NaN, and whoever needs it asks for that row (`FoundColumns.row`),
which is read value by value, as rows that come alone are. A property test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hafnium_transformer.online_store.records import DOUBLE_BYTES, DOUBLE_TAG, INT64_BYTES_MAX, INT64_TAG, Found, value_message
from hafnium_transformer.plan import Plan, ViewPlan

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_FLOAT_TAG, _FLOAT_BYTES = 0x35, 5
_WHOLE_MAX = 2**53
"""A larger whole number is another one as float64."""
_MESSAGE = np.arange(DOUBLE_BYTES)
_VARINT = np.arange(INT64_BYTES_MAX - 1)
_PAD = bytes(DOUBLE_BYTES)


@dataclass(frozen=True, slots=True)
class FoundColumns:
    """What a store has for many rows. Columns in the order of Plan.looked_up."""

    values: Floats
    """[features, rows], encoded; NaN: there is none, or none that is plainly good."""
    times: Floats
    """[features, rows]: event times in seconds since 1970, NaN = none."""
    row: Callable[[int], Found]
    """All that the store has for one row, whatever it is."""

    def time_of_first(self, plan: Plan, view: ViewPlan) -> float | None:
        """Event time of the view's first value in the first row; None: there is no value."""
        first = view.features[0]
        at = next(k for k, looked_up in enumerate(plan.looked_up) if looked_up is first)
        if not math.isnan(self.values[at, 0]):
            return float(self.times[at, 0])
        item = self.row(0).get(first.column)
        return None if item is None else item[1]


NO_COLUMNS = FoundColumns(np.empty((0, 0)), np.empty((0, 0)), lambda _: {})
"""Of a contract that looks nothing up."""


class ColumnReader:
    """Reads the values of one plan."""

    def __init__(self, plan: Plan) -> None:
        value = value_message()
        self.features = len(plan.looked_up)
        self._codes: dict[int, dict[bytes, float]] = {}
        for k, looked_up in enumerate(plan.looked_up):
            feature = looked_up.feature
            if feature.dtype == "category":
                self._codes[k] = {value(string_val=c).SerializeToString(): float(i) for i, c in enumerate(feature.categories)}
            elif feature.dtype == "bool":
                self._codes[k] = {value(bool_val=b).SerializeToString(): float(b) for b in (False, True)}

    def table(self, columns: Sequence[Sequence[bytes | None]], rows: int) -> Floats:
        """A column of messages for each feature, each of `rows` → values [features, rows]."""
        values = plain_numbers(list(chain.from_iterable(columns))).reshape(self.features, rows)
        for k, codes in self._codes.items():
            values[k] = [math.nan if cell is None else codes.get(cell, math.nan) for cell in columns[k]]
        return values

    def scattered(self, cells: Sequence[bytes | None], features: Ints, places: Ints, rows: int) -> Floats:
        """Messages in any order, each with its feature (-1: none that the plan knows) and its row → values [features, rows]."""
        values = np.full((self.features + 1, rows), np.nan)  # the last row is for what nobody asked for
        values[features, places] = plain_numbers(cells)
        for k, codes in self._codes.items():
            for at in np.flatnonzero(features == k).tolist():
                cell = cells[at]
                values[k, places[at]] = math.nan if cell is None else codes.get(cell, math.nan)
        return values[:-1]


def plain_numbers(cells: Sequence[bytes | None]) -> Floats:
    """Value messages → the numbers in them; NaN for what is not plainly one double, float, or whole number from 0 to 2^53."""
    given = cast(Sequence[bytes], cells) if None not in cells else [cell or b"" for cell in cells]
    sizes = np.fromiter(map(len, given), np.int64, len(given))
    joined = np.frombuffer(b"".join(given) + _PAD, np.uint8)
    if (sizes == DOUBLE_BYTES).all():
        table = joined[: -DOUBLE_BYTES].reshape(-1, DOUBLE_BYTES)
    else:
        table = joined[(np.cumsum(sizes) - sizes)[:, None] + _MESSAGE]  # what follows a shorter message is the next one's
    tags = table[:, 0]
    doubles = (tags == DOUBLE_TAG) & (sizes == DOUBLE_BYTES)
    out = np.where(doubles, np.ascontiguousarray(table[:, 1:]).view("<f8")[:, 0], np.nan)
    if doubles.all():
        return out
    floats = np.flatnonzero((tags == _FLOAT_TAG) & (sizes == _FLOAT_BYTES))
    if len(floats):
        out[floats] = np.ascontiguousarray(table[floats, 1:_FLOAT_BYTES]).view("<f4")[:, 0]
    whole = np.flatnonzero((tags == INT64_TAG) & (sizes >= 2) & (sizes <= INT64_BYTES_MAX))
    if len(whole):
        out[whole] = _whole_numbers(table[whole, 1:], sizes[whole, None] - 1)
    return out


def _whole_numbers(table: npt.NDArray[np.uint8], sizes: Ints) -> Floats:
    """Varints [n, 8] of [n, 1] bytes each → numbers; NaN where another field follows, or the number is too large."""
    inside = sizes > _VARINT
    one = (((table >= 0x80) == (sizes - 1 > _VARINT)) | ~inside).all(axis=1)  # each byte but the last says that another follows
    numbers = (np.where(inside, table & 0x7F, 0).astype(np.int64) << (7 * _VARINT)).sum(axis=1)
    return np.where(one & (numbers <= _WHOLE_MAX), numbers, np.nan)


def columns_of(plan: Plan, found: Sequence[Found]) -> FoundColumns:
    """Rows that were read one by one, as columns."""
    values = np.full((len(plan.looked_up), len(found)), np.nan)
    times = np.full_like(values, np.nan)
    for k, looked_up in enumerate(plan.looked_up):
        for i, row in enumerate(found):
            item = row.get(looked_up.column)
            if item is not None and (value := looked_up.plain(item[0])) is not None:
                values[k, i], times[k, i] = value, item[1]
    return FoundColumns(values, times, found.__getitem__)


def event_times(stamps: Sequence[Any], seconds_of: Callable[[Any], float]) -> Floats:
    """A column of event times as the store writes them → seconds since 1970. What was written together has the same, so few are read."""
    seconds = {stamp: seconds_of(stamp) for stamp in set(stamps)}
    return np.fromiter(map(seconds.__getitem__, stamps), np.float64, len(stamps))
