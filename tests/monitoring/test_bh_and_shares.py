"""Many tests at once, and exact tests of shares."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hafnium_monitoring.bh import benjamini_hochberg, level
from hafnium_monitoring.shares import share_test


def test_bh_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.beta(0.5, 2.0, int(rng.integers(1, 60)))
        assert (benjamini_hochberg(p.tolist(), 0.05) == (stats.false_discovery_control(p) <= 0.05)).all()


def test_bh_takes_a_missing_test_as_no_finding() -> None:
    assert benjamini_hochberg([0.001, float("nan")], 0.05).tolist() == [True, False]
    assert benjamini_hochberg([], 0.05).tolist() == []


def test_the_level_is_shared_by_looks_and_families() -> None:
    assert level(0.05, 10, 2) == pytest.approx(0.0025)
    with pytest.raises(ValueError, match="alpha"):
        level(0.0, 10)


@pytest.mark.parametrize("base", [0.0, 0.001, 0.2, 0.99])
def test_a_share_that_moved_by_the_margin_is_rarely_significant(base: float) -> None:
    rng = np.random.default_rng(2)
    for n, m in ((500, 5_000), (2_000, 2_000), (500, 500)):
        for direction in (-0.01, 0.0, 0.01):
            p = min(1.0, max(0.0, base + direction))
            x, y = rng.binomial(n, p, 400), rng.binomial(m, base, 400)
            found = np.mean([share_test(int(a), n, int(b), m, 0.01).p_value <= 0.01 for a, b in zip(x, y, strict=True)])
            assert found <= 0.02


def test_a_few_percent_missing_are_found_where_nothing_was_missing_before() -> None:
    test = share_test(50, 1_000, 0, 5_000, 0.01)
    assert test.change == pytest.approx(0.05)
    assert test.p_value < 1e-6


def test_a_fall_counts_as_well() -> None:
    assert share_test(0, 1_000, 600, 5_000, 0.01).p_value < 1e-6


def test_an_empty_sample_proves_nothing() -> None:
    assert share_test(0, 0, 5, 10, 0.01).p_value == 1.0
    assert share_test(5, 10, 0, 0, 0.01).p_value == 1.0
