"""How long until a verdict, before anything moves: hitting times of the tilt e-process.

For one tilt the log e-value moves per candidate request with mean μ and variance σ²; the time at which such a walk first
reaches a level L is about inverse Gaussian with mean L/μ and shape L²/σ² (Schrödinger 1915; Wald 1947). The best tilt decides.
The level is ln(1/alpha) plus the price of betting on a whole grid. That is less than −ln of the tilt's share, since neighbouring tilts
help each other, the more so the more even the split is: by ln 1.4/(1 − w) for Fail at the candidate's share w; for Pass ln 5 of ln 12 is
left (calibrated against simulation: within 20 % up to a risk ratio of 3 and 27 % above, at base rates of .05 to 3 % and shares of 5 to
50 %, tests/rollouts/test_plan.py and `make bench-rollouts`). Restarts hold a quarter of the money, which is ln 4/3 more.
"""

from __future__ import annotations

import math

from hafnium_rollout.statistics import tilt

PRICE_PASS = math.log(5.0)


_HELP_FAIL = 1.4


def _level_fail(price: float, alpha: float, weight: float, restarts: bool) -> float:
    help_of_others = math.log(_HELP_FAIL / (1.0 - weight))
    return math.log(1.0 / alpha) + max(price - help_of_others, 0.0) - (math.log(tilt.PLAIN_SHARE) if restarts else 0.0)


def requests_to_fail(
    candidate: float, stable: float, weight: float, alpha: float, *, harmless: float = 0.0, phi: float = 1.0, quantile: float = 0.5,
    restarts: bool = False,
) -> float | None:
    """Candidate requests until Fail, at true shares of bad requests `candidate` and `stable`. None: it doesn't come."""
    times = [
        _quantile(_level_fail(price, alpha, weight, restarts) * phi, mu, var * phi, quantile)
        for price, (mu, var) in _fail_steps(candidate, stable, weight, harmless) if mu > 0
    ]
    return min(times, default=None)


def requests_to_pass(
    candidate: float, stable: float, weight: float, alpha: float, margin: float, *, phi: float = 1.0, quantile: float = 0.5,
) -> float | None:
    """Candidate requests until Pass at the margin. None: it doesn't come."""
    level = math.log(1.0 / alpha) + PRICE_PASS
    times = [
        _quantile(level * phi, mu, var * phi, quantile)
        for mu, var in (_pass_step(r, candidate, stable, weight, margin) for r in tilt.PASS_RATIOS) if mu > 0
    ]
    return min(times, default=None)


def chance_of_fail(
    candidate: float, stable: float, weight: float, alpha: float, requests: float, *, harmless: float = 0.0, phi: float = 1.0,
    restarts: bool = False,
) -> float:
    """About the chance that Fail has come within so many candidate requests."""
    return max((
        _reached(_level_fail(price, alpha, weight, restarts) * phi, mu, var * phi, requests)
        for price, (mu, var) in _fail_steps(candidate, stable, weight, harmless) if mu > 0
    ), default=0.0)


def _fail_steps(candidate: float, stable: float, weight: float, harmless: float) -> list[tuple[float, tuple[float, float]]]:
    """Per tilt: its price, and (μ, σ²) per candidate request."""
    return [
        (price, _fail_step(r, candidate, stable, weight, harmless)) for r, price in zip(tilt.FAIL_RATIOS, tilt.FAIL_PRICES, strict=True)
    ]


def _fail_step(ratio: float, candidate: float, stable: float, weight: float, harmless: float) -> tuple[float, float]:
    """(μ, σ²) of one tilt per candidate request."""
    rho = weight / (1.0 - weight)
    x = ratio * (1.0 + rho) / (1.0 + rho * ratio)
    a, b = math.log(x), math.log((1.0 + rho * ratio) / (1.0 + rho))
    return a * candidate - b * stable / rho - (x - 1.0) * harmless, a * a * candidate + b * b * stable / rho


def _pass_step(ratio: float, candidate: float, stable: float, weight: float, margin: float) -> tuple[float, float]:
    rho = weight / (1.0 - weight)
    y = tilt.pass_tilt(ratio, rho)
    a, b = math.log(y), math.log1p(rho * (1.0 - y))
    return a * candidate + b * stable / rho + (1.0 - y) * margin, a * a * candidate + b * b * stable / rho


def _reached(level: float, mu: float, variance: float, time: float) -> float:
    """Chance that a walk with drift mu > 0 has reached the level by `time`."""
    if time <= 0:
        return 0.0
    if variance <= 0:
        return 1.0 if mu * time >= level else 0.0
    sd = math.sqrt(variance * time)
    tail = 2.0 * mu * level / variance
    second = math.exp(tail + _log_normal((-level - mu * time) / sd))
    return min(1.0, math.exp(_log_normal((mu * time - level) / sd)) + second)


def _log_normal(z: float) -> float:
    """ln Φ(z), also far out in the tail, where Φ itself would be 0."""
    if z > -30.0:
        return math.log(max(math.erfc(-z / math.sqrt(2.0)) / 2.0, 1e-300))
    return -z * z / 2.0 - math.log(-z) - 0.5 * math.log(2.0 * math.pi)


def _quantile(level: float, mu: float, variance: float, quantile: float) -> float:
    high = level / mu
    while _reached(level, mu, variance, high) < quantile:
        high *= 2.0
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if _reached(level, mu, variance, middle) < quantile else (low, middle)
    return high
