"""References and windows made comparable: the hour, another contract's codes, and damaged references."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_monitoring.errors import ReferenceSampleError
from hafnium_monitoring.samples import Sample, align, calendar_cycles, load_reference, match_season

from .conftest import NOW, START

HOUR = timedelta(hours=1)


def at_hours(contract: ModelContract, hours: np.ndarray, seed: int = 0) -> Sample:  # type: ignore[type-arg]
    """Rows whose amount depends on the hour alone."""
    rng = np.random.default_rng(seed)
    features = {f.name: rng.random(len(hours)).astype(np.float32) for f in contract.inputs if not f.personal}
    features["hour_of_day"] = hours.astype(np.float32)
    features["transaction_amount"] = (hours * 10 + rng.random(len(hours))).astype(np.float32)
    return Sample(len(hours), features, features["geo_risk_score"])


def test_the_contract_says_what_tells_the_time(contract: ModelContract) -> None:
    assert calendar_cycles(contract) == {"hour_of_day": timedelta(days=1)}


def test_a_short_window_is_compared_with_the_same_hour_of_the_reference(contract: ModelContract) -> None:
    reference = at_hours(contract, np.arange(24_000) % 24)
    window = at_hours(contract, np.full(600, 3), seed=1)
    season = match_season(contract, reference, window, START, NOW, 1_000)
    assert season.matched
    assert season.reference.rows == 1_000
    assert set(season.reference.features["hour_of_day"]) == {3.0}
    assert season.clock_features == {"hour_of_day"}
    assert season.reference.features["transaction_amount"].max() < 32


def test_a_window_of_a_day_or_more_is_compared_with_the_whole_reference(contract: ModelContract) -> None:
    window = at_hours(contract, np.full(600, 3), seed=1)
    season = match_season(contract, at_hours(contract, np.arange(24_000) % 24), window, START, START + timedelta(days=2), 1_000)
    assert (season.matched, season.unmatched, season.reference.rows, season.clock_features) == (False, False, 24_000, frozenset())


@pytest.mark.parametrize(("per_hour", "hour", "hours"), [
    (500, 3, {3}), (200, 3, {2, 3, 4}), (120, 0, {22, 23, 0, 1, 2}), (50, 12, {10, 11, 12, 13, 14}),
], ids=["its own hour", "one hour either side", "two, over midnight", "two, fewer rows than wished"])
def test_where_the_hour_has_few_rows_its_neighbours_are_taken_in(
    contract: ModelContract, per_hour: int, hour: int, hours: set[int],
) -> None:
    reference = at_hours(contract, np.arange(24 * per_hour) % 24)
    season = match_season(contract, reference, at_hours(contract, np.full(600, hour)), START, NOW, 1_000)
    assert (season.matched, season.unmatched) == (True, False)
    assert set(season.reference.features["hour_of_day"]) == hours
    assert season.reference.rows == per_hour * len(hours)


def test_too_few_rows_of_the_hour_and_its_neighbours_are_said(contract: ModelContract) -> None:
    season = match_season(contract, at_hours(contract, np.arange(24 * 39) % 24), at_hours(contract, np.full(600, 3)), START, NOW, 1_000)
    assert (season.matched, season.unmatched, season.reference.rows) == (False, True, 24 * 39)


def test_stray_rows_of_other_hours_do_not_change_what_a_window_is_compared_with(contract: ModelContract) -> None:
    reference = at_hours(contract, np.arange(48_000) % 24)
    hours = np.full(2_400, 13)
    hours[:23] = [h for h in range(24) if h != 13]
    season = match_season(contract, reference, at_hours(contract, hours), START, NOW, 1_000)
    assert set(season.reference.features["hour_of_day"]) == {13.0}


def test_several_hours_have_the_windows_shares_also_in_the_reference(contract: ModelContract) -> None:
    busy_noon = np.concatenate([np.arange(4_800) % 24, np.full(20_000, 12)])
    season = match_season(contract, at_hours(contract, busy_noon), at_hours(contract, np.repeat([3, 12], [900, 100])), START, NOW, 200)
    at_three = (season.reference.features["hour_of_day"] == 3).mean()
    assert season.reference.rows == 222
    assert at_three == pytest.approx(0.9, abs=0.01)


def changed(contract: ModelContract, name: str, **fields: object) -> ModelContract:
    features = tuple(Feature.model_validate(f.model_dump() | fields) if f.name == name else f for f in contract.features)
    return ModelContract.model_validate(contract.model_dump() | {"features": [f.model_dump() for f in features]})


def test_categories_of_another_order_are_compared_by_name(contract: ModelContract) -> None:
    other = changed(contract, "channel", categories=("magstripe", "chip", "phone"))
    codes = np.array([0, 1, 2, -1, np.nan], np.float32)
    sample = Sample(5, {"channel": codes}, codes)
    ours = align(contract, other, sample).features["channel"]
    # contract: chip 0, contactless 1, online 2, magstripe 3; phone is unknown here
    np.testing.assert_array_equal(ours, np.array([3, 0, -1, -1, np.nan], np.float32))


def test_a_feature_in_another_unit_is_another_quantity(contract: ModelContract) -> None:
    other = changed(contract, "transaction_amount", unit="USD")
    values = np.ones(3, np.float32)
    sample = Sample(3, {"transaction_amount": values, "geo_risk_score": values}, values)
    assert set(align(contract, other, sample).features) == {"geo_risk_score"}


@pytest.mark.parametrize(("table", "said"), [
    (pa.table({"score": [0.5]}), "is missing"), (None, "can't be read"), ("empty", "has 0 rows"), ("text", "can't be read"),
    ("nan", "1 scores are NaN"),
])
def test_a_reference_that_does_not_fit_the_contract_is_named(
    table: object, said: str, candidate_bundle: Bundle, tmp_path: Path,
) -> None:
    path = tmp_path / "reference.parquet"
    whole = pq.ParquetFile(candidate_bundle.path / "reference.parquet").read()
    if table is None:
        path.write_bytes(b"no parquet")
    elif table == "empty":
        pq.write_table(whole.slice(0, 0), path)
    elif table == "nan":
        at = whole.column_names.index("score")
        scores = whole["score"].to_numpy().copy()
        scores[3] = np.nan
        pq.write_table(whole.set_column(at, "score", pa.array(scores)), path)
    elif table == "text":
        pq.write_table(whole.set_column(0, whole.column_names[0], pa.array(["x"] * len(whole))), path)
    else:
        pq.write_table(table, path)
    with pytest.raises(ReferenceSampleError, match=said):
        load_reference(Bundle(tmp_path, candidate_bundle.manifest, candidate_bundle.contract))


@pytest.mark.parametrize(("rows", "window_min", "needed"), [(999, 1_000, 1_000), (1_999, 50_000, None), (499, 500, 500), (199, 1, 200)])
def test_a_reference_too_small_to_see_drift_is_named_with_what_is_needed(
    rows: int, window_min: int, needed: int | None, candidate_bundle: Bundle, tmp_path: Path,
) -> None:
    whole = pq.ParquetFile(candidate_bundle.path / "reference.parquet").read()
    bundle = Bundle(tmp_path, candidate_bundle.manifest, candidate_bundle.contract)
    pq.write_table(whole.slice(0, rows), tmp_path / "reference.parquet")
    if needed is None:
        assert load_reference(bundle, window_min).rows == rows
        return
    with pytest.raises(ReferenceSampleError, match=f"has {rows} rows, {needed} are needed") as found:
        load_reference(bundle, window_min)
    assert (f"or look with --min-rows {rows}" in str(found.value)) == (rows >= 200)
    if rows >= 200:
        assert load_reference(bundle, rows).rows == rows, "as the message says"
    pq.write_table(whole.slice(0, needed), tmp_path / "reference.parquet")
    assert load_reference(bundle, window_min).rows == needed


def test_values_and_missing_values_of_the_reference_arrive(candidate_bundle: Bundle) -> None:
    sample = load_reference(candidate_bundle)
    assert sample.rows == 5_000
    assert "days_since_onboarding" not in sample.features  # personal
    assert 0.01 < np.isnan(sample.features["velocity_24h"]).mean() < 0.03
