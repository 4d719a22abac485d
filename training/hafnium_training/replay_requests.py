"""Rows of a data file → bodies for `POST /v1/score`, by the contract alone: for load generators, replays and `hafnium score`.

A body holds what a caller would know: id, time, entity keys and request features. Labels, looked-up and derived values stay out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from hafnium_contract.encoding import is_missing
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_training.tables import as_keys, data_file, event_times, read_table, request_ids, require_columns

_CHUNK_ROWS = 10_000


class ScoreRequest(TypedDict):
    """Body of `POST /v1/score`."""

    request_id: str
    event_time: str
    """RFC 3339, UTC."""
    entity: dict[str, str]
    features: dict[str, Any]


def score_requests(
    contract: ModelContract, data: Path, *, start: datetime | None = None, end: datetime | None = None,
    limit: int | None = None,
) -> Iterator[ScoreRequest]:
    """Requests with start ≤ event time < end, oldest first, at most `limit` of them. Missing values are left out.

    `data` is a CSV or Parquet file or a data folder. It is read and checked at once, the bodies are made as they are asked
    for. Raises InputError when the file lacks a column, or for a time without an offset.
    """
    for name, moment in (("start", start), ("end", end)):
        if moment is not None and moment.tzinfo is None:
            raise InputError(f"{name}: give a time with an offset, for example 2026-01-31T00:00:00Z, got {moment.isoformat()}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected 1 or more, got {limit}")
    source = str(data_file(data))
    frame = read_table(data, contract)
    keys = list(dict.fromkeys(e.join_key for e in contract.entities))
    require_columns(frame, [*keys, *contract.request_fields], source)
    times = event_times(contract, frame, source)
    ids = request_ids(contract, frame, source)
    chosen = np.ones(len(frame), np.bool_)
    if start is not None:
        chosen &= (times >= pd.Timestamp(start)).to_numpy()
    if end is not None:
        chosen &= (times < pd.Timestamp(end)).to_numpy()
    rows = np.flatnonzero(chosen)
    rows = rows[np.argsort(times.astype("int64").to_numpy()[rows], kind="stable")]
    if limit is not None:
        rows = rows[:limit]
    return _bodies(contract, frame.iloc[rows], times.iloc[rows], ids.iloc[rows], keys, source)


def _bodies(
    contract: ModelContract, frame: pd.DataFrame, times: pd.Series[pd.Timestamp], ids: pd.Series[str], keys: list[str],
    source: str,
) -> Iterator[ScoreRequest]:
    casts = {name: _cast(f) for name, f in contract.request_fields.items()}
    for begin in range(0, len(frame), _CHUNK_ROWS):
        part = frame.iloc[begin:begin + _CHUNK_ROWS]
        columns = {name: part[name].tolist() for name in casts}
        entities = {name: as_keys(part[name]).tolist() for name in keys}
        when = times.iloc[begin:begin + _CHUNK_ROWS].dt.strftime("%Y-%m-%dT%H:%M:%S.%fZ").tolist()
        names = ids.iloc[begin:begin + _CHUNK_ROWS].tolist()
        for i in range(len(part)):
            features: dict[str, Any] = {}
            for name, cast in casts.items():
                value = columns[name][i]
                # JSON has no infinity, and training reads one as missing too
                if is_missing(value) or value in (math.inf, -math.inf):
                    continue
                try:
                    features[name] = cast(value)
                except (TypeError, ValueError) as e:
                    raise InputError(f"{source}: request {names[i]}: column {name}: {value!r}: {e}") from e
            entity = {name: values[i] for name, values in entities.items() if not is_missing(values[i])}
            yield ScoreRequest(request_id=names[i], event_time=when[i], entity=entity, features=features)


def _cast(feature: Feature) -> Callable[[Any], Any]:
    """How a column's value becomes the JSON type that the contract wants."""
    match feature.dtype:
        case "category":
            return str
        case "bool":
            return _truth
        case "int":
            return _whole
        case _:
            return float


def _truth(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError("expected true or false")
    return bool(value)


def _whole(value: Any) -> int | float:
    # A fraction goes out as it is: the service has to refuse it, and the load generator must not hide that.
    return int(value) if float(value).is_integer() else float(value)
