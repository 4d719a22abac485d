"""The training table: each request with what the views knew at its own time, and not a row more or less."""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.progress import Progress, Silent
from hafnium_training.feature_store.definitions import AS_OF, EVENT_TIMESTAMP, ViewSpec, field_of, view_specs
from hafnium_training.feature_store.repository import FeatureRepo, open_repo, open_store
from hafnium_training.tables import (
    as_keys,
    data_file,
    event_times,
    feature_column,
    label_times,
    labels,
    read_table,
    request_ids,
    require_columns,
)

CHUNK_ROWS = 100_000
"""Rows per query: the join first pairs each request with every row of its entity within the maximum age, and with ages of
months that is a hundred times as many rows."""
_ROW = "hafnium_row"
_ENGINE_LOCK = threading.Lock()


class LostRowsError(HafniumError):
    """The feature store gave back other rows than it was asked for. Training on them would be training on other data."""


@dataclass(frozen=True)
class JoinReport:
    rows_in: int
    rows_out: int
    missing: dict[str, float]
    """Feature (derived ones left out) → share of rows without a value."""
    seconds: float


def join(
    contract: ModelContract, repo: FeatureRepo | Path | None, data: Path, out: Path, *, progress: Progress | None = None,
) -> JoinReport:
    """Writes the flat training table (`out` is .parquet or .csv), rows in the order of the data file.

    A value is the newest one at or before the request's time and not older than its maximum age, else missing. Without
    views the columns pass through and `repo` may be None. Raises LostRowsError when the store loses or repeats a row.
    """
    listener = progress or Silent()
    began = time.perf_counter()
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"{out}: expected a name that ends in .parquet or .csv")
    source = str(data_file(data))
    frame = read_table(data, contract)
    table = _passed_through(contract, frame, source)
    specs = view_specs(contract)
    if not specs:
        listener.event(f"contract {contract.name} has no views: the columns pass through")
    else:
        if repo is None:
            raise InputError(f"contract {contract.name} has views: give the feature repo; `hafnium features apply` makes one")
        found = open_repo(contract, repo)
        looked_up = look_up(contract, found.path, frame, source, listener)
        for name in looked_up.columns:
            table[name] = looked_up[name].to_numpy()
    _write(out, table)
    names = {f.name: c for f in contract.features if (c := feature_column(f)) is not None}
    missing = {name: float(table[column].isna().mean()) for name, column in names.items()}
    return JoinReport(len(frame), len(table), missing, time.perf_counter() - began)


def look_up(
    contract: ModelContract, repo: Path, frame: pd.DataFrame, source: str = "data", progress: Progress | None = None,
) -> pd.DataFrame:
    """Values of all view features for the rows of `frame`: one column per feature, index and order of `frame`."""
    listener = progress or Silent()
    specs = view_specs(contract)
    keys = list(dict.fromkeys(s.join_key for s in specs))
    require_columns(frame, keys, source)
    ids = request_ids(contract, frame, source)
    times = event_times(contract, frame, source).reset_index(drop=True)
    asked = pd.DataFrame({_ROW: np.arange(len(frame)), EVENT_TIMESTAMP: times})
    for key in keys:
        # A request without an entity looks nothing up; sources never have an empty key.
        asked[key] = as_keys(frame[key]).fillna("").to_numpy()
    references = [f"{s.view.name}:{name}" for s in specs for name in s.columns]
    listener.stage("join", len(asked))
    parts: list[pd.DataFrame] = []
    with query_engine():
        store = open_store(repo)
        for begin in range(0, len(asked), CHUNK_ROWS):
            chunk = asked.iloc[begin:begin + CHUNK_ROWS]
            # full names: two views may have fields of the same name
            got: Any = store.get_historical_features(
                entity_df=chunk.copy(), features=references, full_feature_names=True
            ).to_df()
            parts.append(_in_order(got, chunk[_ROW].to_numpy(), ids))
            listener.advance(len(chunk))
    joined = pd.concat(parts, ignore_index=True)
    out = pd.DataFrame(index=frame.index)
    for spec in specs:
        for feature in contract.features_of(spec.view.name):
            values = joined[f"{spec.view.name}__{field_of(feature)}"]
            out[feature.name] = _young_enough(spec, feature.max_age, values, joined, asked[EVENT_TIMESTAMP]).to_numpy()
    return out


@contextmanager
def query_engine() -> Generator[None]:
    """A DuckDB of our own for what Feast asks through ibis, closed afterwards; one join at a time in a process.

    Feast uses the process's default one, which is never closed (DuckDB's bindings then print pages of leaks at exit) and
    spills into the working directory.
    """
    import ibis

    with _ENGINE_LOCK, tempfile.TemporaryDirectory(prefix="hafnium-join-") as spill, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ibis calls DuckDB by an old name
        options: Any = ibis.options
        before = options.default_backend
        engine = ibis.duckdb.connect(":memory:", temp_directory=spill)
        options.default_backend = engine
        try:
            yield
        finally:
            options.default_backend = before
            engine.disconnect()


def _in_order(got: pd.DataFrame, rows: np.ndarray[tuple[int], np.dtype[Any]], ids: pd.Series[str]) -> pd.DataFrame:
    back = got[_ROW].to_numpy()
    lost = np.setdiff1d(rows, back)
    if len(back) != len(rows) or len(lost):
        examples = ", ".join(ids.iloc[lost[:3]].astype(str)) or "none is gone, but some came twice"
        raise LostRowsError(
            f"the feature store was asked for {len(rows)} rows and gave {len(back)}; {len(lost)} are gone ({examples}). "
            "Check offline_store in feature_store.yaml: `duckdb` keeps rows without values, Feast's `file`/`dask` store drops them"
        )
    return got.set_index(_ROW).loc[rows].reset_index()


def _young_enough(
    spec: ViewSpec, max_age: timedelta | None, values: pd.Series[Any], joined: pd.DataFrame, asked: pd.Series[pd.Timestamp],
) -> pd.Series[Any]:
    """Feast applied the view's ttl; a feature with a shorter age is blanked here."""
    age: timedelta = spec.view.max_age if max_age is None else max_age
    if age == spec.ttl:
        return values
    as_of = joined[f"{spec.view.name}__{AS_OF}"].to_numpy(np.float64)
    now = asked.astype("int64").to_numpy().astype(np.float64)
    with np.errstate(invalid="ignore"):
        return values.where(now - as_of <= age // timedelta(microseconds=1))


def _passed_through(contract: ModelContract, frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Columns that need no lookup, under the names of the flat table."""
    fields = list(contract.request_fields)
    require_columns(frame, fields, source)
    # Parsed once to be refused here and not by the training: the columns themselves stay as they came.
    labels(contract, frame, source)
    label_times(contract, frame, source)
    request_ids(contract, frame, source)
    spec = contract.data
    wanted = [spec.request_id, spec.event_time.column, *(e.join_key for e in contract.entities), *fields,
              spec.label.column, spec.label_time.column, *(p.name for p in contract.protected)]
    present = [str(c) for c in frame.columns]
    return frame[[c for c in dict.fromkeys(wanted) if c is not None and c in present]].copy()


def _write(out: Path, table: pd.DataFrame) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    staging = out.with_name(f".{out.name}.tmp")
    if out.suffix.lower() == ".csv":
        pacsv.write_csv(arrow, staging)
    else:
        pq.write_table(arrow, staging, compression="zstd")
    staging.replace(out)
