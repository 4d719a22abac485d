"""Candidates, services, approvals and people: what may happen to a rollout besides its gates."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, STABLE, START, World, rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from hafnium_rollout.actions import SetWeight
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import FOREIGN, Counts, GateLook, Observation, RouteSeen, Series, ServiceSeen
from hafnium_rollout.status import StepStatus
from hafnium_rollout.turn import as_listed, restarts_in_step


def action(kind: str, digest: str = CANDIDATE, name: str = "1") -> UserAction:
    return UserAction.model_validate({"type": kind, "id": name, "candidateDigest": digest, "reason": "because"})


# --- the candidate's service ---------------------------------------------------------------------------------------------------


def test_a_candidate_gets_not_even_copies_before_it_is_ready() -> None:
    world = World(ready=False)
    for _ in range(30):
        world.turn()
    assert SERVICE in world.managed
    assert world.route == RouteSeen("risk", None, 0, False)
    world.ready = True
    assert world.until("Promoted") == "Promoted"


def test_a_candidate_that_serves_another_model_is_not_ready() -> None:
    world = World(candidate_digest=OTHER)
    for _ in range(30):
        world.turn()
    assert world.route == RouteSeen("risk", None, 0, False)
    assert "serves sha256:ccc" in world.status.message


def test_a_candidate_that_is_never_ready_is_rejected_with_its_message() -> None:
    world = World(rollout(strategy={"readyDeadline": "30s"}), ready=False)
    assert world.until("RolledBack", turns=40) == "RolledBack"
    assert world.status.reason == "CandidateNotReady"
    assert world.status.rejected_digests == (CANDIDATE,)


def test_a_crash_loop_is_a_safety_failure_and_one_restart_is_not() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.restarts = 2
    for _ in range(10):
        world.turn()
    assert world.status.phase == "Progressing"
    world.restarts = 3
    assert world.until("RolledBack", turns=5) == "RolledBack"
    assert world.status.reason == "CrashLoop"


def test_restarts_are_counted_per_pod_and_from_the_steps_beginning() -> None:
    """A node that goes down restarts each of its pods once: that is no crash loop, however many pods there are."""
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.pod_restarts = {"old": 7}
    world.until_step(0)
    world.pod_restarts = {"old": 8, **{f"p{i}": 1 for i in range(20)}}
    for _ in range(10):
        world.turn()
    assert world.status.phase == "Progressing"
    world.pod_restarts = {"old": 8, "p3": 3}
    assert world.until("RolledBack", turns=5) == "RolledBack"
    assert world.status.reason == "CrashLoop"
    assert "restarted 3 times" in world.status.message


def test_a_pod_of_the_same_name_that_began_anew_is_counted_anew() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.pod_restarts = {"p": 7}
    world.until_step(0)
    world.pod_restarts = {"p": 1}
    world.turn()
    world.pod_restarts = {"p": 4}
    assert world.until("RolledBack", turns=5) == "RolledBack"


@settings(max_examples=200, deadline=None)
@given(
    before=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9)),
    more=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)))
def test_a_crash_loop_is_one_pods_own_restarts_and_never_a_sum(before: dict[str, int], more: dict[str, int]) -> None:
    step = StepStatus(index=0, entered_at=START, weight_desired=5, pod_restarts_before=as_listed(before), restarts_before=0)
    now = {pod: before.get(pod, 0) + more.get(pod, 0) for pod in before | more}
    found = ServiceSeen("s", CANDIDATE, ready=True, restarts=max(now.values(), default=0), pod_restarts=now)
    assert restarts_in_step(step, found) == max(more.values(), default=0)


def test_a_candidate_that_the_cluster_has_no_room_for_loses_its_traffic_and_is_not_rejected() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.no_room = "0/3 nodes are available: 3 Insufficient cpu"
    for _ in range(28):
        world.turn()
    assert (world.status.phase, world.weight) == ("Progressing", 5)
    for _ in range(8):
        world.turn()
    assert (world.status.phase, world.status.reason, world.weight) == ("Paused", "NoRoom", 0)
    assert "Insufficient cpu" in world.status.message
    assert world.events.count("NoRoom") == 1
    assert world.status.rejected_digests == ()
    world.no_room = ""
    for _ in range(10):
        world.turn()
    assert (world.status.phase, world.weight) == ("Paused", 0), "a person says when it goes on"
    world.actions = (action("Retry"),)
    world.until_step(0)
    assert world.weight == 5


def test_a_candidate_that_finds_no_room_at_the_start_waits_for_it_and_says_so_once() -> None:
    world = World(rollout(strategy={"readyDeadline": "30s"}), no_room="0/3 nodes are available")
    for _ in range(60):
        world.turn()
    assert (world.status.phase, world.status.reason) == ("Pending", "NoRoom")
    assert world.events.count("NoRoom") == 1
    assert world.status.rejected_digests == ()
    world.no_room = ""
    assert world.until("Promoted") == "Promoted"


def test_a_candidate_that_gets_room_has_its_time_to_get_ready() -> None:
    """Between "no room" and "ready" it loads its model: that is neither."""
    world = World(rollout(strategy={"readyDeadline": "30s"}), no_room="0/3 nodes are available")
    for _ in range(60):
        world.turn()
    world.no_room, world.ready = "", False
    for _ in range(8):
        world.turn()
    assert (world.status.phase, world.status.rejected_digests) == ("Pending", ())
    world.ready = True
    assert world.until("Promoted") == "Promoted"


def test_a_candidate_that_lost_its_room_and_gets_it_back_is_not_rejected_while_it_loads() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.no_room = "0/3 nodes are available"
    for _ in range(40):
        world.turn()
    assert (world.status.phase, world.status.reason) == ("Paused", "NoRoom")
    world.no_room, world.ready = "", False
    for _ in range(20):
        world.turn()
    assert (world.status.phase, world.status.rejected_digests) == ("Paused", ())
    world.ready = True
    world.turn()
    world.actions = (action("Retry"),)
    world.until_step(0)
    assert world.weight == 5


def test_a_share_that_is_to_be_taken_away_is_not_given_again_by_blindness() -> None:
    """The write that takes it away got lost, and nobody counts anything: the candidate has no pods."""
    world = World(rollout(strategy={"steps": [
        {"weight": 5, "minSamples": 100, "deadline": "2h"}, {"weight": 25, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(1)
    world.no_room = "0/3 nodes are available"
    world.turn()
    world.misrouted = 1.0
    while world.status.reason != "NoRoom":
        world.turn(actions_done=0)
        assert world.status.phase in ("Progressing", "Paused")
    assert world.weight == 25
    for _ in range(10):
        world.turn()
        assert world.status.step is not None
        assert world.status.step.weight_desired == 0
    assert world.weight == 0


def test_a_step_down_makes_a_dead_candidate_no_younger() -> None:
    world = World(rollout(strategy={"steps": [
        {"weight": 5, "minSamples": 100, "deadline": "2h"}, {"weight": 25, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(1)
    world.ready, world.misrouted = False, 1.0
    assert world.until("RolledBack", turns=45) == "RolledBack"


def test_want_of_room_saves_no_candidate_that_fails_otherwise() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.no_room, world.bad_candidate = "0/3 nodes are available", 0.5
    assert world.until("RolledBack", turns=30) == "RolledBack"
    assert world.status.rejected_digests == (CANDIDATE,)


def test_a_candidate_that_stays_away_goes_back_and_a_short_absence_does_not() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}],
                                    "maxBlindDuration": "60s"}))
    world.until_step(0)
    world.ready = False
    for _ in range(20):
        world.turn()
    assert world.status.phase == "Progressing"
    world.ready = True
    world.turn()
    world.ready = False
    assert world.until("RolledBack", turns=40) == "RolledBack"
    assert world.status.reason == "CandidateUnavailable"


def test_another_model_under_the_candidates_name_goes_back_at_once() -> None:
    world = World()
    world.until_step(1)
    world.candidate_digest = OTHER
    assert world.until("RolledBack", turns=4) == "RolledBack"
    assert world.status.reason == "WrongModel"


def test_a_deleted_candidate_is_made_again() -> None:
    world = World()
    world.until_step(1)
    world.managed.clear()
    world.turn()
    assert SERVICE in world.managed
    assert world.until("Promoted") == "Promoted"


def test_an_unready_candidate_is_not_raised() -> None:
    world = World()
    world.until_step(1)
    world.ready = False
    for _ in range(25):
        world.turn()
    assert world.weight == 5


# --- first, same and new candidates ----------------------------------------------------------------------------------------------


def test_the_first_model_of_a_route_serves_when_it_is_ready() -> None:
    world = World(route=None)
    world.observe = _without_stable(world)  # type: ignore[method-assign]
    assert world.until("Promoted", turns=10) == "Promoted"
    assert world.status.reason == "FirstModel"
    assert world.route == RouteSeen(SERVICE, None, 0, False)


def _without_stable(world: World):
    plain = World.observe

    def observe(seconds: float):
        seen = plain(world, seconds)
        assert seen.services is not None
        services = {k: v for k, v in seen.services.items() if k != "risk"}
        return replace(seen, services=services, declared=frozenset(world.managed))

    return observe


def test_a_service_that_has_no_route_yet_is_waited_for_not_replaced() -> None:
    world = World(route=None)
    for _ in range(10):
        world.turn()
    assert world.route is None
    assert "no route yet" in world.status.message
    world.route = RouteSeen("risk", None, 0, False)
    assert world.until("Promoted") == "Promoted"
    assert "StepEntered" in world.events


def test_the_stable_model_itself_needs_no_rollout() -> None:
    world = World(rollout(model={"digest": STABLE}))
    assert world.until("Promoted", turns=3) == "Promoted"
    assert world.route == RouteSeen("risk", None, 0, False)
    assert not world.managed


def test_a_new_candidate_restarts_and_the_old_one_is_not_rejected() -> None:
    world = World()
    world.until_step(2)
    world.spec = rollout(model={"digest": OTHER, "version": "3"})
    world.turn()
    assert world.weight == 0
    world.candidate_digest = OTHER
    assert world.until("Promoted") == "Promoted"
    assert world.route == RouteSeen("risk-cccccccc", None, 0, False)
    assert world.status.rejected_digests == ()


def test_a_new_candidate_can_wait_in_a_queue() -> None:
    world = World(rollout(strategy={"onNewCandidate": "Queue"}))
    world.until_step(2)
    world.spec = rollout(model={"digest": OTHER, "version": "3"}, strategy={"onNewCandidate": "Queue"})
    assert world.until("Promoted") == "Promoted"
    assert world.route == RouteSeen(SERVICE, None, 0, False)
    world.turn()
    assert world.status.phase == "Pending"
    assert world.status.candidate is not None
    assert world.status.candidate.digest == OTHER


def test_a_new_candidate_can_be_refused() -> None:
    world = World(rollout(strategy={"onNewCandidate": "Reject"}))
    world.until_step(2)
    world.spec = rollout(model={"digest": OTHER, "version": "3"}, strategy={"onNewCandidate": "Reject"})
    assert world.until("Promoted") == "Promoted"
    for _ in range(5):
        world.turn()
    assert world.status.rejected_digests == (OTHER,)
    assert world.route == RouteSeen(SERVICE, None, 0, False)


def test_asking_for_the_stable_model_again_reverts_without_rejecting() -> None:
    world = World()
    world.until_step(2)
    world.spec = rollout(model={"digest": STABLE, "version": "1"})
    for _ in range(6):
        world.turn()
    assert world.weight == 0
    assert world.status.rejected_digests == ()
    assert world.status.phase == "Promoted"
    assert world.status.stable is not None
    assert world.status.stable.digest == STABLE


# --- approvals -------------------------------------------------------------------------------------------------------------------


def test_missing_approvals_hold_before_live_traffic_and_shadow_runs_meanwhile() -> None:
    world = World(rollout(approvals={"required": ["validation", "security"]}))
    world.until_step(0)
    for _ in range(60):
        world.turn()
    assert world.status.reason == "ApprovalMissing"
    assert world.route is not None
    assert world.route.shadow
    world.approvals = frozenset({"validation"})
    world.turn()
    assert "security" in world.status.message
    world.approvals = frozenset({"validation", "security"})
    assert world.until("Promoted") == "Promoted"


def test_a_deadline_at_which_only_an_approval_was_missing_says_so_and_skip_goes_on_when_it_is_there() -> None:
    shadow = {"shadow": True, "deadline": "60s"}
    world = World(rollout(strategy={"steps": [shadow, {"weight": 100}]}, approvals={"required": ["validation"]}))
    assert world.until("Paused", turns=60) == "Paused"
    assert world.status.reason == "DeadlineExceeded"
    assert world.status.message.endswith("approvals are missing: validation")
    world.approvals = frozenset({"validation"})
    world.turn()
    assert world.status.phase == "Paused", "a pause is ended by a person"
    world.actions = (UserAction(type="SkipStep", id="s", candidate_digest=CANDIDATE),)
    assert world.until("Promoted") == "Promoted"


@pytest.mark.parametrize("kind", ["SkipStep", "Promote"])
def test_no_person_can_skip_approvals(kind: str) -> None:
    world = World(rollout(approvals={"required": ["validation"]}))
    world.until_step(0)
    world.actions = (action(kind),)
    for _ in range(5):
        world.turn()
    assert "ActionIgnored" in world.events
    assert world.weight == 0


# --- people ----------------------------------------------------------------------------------------------------------------------


def test_an_action_is_done_once_and_only_for_the_model_that_it_names() -> None:
    steps = [{"weight": w, "minDwell": "1h", "deadline": "2h"} for w in (5, 25, 50)]
    world = World(rollout(strategy={"steps": [*steps, {"weight": 100}]}))
    world.until_step(0)
    world.actions = (action("SkipStep", OTHER, "wrong"), action("SkipStep", name="right"))
    for _ in range(6):
        world.turn()
    assert world.weight == 25
    assert world.status.handled_actions == ("wrong", "right")
    assert world.status.last_action_id == "right"


def test_promote_goes_to_the_last_step_and_safety_stays_armed() -> None:
    gates = [{"name": "errors", "role": "Safety", "requests": {}, "hardLimit": 0.1}]
    steps = [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100, "minDwell": "60s"}]
    world = World(rollout(strategy={"steps": steps}, gates=gates))
    world.until_step(0)
    world.actions = (action("Promote"),)
    world.until_step(1)
    assert world.weight == 100
    world.bad_candidate = 0.4
    assert world.until("RolledBack", "Promoted", turns=20) == "RolledBack"


def test_promote_ends_promoted_after_the_bake() -> None:
    steps = [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100, "minDwell": "20s"}]
    world = World(rollout(strategy={"steps": steps}))
    world.until_step(0)
    world.actions = (action("Promote"),)
    assert world.until("Promoted", turns=30) == "Promoted"


def test_a_failed_candidate_is_not_saved_by_promote() -> None:
    world = World()
    world.until_step(1)
    world.bad_candidate = 0.5
    for _ in range(30):
        world.actions = (action("Promote", name=str(world.now)),) if world.status.rollback else ()
        world.turn()
        assert world.weight <= 5
    assert world.status.phase == "RolledBack"


def test_abort_takes_it_back_and_remembers() -> None:
    world = World()
    world.until_step(2)
    world.actions = (action("Abort"),)
    assert world.until("RolledBack", turns=6) == "RolledBack"
    assert world.status.reason == "Aborted"
    assert world.status.rejected_digests == (CANDIDATE,)


def test_pause_holds_and_resumes_where_it_was() -> None:
    world = World()
    world.until_step(1)
    world.spec = rollout(paused=True)
    for _ in range(60):
        world.turn()
    assert (world.status.phase, world.weight) == ("Paused", 5)
    world.spec = rollout()
    assert world.until("Promoted") == "Promoted"


def test_a_paused_rollout_still_goes_back_when_it_fails() -> None:
    world = World()
    world.until_step(1)
    world.spec = rollout(paused=True)
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=30) == "RolledBack"


# --- the status itself -----------------------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_decision() -> None:
    world = World()
    world.until_step(1)
    from hafnium_rollout.decide import decide
    seen = world.observe(2.0)
    at = world.now + timedelta(seconds=2)
    assert decide(world.spec, world.status, seen, at) == decide(world.spec, world.status, seen, at)


def test_history_is_bounded_and_keeps_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.reporting.LOOK_GATES_MAX", 1)
    world = World(rollout(strategy={"steps": [{"shadow": True, "minSamples": 100_000}, {"weight": 100}]}))
    assert world.until("Promoted") == "Promoted"
    events = [p.event for p in world.status.history]
    assert events.count("Look") <= 100
    assert [e for e in events if e != "Look"] == world.events


def test_conditions_tell_since_when_they_hold() -> None:
    world = World()
    world.until_step(1)
    progressing = next(c for c in world.status.conditions if c.type == "Progressing")
    world.turn()
    after = next(c for c in world.status.conditions if c.type == "Progressing")
    assert (progressing.status, after.last_transition_time) == ("True", progressing.last_transition_time)


def test_a_changed_gate_begins_its_evidence_anew() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    for _ in range(20):
        world.turn()
    before = world.status.gates[0].samples
    world.spec = rollout(
        strategy={"steps": [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]},
        gates=[{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.03}}],
    )
    world.turn()
    assert world.status.gates[0].samples < before / 2


def test_actions_name_both_arms_so_that_one_alone_is_enough_after_a_crash() -> None:
    world = World()
    while world.weight == 0:
        decision = world.turn()
    weights = [a for a in decision.actions if isinstance(a, SetWeight)]
    assert weights == [SetWeight("risk", SERVICE, 5)]


@pytest.mark.parametrize("route", [
    RouteSeen(FOREIGN, None, 0, False, others=("risk", "risk-old")), RouteSeen("risk-old", "risk", 99, False),
    RouteSeen("risk", "tap", 0, True),
], ids=["another form", "two answer", "copies"])
def test_a_route_that_does_not_say_who_is_stable_is_never_written_and_makes_nobody_stable(route: RouteSeen) -> None:
    world = World(route=route)
    for _ in range(20):
        assert world.turn().actions == ()
    assert world.status.stable is None
    assert "isn't known who is stable" in world.status.message
    world.route = RouteSeen("risk", None, 0, False)
    assert world.until("Promoted") == "Promoted"
    assert world.status.previous[0].service == "risk"


def test_no_first_model_takes_the_requests_of_a_route_that_came_or_can_not_be_read_meanwhile() -> None:
    """The run began where there was certainly none."""
    world = World(route=None)
    world.observe = plain = _without_stable(world)  # type: ignore[method-assign]
    world.turn()
    assert world.status.run_id
    world.observe = lambda seconds: replace(plain(seconds), route=None, route_absent=False)  # type: ignore[method-assign]
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.status.stable) == ("Pending", None)
    world.observe = plain  # type: ignore[method-assign]
    world.route = RouteSeen(FOREIGN, None, 0, False, others=("other",))
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.status.stable) == ("Pending", None)
    world.route = None
    assert world.until("Promoted", turns=5) == "Promoted"


# --- a verdict on a model that goes back for another's sake -------------------------------------------------------------------


def _superseded(**changes: Any) -> World:
    """At 20 % a new digest came, and nobody counts yet whether the old one still gets requests."""
    world = World(rollout(strategy={"steps": [{"weight": 20, "minDwell": "1h"}, {"weight": 100}]}), **changes)
    world.until_step(0)
    for _ in range(10):
        world.turn()
    world.uncounted = True
    world.spec = rollout(strategy={"steps": [{"weight": 20, "minDwell": "1h"}, {"weight": 100}]}, model={"digest": OTHER})
    world.turn()
    assert world.status.rollback is not None
    assert not world.status.rollback.reject
    return world


def _asked_for_again(world: World) -> None:
    world.uncounted = False
    world.spec = rollout()
    for _ in range(60):
        world.turn()
        assert world.weight == 0


def test_an_abort_of_a_model_that_goes_back_for_anothers_sake_is_remembered() -> None:
    world = _superseded()
    world.actions = (action("Abort"),)
    for _ in range(3):
        world.turn()
    assert "ActionIgnored" not in world.events
    assert any("because" in m for m in world.messages)
    _asked_for_again(world)
    assert world.status.rejected_digests == (CANDIDATE,)
    assert world.status.phase == "RolledBack"


def test_an_abort_that_comes_right_after_such_a_rollback_is_remembered_too() -> None:
    world = _superseded()
    world.uncounted = False
    while world.status.phase != "RolledBack":
        world.turn()
    world.actions = (action("Abort"),)
    world.turn()
    assert world.status.rejected_digests == (CANDIDATE,)
    assert "ActionIgnored" not in world.events


def test_a_failure_that_is_proven_while_a_model_goes_back_for_anothers_sake_is_remembered() -> None:
    """The gateway takes its time, and the candidate fails meanwhile."""
    world = _superseded(live_lag=8)
    world.bad_candidate = 1.0
    for _ in range(6):
        world.turn()
    assert world.status.rollback is not None
    assert world.status.rollback.reject
    assert "gate errors" in world.status.rollback.message
    world.bad_candidate = 0.0
    _asked_for_again(world)
    assert world.status.rejected_digests == (CANDIDATE,)


def test_failures_of_who_asks_it_past_the_gateway_reject_nobody() -> None:
    world = _superseded()
    plain = world.observe

    def probed(seconds: float) -> Observation:
        seen = plain(seconds)
        if seen.look is None:
            return seen
        bad = Series(Counts(0, 400), Counts(50, 50))
        return replace(seen, look=replace(seen.look, gates={"errors": GateLook((bad,))}))

    world.observe = probed  # type: ignore[method-assign]
    for _ in range(20):
        world.turn()
    assert world.status.rollback is not None
    assert not world.status.rollback.reject


@pytest.mark.parametrize("when", ["while the old one goes back", "when it would begin"])
def test_an_abort_of_the_next_model_keeps_it_from_beginning(when: str) -> None:
    world = _superseded()
    if when == "when it would begin":
        world.uncounted = False
        while world.status.phase != "RolledBack":
            world.turn()
    world.actions = (action("Abort", OTHER),)
    world.turn()
    world.uncounted = False
    for _ in range(30):
        world.turn()
    assert world.status.rejected_digests == (OTHER,)
    assert world.status.candidate is not None
    assert world.status.candidate.digest == CANDIDATE
    assert (world.status.phase, world.status.reason) == ("RolledBack", "DigestRejected")
    assert "ActionIgnored" not in world.events


def test_an_abort_of_the_model_in_production_rejects_nobody() -> None:
    world = World()
    assert world.until("Promoted") == "Promoted"
    for digest in (CANDIDATE, STABLE):
        world.actions = (action("Abort", digest, digest),)
        world.turn()
    assert world.status.phase == "Promoted"
    assert CANDIDATE not in world.status.rejected_digests
    assert world.events.count("ActionIgnored") == 2


def test_who_is_aborted_and_tried_again_in_one_turn_is_aborted() -> None:
    world = World()
    world.until_step(1)
    world.actions = (action("Abort", name="1"),)
    assert world.until("RolledBack") == "RolledBack"
    world.actions = (action("Retry", name="2"), action("Abort", name="3"))
    for _ in range(60):
        world.turn()
        assert world.weight == 0
    assert world.status.phase == "RolledBack"
    assert world.status.rejected_digests == (CANDIDATE,)
