"""The simulated issuer: the same for a seed, true to its contract, and without knowledge of the future."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hafnium_contract.contract_file import load_contract
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_training.simulation import Disturbance, SimulationSummary, simulate
from hafnium_training.simulation.labels import label_delays
from hafnium_training.simulation.population import make_customers, make_terminals
from hafnium_training.simulation.scenarios import Attack
from hafnium_training.simulation.transactions import Transactions, World, draw_transactions
from hafnium_training.simulation.views import (
    LABEL_WINDOW_DAYS,
    PRIOR_FRAUD_SHARE,
    PRIOR_WEIGHT,
    WINDOW_DAYS,
    customer_features,
    network_features,
)
from hafnium_training.tables import event_times, label_times, labels, read_table

CONTRACT = Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml"
DAYS = 40


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(CONTRACT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated")
    simulate(out, days=DAYS, seed=3)
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "transactions.parquet")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(tmp_path / name, days=5, seed=seed, customers=50, terminals=30, transactions_per_day=100)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["customer_features.parquet", "network_features.parquet", "summary.json", "transactions.parquet"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes(), name


def test_the_folder_serves_the_example_contract(folder: Path, data: pd.DataFrame, contract: ModelContract) -> None:
    wanted = {"transaction_id", "event_time", "is_fraud", "label_time"} | set(contract.request_fields)
    wanted |= {e.join_key for e in contract.entities} | {p.name for p in contract.protected}
    assert set(data.columns) == wanted
    for feature in contract.features:
        if feature.request_field is None:
            continue
        values = data[feature.request_field].dropna()
        if feature.range is not None:
            assert values.between(*feature.range).all(), feature.name
        if feature.categories:
            assert set(values) == set(feature.categories)
    for view in contract.views:
        frame = pd.read_parquet(folder / f"{view.name}.parquet")
        key = contract.entity(view.entity).join_key
        assert set(frame.columns) == {key, "event_timestamp"} | {
            f.source.field for f in contract.features_of(view.name)  # type: ignore[union-attr]
        }
        assert not frame.duplicated([key, "event_timestamp"]).any()
        midnights = frame["event_timestamp"]
        assert str(midnights.dtype) == "datetime64[us, UTC]"
        assert (midnights == midnights.dt.floor("D")).all()
        assert (midnights.min(), midnights.max()) == (pd.Timestamp("2026-01-01", tz="UTC"), pd.Timestamp("2026-02-10", tz="UTC"))
        assert set(data[key]) <= set(frame[key]) | _first_day_only(data, frame, key)


def _first_day_only(data: pd.DataFrame, frame: pd.DataFrame, key: str) -> set[str]:
    """Entities that joined on the last day: they have no midnight yet."""
    last = data["event_time"].max().floor("D")
    return set(data.loc[data["event_time"] >= last, key]) - set(frame[key])


def test_transactions_lie_within_the_days_in_order_and_about_one_in_a_hundred_is_fraud(folder: Path, data: pd.DataFrame) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert SimulationSummary(**summary).files["transactions.parquet"] == len(data) == summary["transactions"]
    assert data["event_time"].is_monotonic_increasing
    assert data["event_time"].min() >= pd.Timestamp("2026-01-01", tz="UTC")
    assert data["event_time"].max() < pd.Timestamp("2026-02-10", tz="UTC")
    assert 1_500 < len(data) / DAYS < 2_500
    assert 0.005 < data["is_fraud"].mean() < 0.02
    assert sum(summary["frauds_by_scenario"].values()) == summary["frauds"] == data["is_fraud"].sum()
    assert min(summary["frauds_by_scenario"].values()) > 50
    assert data["transaction_id"].is_unique


@pytest.mark.parametrize(("customers", "terminals"), [(4_000, 600), (400, 200)], ids=["rare customers", "busy customers"])
def test_about_one_in_a_hundred_is_fraud_in_other_populations_too(tmp_path: Path, customers: int, terminals: int) -> None:
    summary = simulate(tmp_path, days=30, seed=5, customers=customers, terminals=terminals)
    assert 0.006 < summary.fraud_share < 0.016
    assert 1_800 < summary.transactions / 30 < 2_400


def test_charge_backs_take_about_three_weeks_and_good_ones_a_fixed_time(data: pd.DataFrame) -> None:
    delay = (data["label_time"] - data["event_time"]).dt.total_seconds() / 86_400
    fraud = data["is_fraud"] == 1
    assert (delay[~fraud] == 25.0).all()
    assert 18 < delay[fraud].median() < 24
    assert delay[fraud].min() >= 1.0
    assert delay[fraud].max() <= 120.0


def test_every_value_of_a_view_can_be_counted_from_what_came_before_its_midnight(folder: Path, data: pd.DataFrame) -> None:
    """Late midnights, for which all 30 days lie within the data that was kept."""
    customers = pd.read_parquet(folder / "customer_features.parquet")
    terminals = pd.read_parquet(folder / "network_features.parquet")
    for midnight in (pd.Timestamp("2026-02-02", tz="UTC"), pd.Timestamp("2026-02-10", tz="UTC")):
        before = data[data["event_time"] < midnight]
        month = before[before["event_time"] >= midnight - pd.Timedelta(days=WINDOW_DAYS)]
        day = before[before["event_time"] >= midnight - pd.Timedelta(days=1)]
        rows = customers[customers["event_timestamp"] == midnight].set_index("customer_id")
        count = day.groupby("customer_id").size().reindex(rows.index, fill_value=0)
        assert (rows["velocity_24h"] == count).all()
        amounts = month.groupby("customer_id")["transaction_amount"]
        np.testing.assert_allclose(rows["amount_mean_30d"], amounts.mean().reindex(rows.index), atol=0.006)
        np.testing.assert_allclose(rows["amount_std_30d"], amounts.std().reindex(rows.index), atol=0.02)
        at = terminals[terminals["event_timestamp"] == midnight].set_index("terminal_id")
        seen = month.groupby("terminal_id").size().reindex(at.index, fill_value=0)
        assert (at["counterparty_transaction_count"] == seen).all()
    rows = customers.set_index(["customer_id", "event_timestamp"])["total_transaction_count"].unstack()
    assert ((rows.diff(axis=1).iloc[:, 1:] >= 0) | rows.diff(axis=1).iloc[:, 1:].isna()).all().all()
    assert (customers["days_since_onboarding"] >= 1).all()


def _world(days: int) -> tuple[World, Transactions]:
    rng = np.random.default_rng(5)
    terminals = make_terminals(rng, 12)
    customers = make_customers(rng, 40, terminals, days=days, rate_mean=2.0)
    world = World(customers, terminals, days, 0)
    tx = draw_transactions(rng, world).sorted_by_time()
    return world, replace(tx, scenario=(rng.random(len(tx)) < 0.1).astype(np.int64))


def test_counterparty_risk_counts_only_labels_that_had_arrived() -> None:
    days = 100
    world, tx = _world(days)
    delay = label_delays(np.random.default_rng(6), tx)
    midnights = np.arange(50, days + 1)
    dates = np.datetime64("2026-01-01", "D") + midnights.astype("timedelta64[D]")
    got = network_features(world, tx, delay, midnights=midnights, dates=dates)
    risk = got["counterparty_risk_score"].to_numpy().reshape(len(midnights), -1)
    arrival_days = (tx.day * 86_400e6 + tx.micros + delay) / 86_400e6
    for i, midnight in enumerate(midnights):
        known = (arrival_days < midnight) & (arrival_days >= midnight - LABEL_WINDOW_DAYS)
        for t in range(len(world.terminals.ids)):
            here = known & (tx.terminal == t)
            frauds = (tx.scenario[here] > 0).sum()
            expected = (frauds + PRIOR_FRAUD_SHARE * PRIOR_WEIGHT) / (here.sum() + PRIOR_WEIGHT)
            assert risk[i, t] == pytest.approx(expected, abs=1e-5)


def test_nothing_that_happens_from_a_midnight_on_changes_the_values_at_it() -> None:
    """The property itself: throw the future away, or turn it round, and the past's features stay."""
    days, cut = 80, 60
    world, tx = _world(days)
    delay = label_delays(np.random.default_rng(7), tx)
    failed = np.random.default_rng(8).poisson(0.2, (len(world.customers.ids), days))
    midnights = np.arange(40, cut + 1)
    dates = np.datetime64("2026-01-01", "D") + midnights.astype("timedelta64[D]")
    arrived = tx.day * 86_400_000_000 + tx.micros + delay < cut * 86_400_000_000
    # What was not known at the cut becomes its opposite; the past's transactions stay, the future's get absurd.
    other = replace(tx, scenario=np.where(arrived, tx.scenario, 1 - np.minimum(tx.scenario, 1)),
                    amount=np.where(tx.day < cut, tx.amount, 19_999.0))
    other_failed = np.where(np.arange(days) < cut, failed, 99)
    same = network_features(world, tx, delay, midnights=midnights, dates=dates)
    pd.testing.assert_frame_equal(same, network_features(world, other, delay, midnights=midnights, dates=dates))
    mine = customer_features(world, tx, failed, midnights=midnights, dates=dates)
    pd.testing.assert_frame_equal(mine, customer_features(world, other, other_failed, midnights=midnights, dates=dates))
    later = np.arange(cut + 1, days + 1)
    dates = np.datetime64("2026-01-01", "D") + later.astype("timedelta64[D]")
    assert not network_features(world, tx, delay, midnights=later, dates=dates).equals(
        network_features(world, other, delay, midnights=later, dates=dates)
    ), "the change has to show afterwards, else this test proves nothing"


def test_attacks_cover_their_days_and_no_others() -> None:
    attack = Attack(np.array([0, 0, 2]), np.array([-3, 2, 4]), np.array([1, 3, 99]))
    assert attack.matrix(3, 6).astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 1]]


def test_frauds_differ_in_every_direction_that_the_contract_claims(
    folder: Path, data: pd.DataFrame, contract: ModelContract
) -> None:
    """Mean ranks: more (or less) of each monotone feature among frauds, with room for chance."""
    table = data.assign(event_timestamp=data["event_time"].dt.floor("D"))
    for view in contract.views:
        key = contract.entity(view.entity).join_key
        table = table.merge(pd.read_parquet(folder / f"{view.name}.parquet"), on=[key, "event_timestamp"], how="left")
    table["amount_over_mean"] = table["transaction_amount"] / table["amount_mean_30d"]
    fraud = table["is_fraud"] == 1
    checked = 0
    for feature in contract.features:
        if feature.monotone == "none":
            continue
        rank = table[feature.name].astype(float).rank(pct=True)
        gap = rank[fraud].mean() - rank[~fraud].mean()
        assert (gap if feature.monotone == "increasing" else -gap) > 0.02, feature.name
        checked += 1
    assert checked == 8


def test_the_task_can_be_learnt_but_no_single_feature_gives_it_away(folder: Path, contract: ModelContract) -> None:
    from sklearn.metrics import roc_auc_score

    frame = read_table(folder, contract)
    truth = labels(contract, frame)
    for name in ("transaction_amount", "geo_risk_score", "device_is_new"):
        values = frame[name].astype(float).fillna(0.0)
        assert 0.52 < roc_auc_score(truth, values) < 0.85, name
    assert (label_times(contract, frame) > event_times(contract, frame)).all()


@pytest.mark.parametrize("kind", ["amounts_in_cents", "geo_service_down", "spending_up", "online_up"])
def test_a_disturbance_begins_on_its_day(tmp_path: Path, kind: str) -> None:
    size = {"customers": 200, "terminals": 60, "transactions_per_day": 400}
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    simulate(plain, days=12, seed=4, **size)
    summary = simulate(changed, days=12, seed=4, disturbance=Disturbance(kind, 6), **size)  # type: ignore[arg-type]
    assert summary.disturbance == f"{kind} from day 6"
    a, b = pd.read_parquet(plain / "transactions.parquet"), pd.read_parquet(changed / "transactions.parquet")
    cut = pd.Timestamp("2026-01-07", tz="UTC")
    before, after = b[b["event_time"] < cut], b[b["event_time"] >= cut]
    plain_after = a[a["event_time"] >= cut]
    match kind:
        case "amounts_in_cents":
            assert after["transaction_amount"].median() == pytest.approx(plain_after["transaction_amount"].median() * 100)
            views = [(f / "customer_features.parquet").read_bytes() for f in (plain, changed)]
            assert views[0] == views[1], "a fault of what is sent changes no feature"
        case "geo_service_down":
            assert after["geo_risk_score"].isna().all()
            assert before["geo_risk_score"].notna().mean() > 0.9
        case "spending_up":
            assert 1.4 < after["transaction_amount"].median() / plain_after["transaction_amount"].median() < 1.8
            assert 0.9 < before["transaction_amount"].median() / a.loc[a["event_time"] < cut, "transaction_amount"].median() < 1.1
        case _:
            assert (after["channel"] == "online").mean() > (before["channel"] == "online").mean() + 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"days": 0}, "days: expected 1 to 3650, got 0"),
        ({"days": 5, "customers": 0}, "at least 1 customer"),
        ({"days": 3650, "customers": 1_000_000}, "at most 200000000"),
        ({"days": 5, "disturbance": Disturbance("spending_up", 5)}, "from day 5, but the data has days 0 to 4"),
    ],
    ids=["no day", "nobody", "too much", "disturbance afterwards"],
)
def test_arguments_out_of_their_limits_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(tmp_path / "x", seed=1, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_another_start_and_the_smallest_world_work(tmp_path: Path) -> None:
    summary = simulate(tmp_path, days=1, seed=9, start=date(2024, 2, 29), customers=1, terminals=10, transactions_per_day=20)
    assert (summary.start, summary.end) == ("2024-02-29T00:00:00+00:00", "2024-03-01T00:00:00+00:00")
    assert summary.transactions > 0
