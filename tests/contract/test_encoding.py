"""Values → matrix: one meaning for training (columns) and serving (values)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hafnium_contract.contract_file import load_contract, parse_contract
from hafnium_contract.encoding import UNKNOWN_CATEGORY, assemble, encode_column, encode_value, matrix_of, plain_encoder, row_assembler
from hafnium_contract.errors import FeatureError
from hafnium_contract.model_contract import Feature, FromDerived

EXAMPLES = Path(__file__).parents[2] / "examples"

AMOUNT = Feature(name="a", description="-", dtype="float", range=(0, 100))
CLAMPED = Feature(name="a", description="-", dtype="float", range=(0, 100), out_of_range="clamp")
COUNT = Feature(name="n", description="-", dtype="int", range=(-100, 100))
COUNTED = Feature(name="n", description="-", dtype="int", range=(-100, 100), out_of_range="clamp")
FLAG = Feature(name="f", description="-", dtype="bool")
KIND = Feature(name="k", description="-", dtype="category", categories=("x", "y"))


@pytest.mark.parametrize(
    ("feature", "value", "encoded"),
    [
        (AMOUNT, 5, 5.0), (AMOUNT, 100.0, 100.0), (CLAMPED, 1e9, 1e9), (COUNT, -3, -3.0), (COUNT, 3.0, 3.0),
        (FLAG, True, 1.0), (FLAG, 0, 0.0), (KIND, "y", 1.0), (KIND, "never seen", UNKNOWN_CATEGORY),
        (AMOUNT, np.float32(2), 2.0),
    ],
)
def test_present_values_have_one_meaning(feature: Feature, value: Any, encoded: float) -> None:
    assert encode_value(feature, value, "p") == encoded


@pytest.mark.parametrize("feature", [AMOUNT, COUNT, FLAG, KIND])
@pytest.mark.parametrize("value", [None, math.nan, np.datetime64("NaT")])
def test_missing_is_nan_whatever_the_type(feature: Feature, value: Any) -> None:
    assert math.isnan(encode_value(feature, value, "p"))


@pytest.mark.parametrize(
    ("feature", "value", "says"),
    [
        (AMOUNT, "12", "a number, got '12'"), (AMOUNT, True, "a number, got True"), (AMOUNT, math.inf, "finite"),
        (AMOUNT, 101, "from 0 to 100"), (AMOUNT, -0.01, "from 0 to 100"), (COUNT, 1.5, "whole number"),
        (COUNT, 10**30, "2\\^53"), (FLAG, "yes", "true or false"), (FLAG, 2, "true or false"), (KIND, 1, "a string"),
        (CLAMPED, -math.inf, "finite"), (AMOUNT, [1], "a number"), (AMOUNT, {"x": "y" * 500}, "a number, got an object"),
        (AMOUNT, "y" * 500, "\\.\\.\\."),
    ],
)
def test_wrong_values_are_named_with_their_path(feature: Feature, value: Any, says: str) -> None:
    with pytest.raises(FeatureError, match=says) as e:
        encode_value(feature, value, "features.thing")
    assert e.value.problems[0].path == "features.thing"


@given(st.lists(st.one_of(st.none(), st.floats(0, 100), st.integers(0, 100)), min_size=1))
def test_a_column_and_its_values_encode_alike(values: list[float | None]) -> None:
    column = encode_column(AMOUNT, np.array(values, dtype=object))
    np.testing.assert_array_equal(column, [encode_value(AMOUNT, v, "p") for v in values])


@given(st.lists(st.sampled_from(["x", "y", "z", None]), min_size=1))
def test_categories_encode_alike_in_both_ways(values: list[str | None]) -> None:
    column = encode_column(KIND, np.array(values, dtype=object))
    np.testing.assert_array_equal(column, [encode_value(KIND, v, "p") for v in values])


def test_a_column_of_text_is_refused_for_a_number() -> None:
    with pytest.raises(FeatureError, match="column of numbers"):
        encode_column(AMOUNT, np.array(["1", "two"], dtype=object))


def test_times_and_fractions_are_no_numbers_of_a_count() -> None:
    with pytest.raises(FeatureError, match="column of numbers, got datetime64"):
        encode_column(AMOUNT, np.array(["2026-01-01"], "datetime64[us]"))
    count = AMOUNT.model_copy(update={"dtype": "int"})
    assert encode_column(count, np.array([1.0, np.nan, np.inf]))[0] == 1.0
    with pytest.raises(FeatureError, match=r"whole numbers, got 1 fractions, the first in row 2: 2\.5"):
        encode_column(count, np.array([1.0, 2.5]))


def test_whole_numbers_with_a_gap_are_the_categories_that_they_look_like() -> None:
    kind = KIND.model_copy(update={"categories": ("5411", "7995")})
    assert encode_column(kind, np.array([5411.0, np.nan, 7995.0, 1.5])).tolist()[::2] == [0.0, 1.0]


def test_derived_features_are_computed_in_contract_order() -> None:
    def derived(name: str, operation: str, *inputs: str) -> dict[str, Any]:
        return {"name": name, "description": "-", "dtype": "float", "range": [-1e9, 1e9],
                "source": {"derived": {"operation": operation, "inputs": list(inputs)}}}

    contract = parse_contract({
        "schemaVersion": 1, "name": "d", "version": "1", "owner": "o", "description": "-",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "0s"}},
        "features": [
            {"name": "a", "description": "-", "dtype": "float", "range": [-1e9, 1e9]},
            {"name": "b", "description": "-", "dtype": "float", "range": [-1e9, 1e9], "modelInput": False},
            derived("ratio", "ratio", "a", "b"), derived("difference", "difference", "a", "b"), derived("sum", "sum", "a", "b"),
            derived("product", "product", "a", "b", "a"), derived("log", "log1p", "a"),
            derived("hour", "hour_of_day", "event_time"), derived("day", "day_of_week", "event_time"),
            derived("twice", "sum", "sum", "sum"),
        ],
        "decision": {"threshold": 0.5},
    })
    # 2026-01-05 was a Monday; 23:59:59 is still hour 23
    monday = 1767571200.0 + 86399
    got = assemble(contract, {"a": np.array([3.0, -2.0]), "b": np.array([2.0, 0.0])}, np.array([monday, 0.0]))
    assert contract.input_names == ("a", "ratio", "difference", "sum", "product", "log", "hour", "day", "twice")
    np.testing.assert_allclose(got[0], [3, 1.5, 1, 5, 18, math.log(4), 23, 0, 10], rtol=1e-6)
    np.testing.assert_allclose(got[1], [-2, np.nan, -2, -2, 0, np.nan, 0, 3, -4])
    assert got.dtype == np.float32


def with_all_operations() -> dict[str, Any]:
    plain = [{"name": n, "description": n, "dtype": "float", "range": [-1e9, 1e9]} for n in "abc"]
    operations = {"ratio": "ab", "difference": "ab", "sum": "abc", "product": "abc", "log1p": "a"}
    derived = [{"name": f"of_{o}", "description": o, "dtype": "float", "range": [-1e9, 1e9], "outOfRange": "clamp",
                "source": {"derived": {"operation": o, "inputs": list(i)}}} for o, i in operations.items()]
    derived += [{"name": o, "description": o, "dtype": "float", "range": [0, 24],
                 "source": {"derived": {"operation": o, "inputs": ["event_time"]}}} for o in ("hour_of_day", "day_of_week")]
    return {
        "schemaVersion": 1, "name": "all", "version": "1", "owner": "o", "description": "d",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "1d"}},
        "features": [*plain, *derived], "decision": {"threshold": 0.5},
    }


@given(st.data())
def test_a_row_assembled_alone_has_the_bits_of_its_column(data: st.DataObject) -> None:
    extreme = st.sampled_from([0.0, -0.0, -1.0, 1e-300, 1e39, -1e39, 1e300, 3.4028235677973366e38])
    numbers = st.floats(-1e6, 1e6) | st.just(math.nan) | extreme
    contract = parse_contract(with_all_operations())
    names = [f.name for f in contract.features if not isinstance(f.source, FromDerived)]
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, numbers)), min_size=1, max_size=5))
    times = data.draw(st.lists(st.floats(0, 4e9), min_size=len(rows), max_size=len(rows)))
    with np.errstate(over="ignore"):
        together = assemble(contract, {n: np.array([r[n] for r in rows]) for n in names}, np.array(times))
    one_by_one = row_assembler(contract)
    alone = matrix_of([one_by_one(r, t) for r, t in zip(rows, times, strict=True)])
    assert not np.isinf(together).any()
    assert np.array_equal(together, alone, equal_nan=True)


@given(st.data())
def test_plain_encoder_agrees_with_encode_value_or_leaves_it_to_it(data: st.DataObject) -> None:
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    feature = data.draw(st.sampled_from([f for f in contract.features if not isinstance(f.source, FromDerived)]))
    anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    likely = st.sampled_from(feature.categories or ("x",)) | st.floats(*(feature.range or (0, 1))) | st.integers(0, 3)
    value = data.draw(anything | likely)
    plain = plain_encoder(feature)(value)
    if plain is not None:
        assert plain == encode_value(feature, value, "p")
        assert type(plain) is float


@pytest.mark.parametrize("value", [9007199254740994, 9007199254740994.0, 1e30, -3.4028234663852886e38])
def test_large_number_is_taken_however_it_is_written(value: float) -> None:
    assert encode_value(CLAMPED, value, "f") == float(value)


@pytest.mark.parametrize("value", [3.5e38, -1e300, 10**400, math.inf])
def test_number_that_float32_has_not_is_refused(value: float) -> None:
    with pytest.raises(FeatureError, match="expected a"):
        encode_value(CLAMPED, value, "f")


@pytest.mark.parametrize("value", [9007199254740994, 9007199254740994.0, 10**400, 1.5])
def test_whole_number_beyond_what_float64_tells_apart_is_refused_however_it_is_written(value: float) -> None:
    with pytest.raises(FeatureError, match=r"whole number up to 2\^53|finite"):
        encode_value(COUNTED, value, "f")
