"""Flat table + contract → the frozen arrays that training sees, and their split in time.

Two ways to fool oneself are closed here. A label that was not known at the cut-off must not be used, although the file has it.
And frauds often become known sooner than non-frauds do (a charge-back comes after weeks, its absence is only certain after
months), so "rows whose label was known" alone would keep the early-known frauds of a time whose normal rows are not known yet:
the newest weeks would look like nothing but fraud. So the rows are cut where the share of known labels falls for the rest of the time
(`mature_until`), rows whose label is blank included, with a cut-off and without one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from hafnium_contract.bundle import REFERENCE_ROWS_MIN
from hafnium_contract.encoding import UNKNOWN_CATEGORY, Floats, Matrix, assemble, encode_column
from hafnium_contract.errors import FeatureError, InputError
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_training.tables import (
    as_keys,
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
POSITIVES_MIN = 10
"""Of each kind of label in each part. With fewer an interval around the ROC-AUC of the test part is too narrow: noise then passes for
skill in 45 % of trainings (1 positive), 23 % (2) or 6 % (5), instead of in 2.5 %."""
WINDOW_LABELS_MAX = 2_000
"""In the window by which a row is judged: with so many, chance moves their share by about as much as KNOWN_DROP_MAX, and with more a gap
would only count for longer."""
KNOWN_DROP_MAX = 0.05
"""Share of known labels may be so much lower, relatively, than before, and the rows still count as mature. Where 5 % of the
negatives are still to come, the share of frauds is 5 % too high: less than the share itself moves from week to week."""
REFUSED_SHARE_MAX = 0.05
"""Of the rows, that serving would refuse. Some dirt is in every history; more means that the contract describes other data (another unit,
another range), and the model would learn from rows of a kind that it is never asked about."""
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
    """Attribute → text per row (None = not known)."""
    values: Mapping[str, Floats]
    """Encoded features before derivation (name → float64 [rows]): what a derived column is computed from."""
    keys: Mapping[str, npt.NDArray[np.object_]]
    """Join key → text per row. Only those that the file has."""
    notices: tuple[str, ...] = ()
    """What whoever uses them should know of these rows."""

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
            MappingProxyType({k: _frozen(v[index]) for k, v in self.keys.items()}), self.notices,
        )

    def digest(self) -> str:
        """`sha256:…` over all that a training or an evaluation reads of the rows: values (those that only feed others, too), labels, times,
        protected attributes and join keys. CSV and Parquet of the same rows agree."""
        h = hashlib.sha256(self.contract.digest.encode())
        # NaN has many bit patterns and -0.0 equals 0.0: one of each, or equal data would differ
        columns = [self.X, *(self.values[name] for name in sorted(self.values))]
        canonical = (np.where(np.isnan(c), c.dtype.type(np.nan), c + c.dtype.type(0.0)) for c in columns)
        for part in (*canonical, self.y, self.event_time, self.label_time):
            h.update(np.ascontiguousarray(part).tobytes())
        for kind, texts in (("protected", self.protected), ("key", self.keys)):
            for name in sorted(texts):
                h.update(f"\x1e{kind}\x1e{name}\x1e".encode())
                h.update("\x1f".join("" if v is None else str(v) for v in texts[name]).encode())
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


def dataset_of(
    frame: pd.DataFrame, contract: ModelContract, *, until: datetime | None = None, source: str = "data", compared_only: bool = False,
) -> Dataset:
    """Table → Dataset of the rows whose labels were known at `until`, oldest first (ties in the table's order).

    `until` (aware; None: no cut-off): a row is used iff event_time < until, label_time ≤ until, and it is not newer than the moment up to
    which labels are mature (`mature_until`). Rows with a blank label or a blank label time are not known yet.
    `compared_only`: rows for a model that is only compared with; what its contract would refuse is then no hindrance.
    Raises InputError: a column is missing or of another type, too few rows, labels of one kind only, a category without a known value,
    or more than REFUSED_SHARE_MAX of rows that serving would refuse.
    """
    if until is not None and until.tzinfo is None:
        raise InputError(f"--until {until.isoformat()}: has no time zone; write for example {until.isoformat()}Z")
    wanted = [c for f in contract.features if (c := feature_column(f)) is not None]
    attributes = [] if compared_only else [p.name for p in contract.protected]
    require_columns(frame, [contract.data.event_time.column, contract.data.label.column, *wanted, *attributes], source)

    truth = labels(contract, frame, source)
    events = _micros(event_times(contract, frame, source))
    known_at, known = _known(label_times(contract, frame, source))
    used, asked = known & ~np.isnan(truth), np.ones(len(frame), bool)
    if until is not None:
        cut = round(until.timestamp() * 1e6)
        asked = events < cut
        used &= asked & (known_at <= cut)
        if not (truth[used] == 0.0).any():
            raise InputError(f"{source}: no negative label is known by {until.isoformat()}; choose a later --until")
    notices: list[str] = []
    newest = mature_until(events[asked], used[asked])
    if newest is not None and (used & (events > newest)).any():
        negatives = events[used & (events <= newest) & (truth == 0.0)]
        if len(negatives):  # what follows the newest one is positives only, however few
            newest = int(negatives.max())
        before = asked & (events <= newest)
        too_new, since = used & ~before, asked & ~before
        notices.append(
            f"{too_new.sum()} rows after {_moment(newest)} are left out although their labels are known: labels of "
            f"{too_new.sum() / since.sum():.1%} of the rows since then are, of {used[before].mean():.1%} before; where the others are "
            "still to come, those that are known early are not like them. If no more will come, leave rows without a label out of the data"
        )
        used &= ~too_new

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
        if not compared_only:
            _some_category_known(f, values[f.name], part[column], f"{source}: column {column}")
    X = assemble(contract, values, events[index] / 1e6)
    if not compared_only:
        notices += _refused_by_serving(contract, values, X, source)
        if len(index) < REFERENCE_ROWS_MIN:
            notices.append(
                f"the drift reference has {len(index)} rows and needs {REFERENCE_ROWS_MIN}: drift jobs will answer Error, which holds a "
                f"rollout that waits for them. Train on more rows, or give those jobs `--min-rows {len(index)}`: windows of so few rows "
                "are then judged, and show large changes only"
            )
    return Dataset(
        contract=contract,
        X=_frozen(X),
        y=_frozen(truth[index].astype(np.int8)),
        event_time=_frozen(events[index]),
        label_time=_frozen(known_at[index]),
        request_ids=_frozen(request_ids(contract, frame, source).to_numpy(object)[index]),
        protected=MappingProxyType({p: _texts(part[p]) for p in attributes}),
        values=MappingProxyType({k: _frozen(v) for k, v in values.items()}),
        keys=MappingProxyType({e.join_key: _texts(part[e.join_key]) for e in contract.entities if e.join_key in part.columns}),
        notices=tuple(notices),
    )


def mature_until(events: Times, known: npt.NDArray[np.bool_]) -> int | None:
    """The moment of the newest row up to which labels are as well known as before it. None: there is nothing to measure it by.

    Every labelled row has a window: as many rows before it as usually hold a twentieth of the labels (100 to WINDOW_LABELS_MAX of them).
    Of the rows in its window at least half of the usual share must be known, and as many as in the tenth of all rows before the window,
    less KNOWN_DROP_MAX and less what chance may do. So a gap changes nothing once its window is past, and a share that is lower for good
    is the new measure after a tenth of the rows, while one that falls on and on (labels that are still to come) never is.
    """
    order = np.argsort(events, kind="stable")
    in_order = known[order]
    at = np.flatnonzero(in_order)
    if len(at) < ROWS_MIN // 2:
        return None
    counted = min(max(len(at) // 20, ROWS_MIN // 2), WINDOW_LABELS_MAX)
    # of labelled rows, and of those where they are dense: a long time with few labels says nothing of what is usual
    window = int(np.quantile(at[counted - 1 :] - at[: len(at) - counted + 1], 0.25)) + 1
    history = max(len(known) // (10 * window), 1) * window
    sums = np.concatenate([[0], np.cumsum(in_order)])
    ends, begins, first = (np.maximum(at + 1 - back, 0) for back in (0, window, window + history))
    share, before = (sums[ends] - sums[begins]) / window, (sums[begins] - sums[first]) / history
    drop = np.maximum(KNOWN_DROP_MAX * before, 2.0 * np.sqrt(before * (1.0 - before) / window))
    # never empty: the first window with half of the usual share has less before it
    mature = np.flatnonzero((share >= counted / window / 2.0) & (share >= before - drop))
    return int(events[order[at[mature[-1]]]])


def _some_category_known(feature: Feature, codes: Floats, column: pd.Series[Any], where: str) -> None:
    if feature.dtype != "category" or not (codes == UNKNOWN_CATEGORY).any() or (codes >= 0.0).any():
        return
    found = list(dict.fromkeys(str(v) for v in column[codes == UNKNOWN_CATEGORY].head(1000)))[:3]
    raise InputError(
        f"{where}: no value is a category of {feature.name}: it holds {', '.join(map(repr, found))}, …; the contract names "
        f"{', '.join(map(repr, feature.categories[:3]))}{', …' if len(feature.categories) > 3 else ''}"
    )


def _refused_by_serving(contract: ModelContract, values: Mapping[str, Floats], X: Matrix, source: str) -> list[str]:
    """A notice of the rows that serving would refuse, if there are any. Raises InputError when they are too many."""
    refused = np.zeros(len(X), bool)
    why: list[str] = []
    at = {f.name: j for j, f in enumerate(contract.inputs)}
    for f in contract.features:
        found = values[f.name] if f.name in values else X[:, at[f.name]] if f.name in at else None
        if found is None:
            continue
        looked_up = f.request_field is None and f.name in values
        outside = np.zeros(len(X), bool)
        if f.range is not None and f.out_of_range == "reject" and f.name in values:
            outside = (found < f.range[0]) | (found > f.range[1])
            if looked_up:  # such a value in the store counts as a missing one
                outside &= f.missing == "reject"
        missing = np.isnan(found) & (f.missing == "reject")
        for rows, what in ((missing, "missing"), (outside, "out of range")):
            if rows.any():
                why.append(f"{f.name} {what} in {rows.mean():.2%}")
                refused |= rows
    if not why:
        return []
    text = f"{refused.mean():.2%} of {len(X)} rows would be refused in serving: {', '.join(why)}"
    if float(refused.mean()) > REFUSED_SHARE_MAX:
        raise InputError(
            f"{source}: {text}; at most {REFUSED_SHARE_MAX:.0%} may be: correct the data or, if such rows are normal, the contract "
            "(range, outOfRange, missing)"
        )
    return [text]


def split_by_time(data: Dataset, shares: tuple[float, float, float] = SHARES) -> Split:
    """Oldest rows to train, newest to test. Rows of one moment stay together, so no part looks into the next one.

    Raises InputError when a part would have fewer than POSITIVES_MIN labels of a kind, or when an input has no value in the train part.
    """
    first = _boundary(data.event_time, shares[0])
    second = _boundary(data.event_time, shares[0] + shares[1])
    rows = np.arange(data.rows, dtype=np.int64)
    split = Split(data.take(rows[:first]), data.take(rows[first:second]), data.take(rows[second:]))
    for name, part in split.parts():
        if min(part.positives, part.rows - part.positives) < POSITIVES_MIN:
            raise InputError(
                f"the {name} part of the data ({part.rows} rows, oldest to newest) has {part.positives} positive labels and "
                f"{part.rows - part.positives} negative ones; each part needs {POSITIVES_MIN} of both: give data over a longer time"
            )
    return replace(split, notices=(*data.notices, *_constant_inputs(split), *_known_late(split)))


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


def _known_late(split: Split) -> tuple[str, ...]:
    """The evaluation is split by event time alone: how much of the training it could not have had when the test part began."""
    began = split.test.event_time[0]
    late = float((split.train.label_time > began).mean())
    if late == 0.0:
        return ()
    return (
        f"labels of {late:.0%} of the train part became known only after the test part had begun: a model trained at that moment could not "
        "have used them, so the evaluation is optimistic where the world changes quickly",
    )


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
    return _frozen(as_keys(column).to_numpy(object, copy=True))


def _moment(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _frozen(array: _A) -> _A:
    array.flags.writeable = False
    return array
