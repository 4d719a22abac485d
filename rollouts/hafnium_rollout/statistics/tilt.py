"""The tilt e-process: is the candidate's share of bad requests larger than the stable one's, whatever that is right now?

Counts come in looks: (bad, total) of each arm since the look before. Per look and per risk ratio r the process multiplies

    Fail:  exp( a·kc − b·ks − nc(eᵃ−1)·d ),     a = ln x,  b = −ln(1 − ρ(x−1)),   x = r(1+ρ)/(1+ρr),  ρ = nc/ns
    Pass:  exp( −a·kc + b·ks + nc(1−e⁻ᵃ)·m ),   a = −ln y, b = ln(1 + ρ(1−y)),    y as in `pass_tilt`

It is exact, for any base rate and any way that the base rate moves between looks: a Bernoulli X has
E e^{aX} = 1 + p(eᵃ−1) ≤ exp(p(eᵃ−1)), and b is chosen so that the stable arm's factor is at most exp(−p_s·nc·(eᵃ−1)), which
cancels p_s. What is left is below 1 in expectation under H0: p_c ≤ p_s + d (Fail) or H0: p_c ≥ p_s + m (Pass). A weighted mean
over ratios keeps that. Ville's inequality then bounds the chance that it ever reaches 1/alpha by alpha, at any number of looks.

The tilt x is not eᵃ = r itself but the value that grows fastest when the true risk ratio is r; for d = 0 the factor is then
exp(kc·ln r − (kc+ks)·ln(1 + w(r−1))) with w = nc/(nc+ns): the conditional binomial likelihood ratio. One formula therefore
serves every weight, and ρ(x−1) < 1 always.

Papers: Ville 1939; Hoeffding 1963 (conditional on totals, a hypergeometric count is dominated by a binomial one); Howard,
Ramdas, McAuliffe, Sekhon 2020 (sub-Bernoulli processes); Ramdas, Grünwald, Vovk, Shafer 2023 (e-processes); Shin, Ramdas,
Rinaldo 2024 (restarts: e-detectors, here as one weighted e-process, so that the error stays below alpha for the whole run).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from operator import add

FAIL_RATIOS = tuple(1.15 * (20.0 / 1.15) ** (i / 13.0) for i in range(14))
"""Risk ratios that Fail looks for: 14, geometric from 1.15 to 20."""
_FAIL_LOGS = tuple(math.log(r) for r in FAIL_RATIOS)
_FAIL_SOUGHT, _FAIL_WIDTH = 1.8, 0.4
_FAIL_SHARES = tuple(1.0 / (1.0 + (math.log(r / _FAIL_SOUGHT) / _FAIL_WIDTH) ** 2) for r in FAIL_RATIOS)
FAIL_PRICES = tuple(math.log(math.fsum(_FAIL_SHARES) / share) for share in _FAIL_SHARES)
"""−ln of each ratio's share of the money. The shares fall off around 1.8 as a Cauchy density of ln r does: ratios of 1.3 to 3 take long to
tell, so a nat is dear there; at a ratio of 20 the 2.4 nats that it pays more are about one bad request."""
PLAIN_SHARE = 0.75
"""Of the money, where there are restarts: the process that began with the run. Restarts share the rest."""
_RESTARTS_SPREAD = 6.0
"""The first so many restarts share half of it; later ones get less and less, since nobody knows how long the rollout takes."""
PASS_RATIOS = tuple(0.2 * 100.0 ** (i / 11.0) for i in range(12))
"""p/m (base rate over margin) that Pass is quick for: 12, geometric from 0.2 to 20."""
RESTART_EVERY_S = 600.0
"""Harm that starts late is found from the next restart on; ten minutes is short against a step and cheap in weight."""
_STEPS_MAX = 60
_ROOT_NEAR = 1e-7
"""Bounds are searched until ln e is this near to the goal; what is left errs to the safe side."""
_SPLITS_MAX = 1024
"""Ratios nc/ns whose factors are kept: gates that count the same requests have the same one, so it is worked out once a look."""
_FAR = 40.0
"""Beyond this distance in ln the smaller of two numbers is below the larger one's last digit."""
_UNSEEN = 100.0
"""The same for a sum of many, in any order: e⁻¹⁰⁰ of the largest lies 27 digits below its last one."""
_NOTHING = -1e6
"""ln of no money at all: finite, because a status is JSON."""


@dataclass(frozen=True, slots=True)
class FailState:
    """Evidence that the candidate is worse. Sums in log space, one per risk ratio; plain numbers, so a status can hold it."""

    sums: tuple[float, ...] = (0.0,) * len(FAIL_RATIOS)
    """Σ (a·kc − b·ks)/φ"""
    loads: tuple[float, ...] = (0.0,) * len(FAIL_RATIOS)
    """Σ nc(eᵃ−1)/φ: what each point of tolerated difference d costs"""
    restarts: tuple[float, ...] = ()
    """Per ratio: ln Σ_j weight_j · (process started at restart j, at the d it is judged by). Empty: run without restarts."""
    begun: int = 0
    """Restarts so far; each began with less than the one before, and all that ever may come add up to a quarter of the money."""
    since_restart_s: float = 0.0
    """Time since the last restart."""


@dataclass(frozen=True, slots=True)
class PassState:
    """Evidence that the candidate is worse by less than a margin."""

    sums: tuple[float, ...] = (0.0,) * len(PASS_RATIOS)
    """Σ (−a·kc + b·ks)/φ"""
    loads: tuple[float, ...] = (0.0,) * len(PASS_RATIOS)
    """Σ nc(1−e⁻ᵃ)/φ: what each point of margin gains"""


def restart_share(number: int) -> float:
    """Share of the money that restart `number` (from 1) begins with. All restarts there may ever be add up to what isn't plain."""
    c = _RESTARTS_SPREAD
    return (1.0 - PLAIN_SHARE) * c / ((number + c - 1.0) * (number + c))


def waiting_share(begun: int) -> float:
    """What restarts that are still to come hold, after `begun` of them: the tail of the sum of `restart_share`."""
    return (1.0 - PLAIN_SHARE) * _RESTARTS_SPREAD / (begun + _RESTARTS_SPREAD)


def add_fail(
    state: FailState, kc: float, nc: float, ks: float, ns: float, *, phi: float = 1.0, harmless: float = 0.0,
    look_s: float = 0.0, restarts: bool = False,
) -> FailState:
    """One look's increments into the Fail process.

    kc of nc candidate requests and ks of ns stable requests were bad. `phi` ≥ 1 is the dispersion at this weight. `harmless` is
    the difference d that restarts are judged by (fixed for a run). A look without both arms says nothing and changes nothing.
    """
    _check(kc, nc, ks, ns, phi)
    if nc <= 0 or ns <= 0:
        return state
    c, s, n = kc / phi, ks / phi, nc / phi
    factors = _fail_factors(nc / ns)
    gains = [c * a - s * b for a, b, _ in factors]
    costs = [n * load for _, _, load in factors]
    running, begun, since = _restarted(state, gains, costs, harmless, look_s) if restarts else (
        state.restarts, state.begun, state.since_restart_s)
    return FailState(tuple(map(add, state.sums, gains)), tuple(map(add, state.loads, costs)), running, begun, since)


@lru_cache(maxsize=_SPLITS_MAX)
def _fail_factors(rho: float) -> tuple[tuple[float, float, float], ...]:
    """Per risk ratio at ρ = nc/ns: (a, b, eᵃ − 1)."""
    out: list[tuple[float, float, float]] = []
    for r in FAIL_RATIOS:
        x = r * (1.0 + rho) / (1.0 + rho * r)
        out.append((math.log(x), math.log((1.0 + rho * r) / (1.0 + rho)), x - 1.0))
    return tuple(out)


def _restarted(
    state: FailState, gains: list[float], costs: list[float], harmless: float, look_s: float,
) -> tuple[tuple[float, ...], int, float]:
    """The last three of FailState. Restarts are due at the start of a look: their weights must not depend on what the look shows."""
    begun, since = state.begun, state.since_restart_s
    fresh = _NOTHING
    if since >= RESTART_EVERY_S:
        begun, since = begun + 1, 0.0
        fresh = math.log(restart_share(begun))
    running = state.restarts or (_NOTHING,) * len(gains)
    if fresh > _NOTHING:
        running = [_log_add(m, fresh) for m in running]
    grown = [m + g - c * harmless for m, g, c in zip(running, gains, costs, strict=True)]
    return _some_money(grown), begun, since + look_s


def pass_tilt(ratio: float, rho: float) -> float:
    """y = e⁻ᵃ that grows fastest when both arms have rate ratio·m: root of p/y = p/(1+ρ(1−y)) + m with p = ratio·m."""
    s = (1.0 + rho) * (1.0 + ratio)
    return 2.0 * ratio * (1.0 + rho) / (s + math.sqrt(s * s - 4.0 * rho * ratio * (1.0 + rho)))


def add_pass(state: PassState, kc: float, nc: float, ks: float, ns: float, *, phi: float = 1.0) -> PassState:
    """One look's increments into the Pass process; arguments as in `add_fail`."""
    _check(kc, nc, ks, ns, phi)
    if nc <= 0 or ns <= 0:
        return state
    c, s, n = kc / phi, ks / phi, nc / phi
    factors = _pass_factors(nc / ns)
    return PassState(
        tuple([old + c * a + s * b for old, (a, b, _) in zip(state.sums, factors, strict=True)]),
        tuple([old + n * load for old, (_, _, load) in zip(state.loads, factors, strict=True)]),
    )


@lru_cache(maxsize=_SPLITS_MAX)
def _pass_factors(rho: float) -> tuple[tuple[float, float, float], ...]:
    """Per ratio p/m at ρ = nc/ns: (−a, b, 1 − e⁻ᵃ)."""
    tilts = [pass_tilt(ratio, rho) for ratio in PASS_RATIOS]
    return tuple((math.log(y), math.log1p(rho * (1.0 - y)), 1.0 - y) for y in tilts)


def _check(kc: float, nc: float, ks: float, ns: float, phi: float) -> None:
    if not (0 <= kc <= nc < math.inf and 0 <= ks <= ns < math.inf):
        raise ValueError(f"bad requests must lie in 0..total, got {kc} of {nc} and {ks} of {ns}")
    if not phi >= 1.0:
        raise ValueError(f"dispersion must be 1 or more, got {phi}")


def log_e_fail(states: Sequence[FailState], harmless: float) -> float:
    """ln of the e-value against p_c ≤ p_s + harmless: mean over states (thresholds) and over ratios by their shares, restarts included."""
    return _log_mean([_log_e_one(s, harmless) for s in states])


def _log_e_one(s: FailState, harmless: float) -> float:
    plain = _log_of_shares([a - b * harmless for a, b in zip(s.sums, s.loads, strict=True)] if harmless else s.sums)
    if not s.restarts:
        return plain
    waiting = math.log(waiting_share(s.begun))  # it stays at 1 until it is bet
    return _log_add(_log_add(plain + math.log(PLAIN_SHARE), _log_of_shares(s.restarts)), waiting)


def _log_of_shares(logs: Sequence[float]) -> float:
    """ln of the mean of exp(logs) over the ratios of Fail, by their shares."""
    return _log_sum([x - price for x, price in zip(logs, FAIL_PRICES, strict=True)])


def log_e_pass(state: PassState, margin: float) -> float:
    """ln of the e-value against p_c ≥ p_s + margin."""
    return _log_mean([a + b * margin for a, b in zip(state.sums, state.loads, strict=True)])


def lower_bound(states: Sequence[FailState], alpha: float) -> float:
    """Largest d in [−1, 1] with p_c > p_s + d proven at alpha, by inverting the plain process. −1: nothing is proven."""
    goal = math.log(len(states) / alpha) - (math.log(PLAIN_SHARE) if any(s.restarts for s in states) else 0.0)
    return _largest_proven([(a - p, b) for s in states for a, b, p in zip(s.sums, s.loads, FAIL_PRICES, strict=True)], goal)


def upper_bound(state: PassState, alpha: float) -> float:
    """Smallest m in [−1, 1] with p_c < p_s + m proven at alpha. 1: nothing is proven."""
    return -_largest_proven(list(zip(state.sums, state.loads, strict=True)), math.log(len(PASS_RATIOS) / alpha))


def upper_bound_of_all(states: Sequence[PassState], alpha: float) -> float:
    """The largest of the states' upper bounds. A state that proves the largest so far has a smaller one, which needn't be searched."""
    largest = upper_bound(states[0], alpha)
    for state in states[1:]:
        if log_e_pass(state, largest) <= math.log(1.0 / alpha) + 2.0 * _ROOT_NEAR:
            largest = max(largest, upper_bound(state, alpha))
    return largest


def _largest_proven(lines: list[tuple[float, float]], goal: float) -> float:
    """Largest d in [−1, 1] where ln Σ exp(a − b·d) ≥ goal over lines (a, b), b ≥ 0; −1 when there is none.

    The function is convex and falls, so Newton's steps from the left never pass the root: the bound errs to the safe side. They
    begin where the best single line alone reaches the goal, which is left of the root and near it. A steeper line that lies far
    below that one there falls further behind at every step, so it is left out.
    """
    d, steep = max([((a - goal) / b, b) for a, b in lines if b > 0.0], default=(-1.0, 0.0))
    lines = [(a, b) for a, b in lines if b <= steep or a - b * d > goal - _UNSEEN]
    d = min(max(d, -1.0), 1.0)
    for _ in range(_STEPS_MAX):
        top = max([a - b * d for a, b in lines])
        total = loaded = 0.0
        for a, b in lines:
            weight = exp(a - b * d - top)
            total += weight
            loaded += weight * b
        gap, slope = top + math.log(total) - goal, loaded / total
        if gap <= _ROOT_NEAR:
            return d
        if slope <= 0.0 or d + gap / slope >= 1.0:
            return 1.0
        d += gap / slope
    return d


def missing_for_pass(state: PassState, margin: float, alpha: float, kc: float, nc: float, ks: float, ns: float,
                     phi: float = 1.0) -> int | None:
    """About how many more candidate requests Pass needs if rates stay as seen (kc of nc, ks of ns). None: it won't come.

    The best tilt's growth per candidate request, taken at the observed rates, against what is still missing to ln(1/alpha).
    """
    if nc <= 0 or ns <= 0:
        return None
    goal = math.log(1.0 / alpha) + math.log(len(PASS_RATIOS))
    bad, stable = kc / nc, ks / nc
    best: float | None = None
    for s, load, (a, b, share) in zip(state.sums, state.loads, _pass_factors(nc / ns), strict=True):
        growth = bad * a + stable * b + share * margin
        if growth > 0:
            short = goal - s - load * margin
            need = short * phi / growth if short > 0.0 else 0.0
            best = need if best is None or need < best else best
    return None if best is None else math.ceil(best)


@dataclass(frozen=True, slots=True)
class LimitState:
    """Evidence that one arm's own share is above a fixed limit: it restarts at every look, so good days don't hide a bad hour."""

    running: tuple[float, ...] = ()
    """Per ratio: ln Σ_j weight_j · (process started at look j)"""
    begun: int = 0
    """Restarts so far."""


def add_limit(state: LimitState, bad: float, total: float, limit: float, *, phi: float = 1.0) -> LimitState:
    """One look into the limit process: exp(a·k − n(eᵃ−1)·limit), H0: p ≤ limit. Restart j has weight 1/(j(j+1))."""
    if not 0 <= bad <= total < math.inf:
        raise ValueError(f"bad requests must lie in 0..total, got {bad} of {total}")
    if total <= 0:
        return state
    begun = state.begun + 1
    fresh = -math.log(begun * (begun + 1.0))
    running = state.running or (_NOTHING,) * len(FAIL_RATIOS)
    bad, total = bad / phi, total / phi * limit
    grown = [
        _log_add(m, fresh) + bad * log_r - total * (r - 1.0) for m, r, log_r in zip(running, FAIL_RATIOS, _FAIL_LOGS, strict=True)
    ]
    return LimitState(_some_money(grown), begun)


def forget_limit(state: LimitState) -> LimitState:
    """Drops what was gathered (both arms were over the limit). Spent weights stay spent, so alpha holds for the whole run."""
    return LimitState((), state.begun)


def log_e_limit(state: LimitState) -> float:
    """ln of the e-value against p ≤ limit. Restarts to come are left out: that is on the safe side."""
    return _log_mean(state.running) if state.running else 0.0


def _some_money(logs: list[float]) -> tuple[float, ...]:
    """None of them below `_NOTHING`."""
    return tuple([_NOTHING if m < _NOTHING else m for m in logs])


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a)) if a - b < _FAR else a


def _log_mean(values: Sequence[float]) -> float:
    """ln of the mean of exp(values), without overflow."""
    return _log_sum(values) - math.log(len(values))


def _log_sum(values: Sequence[float]) -> float:
    """ln of the sum of exp(values), without overflow."""
    top = max(values)
    return top + math.log(sum([exp(v - top) for v in values]))
