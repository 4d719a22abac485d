"""PSI: the value, its error rates by simulation, and the kinds of drift that plain PSI misses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from scipy.optimize import brentq

from hafnium_contract.model_contract import Feature
from hafnium_monitoring.bh import benjamini_hochberg, level
from hafnium_monitoring.psi import (
    DECILES,
    EXPECTED_MIN,
    SCORE_QUANTILES,
    feature_binning,
    merge_bins,
    psi_test,
    psi_value,
    quantile_binning,
)

Floats = npt.NDArray[np.float64]
NAN = float("nan")


def divergence(p: Floats, q: Floats) -> float:
    return float(stats.entropy(p, q) + stats.entropy(q, p))


def moved(q: Floats, psi: float, shape: str) -> Floats:
    """Shares at exactly this PSI from q: a slope over all bins, or one bin that grows."""
    def shares(size: float) -> Floats:
        p = q * np.exp(size * np.linspace(-1, 1, len(q))) if shape == "slope" else q * (1 - size) + size * np.eye(len(q))[-1]
        return p / p.sum()
    return shares(float(brentq(lambda s: divergence(shares(s), q) - psi, 0.0, 3.0 if shape == "slope" else 0.9)))


def detections(p: Floats, q: Floats, n: int, m: int, level: float, runs: int, seed: int = 3) -> float:
    rng = np.random.default_rng(seed)
    a, b = rng.multinomial(n, p, runs), rng.multinomial(m, q, runs)
    tests = [psi_test(x, y, ordered=True) for x, y in zip(a, b, strict=True)]
    return sum(t.p_value <= level and t.reaches(0.1) for t in tests) / runs


def significant(p: Floats, q: Floats, n: int, m: int, level: float, runs: int, seed: int = 4) -> float:
    rng = np.random.default_rng(seed)
    a, b = rng.multinomial(n, p, runs), rng.multinomial(m, q, runs)
    return sum(psi_test(x, y, ordered=True).p_value <= level for x, y in zip(a, b, strict=True)) / runs


EVEN = np.full(11, 1 / 11)
SKEWED = np.array([0.9, 0.05, 0.02, 0.01, 0.01, 0.004, 0.003, 0.001, 0.001, 0.001])


def test_psi_is_the_symmetric_divergence_of_large_samples() -> None:
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.3, 0.3])
    counts = [np.round(x * 10**9).astype(np.int64) for x in (p, q)]
    assert psi_value(*counts) == pytest.approx(divergence(p, q), rel=1e-6)
    assert psi_value(counts[0], counts[1]) == pytest.approx(psi_value(counts[1], counts[0]))


@pytest.mark.parametrize("shape", ["slope", "spike"])
@pytest.mark.parametrize(("n", "m"), [(500, 2_000), (1_000, 5_000), (500, 9_500), (10_000, 5_000)])
def test_p_values_are_calibrated_at_the_edge_of_harmless_movement(shape: str, n: int, m: int) -> None:
    share = significant(moved(EVEN, 0.02, shape), EVEN, n, m, 0.05, 2_000)
    assert 0.03 < share < 0.07


@pytest.mark.parametrize("q", [EVEN, SKEWED], ids=["even bins", "skewed bins"])
@pytest.mark.parametrize("n", [200, 500, 1_000, 10_000, 100_000])
def test_two_samples_of_one_population_differ_far_less_often_than_the_level_says(q: Floats, n: int) -> None:
    assert significant(q, q, n, n, 0.01, 1_000) <= (0.006 if n < 1_000 else 0.0)


@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
def test_a_harmless_movement_of_a_hundredth_is_not_drift(n: int) -> None:
    assert significant(moved(EVEN, 0.01, "slope"), EVEN, n, 5_000, 0.01, 1_000) <= 0.003


@pytest.mark.parametrize(("n", "level", "least"), [
    (1_000, 1e-3, 0.9), (1_000, 1e-5, 0.6), (10_000, 1e-5, 0.93), (100_000, 1e-5, 0.93),
])
def test_psi_of_a_tenth_is_found(n: int, level: float, least: float) -> None:
    assert detections(moved(EVEN, 0.1, "slope"), EVEN, n, max(5_000, n), level, 1_000) >= least


def test_a_movement_that_is_surely_below_the_threshold_is_not_large() -> None:
    assert detections(moved(EVEN, 0.05, "slope"), EVEN, 50_000, 50_000, 1e-3, 300) == 0.0
    assert significant(moved(EVEN, 0.05, "slope"), EVEN, 50_000, 50_000, 1e-3, 300) == 1.0


def test_heavy_tailed_amounts_move_visibly_where_equal_width_bins_see_nothing() -> None:
    rng = np.random.default_rng(0)
    base, shifted = rng.lognormal(3.0, 1.5, 5_000), rng.lognormal(3.6, 1.5, 5_000)
    shifted[0] = 1e7
    bins = quantile_binning(base)
    ours = psi_test(bins.counts(shifted), bins.counts(base), ordered=True)
    edges = np.histogram_bin_edges(np.concatenate([base, shifted]), bins=14)
    wide = psi_value(np.histogram(shifted, edges)[0], np.histogram(base, edges)[0])
    assert ours.psi > 0.1
    assert ours.p_value < 1e-6
    assert wide < 0.02


def test_a_feed_stuck_just_beside_an_atom_is_seen() -> None:
    base = np.concatenate([np.zeros(4_000), np.random.default_rng(0).uniform(1, 9, 1_000)])
    bins = quantile_binning(base)
    stuck = np.full(1_000, -0.001)
    assert psi_test(bins.counts(stuck), bins.counts(base), ordered=True).psi > 1.0
    assert psi_test(bins.counts(base), bins.counts(base), ordered=True).psi == pytest.approx(0.0, abs=1e-12)


def test_missing_is_a_bin_of_its_own() -> None:
    rng = np.random.default_rng(0)
    base, current = rng.normal(size=5_000), rng.normal(size=2_000)
    current[:600] = NAN
    bins = quantile_binning(base)
    assert bins.counts(current)[-1] == 600
    assert psi_test(bins.counts(current), bins.counts(base), ordered=True).p_value < 1e-9


def test_categories_are_counted_by_code_with_unknown_apart() -> None:
    f = Feature(name="channel", description="d", dtype="category", categories=("a", "b", "c"))
    bins = feature_binning(f, np.zeros(1))
    counts = bins.counts(np.array([0, 0, 1, 2, -1, 7, NAN], np.float32))
    assert counts.tolist() == [2, 2, 1, 1, 1]  # unknown (with a code that no category has), a, b, c, missing
    assert not bins.ordered


def test_infinite_values_fall_into_the_outer_bins() -> None:
    bins = quantile_binning(np.arange(100.0))
    counts = bins.counts(np.array([np.inf, -np.inf]))
    assert counts[0] == counts[-2] == 1


@pytest.mark.parametrize("ordered", [True, False])
def test_merging_keeps_every_row_and_leaves_no_thin_bin(ordered: bool) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        a = rng.multinomial(int(rng.integers(1, 2_000)), rng.dirichlet(np.full(12, 0.2)))
        b = rng.multinomial(int(rng.integers(1, 2_000)), rng.dirichlet(np.full(12, 0.2)))
        x, y = merge_bins(a, b, ordered=ordered)
        assert (x.sum(), y.sum()) == (a.sum(), b.sum())
        expected = (x + y) * min(x.sum(), y.sum()) / (x.sum() + y.sum())
        assert len(x) == 1 or expected.min() >= EXPECTED_MIN


@pytest.mark.parametrize("current", [np.zeros(0), np.full(50, NAN), np.full(50, 3.0)], ids=["empty", "all missing", "constant"])
def test_odd_columns_give_numbers_and_no_error(current: Floats) -> None:
    for base in (np.zeros(0), np.full(2_000, NAN), np.full(2_000, 3.0), np.arange(2_000.0)):
        bins = quantile_binning(base, SCORE_QUANTILES)
        test = psi_test(bins.counts(current), bins.counts(base), ordered=True)
        assert np.isfinite([test.psi, test.p_value]).all()
        assert 0.0 <= test.p_value <= 1.0


def test_deciles_of_float32_values_hold_a_tenth_each() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=10_000).astype(np.float32)
    counts = quantile_binning(values, DECILES).counts(values)[:-1]
    assert np.abs(counts - 1_000).max() <= 1


def test_the_p_value_is_the_upper_tail_of_the_noncentral_chi_square() -> None:
    rng = np.random.default_rng(6)
    for n, m in ((700, 3_000), (50_000, 9_000)):
        a, b = rng.multinomial(n, moved(EVEN, 0.03, "spike")), rng.multinomial(m, EVEN)
        test = psi_test(a, b, ordered=True)
        effective = n * m / (n + m)
        assert test.effective == pytest.approx(effective)
        assert test.p_value == pytest.approx(stats.ncx2.sf(effective * psi_value(a, b), 10, 0.02 * effective), abs=1e-12)


@pytest.mark.parametrize("psi", [0.0, 0.01, 0.02], ids=["nothing moves", "all move by 0.01", "all at the edge of harmless"])
def test_a_rollout_of_many_looks_at_many_features_rarely_alarms(psi: float) -> None:
    looks, features, rollouts = 24, 30, 25
    rng = np.random.default_rng(7)
    p = moved(EVEN, psi, "slope") if psi else EVEN
    alarms = 0
    for _ in range(rollouts):
        a, b = rng.multinomial(1_000, p, (looks, features)), rng.multinomial(5_000, EVEN, (looks, features))
        alarms += any(
            benjamini_hochberg([psi_test(x, y, ordered=True).p_value for x, y in zip(*pair, strict=True)], level(0.05, looks)).any()
            for pair in zip(a, b, strict=True)
        )
    # at the edge itself alpha is 0.05: P(more than 5 of 25) = 0.001
    assert alarms <= (5 if psi == 0.02 else 0)
