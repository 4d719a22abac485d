"""The tilt e-process: is the candidate's share of bad requests larger than the stable one's, whatever that is right now?

Counts come in looks: (bad, total) of each arm since the look before. Per look and per risk ratio r the process multiplies

    Fail:  exp( a·kc − b·ks − nc(eᵃ−1)·d ),     a = ln x,  b = −ln(1 − ρ(x−1)),   x = r(1+ρ)/(1+ρr),  ρ = nc/ns
    Pass:  exp( −a·kc + b·ks + nc(1−e⁻ᵃ)·m ),   a = −ln y, b = ln(1 + ρ(1−y)),    y as in `pass_tilt`

It is exact, for any base rate and any way that the base rate moves between looks: a Bernoulli X has
E e^{aX} = 1 + p(eᵃ−1) ≤ exp(p(eᵃ−1)), and b is chosen so that the stable arm's factor is at most exp(−p_s·nc·(eᵃ−1)), which
cancels p_s. What is left is below 1 in expectation under H0: p_c ≤ p_s + d (Fail) or H0: p_c ≥ p_s + m (Pass). A mean over
ratios keeps that. Ville's inequality then bounds the chance that it ever reaches 1/alpha by alpha, at any number of looks.

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
from dataclasses import dataclass, replace

FAIL_RATIOS = tuple(1.15 * (20.0 / 1.15) ** (i / 13.0) for i in range(14))
"""Risk ratios that Fail looks for: 14, geometric from 1.15 to 20."""
PASS_RATIOS = tuple(0.2 * 100.0 ** (i / 11.0) for i in range(12))
"""p/m (base rate over margin) that Pass is quick for: 12, geometric from 0.2 to 20."""
RESTART_EVERY_S = 600.0
"""Harm that starts late is found from the next restart on; ten minutes is short against a step and cheap in weight."""
_STEPS_MAX = 60
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
    """Restarts so far; restart j has weight ½/(j(j+1)), which sums to ½ without knowing how long the rollout takes."""
    since_restart_s: float = 0.0
    """Time since the last restart."""


@dataclass(frozen=True, slots=True)
class PassState:
    """Evidence that the candidate is worse by less than a margin."""

    sums: tuple[float, ...] = (0.0,) * len(PASS_RATIOS)
    """Σ (−a·kc + b·ks)/φ"""
    loads: tuple[float, ...] = (0.0,) * len(PASS_RATIOS)
    """Σ nc(1−e⁻ᵃ)/φ: what each point of margin gains"""


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
    rho = nc / ns
    gains: list[float] = []
    costs: list[float] = []
    for r in FAIL_RATIOS:
        x = r * (1.0 + rho) / (1.0 + rho * r)
        gains.append((kc * math.log(x) - ks * math.log((1.0 + rho * r) / (1.0 + rho))) / phi)
        costs.append(nc * (x - 1.0) / phi)
    state = replace(
        state,
        sums=tuple(s + g for s, g in zip(state.sums, gains, strict=True)),
        loads=tuple(s + c for s, c in zip(state.loads, costs, strict=True)),
    )
    return _restart(state, gains, costs, harmless, look_s) if restarts else state


def _restart(state: FailState, gains: list[float], costs: list[float], harmless: float, look_s: float) -> FailState:
    """Restarts are due at the start of a look: their weights must not depend on what the look shows."""
    begun, since = state.begun, state.since_restart_s
    fresh = _NOTHING
    if since >= RESTART_EVERY_S:
        begun, since = begun + 1, 0.0
        fresh = math.log(0.5 / (begun * (begun + 1)))
    running = state.restarts or (_NOTHING,) * len(gains)
    grown = tuple(
        max(_log_add(m, fresh) + g - c * harmless, _NOTHING) for m, g, c in zip(running, gains, costs, strict=True)
    )
    return replace(state, restarts=grown, begun=begun, since_restart_s=since + look_s)


def pass_tilt(ratio: float, rho: float) -> float:
    """y = e⁻ᵃ that grows fastest when both arms have rate ratio·m: root of p/y = p/(1+ρ(1−y)) + m with p = ratio·m."""
    s = (1.0 + rho) * (1.0 + ratio)
    return 2.0 * ratio * (1.0 + rho) / (s + math.sqrt(s * s - 4.0 * rho * ratio * (1.0 + rho)))


def add_pass(state: PassState, kc: float, nc: float, ks: float, ns: float, *, phi: float = 1.0) -> PassState:
    """One look's increments into the Pass process; arguments as in `add_fail`."""
    _check(kc, nc, ks, ns, phi)
    if nc <= 0 or ns <= 0:
        return state
    rho = nc / ns
    sums: list[float] = []
    loads: list[float] = []
    for s, load, ratio in zip(state.sums, state.loads, PASS_RATIOS, strict=True):
        y = pass_tilt(ratio, rho)
        sums.append(s + (kc * math.log(y) + ks * math.log1p(rho * (1.0 - y))) / phi)
        loads.append(load + nc * (1.0 - y) / phi)
    return PassState(tuple(sums), tuple(loads))


def _check(kc: float, nc: float, ks: float, ns: float, phi: float) -> None:
    if not (0 <= kc <= nc < math.inf and 0 <= ks <= ns < math.inf):
        raise ValueError(f"bad requests must lie in 0..total, got {kc} of {nc} and {ks} of {ns}")
    if not phi >= 1.0:
        raise ValueError(f"dispersion must be 1 or more, got {phi}")


def log_e_fail(states: Sequence[FailState], harmless: float) -> float:
    """ln of the e-value against p_c ≤ p_s + harmless: mean over states (thresholds) and ratios, restarts included."""
    return _log_mean([_log_e_one(s, harmless) for s in states])


def _log_e_one(s: FailState, harmless: float) -> float:
    plain = _log_mean([a - b * harmless for a, b in zip(s.sums, s.loads, strict=True)])
    if not s.restarts:
        return plain
    waiting = math.log(0.5 / (s.begun + 1))  # restarts that are still to come hold their weight at 1
    restarted = _log_mean(s.restarts)
    return _log_add(_log_add(plain + math.log(0.5), restarted), waiting)


def log_e_pass(state: PassState, margin: float) -> float:
    """ln of the e-value against p_c ≥ p_s + margin."""
    return _log_mean([a + b * margin for a, b in zip(state.sums, state.loads, strict=True)])


def lower_bound(states: Sequence[FailState], alpha: float) -> float:
    """Largest d in [−1, 1] with p_c > p_s + d proven at alpha, by inverting the plain process. −1: nothing is proven."""
    # With restarts the plain process holds half of the weight.
    goal = math.log(1.0 / alpha) + (math.log(2.0) if any(s.restarts for s in states) else 0.0)
    lines = [(a, b) for s in states for a, b in zip(s.sums, s.loads, strict=True)]
    return _largest_proven(lines, goal)


def upper_bound(state: PassState, alpha: float) -> float:
    """Smallest m in [−1, 1] with p_c < p_s + m proven at alpha. 1: nothing is proven."""
    return -_largest_proven(list(zip(state.sums, state.loads, strict=True)), math.log(1.0 / alpha))


def _largest_proven(lines: Sequence[tuple[float, float]], goal: float) -> float:
    """Largest d in [−1, 1] where ln mean exp(a − b·d) ≥ goal over lines (a, b), b ≥ 0; −1 when there is none.

    The function is convex and falls, so Newton's steps from the left never pass the root: the bound errs to the safe side.
    """
    d = -1.0
    for _ in range(_STEPS_MAX):
        values = [a - b * d for a, b in lines]
        top = max(values)
        weights = [math.exp(v - top) for v in values]
        total = sum(weights)
        gap = top + math.log(total / len(lines)) - goal
        slope = sum(w * b for w, (_, b) in zip(weights, lines, strict=True)) / total
        if gap <= 1e-9:
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
    goal, rho = math.log(1.0 / alpha), nc / ns
    needs: list[float] = []
    for s, load, ratio in zip(state.sums, state.loads, PASS_RATIOS, strict=True):
        y = pass_tilt(ratio, rho)
        growth = kc / nc * math.log(y) + ks / nc * math.log1p(rho * (1.0 - y)) + (1.0 - y) * margin
        if growth > 0:
            gap = goal + math.log(len(PASS_RATIOS)) - (s + load * margin)
            needs.append(max(gap, 0.0) * phi / growth)
    return math.ceil(min(needs)) if needs else None


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
    grown = tuple(
        _log_add(m, fresh) + (bad * math.log(r) - total * (r - 1.0) * limit) / phi
        for m, r in zip(running, FAIL_RATIOS, strict=True)
    )
    return LimitState(tuple(max(g, _NOTHING) for g in grown), begun)


def forget_limit(state: LimitState) -> LimitState:
    """Drops what was gathered (both arms were over the limit). Spent weights stay spent, so alpha holds for the whole run."""
    return LimitState((), state.begun)


def log_e_limit(state: LimitState) -> float:
    """ln of the e-value against p ≤ limit. Restarts to come are left out: that is on the safe side."""
    return _log_mean(state.running) if state.running else 0.0


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a + math.log1p(math.exp(b - a))


def _log_mean(values: Sequence[float]) -> float:
    """ln of the mean of exp(values), without overflow."""
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values) / len(values))
