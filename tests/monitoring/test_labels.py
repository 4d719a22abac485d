"""Labels from files of every kind: what is known by now, which of several counts, and what may not be guessed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.errors import LabelError
from hafnium_monitoring.labels import LabelLimits, known_labels, possible_positives
from hafnium_training.tables import timestamps

from .conftest import NOW, START

TODAY = START + timedelta(days=60)
HEADER = "transaction_id,is_fraud,label_time"
WHEN = "2026-01-20T00:00:00Z"
Read = Callable[..., dict[str, float]]


@pytest.fixture
def read(tmp_path: Path, contract: ModelContract) -> Read:
    """Reads rows of (id, label, time) from a file of either kind, or a CSV as it is."""

    def run(
        rows: Sequence[tuple[Any, Any, Any]] | str, kind: str = "parquet", contract: ModelContract = contract,
        limits: LabelLimits | None = None, label_type: pa.DataType | None = None, time_type: pa.DataType | None = None,
        now: datetime = TODAY,
    ) -> dict[str, float]:
        path = tmp_path / f"labels.{kind}"
        if isinstance(rows, str):
            path.write_text(rows)
        elif kind == "csv":
            path.write_text("\n".join([HEADER, *(",".join("" if v is None else str(v) for v in row) for row in rows), ""]))
        else:
            ids, labels, times = (list(c) for c in zip(*rows, strict=True))
            pq.write_table(pa.table({
                "transaction_id": pa.array(ids), "is_fraud": pa.array(labels, label_type), "label_time": pa.array(times, time_type),
            }), path)
        return known_labels(path, contract, now, answered_by=NOW, wanted=["a", "b", "c", "7"], limits=limits)
    return run


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_only_labels_of_the_window_that_are_known_by_now_are_kept(read: Read, kind: str) -> None:
    later = "2026-12-01T00:00:00Z"
    assert read([("a", "1", WHEN), ("b", "0", later), ("c", None, WHEN), ("elsewhere", "1", WHEN)], kind) == {"a": 1.0}


@pytest.mark.parametrize(("labels", "of"), [
    ([True, False], None), ([1, 0], pa.int8()), ([1.0, 0.0], pa.float32()), (["True", " false "], None),
    (["1.0", "0"], pa.large_string()), (["1", "0"], pa.dictionary(pa.int8(), pa.string())),
], ids=["truths", "whole numbers", "floats", "words", "numbers as text", "dictionary"])
def test_labels_may_be_written_as_training_reads_them(read: Read, labels: list[Any], of: pa.DataType | None) -> None:
    assert read([("a", labels[0], WHEN), ("b", labels[1], WHEN)], label_type=of) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("wrong", [2, -1, 0.5, float("inf")])
def test_another_coding_than_0_and_1_is_refused_with_the_place(read: Read, kind: str, wrong: float) -> None:
    with pytest.raises(LabelError, match=r"labels\.\w+: column 'is_fraud': expected 0 or 1; row 2 isn't so$"):
        read([("a", 1.0, WHEN), ("elsewhere", wrong, WHEN), ("b", 0.0, WHEN)], kind)


def test_not_a_number_is_no_label(read: Read) -> None:
    assert read([("a", float("nan"), WHEN), ("b", 1.0, WHEN)]) == {"b": 1.0}


@pytest.mark.parametrize("text", [
    f"{HEADER}\na,jane.doe@example.com,{WHEN}\n", f"{HEADER}\na,1,jane.doe@example.com\n", f"{HEADER}\na,1\njane.doe@example.com\n",
    f"{HEADER}\na,1,{WHEN}\nb,1,{WHEN},jane.doe@example.com\n", f'{HEADER}\na,1,"jane.doe@example.com\n',
    f"{HEADER}\na,1,2026-01-20T00:00:00Z jane.doe@example.com\n", "jane.doe@example.com\n",
], ids=["label", "time", "short row", "long row", "open quote", "after the time", "no header"])
def test_no_value_of_the_file_is_in_the_message(read: Read, text: str) -> None:
    with pytest.raises(LabelError, match=r"labels\.csv: ") as e:
        read(text, "csv")
    assert "jane" not in str(e.value)
    assert e.value.__cause__ is None


def test_the_row_of_a_time_that_is_none_is_found_in_a_long_file(read: Read) -> None:
    rows = [(f"x{i}", 0, WHEN) for i in range(70_000)]
    rows[66_001] = ("x", 0, "yesterday")
    with pytest.raises(LabelError, match=r"column 'label_time': expected a time such as .*; row 66002 isn't so"):
        read(rows, "csv")


@pytest.mark.parametrize(("time", "of"), [
    ("2026-01-20T10:00:00.123456789Z", None), ("2026-01-20 10:00:00", None), ("2026-01-20", None), ("2026-01-20T10:00:00+02:00", None),
    (1_768_903_200_123_456_789, pa.timestamp("ns", tz="UTC")), (1_768_903_200_123, pa.timestamp("ms")),
    (date(2026, 1, 20), pa.date32()), (datetime(2026, 1, 20, tzinfo=UTC), pa.timestamp("s", tz="Europe/Berlin")),
], ids=["nanoseconds as text", "no zone", "day", "offset", "nanoseconds", "milliseconds", "date", "zone"])
def test_times_of_every_precision_are_read(read: Read, time: Any, of: pa.DataType | None) -> None:
    assert read([("a", 1, time)], time_type=of) == {"a": 1.0}


@pytest.mark.parametrize("text", [
    "2026-01-31 12:00:00+00", "2026-01-31 12:00:00.123456+00", "2026-01-31 12:00:00-05", "2026-01-31T12:00+0530", "2026-01-31T12+02",
    "2026-01-31 12:00:00 +02:00", "2026-01-31 12:00:00.5 Z", "2026-01-31", "2026-01-31 12:00", "2026/01/31", "2026/1/31", "2026-1-31",
    "2026/01/31 12:00:00", "2026/1/3 2:05", "2026/01/31T12:00:00-05",
])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_time_as_text_means_what_it_means_in_training(read: Read, text: str, kind: str) -> None:
    then = timestamps(pd.Series([text]), "label_time")[0].to_pydatetime()
    assert read([("a", 1, text)], kind, now=then) == {"a": 1.0}
    assert read([("a", 1, text)], kind, now=then - timedelta(microseconds=1)) == {}


@pytest.mark.parametrize("text", [
    "31/01/2026", "2026/01-31", "2026-01", "2026", "now", "2026-01-31-05", "2026-01-31 12:00:00+25", "2026/13/01",
])
def test_a_time_as_text_that_may_mean_another_is_refused(read: Read, text: str) -> None:
    with pytest.raises(LabelError, match=r"'label_time': expected a time such as .*; row 2 isn't so"):
        read([("a", 1, "2026/01/31"), ("b", 1, text)])


def test_a_time_that_is_a_bare_number_is_refused_since_nothing_says_its_unit(read: Read) -> None:
    with pytest.raises(LabelError, match="'label_time': expected a time"):
        read([("a", 1, 1_768_903_200)])


@pytest.mark.parametrize("order", [1, -1], ids=["as they came", "newest first"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_of_several_labels_the_latest_counts_wherever_it_stands(read: Read, order: int, kind: str) -> None:
    rows = [
        ("a", 0, "2026-01-16T00:00:00Z"), ("a", 1, "2026-01-17T00:00:00Z"), ("a", 0, "2026-01-17T00:00:00Z"), ("a", 1, WHEN),
        ("b", 1, "2026-01-17T00:00:00Z"), ("b", 0, "2026-12-01T00:00:00Z"),
    ]
    assert read(rows[::order], kind) == {"a": 1.0, "b": 1.0}


def test_labels_of_one_time_that_contradict_each_other_are_refused_and_equal_ones_are_not(read: Read) -> None:
    assert read([("a", 1, WHEN), ("a", 1, WHEN)]) == {"a": 1.0}
    with pytest.raises(LabelError, match="rows 1 and 3 give one request two labels, at the same label time"):
        read([("a", 1, WHEN), ("b", 1, WHEN), ("a", 0, WHEN)])


def test_without_label_times_a_contradiction_is_refused(read: Read, contract: ModelContract) -> None:
    data = contract.model_dump()
    data["data"]["labelTime"] = {"delay": "30d"}
    delayed = ModelContract.model_validate(data)
    assert read([("a", 1, WHEN), ("a", 1, WHEN), ("b", 0, WHEN)], contract=delayed) == {"a": 1.0, "b": 0.0}
    with pytest.raises(LabelError, match="nothing says which is newer"):
        read([("a", 1, WHEN), ("a", 0, WHEN)], contract=delayed)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_possible_positives_are_those_that_any_label_of_the_time_calls_so(
    read: Read, tmp_path: Path, contract: ModelContract, kind: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-12-01T00:00:00Z"
    read([("a", 1, WHEN), ("b", 0, WHEN), ("a", 0, "2026-01-21T00:00:00Z"), ("c", 1, early), ("d", 1, late), ("e", 1, WHEN),
          ("f", None, WHEN)], kind)
    path = tmp_path / f"labels.{kind}"
    assert possible_positives(path, contract, TODAY, since=START).to_pylist() == ["a", "e"]
    data = contract.model_dump()
    data["data"]["labelTime"] = {"delay": "30d"}
    delayed = ModelContract.model_validate(data)
    assert possible_positives(path, delayed, TODAY, since=START).to_pylist() == ["a", "c", "d", "e"]
    monkeypatch.setattr("hafnium_monitoring.labels.POSITIVES_MAX", 3)
    assert possible_positives(path, delayed, TODAY, since=START).to_pylist() == ["a", "c", "d"]


def test_whole_numbers_as_request_ids_are_compared_as_text(read: Read) -> None:
    assert read([(7, 1, WHEN), (8, 1, WHEN)]) == {"7": 1.0}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_missing_column_is_named(tmp_path: Path, contract: ModelContract, kind: str) -> None:
    path = tmp_path / f"other.{kind}"
    if kind == "csv":
        path.write_text("transaction_id,is_fraud\na,1\n")
    else:
        pq.write_table(pa.table({"transaction_id": ["a"], "is_fraud": [1]}), path)
    with pytest.raises(LabelError, match="column 'label_time' is missing"):
        known_labels(path, contract, TODAY, answered_by=NOW, wanted=["a"])


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_file_beyond_the_limits_is_named_with_the_limit(read: Read, kind: str) -> None:
    rows = [(f"x{i}", 1, WHEN) for i in range(20)]
    with pytest.raises(LabelError, match="more than 19 rows"):
        read(rows, kind, limits=LabelLimits(rows=19))
    with pytest.raises(LabelError, match="at most 100 are read"):
        read(rows, kind, limits=LabelLimits(bytes=100))


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_damaged_file_is_named_without_its_content(tmp_path: Path, contract: ModelContract, kind: str) -> None:
    path = tmp_path / f"damaged.{kind}"
    path.write_bytes(b"\xff\xfejane\x00" * 20)
    with pytest.raises(LabelError, match="damaged") as e:
        known_labels(path, contract, TODAY, answered_by=NOW, wanted=["a"])
    assert "jane" not in str(e.value)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, contract: ModelContract, kind: str) -> None:
    """In a process of its own: a million labels, of which the window needs a thousand."""
    ids = pa.array(np.char.add("7f9c24e5-0000-4000-8000-", np.char.zfill(np.arange(500_000).astype(str), 12)))
    table = pa.table({
        "transaction_id": ids, "is_fraud": np.zeros(500_000, np.int8),
        "label_time": pa.array([START] * 500_000, pa.timestamp("us", tz="UTC")),
    })
    path = tmp_path / f"many.{kind}"
    if kind == "csv":
        import pyarrow.csv
        with pyarrow.csv.CSVWriter(path, table.schema) as writer:
            for _ in range(2):
                writer.write_table(table)
    else:
        pq.write_table(pa.concat_tables([table] * 2), path)
    (tmp_path / "contract.json").write_text(contract.model_dump_json())
    code = f"""
import resource
from datetime import UTC, datetime
from pathlib import Path
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.labels import known_labels
contract = ModelContract.model_validate_json(Path({str(tmp_path / "contract.json")!r}).read_text())
wanted = [f"7f9c24e5-0000-4000-8000-{{i:012d}}" for i in range(1_000)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
now = datetime(2026, 3, 1, tzinfo=UTC)
assert len(known_labels(Path({str(path)!r}), contract, now, answered_by=now, wanted=wanted)) == 1_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    assert int(grown) < 200
