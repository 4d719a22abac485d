"""Bodies for POST /v1/score hold what a caller would know, as JSON, by the contract alone."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from hafnium_contract.contract_file import load_contract
from hafnium_contract.encoding import encode_value
from hafnium_contract.errors import InputError
from hafnium_training.replay_requests import score_requests
from hafnium_training.simulation import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"
RISK = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
CARD = load_contract(EXAMPLES / "creditcard" / "contract.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    simulate(out, days=4, seed=1, customers=100, terminals=40, transactions_per_day=300)
    return out


def test_requests_of_a_window_come_in_order_and_hold_request_features_only(folder: Path) -> None:
    start = datetime(2026, 1, 2, 6, tzinfo=UTC)
    got = list(score_requests(RISK, folder, start=start, end=start + timedelta(hours=12)))
    data = pd.read_parquet(folder / "transactions.parquet").set_index("transaction_id")
    expected = data[(data["event_time"] >= start) & (data["event_time"] < start + timedelta(hours=12))]
    assert [r["request_id"] for r in got] == expected.index.tolist()
    assert len(got) > 50
    missing = 0
    for r in json.loads(json.dumps(got, allow_nan=False)):
        row = expected.loc[r["request_id"]]
        assert datetime.fromisoformat(r["event_time"]) == row["event_time"]
        assert r["entity"] == {"customer_id": row["customer_id"], "terminal_id": row["terminal_id"]}
        assert set(r["features"]) <= set(RISK.request_fields)
        for name, feature in RISK.request_fields.items():
            assert (name in r["features"]) == bool(pd.notna(row[name]))
            missing += name not in r["features"]
            if name in r["features"]:
                assert not math.isnan(encode_value(feature, r["features"][name], name))
        assert isinstance(r["features"].get("device_is_new", True), bool)
    assert missing > 0, "gaps occur in this data"


def test_a_limit_takes_the_oldest(folder: Path) -> None:
    got = list(score_requests(RISK, folder, limit=3))
    assert [r["request_id"] for r in got] == ["tx-00000001", "tx-00000002", "tx-00000003"]
    assert list(score_requests(RISK, folder, start=datetime(2030, 1, 1, tzinfo=UTC))) == []


def test_a_flat_csv_with_numeric_times_and_without_ids_works_too(tmp_path: Path) -> None:
    columns = ["Time", *(f"V{i}" for i in range(1, 29)), "Amount", "Class"]
    rows = [[3600.5, *([0.25] * 28), 10.0, 0], [60, *([""] * 27), "inf", 1e5, 1]]
    file = tmp_path / "card.csv"
    file.write_text("\n".join(",".join(str(x) for x in row) for row in [columns, *rows]) + "\n")
    first, second = list(score_requests(CARD, file))
    assert (first["request_id"], first["event_time"], first["entity"]) == ("1", "2013-09-01T00:01:00.000000Z", {})
    assert first["features"] == {"Amount": 100_000.0}, "blank and infinite values are left out"
    assert second["event_time"] == "2013-09-01T01:00:00.500000Z"
    assert second["features"]["V28"] == 0.25


def test_whole_numbers_go_out_whole_and_keys_as_text(tmp_path: Path) -> None:
    features = [f.model_dump(mode="json") for f in RISK.features]
    features[0] |= {"dtype": "int"}
    contract = RISK.model_validate(RISK.model_dump(mode="json") | {"features": features})
    frame = pd.DataFrame({
        "transaction_id": [1, 2], "event_time": ["2026-01-01", "2026-01-02"], "customer_id": [7.0, None], "terminal_id": ["t", ""],
        "transaction_amount": [3.0, 2.5], "merchant_category": ["fuel", None], "channel": ["chip", "chip"],
        "device_is_new": [1, 0], "geo_risk_score": [0, 1],
    })
    frame.to_parquet(tmp_path / "t.parquet")
    first, second = score_requests(contract, tmp_path / "t.parquet")
    assert json.dumps(first["features"]["transaction_amount"]) == "3"
    assert second["features"]["transaction_amount"] == 2.5
    assert (first["entity"], second["entity"]) == ({"customer_id": "7", "terminal_id": "t"}, {})
    assert (first["request_id"], first["features"]["device_is_new"]) == ("1", True)
    frame.assign(device_is_new=[1, 2]).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"column device_is_new: expected 0 or 1; 1 of 2 rows .*row 2: 2"):
        list(score_requests(contract, tmp_path / "t.parquet"))


def test_wrong_arguments_are_refused_before_the_first_request(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="start: give a time with an offset"):
        score_requests(RISK, folder, start=datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(InputError, match="limit: expected 1 or more, got 0"):
        score_requests(RISK, folder, limit=0)
    file = tmp_path / "t.csv"
    file.write_text("transaction_id,event_time,customer,terminal_id\n1,2026-01-01,a,b\n")
    with pytest.raises(InputError, match=r"columns missing: customer_id \(is it customer\?\), transaction_amount"):
        score_requests(RISK, file)
