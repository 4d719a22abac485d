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
from hafnium_contract.whole_files import replacing
from hafnium_training.feature_store.definitions import AS_OF, EVENT_TIMESTAMP, SOURCES, ViewSpec, field_of, view_specs
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
    allow_missing: bool = False,
) -> JoinReport:
    """Writes the flat training table (`out` is .parquet or .csv), rows in the order of the data file.

    A value is the newest one at or before the request's time and not older than its maximum age, else missing. Without
    views the columns pass through and `repo` may be None. Raises LostRowsError when the store loses or repeats a row, InputError when `out`
    is a file that is read here, or (unless `allow_missing`) when a looked-up feature has no value on any row.
    """
    listener = progress or Silent()
    began = time.perf_counter()
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"{out}: expected a name that ends in .parquet or .csv")
    source = str(data_file(data))
    _require_other_file(out, contract, data, repo)
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
        if not allow_missing:
            _require_values(contract, looked_up, frame, source, found.path)
    try:
        _write(out, table)
    except OSError as e:
        raise HafniumError(f"{out}: can't be written: {e.strerror or e}; nothing was left behind") from e
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
    looked_up = {f.name for spec in view_specs(contract) for f in contract.features_of(spec.view.name)}
    require_columns(frame, [*fields, *(p.name for p in contract.protected if p.name not in looked_up)], source)
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
    arrow = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    with replacing(out) as file:
        if out.suffix.lower() == ".csv":
            pacsv.write_csv(arrow, file)
        else:
            pq.write_table(arrow, file, compression="zstd")


def _require_other_file(out: Path, contract: ModelContract, data: Path, repo: FeatureRepo | Path | None) -> None:
    """The table has other columns than what it is made from, so writing over that would destroy it."""
    read = [data_file(data)]
    if data.is_dir():
        read += [data / f"{v.name}{s}" for v in contract.views for s in (".parquet", ".csv")]
    if repo is not None:
        sources = (repo.path if isinstance(repo, FeatureRepo) else repo) / SOURCES
        read += [sources / f"{v.name}.parquet" for v in contract.views]
    for file in read:
        if out.resolve() == file.resolve():
            raise InputError(f"--out {out}: is read here; the table would replace it and lose its other columns: choose another name")


def _require_values(contract: ModelContract, looked_up: pd.DataFrame, frame: pd.DataFrame, source: str, repo: Path) -> None:
    empty = [str(name) for name in looked_up.columns if looked_up[name].isna().all()]
    if not empty:
        return
    hints: list[str] = []
    for spec in view_specs(contract):
        if not any(f.name in empty for f in contract.features_of(spec.view.name)):
            continue
        asked = sorted(set(as_keys(frame[spec.join_key]).dropna()))
        known = set(pq.read_table(repo / SOURCES / f"{spec.view.name}.parquet", columns=[spec.join_key])[spec.join_key].to_pylist())
        same = sum(key in known for key in asked)
        hints.append(
            f"view {spec.view.name}: {same} of {len(asked)} values of {spec.join_key} in {source} are in it"
            + (f"; there are {_some(asked)} here and {_some(sorted(known))} there" if same == 0 else
               f"; its values are older than maxAge, newer than the requests, or blank (event_timestamp, maxAge {spec.view.max_age})")
        )
    raise InputError(
        f"{source}: no row has a value of {', '.join(empty)}. A model trained so would be served values that it has never seen.\n  "
        + "\n  ".join(hints) + "\n  If that is meant: --allow-missing"
    )


def _some(keys: list[str]) -> str:
    return ", ".join(repr(k) for k in keys[:3]) + (", …" if len(keys) > 3 else "") if keys else "none"
