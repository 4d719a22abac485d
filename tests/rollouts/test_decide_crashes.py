"""Interrupted transitions: whatever is cut off, delayed or unreadable, weights sum to 100, a failed candidate never gains
weight, and good evidence leads to the end."""

from __future__ import annotations

import random

import pytest
from hafnium_rollout_world import CANDIDATE, SERVICE, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TROUBLE = st.tuples(
    st.sampled_from(["fine", "fine", "lost status", "no action", "blind", "slow gateway", "unready", "restart", "counter reset"]),
    st.integers(1, 4),
)


def _step(world: World, trouble: str) -> None:
    world.blind = trouble in ("blind", "counter reset")
    world.live_lag = 2 if trouble == "slow gateway" else 0
    world.ready = trouble != "unready"
    world.restarts += trouble == "restart" and world.random.random() < 0.2
    world.turn(keep_status=trouble != "lost status", actions_done=0 if trouble == "no action" else None)


def _check(world: World, weight_before: int, failed: bool) -> bool:
    """Invariants after a turn. Returns whether the candidate has failed by now."""
    live = world.live()
    assert sum(live.weights.values()) in (0, 100)
    status = world.status
    if status.step is not None:
        assert 0 <= status.step.weight_desired <= 100
    now_failed = failed or status.rollback is not None or CANDIDATE in status.rejected_digests
    if now_failed and failed and world.route is not None and world.route.stable != SERVICE:
        assert world.weight <= weight_before, "a failed candidate gained weight"
    return now_failed


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(troubles=st.lists(TROUBLE, max_size=40), seed=st.integers(0, 5))
def test_a_good_candidate_arrives_through_any_trouble(troubles: list[tuple[str, int]], seed: int) -> None:
    world = World(random=random.Random(seed), rate=100.0)
    failed = False
    for trouble, times in troubles:
        for _ in range(times):
            before = world.weight
            _step(world, trouble)
            failed = _check(world, before, failed)
    world.blind, world.live_lag, world.ready = False, 0, True
    ended = world.until("Promoted", "RolledBack", "Paused", turns=400)
    if ended == "RolledBack":
        assert world.status.reason in ("CrashLoop", "CandidateUnavailable"), world.status.message
        assert world.route is not None
        assert world.route.candidate is None
    else:
        assert ended == "Promoted", world.status.message
        for _ in range(3):
            world.turn()
        assert world.route is not None
        assert (world.route.stable, world.route.candidate) == (SERVICE, None)
        assert world.raised == set(), "the pods of its climb are its autoscaler's again"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(troubles=st.lists(TROUBLE, max_size=40), onset=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_bad_candidate_goes_back_through_any_trouble(troubles: list[tuple[str, int]], onset: int, seed: int) -> None:
    steps = [{"shadow": True, "deadline": "4h"}, {"weight": 20, "minDwell": "1h", "deadline": "8h"}, {"weight": 100}]
    world = World(rollout(strategy={"steps": steps}), random=random.Random(seed), rate=100.0)
    failed, turns = False, 0
    for trouble, times in troubles:
        for _ in range(times):
            turns += 1
            world.bad_candidate = 0.5 if turns > onset else 0.0
            before = world.weight
            _step(world, trouble)
            failed = _check(world, before, failed)
    world.bad_candidate = 0.5
    world.blind, world.live_lag, world.ready = False, 0, True
    for _ in range(200):
        before = world.weight
        world.turn()
        failed = _check(world, before, failed)
        if world.status.phase == "RolledBack":
            break
    assert world.status.phase == "RolledBack", world.status.message
    assert CANDIDATE in world.status.rejected_digests
    for _ in range(5):
        world.turn()
    assert world.route is not None
    assert (world.route.stable, world.route.candidate) == ("risk", None)
    assert SERVICE not in world.managed


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("cut", ["before the status", "between status and weight"])
def test_a_crash_at_each_step_is_no_strangers_change(index: int, cut: str) -> None:
    """Every turn that acts is cut off once at the given place; then the next controller goes on."""
    world = World()
    for _ in range(400):
        acts = world.status.step is not None and world.status.step.index == index
        keep = not (acts and cut == "before the status" and world.random.random() < 0.5)
        done = 0 if acts and cut == "between status and weight" and world.random.random() < 0.5 else None
        world.turn(keep_status=keep, actions_done=done)
        if world.status.phase == "Promoted":
            break
    assert world.status.phase == "Promoted"
    assert "ExternalChange" not in world.events


def test_an_old_leader_that_wakes_up_cannot_raise_a_rejected_candidate() -> None:
    """Its late write is seen and put back; the status that it would write is refused by the lock, not here."""
    world = World()
    world.until_step(1)
    late = world.route
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=30) == "RolledBack"
    world.route = late
    world.turn()
    assert world.weight == 0
