"""Reading the inference log: which rows, how many in memory, and what is not a log file."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.bundle import Bundle
from hafnium_contract.inference_log import logged_features
from hafnium_monitoring.errors import LogReadError
from hafnium_monitoring.kept_rows import LabelledSample
from hafnium_monitoring.log_places import log_places
from hafnium_monitoring.windows import ALL_ARMS, CANDIDATE_ARMS, STABLE_ARMS, InferenceLog, LogRows, Selection

from .conftest import NOW, START, Matrix, write_log


def selection(bundle: Bundle, arms: frozenset[str] = ALL_ARMS, start: datetime = START, end: datetime = NOW) -> Selection:
    return Selection(bundle.manifest.digest, bundle.manifest.model_version, arms, start, end)


def names(bundle: Bundle) -> list[str]:
    return [f.name for f in logged_features(bundle.contract)]


def test_windows_that_touch_share_no_row_and_lose_none(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    write_log(tmp_path, stable_bundle, population[:3_600], "stable", files=7)
    log = InferenceLog([tmp_path])
    cuts = [START + timedelta(seconds=s) for s in (0, 1, 60, 1_111.5, 3_600)]
    counts = [log.count(selection(stable_bundle, start=a, end=b)) for a, b in itertools.pairwise(cuts)]
    assert sum(counts) == 3_600
    assert counts[:2] == [1, 59]


def test_rows_keep_their_values(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    write_log(tmp_path, stable_bundle, population[:500], "stable")
    rows = InferenceLog([tmp_path]).read(selection(stable_bundle), names(stable_bundle), rows_max=1_000, seed=0)
    assert (rows.total, rows.kept) == (500, 500)
    for name in names(stable_bundle):
        column = population[:500, stable_bundle.contract.input_names.index(name)]
        np.testing.assert_array_equal(rows.features[name], column)


def test_shadow_rows_are_the_candidates_and_another_digest_is_nobodys(
    tmp_path: Path, candidate_bundle: Bundle, stable_bundle: Bundle, population: Matrix,
) -> None:
    write_log(tmp_path, candidate_bundle, population[:30], "shadow", ids="a")
    write_log(tmp_path, candidate_bundle, population[:20], "candidate", ids="b")
    write_log(tmp_path, candidate_bundle, population[:10], "stable", ids="c")
    write_log(tmp_path / "other", candidate_bundle, population[:40], "candidate", digest=stable_bundle.manifest.digest)
    log = InferenceLog([tmp_path, tmp_path / "other"])
    assert log.count(selection(candidate_bundle, CANDIDATE_ARMS)) == 50
    assert log.count(selection(candidate_bundle, STABLE_ARMS)) == 10
    assert log.count(selection(candidate_bundle)) == 60


def test_beyond_the_limit_a_seeded_uniform_sample_is_kept(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    write_log(tmp_path, stable_bundle, population, "stable", files=40)
    log = InferenceLog([tmp_path])

    def read(seed: int) -> list[str]:
        rows = log.read(selection(stable_bundle), ["transaction_amount"], rows_max=1_000, seed=seed)
        assert (rows.total, rows.kept) == (20_000, 1_000)
        return [str(i) for i in rows.request_id]

    first = read(1)
    assert first == read(1)
    assert first != read(2)
    position = np.array([int(i.removeprefix("r-")) for i in first])
    # uniform over the log: each quarter has 250 ± 5 standard deviations
    assert np.abs(np.bincount(position // 5_000) - 250).max() < 70


def test_beyond_the_limit_rows_that_may_be_positive_and_high_scores_stay_and_the_others_are_drawn_evenly(
    tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    write_log(tmp_path, stable_bundle, population, "stable", files=40)
    log = InferenceLog([tmp_path])
    ids = [f"r-{i}" for i in range(0, 20_000, 100)]
    everything = log.read(selection(stable_bundle), [], rows_max=20_000, seed=0, positives=lambda: pytest.fail("all rows fit"))
    assert everything.kept == 20_000
    assert set(everything.weight) == {1.0}
    means: list[float] = []
    for seed in range(8):
        rows = log.read(selection(stable_bundle), [], rows_max=1_000, seed=seed, positives=partial(pa.array, [*ids, "of another window"]))
        assert (rows.total, rows.kept, rows.weight.sum()) == (20_000, 1_200, pytest.approx(20_000))
        assert set(ids) <= set(rows.request_id[rows.weight == 1])
        unsuspected = everything.score[~np.isin(everything.request_id.astype(str), ids)]
        assert set(np.sort(unsuspected)[-500:]) <= set(rows.score[rows.weight == 1])
        means.append(float(np.average(rows.score, weights=rows.weight)))
    assert np.mean(means) == pytest.approx(everything.score.mean(), rel=0.02)


def test_where_all_scores_are_equal_rows_are_still_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    sample = LabelledSample(1_000, rng, partial(pa.array, [], pa.string()))
    for start in range(0, 20_000, 500):
        n = np.arange(start, start + 500)
        sample.add(pa.table({"request_id": n.astype(str), "score": np.full(500, np.nan if start < 500 else 0.5, np.float32), "n": n}))
    [(high, one), (others, weight)] = sample.kept()
    assert (len(high), one, len(others), weight) == (500, 1.0, 500, 39.0)
    drawn = others["n"].to_numpy()
    assert abs(np.average(drawn < 10_000) - (9_500 / 19_500)) < 0.1


def test_an_empty_folder_and_a_missing_one_have_no_rows(tmp_path: Path, stable_bundle: Bundle) -> None:
    rows = InferenceLog([tmp_path, tmp_path / "absent"]).read(selection(stable_bundle), ["velocity_24h"], rows_max=10, seed=0)
    assert (rows.total, rows.kept, rows.features["velocity_24h"].size) == (0, 0, 0)


@pytest.mark.skipif(os.name != "posix", reason="needs the modes of POSIX")
@pytest.mark.parametrize("below", ["date=2026-01-15", "date=2026-01-15/model_version=1"])
def test_a_partition_that_may_not_be_read_is_an_error_and_not_an_empty_one(
    below: str, tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    write_log(tmp_path, stable_bundle, population[:100], "stable")
    program = (
        "import os, sys\nfrom datetime import datetime, UTC\nfrom hafnium_monitoring.log_places import FolderPlace\n"
        "from hafnium_monitoring.errors import LogReadError\nfrom pathlib import Path\n"
        "place, when = FolderPlace(Path(sys.argv[1])), datetime(2026, 1, 15, tzinfo=UTC)\nassert place.files(when, '1')\n"
        "os.chmod(sys.argv[2], 0o700)\nif os.getuid() == 0:\n    os.setuid(65534)\nelse:\n    os.chmod(sys.argv[2], 0)\n"
        "try:\n    print('files', place.files(when, '1'))\nexcept LogReadError as e:\n    print(e)\n"
    )
    for folder in tmp_path.parents[:3]:  # pytest's own folders are its user's alone
        folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(tmp_path / below)], capture_output=True, text=True, timeout=60, check=False)
    assert "can't be listed (Permission denied)" in done.stdout, done.stdout + done.stderr


def test_a_log_that_is_a_file_is_an_error_that_names_it(tmp_path: Path, stable_bundle: Bundle) -> None:
    path = tmp_path / "log"
    path.write_text("not a folder")
    with pytest.raises(LogReadError, match=str(path)):
        InferenceLog([path]).count(selection(stable_bundle))


def test_one_log_under_several_names_is_read_once(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    folder = tmp_path / "log"
    write_log(folder, stable_bundle, population[:300], "stable")
    (tmp_path / "link").symlink_to(folder)
    log = InferenceLog([folder, folder, f"{folder}/", folder.as_uri(), tmp_path / "link", f"{tmp_path}/x/../log", tmp_path / "other"])
    assert log.count(selection(stable_bundle)) == 300


def test_one_bucket_under_several_names_is_one_place() -> None:
    same = ["s3://b/p", "s3://b/p/", "s3://b/p?region=eu-central-1", "s3://b/p?allow_bucket_creation=true"]
    assert len(log_places(same)) == 1
    assert len(log_places([*same, "s3://b/q", "s3://c/p", "s3://b/p?endpoint_override=h:1"])) == 4


def place(folder: Path, bundle: Bundle) -> Path:
    path = folder / f"date={START:%Y-%m-%d}" / f"model_version={bundle.manifest.model_version}" / "part-20260115T120000-x.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def half_written(path: Path, folder: Path, bundle: Bundle, population: Matrix) -> None:
    whole = write_log(folder / "whole", bundle, population[:100], "stable", files=1)[0].read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def foreign(path: Path, folder: Path, bundle: Bundle, population: Matrix) -> None:
    pq.write_table(pa.table({"x": [1]}), path)


def empty(path: Path, folder: Path, bundle: Bundle, population: Matrix) -> None:
    path.write_bytes(b"")


def without_a_feature(path: Path, folder: Path, bundle: Bundle, population: Matrix) -> None:
    whole = write_log(folder / "whole", bundle, population[:100], "stable", files=1)[0]
    table = pq.ParquetFile(whole).read()
    pq.write_table(table.drop_columns(["feature_velocity_24h"]), path)


def times_as_text(path: Path, folder: Path, bundle: Bundle, population: Matrix) -> None:
    whole = write_log(folder / "whole", bundle, population[:100], "stable", files=1)[0]
    table = pq.ParquetFile(whole).read()
    text = pa.array(["yesterday"] * len(table))
    pq.write_table(table.set_column(table.column_names.index("time"), "time", text), path)


@pytest.mark.parametrize("spoil", [half_written, foreign, empty, without_a_feature, times_as_text])
def test_what_is_not_a_log_file_is_an_error_that_names_it(
    spoil: object, tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    log = tmp_path / "log"
    write_log(log, stable_bundle, population[:100], "stable")
    path = place(log, stable_bundle)
    spoil(path, tmp_path, stable_bundle, population)  # type: ignore[operator]
    with pytest.raises(LogReadError, match=r"part-20260115T120000-x\.parquet"):
        InferenceLog([log]).read(selection(stable_bundle), names(stable_bundle), rows_max=1_000, seed=0)


def nullable(table: pa.Table) -> pa.Table:
    return pa.table({name: table[name] for name in table.column_names})


def retyped(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return apply


@pytest.mark.parametrize("merged", [
    nullable, retyped("feature_transaction_amount", pa.float64()), retyped("score", pa.float64()),
    retyped("request_id", pa.large_string()), retyped("time", pa.timestamp("us")), retyped("time", pa.timestamp("ns", tz="Europe/Berlin")),
    retyped("arm", pa.dictionary(pa.int32(), pa.string())), retyped("degraded", pa.large_list(pa.large_string())),
], ids=[
    "nullable", "feature in float64", "score in float64", "large string", "time without zone", "time in ns", "dictionary", "large list",
])
def test_files_that_differ_in_details_of_their_schema_are_read_together(
    merged: Callable[[pa.Table], pa.Table], tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    files = write_log(tmp_path, stable_bundle, population[:300], "stable", files=3)

    def read() -> LogRows:
        return InferenceLog([tmp_path]).read(selection(stable_bundle), names(stable_bundle), rows_max=1_000, seed=0)

    before = read()
    pq.write_table(merged(pq.ParquetFile(files[1]).read()), files[1])
    after = read()
    assert list(after.request_id) == list(before.request_id)
    np.testing.assert_array_equal(after.time, before.time)
    np.testing.assert_array_equal(after.score, before.score)
    for name in names(stable_bundle):
        np.testing.assert_array_equal(after.features[name], before.features[name])


def test_a_column_of_another_kind_is_an_error_that_names_its_file(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    files = write_log(tmp_path, stable_bundle, population[:300], "stable", files=3)
    table = pq.ParquetFile(files[1]).read()
    text = pa.array(["much"] * len(table))
    column = table.column_names.index("feature_transaction_amount")
    pq.write_table(table.set_column(column, "feature_transaction_amount", text), files[1])
    with pytest.raises(LogReadError, match=files[1].name):
        InferenceLog([tmp_path]).read(selection(stable_bundle), names(stable_bundle), rows_max=1_000, seed=0)


@pytest.mark.parametrize("spoil", [half_written, foreign, empty])
def test_what_is_not_a_log_file_and_of_long_ago_does_not_blind_later_windows(
    spoil: object, tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    log = tmp_path / "log"
    write_log(log, stable_bundle, population[:100], "stable")
    path = place(log, stable_bundle)
    spoil(path, tmp_path, stable_bundle, population)  # type: ignore[operator]
    old = (START - timedelta(hours=2)).timestamp()
    os.utime(path, (old, old))
    assert InferenceLog([log]).count(selection(stable_bundle)) == 100


def test_a_file_that_retention_removes_meanwhile_is_no_error(tmp_path: Path, stable_bundle: Bundle, population: Matrix) -> None:
    files = write_log(tmp_path, stable_bundle, population[:300], "stable", files=3)
    log = InferenceLog([tmp_path])
    assert log.count(selection(stable_bundle)) == 300
    files[0].unlink()
    assert log.count(selection(stable_bundle)) == 200


def test_a_later_window_does_not_open_files_that_it_knows_to_be_older(
    tmp_path: Path, stable_bundle: Bundle, population: Matrix,
) -> None:
    files = write_log(tmp_path, stable_bundle, population[:300], "stable", files=3)
    log = InferenceLog([tmp_path])
    log.count(selection(stable_bundle))
    files[0].write_bytes(b"garbage that would be an error if it were opened")
    assert log.count(selection(stable_bundle, start=START + timedelta(minutes=30))) == 150
