"""`simulate`: draws the world, lets time pass and writes the data folder (the same bytes for the same arguments)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.errors import InputError
from hafnium_contract.progress import Progress, Silent
from hafnium_training.simulation.labels import DAY_US, label_delays
from hafnium_training.simulation.population import CATEGORIES, make_customers, make_terminals
from hafnium_training.simulation.scenarios import (
    NAMES,
    compromised_customers,
    compromised_terminals,
    conspicuous_amounts,
    failed_authentications,
)
from hafnium_training.simulation.transactions import CHANNELS, Disturbance, Transactions, World, draw_transactions
from hafnium_training.simulation.views import customer_features, network_features, utc
from hafnium_training.tables import TRANSACTIONS

WARM_UP_DAYS = 60
"""Drawn and thrown away, so that day 0 is like any other: 30 days for the 30-day means and as much again for labels, which
are good after 25 days. With less, every terminal would look the same in the first weeks."""
CUSTOMERS_DEFAULT = 1_000
TERMINALS_DEFAULT = 600
TRANSACTIONS_PER_DAY_DEFAULT = 2_000
DAYS_MAX = 3_650
CELLS_MAX = 200_000_000
"""Entities times days, and rows: beyond this the matrices of one view would not fit into 8 GB."""
TERMINALS_MIN = 10

MISSING_SHARES = {"merchant_category": 0.002, "channel": 0.002, "device_is_new": 0.004, "geo_risk_score": 0.01}
"""Fields that callers leave out now and then."""


@dataclass(frozen=True)
class SimulationSummary:
    """What was written (also `summary.json`)."""

    start: str
    """Midnight UTC of day 0."""
    end: str
    """Midnight UTC after the last day: the last moment that the views know."""
    days: int
    seed: int
    transactions: int
    frauds: int
    fraud_share: float
    frauds_by_scenario: dict[str, int]
    customers: int
    terminals: int
    disturbance: str | None
    files: dict[str, int]
    """File name → rows."""


def simulate(
    out: Path, *, days: int, seed: int, start: date = date(2026, 1, 1), customers: int = CUSTOMERS_DEFAULT,
    terminals: int = TERMINALS_DEFAULT, transactions_per_day: int = TRANSACTIONS_PER_DAY_DEFAULT,
    disturbance: Disturbance | None = None, progress: Progress | None = None,
) -> SimulationSummary:
    """Writes `transactions.parquet`, one `<view>.parquet` per view and `summary.json` into `out` (made if absent).

    `seed` decides everything that is drawn. Raises InputError when an argument is out of its limits.
    """
    _check(days, customers, terminals, transactions_per_day, disturbance)
    listener = progress or Silent()
    listener.stage("simulate", 5)
    clock = WARM_UP_DAYS + days
    # One stream per concern: another number of terminals does not change how amounts are drawn, and so on.
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(8)]
    first_day = start - timedelta(days=WARM_UP_DAYS)
    where = make_terminals(streams[0], terminals)
    who = make_customers(streams[1], customers, where, days=clock, rate_mean=transactions_per_day / customers)
    world = World(
        who, where, clock, first_day.weekday(),
        spending_up_from=_from(disturbance, "spending_up"), online_up_from=_from(disturbance, "online_up"),
    )
    listener.advance()
    tx = draw_transactions(streams[2], world)
    listener.advance()
    tx = conspicuous_amounts(streams[3], world, tx)
    tx = compromised_terminals(streams[4], world, tx)
    tx, under_attack = compromised_customers(streams[5], world, tx)
    tx = tx.sorted_by_time()
    delay_us = label_delays(streams[6], tx)
    listener.advance()

    # Snapshots at each midnight of the data, and at the one after it for those who go on from there.
    midnights = np.arange(WARM_UP_DAYS, clock + 1)
    dates = np.datetime64(first_day, "D") + midnights.astype("timedelta64[D]")
    failed = failed_authentications(streams[5], world, under_attack)
    views = {
        "customer_features": customer_features(world, tx, failed, midnights=midnights, dates=dates),
        "network_features": network_features(world, tx, delay_us, midnights=midnights, dates=dates),
    }
    listener.advance()

    kept = tx.day >= WARM_UP_DAYS
    data = tx.take(kept)
    frame = _recorded(streams[7], world, data, delay_us[kept], np.datetime64(first_day, "us"), disturbance)
    out.mkdir(parents=True, exist_ok=True)
    tables = {TRANSACTIONS: frame} | {f"{name}.parquet": view for name, view in views.items()}
    for name, table in tables.items():
        _write(out / name, table)
    frauds = int((data.scenario > 0).sum())
    begin = datetime.combine(start, time(), UTC)
    summary = SimulationSummary(
        start=begin.isoformat(), end=(begin + timedelta(days=days)).isoformat(), days=days, seed=seed,
        transactions=len(data), frauds=frauds, fraud_share=round(frauds / max(len(data), 1), 6),
        frauds_by_scenario={name: int((data.scenario == s).sum()) for s, name in NAMES.items()},
        customers=customers, terminals=terminals,
        disturbance=None if disturbance is None else f"{disturbance.kind} from day {disturbance.from_day}",
        files={name: len(table) for name, table in tables.items()},
    )
    (out / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    listener.advance()
    listener.event(f"{summary.transactions} transactions in {days} days, {summary.fraud_share:.2%} fraud, in {out}")
    return summary


def _check(days: int, customers: int, terminals: int, per_day: int, disturbance: Disturbance | None) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise InputError(f"days: expected 1 to {DAYS_MAX}, got {days}")
    if customers < 1 or terminals < TERMINALS_MIN or per_day < 1:
        raise InputError(
            f"expected at least 1 customer, {TERMINALS_MIN} terminals and 1 transaction a day, "
            f"got {customers}, {terminals} and {per_day}"
        )
    cells = max(customers, terminals, per_day) * (days + WARM_UP_DAYS)
    if cells > CELLS_MAX:
        raise InputError(f"{cells} cells (entities or transactions a day, times days), at most {CELLS_MAX}; ask for less")
    if disturbance is not None and not 0 <= disturbance.from_day < days:
        raise InputError(f"disturbance: from day {disturbance.from_day}, but the data has days 0 to {days - 1}")


def _from(disturbance: Disturbance | None, kind: str) -> int | None:
    return WARM_UP_DAYS + disturbance.from_day if disturbance is not None and disturbance.kind == kind else None


def _recorded(
    rng: np.random.Generator, world: World, tx: Transactions, delay_us: np.ndarray[tuple[int], np.dtype[np.int64]],
    first_day: np.datetime64, disturbance: Disturbance | None,
) -> pd.DataFrame:
    """Transactions as the issuer's systems keep them: with gaps, and with the fault if one was asked for."""
    n = len(tx)
    c, t = world.customers, world.terminals
    gaps = {name: rng.random(n) < share for name, share in MISSING_SHARES.items()}
    cents_from, geo_from = _from(disturbance, "amounts_in_cents"), _from(disturbance, "geo_service_down")
    amount, geo_risk = tx.amount, np.round(tx.geo_risk, 4)
    if cents_from is not None:
        amount = np.where(tx.day >= cents_from, np.round(amount * 100.0), amount)
    if geo_from is not None:
        gaps["geo_risk_score"] |= tx.day >= geo_from
    event = first_day + (tx.day * DAY_US + tx.micros).astype("timedelta64[us]")
    width = max(8, len(str(n)))
    return pd.DataFrame({
        "transaction_id": [f"tx-{i:0{width}d}" for i in range(1, n + 1)],
        "event_time": utc(event),
        "customer_id": c.ids[tx.customer],
        "terminal_id": t.ids[tx.terminal],
        "transaction_amount": amount,
        "merchant_category": _with_gaps(np.array(CATEGORIES, object)[t.category[tx.terminal]], gaps["merchant_category"]),
        "channel": _with_gaps(np.array(CHANNELS, object)[tx.channel], gaps["channel"]),
        "device_is_new": pd.array(tx.new_device, dtype="boolean"),
        "geo_risk_score": np.where(gaps["geo_risk_score"], np.nan, geo_risk),
        "is_fraud": (tx.scenario > 0).astype(np.int8),
        "label_time": utc(event + delay_us.astype("timedelta64[us]")),
        "age_band": c.age_band[tx.customer],
        "region": c.region[tx.customer],
    }).assign(device_is_new=lambda f: f["device_is_new"].mask(gaps["device_is_new"]))


def _with_gaps(
    values: np.ndarray[tuple[int], np.dtype[np.object_]], gap: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    out = values.copy()
    out[gap] = None
    return out


def _write(path: Path, frame: pd.DataFrame) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    # beside its place and renamed: a reader sees a whole file or none
    staging = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, staging, compression="zstd")
    staging.replace(path)


