"""The tables behind the views: from a data folder's `<view>.parquet`, or split out of one flat file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.encoding import encode_column
from hafnium_contract.errors import FeatureError, InputError
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_contract.table_text import is_literal
from hafnium_contract.whole_files import replacing
from hafnium_training.feature_store.definitions import AS_OF, EVENT_TIMESTAMP, ViewSpec
from hafnium_training.tables import as_keys, event_times, read_table, require_columns, timestamps, truths


def view_table(contract: ModelContract, spec: ViewSpec, data: Path) -> pd.DataFrame:
    """Rows of one view: join key (text), event_timestamp (us, UTC) and its fields; sorted by time, each key and time once.

    `data` is a folder with `<view>.parquet` (or .csv), or one flat file. In a flat file a row says what was known of its
    entity at the row's own time; its columns may be named by the field or by the feature.
    """
    frame, source = _from_folder(spec, data) if data.is_dir() else _from_flat(contract, spec, data)
    out = pd.DataFrame({spec.join_key: as_keys(frame[spec.join_key]), EVENT_TIMESTAMP: frame[EVENT_TIMESTAMP]})
    for name, feature in spec.fields:
        out[name] = _typed(frame[name], feature, f"{source}: column {name}")
    out = out[out[spec.join_key].notna()]
    if out.empty:
        raise InputError(f"{source}: no row has a value in {spec.join_key}")
    if spec.has_as_of:
        out[AS_OF] = out[EVENT_TIMESTAMP].astype("int64").astype("float64")
    out = out.sort_values([EVENT_TIMESTAMP, spec.join_key], kind="stable")
    # Two rows of one moment: the later one in the file is the correction of the earlier one.
    return out.drop_duplicates([spec.join_key, EVENT_TIMESTAMP], keep="last").reset_index(drop=True)


def write_source(path: Path, frame: pd.DataFrame) -> None:
    """Writes a view's rows as the Parquet file that Feast reads: missing values are nulls, not NaN."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def _from_folder(spec: ViewSpec, folder: Path) -> tuple[pd.DataFrame, str]:
    file = next((p for p in (folder / f"{spec.view.name}{s}" for s in (".parquet", ".csv")) if p.is_file()), None)
    if file is None:
        raise InputError(f"{folder}: has no {spec.view.name}.parquet (or .csv) for the contract's view {spec.view.name}")
    frame = read_table(file, text=_texts(spec), literal=[name for name, f in spec.fields if is_literal(f)])
    require_columns(frame, [spec.join_key, EVENT_TIMESTAMP, *(name for name, _ in spec.fields)], str(file))
    frame[EVENT_TIMESTAMP] = timestamps(frame[EVENT_TIMESTAMP], f"{file}: column {EVENT_TIMESTAMP}")
    return frame, str(file)


def _from_flat(contract: ModelContract, spec: ViewSpec, file: Path) -> tuple[pd.DataFrame, str]:
    frame = read_table(file, contract, text=_texts(spec))
    columns = {name: name if name in frame.columns else feature.name for name, feature in spec.fields}
    require_columns(frame, [spec.join_key, *columns.values()], str(file))
    out = pd.DataFrame({spec.join_key: frame[spec.join_key], EVENT_TIMESTAMP: event_times(contract, frame, str(file))})
    for name, column in columns.items():
        out[name] = frame[column]
    return out, str(file)


def _texts(spec: ViewSpec) -> list[str]:
    """Columns that are text even where all their values look like numbers."""
    return [spec.join_key, *(name for name, f in spec.fields if f.dtype == "category")]


def _typed(column: pd.Series[Any], feature: Feature, where: str) -> pd.Series[Any]:
    if feature.dtype == "category":
        return as_keys(column)
    if feature.dtype == "bool":
        return pd.Series(truths(column, where), index=column.index).astype("boolean")
    try:
        return pd.Series(encode_column(feature, column), index=column.index)
    except FeatureError as e:
        raise InputError(f"{where}: {e}") from e
