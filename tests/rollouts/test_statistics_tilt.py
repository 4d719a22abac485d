"""The tilt e-process against exact enumeration, other formulas for the same thing, and simulation with fixed seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hafnium_rollout.statistics import tilt

GOAL = math.log(100.0)
DAY_S = 86_400.0


def _expected(nc: int, pc: float, ns: int, ps: float, value: Callable[[int, int], float]) -> float:
    """Exact expectation over both arms' binomial counts."""
    return math.fsum(
        float(binom.pmf(kc, nc, pc) * binom.pmf(ks, ns, ps)) * value(kc, ks) for kc, ks in product(range(nc + 1), range(ns + 1))
    )


@pytest.mark.parametrize(("nc", "ns"), [(1, 12), (3, 9), (6, 6), (9, 3)], ids=["8 %", "25 %", "half", "75 %"])
@pytest.mark.parametrize("d", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("ps", [0.0, 0.01, 0.2, 0.6, 0.85])
def test_one_look_never_gains_on_average_when_the_candidate_is_no_worse_than_d(nc: int, ns: int, d: float, ps: float) -> None:
    def e_value(kc: int, ks: int) -> float:
        return math.exp(tilt.log_e_fail([tilt.add_fail(tilt.FailState(), kc, nc, ks, ns)], d))

    for pc in (ps + d, max(0.0, ps + d - 0.05)):
        assert _expected(nc, pc, ns, ps, e_value) <= 1.0 + 1e-9


@pytest.mark.parametrize(("nc", "ns"), [(1, 12), (3, 9), (6, 6), (9, 3)], ids=["8 %", "25 %", "half", "75 %"])
@pytest.mark.parametrize("m", [0.005, 0.05, 0.2])
@pytest.mark.parametrize("ps", [0.0, 0.01, 0.2, 0.6])
def test_one_look_never_gains_on_average_when_the_candidate_is_worse_by_the_margin(nc: int, ns: int, m: float, ps: float) -> None:
    def e_value(kc: int, ks: int) -> float:
        return math.exp(tilt.log_e_pass(tilt.add_pass(tilt.PassState(), kc, nc, ks, ns), m))

    for pc in (ps + m, min(1.0, ps + m + 0.1)):
        assert _expected(nc, pc, ns, ps, e_value) <= 1.0 + 1e-9


@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_the_limit_process_never_gains_on_average_below_the_limit(limit: float) -> None:
    def e_value(k: int) -> float:
        state = tilt.add_limit(tilt.LimitState(), k, 10, limit)
        # all the weight that is in play by then: restart 1 has 1/2
        return math.exp(tilt.log_e_limit(state))

    for p in (limit, limit / 2):
        assert math.fsum(float(binom.pmf(k, 10, p)) * e_value(k) for k in range(11)) <= 0.5 + 1e-9


def test_no_money_is_made_by_sharing_it_out() -> None:
    assert math.fsum(math.exp(-price) for price in tilt.FAIL_PRICES) == pytest.approx(1.0)
    for begun in (0, 1, 7, 500):
        begun_share = math.fsum(tilt.restart_share(j) for j in range(1, begun + 1))
        assert tilt.PLAIN_SHARE + begun_share + tilt.waiting_share(begun) == pytest.approx(1.0)


def test_restarts_keep_the_expectation_at_one_over_two_restarts() -> None:
    """Two looks of 700 s, each with a restart before it: all paths enumerated."""
    nc, ns, p = 2, 6, 0.2
    total = 0.0
    for first in product(range(nc + 1), range(ns + 1)):
        chance = float(binom.pmf(first[0], nc, p) * binom.pmf(first[1], ns, p))
        begun = tilt.add_fail(tilt.FailState(), 0, 0, 0, 0)
        a = tilt.add_fail(begun, first[0], nc, first[1], ns, look_s=700.0, restarts=True)

        def e_value(kc: int, ks: int, a: tilt.FailState = a) -> float:
            b = tilt.add_fail(a, kc, nc, ks, ns, look_s=700.0, restarts=True)
            assert b.begun == 1
            return math.exp(tilt.log_e_fail([b], 0.0))

        total += chance * _expected(nc, p, ns, p, e_value)
    assert total <= 1.0 + 1e-9


@given(
    kc=st.integers(0, 30), extra_c=st.integers(0, 200), ks=st.integers(0, 30), extra_s=st.integers(0, 2000),
)
def test_without_tolerance_it_is_the_conditional_binomial_likelihood_ratio(kc: int, extra_c: int, ks: int, extra_s: int) -> None:
    nc, ns = kc + extra_c, ks + extra_s
    if nc == 0 or ns == 0:
        return
    w = nc / (nc + ns)
    state = tilt.add_fail(tilt.FailState(), kc, nc, ks, ns)
    for value, r in zip(state.sums, tilt.FAIL_RATIOS, strict=True):
        share = w * r / (1 - w + w * r)  # candidate's share of bad requests at risk ratio r
        assert value == pytest.approx(kc * math.log(share / w) + ks * math.log((1 - share) / (1 - w)), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(looks=st.lists(
    st.tuples(st.integers(0, 5), st.integers(5, 400), st.integers(0, 40), st.integers(40, 4000)), min_size=1, max_size=12))
def test_bounds_are_the_points_where_the_e_value_is_one_over_alpha(looks: list[tuple[int, int, int, int]]) -> None:
    fail, passing = tilt.FailState(), tilt.PassState()
    for kc, nc, ks, ns in looks:
        fail, passing = tilt.add_fail(fail, kc, nc, ks, ns), tilt.add_pass(passing, kc, nc, ks, ns)
    lower, upper = tilt.lower_bound([fail], 0.01), tilt.upper_bound(passing, 0.01)
    if lower > -1.0:
        assert tilt.log_e_fail([fail], lower) == pytest.approx(GOAL, abs=1e-3)
    if upper < 1.0:
        assert tilt.log_e_pass(passing, upper) == pytest.approx(GOAL, abs=1e-3)


def _proven_by_all_lines(lines: list[tuple[float, float]], goal: float) -> float:
    """Newton's steps as in tilt.py, but over every line at each step."""
    d = min(max(max([(a - goal) / b for a, b in lines], default=-1.0), -1.0), 1.0)
    for _ in range(60):
        values = [a - b * d for a, b in lines]
        top = max(values)
        weights = [math.exp(v - top) for v in values]
        gap = top + math.log(sum(weights)) - goal
        slope = sum([w * b for w, (_, b) in zip(weights, lines, strict=True)]) / sum(weights)
        if gap <= 1e-7 or slope <= 0.0:
            return d if gap <= 1e-7 else 1.0
        if d + gap / slope >= 1.0:
            return 1.0
        d += gap / slope
    return d


@pytest.mark.parametrize("per_look", [20, 3000, 1_000_000], ids=["few", "usual", "many"])
def test_bounds_are_those_of_all_lines_to_the_last_bit(per_look: int) -> None:
    """Lines that are left out, and states whose bound isn't searched, change nothing."""
    rng = np.random.default_rng(per_look)
    for weight, base, worse in product((0.01, 0.25, 0.9), (0.0005, 0.01, 0.3), (-0.2, 0.0, 0.2)):
        fails, passings = [tilt.FailState()] * 2, [tilt.PassState()] * 2
        for _ in range(40):
            nc = int(rng.binomial(per_look, weight))
            ns = per_look - nc
            for i, share in enumerate((base, base * rng.choice([0.5, 1.0, 1.5]))):
                counts = int(rng.binomial(nc, share * (1 + worse))), nc, int(rng.binomial(ns, share)), ns
                fails[i] = tilt.add_fail(fails[i], *counts, phi=1.0 + base, look_s=300.0, restarts=worse > 0)
                passings[i] = tilt.add_pass(passings[i], *counts, phi=1.0 + base)
            for alpha in (0.2, 1e-4):
                for states in (fails[:1], fails):
                    lines = [(a - price, b) for s in states
                             for a, b, price in zip(s.sums, s.loads, tilt.FAIL_PRICES, strict=True) if b > 0.0]
                    if lines:
                        goal = math.log(len(states) / alpha) - (math.log(tilt.PLAIN_SHARE) if worse > 0 else 0.0)
                        assert tilt.lower_bound(states, alpha) == _proven_by_all_lines(lines, goal)
                        uppers = [-_proven_by_all_lines(list(zip(p.sums, p.loads, strict=True)), math.log(len(tilt.PASS_RATIOS) / alpha))
                                  for p in passings]
                        assert [tilt.upper_bound(p, alpha) for p in passings] == uppers
                        assert tilt.upper_bound_of_all(passings, alpha) == tilt.upper_bound_of_all(passings[::-1], alpha) == max(uppers)


def test_evidence_survives_json_bit_by_bit() -> None:
    state = tilt.FailState()
    for i in range(50):
        state = tilt.add_fail(state, i % 3, 100 + i, i % 7, 1900 - i, look_s=300.0, restarts=True)
    data = json.loads(json.dumps({"sums": state.sums, "loads": state.loads, "restarts": state.restarts}))
    assert tuple(data["sums"]) == state.sums
    assert tuple(data["loads"]) == state.loads
    assert tuple(data["restarts"]) == state.restarts


@pytest.mark.parametrize(("kc", "nc", "ks", "ns"), [(3, 2, 0, 5), (-1, 2, 0, 5), (0, 2, 6, 5)])
def test_impossible_counts_are_refused(kc: int, nc: int, ks: int, ns: int) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        tilt.add_fail(tilt.FailState(), kc, nc, ks, ns)
    with pytest.raises(ValueError, match="must lie in"):
        tilt.add_pass(tilt.PassState(), kc, nc, ks, ns)


def test_a_dispersion_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="dispersion"):
        tilt.add_fail(tilt.FailState(), 0, 10, 0, 10, phi=0.5)


def test_a_look_without_one_of_the_arms_says_nothing() -> None:
    state = tilt.add_fail(tilt.FailState(), 1, 10, 1, 100)
    assert tilt.add_fail(state, 0, 0, 5, 500) == state
    assert tilt.add_fail(state, 5, 500, 0, 0) == state


def _fails_at(
    rng: np.random.Generator, base: Callable[[float], float], effect: float, *, onset_s: float = 0.0, restarts: bool = False,
    looks: int = 240, clump: int = 1, phi: float = 1.0,
) -> tuple[int, float] | None:
    """(candidate requests, seconds) until Fail at 100 requests/s, 30 s looks, half of them at 5 % and half at 25 %."""
    state, seen = tilt.FailState(), 0
    for i in range(looks):
        weight = 0.05 if i < looks // 2 else 0.25
        nc = int(rng.binomial(3000 // clump, weight)) * clump
        ns = 3000 - nc
        p = base(i * 30.0)
        kc = int(rng.binomial(nc // clump, p + (effect if i * 30.0 >= onset_s else 0.0))) * clump
        ks = int(rng.binomial(ns // clump, p)) * clump
        state = tilt.add_fail(state, kc, nc, ks, ns, phi=phi, look_s=30.0, restarts=restarts)
        seen += nc
        if tilt.log_e_fail([state], 0.0) >= GOAL:
            return seen, (i + 1) * 30.0
    return None


WORLDS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 0.01,
    "daily wave": lambda t: 0.01 * (1 + 0.6 * math.sin(2 * math.pi * t / 7200.0)),
    "incident": lambda t: 0.10 if 3300 <= t < 3900 else 0.01,
    "base doubles": lambda t: 0.01 if t < 3500 else 0.02,
}


@pytest.mark.parametrize("restarts", [False, True], ids=["plain", "restarts"])
@pytest.mark.parametrize("world", WORLDS)
def test_equal_models_are_seldom_rolled_back_while_the_base_rate_moves(world: str, restarts: bool) -> None:
    rng = np.random.default_rng(11)
    false = sum(_fails_at(rng, WORLDS[world], 0.0, restarts=restarts, looks=120) is not None for _ in range(100))
    assert false <= 4  # nominal 1 of 100; more than 4 has a chance of 0.3 %


def test_the_measured_delay_is_that_of_the_design() -> None:
    rng = np.random.default_rng(5)
    found = sorted((_fails_at(rng, WORLDS["constant"], 0.02) or (10**9, 0.0))[0] for _ in range(120))
    assert 450 <= found[60] <= 760  # 598 in the design's simulation
    assert found[108] <= 1600


def test_restarts_find_late_harm_sooner() -> None:
    rng = np.random.default_rng(6)
    plain = sorted((_fails_at(rng, WORLDS["constant"], 0.01, onset_s=1800.0) or (0, 1e9))[1] for _ in range(40))
    restarted = sorted((_fails_at(rng, WORLDS["constant"], 0.01, onset_s=1800.0, restarts=True) or (0, 1e9))[1] for _ in range(40))
    assert restarted[20] < plain[20]


def test_clumped_failures_break_it_without_dispersion_and_not_with_it() -> None:
    """Every request comes five times with the same outcome, as with retries: φ = 5."""
    rng = np.random.default_rng(7)
    without = sum(_fails_at(rng, WORLDS["constant"], 0.0, clump=5, looks=120) is not None for _ in range(60))
    with_phi = sum(_fails_at(rng, WORLDS["constant"], 0.0, clump=5, looks=120, phi=5.0) is not None for _ in range(60))
    assert without >= 15
    assert with_phi <= 3


def test_pass_takes_what_the_design_says_and_never_passes_a_bad_one() -> None:
    rng = np.random.default_rng(8)

    def passes_after(effect: float, looks: int) -> int | None:
        state, seen = tilt.PassState(), 0
        for _ in range(looks):
            nc = int(rng.binomial(3000, 0.05))
            ns = 3000 - nc
            state = tilt.add_pass(state, int(rng.binomial(nc, 0.01 + effect)), nc, int(rng.binomial(ns, 0.01)), ns)
            seen += nc
            if tilt.log_e_pass(state, 0.005) >= GOAL:
                return seen
        return None

    equal = sorted(passes_after(0.0, 400) or 10**9 for _ in range(60))
    assert 4500 <= equal[30] <= 7800  # 6,072 in the design's simulation
    assert sum(passes_after(0.005, 240) is not None for _ in range(100)) <= 4
    assert sum(passes_after(0.01, 240) is not None for _ in range(60)) == 0


def test_without_errors_pass_needs_about_what_is_foretold() -> None:
    state = tilt.PassState()
    foretold = None
    seen = 0
    while tilt.log_e_pass(state, 0.02) < GOAL:
        state = tilt.add_pass(state, 0, 10, 0, 190)
        seen += 10
        if seen == 50:
            foretold = tilt.missing_for_pass(state, 0.02, 0.01, 0, 50, 0, 950)
    assert foretold is not None
    assert abs((seen - 50) - foretold) <= 0.15 * seen


def test_a_candidate_at_twice_the_margin_is_told_that_it_will_not_pass() -> None:
    state = tilt.add_pass(tilt.PassState(), 40, 1000, 380, 19_000)
    assert tilt.missing_for_pass(state, 0.01, 0.01, 40, 1000, 380, 19_000) is None


def test_the_limit_is_found_soon_although_days_were_good() -> None:
    state = tilt.LimitState()
    for _ in range(3000):
        state = tilt.add_limit(state, 1, 100, 0.05)
    looks = 0
    while tilt.log_e_limit(state) < GOAL:
        state = tilt.add_limit(state, 50, 100, 0.05)
        looks += 1
    assert looks <= 2
