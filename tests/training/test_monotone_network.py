"""The promise of the network: directions of the contract hold on the exported file, whatever the weights and the inputs."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
import torch
from hafnium_training_cases import lender, random_inputs, random_model
from hypothesis import HealthCheck, given, settings

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import ModelContract
from hafnium_training.export import Scorer, difficult_rows, export_onnx, measure_parity
from hafnium_training.graph import RiskModel
from hafnium_training.onnx_graph import EXPONENT_MAX, ONE_HOT_COLUMNS_MAX, model_proto
from hafnium_training.robustness import measure_monotonicity


def contract_of(features: list[dict[str, Any]]) -> ModelContract:
    return parse_contract({
        "schemaVersion": 1, "name": "drawn", "version": "1", "owner": "tests", "description": "drawn by hypothesis",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "0s"}},
        "features": features, "decision": {"threshold": 0.5},
    })


@st.composite
def contracts(draw: st.DrawFn) -> ModelContract:
    features: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["float", "float", "int", "bool", "category"]))
        feature: dict[str, Any] = {
            "name": f"x{i}", "description": "drawn", "dtype": kind, "missing": draw(st.sampled_from(["impute", "reject", "degrade"])),
        }
        if kind == "category":
            feature["categories"] = [f"c{k}" for k in range(draw(st.integers(1, 5)))]
        else:
            feature["monotone"] = draw(st.sampled_from(["increasing", "decreasing", "none"]))
        if kind in ("float", "int"):
            low = draw(st.sampled_from([-1e6, -200.0, 0.0, 1.0]))
            feature["range"] = [low, low + draw(st.sampled_from([1.0, 500.0, 1e6]))]
        features.append(feature)
    return contract_of(features)


FORMS = {
    "compared codes": {"one_hot_columns_max": ONE_HOT_COLUMNS_MAX}, "looked-up codes": {"one_hot_columns_max": 0},
    "any exponent": {"exponent_max": 0.0}, "finite exponents": {"exponent_max": EXPONENT_MAX},
}


def logits(model: RiskModel, width: int, X: np.ndarray[Any, Any], form: str = "compared codes") -> np.ndarray[Any, Any]:
    """Calibrated logits of the served graph, before they are rounded."""
    proto = model_proto(model, width, **FORMS[form])
    (name,) = next(n for n in proto.graph.node if n.op_type == "Sigmoid").input
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None))
    return np.asarray(Scorer(proto.SerializeToString()).session.run([name], {"features": X})[0])[:, 0]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(contract=contracts(), seed=st.integers(0, 2**16), spread=st.sampled_from([0.0, 1.0, 5.0]), form=st.sampled_from(list(FORMS)))
def test_the_served_graph_is_monotone_and_equals_the_network(contract: ModelContract, seed: int, spread: float, form: str) -> None:
    model, network, preprocessing = random_model(contract, seed, spread)
    width = len(contract.inputs)
    scorer = Scorer(model_proto(model, width, **FORMS[form]).SerializeToString())
    X = random_inputs(contract, 300, seed)
    found = measure_monotonicity(contract, scorer, X, seed)
    assert found.violations == 0, found
    rows = difficult_rows(contract, X, seed)
    with torch.no_grad():
        trained = (network.double()(preprocessing(torch.tensor(rows))).mean(dim=1) - 0.7) / 3.0
    np.testing.assert_allclose(logits(model, width, rows, form), trained.numpy(), rtol=1e-9, atol=1e-9)
    parity = measure_parity(model, scorer, rows)
    assert parity.score <= 1e-7
    assert parity.interval <= 1e-6
    assert parity.batch == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_of_each_step_are_what_they_say(form: str) -> None:
    operators = [n.op_type for n in model_proto(random_model(lender(), spread=0.0)[0], 6, **FORMS[form]).graph.node]
    assert ("Floor" in operators) == (form == "looked-up codes")
    assert ("ReduceLogSumExp" in operators) == (form == "any exponent")


def test_exponents_that_would_overflow_are_not_taken() -> None:
    model, _, _ = random_model(lender(), spread=2.0)
    with torch.no_grad():
        model.network.head.weight.fill_(2000.0)  # a logit of thousands for large debts
    proto = model_proto(model, 6)
    assert "ReduceLogSumExp" in [n.op_type for n in proto.graph.node]
    rows = difficult_rows(lender(), random_inputs(lender(), 200, 0), 0)
    scorer = Scorer(proto.SerializeToString())
    assert measure_parity(model, scorer, rows).worst <= 1e-6
    blind = Scorer(model_proto(model, 6, exponent_max=np.inf).SerializeToString())
    with pytest.raises(HafniumError, match="not finite"):
        measure_parity(model, blind, rows)


def test_a_network_whose_directions_are_wrong_is_caught() -> None:
    contract = lender()
    turned = lender(features=[
        {**f, "monotone": {"increasing": "decreasing", "decreasing": "increasing"}.get(f["monotone"], "none")}
        for f in contract.model_dump(mode="json")["features"] if f["monotone"] != "none" or f["dtype"] == "category"
    ])
    model, _, _ = random_model(turned)

    def score(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return model(torch.tensor(X))[0].numpy()
    kept = [j for j, f in enumerate(contract.inputs) if f.name in turned.input_names]
    found = measure_monotonicity(
        contract, lambda X: score(X[:, kept]), random_inputs(contract, 300, 0), 0,
    )
    assert found.violations > 1000
    assert found.largest > 0.01


def test_unknown_negative_and_fractional_codes_all_mean_unknown_and_missing_is_something_else() -> None:
    contract = lender()
    model, _, _ = random_model(contract)
    j = contract.input_names.index("purpose")
    row = random_inputs(contract, 1, 3)
    row[np.isnan(row)] = 1.0
    rows = np.repeat(row, 12, axis=0)
    rows[:, j] = [0, 1, 2, -1, 3, 4, 0.5, 1e30, -1e30, np.inf, -2, np.nan]
    with torch.no_grad():
        trained = model.calibrated_logit(torch.tensor(rows)).tolist()
    for score in (trained, *(logits(model, 6, rows, form).tolist() for form in ("compared codes", "looked-up codes"))):
        assert len(set(score[3:11])) == 1
        assert len({score[i] for i in (0, 1, 2, 3, 11)}) == 5


def test_values_beyond_the_range_score_as_its_bounds_and_everything_is_finite() -> None:
    contract = lender()
    model, _, _ = random_model(contract)
    rows = np.repeat(random_inputs(contract, 1, 1), 4, axis=0)
    j = contract.input_names.index("debt")
    rows[:, j] = [1e6, 1e30, np.inf, 3e6]
    score, interval = Scorer(export_onnx(model, 6)).both(rows)
    assert len(set(score.tolist())) == 1
    assert np.isfinite(interval).all()


@pytest.mark.parametrize("features", [
    [{"name": "a", "description": "d", "dtype": "float", "range": [0, 1], "monotone": "increasing"}],
    [{"name": "a", "description": "d", "dtype": "category", "categories": ["x"], "missing": "impute"}],
    [{"name": "a", "description": "d", "dtype": "float", "range": [0, 1], "missing": "impute"}],
    [{"name": "a", "description": "d", "dtype": "bool", "monotone": "decreasing", "missing": "impute"}],
], ids=["one-directed", "one-category", "one-free", "one-bool"])
def test_the_smallest_contracts_can_be_exported(features: list[dict[str, Any]]) -> None:
    contract = contract_of(features)
    model, _, _ = random_model(contract)
    scorer = Scorer(export_onnx(model, 1))
    assert measure_parity(model, scorer, difficult_rows(contract, random_inputs(contract, 20, 0), 0)).worst <= 1e-5


def test_the_exported_file_holds_no_path_and_the_agreed_interface() -> None:
    model, _, _ = random_model(lender())
    data = export_onnx(model, 6)
    assert not re.search(rb"/work|/home|/usr|/tmp|site-packages|\.py\b|torch", data)
    proto = onnx.load_from_string(data)
    assert [v.name for v in proto.graph.input] == ["features"]
    assert [v.name for v in proto.graph.output] == ["score", "interval"]
    assert next(o.version for o in proto.opset_import if o.domain == "") == 20
    assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
    assert export_onnx(random_model(lender())[0], 6) == data
    assert len(proto.graph.node) <= 34
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.output]
    assert shapes[0] == shapes[1][:1]
    assert shapes[1][1] == 2


def test_an_interval_without_its_score_is_refused() -> None:
    model, _, _ = random_model(lender())
    rows = random_inputs(lender(), 10, 0)

    class Wrong(Scorer):
        def __init__(self) -> None:
            pass

        def both(self, X: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
            return np.full(len(X), 0.5, np.float32), np.tile(np.array([0.6, 0.7], np.float32), (len(X), 1))
    with pytest.raises(HafniumError, match="does not contain the score for 10 rows"):
        measure_parity(model, Wrong(), rows)


def test_the_interval_contains_the_score_for_real_and_for_absurd_rows() -> None:
    contract = lender()
    model, _, _ = random_model(contract)
    rows = np.concatenate([random_inputs(contract, 2000, 5), difficult_rows(contract, random_inputs(contract, 100, 6), 0)])
    score, interval = Scorer(export_onnx(model, 6)).both(rows)
    assert (interval[:, 0] <= score).all()
    assert (score <= interval[:, 1]).all()
    assert (interval >= 0).all()
    assert (interval <= 1).all()
    order = np.argsort(score)
    assert (np.diff(interval[order], axis=0) >= -1e-7).all()
