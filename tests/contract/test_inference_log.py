"""The log's form: what is kept of a request, and what must not be."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.contract_file import load_contract
from hafnium_contract.inference_log import log_files, log_schema, partition, read_files

CONTRACT = load_contract(Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml")
WHEN = datetime(2026, 5, 4, 12, tzinfo=UTC)


def test_personal_features_have_no_column() -> None:
    names = log_schema(CONTRACT).names
    personal = {"feature_" + f.name for f in CONTRACT.inputs if f.personal}
    assert personal
    assert not personal & set(names)
    assert set(names) >= {"feature_" + f.name for f in CONTRACT.inputs if not f.personal}


def test_files_come_oldest_first_and_half_written_ones_not_at_all(tmp_path: Path) -> None:
    for version, stamp in (("2", "002"), ("1", "001"), ("1", "003")):
        folder = partition(tmp_path, WHEN, version)
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"request_id": [stamp], "extra": [1]}), folder / f"part-{stamp}.parquet")
        (folder / f".part-{stamp}.parquet.tmp").write_bytes(b"half")
    assert partition(tmp_path, WHEN, "1").relative_to(tmp_path) == Path("date=2026-05-04/model_version=1")
    table = read_files(log_files(tmp_path), ["request_id", "absent"])
    assert table is not None
    assert table.to_pydict() == {"request_id": ["001", "002", "003"]}


def test_no_file_is_no_table(tmp_path: Path) -> None:
    assert read_files(log_files(tmp_path)) is None
