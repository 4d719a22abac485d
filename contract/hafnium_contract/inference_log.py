"""The inference log's form: which columns, where its files lie, how to read them back.

Files: `<folder>/date=YYYY-MM-DD/model_version=V/part-<time>-<id>.parquet`, each written beside its place and renamed, so a
reader never sees half a file. The transformer writes, monitoring and the rollout operator read.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.model_contract import Feature, ModelContract

FEATURE_PREFIX = "feature_"
FIXED = pa.schema([
    pa.field("request_id", pa.string(), nullable=False),
    pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),       # when it was answered, not the event's time
    pa.field("model_name", pa.string(), nullable=False),
    pa.field("model_version", pa.string(), nullable=False),
    pa.field("model_digest", pa.string(), nullable=False),
    pa.field("arm", pa.string(), nullable=False),                         # stable | candidate | shadow
    pa.field("score", pa.float32(), nullable=False),
    pa.field("confidence_lower", pa.float32()),
    pa.field("confidence_upper", pa.float32()),
    pa.field("decision", pa.string()),
    pa.field("degraded", pa.list_(pa.string())),
    pa.field("latency_ms", pa.float32()),
    pa.field("entity_hash", pa.string()),                                 # keyed hash; never the entity itself
])
OF_FEW_VALUES = ("model_name", "model_version", "model_digest", "arm", "decision")
"""Columns that are written as a dictionary. Parquet's default makes one of every column, to find out in most that it is of no use: a
third of the writer's CPU, and files a quarter larger."""


def logged_features(contract: ModelContract) -> tuple[Feature, ...]:
    """Inputs that may be logged: those that are not personal."""
    return tuple(f for f in contract.inputs if not f.personal)


def log_schema(contract: ModelContract) -> pa.Schema:
    """FIXED plus one float32 column per logged feature, named `feature_<name>`, with the encoded value (NaN = missing)."""
    schema = FIXED
    for f in logged_features(contract):
        schema = schema.append(pa.field(FEATURE_PREFIX + f.name, pa.float32()))
    return schema


def partition(folder: Path, when: datetime, model_version: str) -> Path:
    """Folder for rows of this time and model version."""
    return folder / f"date={when:%Y-%m-%d}" / f"model_version={model_version}"


def log_files(folder: Path) -> list[Path]:
    """All finished files, oldest first (their names begin with their time)."""
    return sorted(folder.glob("date=*/model_version=*/part-*.parquet"), key=lambda p: p.name)


def read_files(files: Iterable[Path], columns: list[str] | None = None) -> pa.Table | None:
    """Rows of the files together; None when there is none. Columns that a file lacks become null."""
    tables: list[pa.Table] = []
    for path in files:
        # ParquetFile and not read_table: the folder names repeat columns that are in the file already
        with pq.ParquetFile(path) as file:
            wanted = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
            tables.append(file.read(columns=wanted))
    return pa.concat_tables(tables, promote_options="default") if tables else None
