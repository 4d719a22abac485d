"""What training never saw varying may not move a score: it would do so by the random weights that it began with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hafnium_training_cases import LENDER, lender, lender_table

from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import InputError
from hafnium_training.calibration import Fit
from hafnium_training.dataset import Split, dataset_of, split_by_time
from hafnium_training.export import Scorer, difficult_rows, export_onnx, measure_parity
from hafnium_training.fit import fit, prepare
from hafnium_training.graph import RiskModel
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_training.network import column_of

SMALL = Hyperparameters(members=2, groups=2, units=2, hidden=4, embedding=2)


def changed(**columns: Any) -> pd.DataFrame:
    return lender_table(rows=1200).assign(**columns)


def split_of(frame: pd.DataFrame, **contract: Any) -> Split:
    return split_by_time(dataset_of(frame, lender(**contract), source="lender.csv"))


def trained(split: Split) -> tuple[RiskModel, Scorer]:
    prepared = prepare(split, 0)
    network = fit(prepared, SMALL, epochs=2, seed=0).network
    knots = np.linspace(-4.0, 4.0, 6)
    model = RiskModel(prepared.preprocessing, network, Fit(0.0, 1.0, knots, np.linspace(0.0, 0.8, 6), np.linspace(0.1, 1.0, 6)))
    return model, Scorer(export_onnx(model, len(split.train.contract.inputs)))


def with_value(split: Split, name: str, value: float) -> Matrix:
    X = np.array(split.test.X)
    X[:, split.test.contract.input_names.index(name)] = value
    return X


@pytest.mark.parametrize(("missing", "said"), [
    ("impute", r"age \(0 of 840 rows; 56% of the newer ones\)"), ("degrade", r"age \(0 of 840 rows; 56% of the newer ones\)"),
    ("reject", r"would be refused in serving: age missing in 83\.33%"),
])
def test_an_input_without_a_single_value_in_the_train_part_is_refused_by_name(missing: str, said: str) -> None:
    features = [{**f, "missing": missing} if f["name"] == "age" else f for f in LENDER["features"]]
    age = np.where(np.arange(1200) < 1000, np.nan, 40.0)  # the lookup found something in the newest rows only
    with pytest.raises(InputError, match=said) as found:
        split_of(changed(age=age), features=features)
    assert "debt" not in str(found.value)


@pytest.mark.parametrize(("column", "constant", "values"), [
    ("debt", 700.0, [0.0, 1e5, 1e6, np.inf]), ("age", 30.0, [18.0, 110.0]), ("late_before", 0.0, [1.0]),
], ids=["directed", "free", "flag"])
def test_a_constant_input_is_told_of_and_can_not_move_the_score(column: str, constant: float, values: list[float]) -> None:
    features = [f for f in LENDER["features"] if f["name"] != "debt_ratio"]
    split = split_of(changed(**{column: constant}), features=features)
    (notice,) = split.notices
    assert notice.startswith(f"{column} is {constant:g} in every row")
    model, scorer = trained(split)
    usual = scorer(with_value(split, column, constant))
    for value in values:
        np.testing.assert_array_equal(scorer(with_value(split, column, value)), usual)
    assert measure_parity(model, scorer, difficult_rows(split.test.contract, split.test.X, 0)).worst <= 1e-6


def test_a_category_that_training_never_saw_scores_as_an_unknown_one() -> None:
    purpose = np.where(np.arange(1200) % 2 == 0, "car", "house")
    split = split_of(changed(purpose=purpose))
    _, scorer = trained(split)
    unseen, unknown, seen = (scorer(with_value(split, "purpose", code)) for code in (2.0, -1.0, 0.0))
    np.testing.assert_array_equal(unseen, unknown)
    assert not np.array_equal(seen, unknown)


def test_nothing_is_said_of_inputs_that_vary() -> None:
    assert split_of(lender_table(rows=1200)).notices == ()


def of_range(largest: float) -> Matrix:
    features = [{**f, "range": [0, largest]} if f["name"] in ("debt", "income") else f for f in LENDER["features"]]
    split = split_of(lender_table(rows=1200), features=[f for f in features if f["name"] != "debt_ratio"])
    assert split.notices == ()
    return trained(split)[1](split.test.X)


def test_a_range_far_wider_than_the_values_changes_nothing() -> None:
    usual = of_range(1e6)
    for largest in (1e14, 9.2e18, 3e38):
        np.testing.assert_allclose(of_range(largest), usual, atol=1e-6)


def test_values_that_differ_by_no_more_than_float32_can_tell_are_no_constant() -> None:
    feature = lender().inputs[0].model_copy(update={"range": (0.0, 1e30)})
    values = np.where(np.arange(100) % 2 == 0, np.float32(1e9), np.nextafter(np.float32(1e9), np.float32(2e9))).astype(np.float32)
    column = column_of(feature, 0, values)
    assert (column.low, column.high) == (0.0, 1e30)
    assert 1.0 < column.scale < 100.0
