"""Betting on paired scores, dispersion and sample ratio, against exact expectation, simulation and known truths."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hafnium_rollout.statistics import betting, dispersion, sample_ratio

GOAL = math.log(100.0)


@pytest.mark.parametrize("mean", [-0.05, 0.0, 0.05])
def test_a_bet_never_gains_on_average_when_the_mean_is_as_said(mean: float) -> None:
    """Two-point distributions with extreme tails, whose mean is exactly the grid point."""
    for low, high in ((-1.0, 1.0), (-0.2, 0.9), (-1.0, 0.06)):
        chance = (mean - low) / (high - low)
        if not 0 <= chance <= 1:
            continue
        above = below = 0.0
        for value, p in ((low, 1 - chance), (high, chance)):
            state = betting.add(betting.begin(0.05, 0.0), [value])
            above += p * math.exp(betting.log_e_above(state, mean))
            below += p * math.exp(betting.log_e_below(state, mean))
        assert above == pytest.approx(1.0)
        assert below == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_money_is_the_plain_product_of_the_bets(differences: list[float]) -> None:
    state = betting.add(betting.begin(0.1, 0.0), differences)
    money = [1.0] * len(betting.STAKES)
    for d in differences:
        for j, stake in enumerate(betting.STAKES):
            money[j] *= 1.0 + stake / 1.1 * (d - 0.1)
    assert betting.log_e_above(state, 0.1) == pytest.approx(math.log(sum(money) / len(money)), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40), st.integers(1, 39))
def test_how_pairs_are_cut_into_looks_makes_no_difference(differences: list[float], cut: int) -> None:
    whole = betting.add(betting.begin(0.02, 0.02), differences)
    parts = betting.add(betting.add(betting.begin(0.02, 0.02), differences[:cut]), differences[cut:])
    assert parts.above == pytest.approx(whole.above, abs=1e-9)
    assert parts.below == pytest.approx(whole.below, abs=1e-9)


def _skewed(rng: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Mostly nothing, sometimes a jump, mean 0.02: the shape that asymptotic rules pass wrongly."""
    return np.where(rng.random(size) < 0.03, 0.9, -0.00722)


def test_skewed_differences_at_the_margin_seldom_pass() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(150):
        state = betting.begin(0.02, 0.0)
        for _ in range(40):
            state = betting.add(state, _skewed(rng, 50).tolist())
            if betting.log_e_below(state, 0.02) >= GOAL:
                wrong += 1
                break
    assert wrong <= 5


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 330, 520), (0.02, 290, 470), (0.05, 110, 190)],
                         ids=["pass at no shift", "fail at .02", "fail at .05"])
def test_pairs_needed_are_those_of_the_design(shift: float, low: int, high: int) -> None:
    rng = np.random.default_rng(4)
    needed: list[int] = []
    for _ in range(25):
        state = betting.begin(0.02, 0.0)
        for n in range(20, 2000, 20):
            state = betting.add(state, np.clip(rng.normal(shift, 0.05, 20), -1, 1).tolist())
            done = min(betting.log_e_below(state, 0.02), betting.log_e_above(state, -0.02)) if shift == 0 else (
                betting.log_e_above(state, 0.0))
            if done >= GOAL:
                needed.append(n)
                break
    assert low <= sorted(needed)[len(needed) // 2] <= high


def test_bounds_enclose_the_mean_and_the_need_is_foretold() -> None:
    rng = np.random.default_rng(9)
    state = betting.add(betting.begin(0.05, 0.05), rng.normal(0.01, 0.03, 60).tolist())
    foretold = betting.missing_for_pass(state, 0.05, 0.01)
    assert foretold is not None
    taken = 0
    while min(betting.log_e_below(state, 0.05), betting.log_e_above(state, -0.05)) < GOAL:
        state = betting.add(state, rng.normal(0.01, 0.03, 5).tolist())
        taken += 5
    assert abs(taken - foretold) <= 60
    assert betting.lower_bound(state, 0.01) <= 0.01 <= betting.upper_bound(state, 0.01)


def test_a_mean_beyond_the_margin_is_told_that_it_will_not_pass() -> None:
    assert betting.missing_for_pass(betting.add(betting.begin(0.02, 0.02), [0.1] * 50), 0.02, 0.01) is None


def test_differences_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        betting.add(betting.begin(0.02, 0.0), [1.5])
    with pytest.raises(ValueError, match="outside"):
        betting.add(betting.begin(0.02, 0.0), [math.nan])
    with pytest.raises(ValueError, match="margin"):
        betting.begin(1.5, 0.0)


@given(weight=st.floats(0.01, 0.99), requests=st.integers(1, 40))
def test_the_split_test_has_expectation_one(weight: float, requests: int) -> None:
    def e_value(c: int) -> float:
        return math.exp(sample_ratio.log_e(sample_ratio.add(sample_ratio.RatioState(), c, requests, weight)))

    total = math.fsum(float(binom.pmf(c, requests, weight)) * e_value(c) for c in range(requests + 1))
    assert total == pytest.approx(1.0, abs=1e-6)


def test_a_true_split_is_never_called_wrong_and_a_false_one_is_found() -> None:
    rng = np.random.default_rng(2)

    def found_after(share: float, looks: int) -> int | None:
        state = sample_ratio.RatioState()
        for i in range(looks):
            state = sample_ratio.add(state, int(rng.binomial(1000, share)), 1000, 0.05)
            if sample_ratio.mismatch(state):
                return (i + 1) * 1000
        return None

    assert sum(found_after(0.05, 300) is not None for _ in range(150)) <= 1
    found = sorted(found_after(0.06, 100) or 10**9 for _ in range(60))
    assert 6_000 <= found[30] <= 16_000  # 11,950 in the design's simulation


def test_counts_of_no_split_are_refused() -> None:
    with pytest.raises(ValueError, match="not counts"):
        sample_ratio.add(sample_ratio.RatioState(), 5, 3, 0.5)


def _history(rng: np.random.Generator, clump: int, looks: int = 2880, rate: float = 0.01) -> list[dispersion.ArmsLook]:
    out: list[dispersion.ArmsLook] = []
    for i in range(looks):
        p = rate * (1 + 0.6 * math.sin(2 * math.pi * i / looks))
        a, b = (int(rng.binomial(1500 // clump, p)) * clump for _ in range(2))
        out.append(dispersion.ArmsLook(a, 1500, b, 1500))
    return out


@pytest.mark.parametrize("clump", [1, 3, 5])
def test_clumps_of_failures_are_measured_and_a_moving_base_rate_is_not(clump: int) -> None:
    measured = dispersion.measure(_history(np.random.default_rng(1), clump), 30.0)
    assert 0.9 * clump <= measured.phi <= 1.6 * clump
    assert measured.weight == pytest.approx(0.5)


def test_slow_noise_of_one_arm_shows_in_the_long_blocks() -> None:
    rng = np.random.default_rng(2)
    looks: list[dispersion.ArmsLook] = []
    for _ in range(144):
        p = 0.01 * math.exp(rng.normal(0, 0.4))
        looks += [dispersion.ArmsLook(int(rng.binomial(1500, p)), 1500, int(rng.binomial(1500, 0.01)), 1500) for _ in range(10)]
    measured = dispersion.measure(looks, 30.0)
    assert measured.phi > 5
    assert measured.blocks < 1440 / 2  # found in blocks of minutes, not in single looks


def test_a_short_or_faultless_history_says_so() -> None:
    with pytest.raises(ValueError, match="too few"):
        dispersion.measure([dispersion.ArmsLook(1, 10, 1, 10)] * 5, 30.0)
    with pytest.raises(ValueError, match="no requests"):
        dispersion.measure([dispersion.ArmsLook(0, 0, 1, 10)] * 50, 30.0)
    with pytest.raises(ValueError, match="longer than nothing"):
        dispersion.measure([], 0.0)


def test_dispersion_of_an_unknown_cause_is_taken_at_its_worst() -> None:
    assert dispersion.at_weight(3.0, 0.5, 0.5) == pytest.approx(1 + 2 * dispersion.NOISE_TAIL)
    assert dispersion.at_weight(3.0, 0.5, 0.05) == pytest.approx(3.0)  # retries make the same φ at every weight
    assert dispersion.at_weight(1.38, 0.05, 0.5) == pytest.approx(1 + 2 * dispersion.NOISE_TAIL)  # noise of an arm grows with what it gets
    assert dispersion.at_weight(1.0, 0.5, 0.25) == 1.0
    assert dispersion.at_weight(3.0, 0.5, 0.0) == 1.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        dispersion.at_weight(3.0, 1.0, 0.5)


def test_dispersion_whose_clumps_are_known_grows_with_the_weight_only_in_the_rest() -> None:
    assert dispersion.at_weight(3.0, 0.5, 0.05, clump=1.0) == pytest.approx(1 + 0.38 * dispersion.NOISE_TAIL)
    assert dispersion.at_weight(3.0, 0.5, 0.05, clump=3.0) == pytest.approx(3.0)
    assert dispersion.at_weight(5.0, 0.5, 0.05, clump=3.0) == pytest.approx(3 + 0.38 * dispersion.NOISE_TAIL)


def _split_history(rng: np.random.Generator, share: float, clump: int, sd: float) -> dispersion.Measured:
    """Two days at 100 requests/s: failures in clumps, and noise of each arm that stays for five minutes."""
    looks: list[dispersion.ArmsLook] = []
    for i in range(2 * 2880):
        if i % 10 == 0:
            pa, pb = (0.01 * math.exp(rng.normal(0, sd)) for _ in range(2))
        na = round(3000 * share)
        a, b = int(rng.binomial(na // clump, pa)) * clump, int(rng.binomial((3000 - na) // clump, pb)) * clump
        looks.append(dispersion.ArmsLook(a, na, b, 3000 - na))
    return dispersion.measure(looks, 30.0)


@pytest.mark.parametrize(("clump", "sd"), [(4, 0.0), (1, 0.2), (4, 0.2)], ids=["retries", "noise", "both"])
def test_two_measurements_tell_clumps_from_noise_of_an_arm(clump: int, sd: float) -> None:
    """What they foretell for 25 % is what is measured there."""
    rng = np.random.default_rng(8)
    large, small = _split_history(rng, 0.5, clump, sd), _split_history(rng, 0.05, clump, sd)
    found = dispersion.clump_of(large, small)
    assert 0.6 * clump <= found <= 1.6 * clump
    there = _split_history(rng, 0.25, clump, sd).phi
    expected = found + (there - found) * dispersion.NOISE_TAIL
    assert dispersion.at_weight(large.phi, large.weight, 0.25, found) == pytest.approx(expected, rel=0.35)


def test_measurements_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="more even"):
        dispersion.clump_of(dispersion.Measured(2, 0.05, 99), dispersion.Measured(2, 0.5, 99))
