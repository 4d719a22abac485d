"""Flat table + contract → the frozen arrays that training sees, and their split in time.

Two ways to fool oneself are closed here. A label that was not known at the cut-off must not be used, although the file has it.
And frauds often become known sooner than non-frauds do (a charge-back comes after weeks, its absence is only certain after
months), so "rows whose label was known" alone would keep the early-known frauds of a time whose normal rows are not known yet:
the newest weeks would look like nothing but fraud. Rows after the newest known negative are therefore left out too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import UNKNOWN_CATEGORY, Floats, Matrix, assemble, encode_column
from hafnium_contract.errors import FeatureError, InputError
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_training.tables import (
    event_times,
    feature_column,
    label_times,
    labels,
    read_table,
    request_ids,
    require_columns,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

ROWS_MIN = 200
"""Below this, a calibration and a test part of 15 % hold fewer than 30 rows each: nothing can be measured on them."""
SHARES = (0.7, 0.15, 0.15)
"""Train, validation (early stopping and calibration), test: oldest to newest."""

_A = TypeVar("_A", bound=npt.NDArray[Any])
SplitName = Literal["train", "validation", "test"]
Times = npt.NDArray[np.int64]
"""Microseconds since 1970-01-01 UTC."""


@dataclass(frozen=True)
class Dataset:
    """Labelled rows, oldest first. Arrays are read-only; all have one entry per row."""

    contract: ModelContract
    X: Matrix
    """float32 [rows, n] in contract order, NaN = missing."""
    y: npt.NDArray[np.int8]
    """1 or 0."""
    event_time: Times
    label_time: Times
    request_ids: npt.NDArray[np.object_]
    protected: Mapping[str, npt.NDArray[np.object_]]
    """Attribute → text per row (None = not known). Only those that the file has."""
    values: Mapping[str, Floats]
    """Encoded features before derivation (name → float64 [rows]): what a derived column is computed from."""
    keys: Mapping[str, npt.NDArray[np.object_]]
    """Join key → text per row. Only those that the file has."""

    @property
    def rows(self) -> int:
        return len(self.y)

    @property
    def positives(self) -> int:
        return int(self.y.sum())

    def take(self, index: npt.NDArray[np.int64]) -> Dataset:
        """The rows of `index`, in its order."""
        return Dataset(
            self.contract, _frozen(self.X[index]), _frozen(self.y[index]), _frozen(self.event_time[index]),
            _frozen(self.label_time[index]), _frozen(self.request_ids[index]),
            MappingProxyType({k: _frozen(v[index]) for k, v in self.protected.items()}),
            MappingProxyType({k: _frozen(v[index]) for k, v in self.values.items()}),
            MappingProxyType({k: _frozen(v[index]) for k, v in self.keys.items()}),
        )

    def digest(self) -> str:
        """`sha256:…` over values, labels, times and protected attributes: CSV and Parquet of the same rows agree."""
        h = hashlib.sha256(self.contract.digest.encode())
        # NaN has many bit patterns and -0.0 equals 0.0: one of each, or equal data would differ
        canonical = np.where(np.isnan(self.X), np.float32(np.nan), self.X + np.float32(0.0))
        for part in (canonical, self.y, self.event_time, self.label_time):
            h.update(np.ascontiguousarray(part).tobytes())
        for name in sorted(self.protected):
            h.update(name.encode())
            h.update("\x1f".join("" if v is None else str(v) for v in self.protected[name]).encode())
        return "sha256:" + h.hexdigest()


@dataclass(frozen=True)
class Split:
    """Three parts of one dataset that don't overlap in time: each begins after the one before has ended."""

    train: Dataset
    validation: Dataset
    test: Dataset
    notices: tuple[str, ...] = ()
    """What whoever trains on it, or reads the model card, should know of the data."""

    def parts(self) -> tuple[tuple[SplitName, Dataset], ...]:
        return (("train", self.train), ("validation", self.validation), ("test", self.test))


def load_dataset(path: Path, contract: ModelContract, *, until: datetime | None = None) -> Dataset:
    """Reads a flat table (CSV, Parquet, or a data folder) and applies the cut-off. See `dataset_of`."""
    return dataset_of(read_table(path, contract), contract, until=until, source=str(path))


def dataset_of(frame: pd.DataFrame, contract: ModelContract, *, until: datetime | None = None, source: str = "data") -> Dataset:
    """Table → Dataset of the rows whose labels were known at `until`, oldest first (ties in the table's order).

    `until` (aware; None: no cut-off): a row is used iff event_time < until, label_time ≤ until, and it is not later than
    the newest event whose negative label was known by then. Rows with a blank label or a blank label time are not known yet.
    Raises InputError: a column is missing or of another type, too few rows, or labels of one kind only.
    """
    if until is not None and until.tzinfo is None:
        raise InputError(f"--until {until.isoformat()}: has no time zone; write for example {until.isoformat()}Z")
    wanted = [c for f in contract.features if (c := feature_column(f)) is not None]
    require_columns(frame, [contract.data.event_time.column, contract.data.label.column, *wanted], source)

    truth = labels(contract, frame, source)
    events = _micros(event_times(contract, frame, source))
    known_at, known = _known(label_times(contract, frame, source))
    used = known & ~np.isnan(truth)
    if until is not None:
        cut = round(until.timestamp() * 1e6)
        used &= (events < cut) & (known_at <= cut)
        negatives = events[used & (truth == 0.0)]
        if len(negatives) == 0:
            raise InputError(f"{source}: no negative label is known by {until.isoformat()}; choose a later --until")
        used &= events <= negatives.max()

    index = np.flatnonzero(used)
    index = index[np.argsort(events[index], kind="stable")]
    _enough(truth[index], len(frame), source, contract, until)
    part = frame.iloc[index]
    values: dict[str, Floats] = {}
    for f in contract.features:
        column = feature_column(f)
        if column is None:
            continue
        try:
            values[f.name] = encode_column(f, part[column].to_numpy())
        except FeatureError as e:
            raise InputError(f"{source}: column {column}: {e}") from e
    return Dataset(
        contract=contract,
        X=_frozen(assemble(contract, values, events[index] / 1e6)),
        y=_frozen(truth[index].astype(np.int8)),
        event_time=_frozen(events[index]),
        label_time=_frozen(known_at[index]),
        request_ids=_frozen(request_ids(contract, frame, source).to_numpy(object)[index]),
        protected=MappingProxyType({p.name: _texts(part[p.name]) for p in contract.protected if p.name in part.columns}),
        values=MappingProxyType({k: _frozen(v) for k, v in values.items()}),
        keys=MappingProxyType({e.join_key: _texts(part[e.join_key]) for e in contract.entities if e.join_key in part.columns}),
    )


def split_by_time(data: Dataset, shares: tuple[float, float, float] = SHARES) -> Split:
    """Oldest rows to train, newest to test. Rows of one moment stay together, so no part looks into the next one.

    Raises InputError when a part would be empty or hold labels of one kind only, or when an input has no value in the train part.
    """
    first = _boundary(data.event_time, shares[0])
    second = _boundary(data.event_time, shares[0] + shares[1])
    rows = np.arange(data.rows, dtype=np.int64)
    split = Split(data.take(rows[:first]), data.take(rows[first:second]), data.take(rows[second:]))
    for name, part in split.parts():
        if part.rows == 0 or part.positives in (0, part.rows):
            raise InputError(
                f"the {name} part of the data ({part.rows} rows, oldest to newest) has {part.positives} positive labels and "
                f"{part.rows - part.positives} negative ones; each part needs both: give data over a longer time"
            )
    return replace(split, notices=_constant_inputs(split))


def _constant_inputs(split: Split) -> tuple[str, ...]:
    """Notices of inputs that have one value in the whole train part. Raises InputError for one that has none at all there.

    Nothing can be learnt from either. A constant is harmless (the network is blind to it) and often right (a flag that has not been
    raised yet). No value at all means that something is broken: a lookup that finds nothing, a column of another file.
    """
    nothing: list[str] = []
    notices: list[str] = []
    rest = np.concatenate([split.validation.X, split.test.X])
    for j, f in enumerate(split.train.contract.inputs):
        column = split.train.X[:, j]
        present = column[~np.isnan(column)]
        if len(present) == 0:
            later = float(np.mean(~np.isnan(rest[:, j])))
            nothing.append(f"{f.name} (0 of {len(column)} rows; {later:.0%} of the newer ones)")
        elif float(present.min()) == float(present.max()):
            shown = f"{float(present[0]):g}" if f.dtype != "category" else _category(f, float(present[0]))
            notices.append(f"{f.name} is {shown} in every row of the train part: the model learns nothing from it and ignores other values")
    if nothing:
        raise InputError(
            f"inputs without a single value in the train part (oldest {split.train.rows} rows): {', '.join(nothing)}; is the lookup or the "
            "column right? An input without values has to leave the contract"
        )
    return tuple(notices)


def _category(feature: Feature, code: float) -> str:
    return "unknown" if code == UNKNOWN_CATEGORY else repr(feature.categories[int(code)])


def _boundary(times: Times, share: float) -> int:
    at = round(len(times) * share)
    while 0 < at < len(times) and times[at] == times[at - 1]:
        at += 1
    return at


def _enough(truth: Floats, rows: int, source: str, contract: ModelContract, until: datetime | None) -> None:
    column = contract.data.label.column
    when = f" whose label was known by {until.isoformat()}" if until is not None else ""
    if len(truth) < ROWS_MIN:
        raise InputError(
            f"{source}: {len(truth)} of {rows} rows can be used{when}; training needs at least {ROWS_MIN}"
            + ("; choose a later --until or give more data" if until is not None else "; give more data")
        )
    positives = int(truth.sum())
    if positives == 0:
        raise InputError(f"{source}: no row{when} has {column} = 1; there is nothing to learn: is {column} the right column?")
    if positives == len(truth):
        raise InputError(f"{source}: every row{when} has {column} = 1; training needs negatives too")


def _micros(times: pd.Series[pd.Timestamp]) -> Times:
    return times.to_numpy("datetime64[us]").astype(np.int64)


def _known(times: pd.Series[pd.Timestamp]) -> tuple[Times, npt.NDArray[np.bool_]]:
    return _micros(times), times.notna().to_numpy(bool)


def _texts(column: pd.Series[Any]) -> npt.NDArray[np.object_]:
    missing = column.isna().to_numpy(bool)
    text = column.astype(str).to_numpy(object)
    text[missing] = None
    return _frozen(text)


def _frozen(array: _A) -> _A:
    array.flags.writeable = False
    return array
