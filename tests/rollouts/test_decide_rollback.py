"""When a rollback is done: only when it is known that no request reaches the candidate, and never merely because time went by."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import timedelta

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafnium_rollout.actions import RetireService
from hafnium_rollout.notifications.notices import Subject, alerts
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import GateLook, LiveRoute, Observation, RouteSeen
from hafnium_rollout.status import RolloutStatus

WEIGHTED = {"steps": [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}


def going_back(**changes: object) -> World:
    """At 20 %, and a rollback is asked for in this turn."""
    world = World(rollout(strategy=WEIGHTED))
    world.until_step(0)
    world.bad_candidate = 0.5
    while world.status.rollback is None:
        world.turn()
    for name, value in changes.items():
        setattr(world, name, value)
    return world


def condition(world: World) -> tuple[str, str, str]:
    found = next(c for c in world.status.conditions if c.type == "RolledBack")
    return found.status, found.reason, found.message


# --- counters -----------------------------------------------------------------------------------------------------------------


def test_counters_that_nobody_knows_are_no_zero() -> None:
    world = going_back(uncounted=True)
    for _ in range(25):
        world.turn()
        assert world.status.phase == "Progressing"
    assert condition(world)[:2] == ("False", "RollingBack")
    assert "isn't known yet whether requests still reach" in world.status.message


def test_errors_of_all_gates_are_no_zero() -> None:
    world = going_back()
    plain = world.observe

    def unread(seconds: float) -> Observation:
        seen = plain(seconds)
        assert seen.look is not None
        return replace(seen, look=replace(seen.look, gates={"errors": GateLook(error="NaN")}, candidate_requests=None))

    world.observe = unread  # type: ignore[method-assign]
    for _ in range(25):
        world.turn()
        assert world.status.phase == "Progressing"
    world.observe = plain  # type: ignore[method-assign]
    assert world.until("RolledBack", turns=2) == "RolledBack"


def test_a_look_from_before_the_gateway_showed_the_route_says_nothing_about_now() -> None:
    """Its last scrape may lie before the change: a slow candidate has no request in it by chance."""
    world = going_back(rate=0.0)
    world.turn()
    assert world.status.rollback is not None
    shown = world.status.rollback.shown_since
    assert shown == world.now
    plain = world.observe

    def late(seconds: float) -> Observation:
        seen = plain(seconds)
        assert seen.look is not None
        return replace(seen, look=replace(seen.look, started=shown - timedelta(seconds=1)))

    world.observe = late  # type: ignore[method-assign]
    for _ in range(5):
        world.turn()
        assert world.status.phase == "Progressing"
    world.observe = plain  # type: ignore[method-assign]
    assert world.until("RolledBack", turns=2) == "RolledBack"


# --- a query of the user's own --------------------------------------------------------------------------------------------------

OWN = {"name": "own", "role": "Safety", "compare": {"margin": 0.02},
       "prometheus": {"bad": 'sum(bad{service="$service"})', "total": 'sum(all{service="$service"})'}}


def probed(**changes: object) -> World:
    """A rollback of a rollout whose own total goes on counting a kubelet's probes, 12 in each look."""
    world = World(rollout(strategy=WEIGHTED, gates=[OWN]))
    plain = world.observe

    def observe(seconds: float) -> Observation:
        seen = plain(seconds)
        if seen.look is None:
            return seen
        found = seen.look.gates["own"].series[0]
        look = replace(found, stable=replace(found.stable, total=found.stable.total + 12),
                       candidate=replace(found.candidate, total=found.candidate.total + 12))
        return replace(seen, look=replace(seen.look, gates={"own": GateLook((look,))}))

    world.observe = observe  # type: ignore[method-assign]
    world.until_step(0)
    world.bad_candidate = 0.5
    while world.status.rollback is None:
        world.turn()
    for name, value in changes.items():
        setattr(world, name, value)
    return world


def test_probes_in_a_total_of_ones_own_do_not_keep_a_rollback_from_ending() -> None:
    world = probed()
    assert world.until("RolledBack", turns=3) == "RolledBack"
    assert "no request of a caller reaches the candidate; queries of gates still count own 12 (probes?)" in world.status.message
    assert "RollbackUnconfirmed" not in world.events


def test_a_total_of_ones_own_that_falls_silent_is_no_count_either() -> None:
    world = probed(uncounted=True, pods=1)
    for _ in range(25):
        world.turn()
        assert world.status.phase == "Progressing"
    assert world.status.rollback is not None
    assert "isn't known" in world.status.rollback.doubt


def test_requests_that_our_counters_see_still_keep_it_from_ending_whatever_ones_own_total_says() -> None:
    world = probed(stray=3)
    for _ in range(60):
        world.turn()
        assert world.status.phase == "Progressing"
    assert condition(world)[:2] == ("False", "StillReached")
    assert "3 requests reached the candidate" in condition(world)[2]


# --- no weight, no counters ---------------------------------------------------------------------------------------------------


def test_a_candidate_that_only_got_copies_goes_back_without_counters() -> None:
    world = World()
    world.until_step(0)
    world.bad_candidate, world.uncounted = 0.9, True
    assert world.until("RolledBack", turns=30) == "RolledBack"
    assert world.route == RouteSeen("risk", None, 0, False)


def test_a_candidate_that_was_never_ready_goes_back_without_counters_and_the_next_one_begins() -> None:
    world = World(rollout(strategy={"readyDeadline": "30s"}), ready=False, uncounted=True)
    assert world.until("RolledBack", turns=20) == "RolledBack"
    world.spec, world.candidate_digest, world.ready, world.uncounted = rollout(model={"digest": OTHER}), OTHER, True, False
    assert world.until("Promoted") == "Promoted"


def test_weight_that_a_stranger_gave_is_weight() -> None:
    world = World()
    world.until_step(0)
    assert not world.status.had_weight
    world.route = RouteSeen("risk", SERVICE, 30, False, "eve")
    world.turn()
    assert world.status.had_weight


def test_a_status_from_before_this_was_kept_is_taken_to_have_had_weight() -> None:
    data = World().status.model_dump(mode="json")
    assert data.pop("hadWeight")
    assert RolloutStatus.model_validate(data).had_weight


# --- it takes too long --------------------------------------------------------------------------------------------------------


def test_after_the_longest_blindness_the_candidates_service_goes_and_that_is_what_ends_it() -> None:
    world = going_back(uncounted=True, pods=1)
    retired = False
    for _ in range(40):
        retired = retired or any(isinstance(a, RetireService) and a.service == SERVICE for a in world.turn().actions)
        assert world.status.phase == "Progressing"
    assert retired
    assert SERVICE not in world.managed
    assert condition(world)[:2] == ("Unknown", "NotCounted")
    assert world.events.count("RollbackUnconfirmed") == 1
    point = next(p for p in world.status.history if p.event == "RollbackUnconfirmed")
    assert point.alert
    assert "isn't known" in point.message
    assert "HafniumRolloutRollbackUnconfirmed" in {a.name for a in alerts(Subject("ns", "risk"), world.status, world.now)}
    world.pods = 0  # the last one has ended
    assert world.until("RolledBack", turns=1) == "RolledBack"
    assert "service and pods are gone" in world.status.message
    assert world.status.rejected_digests == (CANDIDATE,)
    world.spec, world.candidate_digest, world.bad_candidate = rollout(model={"digest": OTHER}), OTHER, 0.0
    world.uncounted, world.pods = False, None
    assert world.until("Promoted") == "Promoted"


def test_a_gateway_that_does_not_show_the_route_is_told_and_nothing_is_taken_down() -> None:
    world = going_back()
    plain = world.live
    world.live = lambda: LiveRoute({"risk": 80, SERVICE: 20})  # type: ignore[method-assign]
    for _ in range(60):
        decision = world.turn()
        assert not any(isinstance(a, RetireService) for a in decision.actions)
    assert world.status.phase == "Progressing"
    assert condition(world)[:2] == ("Unknown", "NotShown")
    assert world.events.count("RollbackUnconfirmed") == 1
    world.live = plain  # type: ignore[method-assign]
    assert world.until("RolledBack", turns=3) == "RolledBack"


def test_requests_that_go_on_coming_past_the_gateway_are_told_and_nobody_is_cut_off() -> None:
    world = going_back(stray=3)
    for _ in range(60):
        decision = world.turn()
        assert not any(isinstance(a, RetireService) for a in decision.actions)
    assert world.status.phase == "Progressing"
    assert condition(world)[:2] == ("False", "StillReached")
    assert "3 requests reached the candidate" in condition(world)[2]
    world.stray = 0
    assert world.until("RolledBack", turns=2) == "RolledBack"


def test_a_person_ends_it_at_once_by_deleting_the_service() -> None:
    world = going_back(uncounted=True)
    world.turn()
    world.managed.clear()
    assert world.until("RolledBack", turns=2) == "RolledBack"


@pytest.mark.parametrize("unknown", ["pods", "services"])
def test_a_list_that_cannot_be_read_is_no_proof_that_the_candidate_is_gone(unknown: str) -> None:
    world = going_back(uncounted=True)
    world.managed.clear()
    plain = world.observe
    lost = {"candidate_pods": None} if unknown == "pods" else {"services": None, "managed": frozenset[str]()}
    world.observe = lambda seconds: replace(plain(seconds), **lost)  # type: ignore[method-assign, arg-type]
    for _ in range(60):
        world.turn()
        assert world.status.phase == "Progressing"


# --- whatever comes together --------------------------------------------------------------------------------------------------

TROUBLE = st.tuples(
    st.sampled_from(["fine", "blind", "uncounted", "slow gateway", "stray", "pods stay", "lost status", "no action", "stranger"]),
    st.integers(1, 15))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(troubles=st.lists(TROUBLE, min_size=1, max_size=8), seed=st.integers(0, 5))
def test_a_rollback_is_never_said_to_be_done_on_what_is_not_known(troubles: list[tuple[str, int]], seed: int) -> None:
    world = World(rollout(strategy=WEIGHTED), random=random.Random(seed), rate=20.0)
    world.until_step(0)
    world.actions = (UserAction(type="Abort", id="1", candidate_digest=CANDIDATE),)
    for trouble, times in [*troubles, ("fine", 20)]:
        for _ in range(times):
            world.blind, world.uncounted = trouble == "blind", trouble in ("uncounted", "pods stay")
            world.live_lag, world.stray = 3 if trouble == "slow gateway" else 0, 2 if trouble == "stray" else 0
            world.pods = 1 if trouble == "pods stay" else None
            if trouble == "stranger" and world.random.random() < 0.3:
                world.route = RouteSeen("risk", SERVICE, 50, False)
            before, weight = world.status, world.weight
            decision = world.turn(seconds=5.0, keep_status=trouble != "lost status", actions_done=0 if trouble == "no action" else None)
            assert sum(world.live().weights.values()) == 100
            if before.rollback is not None:
                assert world.weight <= weight, "a failed candidate gained weight"
            if before.rollback is not None and decision.status.rollback is None:
                seen = world.seen
                assert trouble != "blind"
                assert seen.live is not None
                assert seen.live.weights == {"risk": 100}
                counted = seen.look is not None and seen.look.candidate_requests == 0
                gone = SERVICE not in seen.managed and seen.candidate_pods == 0
                assert counted or gone
    assert world.status.phase == "RolledBack", world.status.message
