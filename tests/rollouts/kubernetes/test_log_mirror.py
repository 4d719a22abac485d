"""What of a log in a bucket lies on this machine, and for how long. Over real files; over a real S3 in test_score_log.py."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hafnium_rollout.errors import OnlyAhead, StateError
from hafnium_rollout.kubernetes.log_mirror import LogMirror, Room, Scratch
from hafnium_rollout.score_pairs import NAMES_MAX, ScorePairs

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


class Log:
    """Files of a place, one a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri, self._count = folder, f"file://{folder}", 0
        folder.mkdir()

    def write(self, count: int = 1, size: int = 10) -> list[str]:
        names: list[str] = []
        for _ in range(count):
            when = NOW - timedelta(hours=2) + timedelta(seconds=self._count)
            path = self.folder / f"date={when:%Y-%m-%d}/model_version=1/part-{when:%Y%m%dT%H%M%S%f}-0.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
            self._count += 1
            names.append(path.name)
        return names


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def _files(folder: Path) -> dict[str, int]:
    """Size by name, oldest first."""
    return {p.name: p.stat().st_size for p in sorted(folder.rglob("*.parquet"))}


def test_a_new_leader_fetches_only_what_the_cursor_does_not_have(log: Log, scratch: Path) -> None:
    old = log.write(3000)
    new = log.write(2)
    with LogMirror(log.uri, scratch, Room()).unread(NOW, [old[-NAMES_MAX:]]) as folder:
        assert _files(folder) == dict.fromkeys(new, 10)


def test_when_nobody_has_read_anything_only_the_newest_names_are_there_and_no_contents(log: Log, scratch: Path) -> None:
    old = log.write(3000)
    with LogMirror(log.uri, scratch, Room()).unread(NOW, [None]) as folder:
        assert _files(folder) == dict.fromkeys(old[-NAMES_MAX:], 0)


@pytest.mark.parametrize(("begins", "full", "listed"), [
    (timedelta(hours=2), True, False), (timedelta(minutes=59), True, True), (timedelta(hours=-2), True, True),
    (timedelta(hours=2), False, True),
], ids=["long after midnight", "a file may be that late", "before midnight", "a cursor with room forgets nobody"])
def test_yesterday_is_listed_while_a_file_of_it_may_be_unread(
    log: Log, scratch: Path, begins: timedelta, full: bool, listed: bool,
) -> None:
    midnight = NOW.replace(hour=0)
    read = [f"part-{midnight + begins + timedelta(seconds=i):%Y%m%dT%H%M%S%f}-0.parquet" for i in range(NAMES_MAX if full else 9)]
    late = log.folder / f"date={midnight - timedelta(days=1):%Y-%m-%d}/model_version=1/part-{NOW:%Y%m%dT%H%M%S%f}-1.parquet"
    late.parent.mkdir(parents=True)
    late.write_bytes(b"x")
    other = read[-1:] * NAMES_MAX
    for known in ([read], [read, other], [other, read]):
        with LogMirror(log.uri, scratch, Room()).unread(NOW, known) as folder:
            assert list(_files(folder)) == ([late.name] if listed else [])


def test_a_list_that_is_full_of_names_ahead_of_the_clock_hides_nothing(log: Log, scratch: Path) -> None:
    """As the release before may have left it: what it had forgotten isn't known, so what is there came before."""
    there = log.write(3)
    wrong = [f"part-{NOW + timedelta(days=1, seconds=i):%Y%m%dT%H%M%S%f}-0.parquet" for i in range(NAMES_MAX)]
    mirror = LogMirror(log.uri, scratch, Room())
    with mirror.unread(NOW, [wrong]) as folder:
        assert _files(folder) == dict.fromkeys(there, 0)
    with mirror.unread(NOW, [[*there[:2], *wrong[:9]]]) as folder:
        assert _files(folder) == {there[2]: 10}, "a list with room has forgotten nothing"


def test_files_of_a_clock_past_midnight_are_seen_and_not_fetched_even_when_their_time_comes(log: Log, scratch: Path) -> None:
    read = log.write(NAMES_MAX)
    wrong = NOW.replace(hour=0) + timedelta(days=1, minutes=5)
    path = log.folder / f"date={wrong:%Y-%m-%d}/model_version=1/part-{wrong:%Y%m%dT%H%M%S%f}-0.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    mirror = LogMirror(log.uri, scratch, Room())
    with mirror.unread(NOW, [read]) as folder:
        assert _files(folder) == {path.name: 0}
    with mirror.unread(wrong - timedelta(seconds=60), [read], {path.name}) as folder:
        assert _files(folder) == {path.name: 0}


def heard_while_written(log: Log, scratch: Path, looks: int, ahead: timedelta) -> list[bool]:
    """Whether the candidate is heard, at 60 looks, one each 30 s. At the first `looks` a pod has written a file ahead of the clock."""
    mirror, pairs, cursor = LogMirror(log.uri, scratch, Room()), ScorePairs(), dict[str, Any]()
    heard: list[bool] = []
    for i in range(60):
        now = NOW + timedelta(seconds=30 * i)
        if i < looks:
            written(log, now + ahead)
        passed = [n for names in cursor.get("ahead", {}).values() for n in names]
        with mirror.unread(now, [cursor.get("candidate")], passed) as folder:
            try:
                _, cursor = pairs.read(scratch / "none", folder, "sha256:" + "a" * 64, cursor, now)
                heard.append(True)
            except OnlyAhead as e:
                cursor = e.cursor
                heard.append(False)
    return heard


def written(log: Log, when: datetime) -> None:
    """A file by its name; ahead of the clock it is never read."""
    path = log.folder / f"date={when:%Y-%m-%d}/model_version=1/part-{when:%Y%m%dT%H%M%S%f}-0.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_pod_that_writes_ahead_of_the_clock_as_ever_is_told_of_for_as_long_as_it_does(log: Log, scratch: Path) -> None:
    """As many of its files reach their time as come: how many are ahead stays the same. Another pod's lie beyond them."""
    for i in range(9):
        written(log, NOW + timedelta(hours=9, seconds=i))
    assert heard_while_written(log, scratch, 50, timedelta(minutes=5)) == [True, *[False] * 53, *[True] * 6]


def test_a_pod_that_writes_more_files_ahead_of_the_clock_than_are_counted_is_told_of(
    log: Log, scratch: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_SEEN_MAX", 20)
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_MAX", 5)
    assert heard_while_written(log, scratch, 60, timedelta(hours=9)) == [True, *[False] * 59]


def test_nothing_is_kept_after_a_read_nor_after_one_that_failed(log: Log, scratch: Path) -> None:
    log.write(3)
    room = Room(bytes_max=30)
    mirror = LogMirror(log.uri, scratch, room)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), mirror.unread(NOW, [[]]):
            raise ZeroDivisionError
        assert list(scratch.iterdir()) == []
    with mirror.unread(NOW, [[]]) as folder:
        assert len(_files(folder)) == 3


def test_two_arms_in_one_place_are_fetched_once_and_what_either_has_not_read(log: Log, scratch: Path) -> None:
    names = log.write(3)
    with LogMirror(log.uri, scratch, Room()).unread(NOW, [names[:1], names[:2]]) as folder:
        assert list(_files(folder)) == names[1:]


def test_more_bytes_than_may_lie_there_at_a_time_are_not_fetched_and_it_is_said(log: Log, scratch: Path) -> None:
    log.write(3)
    room = Room(bytes_max=50)
    one, other = LogMirror(log.uri, scratch, room), LogMirror(log.uri, scratch, room)
    with one.unread(NOW, [[]]):
        with pytest.raises(StateError, match="30 bytes are to be fetched while 30 of other reads lie here, and at most 50 may"), \
                other.unread(NOW, [[]]):
            pass
        assert sum(size for folder in scratch.iterdir() for size in _files(folder).values()) == 30
    with other.unread(NOW, [[]]) as folder:
        assert len(_files(folder)) == 3, "there is room again"


def test_a_look_takes_so_many_bytes_and_the_next_one_goes_on(log: Log, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.kubernetes.log_mirror.LOOK_BYTES_MAX", 25)
    names = log.write(3) + log.write(1, size=30) + log.write(1)
    mirror = LogMirror(log.uri, scratch, Room())
    looks: list[list[str]] = []
    read: list[str] = []
    for _ in range(5):
        with mirror.unread(NOW, [read]) as folder:
            looks.append(list(_files(folder)))
            read = read + looks[-1]
    assert looks == [names[:2], names[2:3], names[3:4], names[4:], []], "one at least, however large it is"


def test_a_file_that_is_too_large_is_named(log: Log, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.kubernetes.log_mirror.FILE_BYTES_MAX", 20)
    names = log.write(1, size=21)
    with pytest.raises(StateError, match=f"{names[0]} is 21 bytes large, expected at most 20"), \
            LogMirror(log.uri, scratch, Room()).unread(NOW, [[]]):
        pass
    assert list(scratch.glob("*/*")) == []


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_stays(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hafnium_rollout.kubernetes.log_mirror import Scratch\n"
        "own = Scratch(Path(sys.argv[1])); (own.path / 'read-1').mkdir(); print(own.path, flush=True); sys.stdin.read()")
    argv, environment = [sys.executable, "-c", program, str(tmp_path)], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as p:
        try:
            assert p.stdout is not None
            theirs = Path(p.stdout.readline().strip())
            mine = Scratch(tmp_path)
            assert theirs.is_dir()
        finally:
            p.kill()
            p.wait(60)
    assert theirs.is_dir(), "it could remove nothing"
    third = Scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine.path, third.path])
