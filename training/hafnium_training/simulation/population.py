"""Who pays and where: customers and terminals on a square of 100 by 100 km."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Texts = npt.NDArray[np.object_]

SIDE_KM = 100.0
CATEGORIES = ("grocery", "fuel", "restaurant", "travel", "electronics", "fashion", "online_services", "cash")
PHYSICAL_SHARES = (0.34, 0.12, 0.22, 0.04, 0.06, 0.14, 0.0, 0.08)
ONLINE_SHARES = (0.10, 0.0, 0.06, 0.16, 0.18, 0.22, 0.28, 0.0)
AMOUNT_FACTORS = (0.8, 1.2, 0.8, 3.5, 2.8, 1.3, 0.6, 1.9)
"""Typical amount of a category over the customer's own."""
AGE_BANDS = ("18-29", "30-44", "45-64", "65+")
ONLINE_TERMINAL_SHARE = 0.15
TERMINALS_NEAR = 24
"""A customer's usual terminals: the nearest ones."""
ONBOARDED_DURING_SHARE = 0.15
"""Customers who join while the simulation runs: their first day has no feature row, as in life."""
TENURE_DAYS_MEAN = 700.0


@dataclass(frozen=True)
class Terminals:
    ids: Texts
    x: Floats
    y: Floats
    online: npt.NDArray[np.bool_]
    category: Ints
    """Index into CATEGORIES."""
    popularity: Floats
    magstripe_share: Floats
    """Old card readers read magnetic stripes."""
    weakness: Floats
    """How likely it is that this one is compromised, relative to the others: some are again and again."""


@dataclass(frozen=True)
class Customers:
    ids: Texts
    x: Floats
    y: Floats
    rate: Floats
    """Transactions a day."""
    log_amount: Floats
    amount_sigma: Floats
    online_share: Floats
    active_hour: Floats
    onboarded_day: Ints
    """Day of the simulation's clock (0 = first day of the warm-up), negative for those who were there before."""
    earlier_count: Ints
    """Transactions before the simulation's first day."""
    usual_terminals: Ints
    """[customers, TERMINALS_NEAR], nearest first."""
    age_band: Texts
    region: Texts


def make_terminals(rng: np.random.Generator, count: int) -> Terminals:
    """`count` terminals, at least one of them online and one not."""
    online = rng.random(count) < ONLINE_TERMINAL_SHARE
    online[0], online[-1] = True, False
    physical = rng.choice(len(CATEGORIES), count, p=PHYSICAL_SHARES)
    remote = rng.choice(len(CATEGORIES), count, p=ONLINE_SHARES)
    return Terminals(
        ids=names("t", count),
        x=rng.random(count) * SIDE_KM,
        y=rng.random(count) * SIDE_KM,
        online=online,
        category=np.where(online, remote, physical).astype(np.int64),
        popularity=rng.gamma(1.5, 1.0, count) + 0.1,
        magstripe_share=np.where(rng.random(count) < 0.15, 0.3, 0.02),
        weakness=rng.gamma(0.4, 1.0, count) + 0.05,
    )


def make_customers(
    rng: np.random.Generator, count: int, terminals: Terminals, *, days: int, rate_mean: float,
) -> Customers:
    """`count` customers who together make about `rate_mean` transactions each a day over `days` days."""
    x, y = rng.random(count) * SIDE_KM, rng.random(count) * SIDE_KM
    places = np.flatnonzero(~terminals.online)
    near = min(TERMINALS_NEAR, len(places))
    tree = KDTree(np.column_stack([terminals.x[places], terminals.y[places]]))
    found: Any = tree.query(np.column_stack([x, y]), k=near)[1]
    usual = places[np.asarray(found, np.int64).reshape(count, near)]
    tenure = np.ceil(rng.exponential(TENURE_DAYS_MEAN, count)).astype(np.int64)
    joins = rng.random(count) < ONBOARDED_DURING_SHARE
    onboarded = np.where(joins, rng.integers(0, days, count), -tenure)
    # Those who join later make fewer transactions in all; the others' rate makes up for it.
    present = 1.0 - (joins * onboarded / days).mean()
    rate = rng.gamma(1.6, 1.0 / 1.6, count) * rate_mean / present
    east, north = x > SIDE_KM / 2, y > SIDE_KM / 2
    region = np.where(north, np.where(east, "north-east", "north-west"), np.where(east, "south-east", "south-west"))
    return Customers(
        ids=names("c", count),
        x=x, y=y, rate=rate,
        log_amount=rng.normal(np.log(28.0), 0.55, count),
        amount_sigma=rng.uniform(0.5, 0.9, count),
        online_share=rng.beta(2.0, 5.0, count),
        active_hour=rng.normal(14.5, 1.5, count),
        onboarded_day=onboarded,
        earlier_count=rng.poisson(rate * np.maximum(-onboarded, 0)),
        usual_terminals=usual,
        age_band=np.array(AGE_BANDS, object)[rng.choice(4, count, p=(0.22, 0.29, 0.31, 0.18))],
        region=region.astype(object),
    )


def names(prefix: str, count: int) -> Texts:
    """`c-0001`, `c-0002`, … all of one length, so that they sort as they are numbered."""
    width = max(4, len(str(count)))
    return np.array([f"{prefix}-{i:0{width}d}" for i in range(1, count + 1)], object)
