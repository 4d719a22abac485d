"""The record's volume hangs, fills up or goes away: no turn waits for it, and what is on disk is exact or says where it isn't."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hafnium_hanging import hanging
from hafnium_rollout_world import START, World, rollout

from hafnium_rollout.errors import NotLeading
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import RecordLimits, read_record, record_files
from hafnium_rollout.record_lines import Start
from hafnium_rollout.record_queue import LATE_S, QUIET_AGAIN_S, RecordQueue, WaitingLimits
from hafnium_rollout.replaying import Break, ReplayedTurn, replay
from hafnium_rollout.status import RolloutStatus

LONG = rollout(strategy={"steps": [{"shadow": True, "minDwell": "6d", "deadline": "9d"}, {"weight": 100}]})
"""Nothing comes to an end here: each turn is worth recording."""
ONE, OTHER = Subject("ns", "risk"), Subject("ns", "other")


def until(found: Callable[[], bool], why: str) -> None:
    """Waits for another thread."""
    deadline = time.monotonic() + 60.0
    while not found():
        assert time.monotonic() < deadline, why
        time.sleep(0.002)


@dataclass
class Recording:
    """Worlds whose turns go into one queue."""

    folder: Path
    waiting: WaitingLimits = field(default_factory=WaitingLimits)
    limits: RecordLimits = field(default_factory=RecordLimits)
    said: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    leads: bool = True
    asked: int = 0
    """So often the fence was asked: once for each turn that is about to be written."""
    refused: dict[int, Exception] = field(default_factory=dict[int, Exception])
    """Which of these calls raises, and what."""
    clock: float = 0.0
    statuses: list[RolloutStatus] = field(default_factory=list[RolloutStatus])
    """Those that ONE's record should lead to, if nothing is lost."""
    worlds: dict[Subject, World] = field(default_factory=dict[Subject, World])

    def __post_init__(self) -> None:
        def say(_level: str, _subject: Subject | None, event: str, message: str, _now: datetime) -> None:
            self.said.append((event, message))

        def fence() -> None:
            self.asked += 1
            if self.asked in self.refused:
                raise self.refused[self.asked]
            if not self.leads:
                raise NotLeading("another process leads")

        self.queue = RecordQueue(lambda s: self.folder / s.name, self.limits, fence, say, self.waiting, lambda: self.clock)

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.said]

    def turn(self, subject: Subject = ONE, count: int = 1) -> None:
        world = self.worlds.setdefault(subject, World(LONG))
        for _ in range(count):
            seen: list[Observation] = []
            plain, before = world.observe, world.status
            world.observe = lambda s, plain=plain, seen=seen: seen.append(plain(s)) or seen[0]  # type: ignore[method-assign,func-returns-value]
            decision = world.turn()
            world.observe = plain  # type: ignore[method-assign]
            self.queue.put(subject, world.spec, before, seen[0], world.now, decision)
            if subject == ONE:
                self.statuses.append(decision.status)

    def written(self) -> None:
        until(lambda: self.queue.waiting == 0, "turns still wait")

    def replayed(self, subject: Subject = ONE) -> list[ReplayedTurn | Break]:
        found = list(replay(read_record(self.folder / subject.name)))
        assert all(t.equal for t in found if isinstance(t, ReplayedTurn)), "what is there is exact"
        return found

    def replayed_statuses(self) -> list[RolloutStatus]:
        return [t.recorded.status for t in self.replayed() if isinstance(t, ReplayedTurn)]

    @property
    def file(self) -> Path:
        return record_files(self.folder / ONE.name)[-1]


@contextmanager
def recording(folder: Path, **more: Any) -> Generator[Recording]:
    made = Recording(folder, **more)
    made.queue.start()
    try:
        yield made
    finally:
        made.queue.stop(START)


def test_turns_are_written_in_order_by_a_thread_of_their_own(tmp_path: Path) -> None:
    writers: set[str] = set()
    with recording(tmp_path) as found:
        plain = found.queue._fence
        found.queue._fence = lambda: writers.add(threading.current_thread().name) or plain()  # type: ignore[func-returns-value]
        for _ in range(30):
            found.turn(ONE)
            found.turn(OTHER)
        found.written()
    assert writers == {"record"}
    assert found.replayed_statuses() == found.statuses
    assert len(found.replayed(OTHER)) == 30
    assert found.said == []


def test_a_volume_that_hangs_holds_up_no_turn_and_loses_none_of_them(tmp_path: Path) -> None:
    with recording(tmp_path) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=40)
            found.turn(OTHER, count=3)  # one thread writes: nobody else's turn waits either, their lines do
            assert found.queue.waiting == 43
        found.written()
    assert found.replayed_statuses() == found.statuses
    assert found.queue.lost() == {ONE: 0, OTHER: 0}


def test_when_too_much_waits_turns_are_counted_as_lost_and_the_record_says_how_many(tmp_path: Path) -> None:
    with recording(tmp_path, waiting=WaitingLimits(rollout_bytes_max=8_000)) as found:
        for _ in range(5):
            found.turn()
            found.written()
        with hanging(found.file):
            found.turn(count=60)
            lost = found.queue.lost()[ONE]
            assert 20 < lost < 60
            assert found.events == ["RecordGap"], "said once"
            assert found.queue._bytes <= 8_000
        found.written()
        kept = 65 - lost
        assert found.replayed_statuses() == found.statuses[:kept], "what is there is what came first, without a hole"
        for _ in range(5):
            found.turn()
            found.written()
    turns = found.replayed()
    assert [type(t).__name__ for t in turns] == ["ReplayedTurn"] * kept + ["Break"] + ["ReplayedTurn"] * 5
    gap = next(t for t in turns if isinstance(t, Break))
    assert gap.message.startswith(f"{lost} turns were decided and could not be written")
    assert found.replayed_statuses() == found.statuses[:kept] + found.statuses[65:]
    assert found.queue.lost()[ONE] == lost
    assert found.events == ["RecordGap", "RecordResumed"]


def test_one_rollout_does_not_take_the_room_of_the_others(tmp_path: Path) -> None:
    with recording(tmp_path, waiting=WaitingLimits(rollout_bytes_max=8_000)) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=60)
            found.turn(OTHER, count=5)
        found.written()
    assert found.queue.lost()[ONE] > 0
    assert found.queue.lost()[OTHER] == 0
    assert len(found.replayed(OTHER)) == 5


def test_all_rollouts_together_are_bounded_too(tmp_path: Path) -> None:
    with recording(tmp_path, waiting=WaitingLimits(total_bytes_max=8_000)) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=10)
            found.turn(OTHER, count=60)
            assert found.queue._bytes <= 8_000
            assert found.queue.lost()[OTHER] > 0
        found.written()
        for subject in (ONE, OTHER):
            found.turn(subject)
            found.written()
    assert found.replayed_statuses()[-1] == found.statuses[-1]
    assert any(isinstance(t, Break) for t in found.replayed(OTHER))


def test_a_turn_larger_than_the_queue_is_taken_when_nothing_else_waits(tmp_path: Path) -> None:
    with recording(tmp_path, waiting=WaitingLimits(rollout_bytes_max=100, total_bytes_max=100)) as found:
        for _ in range(5):
            found.turn()
            found.written()
    assert found.replayed_statuses() == found.statuses


def test_what_waits_is_written_at_the_end(tmp_path: Path) -> None:
    with recording(tmp_path) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=10)
            ended = threading.Thread(target=found.queue.stop, args=(START, 60.0))
            ended.start()
        ended.join()
    assert found.replayed_statuses() == found.statuses
    assert found.said == []


def test_an_end_does_not_wait_for_a_volume_that_hangs_and_says_what_it_left(tmp_path: Path) -> None:
    with recording(tmp_path) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=10)
            found.queue.stop(START, 0.05)
            assert found.said == [("RecordGap", "10 turns were not written within 0.05 s of the end")]
        found.written()
    assert found.replayed_statuses() == found.statuses, "the process lived on in this test; else it would be a prefix"


def test_a_volume_that_takes_long_is_said_before_anything_is_lost(tmp_path: Path) -> None:
    with recording(tmp_path) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn(count=2)
            until(lambda: found.queue._writing_since is not None, "nobody writes")
            found.turn()
            assert found.said == []
            found.clock += LATE_S + 1
            found.turn(count=3)
            assert found.events == ["RecordLate"]
            assert "Rollouts are guarded on" in found.said[0][1]
        found.written()


@pytest.mark.parametrize("thread", [True, False], ids=["by the thread", "by the turn"])
def test_a_full_disk_costs_the_turns_of_its_time_and_the_record_says_how_many(tmp_path: Path, thread: bool) -> None:
    found = Recording(tmp_path)
    if thread:
        found.queue.start()
    try:
        found.turn(count=5)
        found.written()
        folder, aside = tmp_path / ONE.name, tmp_path / "aside"
        folder.rename(aside)
        folder.write_text("in the way")
        found.turn(count=4)
        found.written()
        assert set(found.events) == {"RecordFailed"}
        folder.unlink()
        aside.rename(folder)
        found.turn(count=5)
        found.written()
    finally:
        found.queue.stop(START)
    assert found.events[-1] == "RecordResumed"
    assert len(found.events) <= 3, "the file is gone, then its folder isn't one: each is said once"
    gap = next(t for t in found.replayed() if isinstance(t, Break))
    assert gap.message.startswith("4 turns were decided")
    assert found.replayed_statuses() == found.statuses[:5] + found.statuses[9:]


def test_a_full_file_is_finished_with_the_next_start_and_each_can_be_read_alone(tmp_path: Path) -> None:
    with recording(tmp_path, limits=RecordLimits(file_bytes_max=20_000)) as found:
        for _ in range(20):
            found.turn(count=8)
            found.written()
    files = record_files(tmp_path / ONE.name)
    assert len(files) >= 3
    for file in files:
        assert isinstance(next(iter(read_record(file))), Start)
        assert all(t.equal for t in replay(read_record(file)) if isinstance(t, ReplayedTurn))
    assert not [t for t in found.replayed() if isinstance(t, Break)]


def test_who_lost_the_lease_writes_nothing_that_waited_and_the_next_term_begins_with_a_start(tmp_path: Path) -> None:
    with recording(tmp_path) as found:
        found.turn(count=3)
        found.written()
        with hanging(found.file):
            found.turn(count=6)
            until(lambda: found.queue._writing_since is not None, "nobody writes")
            found.leads = False
        found.written()
        on_disk = len([t for t in found.replayed() if isinstance(t, ReplayedTurn)])
        assert on_disk in (3, 4), "one may have been on its way already"
        assert found.queue.lost()[ONE] == 9 - on_disk
        found.leads = True
        found.queue.lead()
        found.turn(count=3)
        found.written()
    starts = [e for e in read_record(tmp_path / ONE.name) if isinstance(e, Start)]
    assert len(starts) == 2
    assert found.replayed_statuses() == found.statuses[:on_disk] + found.statuses[9:]


@pytest.mark.parametrize("error", [NotLeading("it was not renewed in time"), MemoryError()], ids=["the lease", "memory"])
def test_after_a_moment_without_the_lease_or_memory_nothing_builds_on_what_was_left_out(tmp_path: Path, error: Exception) -> None:
    """It lasted for one turn; nobody else had the lease. The next turn was queued before the one that was left out was."""
    with recording(tmp_path, refused={5: error}) as found:
        found.turn(count=3)
        found.written()
        with hanging(found.file):
            found.turn()
            until(lambda: found.asked == 4, "nobody writes")
            found.turn(count=4)
        found.written()
        found.turn(count=2)
        found.written()
    assert found.queue.lost()[ONE] == 4, "the one, and three that build on it"
    assert [t.message[:8] for t in found.replayed() if isinstance(t, Break)] == ["4 turns "]
    assert found.replayed_statuses() == found.statuses[:4] + found.statuses[8:]


@pytest.mark.parametrize("again", [False, True], ids=["for good", "and made again"])
@pytest.mark.parametrize("term", ["the same term", "another term"])
def test_what_a_deleted_rollout_still_loses_is_counted_for_nobody(tmp_path: Path, again: bool, term: str) -> None:
    with recording(tmp_path, refused={n: OSError("the volume is gone") for n in (3, 4)}) as found:
        found.turn()
        found.written()
        with hanging(found.file):
            found.turn()
            until(lambda: found.asked == 2, "nobody writes")
            found.turn(count=2)
            if term == "another term":
                found.queue.lead()
            assert found.queue.subjects == {ONE}
            found.queue.gone(ONE)
            assert found.queue.subjects == set()
            if again:
                found.turn()
        found.written()
    assert "RecordFailed" in found.events
    assert found.queue.lost() == ({ONE: 0} if again else {})


def test_a_rollout_that_ended_in_a_gap_is_written_down_once_more_though_nothing_happens_any_more(tmp_path: Path) -> None:
    found = Recording(tmp_path)
    found.worlds[ONE] = World(bad_stable=0.01, bad_candidate=0.5)
    found.turn(count=5)
    folder, aside = tmp_path / ONE.name, tmp_path / "aside"
    folder.rename(aside)
    folder.write_text("in the way")
    found.turn(count=120)
    assert found.worlds[ONE].status.phase == "RolledBack"
    folder.unlink()
    aside.rename(folder)
    found.turn(count=3)
    assert found.replayed_statuses()[-1].phase != "RolledBack", "not tried yet"
    found.clock += QUIET_AGAIN_S
    found.turn(count=3)
    assert found.replayed_statuses()[-1].phase == "RolledBack"
    assert len(found.replayed_statuses()) == 6, "once"
