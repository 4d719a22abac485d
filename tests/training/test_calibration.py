"""Scores mean what they say, intervals are honest about it, and rankings are counted right."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from hafnium_training.calibration import bin_edges, calibrate, fit_interval, fit_temperature, wilson
from hafnium_training.evaluation import expected_calibration_error
from hafnium_training.losses import positive_weight, prior_correction
from hafnium_training.ranking import Ranked, pr_auc, precision_at, roc_auc


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (2.5, 0.0), (0.4, 1.5), (1.0, -3.0)])
def test_a_known_temperature_and_offset_are_found_again(temperature: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(-2.0, 1.5, 60_000)
    y = (rng.random(60_000) < sigmoid(truth)).astype(np.int8)
    found_offset, found_temperature = fit_temperature(truth * temperature - offset, y)
    assert found_temperature == pytest.approx(temperature, rel=0.05)
    assert found_offset == pytest.approx(offset, abs=0.12)


def test_scores_that_say_the_opposite_are_flattened_not_turned() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1, 5000)
    y = (rng.random(5000) < sigmoid(-z)).astype(np.int8)
    offset, temperature = fit_temperature(z, y)
    assert temperature == 20.0
    assert sigmoid((z + offset) / temperature).mean() == pytest.approx(y.mean(), abs=0.02)


def test_separable_classes_give_finite_numbers() -> None:
    z = np.concatenate([np.full(100, -5.0), np.full(100, 5.0)])
    y = np.repeat([0, 1], 100).astype(np.int8)
    offset, temperature = fit_temperature(z, y)
    assert 0.05 <= temperature <= 20.0
    assert np.isfinite(offset)


def test_the_weight_on_positives_is_taken_back_exactly() -> None:
    """The best weighted constant, corrected, is the unweighted one: for any weight."""
    positives, rows = 37, 9000
    for power in (0.0, 0.3, 1.0):
        weight = positive_weight(positives, rows, power)
        best = np.log(weight * positives / (rows - positives))  # minimises the weighted cross-entropy
        assert sigmoid(np.array(best + prior_correction(weight))) == pytest.approx(positives / rows)


@pytest.mark.parametrize(("positives", "rows"), [(0, 50), (1, 60), (5, 1000), (50, 50)])
def test_wilson_is_the_score_interval(positives: int, rows: int) -> None:
    expected = binomtest(positives, rows).proportion_ci(0.95, method="wilson")
    assert wilson(positives, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_intervals_cover_the_true_probability_about_as_often_as_they_say() -> None:
    covered: list[float] = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        z = rng.normal(-4.0, 1.5, 6000)
        y = (rng.random(6000) < sigmoid(z)).astype(np.int8)
        knots, lower, upper = fit_interval(z, y)
        at = np.quantile(z, [0.1, 0.5, 0.9, 0.99])
        truth = sigmoid(at)
        covered += list((np.interp(at, knots, lower) <= truth) & (truth <= np.interp(at, knots, upper)))
    assert np.mean(covered) >= 0.88


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=60, max_size=600), st.integers(0, 100))
def test_interval_bounds_rise_and_stay_probabilities(values: list[float], seed: int) -> None:
    z = np.array(values)
    y = (np.random.default_rng(seed).random(len(z)) < 0.3).astype(np.int8)
    knots, lower, upper = fit_interval(z, y)
    assert len(knots) >= 2
    assert (np.diff(knots) > 0).all()
    assert (np.diff(lower) >= 0).all()
    assert (np.diff(upper) >= 0).all()
    assert ((lower >= 0) & (lower <= upper) & (upper <= 1)).all()


def test_bins_hold_enough_rows_and_get_finer_towards_the_top() -> None:
    edges = np.array(bin_edges(10_000))
    sizes = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == 10_000
    assert (sizes >= 50).all()
    assert sizes[-1] < sizes[0] / 10


def test_calibration_of_a_weighted_model_has_no_error_left() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(-4.0, 1.0, 40_000)
    y = (rng.random(40_000) < sigmoid(truth)).astype(np.int8)
    fit = calibrate(truth + np.log(15.0), y, -np.log(15.0))
    score = sigmoid((truth + np.log(15.0) + fit.offset) / fit.temperature)
    assert expected_calibration_error(y, score.astype(np.float32)) < 0.005
    assert expected_calibration_error(y, sigmoid(truth + np.log(15.0)).astype(np.float32)) > 0.05


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(1, 4)), min_size=4, max_size=60))
def test_rankings_agree_with_scikit_learn_with_ties_and_weights(rows: list[tuple[int, int, int]]) -> None:
    y, score, weight = (np.array(column) for column in zip(*rows, strict=True))
    ranked = Ranked(y.astype(np.int8), score.astype(np.float32))
    w = weight.astype(float)[ranked.order]
    if 0 < y.sum() < len(y):
        assert roc_auc(ranked, w) == pytest.approx(roc_auc_score(y, score, sample_weight=weight))
        assert pr_auc(ranked, w) == pytest.approx(average_precision_score(y, score, sample_weight=weight))
    else:
        assert np.isnan(roc_auc(ranked))


def test_precision_at_the_top_counts_the_top() -> None:
    ranked = Ranked(np.array([0, 1, 1, 0], np.int8), np.array([0.1, 0.9, 0.5, 0.8], np.float32))
    assert precision_at(ranked, 2) == 0.5
    assert precision_at(ranked, 100) == 0.5
