"""Values of a contract → the float32 matrix that the ONNX graph takes: the same code in training and in serving.

Column j of the matrix is `contract.inputs[j]`. NaN = missing. A category is its code, an unknown category is -1
(the graph has a row of its own for it), a bool is 0 or 1. Clamping, imputing and scaling are inside the graph and not here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hafnium_contract.errors import FeatureError, Problem
from hafnium_contract.model_contract import FLOAT_MAX, Derived, Feature, FromDerived, ModelContract

UNKNOWN_CATEGORY = -1.0
_INT_EXACT_MAX = 2**53

Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]


def is_missing(value: Any) -> bool:
    """None and NaN are missing; so are pandas' NaT and NA, which differ from themselves or refuse comparison."""
    if value is None:
        return True
    try:
        return bool(value != value)
    except TypeError:
        return True


def encode_value(feature: Feature, value: Any, path: str) -> float:
    """One value → float64. Raises FeatureError with `path`, what was expected and what came. Missing → NaN, always.

    Policy for missing values is the caller's: this function only says what a present value means.
    """
    if is_missing(value):
        return math.nan
    if isinstance(value, np.generic):
        value = value.item()
    if feature.dtype == "category":
        if not isinstance(value, str):
            raise _problem(path, "a string", value)
        return float(category_codes(feature).get(value, UNKNOWN_CATEGORY))
    if feature.dtype == "bool":
        if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
            return float(value)
        raise _problem(path, "true or false", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _problem(path, "a number", value)
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if math.isinf(number):
        raise _problem(path, "a finite number", value)
    if abs(number) > FLOAT_MAX:
        raise _problem(path, f"a number up to {FLOAT_MAX:.7g}, float32's largest", value)
    if feature.dtype == "int" and (not number.is_integer() or abs(number) > _INT_EXACT_MAX):
        raise _problem(path, "a whole number up to 2^53", value)
    assert feature.range is not None  # noqa: S101 - the contract's validator guarantees it
    low, high = feature.range
    if feature.out_of_range == "reject" and not low <= number <= high:
        raise _problem(path, f"a value from {low:g} to {high:g} {_unit(feature)}".rstrip(), value)
    return number


def plain_encoder(feature: Feature) -> Callable[[Any], float | None]:
    """encode_value for values that are plainly good, several times faster; None: ask encode_value, which knows what is wrong."""
    if feature.dtype == "category":
        codes = {c: float(i) for c, i in category_codes(feature).items()}
        return lambda value: codes.get(value) if type(value) is str else None
    if feature.dtype == "bool":
        return lambda value: float(value) if type(value) is bool else None
    low, high = _plain_range(feature)
    if feature.dtype == "int":
        return lambda value: float(value) if (
            (type(value) is int or (type(value) is float and value.is_integer())) and low <= value <= high
        ) else None

    def number(value: Any) -> float | None:
        kind = type(value)
        if kind is float:
            return value if low <= value <= high else None  # false for NaN
        return float(value) if kind is int and low <= value <= high else None

    return number


def _plain_range(feature: Feature) -> tuple[float, float]:
    """Between which a number is plainly good, and a code, too."""
    if feature.dtype == "category":
        return 0.0, len(feature.categories) - 1.0
    if feature.dtype == "bool":
        return 0.0, 1.0
    assert feature.range is not None  # noqa: S101 - the contract's validator guarantees it
    low, high = feature.range if feature.out_of_range == "reject" else (-_INT_EXACT_MAX, _INT_EXACT_MAX)
    return max(low, -_INT_EXACT_MAX), min(high, _INT_EXACT_MAX)


@dataclass(frozen=True)
class PlainColumns:
    """`plain_encoder` of several features for many rows at once: which values are plainly good. Each [features, 1]."""

    low: Floats
    high: Floats
    whole: npt.NDArray[np.bool_]
    """Whole numbers only."""

    @classmethod
    def of(cls, features: Sequence[Feature]) -> Self:
        ranges = np.array([_plain_range(f) for f in features], np.float64).reshape(-1, 2)
        return cls(ranges[:, :1], ranges[:, 1:], np.array([[f.dtype == "int"] for f in features], bool).reshape(-1, 1))

    def good(self, values: Floats) -> npt.NDArray[np.bool_]:
        """Numbers, or codes of categories and bools, [features, rows] → which are plainly good. NaN is not."""
        return (values >= self.low) & (values <= self.high) & ((values == np.floor(values)) | ~self.whole)


def number_column(feature: Feature) -> Callable[[Sequence[Any]], Floats]:
    """A function from a column of values to numbers, and codes of categories and bools; NaN where the type is not plainly right.

    Together with PlainColumns, which says whether they are in range, it is `plain_encoder` for many rows.
    """
    plain = plain_encoder(feature)
    right = {"category": frozenset({str}), "bool": frozenset({bool})}.get(feature.dtype, frozenset({float, int}))
    codes = {c: float(i) for c, i in category_codes(feature).items()}

    def column(values: Sequence[Any]) -> Floats:
        if right.issuperset(map(type, values)):
            if codes:
                return np.fromiter(map(codes.get, values, repeat(math.nan)), np.float64, len(values))
            try:
                return np.array(values, np.float64)
            except OverflowError:  # a whole number of more than 308 digits
                pass
        return np.array([math.nan if (number := plain(value)) is None else number for value in values], np.float64)

    return column


def _unit(feature: Feature) -> str:
    return "" if feature.unit == "1" else feature.unit


def _problem(path: str, expected: str, value: Any) -> FeatureError:
    if isinstance(value, dict | list):  # never shown: it may be large, and deep
        shown = "an object" if isinstance(value, dict) else "a list"
    else:
        shown = repr(value)
    return FeatureError([Problem(path, f"expected {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")])


_CODES: dict[tuple[str, ...], dict[str, int]] = {}


def category_codes(feature: Feature) -> dict[str, int]:
    """Category → code. Cached by the tuple of categories: a request must not build a dict."""
    codes = _CODES.get(feature.categories)
    if codes is None:
        codes = _CODES[feature.categories] = {c: i for i, c in enumerate(feature.categories)}
    return codes


def encode_column(feature: Feature, values: Any) -> Floats:
    """A whole column of training data → float64 [rows]. Values out of range stay (the graph clamps them).

    Training data is history and can't be refused row by row; a column of the wrong type is refused as a whole: times for numbers,
    fractions for whole numbers.
    """
    array = np.asarray(values)
    if feature.dtype == "category":
        codes = category_codes(feature)
        found = (v if type(v) is str or is_missing(v) else category_text(feature, v) for v in array.astype(object))
        return np.array([codes.get(v, UNKNOWN_CATEGORY) if type(v) is str else math.nan for v in found], np.float64)
    if array.dtype.kind in "mMcV":
        raise FeatureError([Problem(feature.name, f"expected a column of numbers, got {array.dtype}")])
    try:
        if array.dtype == object:
            array = np.array([math.nan if is_missing(v) else v for v in array], dtype=np.float64)
        out = array.astype(np.float64)
    except (TypeError, ValueError) as e:
        raise FeatureError([Problem(feature.name, f"expected a column of numbers, got {array.dtype}: {e}")]) from e
    out[np.isinf(out)] = np.nan
    if feature.dtype == "int":
        fractions = np.flatnonzero(out != np.floor(out))
        fractions = fractions[~np.isnan(out[fractions])]
        if len(fractions):
            raise FeatureError([Problem(
                feature.name, f"expected whole numbers, got {len(fractions)} fractions, the first in row {fractions[0] + 1}: "
                f"{out[fractions[0]]:g}",
            )])
    return out


def category_text(feature: Feature, value: Any) -> str:
    """A category as requests name it. Programs that know no gap in whole numbers keep 5411 as 5411.0, unless the contract names that."""
    text = str(value)
    if isinstance(value, float | np.floating) and text not in category_codes(feature) and float(value).is_integer():
        return str(int(value))
    return text


def derive(operation: Derived, values: Mapping[str, Floats], event_time: Floats) -> Floats:
    """A derived feature for all rows. `event_time`: seconds since 1970-01-01 UTC. NaN in, NaN out; x/0 is NaN."""
    if operation.operation == "hour_of_day":
        return np.floor(event_time / 3600.0) % 24.0
    if operation.operation == "day_of_week":
        return (np.floor(event_time / 86400.0) + 3.0) % 7.0  # 1970-01-01 was a Thursday; Monday is 0
    inputs = [values[name] for name in operation.inputs]
    match operation.operation:
        case "log1p":
            return np.log1p(np.where(inputs[0] > -1.0, inputs[0], np.nan))
        case "ratio":
            zero = inputs[1] == 0.0
            return np.where(zero, np.nan, inputs[0] / np.where(zero, 1.0, inputs[1]))
        case "difference":
            return inputs[0] - inputs[1]
        case "sum":
            return np.sum(inputs, axis=0)
        case _:
            return np.prod(inputs, axis=0)


def assemble(contract: ModelContract, values: Mapping[str, Floats], event_time: Floats) -> Matrix:
    """Encoded columns of every non-derived feature (float64 [rows]) → float32 [rows, n] in contract order."""
    columns = dict(values)
    for f in contract.features:
        if isinstance(f.source, FromDerived):
            columns[f.name] = derive(f.source.derived, columns, event_time)
    out = np.empty((len(event_time), len(contract.inputs)), np.float32)
    with np.errstate(over="ignore"):
        for j, f in enumerate(contract.inputs):
            out[:, j] = columns[f.name]
    return _without_infinity(out)


def matrix_of(rows: Sequence[Sequence[float]]) -> Matrix:
    """Rows of `row_assembler`, at least one → float32 [rows, n]."""
    flat = list(chain.from_iterable(rows))
    if flat and math.inf not in flat and -math.inf not in flat:
        try:  # a quarter of the time that numpy takes for a few of them
            return np.frombuffer(bytearray(struct.pack(f"={len(flat)}f", *flat)), np.float32).reshape(len(rows), -1)
        except (OverflowError, struct.error):
            pass  # beyond float32, or no number: numpy knows what to make of it
    with np.errstate(over="ignore"):
        return _without_infinity(np.array(rows, np.float32))


def _without_infinity(matrix: Matrix) -> Matrix:
    """What was computed and is beyond float32 can't be computed: it is missing, as x/0 is."""
    infinite = np.isinf(matrix)
    if infinite.any():
        matrix[infinite] = np.nan
    return matrix


def row_assembler(contract: ModelContract) -> Callable[[Mapping[str, float], float], list[float]]:
    """A function for one row: encoded values by name, event time → float64 values in contract order.

    Through `matrix_of` they are `assemble`'s row, to the bit: Python's float arithmetic is numpy's, and log1p is numpy's own. For a
    few rows it takes a tenth of the time.
    """
    derived = [(f.name, _scalar(f.source.derived)) for f in contract.features if isinstance(f.source, FromDerived)]
    names = contract.input_names
    if not derived:
        return lambda values, event_time_s: [values[name] for name in names]

    def row(values: Mapping[str, float], event_time_s: float) -> list[float]:
        all_values = dict(values)
        for name, compute in derived:
            all_values[name] = compute(all_values, event_time_s)
        return [all_values[name] for name in names]

    return row


def _scalar(operation: Derived) -> Callable[[Mapping[str, float], float], float]:
    """`derive` for one row."""
    inputs = operation.inputs
    first, second = inputs[0], inputs[-1]

    def log1p(values: Mapping[str, float], _: float) -> float:
        value = values[first]
        return float(np.log1p(value)) if value > -1.0 else math.nan  # false for NaN

    def ratio(values: Mapping[str, float], _: float) -> float:
        divisor = values[second]
        return values[first] / divisor if divisor != 0.0 else math.nan

    def total(values: Mapping[str, float], _: float) -> float:
        result = values[first]
        for name in inputs[1:]:
            result += values[name]
        return result

    def product(values: Mapping[str, float], _: float) -> float:
        result = values[first]
        for name in inputs[1:]:
            result *= values[name]
        return result

    match operation.operation:
        case "hour_of_day":
            return lambda _, event_time_s: math.floor(event_time_s / 3600.0) % 24.0
        case "day_of_week":
            return lambda _, event_time_s: (math.floor(event_time_s / 86400.0) + 3.0) % 7.0
        case "log1p":
            return log1p
        case "ratio":
            return ratio
        case "difference":
            return lambda values, _: values[first] - values[second]
        case "sum":
            return total
        case _:
            return product
