"""When the truth arrives: charge-backs come weeks after the event, and what nobody disputes counts as good in the end."""

from __future__ import annotations

import numpy as np

from hafnium_training.simulation.population import Ints
from hafnium_training.simulation.transactions import DAY_S, Transactions

CHARGEBACK_DAYS_MEDIAN, CHARGEBACK_SIGMA = 21.0, 0.6
CHARGEBACK_DAYS = (1.0, 120.0)
"""Nobody disputes on the day itself, and after 120 days nobody may."""
GOOD_AFTER_DAYS = 25.0

DAY_US = DAY_S * 1_000_000


def label_delays(rng: np.random.Generator, tx: Transactions) -> Ints:
    """Microseconds from each event to its label."""
    delay = np.exp(rng.normal(np.log(CHARGEBACK_DAYS_MEDIAN), CHARGEBACK_SIGMA, len(tx)))
    days = np.where(tx.scenario > 0, np.clip(delay, *CHARGEBACK_DAYS), GOOD_AFTER_DAYS)
    return np.round(days * DAY_S).astype(np.int64) * 1_000_000
