"""The training table holds what was known at each request's time, and the online store what is known at a chosen moment.

Everything runs against a real Feast repo: duckdb, SQLite and registry files in a temporary folder.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hafnium_contract.contract_file import load_contract, parse_contract
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_contract.progress import Silent
from hafnium_local.__main__ import app
from hafnium_training.feature_store import (
    FeatureRepo,
    apply,
    fresh_copy,
    join,
    materialise,
    open_repo,
    repository,
    write_repo,
)
from hafnium_training.feature_store.definitions import definitions_text, feature_store_yaml, service_name, view_specs
from hafnium_training.feature_store.join import LostRowsError
from hafnium_training.feature_store.sources import view_table
from hafnium_training.simulation import simulate

EXAMPLES = Path(__file__).parents[2] / "examples"
T0 = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def contract(**changes: Any) -> ModelContract:
    """A made-up contract: two views over two entities, fields of every type, one feature with an age of its own."""
    data: dict[str, Any] = {
        "schemaVersion": 1, "name": "loan-risk", "version": "2.1", "owner": "credit", "description": "loans",
        "data": {"requestId": "application", "eventTime": {"column": "at"}, "label": {"column": "defaulted"},
                 "labelTime": {"delay": "90d"}},
        "entities": [{"name": "applicant", "joinKey": "applicant_no", "description": "it's a person"},
                     {"name": "branch", "joinKey": "branch_no"}],
        "views": [{"name": "history", "entity": "applicant", "maxAge": "2d"},
                  {"name": "branch_stats", "entity": "branch", "maxAge": "36h"},
                  {"name": "unread", "entity": "branch", "maxAge": "1d"}],
        "features": [
            {"name": "amount", "description": "a", "dtype": "float", "unit": "EUR", "range": [0, 1e6]},
            {"name": "earlier_loans", "description": "it's a \"count\"", "dtype": "int", "range": [0, 100],
             "source": {"view": "history", "field": "count"}},
            {"name": "bounced", "description": "a", "dtype": "bool", "maxAge": "6h",
             "source": {"view": "history", "field": "bounced"}},
            {"name": "job", "description": "a", "dtype": "category", "categories": ["clerk", "smith"],
             "source": {"view": "history", "field": "job"}},
            {"name": "branch_loans", "description": "a", "dtype": "float", "range": [0, 1e6],
             "source": {"view": "branch_stats", "field": "count"}},
        ],
        "protected": [{"name": "sex"}],
        "decision": {"threshold": 0.5},
    }
    data.update(changes)
    return parse_contract(data)


HISTORY = ["applicant_no", "event_timestamp", "count", "bounced", "job"]
BRANCH = ["branch_no", "event_timestamp", "count"]
REQUEST = ["application", "at", "applicant_no", "branch_no", "amount", "defaulted", "sex"]


def write_data(folder: Path, requests: list[tuple[Any, ...]], history: list[tuple[Any, ...]], branches: list[tuple[Any, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(requests, columns=REQUEST).to_parquet(folder / "transactions.parquet", index=False)
    pd.DataFrame(history, columns=HISTORY).to_parquet(folder / "history.parquet", index=False)
    pd.DataFrame(branches, columns=BRANCH).to_parquet(folder / "branch_stats.parquet", index=False)
    return folder


def joined(tmp_path: Path, data: Path, c: ModelContract | None = None) -> pd.DataFrame:
    c = c or contract()
    repo = write_repo(c, data, tmp_path / "repo")
    report = join(c, repo, data, tmp_path / "flat.parquet", allow_missing=True)
    out = pd.read_parquet(tmp_path / "flat.parquet")
    assert report.rows_in == report.rows_out == len(out)
    return out


def request(n: int, at: datetime, applicant: str | None = "007", branch: str | None = "b") -> tuple[Any, ...]:
    return (f"q{n}", at, applicant, branch, 10.0 * n, n % 2, "f")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Values at T0 for applicant 007 and branch b, newer ones a day later."""
    return write_data(
        tmp_path / "data",
        [request(1, T0)],
        [("007", T0, 3, True, "smith"), ("007", T0 + DAY, 4, False, "clerk")],
        [("b", T0, 50.0), ("b", T0 + DAY, 60.0)],
    )


def test_a_value_counts_from_its_own_moment_to_its_maximum_age_and_no_longer(tmp_path: Path) -> None:
    us = timedelta(microseconds=1)
    moments = [T0 - us, T0, T0 + 6 * timedelta(hours=1), T0 + 6 * timedelta(hours=1) + us,
               T0 + 36 * timedelta(hours=1), T0 + 36 * timedelta(hours=1) + us, T0 + 2 * DAY, T0 + 2 * DAY + us]
    data = write_data(tmp_path / "data", [request(i, at) for i, at in enumerate(moments)],
                      [("007", T0, 3, True, "smith")], [("b", T0, 50.0)])
    out = joined(tmp_path, data)
    present = {name: (~out[name].isna()).tolist() for name in ("earlier_loans", "job", "bounced", "branch_loans")}
    assert present["earlier_loans"] == present["job"] == [False, True, True, True, True, True, True, False]
    assert present["bounced"] == [False, True, True, False, False, False, False, False], "its own age, 6 h"
    assert present["branch_loans"] == [False, True, True, True, True, False, False, False], "the other view's age, 36 h"
    assert out["earlier_loans"].iloc[1] == 3.0
    assert out["job"].iloc[1] == "smith"
    assert bool(out["bounced"].iloc[1]) is True


def test_every_request_stays_once_and_in_order_whatever_is_known_of_it(tmp_path: Path) -> None:
    requests = [
        request(9, T0 + DAY), request(2, T0, "nobody", "nowhere"), request(7, T0, None, None), request(1, T0),
        request(4, T0), request(5, T0), request(3, T0 - 900 * DAY),
    ]
    data = write_data(tmp_path / "data", requests, [("007", T0, 3, None, None)], [("b", T0, None), ("c", T0, 1.0)])
    out = joined(tmp_path, data)
    assert out["application"].tolist() == ["q9", "q2", "q7", "q1", "q4", "q5", "q3"]
    assert out["amount"].tolist() == [90.0, 20.0, 70.0, 10.0, 40.0, 50.0, 30.0]
    assert out["earlier_loans"].fillna(-1).tolist() == [3, -1, -1, 3, 3, 3, -1], "the same entity and moment, thrice"
    assert out[["bounced", "job", "branch_loans"]].isna().all().all(), "a row that knows nothing is no value"
    assert list(out.columns) == [
        "application", "at", "applicant_no", "branch_no", "amount", "defaulted", "sex", "earlier_loans", "bounced", "job",
        "branch_loans",
    ]


def test_the_folder_holds_the_contract_that_it_was_made_from(small: Path, tmp_path: Path) -> None:
    write_repo(contract(), small, tmp_path / "repo")
    found = load_contract(tmp_path / "repo" / "contract.yaml")
    assert found.digest == contract().digest
    report = materialise(found, tmp_path / "repo", until=T0 + DAY)
    assert [v.entities for v in report.views] == [1, 1], "the folder is all that the job on a cluster has"


def test_the_report_says_how_much_is_missing(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", [request(1, T0), request(2, T0, "x")], [("007", T0, 1, True, "smith")], [("b", T0, 1.0)])
    repo = write_repo(contract(), data, tmp_path / "repo")
    report = join(contract(), repo, data, tmp_path / "flat.csv")
    assert report.missing == {"amount": 0.0, "earlier_loans": 0.5, "bounced": 0.5, "job": 0.5, "branch_loans": 0.0}
    assert report.seconds > 0
    text = (tmp_path / "flat.csv").read_text().splitlines()
    assert len(text) == 3
    assert "007" in text[1]


def test_the_table_never_replaces_what_it_is_made_from(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    (tmp_path / "link.parquet").symlink_to(small / "transactions.parquet")
    for out in (small / "transactions.parquet", small / "history.parquet", repo.path / "sources" / "history.parquet",
                tmp_path / "link.parquet"):
        before = out.read_bytes()
        with pytest.raises(InputError, match="is read here"):
            join(c, repo, small, out)
        assert out.read_bytes() == before


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize(("job", "found"), [
    (["1.0", "2.0"], ["1.0", None, "2.0"]), (["1", "2"], ["1", None, "2"]),
], ids=["fractions", "whole"])
def test_a_view_holds_categories_as_the_contract_writes_them(tmp_path: Path, ending: str, job: list[str], found: list[str | None]) -> None:
    features = [f.model_dump(mode="json") for f in contract().features]
    features[3]["categories"] = job
    c = contract(features=features)
    history = pd.DataFrame({
        "applicant_no": ["a", "b", "c"], "event_timestamp": [T0] * 3, "count": 1, "bounced": True, "job": [1.0, None, 2.0],
    })
    flat = history.rename(columns={"event_timestamp": "at"}).assign(defaulted=0, amount=1.0, sex="f", branch_no="b")
    for name, frame in (("history", history), ("flat", flat)):
        file = tmp_path / f"{name}{ending}"
        frame.to_csv(file, index=False) if ending == ".csv" else frame.to_parquet(file)
    (spec,) = (s for s in view_specs(c) if s.view.name == "history")
    for data in (tmp_path, tmp_path / f"flat{ending}"):
        assert view_table(c, spec, data).sort_values("applicant_no")["job"].tolist() == found, data


def test_a_looked_up_feature_without_a_single_value_is_refused_with_the_likely_reason(tmp_path: Path) -> None:
    c = contract()
    data = write_data(tmp_path / "keys", [request(1, T0, "A-7")], [("7", T0, 3, True, "smith")], [("b", T0, 50.0)])
    repo = write_repo(c, data, tmp_path / "repo")
    said = r"no row has a value of earlier_loans, bounced, job\.(.|\n)*history: 0 of 1 values of applicant_no .*'A-7' here and '7' there"
    with pytest.raises(InputError, match=said):
        join(c, repo, data, tmp_path / "flat.parquet")
    assert not (tmp_path / "flat.parquet").exists()
    assert join(c, repo, data, tmp_path / "flat.parquet", allow_missing=True).missing["job"] == 1.0
    old = write_data(tmp_path / "old", [request(1, T0 + 9 * DAY)], [("007", T0, 3, True, "smith")], [("b", T0 + 9 * DAY, 50.0)])
    with pytest.raises(InputError, match=r"1 of 1 values of applicant_no .* older than maxAge"):
        join(c, write_repo(c, old, tmp_path / "repo"), old, tmp_path / "flat.parquet")


def test_the_command_for_all_three_steps_has_the_option_that_its_refusal_names(tmp_path: Path) -> None:
    data = write_data(tmp_path / "keys", [request(1, T0, "A-7")], [("7", T0, 3, True, "smith")], [("b", T0, 50.0)])
    known = write_repo(contract(), data, tmp_path / "other").path / "contract.yaml"
    arguments = ["features", "build", "--until", "2026-03-02", *(f"--{name}={path}" for name, path in {
        "contract": known, "data": data, "repo": tmp_path / "repo", "out": tmp_path / "flat.parquet"}.items())]
    refused = CliRunner().invoke(app, arguments)
    assert "If that is meant: --allow-missing" in str(refused.exception)
    assert not (tmp_path / "flat.parquet").exists()
    done = CliRunner().invoke(app, [*arguments, "--allow-missing"])
    assert (done.exit_code, done.exception) == (0, None)
    assert pd.read_parquet(tmp_path / "flat.parquet")["job"].isna().all()
    assert "online store as of 2026-03-02" in done.output


def test_a_protected_attribute_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    c = contract(protected=[{"name": "sexe"}])
    data = write_data(tmp_path / "data", [request(1, T0)], [("007", T0, 3, True, "smith")], [("b", T0, 50.0)])
    with pytest.raises(InputError, match=r"column missing: sexe \(is it sex\?\)"):
        join(c, write_repo(c, data, tmp_path / "repo"), data, tmp_path / "flat.parquet")


def test_a_table_that_can_not_be_written_leaves_the_old_one(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    (tmp_path / "flat.parquet").mkdir()
    with pytest.raises(HafniumError, match=r"flat\.parquet: can't be written: .*; nothing was left behind"):
        join(c, repo, small, tmp_path / "flat.parquet")
    assert not list(tmp_path.glob(".flat*"))


def naive(c: ModelContract, requests: pd.DataFrame, views: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What the join means, written down with pandas alone: the newest row at or before, unless it is too old."""
    out = pd.DataFrame(index=requests.index)
    for view in c.views:
        if not c.features_of(view.name):
            continue
        key = c.entity(view.entity).join_key
        rows = views[view.name].sort_values("event_timestamp", kind="stable")
        rows = rows.drop_duplicates([key, "event_timestamp"], keep="last")
        rows = rows.assign(event_timestamp=rows["event_timestamp"].astype("datetime64[us, UTC]"))
        rows["as_of"] = rows["event_timestamp"]
        left = requests.assign(**{key: requests[key].fillna("?"), "order": np.arange(len(requests))})
        left["at"] = left["at"].astype("datetime64[us, UTC]")
        got = pd.merge_asof(left.sort_values("at", kind="stable")[["order", "at", key]], rows,
                            left_on="at", right_on="event_timestamp", by=key).sort_values("order")
        age = got["at"] - got["as_of"]
        for f in c.features_of(view.name):
            assert isinstance(f.source, FromView)
            values = got[f.source.field].where(age <= pd.Timedelta(f.max_age or view.max_age))
            out[f.name] = values.to_numpy()
    return out


def same(left: pd.Series[Any], right: pd.Series[Any]) -> bool:
    missing = left.isna().to_numpy()
    if not (missing == right.isna().to_numpy()).all():
        return False
    return bool((left[~missing].astype(object).to_numpy() == right[~missing].astype(object).to_numpy()).all())


_HOURS = st.integers(0, 24 * 5)
_REQUESTS = st.lists(st.tuples(_HOURS, st.sampled_from(["a", "b", "c", None]), st.sampled_from(["x", "y", None])), min_size=1, max_size=30)
_HISTORY = st.lists(st.tuples(
    st.sampled_from(["a", "b", "d"]), _HOURS, st.one_of(st.none(), st.integers(0, 100)), st.sampled_from([True, False, None]),
    st.sampled_from(["smith", "clerk", "other", None])), min_size=1, max_size=30)
_BRANCHES = st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), _HOURS, st.floats(0, 1e6, width=32)), min_size=1, max_size=30)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_REQUESTS, _HISTORY, _BRANCHES)
def test_the_join_is_the_naive_one(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Any], history: list[Any], branches: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    hour = timedelta(hours=1)
    data = write_data(
        folder / "data",
        [request(i, T0 + h * hour, a, b) for i, (h, a, b) in enumerate(requests)],
        [(k, T0 + h * hour, *rest) for k, h, *rest in history],
        [(k, T0 + h * hour, value) for k, h, value in branches],
    )
    c = contract()
    out = joined(folder, data, c)
    views = {name: pd.read_parquet(data / f"{name}.parquet") for name in ("history", "branch_stats")}
    expected = naive(c, pd.read_parquet(data / "transactions.parquet"), views)
    for name in expected.columns:
        assert same(out[name], expected[name]), name


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelContract, Path, FeatureRepo, pd.DataFrame]:
    """A simulated issuer, its repo and its training table."""
    folder = tmp_path_factory.mktemp("issuer")
    c = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    simulate(folder / "data", days=12, seed=2, customers=200, terminals=80, transactions_per_day=400)
    repo = write_repo(c, folder / "data", folder / "repo")
    join(c, repo, folder / "data", folder / "flat.parquet")
    return c, folder, repo, pd.read_parquet(folder / "flat.parquet")


def test_a_simulated_month_joins_as_the_naive_way_does_also_in_several_queries(
    simulated: tuple[ModelContract, Path, FeatureRepo, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, folder, repo, flat = simulated
    requests = pd.read_parquet(folder / "data" / "transactions.parquet").rename(columns={"event_time": "at"})
    views = {v.name: pd.read_parquet(folder / "data" / f"{v.name}.parquet") for v in c.views}
    expected = naive(c, requests, views)
    assert len(expected.columns) == 8
    for name in expected.columns:
        assert same(flat[name], expected[name].astype(float)), name
    # the package's `join` is the function, which hides the module of that name
    monkeypatch.setattr(sys.modules["hafnium_training.feature_store.join"], "CHUNK_ROWS", 700)
    join(c, repo, folder / "data", tmp_path / "again.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "again.parquet"), flat)


def online(repo: FeatureRepo, entity: dict[str, str]) -> dict[str, Any]:
    """What a server reads: values by `view__field`."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(repo.path))
    service = store.get_feature_service(repo.service)
    got = store.get_online_features(features=service, entity_rows=[entity], full_feature_names=True).to_dict()
    return {name: values[0] for name, values in got.items()}


@pytest.mark.parametrize("until", [datetime(2026, 1, 4, tzinfo=UTC), datetime(2026, 1, 9, 17, 30, tzinfo=UTC)], ids=["midnight", "day"])
def test_online_values_are_those_that_the_join_gives_for_that_moment(
    simulated: tuple[ModelContract, Path, FeatureRepo, pd.DataFrame], tmp_path: Path, until: datetime
) -> None:
    c, folder, original, _ = simulated
    repo = open_repo(c, fresh_copy(original, tmp_path / "store"))
    report = materialise(c, repo, until=until)
    assert [v.view for v in report.views] == ["customer_features", "network_features"]
    assert all(v.newest is not None and v.newest <= until for v in report.views)
    # The same entities asked off-line at that moment.
    sample = pd.read_parquet(folder / "data" / "transactions.parquet").drop_duplicates("customer_id").head(40)
    asked = tmp_path / "asked"
    asked.mkdir()
    sample.assign(event_time=pd.Timestamp(until), label_time=pd.Timestamp(until)).to_parquet(asked / "transactions.parquet")
    join(c, repo, asked, tmp_path / "then.parquet")
    offline = pd.read_parquet(tmp_path / "then.parquet")
    present = 0
    for _, row in offline.iterrows():
        got = online(repo, {"customer_id": row["customer_id"], "terminal_id": row["terminal_id"]})
        for f in c.features:
            if isinstance(f.source, FromView):
                value = got[f"{f.source.view}__{f.source.field}"]
                assert (value is None) == pd.isna(row[f.name]), f.name
                assert value is None or value == row[f.name], f.name
                present += value is not None
    assert present > 200


def test_going_back_in_time_leaves_nothing_from_the_future(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    key = {"applicant_no": "007", "branch_no": "b"}
    assert online(repo, key)["history__count"] is None
    first = materialise(c, repo, until=T0 + DAY + timedelta(hours=1))
    assert not first.emptied
    assert online(repo, key)["history__count"] == 4.0
    assert online(repo, key)["history__bounced"] is False
    back = materialise(c, repo, until=T0)
    assert back.emptied
    got = online(repo, key)
    assert (got["history__count"], got["history__bounced"], got["history__job"], got["branch_stats__count"]) == (3.0, True, "smith", 50.0)
    assert materialise(c, repo, until=T0 - DAY, since=T0 - 2 * DAY).emptied
    assert online(repo, key)["history__count"] is None


def test_a_value_that_went_missing_replaces_the_one_before(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", [request(1, T0)], [("007", T0, 3, True, "smith"), ("007", T0 + DAY, None, None, None)],
                      [("b", T0, 1.0)])
    c = contract()
    repo = write_repo(c, data, tmp_path / "repo")
    materialise(c, repo, until=T0)
    materialise(c, repo, until=T0 + DAY)
    assert online(repo, {"applicant_no": "007", "branch_no": "b"})["history__count"] is None


def test_since_limits_what_is_written_and_the_maximum_age_does_anyway(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    assert [v.entities for v in materialise(c, repo, until=T0 + 5 * DAY).views] == [0, 0], "all is too old by then"
    repo = write_repo(c, small, tmp_path / "repo")
    report = materialise(c, repo, until=T0 + DAY, since=T0 + DAY)
    assert [(v.entities, v.oldest) for v in report.views] == [(1, T0 + DAY), (1, T0 + DAY)]


def test_moments_without_an_offset_or_in_the_wrong_order_are_refused(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    with pytest.raises(InputError, match="with an offset"):
        materialise(c, repo, until=datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(InputError, match="is after until"):
        materialise(c, repo, until=T0, since=T0 + DAY)


def test_a_copy_is_a_store_of_its_own(small: Path, tmp_path: Path) -> None:
    c = contract()
    first = write_repo(c, small, tmp_path / "repo")
    materialise(c, first, until=T0)
    second = open_repo(c, fresh_copy(first, tmp_path / "copy"))
    key = {"applicant_no": "007", "branch_no": "b"}
    assert online(second, key)["history__count"] == 3.0, "the values came along"
    materialise(c, second, until=T0 + DAY)
    assert (online(first, key)["history__count"], online(second, key)["history__count"]) == (3.0, 4.0)
    # Its sources are its own, too: the original's may go.
    for file in (first.path / "sources").iterdir():
        file.unlink()
    assert join(c, second, small, tmp_path / "flat.parquet").missing["earlier_loans"] == 0.0
    with pytest.raises(InputError, match="exists already"):
        fresh_copy(first, tmp_path / "copy")
    with pytest.raises(InputError, match="is no feature repo"):
        fresh_copy(tmp_path / "data", tmp_path / "copy2")


def test_a_folder_that_was_moved_by_hand_works_where_it_is_now(small: Path, tmp_path: Path) -> None:
    c = contract()
    write_repo(c, small, tmp_path / "repo")
    moved = (tmp_path / "repo").rename(tmp_path / "elsewhere")
    assert join(c, moved, small, tmp_path / "flat.parquet").missing["earlier_loans"] == 0.0
    assert materialise(c, moved, until=T0).views[0].entities == 1


def test_a_store_that_drops_rows_is_found_out(tmp_path: Path) -> None:
    """Feast's own default off-line store does so: real, not made up."""
    requests = [request(1, T0), request(2, T0, "007", "b"), request(3, T0 - 9 * DAY), request(4, T0 - 9 * DAY, "x", "y")]
    data = write_data(tmp_path / "data", requests, [("007", T0, 3, True, "smith")], [("b", T0, 1.0)])
    c = contract()
    repo = write_repo(c, data, tmp_path / "repo")
    config = repo.path / "feature_store.yaml"
    config.write_text(config.read_text().replace("type: duckdb", "type: dask"))
    with pytest.raises(LostRowsError, match=r"asked for 4 rows and gave \d; \d are gone \(q.*duckdb"):
        join(c, repo, data, tmp_path / "flat.parquet")
    assert not (tmp_path / "flat.parquet").exists()


def test_views_split_out_of_one_csv_give_its_own_values_back(tmp_path: Path) -> None:
    """A third contract over a plain CSV: numeric times, keys with leading zeros, columns named by feature or field."""
    c = contract(data={"requestId": "application", "eventTime": {"column": "at", "unit": "ms", "origin": "2026-01-01T00:00:00Z"},
                       "label": {"column": "defaulted"}, "labelTime": {"delay": "1d"}},
                 views=[{"name": "history", "entity": "applicant", "maxAge": "2d"},
                        {"name": "branch_stats", "entity": "branch", "maxAge": "36h"}],
                 protected=[],
                 features=[{"name": "amount", "description": "a", "dtype": "float", "range": [0, 1e6]},
                           {"name": "earlier_loans", "description": "a", "dtype": "int", "range": [0, 100],
                            "source": {"view": "history", "field": "n_loans"}},
                           {"name": "job", "description": "a", "dtype": "category", "categories": ["clerk"],
                            "source": {"view": "history", "field": "job"}},
                           {"name": "bounced", "description": "a", "dtype": "bool", "source": {"view": "branch_stats", "field": "b"}}])
    rows = ["application,at,applicant_no,branch_no,amount,earlier_loans,job,b,defaulted"]
    rows += [
        f"q{i},{i * 3_600_000},{i % 4:03d},{i % 3},{i},{i},{'clerk' if i % 2 else ''},{'true' if i % 5 else 'false'},0"
        for i in range(60)
    ]
    file = tmp_path / "loans.csv"
    file.write_text("\n".join(rows) + "\n")
    repo = write_repo(c, file, tmp_path / "repo")
    join(c, repo, file, tmp_path / "flat.parquet")
    flat = pd.read_parquet(tmp_path / "flat.parquet")
    assert flat["earlier_loans"].tolist() == list(range(60))
    assert flat["job"].fillna("-").tolist() == ["clerk" if i % 2 else "-" for i in range(60)]
    assert flat["bounced"].astype(bool).tolist() == [bool(i % 5) for i in range(60)]
    assert flat["applicant_no"].tolist()[:5] == ["000", "001", "002", "003", "000"]
    materialise(c, repo, until=datetime(2026, 1, 2, 12, 30, tzinfo=UTC))
    got = online(repo, {"applicant_no": "000", "branch_no": "0"})
    assert (got["history__n_loans"], got["branch_stats__b"]) == (36.0, True)


def test_views_may_be_csv_files_with_keys_that_look_like_numbers(small: Path, tmp_path: Path) -> None:
    (small / "history.parquet").unlink()
    (small / "history.csv").write_text(
        "applicant_no,event_timestamp,count,bounced,job\n007,2026-03-01T00:00:00Z,3,true,12\n008,2026-03-01,4,,\n"
    )
    out = joined(tmp_path, small)
    assert out[["earlier_loans", "bounced", "job"]].to_numpy().tolist() == [[3.0, True, "12"]]


def test_a_contract_without_views_passes_its_columns_through(tmp_path: Path) -> None:
    c = load_contract(EXAMPLES / "creditcard" / "contract.yaml")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"Time": [0, 1, 1, 90_000], **{f"V{i}": rng.normal(size=4) for i in range(1, 29)},
                          "Amount": [1.0, 2.0, 3.0, 4.0], "Class": [0, 0, 1, 0], "extra": [1, 2, 3, 4]})
    frame.to_csv(tmp_path / "card.csv", index=False)
    said: list[str] = []

    class Heard(Silent):
        def event(self, text: str) -> None:
            said.append(text)

    repo = write_repo(c, tmp_path / "card.csv", tmp_path / "repo", progress=Heard())
    assert repo.views == ()
    report = join(c, None, tmp_path / "card.csv", tmp_path / "flat.parquet", progress=Heard())
    assert (report.rows_in, report.rows_out) == (4, 4)
    assert "hour_of_day" not in report.missing
    flat = pd.read_parquet(tmp_path / "flat.parquet")
    assert "extra" not in flat.columns
    np.testing.assert_array_equal(flat["V17"], frame["V17"])
    assert materialise(c, repo, until=T0, progress=Heard()).views == ()
    assert len(said) == 3
    assert all("no views" in text for text in said)


def test_a_repo_of_another_contract_or_of_an_older_one_is_refused(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    with pytest.raises(InputError, match=r"is the repo of 'loan_risk', the contract is 'unified_risk''s"):
        open_repo(load_contract(EXAMPLES / "unified-risk" / "contract.yaml"), repo)
    features = [f.model_dump(mode="json") for f in c.features]
    features[1]["source"]["field"] = "n"
    with pytest.raises(InputError, match=r"view history has no field n; run `hafnium features apply`"):
        open_repo(contract(features=features), repo)
    views = [v.model_dump(mode="json") for v in c.views]
    features[1]["source"] = {"view": "unread", "field": "n"}
    with pytest.raises(InputError, match="has no view unread"):
        open_repo(contract(features=features, views=views), repo)
    with pytest.raises(InputError, match=r"feature_store.yaml: can't be read"):
        open_repo(c, tmp_path / "nothing")
    (repo.path / "registry.db").unlink()
    with pytest.raises(InputError, match=r"has no registry\.db"):
        join(c, repo, small, tmp_path / "flat.parquet")
    assert apply(c, repo.path).service == "loan_risk_v2_1"
    with pytest.raises(InputError, match="give the feature repo"):
        join(c, None, small, tmp_path / "flat.parquet")
    with pytest.raises(InputError, match=r"ends in .parquet or .csv"):
        join(c, repo, small, tmp_path / "flat.xlsx")


@pytest.mark.parametrize("killed_at", ["write_source", "definitions_text", "apply"])
def test_a_repo_whose_making_was_cut_off_can_be_made_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str,
) -> None:
    def killed(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(repository, killed_at, killed)
        with pytest.raises(KeyboardInterrupt):
            write_repo(contract(), small, tmp_path / "repo")
    write_repo(contract(), small, tmp_path / "repo")
    assert join(contract(), tmp_path / "repo", small, tmp_path / "flat.parquet").rows_out > 0


def test_a_copy_that_was_cut_off_can_be_made_again(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    first = write_repo(contract(), small, tmp_path / "repo")
    with monkeypatch.context() as patched:
        patched.setattr(repository, "_apply_definitions", killed)
        with pytest.raises(KeyboardInterrupt):
            fresh_copy(first, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert open_repo(contract(), fresh_copy(first, tmp_path / "copy")).views


def test_data_that_lacks_what_a_view_needs_leaves_the_earlier_repo_whole(small: Path, tmp_path: Path) -> None:
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    before = {p: p.read_bytes() for p in repo.path.rglob("*") if p.is_file()}
    pd.DataFrame([("b", T0)], columns=["branch_no", "event_timestamp"]).to_parquet(small / "branch_stats.parquet")
    with pytest.raises(InputError, match=r"branch_stats.parquet: column missing: count"):
        write_repo(c, small, tmp_path / "repo")
    (small / "branch_stats.parquet").unlink()
    with pytest.raises(InputError, match=r"has no branch_stats\.parquet"):
        write_repo(c, small, tmp_path / "repo")
    pd.DataFrame([(None, T0, 1.0)], columns=BRANCH).to_parquet(small / "branch_stats.parquet")
    with pytest.raises(InputError, match="no row has a value in branch_no"):
        write_repo(c, small, tmp_path / "repo")
    pd.DataFrame([("b", T0, "many")], columns=BRANCH).to_parquet(small / "branch_stats.parquet")
    with pytest.raises(InputError, match=r"column count: .*expected a column of numbers"):
        write_repo(c, small, tmp_path / "repo")
    assert {p: p.read_bytes() for p in repo.path.rglob("*") if p.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds other things"):
        write_repo(c, small, tmp_path / "full")


@pytest.mark.parametrize(("age", "ttl"), [("0s", 1), ("1500ms", 2), ("90m", 5400), ("1d", 86_400), ("36h", 172_800), ("3d", 259_200)])
def test_an_age_that_feast_cannot_express_is_rounded_up_and_the_rest_is_blanked_by_the_join(
    tmp_path: Path, age: str, ttl: int
) -> None:
    views = [v.model_dump(mode="json") for v in contract().views]
    views[1]["maxAge"] = age
    c = contract(views=views)
    spec = view_specs(c)[1]
    assert spec.ttl == timedelta(seconds=ttl)
    us = timedelta(microseconds=1)
    moments = [T0, T0 + spec.view.max_age, T0 + spec.view.max_age + us]
    requests = [request(i, at) for i, at in enumerate(moments)]
    data = write_data(tmp_path / "data", requests, [("007", T0, 3, True, "smith")], [("b", T0, 50.0)])
    out = joined(tmp_path, data, c)
    assert out["branch_loans"].notna().tolist() == [True, True, False]


def test_fields_that_feast_would_lose_are_refused() -> None:
    features = [f.model_dump(mode="json") for f in contract().features]
    features[1]["source"]["field"] = "salary_y"
    with pytest.raises(InputError, match="ends in `_y`"):
        view_specs(contract(features=features))
    features[1]["source"]["field"] = "job"
    with pytest.raises(InputError, match="field job is read as int by earlier_loans and as category by job"):
        view_specs(contract(features=features))
    features[1]["source"]["field"] = "event_timestamp"
    with pytest.raises(InputError, match="can't be called"):
        view_specs(contract(features=features))


@pytest.mark.slow
def test_definitions_are_plain_feast_and_feasts_own_command_takes_them(small: Path, tmp_path: Path) -> None:
    c = contract()
    text = definitions_text(c)
    assert "hafnium_contract" not in text
    assert "hafnium_training" not in text
    assert service_name(c) == "loan_risk_v2_1"
    assert "unread" not in text, "a view that no feature reads is not looked up"
    repo = write_repo(c, small, tmp_path / "repo")
    (repo.path / "registry.db").unlink()
    feast = Path(sys.executable).with_name("feast")
    done = subprocess.run([feast, "apply"], cwd=repo.path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert materialise(c, open_repo(c, repo), until=T0).views[0].entities == 1


def test_redis_is_named_in_the_configuration_and_is_not_copied(small: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(feature_store_yaml(contract(), redis="cache:6379,ssl=true"))
    assert config["online_store"] == {"type": "redis", "connection_string": "cache:6379,ssl=true"}
    assert config["registry"]["path"] == "registry.db"
    folder = tmp_path / "redis"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(feature_store_yaml(contract(), redis="cache:6379"))
    with pytest.raises(InputError, match="its values are in Redis"):
        fresh_copy(folder, tmp_path / "copy")


@pytest.mark.parametrize(("password", "said"), [
    ("s3cret,0ther", "splits at commas"), ("s3cret,n4me=v4lue", "splits at commas"), ("s3cret: x", "mapping values"),
])
def test_a_password_that_feast_would_take_apart_is_refused_before_it_is_shown(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str, said: str,
) -> None:
    repo = write_repo(contract(), small, tmp_path / "repo", redis="${HAFNIUM_REDIS}")
    monkeypatch.setenv("HAFNIUM_REDIS", f"127.0.0.1:1,password={password}")
    with pytest.raises(InputError, match=said) as e:
        materialise(contract(), repo, until=T0)
    assert not any(part in str(e.value) for part in ("s3cret", "0ther", "n4me", "v4lue"))


def test_a_step_back_in_time_on_redis_is_refused_since_redis_keeps_the_newer_values(small: Path, tmp_path: Path) -> None:
    repo = write_repo(contract(), small, tmp_path / "repo", redis="127.0.0.1:1")
    assert repo.online == "redis"
    (repo.path / "materialised.json").write_text('{"until": "2026-03-02T00:00:00+00:00"}')
    with pytest.raises(InputError, match=r"filled up to 2026-03-02.*use another database"):
        materialise(contract(), repo, until=T0)


def test_work_leaves_the_working_directory_and_the_output_alone(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    c = contract()
    repo = write_repo(c, small, tmp_path / "repo")
    join(c, repo, small, tmp_path / "flat.parquet")
    materialise(c, repo, until=T0)
    assert list(here.iterdir()) == []
    assert Path.cwd() == here
    assert capfd.readouterr() == ("", "")
