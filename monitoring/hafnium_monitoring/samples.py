"""What is compared: a bundle's reference sample, and rows of the inference log, in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.bundle import REFERENCE_ROWS_MIN, Bundle
from hafnium_contract.inference_log import FEATURE_PREFIX, logged_features
from hafnium_contract.model_contract import Feature, FromDerived, ModelContract
from hafnium_monitoring.errors import ReferenceSampleError
from hafnium_monitoring.windows import Float32s, LogRows

REFERENCE = "reference.parquet"
DAY = timedelta(days=1)
REFERENCE_ROWS_LEAST = 200
"""A reference needs as many rows as a window (`reference_rows_min`), but never more than REFERENCE_ROWS_MIN: a reference can't grow with
traffic. Never fewer than this: against 100 rows a PSI below .45 isn't significant, so that tripled amounts would pass."""


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
        fewer = f", or look with --min-rows {len(table)}: windows of so few rows are then judged, and show large changes only"
        raise ReferenceSampleError(
            f"{path}: the reference has {len(table)} rows, {needed} are needed to see drift; train on more rows"
            + (fewer if len(table) >= REFERENCE_ROWS_LEAST else "")
        )
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


SEASON_ROWS, SEASON_ROWS_LEAST = 500, 200
"""Rows of the reference that a short window is compared with: hours either side are taken in until there are the first; with all
of them the second will do. Fewer show no PSI below a quarter."""
SEASON_HOURS_MAX = 2
"""Hours either side at most: further away people do other things."""
SEASON_SHARE_MIN = 0.01
"""An hour with a smaller share of the window is stray rows (a late one, a wrong clock) and not what the window is of."""


@dataclass(frozen=True)
class Season:
    """A reference made comparable with a short window."""

    reference: Sample
    matched: bool
    """Whether `reference` was cut down to the window's hours (and days of the week)."""
    clock_features: frozenset[str]
    """Features that only tell the time: in a window shorter than their cycle they differ from the reference by nature."""
    unmatched: bool = False
    """The contract tells the hour, and the reference has too few rows of the window's: what differs may be the hour."""


def match_season(
    contract: ModelContract, reference: Sample, window: Sample, start: datetime, end: datetime, min_rows: int,
) -> Season:
    """Gives the reference the window's hours of day, when the window is shorter than a day.

    At three in the morning people buy other things than at noon: a minute of traffic is compared with the same hour of the
    reference. The contract says which features tell the hour; without one the whole reference is used. Rows are left out until
    the hours have the window's shares, not weighted: so every test sees as many rows as there really are.
    """
    cycles = {k: c for k, c in calendar_cycles(contract).items() if end - start < c}
    clock = frozenset(cycles)
    operations = {
        f.name: f.source.derived.operation for f in contract.inputs
        if f.name in cycles and isinstance(f.source, FromDerived) and f.source.derived.operation in ("hour_of_day", "day_of_week")
        and f.name in reference.features
    }
    hours = [n for n, operation in operations.items() if operation == "hour_of_day"]
    enough = max(SEASON_ROWS_LEAST, min(min_rows, SEASON_ROWS))
    if not hours:
        rows = _of_same_cells(reference, window, list(operations), [])
        return Season(reference if len(rows) < enough else _taken(reference, rows), len(rows) >= enough, clock)
    rows = np.zeros(0, np.int64)
    # First hour and day of the week together, then the hour alone.
    for names in dict.fromkeys((tuple(operations), tuple(hours))):
        for spread in range(SEASON_HOURS_MAX + 1):
            rows = _of_same_cells(reference, window, names, hours, spread)
            if len(rows) >= enough:
                return Season(_taken(reference, rows), len(rows) < reference.rows, clock)
    if len(rows) >= SEASON_ROWS_LEAST:
        return Season(_taken(reference, rows), True, clock)
    return Season(reference, False, clock, unmatched=True)


def _taken(reference: Sample, rows: npt.NDArray[np.int64]) -> Sample:
    mask = np.zeros(reference.rows, np.bool_)
    mask[rows] = True
    return reference.where(mask)


def _of_same_cells(
    reference: Sample, window: Sample, names: Sequence[str], hours: Sequence[str], spread: int = 0,
) -> npt.NDArray[np.int64]:
    """Rows of the reference with the window's shares of each combination of `names` (hours: or up to `spread` hours away)."""
    if not names:
        return np.zeros(0, np.int64)
    there = np.column_stack([window.features[n] for n in names])
    cells, counts = np.unique(there[~np.isnan(there).any(axis=1)], axis=0, return_counts=True)
    kept = counts >= SEASON_SHARE_MIN * window.rows
    if not kept.any():
        return np.zeros(0, np.int64)
    pools: list[npt.NDArray[np.int64]] = []
    for cell in cells[kept]:
        mask = np.ones(reference.rows, np.bool_)
        for name, value in zip(names, cell, strict=True):
            away = np.abs(reference.features[name] - value)
            mask &= np.minimum(away, 24 - away) <= spread if name in hours else away == 0
        pools.append(np.flatnonzero(mask))
    shares = counts[kept] / counts[kept].sum()
    total = min(len(pool) / share for pool, share in zip(pools, shares, strict=True))
    taken = np.zeros(reference.rows, np.bool_)
    for pool, share in zip(pools, shares, strict=True):
        free = pool[~taken[pool]]
        count = min(len(free), round(total * share))
        taken[free[np.linspace(0, len(free) - 1, count).round().astype(np.int64)]] = True  # evenly over the reference's time
    return np.flatnonzero(taken)


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
