"""Feature views as a nightly job computes them: one row per entity and midnight, with what was known at that midnight.

Everything is counted in [entity, day] matrices. Column d holds what happened on day d, so the value at the midnight that
begins day d is built from columns below d: the day itself can't leak in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from hafnium_training.simulation.labels import DAY_US
from hafnium_training.simulation.population import Floats, Ints
from hafnium_training.simulation.transactions import Transactions, World

WINDOW_DAYS = 30
LABEL_WINDOW_DAYS = 45
"""Labels that arrived in this time count for a terminal's risk: a compromise that ended is forgotten in the end."""
PRIOR_FRAUD_SHARE, PRIOR_WEIGHT = 0.01, 15.0
"""Bayesian smoothing: a terminal begins with the share of fraud of all, worth 15 transactions."""


def customer_features(
    world: World, tx: Transactions, failed_auths: Ints, *, midnights: Ints, dates: npt.NDArray[np.datetime64],
) -> pd.DataFrame:
    """Rows (customer_id, event_timestamp, fields) for customers who had joined before each of `midnights` (days)."""
    c = world.customers
    size = len(c.ids)
    count = per_day(tx.customer, tx.day, size, world.days)
    total = per_day(tx.customer, tx.day, size, world.days, tx.amount)
    squares = per_day(tx.customer, tx.day, size, world.days, tx.amount**2)
    n = sum_before(count, midnights, WINDOW_DAYS)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n > 0, sum_before(total, midnights, WINDOW_DAYS) / n, np.nan)
        variance = (sum_before(squares, midnights, WINDOW_DAYS) - n * mean**2) / (n - 1)
    std = np.where(n > 1, np.sqrt(np.maximum(variance, 0.0)), np.nan)
    tenure = midnights[None, :] - c.onboarded_day[:, None]
    known = tenure > 0
    entity, at = np.nonzero(known.T)[::-1]
    return pd.DataFrame({
        "customer_id": c.ids[entity],
        "event_timestamp": utc(dates[at]),
        "velocity_24h": sum_before(count, midnights, 1)[entity, at].astype(np.int64),
        "total_transaction_count": (c.earlier_count[:, None] + sum_before(count, midnights, world.days))[entity, at]
        .astype(np.int64),
        "days_since_onboarding": tenure[entity, at].astype(np.float64),
        "failed_auth_attempts": sum_before(failed_auths, midnights, 1)[entity, at].astype(np.int64),
        "amount_mean_30d": np.round(mean[entity, at], 2),
        "amount_std_30d": np.round(std[entity, at], 2),
    })


def network_features(
    world: World, tx: Transactions, label_delay_us: Ints, *, midnights: Ints, dates: npt.NDArray[np.datetime64],
) -> pd.DataFrame:
    """Rows (terminal_id, event_timestamp, fields) for every terminal at each of `midnights` (days)."""
    size = len(world.terminals.ids)
    count = per_day(tx.terminal, tx.day, size, world.days)
    # A label counts on the day it arrives, whenever the transaction was.
    arrival = tx.day + (tx.micros + label_delay_us) // DAY_US
    arrived = arrival < world.days
    good_and_bad = per_day(tx.terminal[arrived], arrival[arrived], size, world.days)
    bad = per_day(tx.terminal[arrived], arrival[arrived], size, world.days, (tx.scenario[arrived] > 0).astype(np.float64))
    frauds = sum_before(bad, midnights, LABEL_WINDOW_DAYS) + PRIOR_FRAUD_SHARE * PRIOR_WEIGHT
    risk = frauds / (sum_before(good_and_bad, midnights, LABEL_WINDOW_DAYS) + PRIOR_WEIGHT)
    at, entity = np.divmod(np.arange(len(midnights) * size), size)
    return pd.DataFrame({
        "terminal_id": world.terminals.ids[entity],
        "event_timestamp": utc(dates[at]),
        "counterparty_risk_score": np.round(risk[entity, at], 5),
        "counterparty_transaction_count": sum_before(count, midnights, WINDOW_DAYS)[entity, at].astype(np.int64),
    })


def per_day(entity: Ints, day: Ints, entities: int, days: int, weight: Floats | None = None) -> Floats:
    """[entities, days]: rows (or the sum of `weight`) of each entity on each day."""
    flat = np.bincount(entity * days + day, weights=weight, minlength=entities * days)
    return flat.astype(np.float64).reshape(entities, days)


def sum_before(values: Floats | Ints, midnights: Ints, window_days: int) -> Floats:
    """[entities, len(midnights)]: sum over the `window_days` days before each midnight, that day itself not included."""
    running = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=running[:, 1:])
    return running[:, midnights] - running[:, np.maximum(midnights - window_days, 0)]


def utc(dates: npt.NDArray[np.datetime64]) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(dates.astype("datetime64[us]"), tz="UTC")
