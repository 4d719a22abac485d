"""Explanations against Shapley values: enumerated here, and by the shap package, which nothing but this test needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hafnium_training_cases import lender, lender_table
from hypothesis import given, settings
from scipy.stats import spearmanr

from hafnium_training.calibration import calibrate
from hafnium_training.dataset import dataset_of, split_by_time
from hafnium_training.export import Scorer, export_onnx
from hafnium_training.fit import fit, prepare, score_rows
from hafnium_training.graph import RiskModel
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_transformer.explanation import ROWS_MAX, Explainer, Method, contributions
from hafnium_transformer.scoring import parts_of

Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Score = Callable[[Matrix], Any]


def subsets(inputs: int) -> npt.NDArray[np.bool_]:
    return ((np.arange(2**inputs)[:, None] >> np.arange(inputs)) & 1).astype(bool)


def shapley(score: Score, row: Matrix) -> Floats:
    """By definition: over all subsets of the other inputs."""
    n = row.size
    known = subsets(n)
    value = np.asarray(score(np.where(known, row, np.float32(np.nan))), np.float64)
    weight = np.array([math.factorial(k) * math.factorial(n - k - 1) / math.factorial(n) for k in range(n)])
    size, out = known.sum(axis=1), np.zeros(n)
    for j in range(n):
        without = np.flatnonzero(~known[:, j])
        out[j] = (weight[size[without]] * (value[without + (1 << j)] - value[without])).sum()
    return out


def explained(score: Score, row: Matrix, method: Method = "shapley", orders: int = 4) -> tuple[Floats, float | None]:
    explainer = Explainer.of(row.size, method, orders)
    assert explainer is not None
    return explainer.shares(float(score(row[None])[0]), np.asarray(score(explainer.asked(row))))


def known_or(rows: Matrix, otherwise: Floats) -> Floats:
    return np.where(np.isnan(rows), otherwise, rows.astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(inputs=st.integers(1, 12), orders=st.sampled_from([2, 4, 8]), seed=st.integers(0, 999))
def test_of_an_additive_model_every_method_gives_the_shapley_values(inputs: int, orders: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, typical = rng.normal(size=inputs), rng.normal(size=inputs)
    row = rng.normal(size=inputs).astype(np.float32)
    row[rng.random(inputs) < 0.2] = np.nan

    def score(rows: Matrix) -> Floats:
        return known_or(rows, typical) @ weight
    exact = np.nan_to_num((row - typical) * weight)
    np.testing.assert_allclose(shapley(score, row), exact, atol=1e-9)
    found, base = explained(score, row, orders=orders)
    np.testing.assert_allclose(found, exact, atol=1e-9)
    assert base == pytest.approx(typical @ weight)
    alone, nothing = explained(score, row, "substitution")
    np.testing.assert_allclose(alone, exact, atol=1e-9)
    assert nothing is None


@settings(max_examples=40, deadline=None)
@given(inputs=st.integers(2, 8), orders=st.sampled_from([2, 6]), seed=st.integers(0, 999))
def test_interactions_of_two_are_shared_exactly(inputs: int, orders: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(inputs, inputs))
    row = rng.normal(size=inputs).astype(np.float32)

    def score(rows: Matrix) -> Floats:
        x = known_or(rows, np.zeros(inputs))
        return np.einsum("bi,ij,bj->b", x, pair, x)
    np.testing.assert_allclose(explained(score, row, orders=orders)[0], shapley(score, row), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(inputs=st.integers(1, 9), orders=st.sampled_from([2, 4, 16]), seed=st.integers(0, 999))
def test_contributions_add_up_to_the_score_whatever_the_model(inputs: int, orders: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(inputs, 7)), rng.normal(size=7)
    row = rng.normal(size=inputs).astype(np.float32)
    row[rng.random(inputs) < 0.2] = np.nan

    def score(rows: Matrix) -> Floats:
        return np.tanh(np.maximum(known_or(rows, np.zeros(inputs)) @ first, -0.3)) @ second
    found, base = explained(score, row, orders=orders)
    assert base == pytest.approx(score(np.full((1, inputs), np.nan, np.float32))[0])
    assert found.sum() == pytest.approx(score(row[None])[0] - base, abs=1e-9)
    np.testing.assert_allclose(found[np.isnan(row)], 0.0, atol=1e-12)  # sums in another order round otherwise


def test_more_orders_come_closer() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(10, 12))

    def score(rows: Matrix) -> Floats:
        return (np.maximum(known_or(rows, np.zeros(10)) @ first, 0.0) + 0.5).prod(axis=1) ** 0.1
    rows = rng.normal(1.0, 1.0, size=(60, 10)).astype(np.float32)
    exact = [shapley(score, row) for row in rows]
    errors = [np.mean([np.abs(explained(score, r, orders=o)[0] - e).mean() for r, e in zip(rows, exact, strict=True)]) for o in (2, 8, 32)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2] > 0, errors


@pytest.mark.parametrize(("inputs", "rows", "places"), [
    (1, 1, True), (15, 113, True), (200, 797, True), (500, 999, True), (501, 501, False), (999, 999, False), (1000, None, False),
], ids=["one input", "usual", "fewer orders", "one pair", "substitution", "just so", "too many"])
def test_an_explanation_fits_one_prediction_whatever_the_number_of_inputs(inputs: int, rows: int | None, places: bool) -> None:
    explainer = Explainer.of(inputs, "shapley", 8)
    assert (None if explainer is None else explainer.rows) == rows
    assert (explainer is not None and explainer.places is not None) == places
    assert rows is None or rows <= ROWS_MAX


def test_the_largest_come_first_and_personal_values_are_not_shown() -> None:
    row = np.array([100.0, 5e4, 44.0, 1.0, -1.0, np.nan], np.float32)
    shares = np.array([0.01, -0.2, 0.05, 0.0, 0.1, -0.001])
    assert contributions(lender(), row, shares, 4, 2) == [
        {"feature": "income", "value": 50000.0, "contribution": -0.2}, {"feature": "purpose", "value": "unknown", "contribution": 0.1},
        {"feature": "age", "value": None, "contribution": 0.05}, {"feature": "debt", "value": 100.0, "contribution": 0.01},
    ]


# --- the network as it is served, against shap ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> tuple[Scorer, Matrix]:
    """A trained network and rows that it has not seen."""
    data = split_by_time(dataset_of(lender_table(rows=6000, seed=4), lender()))
    prepared = prepare(data, 0)
    fitted = fit(prepared, Hyperparameters(), epochs=12, seed=0)
    validation = data.validation
    found = calibrate(score_rows(validation, prepared.preprocessing, fitted.network), validation.y, fitted.prior_correction)
    scorer = Scorer(export_onnx(RiskModel(prepared.preprocessing, fitted.network, found), 6))
    X = data.test.X
    half = np.argsort(-scorer(X))[:100]  # high scores are those that somebody wants explained
    return scorer, np.concatenate([X[half], X[:100]])


@pytest.mark.slow
def test_shap_gives_the_values_that_we_enumerate(network: tuple[Scorer, Matrix]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import shap
    scorer, rows = network

    def left_out(mask: npt.NDArray[np.bool_], x: Floats) -> tuple[Matrix, ...]:
        return (np.where(mask, x, np.nan).astype(np.float32).reshape(1, -1),)

    def score(X: Any) -> Floats:
        return scorer(np.asarray(X, np.float32)).astype(np.float64)
    some = rows[:20].astype(np.float64)
    values = shap.explainers.ExactExplainer(score, left_out)(some)
    ours = np.array([shapley(scorer, r.astype(np.float32)) for r in some])
    np.testing.assert_allclose(values.values, ours, atol=1e-6)
    np.testing.assert_allclose(values.base_values, scorer(np.full((1, 6), np.nan, np.float32))[0], atol=1e-6)


@pytest.mark.slow
def test_explanations_of_the_network_agree_with_exact_shapley_values(network: tuple[Scorer, Matrix]) -> None:
    scorer, rows = network
    exact = [shapley(scorer, r) for r in rows]

    def agreement(method: Method) -> tuple[float, float, float, float]:
        """Mean rank correlation of sizes, share of equal signs among the three largest, share of equal firsts, median relative error."""
        found = [explained(scorer, r, method)[0] for r in rows]
        rank, sign, first, error = [], [], [], []
        for a, b in zip(found, exact, strict=True):
            top = np.argsort(-np.abs(b))[:3]
            top = top[np.abs(b[top]) > 0.01 * np.abs(b).max()]
            rank.append(spearmanr(np.abs(a), np.abs(b)).statistic)
            sign.append(np.mean(np.sign(a[top]) == np.sign(b[top])))
            first.append(np.argmax(np.abs(a)) == top[0])
            error.append(np.abs(a - b).max() / np.abs(b).max())
        return float(np.mean(rank)), float(np.mean(sign)), float(np.mean(first)), float(np.median(error))
    rank, sign, first, error = agreement("shapley")
    print("shapley", rank, sign, first, error, "substitution", agreement("substitution"))  # noqa: T201
    assert rank >= 0.95
    assert sign >= 0.99
    assert first >= 0.9
    assert error <= 0.1
    rank, sign, _, alone = agreement("substitution")
    assert rank >= 0.8
    assert sign >= 0.95
    assert alone > 2 * error


@pytest.mark.parametrize(("sizes", "parts"), [
    ([1, 1], [(0, 2)]), ([114] * 9, [(0, 8), (8, 9)]), ([114, *[1] * 886], [(0, 887)]), ([114, *[1] * 887], [(0, 887), (887, 888)]),
    ([1000, 1], [(0, 1), (1, 2)]), ([1, 1000], [(0, 1), (1, 2)]), ([2000, 1], [(0, 1), (1, 2)]),
], ids=["few", "nine explained", "just so", "one too many", "full first", "full last", "too large alone"])
def test_rows_and_what_explains_them_are_cut_into_predictions(sizes: list[int], parts: list[tuple[int, int]]) -> None:
    assert [(p.start, p.stop) for p in parts_of(sizes, 1000)] == parts
