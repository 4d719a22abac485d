"""`readyDeadline` is the candidate's own time: only while it is wanted, there, and not ready without a break."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, World, rollout
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hafnium_rollout.actions import EnsureCandidate
from hafnium_rollout.status import RolloutStatus

READY: dict[str, Any] = {"readyDeadline": "2m"}
WEIGHTS: dict[str, Any] = {**READY, "steps": [{"weight": 20, "deadline": "1h"}, {"weight": 100}]}
DAYS = 86_400.0


def turns(world: World, n: int) -> None:
    for _ in range(n):
        world.turn()


def waiting_for_approval() -> World:
    """Ready, and nobody has approved it."""
    world = World(rollout(strategy=WEIGHTS, approvals={"required": ["validation"]}))
    turns(world, 10)
    assert world.status.reason == "ApprovalMissing"
    return world


def test_a_pod_that_is_moved_while_approvals_are_waited_for_rejects_nobody() -> None:
    world = waiting_for_approval()
    world.turn(seconds=2 * DAYS)
    world.ready = False
    turns(world, 8)
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    world.ready, world.approvals = True, frozenset({"validation"})
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_short_absences_are_never_added_up() -> None:
    world = waiting_for_approval()
    for _ in range(10):
        world.ready = False
        turns(world, 50)
        world.ready = True
        world.turn()
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())


def test_a_candidate_that_is_lost_while_approvals_are_waited_for_still_ends() -> None:
    world = waiting_for_approval()
    world.ready = False
    turns(world, 58)
    assert world.status.phase == "Pending"
    assert world.until("RolledBack", turns=10) == "RolledBack"
    assert world.status.reason == "CandidateNotReady"
    assert world.status.rejected_digests == (CANDIDATE,)


def test_time_in_which_the_spec_said_paused_is_not_the_candidates() -> None:
    world = World(rollout(strategy=READY, paused=True))
    turns(world, 5)
    world.turn(seconds=3600)
    assert SERVICE not in world.managed
    world.spec = rollout(strategy=READY)
    world.turn()
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    assert SERVICE in world.managed
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_a_pause_in_between_begins_the_time_anew() -> None:
    world = World(rollout(strategy=READY), ready=False)
    turns(world, 50)
    world.spec = rollout(strategy=READY, paused=True)
    turns(world, 100)
    world.spec = rollout(strategy=READY)
    turns(world, 50)
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    assert world.until("RolledBack", turns=20) == "RolledBack"


@pytest.mark.parametrize("outage", ["operator", "list of services"])
@pytest.mark.parametrize("when", ["before it is wanted", "after the status and before the write"])
def test_an_outage_before_the_service_was_made_is_not_the_candidates_time(outage: str, when: str) -> None:
    world = World(rollout(strategy=READY))
    world.turn()
    assert world.status.run_id
    if when != "before it is wanted":
        world.turn(actions_done=0)
    if outage == "operator":
        world.turn(seconds=1200)
    else:
        world.unlisted = True
        turns(world, 600)
        world.unlisted = False
        world.turn()
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    assert SERVICE in world.managed
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_an_outage_while_it_loads_is_not_its_time_either() -> None:
    world = World(rollout(strategy=READY), ready=False)
    turns(world, 10)
    world.turn(seconds=DAYS)
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    world.ready = True
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_a_service_that_can_be_made_only_late_has_its_whole_time_to_get_ready() -> None:
    """A webhook was away for most of the time; then the model loads."""
    world = World(rollout(strategy=READY), ready=False)
    for _ in range(55):
        world.turn(actions_done=0)
    turns(world, 50)
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    world.ready = True
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_a_service_that_can_never_be_made_ends_at_the_deadline_and_was_tried_at_every_look() -> None:
    world = World(rollout(strategy=READY))
    asked = 0
    for _ in range(80):
        asked += any(isinstance(a, EnsureCandidate) for a in world.turn(actions_done=0).actions)
        if world.status.phase == "RolledBack":
            break
    assert asked > 55
    assert world.status.reason == "CandidateNotReady"
    assert "not there yet" in world.status.message


@pytest.mark.parametrize("look_s", [15.0, 60.0, 600.0])
def test_one_that_never_gets_ready_ends_however_seldom_it_is_looked_at(look_s: float) -> None:
    world = World(rollout(), ready=False)
    for _ in range(100):
        world.turn(seconds=look_s)
        if world.status.phase == "RolledBack":
            break
    assert world.status.reason == "CandidateNotReady"


@pytest.mark.parametrize("wrong", ["another model", "never ready"])
def test_the_next_candidate_does_not_inherit_the_time_of_the_one_before(wrong: str) -> None:
    world = World(rollout(strategy=READY), ready=wrong != "never ready", candidate_digest=OTHER if wrong == "another model" else CANDIDATE)
    turns(world, 55)
    other = "sha256:" + "d" * 64
    world.spec = rollout(strategy=READY, model={"digest": other, "version": "3"})
    turns(world, 40)
    assert world.status.candidate is not None
    assert (world.status.candidate.digest, world.status.phase, world.status.rejected_digests) == (other, "Pending", ())


def test_waiting_writes_no_status_at_most_looks() -> None:
    world = World(rollout(), ready=False)
    turns(world, 5)
    written = 0
    for _ in range(60):
        before = world.status
        world.turn()
        written += world.status != before
    assert written <= 7


def test_a_status_of_the_release_before_is_read_and_goes_on() -> None:
    world = World(rollout(strategy=READY), ready=False)
    turns(world, 20)
    data = json.loads(world.status.model_dump_json(exclude_none=True))
    assert data.pop("unready")["absent"] is False
    world.status = RolloutStatus.model_validate(data)
    turns(world, 50)
    assert world.status.phase == "Pending"
    assert world.until("RolledBack", turns=20) == "RolledBack"


@settings(max_examples=100, deadline=None)
@example([("ready", 3), ("gone", 61), ("ready", 1)])  # what isn't there can't be ready
@given(st.lists(st.tuples(
    st.sampled_from(["ready", "unready", "paused", "unlisted", "gone", "refused", "operator down"]), st.integers(1, 40)), max_size=12))
def test_nobody_is_rejected_before_the_deadline_of_unbroken_time(weather: list[tuple[str, int]]) -> None:
    """However it is disturbed: what counts is only what was seen in one piece. At last it ends, if nothing gets ready."""
    approvals = {"required": ["validation"]}
    world, seen = World(rollout(strategy=WEIGHTS, approvals=approvals)), 0.0
    for what, times in [*weather, ("unready", 70)]:
        world.ready, world.unlisted = what == "ready", what == "unlisted"
        world.spec = rollout(strategy=WEIGHTS, approvals=approvals, paused=what == "paused")
        if what == "gone":
            world.managed.clear()
        for _ in range(times):
            there = SERVICE in world.managed
            seconds = 900.0 if what == "operator down" else 2.0
            world.turn(seconds=seconds, actions_done=0 if what in ("gone", "refused") else None)
            broken = (what == "ready" and there) or what == "paused" or (SERVICE in world.managed) != there
            seen = 0.0 if broken else seen + min(seconds, 60.0 + 20.0)
            if world.status.phase == "RolledBack":
                assert world.status.reason == "CandidateNotReady"
                assert timedelta(seconds=seen) >= timedelta(seconds=118)
                return
    assert world.status.phase == "RolledBack"
