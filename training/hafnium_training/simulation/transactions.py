"""What customers do in peace: the legitimate transactions, before any fraud. All arrays, no loop over days or rows."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hafnium_training.simulation.population import AMOUNT_FACTORS, SIDE_KM, Customers, Floats, Ints, Terminals

Bools = npt.NDArray[np.bool_]

CHANNELS = ("chip", "contactless", "online", "magstripe")
CHIP, CONTACTLESS, ONLINE, MAGSTRIPE = range(4)
AMOUNT_MIN_EUR, AMOUNT_MAX_EUR = 0.5, 20_000.0
DAY_S = 86_400
_WEEK = np.array([0.94, 0.92, 0.96, 1.0, 1.12, 1.16, 0.9])
"""Transactions by day of the week, Monday first."""
_TRAVEL_SHARE = 0.06
_BURST_SHARE, _BURST_FACTOR = 0.015, 3.0
"""Shopping days: honest customers are fast at times too."""


@dataclass(frozen=True)
class Disturbance:
    """Something that goes wrong (or only becomes different) from a day on, for trying what monitoring does about it."""

    kind: Literal["amounts_in_cents", "geo_service_down", "spending_up", "online_up"]
    """The first two are faults of what is sent, the world stays as it is; the others change what customers do."""
    from_day: int
    """Counted from day 0, the first day of the data."""


@dataclass(frozen=True)
class Transactions:
    """Columns of equal length, one entry per transaction. `scenario` 0 is legitimate, 1 to 3 are the frauds."""

    customer: Ints
    terminal: Ints
    day: Ints
    """Day of the simulation's clock: 0 is the first day of the warm-up."""
    micros: Ints
    """Microseconds since midnight."""
    amount: Floats
    channel: Ints
    new_device: Bools
    geo_risk: Floats
    scenario: Ints

    def __len__(self) -> int:
        return len(self.customer)

    def sorted_by_time(self) -> Transactions:
        order = np.lexsort((self.customer, self.micros, self.day))
        return self.take(order)

    def take(self, rows: Ints | Bools) -> Transactions:
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def followed_by(self, other: Transactions) -> Transactions:
        both = {f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)}
        return Transactions(**both)


@dataclass(frozen=True)
class World:
    """Everything that stays while transactions are drawn."""

    customers: Customers
    terminals: Terminals
    days: int
    """Days of the simulation's clock, warm-up included."""
    first_weekday: int
    """0 = Monday."""
    spending_up_from: int | None = None
    online_up_from: int | None = None


def draw_transactions(rng: np.random.Generator, world: World) -> Transactions:
    """Legitimate transactions of all days, in no order."""
    c = world.customers
    day = np.arange(world.days)
    season = _WEEK[(day + world.first_weekday) % 7]
    burst = np.where(rng.random((len(c.ids), world.days)) < _BURST_SHARE, _BURST_FACTOR, 1.0)
    burst /= 1.0 + _BURST_SHARE * (_BURST_FACTOR - 1.0)
    present = day[None, :] >= c.onboarded_day[:, None]
    counts = rng.poisson(c.rate[:, None] * season[None, :] * burst * present)
    cells = np.repeat(np.arange(counts.size), counts.ravel())
    customer, when = np.divmod(cells, world.days)
    return draw_details(rng, world, customer, when)


def draw_details(rng: np.random.Generator, world: World, customer: Ints, day: Ints) -> Transactions:
    """Where, when, how much and how, for transactions of the given customers on the given days."""
    c, t, n = world.customers, world.terminals, len(customer)
    online_share = c.online_share[customer]
    if world.online_up_from is not None:
        online_share = np.where(day >= world.online_up_from, 0.5 + 0.5 * online_share, online_share)
    online = rng.random(n) < online_share
    rank = np.minimum(rng.geometric(0.15, n) - 1, c.usual_terminals.shape[1] - 1)
    usual = c.usual_terminals[customer, rank]
    travels = rng.random(n) < _TRAVEL_SHARE
    terminal = np.where(travels, _popular(rng, np.flatnonzero(~t.online), t, n), usual)
    terminal = np.where(online, _popular(rng, np.flatnonzero(t.online), t, n), terminal)
    factor = np.array(AMOUNT_FACTORS)[t.category[terminal]]
    amount = np.exp(rng.normal(c.log_amount[customer], c.amount_sigma[customer])) * factor
    if world.spending_up_from is not None:
        amount = np.where(day >= world.spending_up_from, amount * 1.6, amount)
    hour = rng.normal(c.active_hour[customer], 3.8) % 24.0
    far = np.where(online, 0.12, np.hypot(t.x[terminal] - c.x[customer], t.y[terminal] - c.y[customer]) / SIDE_KM)
    geo_risk = rng.beta(2.0, 14.0, n) + 0.35 * np.minimum(far, 1.0) + np.where(rng.random(n) < 0.04, rng.beta(1.2, 3.0, n), 0.0)
    stripe = rng.random(n) < t.magstripe_share[terminal]
    tapped = rng.random(n) < np.where(amount < 50.0, 0.7, 0.15)
    channel = np.where(online, ONLINE, np.where(stripe, MAGSTRIPE, np.where(tapped, CONTACTLESS, CHIP)))
    return Transactions(
        customer=customer.astype(np.int64), terminal=terminal.astype(np.int64), day=day.astype(np.int64),
        micros=np.minimum((hour * 3600e6).astype(np.int64), DAY_S * 1_000_000 - 1),
        amount=cents(amount), channel=channel.astype(np.int64),
        new_device=rng.random(n) < np.where(online, 0.05, 0.02),
        geo_risk=np.clip(geo_risk, 0.0, 1.0), scenario=np.zeros(n, np.int64),
    )


def cents(amount: Floats) -> Floats:
    """Amounts as they are charged: whole cents within what the issuer allows."""
    return np.round(np.clip(amount, AMOUNT_MIN_EUR, AMOUNT_MAX_EUR), 2)


def _popular(rng: np.random.Generator, among: Ints, terminals: Terminals, count: int) -> Ints:
    weight = np.cumsum(terminals.popularity[among])
    found = np.searchsorted(weight, rng.random(count) * weight[-1], side="right")
    return among[np.minimum(found, len(among) - 1)]
