"""Which models may go out: measured badness stops them, noise and lack of data don't pass for an answer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hafnium_training_cases import lender, lender_table

from hafnium_contract.errors import HafniumError
from hafnium_training.dataset import POSITIVES_MIN, Dataset, dataset_of
from hafnium_training.evaluation import Comparison, Measured, bootstrap, compare, evaluate
from hafnium_training.export import Parity
from hafnium_training.fairness import Group, fairness_of, groups_of
from hafnium_training.gates import Findings, Gate, GatesFailed, judge, require
from hafnium_training.latency import Latency
from hafnium_training.losses import causes, moved
from hafnium_training.model_card import make_card
from hafnium_training.ranking import Ranked, roc_auc
from hafnium_training.robustness import Monotonicity, Robustness, measure_robustness


@pytest.fixture(scope="module")
def data() -> Dataset:
    return dataset_of(lender_table(rows=4000), lender())


def scores(data: Dataset, noise: float, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Scores that know the label up to noise."""
    rng = np.random.default_rng(seed)
    return (1 / (1 + np.exp(-(4.0 * data.y - 3.0 + rng.normal(0, noise, data.rows))))).astype(np.float32)


def band(score: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([score * 0.8, np.minimum(score * 1.2, 1.0)], axis=1)


def findings(data: Dataset, **changes: Any) -> Findings:
    rng = np.random.default_rng(1)
    z = rng.normal(-2, 1.5, data.rows)
    score = (1 / (1 + np.exp(-z))).astype(np.float32)
    y = (rng.random(data.rows) < score).astype(np.int8)
    quality = evaluate(dataclasses.replace(data, y=y), score, band(score), 0.3, 0)
    sound = Findings(
        quality, (), Robustness(Monotonicity(100, 0, 0.0, {"debt": 0}), {}, 0.0, 0.0, 0.0), Parity(1e-8, 1e-8, 0.0, 10), None, None,
    )
    return dataclasses.replace(sound, **changes)


def verdicts(found: Findings) -> dict[str, str]:
    return {g.name: g.verdict for g in judge(found)}


def test_a_sound_model_passes_and_what_was_not_measured_says_so(data: Dataset) -> None:
    found = verdicts(findings(data))
    assert {found[n] for n in ("parity", "monotone_violations", "better_than_chance", "calibration")} == {"pass"}
    assert found["production.latency"] == "not measured"
    require(judge(findings(data)))


@pytest.mark.parametrize("positives", [1, 2, 5, 9])
def test_with_fewer_than_ten_positives_or_negatives_no_model_goes_out(data: Dataset, positives: int) -> None:
    few = (np.arange(data.rows) < positives).astype(np.int8)
    perfect = np.where(few == 1, 0.9, 0.001).astype(np.float32)
    for y, score in ((few, perfect), (1 - few, 1 - perfect)):
        quality = evaluate(dataclasses.replace(data, y=y), score, band(score), 0.3, 0)
        gates = judge(findings(data, quality=quality))
        assert {g.name: g.verdict for g in gates}["better_than_chance"] == "not enough data"
        with pytest.raises(GatesFailed, match=r"better_than_chance: .*give data over a longer time") as error:
            require(gates)
        assert "better_than_chance" in {g.name for g in error.value.failed}


def test_scores_of_pure_noise_seldom_pass_for_skill(data: Dataset) -> None:
    passed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        y = np.zeros(400, np.int8)
        y[rng.choice(400, POSITIVES_MIN, replace=False)] = 1
        passed += bootstrap(Ranked(y, rng.random(400)), roc_auc, rng, 200).lower > 0.5
    assert passed <= 6  # 3.5 % expected; 45 % where one positive was enough


def change_metric(found: Findings, name: str, value: Measured) -> Findings:
    return dataclasses.replace(found, quality=dataclasses.replace(found.quality, metrics={**found.quality.metrics, name: value}))


def compared(value: float, upper: float) -> Comparison:
    change = Measured(value, value - 0.02, upper)
    return Comparison("sha256:0", "1", {"roc_auc": 0.9, "pr_auc": 0.5}, {"roc_auc": 0.9, "pr_auc": 0.5},
                      {"roc_auc": Measured(0.0, -0.01, 0.01), "pr_auc": change})


FINE = Latency(0.05, 0.05, 1.0, 0.98, 1.02)


@pytest.mark.parametrize(("change", "gate", "expected"), [
    (lambda f: dataclasses.replace(f, parity=Parity(2e-5, 0, 0, 10)), "parity", "fail"),
    (lambda f: dataclasses.replace(f, parity=Parity(0, 0, 2e-5, 10)), "parity", "fail"),
    (lambda f: dataclasses.replace(f, robustness=Robustness(Monotonicity(100, 1, 1e-9, {"debt": 1}), {}, 0, 0, 0)),
     "monotone_violations", "fail"),
    (lambda f: change_metric(change_metric(f, "ece", Measured(0.06, 0.05, 0.07)), "ece_by_chance", Measured(0.05, 0.03, 0.08)),
     "calibration", "advisory"),
    (lambda f: change_metric(f, "roc_auc", Measured(0.55, 0.49, 0.6)), "better_than_chance", "fail"),
    (lambda f: change_metric(f, "roc_auc", Measured(math.nan, math.nan, math.nan)), "better_than_chance", "fail"),
    (lambda f: change_metric(f, "ece", Measured(0.09, 0.08, 0.1)), "calibration", "fail"),
    (lambda f: dataclasses.replace(f, comparison=compared(-0.03, -0.001), latency=FINE), "production.pr_auc", "fail"),
    (lambda f: dataclasses.replace(f, comparison=compared(-0.03, 0.01), latency=FINE), "production.pr_auc", "advisory"),
    (lambda f: dataclasses.replace(f, comparison=compared(-0.019, -0.001), latency=FINE), "production.pr_auc", "pass"),
    (lambda f: dataclasses.replace(f, comparison=compared(0.1, 0.2), latency=Latency(0.60, 0.50, 1.2, 1.06, 1.4)),
     "production.latency", "fail"),
    (lambda f: dataclasses.replace(f, comparison=compared(0.1, 0.2), latency=Latency(0.06, 0.05, 1.2, 1.06, 1.4)),
     "production.latency", "pass"),
    (lambda f: dataclasses.replace(f, comparison=compared(0.1, 0.2), latency=Latency(0.60, 0.50, 1.2, 0.9, 1.9)),
     "production.latency", "pass"),
], ids=["parity", "batch-parity", "one-violation", "calibration-within-chance", "chance",
        "nothing-measured", "calibration", "worse-than-production",
        "worse-but-noise", "a-little-worse", "slower", "slower-by-nothing", "slower-but-noise"])
def test_each_gate_decides_on_what_was_measured(data: Dataset, change: Any, gate: str, expected: str) -> None:
    found = change(findings(data))
    assert verdicts(found)[gate] == expected
    if expected == "fail":
        with pytest.raises(GatesFailed, match=gate) as error:
            require(judge(found))
        assert error.value.exit_status == 1
        assert {g.name for g in error.value.failed} >= {gate}


def test_the_error_lists_each_failed_gate_with_value_and_limit(data: Dataset) -> None:
    found = change_metric(findings(data, parity=Parity(0.5, 0, 0, 10)), "ece", Measured(0.2, 0.1, 0.3))
    with pytest.raises(GatesFailed) as error:
        require(judge(found))
    text = str(error.value)
    assert text.startswith("2 gates failed, so no bundle was written")
    assert "0.5" in text
    assert "0.2000" in text
    assert "≤ 0.05" in text


def test_a_slice_far_below_the_whole_fails_and_one_without_positives_has_no_answer(data: Dataset) -> None:
    score = scores(data, 1.0)
    boats = data.values["purpose"] == 2.0
    rng = np.random.default_rng(2)
    score[boats] = rng.random(int(boats.sum())).astype(np.float32)  # no skill there
    found = findings(data, quality=evaluate(data, score, band(score), 0.3, 0))
    gates = {g.name: g for g in judge(found)}
    assert gates["slices.purpose"].verdict == "fail"
    assert "boat" in gates["slices.purpose"].message
    few = dataclasses.replace(data, y=(np.arange(data.rows) % 500 == 0).astype(np.int8))
    nothing = findings(data, quality=evaluate(few, score, band(score), 0.3, 0))
    assert verdicts(nothing)["slices.purpose"] == "not enough data"


def group(name: str, rows: int, positives: int, selected: int, tpr: float) -> Group:
    hits = round(tpr * positives)
    return Group(name, rows, positives, selected, selected / rows, tpr, (selected - hits) / (rows - positives))


def test_fairness_measures_are_the_usual_ones() -> None:
    a, b = group("a", 1000, 100, 200, 0.9), group("b", 1000, 100, 100, 0.6)
    found = {f.measure: f for f in fairness_of("sex", (a, b), 0)}
    assert found["parity_difference"].value == pytest.approx(0.1)
    assert found["equal_opportunity_difference"].value == pytest.approx(0.3)
    assert found["average_odds_difference"].value == pytest.approx((0.3 + (110 - 40) / 900) / 2)
    assert found["disparate_impact"].value == pytest.approx(0.5)
    for f in found.values():
        assert f.lower is not None
        assert f.upper is not None
        assert f.value is not None
        assert f.lower < f.value < f.upper


@pytest.mark.parametrize(("groups", "measure", "expected"), [
    ((group("a", 4000, 400, 900, 0.9), group("b", 4000, 400, 300, 0.5)), "equal_opportunity_difference", "fail"),
    ((group("a", 4000, 400, 900, 0.9), group("b", 4000, 400, 300, 0.5)), "disparate_impact", "fail"),
    ((group("a", 4000, 400, 400, 0.6), group("b", 4000, 400, 410, 0.6)), "disparate_impact", "pass"),
    ((group("a", 300, 25, 40, 0.72), group("b", 300, 25, 40, 0.56)), "equal_opportunity_difference", "advisory"),
    ((group("a", 3000, 2, 40, 1.0), group("b", 3000, 1, 40, 0.0)), "equal_opportunity_difference", "not enough data"),
    ((group("a", 3000, 2, 4, 1.0), group("b", 3000, 1, 1, 0.0)), "disparate_impact", "not enough data"),
], ids=["odds-differ", "impact-differs", "equal", "differs-within-noise", "three-frauds", "five-decisions"])
def test_fairness_on_few_positives_is_no_answer(data: Dataset, groups: tuple[Group, ...], measure: str, expected: str) -> None:
    assert verdicts(findings(data, fairness=fairness_of("sex", groups, 0)))[f"fairness.sex.{measure}"] == expected


def test_groups_are_counted_at_the_decision_threshold(data: Dataset) -> None:
    score = scores(data, 0.5)
    groups = groups_of(data, "sex", score, 0.3)
    assert [g.value for g in groups] == ["f", "m"]
    assert sum(g.selected for g in groups) == (score >= 0.3).sum()
    assert sum(g.positives for g in groups) == data.positives


def test_a_model_compared_with_itself_has_not_changed_and_a_worse_one_has(data: Dataset) -> None:
    good, bad = scores(data, 1.0), scores(data, 4.0)
    same = compare("sha256:0", "1", data.y, good, good, 0)
    assert same.change["pr_auc"] == Measured(0.0, 0.0, 0.0)
    worse = compare("sha256:0", "1", data.y, bad, good, 0)
    assert worse.change["pr_auc"].upper < -0.02


def test_bootstrap_intervals_hold_the_value(data: Dataset) -> None:
    quality = evaluate(data, scores(data, 2.0), band(scores(data, 2.0)), 0.3, 0)
    for name, m in quality.metrics.items():
        assert m.lower <= m.value + 1e-9, name
        assert m.value <= m.upper + 1e-9, name
    assert quality.metrics["roc_auc"].upper - quality.metrics["roc_auc"].lower < 0.1


def test_a_cause_reaches_its_derived_columns_too(data: Dataset) -> None:
    assert causes(data.contract) == ("debt", "income")
    more_debt, less_income = moved(data, "debt"), moved(data, "income")
    at = {n: j for j, n in enumerate(data.contract.input_names)}
    present = ~np.isnan(data.X[:, at["debt"]])
    assert (more_debt[present, at["debt"]] >= data.X[present, at["debt"]]).all()
    assert (more_debt[present, at["debt_ratio"]] >= data.X[present, at["debt_ratio"]]).all()
    assert (less_income[:, at["income"]] <= data.X[:, at["income"]]).all()  # decreasing: towards more risk is down
    both = present & (less_income[:, at["income"]] > 0)
    assert (less_income[both, at["debt_ratio"]] >= data.X[both, at["debt_ratio"]]).all()


def test_robustness_counts_what_noise_changes(data: Dataset) -> None:
    constant = measure_robustness(data, lambda X: np.full(len(X), 0.5, np.float32), 0.3, 0)
    assert (constant.noise_largest, constant.decisions_changed) == (0.0, 0.0)
    j = data.contract.input_names.index("age")
    jumpy = measure_robustness(data, lambda X: (np.nan_to_num(X[:, j]) % 1 > 0.5).astype(np.float32), 0.3, 0)
    assert jumpy.decisions_changed > 0.2


def card_sections() -> dict[str, Any]:
    return {
        "details": {"name": "n", "version": "1", "owner": "o", "kind": "k", "contract_version": "1", "contract_digest": "d",
                    "data_digest": "d", "git_commit": "c", "seed": 1},
        "description": "d", "intended_use": "u", "out_of_scope": ("x",), "training_data": "t", "evaluation_data": "e",
        "features": ({"name": "f", "description": "d", "source": "request", "monotone": "none", "personal": False},),
        "metrics": ({"name": "roc_auc", "value": 0.9},), "slices": "s", "fairness": "f", "calibration": "c", "robustness": "r",
        "gates": ({"name": "g", "verdict": "pass", "limit": "1", "message": "m"},), "limitations": ("l",), "personal_data": "none",
    }


def test_every_section_of_the_model_card_is_required() -> None:
    sections = card_sections()
    assert make_card(**sections).description == "d"
    for name, value in sections.items():
        if isinstance(value, dict):
            continue
        empty: Any = () if isinstance(value, tuple) else "  "
        with pytest.raises(HafniumError, match="model card is not complete"):
            make_card(**{**sections, name: empty})
        with pytest.raises(HafniumError, match="model card is not complete"):
            make_card(**{k: v for k, v in sections.items() if k != name})


def test_a_gate_on_time_never_shows_its_value() -> None:
    from hafnium_training.model_card import card_gates
    gate = Gate("production.latency", "pass", 1.03, "≤ 5 %", "51 µs against 50 µs", reproducible=False)
    assert "51" not in card_gates((gate,))[0].model_dump_json()
