"""What training may know: the cut-off of labels, the split in time, and refusals that say what to do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_training.dataset import WINDOW_LABELS_MAX, dataset_of, load_dataset, mature_until, split_by_time

START = datetime(2026, 1, 1, tzinfo=UTC)


def contract(label_time: dict[str, str] | None = None, entities: Any = (), more: Any = ()) -> ModelContract:
    return parse_contract({
        "schemaVersion": 1, "name": "loans", "version": "1", "owner": "risk", "description": "default within a year",
        "data": {
            "eventTime": {"column": "applied"}, "label": {"column": "defaulted"}, "labelTime": label_time or {"column": "known"},
        },
        "features": [
            {"name": "income", "description": "yearly income", "dtype": "float", "unit": "EUR", "range": [0, 1e6], "missing": "impute"},
            {"name": "home", "description": "how the applicant lives", "dtype": "category", "categories": ["rent", "own"],
             "missing": "impute", "source": {"request": "home_type"}},
            {"name": "hour", "description": "hour of day", "dtype": "float", "range": [0, 23], "missing": "impute",
             "source": {"derived": {"operation": "hour_of_day", "inputs": ["event_time"]}}},
            *more,
        ],
        "entities": list(entities),
        "protected": [{"name": "age_band"}],
        "decision": {"threshold": 0.5},
    })


def table(rows: int = 800, late_negative_days: float = 60.0, late_positive_days: float = 10.0) -> pd.DataFrame:
    """One row a day-tenth; every tenth row is positive and becomes known sooner than the negatives."""
    rng = np.random.default_rng(0)
    positive = np.arange(rows) % 10 == 3
    applied = [START + timedelta(days=i / 10) for i in range(rows)]
    known = [t + timedelta(days=late_positive_days if p else late_negative_days) for t, p in zip(applied, positive, strict=True)]
    return pd.DataFrame({
        "applied": applied, "known": known, "defaulted": positive.astype(int), "income": rng.uniform(1e4, 1e5, rows),
        "home_type": rng.choice(["rent", "own", "boat", None], rows), "age_band": rng.choice(["young", "old"], rows),
    })


def test_a_label_that_arrives_after_the_cutoff_is_not_used() -> None:
    frame = table(rows=1000)
    until = START + timedelta(days=90)
    data = dataset_of(frame, contract(), until=until)
    cut = until.timestamp() * 1e6
    assert data.label_time.max() <= cut
    assert data.event_time.max() < cut
    usable = (frame["known"] <= until) & (frame["defaulted"] == 0)
    assert (data.y == 0).sum() == usable.sum()


def test_positives_known_early_are_left_out_where_negatives_are_not_known_yet() -> None:
    frame = table(rows=1000)
    until = START + timedelta(days=90)
    data = dataset_of(frame, contract(), until=until)
    newest_negative = frame.loc[(frame["known"] <= until) & (frame["defaulted"] == 0), "applied"].max()
    assert data.event_time.max() == round(newest_negative.timestamp() * 1e6)
    assert (frame["known"] <= until).sum() > data.rows  # there were more known frauds to be tempted by
    assert abs(data.positives / data.rows - 0.1) < 0.01


def test_an_event_at_the_cutoff_is_too_late_and_a_label_at_the_cutoff_is_in_time() -> None:
    frame = table(rows=600, late_negative_days=0.0, late_positive_days=0.0)
    until = START + timedelta(days=30)
    data = dataset_of(frame, contract(), until=until)
    assert data.rows == 300  # row 300 happens at `until`
    later = dataset_of(table(rows=600, late_negative_days=10.0), contract(), until=until)
    assert later.label_time.max() == round(until.timestamp() * 1e6)


def test_columns_take_their_meaning_from_the_contract() -> None:
    frame = table().sample(frac=1.0, random_state=1)
    data = dataset_of(frame, contract())
    assert data.X.dtype == np.float32
    assert data.X.shape == (800, 3)
    assert (np.diff(data.event_time) >= 0).all()
    homes = set(np.unique(data.X[:, 1][~np.isnan(data.X[:, 1])]))
    assert homes == {0.0, 1.0, -1.0}
    assert np.isnan(data.X[:, 1]).any()
    assert set(data.X[:, 2]) <= set(range(24))
    assert set(data.protected) == {"age_band"}
    with pytest.raises(ValueError, match="read-only"):
        data.X[0, 0] = 1.0


def test_the_split_is_in_time_and_keeps_rows_of_one_moment_together() -> None:
    frame = table()
    frame["applied"] = frame["applied"].dt.floor("7D")
    frame["known"] = frame["applied"]
    split = split_by_time(dataset_of(frame, contract()))
    assert split.train.event_time.max() < split.validation.event_time.min()
    assert split.validation.event_time.max() < split.test.event_time.min()
    assert split.train.rows + split.validation.rows + split.test.rows == 800


def test_csv_and_parquet_of_the_same_rows_have_one_digest_and_a_changed_label_another(tmp_path: Path) -> None:
    frame = table()
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    from_csv, from_parquet = (load_dataset(tmp_path / n, contract()) for n in ("t.csv", "t.parquet"))
    assert from_csv.digest() == from_parquet.digest()
    frame.loc[0, "defaulted"] = 1 - frame.loc[0, "defaulted"]
    assert dataset_of(frame, contract()).digest() != from_csv.digest()


def test_the_digest_follows_all_that_an_evaluation_reads() -> None:
    entities = [{"name": "applicant", "joinKey": "who"}]
    frame = table().assign(who=[f"c{i // 2}" for i in range(800)], hidden=1.5)
    hidden = {"name": "hidden", "description": "h", "dtype": "float", "range": [0, 10], "modelInput": False}
    agreed = contract(entities=entities, more=[hidden])
    digest = dataset_of(frame, agreed).digest()
    for column, value in (("who", "c7"), ("hidden", 2.5), ("age_band", "middle")):
        changed = frame.copy()
        changed.loc[5, column] = value
        assert dataset_of(changed, agreed).digest() != digest, column
    assert dataset_of(frame.assign(comment="x"), agreed).digest() == digest


def known_late(frame: pd.DataFrame, days: float) -> pd.DataFrame:
    """Negatives of the newest days have no label yet, positives have."""
    young = frame["applied"] > frame["applied"].max() - timedelta(days=days)
    return frame.assign(defaulted=frame["defaulted"].astype(float).mask(young & (frame["defaulted"] == 0)))


def test_without_a_cutoff_too_positives_of_a_time_without_negatives_are_left_out_and_told_of() -> None:
    data = dataset_of(known_late(table(rows=1000), 25), contract())
    assert data.rows == 750
    assert abs(data.positives / data.rows - 0.1) < 0.01
    (notice, _) = data.notices
    assert notice.startswith("25 rows after 2026-03-16T")
    assert "labels of 10.0% of the rows since then are, of 100.0% before" in notice


def test_negatives_that_were_cleared_early_do_not_make_a_time_mature() -> None:
    frame = table(rows=1000)
    until = START + timedelta(days=90)
    usual = dataset_of(frame, contract(), until=until)
    for row in (500, 700, 890):  # negatives, ten days to a month before the cut-off
        frame.loc[row, "known"] = frame.loc[row, "applied"] + timedelta(minutes=1)
    early = dataset_of(frame, contract(), until=until)
    assert early.rows == usual.rows
    assert early.digest() == usual.digest()


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_labels_that_never_come_for_some_of_the_rows_leave_the_others_as_they_are(share: float) -> None:
    frame = table(rows=2000)
    never = np.random.default_rng(1).random(2000) < share
    frame["defaulted"] = frame["defaulted"].astype(float).mask(never)
    assert dataset_of(frame, contract()).rows > 0.97 * (~never).sum()
    young = frame["applied"] > frame["applied"].max() - timedelta(days=50)
    immature = frame.assign(defaulted=frame["defaulted"].mask(young & (frame["defaulted"] == 0)))
    data = dataset_of(immature, contract())
    assert data.positives / data.rows < 0.12
    assert data.rows > 0.95 * (~never & ~young).sum()


def test_when_all_labels_are_known_every_row_is_used() -> None:
    frame = table(rows=1000)
    frame.loc[995:, "defaulted"] = 1
    data = dataset_of(frame, contract())
    assert (data.rows, data.notices) == (1000, ())


def test_a_training_part_with_labels_of_the_test_s_time_says_so() -> None:
    (notice,) = split_by_time(dataset_of(table(rows=1000), contract())).notices
    assert "of the train part became known only after the test part had begun" in notice
    assert split_by_time(dataset_of(table(rows=1000), contract({"delay": "0s"}))).notices == ()


def test_rows_that_serving_would_refuse_are_told_of_and_refused_when_they_are_many() -> None:
    frame = table(rows=1000)
    frame.loc[:9, "income"] = 2e6
    data = dataset_of(frame, contract())
    assert data.notices == ("1.00% of 1000 rows would be refused in serving: income out of range in 1.00%",)
    with pytest.raises(InputError, match=r"loans.csv: 100.00% of 1000 rows would be refused.*income out of range in 100.00%"):
        dataset_of(frame.assign(income=frame["income"] * 100 + 1e6), contract(), source="loans.csv")
    needed = contract(more=[{"name": "sum", "description": "s", "dtype": "float", "range": [0, 9], "missing": "reject"}])
    with pytest.raises(InputError, match=r"sum missing in 25.00%"):
        dataset_of(frame.assign(sum=np.where(np.arange(1000) % 4, 5.0, np.nan)), needed)
    assert dataset_of(frame.assign(sum=np.nan), needed, compared_only=True).rows == 1000


def test_fewer_rows_than_a_drift_reference_needs_are_told_with_the_way_out() -> None:
    (notice,) = dataset_of(table(rows=999), contract({"delay": "0s"})).notices
    assert notice.startswith("the drift reference has 999 rows and needs 1000: drift jobs will answer Error")
    assert "`--min-rows 999`" in notice
    assert dataset_of(table(rows=1000), contract({"delay": "0s"})).notices == ()
    assert dataset_of(table(rows=999), contract({"delay": "0s"}), compared_only=True).notices == ()


def drop(column: str) -> Any:
    return lambda f: f.drop(columns=column)


def setting(column: str, value: Any) -> Any:
    return lambda f: f.assign(**{column: value})


@pytest.mark.parametrize(("change", "until", "expected"), [
    (setting("defaulted", 0), None, "no row has defaulted = 1"),
    (setting("defaulted", 1), None, "every row has defaulted = 1"),
    (lambda f: f.head(100), None, "training needs at least 200"),
    (drop("income"), None, "income"),
    (drop("home_type"), None, "home_type"),
    (drop("defaulted"), None, "defaulted"),
    (drop("applied"), None, "applied"),
    (drop("known"), None, "known"),
    (lambda f: f.rename(columns={"age_band": "age_bnd"}), None, r"age_band \(is it age_bnd\?\)"),
    (setting("home_type", "Rent"), None, "no value is a category of home: it holds 'Rent', …; the contract names 'rent'"),
    (setting("income", "much"), None, "income"),
    (setting("defaulted", 2), None, "0 or 1"),
    (lambda f: f, START + timedelta(days=1), "no negative label is known by"),
    (lambda f: f, START + timedelta(days=70), "choose a later --until"),
    (lambda f: f, datetime(2026, 1, 5), "has no time zone"),  # noqa: DTZ001 - that is the mistake
], ids=["no-positives", "no-negatives", "few-rows", "no-feature", "no-request-field", "no-label", "no-event-time", "no-label-time",
        "no-protected-attribute", "unknown-categories",
        "text-for-number", "label-2", "nothing-known-yet", "too-early", "naive-time"])
def test_unusable_data_is_refused_with_the_reason(change: Any, until: datetime | None, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as found:
        dataset_of(change(table()), contract(), until=until, source="loans.csv")
    assert found.value.exit_status == 2


def test_a_part_without_positives_is_named() -> None:
    frame = table()
    frame["defaulted"] = (np.arange(len(frame)) < 40).astype(int)
    with pytest.raises(InputError, match="validation part"):
        split_by_time(dataset_of(frame, contract({"delay": "0s"})))


def test_a_part_with_too_few_of_a_kind_to_measure_anything_is_named() -> None:
    data = dataset_of(table(rows=400), contract({"delay": "0s"}))
    with pytest.raises(InputError, match=r"validation part .*has 6 positive labels and 54 negative ones; each part needs 10 of both"):
        split_by_time(data)


def test_rows_without_a_label_yet_are_not_used() -> None:
    frame = table()
    frame["defaulted"] = frame["defaulted"].astype(float)
    frame.loc[frame.index[-50:], "defaulted"] = np.nan
    assert dataset_of(frame, contract()).rows == 750


ROWS, SHARE, SEED = st.integers(5_000, 60_000), st.floats(0.2, 1.0), st.integers(0, 9)


def labelled(rows: int, share: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(rows) < share


def newest_row(known: npt.NDArray[np.bool_]) -> int:
    """Up to which row, in order of time, labels count as mature."""
    found = mature_until(np.arange(len(known)), known)
    assert found is not None
    return found


def window(known: npt.NDArray[np.bool_], share: float) -> float:
    """Rows by which one is judged, where `share` is the lowest share of labels."""
    return min(max(known.sum() / 20, 100), WINDOW_LABELS_MAX) / share


@given(rows=ROWS, share=SHARE, begins=st.floats(0.0, 0.6), length=st.floats(0.0, 0.2), seed=SEED)
def test_a_gap_in_the_labels_of_long_ago_changes_nothing(rows: int, share: float, begins: float, length: float, seed: int) -> None:
    known = labelled(rows, share, seed)
    known[round(begins * rows) : round((begins + length) * rows)] = False
    assert newest_row(known) > rows - window(known, share)


@given(rows=ROWS, before=SHARE, left=st.floats(0.6, 1.0), since=st.floats(0.0, 0.6), seed=SEED)
def test_a_share_of_labels_that_is_lower_for_good_is_accepted(rows: int, before: float, left: float, since: float, seed: int) -> None:
    known = labelled(rows, before, seed)
    at = round(since * rows)
    known[at:] &= labelled(rows - at, left, seed + 10)
    assert newest_row(known) > rows - window(known, before * left)


@given(rows=ROWS, share=SHARE, positives=st.floats(0.0, 0.2), tail=st.floats(0.0, 0.7), gap=st.booleans(), seed=SEED)
def test_a_time_in_which_only_quick_positives_are_labelled_is_cut_away(
    rows: int, share: float, positives: float, tail: float, gap: bool, seed: int,
) -> None:
    known = labelled(rows, share, seed)
    mature = rows - round(tail * rows)
    known[mature:] &= labelled(rows - mature, positives, seed + 10)
    if gap:
        known[mature // 4 : mature // 3] = False
    assert abs(newest_row(known) - mature) < window(known, share)


@given(rows=st.integers(20_000, 60_000), share=st.floats(0.6, 1.0), time=st.floats(0.1, 0.25), seed=SEED)
def test_labels_that_come_little_by_little_are_used_where_most_are_there(rows: int, share: float, time: float, seed: int) -> None:
    falling = round(time * rows)
    arrived = np.concatenate([np.ones(rows - falling), np.linspace(1.0, 0.0, falling)])
    newest = newest_row(np.random.default_rng(seed).random(rows) < share * arrived)
    assert arrived[newest] > 0.5
    assert newest > rows - falling - window(np.ones(rows, bool), share)


@given(rows=st.integers(100, 5_000))
def test_when_all_labels_are_known_the_newest_row_is_mature_and_with_very_few_nothing_is_said(rows: int) -> None:
    assert newest_row(np.ones(rows, bool)) == rows - 1
    few = np.zeros(rows, bool)
    assert mature_until(np.arange(rows), few) is None, "no label at all"
    few[:99] = True
    assert mature_until(np.arange(rows), few) is None


def test_what_is_said_of_rows_left_out_is_true_also_where_no_more_labels_will_come() -> None:
    frame = table(rows=2000)
    never = (np.arange(2000) >= 1500) & (np.arange(2000) % 5 > 1)  # 40 % are labelled since then
    frame["defaulted"] = frame["defaulted"].astype(float).mask(never)
    data = dataset_of(frame, contract())
    (notice,) = data.notices
    assert f"{(~never).sum() - data.rows} rows after" in notice
    assert "labels of 39.8% of the rows since then are, of 99.8% before; where the others are still to come" in notice
    assert "If no more will come, leave rows without a label out of the data" in notice
    assert dataset_of(frame[~never], contract()).rows == (~never).sum(), "as the notice says"
