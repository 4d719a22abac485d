"""Pairs of scores on a cluster: from a mounted folder, and from a bucket (a real S3)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hafnium_hanging import hanging
from hafnium_rollout_world import CANDIDATE, rollout
from hafnium_s3 import S3
from pyarrow.fs import FileSystem

from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.observation import LiveRoute
from hafnium_rollout.status import ModelSeen, RolloutStatus

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SPEC = rollout(gates=[{"name": "e", "role": "Safety", "requests": {}}, {"name": "s", "scores": {}}])
STATUS = RolloutStatus(stable=ModelSeen(service="stable"), candidate=ModelSeen(service="candidate", digest=CANDIDATE), run_id="r")
SHADOW = LiveRoute({"stable": 100}, frozenset({"candidate"}))


def _table(arm: str, scores: dict[str, float], when: datetime, model: str) -> pa.Table:
    return pa.table({"request_id": list(scores), "arm": [arm] * len(scores), "score": list(scores.values()), "time": [when] * len(scores),
                     "model_digest": [model or (CANDIDATE if arm == "shadow" else "other")] * len(scores)})


class Place:
    """A log that tests write to, at {service} below it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files = 0

    def fill(self, service: str, files: int, until: datetime) -> None:
        """Files of every 10 s before, of no row that anybody looks for."""
        filesystem, prefix = FileSystem.from_uri(self.uri.replace("{service}", service))
        sink = pa.BufferOutputStream()
        pq.write_table(_table("stable", {"old": 0.5}, until, "other"), sink)
        data = sink.getvalue()
        for back in range(files, 0, -1):
            when = until - timedelta(seconds=10 * back)
            path = f"{prefix}/date={when:%Y-%m-%d}/model_version=1"
            filesystem.create_dir(path, recursive=True)
            with filesystem.open_output_stream(f"{path}/part-{when:%Y%m%dT%H%M%S%f}-0000.parquet") as f:
                f.write(data)

    def write(self, service: str, arm: str, scores: dict[str, float], when: datetime = NOW, model: str = "") -> None:
        self._files += 1
        filesystem, prefix = FileSystem.from_uri(self.uri.replace("{service}", service))
        path = f"{prefix}/date={when:%Y-%m-%d}/model_version=1"
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/part-{when:%Y%m%dT%H%M%S%f}-{self._files:04d}.parquet") as f:
            pq.write_table(_table(arm, scores, when, model), f)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "folder":
        yield Place(f"file://{tmp_path}/{{service}}")
        return
    with S3(tmp_path / "s3") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        yield Place(s3.uri("log/ns/{service}"))


def _setting(place: Place) -> str:
    return place.uri.removeprefix("file://") if place.uri.startswith("file://") else place.uri


def _read(log: ScoreLog, cursor: dict[str, Any] | None, now: datetime = NOW) -> tuple[tuple[float, ...], str, dict[str, Any] | None]:
    status = STATUS.model_copy(update={"cursor": {} if cursor is None else {"log": cursor}})
    return log.read(SPEC, "ns", status, SHADOW, now)


def test_only_what_comes_after_the_first_look_is_paired_and_each_pair_once(place: Place, tmp_path: Path) -> None:
    log = ScoreLog(_setting(place), tmp_path / "scratch")
    place.write("stable", "stable", {"old": 0.1})
    place.write("candidate", "shadow", {"old": 0.9})
    differences, error, cursor = _read(log, None)
    assert (differences, error) == ((), "")
    place.write("stable", "stable", {"a": 0.25, "b": 0.5}, NOW + timedelta(seconds=1))
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    differences, error, cursor = _read(log, cursor)
    assert (differences, error) == ((0.25,), "")
    place.write("candidate", "shadow", {"b": 0.75}, NOW + timedelta(seconds=2))
    differences, error, cursor = _read(log, cursor)
    assert differences == (0.25,)
    assert _read(log, cursor)[0] == ()


def test_another_operator_goes_on_where_the_status_says(place: Place, tmp_path: Path) -> None:
    first = ScoreLog(_setting(place), tmp_path / "first")
    place.write("stable", "stable", {"old": 0.1})
    cursor = _read(first, None)[2]
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    assert _read(ScoreLog(_setting(place), tmp_path / "second"), cursor)[0] == (0.25,)


def test_another_operator_goes_on_at_once_however_long_the_log_is(place: Place, tmp_path: Path) -> None:
    """More files than a cursor names, and more than six looks could fetch: else the gate would see nothing for hours."""
    place.fill("stable", 400, NOW)
    place.fill("candidate", 3, NOW)
    cursor = _read(ScoreLog(_setting(place), tmp_path / "first"), None)[2]
    assert cursor is not None
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    second = ScoreLog(_setting(place), tmp_path / "second", read_s_max=60)
    differences, error, after = _read(second, cursor)
    assert (differences, error) == ((0.25,), "")
    assert _read(second, cursor) == ((0.25,), "", after), "the status could not be written: the same again"
    place.write("stable", "stable", {"b": 0.5}, NOW + timedelta(seconds=2))
    place.write("candidate", "shadow", {"b": 0.25}, NOW + timedelta(seconds=2))
    assert _read(second, after)[:2] == ((-0.25,), "")
    kept = [p for folder in ("first", "second") for p in (tmp_path / folder).rglob("*")]
    assert kept == [], "what was read does not stay on the disk"


def test_an_operator_that_was_away_reads_what_came_meanwhile_oldest_first(place: Place, tmp_path: Path) -> None:
    place.fill("stable", 300, NOW)
    cursor = _read(ScoreLog(_setting(place), tmp_path / "first"), None)[2]
    keys = [f"r{i:03d}" for i in range(70)]
    for i, key in enumerate(keys):
        place.write("stable", "stable", {key: 0.25}, NOW + timedelta(seconds=i))
    place.write("candidate", "shadow", dict.fromkeys(keys, 0.5), NOW + timedelta(seconds=80))
    second = ScoreLog(_setting(place), tmp_path / "second", read_s_max=60)
    found: list[int] = []
    for _ in range(3):
        differences, error, cursor = _read(second, cursor)
        assert error == ""
        found.append(len(differences))
    assert found == [64, 6, 0], "as many files as a look takes, and each once"


def test_pairs_without_a_look_come_again(place: Place, tmp_path: Path) -> None:
    log = ScoreLog(_setting(place), tmp_path / "scratch")
    cursor = _read(log, None)[2]
    log.give_back(SPEC, "ns", (0.5,))
    assert _read(log, cursor)[0] == (0.5,)


def test_a_bucket_that_does_not_answer_is_said(tmp_path: Path) -> None:
    log = ScoreLog("s3://log/x?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1&connect_timeout=1", tmp_path / "scratch")
    differences, error, _ = _read(log, {"stable": [], "candidate": []})
    assert differences == ()
    assert "inference log s3://log/x: it can't be read" in error


def test_a_log_that_hangs_holds_up_no_turn_and_what_it_held_counts_once_when_it_is_back(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}/{{service}}")
    log = ScoreLog(_setting(place), read_s_max=0.2)
    cursor = _read(log, None)[2]
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    with hanging(next((tmp_path / "stable").glob("date=*/*/*.parquet"))):
        assert _read(log, cursor) == ((), "the inference log was not read within 0.2 s", cursor)
        for _ in range(50):
            assert _read(log, cursor) == ((), "the inference log hangs: an earlier read of it has not come back", cursor)
        assert len([t for t in threading.enumerate() if t.name == "score-log"]) == 1
        other = log.read(SPEC, "another", STATUS.model_copy(update={"cursor": {"log": {"stable": ["x"], "candidate": []}}}), SHADOW, NOW)
        assert "not read within" in other[1], "another rollout tries for itself"
    end = time.monotonic() + 60
    while (found := _read(log, cursor))[1]:
        assert time.monotonic() < end, found[1]
        time.sleep(0.01)
    assert found[0] == (0.25,)
    assert _read(log, found[2])[0] == ()


def _until_late_reads_are_over() -> None:
    for thread in threading.enumerate():
        if thread.name == "score-log":
            thread.join(60)
            assert not thread.is_alive()


def test_a_log_that_is_slower_than_a_turn_waits_at_every_look_is_measured_and_each_pair_counts_once(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}/{{service}}")
    log = ScoreLog(_setting(place), read_s_max=0.2)
    cursor = _read(log, None)[2]
    for second in (1, 2):
        place.write("candidate", "shadow", {f"{second}": 0.5}, NOW + timedelta(seconds=second))
        place.write("stable", "stable", {f"{second}": 0.25}, NOW + timedelta(seconds=second))
        slow = max((tmp_path / "stable").glob("date=*/*/*.parquet"), key=lambda p: p.name)
        with hanging(slow):
            assert "not read within" in _read(log, cursor)[1]
        _until_late_reads_are_over()
        with hanging(slow):
            found = _read(log, cursor)
            assert found[:2] == ((0.25,), ""), "found between the looks, though the log is as slow as before"
        assert _read(log, cursor) == found, "the status could not be written: the same pairs, from the log"
        cursor = found[2]
    assert _read(log, cursor)[0] == ()


def test_what_a_late_read_found_is_nothing_to_a_status_that_has_gone_on_elsewhere(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}/{{service}}")
    log, other = ScoreLog(_setting(place), read_s_max=0.2), ScoreLog(_setting(place))
    cursor = _read(log, None)[2]
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    with hanging(next((tmp_path / "stable").glob("date=*/*/*.parquet"))):
        assert "not read within" in _read(log, cursor)[1]
    _until_late_reads_are_over()
    counted, error, gone_on = _read(other, cursor)
    assert (counted, error) == ((0.25,), "")
    assert _read(log, gone_on) == ((), "", gone_on), "another leader has counted it"


def test_what_a_late_read_failed_by_is_said_and_the_next_look_tries_again(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}/{{service}}")
    log = ScoreLog(_setting(place), read_s_max=0.2)
    cursor = _read(log, None)[2]
    place.write("candidate", "shadow", {"a": 0.5}, NOW + timedelta(seconds=1))
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    file = next((tmp_path / "stable").glob("date=*/*/*.parquet"))
    whole = file.read_bytes()
    file.write_bytes(b"half a file")
    with hanging(file):
        assert "not read within" in _read(log, cursor)[1]
    _until_late_reads_are_over()
    file.write_bytes(whole)
    differences, error, after = _read(log, cursor)
    assert (differences, after) == ((), cursor)
    assert "a file can't be read" in error
    assert _read(log, cursor)[:2] == ((0.25,), "")


def test_reads_that_are_over_and_that_nobody_asks_for_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.kubernetes.score_log.LATE_MAX", 2)
    place = Place(f"file://{tmp_path}/{{service}}")
    log = ScoreLog(_setting(place), read_s_max=0.2)
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    file = next((tmp_path / "stable").glob("date=*/*/*.parquet"))
    status = STATUS.model_copy(update={"cursor": {"log": {"stable": ["x"], "candidate": []}}})
    for namespace in ("first", "second", "third"):
        with hanging(file):
            assert "not read within" in log.read(SPEC, namespace, status, SHADOW, NOW)[1]
        _until_late_reads_are_over()
    with hanging(file):
        assert "not read within" in log.read(SPEC, "first", status, SHADOW, NOW)[1], "it made room for the third"
        assert log.read(SPEC, "third", status, SHADOW, NOW)[1] == ""
    _until_late_reads_are_over()


# --- across the arms of live traffic --------------------------------------------------------------------------------------------

UNPAIRED = rollout(gates=[{"name": "e", "role": "Safety", "requests": {}}, {"name": "s", "scores": {"unpaired": True}}])


def _live(weight: int) -> LiveRoute:
    return LiveRoute({"stable": 100 - weight, "candidate": weight})


def _across(log: ScoreLog, cursor: dict[str, Any] | None, weight: int = 20) -> tuple[tuple[float, ...], str, dict[str, Any] | None]:
    status = STATUS.model_copy(update={"cursor": {} if cursor is None else {"log": cursor}})
    return log.read(UNPAIRED, "ns", status, _live(weight), NOW)


@pytest.mark.parametrize("marked", [True, False], ids=["the gateway marks the arms", "it does not"])
@pytest.mark.parametrize("services", [("stable", "candidate"), ("both", "both")], ids=["a log each", "one log"])
def test_scores_of_different_requests_are_compared_across_the_arms(
    place: Place, tmp_path: Path, marked: bool, services: tuple[str, str],
) -> None:
    log = ScoreLog(_setting(place).replace("{service}", "both") if services[0] == "both" else _setting(place), tmp_path / "scratch")
    mark = "candidate" if marked else "stable"
    place.write(services[0], "stable", {"old": 0.9})
    assert _across(log, None)[:2] == ((), "")
    cursor = _across(log, None)[2]
    place.write(services[0], "stable", {"a": 0.25, "b": 0.75, "c": 0.5}, NOW + timedelta(seconds=1))
    place.write(services[1], mark, {"d": 0.75}, NOW + timedelta(seconds=1), model=CANDIDATE)
    place.write(services[1], "shadow", {"e": 0.0}, NOW + timedelta(seconds=1), model=CANDIDATE)
    differences, error, cursor = _across(log, cursor)
    assert (differences, error) == ((pytest.approx(0.25),), "")
    assert _across(log, cursor)[0] == ()


def test_rows_from_another_weight_or_from_shadow_are_not_compared(place: Place, tmp_path: Path) -> None:
    log = ScoreLog(_setting(place), tmp_path / "scratch")
    cursor = _read(log, None)[2]
    place.write("stable", "stable", {"a": 0.25}, NOW + timedelta(seconds=1))
    place.write("candidate", "candidate", {"b": 0.75}, NOW + timedelta(seconds=1), model=CANDIDATE)
    differences, error, cursor = _across(log, cursor)
    assert (differences, error) == ((), ""), "they came before the step"
    place.write("stable", "stable", {"c": 0.25}, NOW + timedelta(seconds=2))
    _, _, cursor = _across(log, cursor)
    place.write("candidate", "candidate", {"d": 0.75}, NOW + timedelta(seconds=2), model=CANDIDATE)
    assert _across(log, cursor, weight=50)[0] == (), "the row that waited is of another weight"


def test_at_100_percent_and_without_unpaired_nothing_is_compared_in_live_steps(place: Place, tmp_path: Path) -> None:
    log = ScoreLog(_setting(place), tmp_path / "scratch")
    assert _across(log, None, weight=100) == ((), "", None)
    assert log.read(SPEC, "ns", STATUS, _live(20), NOW) == ((), "", None)


def test_without_a_place_and_outside_of_shadow_nothing_is_read(tmp_path: Path) -> None:
    assert "--inference_log" in _read(ScoreLog(""), None)[1]
    assert ScoreLog(str(tmp_path)).read(SPEC, "ns", STATUS, LiveRoute({"stable": 100}), NOW) == ((), "", None)
