"""Data files become tables that mean what the contract says, or an error that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.encoding import encode_column, encode_value
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_training import tables
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


def contract(*, categories: Sequence[str] = ("DE", "NA"), **data: Any) -> ModelContract:
    """A made-up contract for loan applications, with every kind of column."""
    columns: dict[str, Any] = {
        "requestId": "application", "eventTime": {"column": "at"}, "label": {"column": "defaulted"},
        "labelTime": {"column": "known_at"},
    }
    columns.update(data)
    return parse_contract({
        "schemaVersion": 1, "name": "loans", "version": "2", "owner": "credit", "description": "loans",
        "data": {k: v for k, v in columns.items() if v is not None},
        "entities": [{"name": "applicant", "joinKey": "applicant_no"}],
        "features": [
            {"name": "amount", "description": "a", "dtype": "float", "unit": "EUR", "range": [0, 1e6]},
            {"name": "instalments", "description": "a", "dtype": "int", "range": [1, 480], "source": {"request": "Months"}},
            {"name": "country", "description": "a", "dtype": "category", "categories": list(categories)},
            {"name": "returning", "description": "a", "dtype": "bool"},
            {"name": "log_amount", "description": "a", "dtype": "float", "range": [0, 20],
             "source": {"derived": {"operation": "log1p", "inputs": ["amount"]}}},
        ],
        "decision": {"threshold": 0.5},
    })


HEADER = "application,at,applicant_no,amount,Months,country,returning,defaulted,known_at\n"
ROWS = (
    "a1,2026-01-01T10:00:00Z,007,100,12,DE,true,0,2026-02-01T00:00:00Z\n"
    "a2,2026-01-01T12:00:00+02:00,008,1e+05,24,NA,0,1,2026-02-01T00:00:00Z\n"
    "a3,2026-01-02 00:00:00,,,36,,,,\n"
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    file = tmp_path / "loans.csv"
    file.write_text(HEADER + ROWS)
    return file


def test_csv_columns_are_what_the_contract_says_and_not_what_they_look_like(csv: Path) -> None:
    frame = read_table(csv, contract())
    assert frame["applicant_no"].tolist() == ["007", "008", None]
    assert frame["country"].tolist() == ["DE", "NA", None]
    assert frame["amount"].tolist()[:2] == [100.0, 100_000.0]
    assert np.isnan(frame["amount"].iloc[2])
    assert frame["Months"].tolist() == [12.0, 24.0, 36.0]
    assert frame["returning"].tolist()[:2] == [1.0, 0.0]
    assert np.isnan(frame["returning"].iloc[2])


def test_csv_without_a_contract_makes_numbers_of_columns_that_hold_only_numbers(csv: Path) -> None:
    frame = read_table(csv)
    assert frame["Months"].tolist() == [12, 24, 36]
    assert frame["country"].tolist()[:2] == ["DE", "NA"]
    assert read_table(csv, text=["Months"])["Months"].tolist() == ["12", "24", "36"]


def test_times_are_utc_whatever_their_offset(csv: Path) -> None:
    times = event_times(contract(), read_table(csv, contract()))
    assert str(times.dtype) == "datetime64[us, UTC]"
    assert [t.isoformat() for t in times] == [
        "2026-01-01T10:00:00+00:00", "2026-01-01T10:00:00+00:00", "2026-01-02T00:00:00+00:00",
    ]


def test_offsets_of_other_rows_do_not_spread_to_times_without_one() -> None:
    texts = ["2026-06-01T12:00:00-05:00", "2026-06-01", "20260601T120000+0200", "2026-06-01 12:00:00.5", "2026-06-01T12:00Z"]
    times = event_times(contract(), pd.DataFrame({"at": texts}, index=[3, 3, 1, 0, 9]))
    assert times.index.tolist() == [3, 3, 1, 0, 9]
    assert [t.isoformat() for t in times] == [
        "2026-06-01T17:00:00+00:00", "2026-06-01T00:00:00+00:00", "2026-06-01T10:00:00+00:00",
        "2026-06-01T12:00:00.500000+00:00", "2026-06-01T12:00:00+00:00",
    ]


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [("s", 90.0, "2013-09-01T00:01:30"), ("ms", 1500.0, "2013-09-01T00:00:01.500000"), ("m", 1.0, "2013-09-01T00:01:00"),
     ("h", 36.0, "2013-09-02T12:00:00"), ("d", 0.5, "2013-09-01T12:00:00")],
)
def test_numeric_times_count_units_from_the_origin(unit: str, value: float, expected: str) -> None:
    c = contract(eventTime={"column": "at", "unit": unit, "origin": "2013-09-01T02:00:00+02:00"})
    times = event_times(c, pd.DataFrame({"at": [value]}, index=[5]))
    assert times.index.tolist() == [5]
    assert times.iloc[0].isoformat() == expected + "+00:00"


def test_a_wrong_unit_is_noticed_by_the_year() -> None:
    c = contract(eventTime={"column": "at", "unit": "s"})
    with pytest.raises(InputError, match=r"column at: expected a moment from 1970 to 2200 \(unit s.*row 1: 1700000000000.0"):
        event_times(c, pd.DataFrame({"at": [1.7e12]}))


def test_numbers_without_a_unit_and_times_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="a unit and an origin"):
        event_times(contract(), pd.DataFrame({"at": [1.0, 2.0]}))
    for text in ("31.01.2026", "now", "today", "NOW"):
        with pytest.raises(InputError, match=f"ISO 8601.*1 of 2 rows.*row 2: '{text}'"):
            event_times(contract(), pd.DataFrame({"at": ["2026-01-31", text]}))
    with pytest.raises(InputError, match="a time on every row; 1 of 2"):
        event_times(contract(), pd.DataFrame({"at": ["2026-01-31", None]}))
    with pytest.raises(InputError, match="from 1970 to 2200"):
        event_times(contract(), pd.DataFrame({"at": ["1850-01-31"]}))
    with pytest.raises(InputError, match=r"a number \(unit s\)"):
        event_times(contract(eventTime={"column": "at", "unit": "s"}), pd.DataFrame({"at": ["soon"]}))


def test_label_time_comes_from_the_column_or_the_delay(csv: Path) -> None:
    frame = read_table(csv, contract())
    known = label_times(contract(), frame)
    assert known.iloc[0] == pd.Timestamp("2026-02-01", tz="UTC")
    assert known.isna().tolist() == [False, False, True]
    later = label_times(contract(labelTime={"delay": "36h"}), frame)
    assert later.iloc[2] == pd.Timestamp("2026-01-03T12:00:00", tz="UTC")


def test_a_label_known_before_its_event_is_refused() -> None:
    frame = pd.DataFrame({"at": ["2026-01-02"], "known_at": ["2026-01-01"]})
    with pytest.raises(InputError, match="column known_at: expected a time not before at"):
        label_times(contract(), frame)


def test_labels_are_zero_one_or_unknown(csv: Path) -> None:
    found = labels(contract(), read_table(csv, contract()))
    assert found.tolist()[:2] == [0.0, 1.0]
    assert np.isnan(found[2])
    assert labels(contract(), pd.DataFrame({"defaulted": [True, False]})).tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="expected 0 or 1; 1 of 2 rows"):
        labels(contract(), pd.DataFrame({"defaulted": [1, 2]}))
    with pytest.raises(InputError, match="'maybe'"):
        labels(contract(), pd.DataFrame({"defaulted": ["true", "maybe"]}))


def test_request_ids_are_the_column_or_the_row_number(csv: Path) -> None:
    frame = read_table(csv, contract())
    assert request_ids(contract(), frame).tolist() == ["a1", "a2", "a3"]
    assert request_ids(contract(requestId=None), frame).tolist() == ["0", "1", "2"]
    with pytest.raises(InputError, match="each id once; 1 of 2"):
        request_ids(contract(), pd.DataFrame({"application": ["x", "x"]}))
    with pytest.raises(InputError, match="an id on every row"):
        request_ids(contract(), pd.DataFrame({"application": ["x", ""]}))


def test_keys_are_text_as_requests_name_them() -> None:
    assert as_keys(pd.Series([12.0, np.nan])).tolist() == ["12", None]
    assert as_keys(pd.Series([1.5])).tolist() == ["1.5"]
    assert as_keys(pd.Series([7, 8])).tolist() == ["7", "8"]
    assert as_keys(pd.Series(["007", "", None], dtype=object)).tolist() == ["007", None, None]


def test_missing_columns_are_named_with_what_was_probably_meant() -> None:
    with pytest.raises(InputError, match=r"loans.csv: columns missing: amount \(is it Amuont\?\), zzz; it has: Amuont, b"):
        require_columns(pd.DataFrame({"Amuont": [1], "b": [2]}), ["amount", "b", "zzz"], "loans.csv")


def test_flat_columns_follow_from_the_source_of_a_feature() -> None:
    by_name = contract().by_name
    assert feature_column(by_name["instalments"]) == "Months"
    assert feature_column(by_name["amount"]) == "amount"
    assert feature_column(by_name["log_amount"]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (HEADER, "holds no rows"),
        (HEADER + ROWS + "a4,2026-01-02", "malformed CSV: .*Expected 9 columns, got 2"),
        (HEADER + ROWS.replace("1e+05", "a lot"), "column amount: expected a number, got 'a lot'"),
        (HEADER + ROWS.replace("true", "perhaps"), "column returning: expected true, false, 0 or 1.*'perhaps'"),
        ("a,b,a\n1,2,3\n", "names a column twice: a"),
        ("a;b;c\n1;2;3\n", "expected commas"),
    ],
    ids=["empty", "header only", "cut off", "text for a number", "text for a bool", "repeated column", "semicolons"],
)
def test_a_broken_csv_is_an_error_that_says_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "loans.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as e:
        read_table(file, contract())
    assert str(file) in str(e.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "loans.csv"
    file.write_bytes((HEADER + ROWS).encode().replace(b"DE", b"\xff\xfe"))
    with pytest.raises(InputError, match="malformed CSV"):
        read_table(file, contract())


def test_a_text_cell_may_hold_commas_when_quoted(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('﻿a,b\n"x, y",2\n', encoding="utf-8")
    assert read_table(file).to_dict("list") == {"a": ["x, y"], "b": [2]}


def test_limits_hold(csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2, 3]}), parquet)
    monkeypatch.setattr(tables, "ROWS_MAX", 2)
    with pytest.raises(InputError, match="3 rows, at most 2"):
        read_table(csv, contract())
    with pytest.raises(InputError, match="3 rows, at most 2"):
        read_table(parquet)
    monkeypatch.setattr(tables, "ROWS_MAX", 3)
    monkeypatch.setattr(tables, "PARQUET_BYTES_MAX", 10)
    with pytest.raises(InputError, match=r"GiB in memory.*give a part of the rows"):
        read_table(parquet)
    pq.write_table(pa.table({name: [1] for name in "abcd"}), parquet)
    monkeypatch.setattr(tables, "COLUMNS_MAX", 3)
    with pytest.raises(InputError, match="4 columns, at most 3"):
        read_table(parquet)
    with pytest.raises(InputError, match="9 columns, at most 3"):
        read_table(csv, contract())
    monkeypatch.setattr(tables, "CSV_BYTES_MAX", 10)
    with pytest.raises(InputError, match="convert it to Parquet"):
        read_table(csv, contract())


def mixed(rows: int = 6) -> pd.DataFrame:
    """Columns as programs keep them that have no gaps in whole numbers, or no blank in text."""
    gap = np.arange(rows) == 2
    return pd.DataFrame({
        "application": np.arange(100, 100 + rows), "at": [datetime(2026, 1, 1 + i, tzinfo=UTC) for i in range(rows)],
        "applicant_no": np.where(gap, np.nan, 7.0), "amount": np.where(gap, np.nan, 1.25),
        "Months": pd.array([12] * rows, "Int64"), "country": np.where(gap, "", "DE"), "returning": pd.array(~gap, "boolean"),
        "defaulted": gap.astype(np.int8), "known_at": datetime(2026, 2, 1), "comment": [["a", "list"]] * rows,  # noqa: DTZ001
    })


def test_parquet_and_csv_of_the_same_rows_give_the_same_table(tmp_path: Path) -> None:
    frame = mixed()
    frame.to_parquet(tmp_path / "t.parquet")
    frame.drop(columns="comment").to_csv(tmp_path / "t.csv", index=False)
    c = contract()
    one, other = (read_table(tmp_path / name, c) for name in ("t.parquet", "t.csv"))
    assert "comment" not in one.columns
    for name in ("applicant_no", "amount", "Months", "country", "returning"):
        pd.testing.assert_series_equal(one[name], other[name], check_dtype=False)
    assert one["applicant_no"].tolist() == ["7", "7", None, "7", "7", "7"]
    assert one["country"].tolist()[1:3] == ["DE", None]
    for read in (request_ids, event_times, label_times, labels):
        assert list(read(c, one)) == list(read(c, other))


@pytest.mark.parametrize("stored", [
    pd.Series([5411.0, np.nan, 7995.0]), pd.Series([5411, None, 7995], dtype="Int64"), pd.Series(["5411", "", "7995"]),
    pd.Series(["5411", None, "7995"], dtype="category"),
], ids=["float", "nullable", "text", "dictionary"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_categories_that_look_like_numbers_are_texts_in_every_file(tmp_path: Path, stored: pd.Series[Any], ending: str) -> None:
    file = tmp_path / f"t{ending}"
    frame = pd.DataFrame({"country": stored, "other": 1})
    frame.to_csv(file, index=False) if ending == ".csv" else frame.to_parquet(file)
    assert read_table(file, contract())["country"].tolist() == ["5411", None, "7995"]


@pytest.mark.parametrize("stored", [pd.Series([1.0, np.nan, 2.0]), pd.Series(["1.0", "", "2.0"])], ids=["float", "text"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_categories_that_the_contract_writes_as_fractions_are_the_same_from_every_file_and_online(
    tmp_path: Path, stored: pd.Series[Any], ending: str,
) -> None:
    c = contract(categories=["1.0", "2.0"])
    file = tmp_path / f"t{ending}"
    frame = pd.DataFrame({"country": stored, "other": 1})
    frame.to_csv(file, index=False) if ending == ".csv" else frame.to_parquet(file)
    found = read_table(file, c)["country"]
    assert found.tolist() == ["1.0", None, "2.0"]
    (feature,) = (f for f in c.features if f.name == "country")
    online = [encode_value(feature, text, "country") for text in ("1.0", None, "2.0")]
    np.testing.assert_array_equal(encode_column(feature, found), online)
    np.testing.assert_array_equal(encode_column(feature, stored.where(stored != "", None)), online, "a table that no file was read for")


@pytest.mark.parametrize(("column", "values", "message"), [
    ("amount", [datetime(2026, 1, 1, tzinfo=UTC)] * 3, "column amount: expected numbers, got timestamp"),
    ("amount", [timedelta(days=1)] * 3, "column amount: expected numbers, got duration"),
    ("amount", [True, False, True], "column amount: expected numbers, got bool"),
    ("amount", [[1.0]] * 3, "column amount: expected one value a row, got list"),
    ("amount", [{"x": 1}] * 3, "column amount: expected one value a row, got struct"),
    ("amount", ["1", "a lot", ""], "column amount: expected a number; 1 of 3 rows"),
    ("country", [b"DE"] * 3, "column country: expected one value a row, got binary"),
    ("returning", [0, 1, 2], "column returning: expected 0 or 1"),
], ids=["time", "duration", "bool", "list", "struct", "text", "bytes", "bool-of-2"])
def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path, column: str, values: Any, message: str) -> None:
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({column: values, "other": [1, 2, 3]}), file)
    with pytest.raises(InputError, match=message) as found:
        read_table(file, contract())
    assert str(file) in str(found.value)


def test_a_column_twice_in_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    twice = pa.Table.from_arrays([pa.array([1.0]), pa.array([2.0]), pa.array([3.0])], names=["amount", "b", "amount"])
    pq.write_table(twice, file)
    with pytest.raises(InputError, match="names a column twice: amount"):
        read_table(file, contract())


def test_columns_of_another_contract_are_read_when_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    mixed().assign(score2=1, amount_of="x").to_parquet(file)
    other = contract().model_copy(update={"features": (contract().features[0].model_copy(update={"name": "score2"}),)})
    assert "score2" not in read_table(file, contract()).columns
    frame = read_table(file, contract(), also=other)
    assert {"score2", "Months"} <= set(frame.columns)
    assert "amount_of" not in frame.columns
    assert frame["score2"].dtype == np.float64


def test_parquet_is_read_as_it_is_and_a_broken_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "region=1"
    folder.mkdir()
    file = folder / "t.parquet"
    when = datetime(2026, 1, 1, tzinfo=UTC)
    pd.DataFrame({"at": [when], "k": ["007"]}, index=pd.Index([9], name="row")).to_parquet(file)
    frame = read_table(file)
    assert "region" not in frame.columns
    assert frame["k"].tolist() == ["007"]
    assert event_times(contract(), frame).iloc[0] == pd.Timestamp(when)
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_table(file)


def test_a_data_folder_stands_for_its_transactions(tmp_path: Path, csv: Path) -> None:
    with pytest.raises(InputError, match=r"has no transactions\.parquet"):
        data_file(tmp_path)
    (tmp_path / "transactions.csv").write_text(csv.read_text())
    assert data_file(tmp_path).name == "transactions.csv"
    assert len(read_table(tmp_path, contract())) == 3
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "no.csv")
    other = tmp_path / "t.xlsx"
    other.write_text("x")
    with pytest.raises(InputError, match=r"expected a .csv or .parquet file, got .xlsx"):
        read_table(other)
