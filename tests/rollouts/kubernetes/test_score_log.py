"""Pairs of scores on a cluster: from a mounted folder, and from a bucket (a real S3)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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


def _table(arm: str, scores: dict[str, float]) -> pa.Table:
    return pa.table({"request_id": list(scores), "arm": [arm] * len(scores), "score": list(scores.values()),
                     "model_digest": [CANDIDATE if arm == "shadow" else "other"] * len(scores)})


class Place:
    """A log that tests write to, at {service} below it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files = 0

    def write(self, service: str, arm: str, scores: dict[str, float], when: datetime = NOW) -> None:
        self._files += 1
        filesystem, prefix = FileSystem.from_uri(self.uri.replace("{service}", service))
        path = f"{prefix}/date={when:%Y-%m-%d}/model_version=1"
        filesystem.create_dir(path, recursive=True)
        with filesystem.open_output_stream(f"{path}/part-{when:%Y%m%dT%H%M%S%f}-{self._files:04d}.parquet") as f:
            pq.write_table(_table(arm, scores), f)


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


def test_without_a_place_and_outside_of_shadow_nothing_is_read(tmp_path: Path) -> None:
    assert "--inference_log" in _read(ScoreLog(""), None)[1]
    assert ScoreLog(str(tmp_path)).read(SPEC, "ns", STATUS, LiveRoute({"stable": 100}), NOW) == ((), "", None)
