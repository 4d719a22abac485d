"""Three kinds of fraud, in the spirit of the Fraud Detection Handbook (own design from its description).

1. Conspicuous amounts: stolen card data is used once or twice, high, often from a new device and an odd place.
2. Compromised terminals: for three to eight weeks, a share of what happens at a terminal is done with copied cards. Amounts
   look almost normal; only the terminal's history gives it away, and that history arrives with the charge-backs.
3. Compromised customers: for some days part of a customer's transactions, and more that come on top, are the thief's.
   Refused authentications come with it. New customers fall for it more often.

Honest customers have large amounts, fast days, new devices and forgotten PINs too, so that no rule separates them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hafnium_training.simulation.population import CATEGORIES, Floats, Ints
from hafnium_training.simulation.transactions import (
    MAGSTRIPE,
    ONLINE,
    Bools,
    Transactions,
    World,
    cents,
    draw_details,
)

CONSPICUOUS, TERMINAL, CUSTOMER = 1, 2, 3
NAMES = {CONSPICUOUS: "conspicuous_amounts", TERMINAL: "compromised_terminals", CUSTOMER: "compromised_customers"}

_CONSPICUOUS_SHARE = 0.0024
_CATEGORY_WEIGHTS = dict(zip(CATEGORIES, (0.4, 0.5, 0.3, 1.6, 2.4, 1.0, 1.4, 1.4), strict=True))
_TERMINALS_COMPROMISED_SHARE = 0.012
"""Of the terminals, at any moment."""
_TERMINAL_DAYS = (21, 56)
_TERMINAL_FRAUD_SHARE = 0.33
_CUSTOMERS_COMPROMISED_SHARE = 0.0025
_CUSTOMER_DAYS = (4, 14)
_CUSTOMER_FRAUD_SHARE = 0.33
_CUSTOMER_EXTRA_FACTOR = 1.3
"""Transactions that the thief adds, in days of an average customer: so the share of fraud is the same in any population."""
_FAILED_AUTH_RATE = 0.05
_FAILED_AUTH_FORGETFUL = 0.006
_FAILED_AUTH_THIEF_RATE = 1.6


@dataclass(frozen=True)
class Attack:
    """One terminal or customer in wrong hands, from the first to the last day (both included)."""

    who: Ints
    first: Ints
    last: Ints

    def matrix(self, entities: int, days: int) -> Bools:
        """[entities, days]: True while under attack."""
        change = np.zeros((entities, days + 1), np.int64)
        np.add.at(change, (self.who, np.clip(self.first, 0, days)), 1)
        np.add.at(change, (self.who, np.clip(self.last + 1, 0, days)), -1)
        return np.cumsum(change[:, :days], axis=1) > 0


def plan_attacks(rng: np.random.Generator, weight: Floats, share: float, length: tuple[int, int], days: int) -> Attack:
    """Attacks such that about `share` of the entities is under one at any moment; `weight` says who is likelier."""
    mean = (length[0] + length[1]) / 2
    # Those that began before the first day count as well, else the first weeks would be too quiet.
    count = int(rng.poisson(share * len(weight) * (days + mean) / mean))
    who = rng.choice(len(weight), count, p=weight / weight.sum())
    first = rng.integers(-int(mean), days, count)
    return Attack(who.astype(np.int64), first, first + rng.integers(length[0], length[1] + 1, count) - 1)


def conspicuous_amounts(rng: np.random.Generator, world: World, tx: Transactions) -> Transactions:
    """Turns some transactions into single large ones."""
    weight = np.array([_CATEGORY_WEIGHTS[c] for c in CATEGORIES])[world.terminals.category[tx.terminal]]
    weight *= np.where(tx.channel == ONLINE, 1.7, 0.8)
    # A new customer's card is tried more: there is little history to tell the thief by.
    tenure = np.maximum(tx.day - world.customers.onboarded_day[tx.customer], 0)
    weight *= 0.5 + 1.5 * np.exp(-tenure / 300.0)
    hit = (rng.random(len(tx)) < _CONSPICUOUS_SHARE * weight) & (tx.scenario == 0)
    n = len(tx)
    high = np.maximum(tx.amount * np.exp(rng.normal(1.3, 0.6, n)), np.exp(rng.normal(np.log(140.0), 0.5, n)))
    night = hit & (rng.random(n) < 0.35)
    return replace(
        tx,
        amount=np.where(hit, cents(high), tx.amount),
        new_device=tx.new_device | (hit & (rng.random(n) < 0.35)),
        geo_risk=np.where(hit, np.minimum(tx.geo_risk + rng.beta(1.6, 2.4, n), 1.0), tx.geo_risk),
        micros=np.where(night, tx.micros // 4, tx.micros),
        scenario=np.where(hit, CONSPICUOUS, tx.scenario),
    )


def compromised_terminals(rng: np.random.Generator, world: World, tx: Transactions) -> Transactions:
    """Turns a share of the transactions at compromised terminals into fraud."""
    t = world.terminals
    attacks = plan_attacks(rng, t.weakness, _TERMINALS_COMPROMISED_SHARE, _TERMINAL_DAYS, world.days)
    under = attacks.matrix(len(t.ids), world.days)[tx.terminal, tx.day]
    n = len(tx)
    hit = under & (rng.random(n) < _TERMINAL_FRAUD_SHARE) & (tx.scenario == 0)
    copied = hit & (tx.channel != ONLINE) & (rng.random(n) < 0.4)
    return replace(
        tx,
        amount=np.where(hit, cents(tx.amount * rng.uniform(1.0, 2.2, n)), tx.amount),
        channel=np.where(copied, MAGSTRIPE, tx.channel),
        geo_risk=np.where(hit, np.minimum(tx.geo_risk + 0.2 * rng.random(n), 1.0), tx.geo_risk),
        scenario=np.where(hit, TERMINAL, tx.scenario),
    )


def compromised_customers(rng: np.random.Generator, world: World, tx: Transactions) -> tuple[Transactions, Bools]:
    """Turns a share of compromised customers' transactions into fraud and adds more. Also returns who was, by day."""
    c = world.customers
    tenure = np.maximum(world.days / 2 - c.onboarded_day, 0.0)
    weight = (0.12 + 2.0 * np.exp(-tenure / 350.0)) * (c.rate + 0.2) ** 0.75
    attacks = plan_attacks(rng, weight, _CUSTOMERS_COMPROMISED_SHARE, _CUSTOMER_DAYS, world.days)
    under = attacks.matrix(len(c.ids), world.days) & (np.arange(world.days)[None, :] >= c.onboarded_day[:, None])
    hit = under[tx.customer, tx.day] & (rng.random(len(tx)) < _CUSTOMER_FRAUD_SHARE) & (tx.scenario == 0)
    extra = rng.poisson(_CUSTOMER_EXTRA_FACTOR * c.rate.mean() * under)
    customer, day = np.divmod(np.repeat(np.arange(extra.size), extra.ravel()), world.days)
    added = draw_details(rng, world, customer, day)
    added = replace(added, micros=rng.integers(0, 86_400_000_000, len(added)))
    both = tx.followed_by(added)
    stolen = np.concatenate([hit, np.ones(len(added), np.bool_)])
    n = len(both)
    return replace(
        both,
        amount=np.where(stolen, cents(both.amount * rng.uniform(1.5, 5.0, n)), both.amount),
        new_device=both.new_device | (stolen & (rng.random(n) < 0.3)),
        geo_risk=np.where(stolen, np.minimum(both.geo_risk + rng.beta(1.2, 3.0, n), 1.0), both.geo_risk),
        scenario=np.where(stolen, CUSTOMER, both.scenario),
    ), under


def failed_authentications(rng: np.random.Generator, world: World, under_attack: Bools) -> Ints:
    """[customers, days]: refused authentications. Forgetful customers have several on one day, thieves try for days."""
    forgetful = rng.random(under_attack.shape) < _FAILED_AUTH_FORGETFUL
    rate = _FAILED_AUTH_RATE + 2.0 * forgetful + _FAILED_AUTH_THIEF_RATE * under_attack
    rate *= np.arange(world.days)[None, :] >= world.customers.onboarded_day[:, None]
    return rng.poisson(rate).astype(np.int64)
