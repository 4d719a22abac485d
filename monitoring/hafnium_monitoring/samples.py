"""What is compared: a bundle's reference sample, and rows of the inference log, in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.bundle import Bundle
from hafnium_contract.inference_log import FEATURE_PREFIX, logged_features
from hafnium_contract.model_contract import Feature, FromDerived, ModelContract
from hafnium_monitoring.errors import ReferenceSampleError
from hafnium_monitoring.windows import Float32s, LogRows

REFERENCE = "reference.parquet"
DAY = timedelta(days=1)
REFERENCE_ROWS_MIN, REFERENCE_ROWS_LEAST = 1_000, 200
"""A reference needs as many rows as a window (`reference_rows_min`), but never more than the first: a reference can't grow with
traffic. Never fewer than the second: against 100 rows a PSI below .45 isn't significant, so that tripled amounts would pass."""


@dataclass(frozen=True)
class Sample:
    """Values per feature and scores of one population. Every array has `rows` rows."""

    rows: int
    features: Mapping[str, Float32s]
    score: Float32s
    degraded: npt.NDArray[np.bool_] | None = None
    """None for a reference: training has no degraded answers."""
    time: npt.NDArray[np.float64] | None = None
    """When each row was answered, in seconds; None for a reference."""

    def where(self, mask: npt.NDArray[np.bool_]) -> Sample:
        """The rows where `mask` [rows] holds."""
        return Sample(
            int(mask.sum()), {k: v[mask] for k, v in self.features.items()}, self.score[mask],
            None if self.degraded is None else self.degraded[mask], None if self.time is None else self.time[mask],
        )


def sample_of(rows: LogRows) -> Sample:
    return Sample(rows.kept, rows.features, rows.score, rows.degraded, rows.time)


def reference_rows_min(window_rows_min: int) -> int:
    """How many rows a reference must have where a window must have `window_rows_min`."""
    return max(REFERENCE_ROWS_LEAST, min(window_rows_min, REFERENCE_ROWS_MIN))


def load_reference(bundle: Bundle, window_rows_min: int = REFERENCE_ROWS_MIN) -> Sample:
    """reference.parquet → Sample with every logged feature and the score.

    Raises ReferenceSampleError when a column is missing, is not numeric, or there are too few rows to see drift with: with few
    rows nothing is ever significant, and "no drift" would be all that such a reference can say.
    """
    path = bundle.path / REFERENCE
    names = [f.name for f in logged_features(bundle.contract)]
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=[*(FEATURE_PREFIX + n for n in names), "score"])
        columns = {c: np.asarray(table[c].cast(pa.float32()).to_numpy(), np.float32) for c in table.column_names}
    except (pa.ArrowException, OSError, KeyError) as e:
        raise ReferenceSampleError(f"{path}: can't be read as a reference sample: {str(e).splitlines()[0]}") from e
    lacking = [c for c in (*(FEATURE_PREFIX + n for n in names), "score") if c not in columns]
    if lacking:
        raise ReferenceSampleError(f"{path}: column {lacking[0]!r} is missing; the contract has that feature")
    needed = reference_rows_min(window_rows_min)
    if len(table) < needed:
        raise ReferenceSampleError(f"{path}: the reference has {len(table)} rows, {needed} are needed to see drift; make a larger one")
    broken = int((~np.isfinite(columns["score"])).sum())
    if broken:
        raise ReferenceSampleError(f"{path}: {broken} scores are NaN or infinite; score the reference anew")
    return Sample(len(table), {n: columns[FEATURE_PREFIX + n] for n in names}, columns["score"])


def calendar_cycles(contract: ModelContract) -> dict[str, timedelta]:
    """Features that are a function of the clock → how long their cycle is. Others derived from one share its cycle."""
    cycles: dict[str, timedelta] = {}
    for f in contract.features:
        if not isinstance(f.source, FromDerived):
            continue
        derived = f.source.derived
        if derived.operation == "hour_of_day":
            cycles[f.name] = DAY
        elif derived.operation == "day_of_week":
            cycles[f.name] = 7 * DAY
        else:
            inherited = [cycles[name] for name in derived.inputs if name in cycles]
            if inherited:
                cycles[f.name] = max(inherited)
    return cycles


@dataclass(frozen=True)
class Season:
    """A reference made comparable with a short window."""

    reference: Sample
    matched: bool
    """Whether `reference` was cut down to the window's hours (and days of the week)."""
    clock_features: frozenset[str]
    """Features that only tell the time: in a window shorter than their cycle they differ from the reference by nature."""


def match_season(
    contract: ModelContract, reference: Sample, window: Sample, start: datetime, end: datetime, min_rows: int,
) -> Season:
    """Cuts the reference down to the hours that the window has, when the window is shorter than a day and enough rows remain.

    At three in the morning people buy other things than at noon: a minute of traffic is compared with the same hour of the
    reference. The contract says which features tell the hour; without such a feature, or with too few rows of that hour, the
    whole reference is used.
    """
    cycles = {k: c for k, c in calendar_cycles(contract).items() if end - start < c}
    clock = frozenset(cycles)
    direct = [
        f.name for f in contract.inputs
        if f.name in cycles and isinstance(f.source, FromDerived) and f.source.derived.operation in ("hour_of_day", "day_of_week")
        and f.name in reference.features
    ]
    # First hour and day of the week together, then the hour alone.
    for names in (direct, [n for n in direct if cycles[n] == DAY]):
        mask = np.ones(reference.rows, np.bool_)
        for name in names:
            mask &= np.isin(reference.features[name], np.unique(window.features[name]))
        if names and int(mask.sum()) >= min_rows:
            return Season(reference.where(mask), not bool(mask.all()), clock)
    return Season(reference, False, clock)


def aligned(feature: Feature, other: ModelContract, values: Float32s) -> Float32s | None:
    """Another contract's column in this feature's encoding, or None when the two don't mean the same.

    The same name with another unit or type is another quantity: a difference would say nothing about either model.
    """
    theirs = other.by_name.get(feature.name)
    if theirs is None or theirs.dtype != feature.dtype or theirs.unit != feature.unit:
        return None
    if theirs.categories == feature.categories:
        return values
    codes = {c: i for i, c in enumerate(feature.categories)}
    table = np.array([codes.get(c, -1) for c in theirs.categories] + [-1], np.float32)
    missing = np.isnan(values)
    index = np.where(missing | (values < 0) | (values >= len(theirs.categories)), -1, values).astype(np.int64)
    return np.where(missing, np.float32(np.nan), table[index]).astype(np.float32)


def align(contract: ModelContract, other: ModelContract, sample: Sample) -> Sample:
    """A sample of another contract with the features that both have, in this contract's encoding."""
    features: dict[str, Float32s] = {}
    for f in logged_features(contract):
        if f.name in sample.features:
            column = aligned(f, other, sample.features[f.name])
            if column is not None:
                features[f.name] = column
    return replace(sample, features=features)
