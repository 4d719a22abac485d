"""The rules of decision, one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from itertools import cycle
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, STABLE, World, rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import FOREIGN, Counts, EvidenceUnread, GateLook, Observation, RouteSeen, Series
from hafnium_rollout.status import GateStatus, stored

SCORES = {"name": "scores", "role": "Quality", "scores": {}, "compare": {"margin": 0.05}}
ERRORS: dict[str, Any] = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}}


def action(kind: str, digest: str = CANDIDATE, name: str = "1") -> UserAction:
    return UserAction.model_validate({"type": kind, "id": name, "candidateDigest": digest})


def test_a_good_candidate_climbs_all_steps_and_the_old_one_stays_at_hand() -> None:
    world = World(rollout(gates=[ERRORS, SCORES]))
    assert world.until("Promoted", "RolledBack") == "Promoted"
    assert world.events.count("StepEntered") == 4
    assert world.route == RouteSeen(SERVICE, None, 0, False)
    assert [m.digest for m in world.status.previous] == [STABLE]
    assert world.status.stable is not None
    assert world.status.stable.digest == CANDIDATE


# --- 1 ---------------------------------------------------------------------------------------------------------------------------


def test_1_an_error_in_measuring_holds_and_is_neither_success_nor_failure() -> None:
    spec = rollout(gates=[ERRORS, {"name": "prom", "prometheus": {"bad": "b", "total": "t"}, "role": "Quality"}])
    world = World(spec)
    world.until_step(0)
    seen_error = False
    for _ in range(40):
        observed = world.observe(2.0)
        assert observed.look is not None
        gates = dict(observed.look.gates)
        gates["prom"] = type(gates["prom"])(error="NaN")
        world.observe = lambda _, o=replace(observed, look=replace(observed.look, gates=gates)): o  # type: ignore[method-assign]
        world.turn()
        del world.observe
        seen_error = seen_error or any(g.verdict == "Error" for g in world.status.gates)
    assert seen_error
    assert world.status.phase == "Progressing"
    assert world.status.step is not None
    assert world.status.step.index == 0


# --- 2 ---------------------------------------------------------------------------------------------------------------------------


def test_2_without_requests_nothing_ever_passes() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 10, "deadline": "30m"}, {"weight": 100}]}), rate=0.0)
    world.until_step(0)
    for _ in range(200):
        world.turn()
    assert world.weight == 10
    assert world.status.phase == "Progressing"


def test_2_looks_that_began_before_the_weight_was_seen_do_not_count() -> None:
    world = World(live_lag=5)
    while world.status.step is None:
        world.turn()
    for _ in range(5):
        world.turn()
        assert world.status.step.samples == 0
    world.until_step(0)
    assert world.status.step is not None
    assert world.status.step.samples == 0


def test_2_dwell_is_counted_from_the_moment_the_gateway_shows_the_weight() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 50, "minDwell": "40s"}, {"weight": 100}]}), live_lag=6)
    world.until_step(0)
    since = world.now
    while world.weight == 50:
        world.turn()
        assert world.now - since < timedelta(seconds=120)
    assert world.now - since >= timedelta(seconds=40)


def test_2_the_least_samples_are_waited_for() -> None:
    world = World(rollout(strategy={"steps": [{"shadow": True, "minSamples": 5000}, {"weight": 100}]}))
    world.until_step(0)
    while world.status.step is not None and world.status.step.index == 0:
        samples = world.status.step.samples
        world.turn()
    assert samples >= 4600  # the look that completes them moves on


class Probed(World):
    """Its gate `probe` counts 5,000 requests in a look, whatever the candidate gets."""

    def observe(self, seconds: float) -> Observation:
        seen = super().observe(seconds)
        if seen.look is not None:
            probe = GateLook((Series(Counts(0, 5000), Counts(0, 5000)),))
            self.seen = replace(seen, look=replace(seen.look, gates={**seen.look.gates, "probe": probe}))
        return self.seen


@pytest.mark.parametrize("role", ["Advisory", "Quality"])
def test_2_a_gate_that_counts_more_than_the_others_does_not_stand_in_for_their_samples(role: str) -> None:
    probe = {"name": "probe", "role": role, "prometheus": {"bad": "b", "total": "t"}}
    world = Probed(rollout(gates=[ERRORS, probe], strategy={"steps": [{"weight": 50, "minSamples": 10_000}, {"weight": 100}]}))
    world.until_step(0)
    seen = 0
    while world.status.step is not None and world.status.step.index == 0:
        assert world.status.step.samples == world.status.gates[0].samples
        seen = world.status.step.samples
        world.turn()
    assert seen > 9_500


@pytest.mark.parametrize(("gates", "counted"), [
    ([ERRORS, {"name": "shown", "role": "Quality", "latency": {"slowerThan": "1s"}, "requiredIn": ["shadow"]}], True),
    ([{"name": "drift", "role": "Safety", "drift": {}}, {"name": "shown", "role": "Advisory", "requests": {}}], True),
    ([{"name": "drift", "role": "Safety", "drift": {}},
      {"name": "probe", "role": "Advisory", "prometheus": {"bad": "b", "total": "t"}}], False),
], ids=["a gate of other steps", "shown only, and our own counters", "shown only, and a query"])
def test_2_samples_are_requests_of_the_candidate(gates: list[dict[str, Any]], counted: bool) -> None:
    world = Probed(rollout(gates=gates, strategy={"steps": [{"weight": 50, "minSamples": 100_000}, {"weight": 100}]}))
    world.until_step(0)
    for _ in range(5):
        world.turn()
    assert world.status.step is not None
    assert 500 < world.status.step.samples < 1500
    assert (world.status.step.samples == world.status.gates[0 if gates[0] is ERRORS else 1].samples) is counted


# --- 3 ---------------------------------------------------------------------------------------------------------------------------


def test_3_a_safety_failure_goes_back_at_once_whatever_the_dwell() -> None:
    steps = [{"weight": 20, "minDwell": "24h", "deadline": "72h"}, {"weight": 100}]
    world = World(rollout(strategy={"steps": steps}))
    world.until_step(0)
    began = world.now
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=20) == "RolledBack"
    assert world.now - began < timedelta(seconds=20)
    assert world.status.rejected_digests == (CANDIDATE,)
    assert world.weight == 0
    assert "errors" in world.status.message


def test_3_the_hard_limit_fails_even_inside_the_margin() -> None:
    gates = [{**ERRORS, "compare": {"margin": 0.9, "harmless": 0.8}, "hardLimit": 0.1}]
    world = World(rollout(gates=gates, strategy={"steps": [{"weight": 20, "minDwell": "1h"}, {"weight": 100}]}))
    world.until_step(0)
    world.bad_candidate = 0.4
    assert world.until("RolledBack", turns=20) == "RolledBack"
    assert "hard limit" in world.status.message
    assert "candidate no requests" not in world.status.message, "it says how many were bad"


def test_3_the_hard_limit_does_not_blame_the_candidate_for_an_incident_of_both() -> None:
    gates = [{**ERRORS, "hardLimit": 0.1}]
    world = World(rollout(gates=gates, strategy={"steps": [{"weight": 20, "minDwell": "1h", "deadline": "3h"}, {"weight": 100}]}))
    world.until_step(0)
    world.bad_candidate = world.bad_stable = 0.3
    for _ in range(100):
        world.turn()
    world.bad_candidate = world.bad_stable = 0.01
    for _ in range(100):
        world.turn()
    assert world.status.phase == "Progressing"


def test_3_at_full_weight_the_hard_limit_is_still_armed() -> None:
    gates = [{**ERRORS, "hardLimit": 0.1}]
    world = World(rollout(gates=gates, strategy={"steps": [{"weight": 50}, {"weight": 100, "minDwell": "1h", "deadline": "3h"}]}))
    world.until_step(1)
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=20) == "RolledBack"
    assert world.route == RouteSeen("risk", None, 0, False)


@pytest.mark.parametrize("limit", [1, 5])
def test_3_a_quality_failure_goes_back_after_its_failure_limit(limit: int) -> None:
    gates = [ERRORS, {**SCORES, "failureLimit": limit}]
    world = World(rollout(gates=gates, strategy={"steps": [{"shadow": True, "deadline": "1h"}, {"weight": 100}]}), shift=0.3)
    world.until_step(0)
    looks = 0
    while world.status.rollback is None and world.status.phase == "Progressing":
        world.turn()
        looks += any(g.verdict == "Fail" for g in world.status.gates)
        assert looks <= limit
    assert looks == limit


def test_3_an_advisory_gate_is_only_shown() -> None:
    world = World(rollout(gates=[ERRORS, {**SCORES, "role": "Advisory"}]), shift=0.3)
    assert world.until("Promoted", "RolledBack") == "Promoted"
    assert any(p.verdict == "Fail" for point in world.status.history for p in point.gates if p.name == "scores")


# --- 4 ---------------------------------------------------------------------------------------------------------------------------


def test_4_blindness_takes_one_weight_down_and_calls_someone() -> None:
    world = World()
    world.until_step(2)
    world.blind = True
    for _ in range(28):
        world.turn()
        assert world.weight == 25
    alerts = []
    for _ in range(8):
        alerts += [e.alert for e in world.turn().events if e.name == "BlindStepDown"]
    assert alerts == [True]
    assert world.weight == 5


def test_4_blindness_at_the_first_weight_ends_live_traffic_and_waits_for_a_person() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 10, "deadline": "30m"}, {"weight": 100}]}))
    world.until_step(0)
    world.blind = True
    assert world.until("Paused", turns=60) == "Paused"
    assert world.weight == 0
    world.blind = False
    for _ in range(20):
        world.turn()
    assert (world.status.phase, world.weight) == ("Paused", 0)
    world.actions = (action("Retry"),)
    assert world.until("Promoted") == "Promoted"


@pytest.mark.parametrize("unpaired", [True, False], ids=["across the arms", "in pairs"])
def test_4_a_safety_gate_over_scores_is_blind_only_where_it_could_see(unpaired: bool) -> None:
    """The log stays empty. Across the arms that is blindness; pairs are had in shadow alone, so in a live step none are missing."""
    gate = {"name": "scores", "role": "Safety", "scores": {"unpaired": unpaired}, "requiredIn": ["shadow"], "compare": {"margin": 0.05}}
    steps = [{"shadow": True, "deadline": "1h"}, {"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]
    world = World(rollout(gates=[ERRORS, gate], strategy={"steps": steps}))
    world.until_step(1)
    for _ in range(45):
        world.turn()
    assert ("BlindStepDown" in world.events) is unpaired


def test_4_a_short_gap_in_the_data_moves_nothing() -> None:
    world = World()
    world.until_step(2)
    world.blind = True
    for _ in range(20):
        world.turn()
    world.blind = False
    assert world.until("Promoted") == "Promoted"
    assert "BlindStepDown" not in world.events


def test_4_a_quiet_night_is_not_blindness_and_promotes_nothing() -> None:
    world = World()
    world.until_step(2)
    world.rate = 0.0
    for _ in range(300):
        world.turn()
    assert world.weight == 25
    world.rate = 200.0
    assert world.until("Promoted") == "Promoted"


def test_4_a_candidate_that_gets_nothing_while_stable_is_busy_is_blindness() -> None:
    world = World()
    world.until_step(2)
    world.misrouted = 1.0
    for _ in range(60):
        world.turn()
    assert world.weight < 25


def _without_the_gateways_word(world: World) -> None:
    """Its controller is gone, say. Pods and counters go on."""
    plain = world.observe
    world.observe = lambda seconds: replace(plain(seconds), live=None)  # type: ignore[method-assign]


def _climbing() -> World:
    """At 25 %, with time."""
    world = World(rollout(strategy={"steps": [
        {"weight": 5, "minDwell": "5s"}, {"weight": 25, "minDwell": "2m", "deadline": "10m"}, {"weight": 100, "minDwell": "1h"}]}))
    world.until_step(1)
    for _ in range(10):
        world.turn()
    return world


def test_3_a_safety_failure_goes_back_also_while_the_gateway_is_silent() -> None:
    world = _climbing()
    _without_the_gateways_word(world)
    world.bad_candidate = 0.5
    for _ in range(5):
        world.turn()
    assert world.weight == 0
    assert world.status.rollback is not None
    assert (world.status.rollback.reason, world.status.rollback.reject) == ("GateFailed", True)


def test_2_a_silent_gateway_adds_nothing_to_pass_and_no_weight() -> None:
    world = _climbing()
    passing = world.status.gates[0].state.passing
    _without_the_gateways_word(world)
    for _ in range(120):
        world.turn()
    assert world.weight == 25
    assert world.status.gates[0].state.passing == passing
    assert "the gateway can't be asked" in world.status.message
    assert "BlindStepDown" not in world.events, "a candidate that would be failed is not unwatched"
    assert world.until("Paused") == "Paused", "the deadline comes"


@pytest.mark.parametrize("why", ["it never showed the weight", "the route can't be read", "the route was changed as well"])
def test_4_requests_that_nobody_judges_are_blindness(why: str) -> None:
    world = _climbing()
    if why == "it never showed the weight":
        world.until_step(2)
        assert world.status.step is not None
        world.status = world.status.model_copy(update={
            "step": world.status.step.model_copy(update={"weight_effective_since": None, "entered_at": world.now})})
    before, plain = world.weight, world.observe

    def observe(seconds: float) -> Observation:
        seen = replace(plain(seconds), live=None)
        if why == "the route was changed as well":
            world.route = seen.route if seen.route is None else replace(seen.route, weight=seen.route.weight + 1)
            return replace(seen, route=world.route)
        return replace(seen, route=None) if "route" in why else seen

    world.observe = observe  # type: ignore[method-assign]
    world.bad_candidate = 0.5
    for _ in range(40):
        world.turn()
    assert "BlindStepDown" in world.events
    assert any("the gateway can't be asked" in m for m in world.messages)
    assert world.status.step is not None
    assert world.status.step.weight_desired < before
    assert world.status.rollback is None, "nothing was proven"


def test_4_a_gateway_that_answers_every_second_time_hides_no_failure() -> None:
    world = _climbing()
    plain, odd = world.observe, cycle((True, False))

    def observe(seconds: float) -> Observation:
        seen = plain(seconds)
        return replace(seen, live=None) if next(odd) else seen

    world.observe = observe  # type: ignore[method-assign]
    world.bad_candidate = 0.5
    for _ in range(10):
        world.turn()
    assert world.weight == 0


# --- 5 ---------------------------------------------------------------------------------------------------------------------------


def test_5_at_the_deadline_it_pauses_and_says_how_much_was_missing() -> None:
    world = World(rollout(strategy={"steps": [{"shadow": True, "minSamples": 10**6, "deadline": "60s"}, {"weight": 100}]}))
    assert world.until("Paused", turns=60) == "Paused"
    assert world.status.reason == "DeadlineExceeded"
    assert "samples are missing" in world.status.message
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=20) == "RolledBack"  # a pause doesn't disarm Safety


def test_5_at_a_very_low_rate_the_message_tells_how_many_requests_are_needed() -> None:
    world = World(rollout(strategy={"steps": [{"shadow": True, "deadline": "10m"}, {"weight": 100}]}), rate=0.5)
    assert world.until("Paused", turns=400) == "Paused"
    assert "more candidate requests are needed" in world.status.message


# --- 6 and 7 -----------------------------------------------------------------------------------------------------------------------

DRIFT: dict[str, Any] = {"name": "drift", "role": "Quality", "drift": {"maxAge": "10m"}}


def evidence(world: World, **changes: Any) -> EvidenceSpec:
    """Fresh, for the candidate, of this step, passing."""
    facts: dict[str, Any] = {
        "model_digest": CANDIDATE, "kind": "drift", "window_start": world.now - timedelta(seconds=60),
        "window_end": world.now - timedelta(seconds=1), "verdict": "Pass", "samples": 5000, "message": "no drift",
        "created_at": world.now,
    }
    return EvidenceSpec.model_validate({**facts, **changes})


def _in_shadow() -> World:
    steps = [{"shadow": True, "deadline": "2h"}, {"weight": 100}]
    world = World(rollout(gates=[ERRORS, DRIFT], strategy={"steps": steps}))
    world.until_step(0)
    for _ in range(60):
        world.turn()
    return world


@pytest.mark.parametrize("what", ["wrong digest", "last week", "before the step", "from the future", "killed", "no data",
                                  "inconclusive", "other kind", "ends before it starts"])
def test_6_evidence_that_is_not_this_candidates_own_fresh_and_whole_never_passes(what: str) -> None:
    world = _in_shadow()
    now = world.now
    changes: dict[str, dict[str, Any]] = {
        "wrong digest": {"model_digest": OTHER},
        "last week": {"window_start": now - timedelta(days=7, minutes=1), "window_end": now - timedelta(days=7)},
        "before the step": {"window_start": now - timedelta(minutes=5)},
        "from the future": {"window_end": now + timedelta(minutes=10), "created_at": now + timedelta(minutes=10)},
        "killed": {"verdict": "Error"}, "no data": {"verdict": "NoData"}, "inconclusive": {"verdict": "Inconclusive"},
        "other kind": {"kind": "performance"},
        "ends before it starts": {"window_start": now - timedelta(seconds=1), "window_end": now - timedelta(seconds=20)},
    }
    world.evidence = (evidence(world, **changes[what]),)
    for _ in range(10):
        world.turn()
    assert world.status.phase == "Progressing"
    assert next(g for g in world.status.gates if g.name == "drift").verdict != "Pass"
    assert world.weight == 0


def test_6_own_fresh_evidence_passes_and_a_later_failure_goes_back() -> None:
    world = _in_shadow()
    world.evidence = (evidence(world),)
    world.until_step(1)
    for _ in range(60):
        world.turn()
    world.evidence = (evidence(world, verdict="Fail", message="amount drifts"),)
    assert world.until("RolledBack", turns=10) == "RolledBack"
    assert "amount drifts" in world.status.message


def test_6_an_overlapping_window_is_no_second_opinion_unless_it_fails() -> None:
    world = _in_shadow()
    first = evidence(world, verdict="Inconclusive")
    world.evidence = (first, evidence(world, window_start=first.window_start + timedelta(seconds=20), window_end=world.now))
    world.turn()
    assert next(g for g in world.status.gates if g.name == "drift").verdict == "Inconclusive"


def _drift(world: World) -> tuple[str, str]:
    gate = next(g for g in world.status.gates if g.name == "drift")
    return gate.verdict, gate.message


@pytest.mark.parametrize("what", ["all of it", "its kind", "its model", "nothing"])
def test_6_a_finding_that_can_not_be_read_beside_a_pass_is_an_error_and_no_pass(what: str) -> None:
    world = _in_shadow()
    known = {"all of it": (CANDIDATE, "drift"), "its kind": (None, "drift"), "its model": (CANDIDATE, None), "nothing": (None, None)}
    world.evidence = (evidence(world),)
    world.unread = (EvidenceUnread("drift-7: spec.verdict: unknown", *known[what], world.now),)
    for _ in range(10):
        world.turn()
    assert _drift(world)[0] == "Error"
    assert "drift-7" in _drift(world)[1]
    assert (world.status.phase, world.weight) == ("Progressing", 0)
    world.unread = ()
    world.until_step(1)


@pytest.mark.parametrize("what", ["another model", "another kind", "long ago"])
def test_6_a_finding_that_can_not_be_read_and_can_not_count_here_holds_nobody(what: str) -> None:
    world = _in_shadow()
    facts = {"another model": (OTHER, "drift", world.now), "another kind": (CANDIDATE, "fairness", world.now),
             "long ago": (None, None, world.now - timedelta(minutes=13))}
    world.evidence, world.unread = (evidence(world),), (EvidenceUnread("x", *facts[what]),)
    world.until_step(1)


def test_6_a_fail_stands_whatever_else_can_not_be_read() -> None:
    world = _in_shadow()
    world.evidence, world.unread = (evidence(world, verdict="Fail"),), (EvidenceUnread("x"),)
    assert world.until("RolledBack", turns=10) == "RolledBack"


@settings(max_examples=100, deadline=None)
@given(verdicts=st.lists(st.sampled_from(["Pass", "Fail", "Inconclusive", "NoData", "Error", "unread"]), max_size=6))
def test_6_evidence_passes_only_when_all_that_could_speak_can_be_read_and_none_fails(verdicts: list[Any]) -> None:
    now = World().now
    gate = rollout(gates=[ERRORS, DRIFT]).spec.gates[1]
    context = GateContext(
        now=now, shadow=True, weight=0, digest=CANDIDATE, step_since=now - timedelta(minutes=9), counts_for_pass=True, counts_for_fail=True,
        run_since=now - timedelta(minutes=9), alpha_fail=0.01, alpha_limit=0.01, fresh=timedelta(minutes=1))
    found = tuple(
        EvidenceSpec(model_digest=CANDIDATE, kind="drift", window_start=now - timedelta(seconds=500 - 50 * i), verdict=v, samples=10,
                     window_end=now - timedelta(seconds=460 - 50 * i), message=v, created_at=now)
        for i, v in enumerate(verdicts) if v != "unread")
    unread = tuple(EvidenceUnread("x", CANDIDATE, "drift", now) for v in verdicts if v == "unread")
    verdict = judge(gate, GateStatus(name="drift", role="Quality"), None, found, "", context, unread).verdict
    if "Fail" in verdicts:
        assert verdict == "Fail"
    elif unread:
        assert verdict == "Error"
    else:
        assert verdict == (verdicts[-1] if verdicts else "NoData")


def _drift_of(limit: int, windows: list[tuple[Any, int, int]], role: str = "Quality") -> tuple[str, int]:
    """Verdict and failures of a drift gate that finds these (verdict, start and end in s), whatever their order."""
    now = World().now
    (gate,) = rollout(gates=[ERRORS, {**DRIFT, "role": role, "failureLimit": limit}]).spec.gates[1:]
    since = now - timedelta(minutes=9)
    context = GateContext(
        now=now, shadow=True, weight=0, digest=CANDIDATE, step_since=since, counts_for_pass=True, counts_for_fail=True,
        run_since=since, alpha_fail=0.01, alpha_limit=0.01, fresh=timedelta(minutes=1))
    found = tuple(EvidenceSpec(model_digest=CANDIDATE, kind="drift", verdict=v, samples=10, message=v, created_at=now,
                               window_start=since + timedelta(seconds=a), window_end=since + timedelta(seconds=b)) for v, a, b in windows)
    after = judge(gate, GateStatus(name="drift", role=gate.role), None, found, "", context)
    assert judge(gate, GateStatus(name="drift", role=gate.role), None, found[::-1], "", context) == after
    return after.verdict, after.failures


@pytest.mark.parametrize(("windows", "verdict", "failures"), [
    ([("Fail", 0, 60)], "Fail", 1),
    ([("Fail", 0, 60), ("Fail", 60, 120)], "Fail", 2),
    ([("Fail", 0, 60), ("Pass", 60, 120), ("Pass", 120, 180)], "Pass", 0),
    ([("Fail", 0, 60), ("Pass", 60, 120), ("Pass", 120, 180), ("Fail", 180, 240)], "Fail", 1),
    ([("Fail", 0, 60), ("Fail", 30, 90)], "Fail", 1),
    ([("Pass", 0, 60), ("Fail", 60, 120)], "Fail", 1),
    ([("Fail", 0, 60), ("Pass", 0, 60)], "Fail", 1),
    ([("Fail", 0, 60), ("Pass", 30, 120)], "Fail", 1),
    ([("Fail", 0, 60), ("Pass", 60, 120), ("Fail", 90, 150)], "Fail", 2),
    ([("Fail", 0, 60), ("Fail", 120, 180), ("Pass", 60, 120)], "Fail", 1),
    ([("Fail", 0, 60), ("NoData", 60, 120)], "Fail", 1),
    ([("Fail", 0, 60), ("Inconclusive", 60, 120), ("Fail", 120, 180)], "Fail", 2),
    ([("Fail", 60, 60), ("Pass", 60, 60)], "Fail", 1),
], ids=["one", "two in a row", "passes after it", "again after passes", "overlapping fails are one", "an older pass",
        "a pass about the same window", "an overlapping pass", "a pass that another fail overlaps", "a pass in between", "no data after it",
        "unclear in between", "one moment"])
def test_3_findings_with_fail_count_in_a_row_over_windows_that_do_not_overlap(
    windows: list[tuple[Any, int, int]], verdict: str, failures: int,
) -> None:
    assert _drift_of(2, windows) == (verdict, failures)
    assert _drift_of(1, windows)[0] == _drift_of(1, windows, "Safety")[0] == "Fail", "without a limit the first Fail is the last word"


@pytest.mark.parametrize(("windows", "kind", "verdict", "failures"), [
    ([("Fail", 0, 24), ("Fail", 24, 48), ("Fail", 48, 72)], "drift", "Fail", 3),
    ([("Fail", 0, 24), ("Pass", 24, 36), ("Fail", 48, 72)], "drift", "Fail", 1),
    ([("Fail", 0, 24), ("Fail", 24, 46)], "drift", "NoData", 0),
    ([("Fail", 0, 24), ("Fail", 24, 46), ("Pass", 48, 72)], "drift", "Pass", 0),
    ([("Fail", 0, 24), ("Fail", 24, 46), ("Inconclusive", 48, 72)], "drift", "Inconclusive", 0),
    ([("Fail", -48, -24), ("Fail", 48, 72)], "drift", "Fail", 1),
    ([("Fail", 0, 24), ("Fail", 48, 72)], "fairness", "Fail", 2),
    ([("Fail", -48, -24), ("Fail", 48, 72)], "fairness", "Fail", 1),
    ([("Fail", -96, 71), ("Fail", 71, 72)], "fairness", "Fail", 2),
], ids=["daily", "an old pass ends an old fail", "the newest is too old", "a pass after old ones", "unclear after old ones",
        "before the run", "a test of the model", "one of before the run", "a young one of before the run"])
def test_3_fails_in_a_row_count_for_the_run_as_long_as_the_newest_is_young(
    windows: list[tuple[Any, int, int]], kind: Any, verdict: str, failures: int,
) -> None:
    """Windows in hours of a run of 72 h; a finding is young for a day."""
    gate_of = {"name": "jobs", "role": "Quality", "evidence": {"kind": kind}, "failureLimit": 2}
    (gate,) = rollout(gates=[ERRORS, gate_of]).spec.gates[1:]
    since = World().now
    context = GateContext(
        now=since + timedelta(hours=72), shadow=True, weight=0, digest=CANDIDATE, step_since=since, counts_for_pass=True,
        counts_for_fail=True, run_since=since, alpha_fail=0.01, alpha_limit=0.01, fresh=timedelta(minutes=1))
    found = tuple(EvidenceSpec(
        model_digest=CANDIDATE, kind=kind, verdict=v, samples=10, message=v, created_at=since + timedelta(hours=b),
        window_start=since + timedelta(hours=a), window_end=since + timedelta(hours=b)) for v, a, b in windows)
    after = judge(gate, GateStatus(name="jobs", role="Quality"), None, found, "", context)
    assert (after.verdict, after.failures) == (verdict, failures)
    alone = gate.model_copy(update={"failure_limit": 1})
    assert judge(alone, GateStatus(name="jobs", role="Quality"), None, found, "", context).verdict == verdict, "only young ones count"


@pytest.mark.parametrize(("verdicts", "phase"), [(["Fail", "Pass", "Pass"], "Progressing"), (["Fail", "Fail"], "RolledBack")])
def test_3_a_tolerated_finding_holds_until_a_later_window_passes(verdicts: list[Any], phase: str) -> None:
    steps = [{"shadow": True, "deadline": "2h"}, {"weight": 50, "minDwell": "30m", "deadline": "2h"}, {"weight": 100}]
    world = World(rollout(gates=[ERRORS, {**DRIFT, "failureLimit": 2}], strategy={"steps": steps}))
    world.until_step(0)
    for _ in range(60):
        world.turn()
    for n, verdict in enumerate(verdicts):
        if n == 1:
            assert (world.status.phase, world.weight) == ("Progressing", 0)
        world.evidence = (*world.evidence, evidence(world, verdict=verdict))
        found_at = world.now
        while world.now < found_at + timedelta(seconds=61):  # so that the next window doesn't overlap
            world.turn()
    assert world.status.phase == phase
    assert (world.weight > 0) == (phase == "Progressing")


def test_7_drift_on_both_arms_is_the_world_changing_and_holds() -> None:
    world = _in_shadow()
    world.evidence = (evidence(world, verdict="Fail", both_arms=True),)
    for _ in range(20):
        world.turn()
    assert world.status.phase == "Progressing"
    assert world.weight == 0
    assert "the world changed" in next(g for g in world.status.gates if g.name == "drift").message


# --- 8 ---------------------------------------------------------------------------------------------------------------------------


def test_8_a_wrong_split_voids_comparisons_and_then_counts_as_blindness() -> None:
    # 25 % wanted, about 12 % got
    world = World(rollout(strategy={"steps": [{"weight": 25, "minDwell": "10m", "deadline": "1h"}, {"weight": 100}]}), misrouted=0.5)
    world.until_step(0)
    for _ in range(30):
        world.turn()
    assert "SampleRatioMismatch" in world.events
    assert all(g.verdict == "Error" for g in world.status.gates)
    world.bad_candidate = 0.05
    world.turn()
    assert world.status.rollback is None
    assert world.until("Paused", turns=60) == "Paused"
    assert world.weight == 0


def test_8_a_wrong_split_with_steps_below_waits_for_a_person_instead_of_climbing_again_and_again() -> None:
    world = World(misrouted=0.3)
    for _ in range(500):
        world.turn()
    told = {name: world.events.count(name) for name in ("SampleRatioMismatch", "Advanced", "Paused")}
    assert told == {"SampleRatioMismatch": 1, "Advanced": 1, "Paused": 1}, "shadow was passed once"
    assert (world.status.phase, world.status.reason, world.weight) == ("Paused", "SampleRatioMismatch", 0)
    assert "Retry" in world.status.message
    world.misrouted = 0.0
    world.actions = (action("Retry"),)
    assert world.until("Promoted") == "Promoted"
    assert world.events.count("SampleRatioMismatch") == 1


def test_8_a_wrong_split_at_a_higher_weight_stays_void_on_the_way_down() -> None:
    """Neither the end of spec.paused nor a lower weight explains it; a failing tenant that sticks must not fail the candidate there."""
    world = World()
    world.until_step(2)
    world.misrouted, world.spec = 0.5, rollout(paused=True)
    while world.weight == 25:
        world.turn()
    world.bad_candidate, world.spec = 0.5, rollout()
    weights = set[int]()
    for _ in range(90):
        world.turn()
        weights.add(world.weight)
        assert world.status.rollback is None
    assert weights == {5, 0}
    assert world.status.phase == "Paused"
    assert world.status.gates[0].verdict == "Error"


def test_8_a_right_split_is_left_alone() -> None:
    world = World()
    assert world.until("Promoted") == "Promoted"
    assert "SampleRatioMismatch" not in world.events


# --- 9 ---------------------------------------------------------------------------------------------------------------------------


def test_9_a_rollback_is_done_when_the_gateway_shows_it_and_not_before() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 20, "minDwell": "1h"}, {"weight": 100}]}))
    world.until_step(0)
    for _ in range(10):
        world.turn()
    world.bad_candidate = 0.5
    while world.status.rollback is None:
        world.turn()
    world.live_lag = 5
    for _ in range(5):
        world.turn()
        assert world.status.phase == "Progressing"
        assert world.status.reason == "RollingBack"
        assert SERVICE in world.managed
    assert world.until("RolledBack", turns=5) == "RolledBack"
    world.turn()
    assert SERVICE not in world.managed


def test_9_the_first_of_many_rejected_digests_is_still_remembered_after_hundreds() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack", turns=60) == "RolledBack"
    others = tuple(f"sha256:{i:064x}" for i in range(500))
    world.status = world.status.model_copy(update={"rejected_digests": (CANDIDATE, *others)})
    world.spec, world.candidate_digest = rollout(model={"digest": OTHER}), OTHER
    assert world.until("Pending", turns=3) == "Pending"
    assert world.until("RolledBack", turns=60) == "RolledBack"
    assert world.status.rejected_digests == (CANDIDATE, *others, OTHER)
    assert len(json.dumps(stored(world.status))) < 500_000, "and the API server can store it"


def test_9_only_retry_clears_a_rejected_digest() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack", turns=60) == "RolledBack"
    world.bad_candidate = 0.0
    for _ in range(30):
        world.turn()
    assert (world.status.phase, world.weight) == ("RolledBack", 0)
    world.spec = rollout(model={"digest": OTHER})
    world.candidate_digest = OTHER
    assert world.until("Promoted") == "Promoted"
    world.spec = rollout()
    for _ in range(10):
        world.turn()
    assert world.status.reason == "DigestRejected"
    assert world.route is not None
    assert world.route.stable == "risk-cccccccc"
    world.candidate_digest = CANDIDATE
    world.actions = (action("Retry", name="r"),)
    for _ in range(10):
        world.turn()
    assert world.status.phase in ("Pending", "Progressing")


def test_9_a_rejected_model_that_is_asked_for_again_takes_nothing_from_the_one_in_production() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack", turns=60) == "RolledBack"
    world.bad_candidate, world.spec, world.candidate_digest = 0.0, rollout(model={"digest": OTHER, "version": "3"}), OTHER
    assert world.until("Promoted") == "Promoted"
    world.events.clear()
    world.spec = rollout()
    for _ in range(3):
        world.turn()
    world.route = RouteSeen("risk-cccccccc", "risk", 5, False)
    for _ in range(3):
        world.turn()
    assert world.events == ["DigestRejected", "ExternalChange"]
    assert (world.status.phase, world.status.reason, world.status.weight) == ("Promoted", "DigestRejected", 100)
    assert next(p for p in world.status.history if p.event == "DigestRejected").alert
    conditions = {c.type: (c.status, c.reason) for c in world.status.conditions}
    assert conditions["RolledBack"] == ("False", "NotRolledBack")
    assert conditions["Ready"] == ("False", "DigestRejected"), "who waits for the rejected model isn't told that it is there"
    world.spec = rollout(model={"digest": OTHER, "version": "3"})
    world.events.clear()
    for _ in range(3):
        world.turn()
    assert world.events == ["StableAskedAgain"]
    assert {c.type: c.status for c in world.status.conditions}["Ready"] == "True"
    assert (world.status.phase, world.status.taken_back) == ("Promoted", None)


# --- 10 --------------------------------------------------------------------------------------------------------------------------


def test_10_the_first_outside_change_is_put_back_and_its_maker_named() -> None:
    world = World()
    world.until_step(1)
    world.route = RouteSeen("risk", SERVICE, 90, False, "user eve")
    events = world.turn().events
    assert world.weight == 5
    assert "user eve" in events[0].message
    assert events[0].alert


def test_10_three_changes_in_ten_minutes_pause_it_without_flapping() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    for i in range(3):
        world.route = RouteSeen("risk", SERVICE, 40 + i, False)
        world.turn()
        world.turn()
    assert world.status.phase == "Paused"
    assert world.weight == 42
    for _ in range(20):
        world.turn()
    assert world.weight == 42
    assert world.events.count("ExternalChange") == 3
    world.actions = (action("Retry"),)
    for _ in range(4):
        world.turn()
    assert (world.status.phase, world.weight) == ("Progressing", 5)


def test_10_a_paused_fight_is_still_ended_by_safety() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    for i in range(3):
        world.route = RouteSeen("risk", SERVICE, 40 + i, False)
        world.turn()
        world.turn()
    world.bad_candidate = 0.5
    assert world.until("RolledBack", turns=20) == "RolledBack"
    assert world.weight == 0


def test_10_before_the_first_step_a_strangers_share_never_stays_and_someone_is_called_now_and_then() -> None:
    """It waits for an approval, so no gate looks at it: it is due nothing."""
    world = World(rollout(approvals={"required": ["validation"]}, strategy={"steps": [{"weight": 5, "minDwell": "5s"}, {"weight": 100}]}))
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.status.reason) == ("Pending", "ApprovalMissing")
    for _ in range(300):  # ten minutes
        world.route = RouteSeen("risk", SERVICE, 50, False, "gitops")
        world.turn()
        assert (world.weight, world.status.phase, world.status.reason) == (0, "Pending", "ExternalChange")
    assert world.events.count("ExternalChange") == 3
    for _ in range(300):
        world.route = RouteSeen("risk", SERVICE, 50, False, "gitops")
        world.turn()
    assert world.events.count("ExternalChange") == 6
    world.approvals = frozenset({"validation"})
    assert world.until("Promoted") == "Promoted"


def test_10_a_pause_without_a_step_as_older_releases_left_it_ends_with_retry() -> None:
    world = World(rollout(approvals={"required": ["validation"]}), approvals=frozenset({"validation"}))
    world.turn()
    changes = tuple(world.now for _ in range(3))
    world.status = world.status.model_copy(update={"phase": "Paused", "reason": "ExternalChange", "external_changes": changes})
    for _ in range(200):
        world.turn()
    assert (world.status.phase, world.status.reason, world.weight) == ("Paused", "ExternalChange", 0)
    world.actions = (action("Retry"),)
    assert world.until("Promoted") == "Promoted"
    assert "ActionIgnored" not in world.events


def test_10_a_fight_before_the_first_step_is_no_change_in_a_later_one() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.turn()
    for _ in range(5):
        world.route = RouteSeen("risk", SERVICE, 50, False, "gitops")
        world.turn()
    world.until_step(0)
    for _ in range(300):
        world.turn()
    world.route = RouteSeen("risk", SERVICE, 50, False, "eve")
    world.turn()
    assert (world.status.phase, world.weight) == ("Progressing", 5)


@pytest.mark.parametrize("ignored", [False, True], ids=["in silence", "after a word that was ignored"])
def test_10_a_fight_that_was_left_to_a_person_is_left_until_retry(ignored: bool) -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "24h", "deadline": "48h"}, {"weight": 100}]}))
    world.until_step(0)
    for i in range(3):
        world.route = RouteSeen("risk", SERVICE, 40 + i, False)
        world.turn()
        world.turn()
    if ignored:
        world.actions = (action("Retry", digest=OTHER),)
    for _ in range(400):
        world.turn()
    assert (world.status.phase, world.weight, world.events.count("ExternalChange")) == ("Paused", 42, 3)
    world.actions = (action("Retry", name="2"),)
    world.until_step(0)
    assert (world.status.phase, world.weight) == ("Progressing", 5)


def fought_over_after_the_end() -> World:
    """Promoted, and then somebody insists on another route."""
    world = World()
    assert world.until("Promoted") == "Promoted"
    for _ in range(4):
        world.route = RouteSeen("risk", SERVICE, 50, False, "gitops")
        world.turn()
    assert world.weight == 50
    assert "3 times in ten minutes: left as it is" in world.status.message
    return world


def test_10_after_the_end_a_fight_is_left_until_a_person_says_retry_and_then_put_back() -> None:
    world = fought_over_after_the_end()
    for _ in range(400):
        world.turn()
    assert (world.weight, world.status.reason, world.events.count("ExternalChange")) == (50, "ExternalChange", 3)
    world.actions = (action("Retry"),)
    for _ in range(3):
        world.turn()
    assert "Retry" in world.events
    assert world.route == RouteSeen(SERVICE, None, 0, False)
    assert (world.status.phase, world.status.reason) == ("Promoted", "Promoted")


def test_10_after_the_end_a_fight_holds_up_no_later_model() -> None:
    world = fought_over_after_the_end()
    world.managed.add("risk-cccccccc")
    world.spec = rollout(model={"digest": OTHER, "version": "3", "storageUri": "file:///bundles/3"})
    for _ in range(3):
        world.turn()
    assert world.status.candidate is not None
    assert world.status.candidate.digest == OTHER
    assert world.route == RouteSeen(SERVICE, None, 0, False), "it begins with a put back"


def test_10_after_the_end_a_change_long_after_a_fight_that_the_stranger_gave_up_is_put_back() -> None:
    world = fought_over_after_the_end()
    world.route = RouteSeen(SERVICE, None, 0, False)
    for _ in range(400):
        world.turn()
    world.route = RouteSeen("risk", SERVICE, 50, False, "eve")
    world.turn()
    assert world.route == RouteSeen(SERVICE, None, 0, False)
    assert world.events.count("ExternalChange") == 4


def test_retry_of_a_model_that_answers_everything_is_said_to_have_nothing_to_do() -> None:
    world = World()
    assert world.until("Promoted") == "Promoted"
    world.actions = (action("Retry"),)
    world.turn()
    assert world.events[-1] == "ActionIgnored"
    assert "nothing to try again" in world.messages[-1]


def test_10_an_outside_move_to_zero_is_an_abort() -> None:
    world = World()
    world.until_step(1)
    world.route = RouteSeen("risk", None, 0, False)
    assert world.until("RolledBack", turns=10) == "RolledBack"
    assert world.status.reason == "AbortedOutside"
    assert world.status.rejected_digests == (CANDIDATE,)


@pytest.mark.parametrize("room", ["none for the next weight", "the write is refused"])
def test_10_a_move_to_zero_is_an_abort_also_while_a_higher_weight_waits_to_be_written(room: str) -> None:
    world = waiting_for_pods()
    world.route = RouteSeen("risk", None, 0, False, "kubectl-patch")
    world.room_for = 5 if room == "none for the next weight" else 100
    assert world.until("RolledBack", turns=10) == "RolledBack"
    assert world.status.reason == "AbortedOutside"
    assert "kubectl-patch took the candidate's weight from 5 to 0" in world.status.message
    assert world.weight == 0


def test_10_stable_alone_before_the_first_weight_was_written_is_no_abort() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "5s"}, {"weight": 50}, {"weight": 100}]}), room_for=0)
    for _ in range(20):
        world.turn()
    world.actions = (action("SkipStep"),)
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.weight) == ("Progressing", 0)
    world.room_for = 100
    assert world.until("Promoted") == "Promoted"
    assert "ExternalChange" not in world.events


def test_10_stable_alone_is_still_our_own_after_more_intents_than_are_remembered() -> None:
    steps = [{"weight": w, "minDwell": "1h"} for w in (*range(5, 60, 5), 100)]
    world = World(rollout(strategy={"steps": steps}), room_for=0)
    for _ in range(5):
        world.turn()
    for i in range(10):
        world.actions = (action("SkipStep", name=str(i)),)
        world.turn()
    world.turn()
    assert (world.status.phase, world.status.rollback, world.weight) == ("Progressing", None, 0)


def test_10_a_weight_that_was_seen_is_taken_back_by_a_person_though_nothing_was_seen_when_it_was_written() -> None:
    """5 % is written, the route can't be read, and 50 % is asked for meanwhile. Then 5 % is seen, so stable alone is over."""
    world = World(rollout(strategy={"steps": [{"weight": 5, "minDwell": "5s"}, {"weight": 50}, {"weight": 100}]}), room_for=5)
    plain = world.observe
    while world.weight == 0:
        world.turn()
    world.actions = (action("SkipStep"),)
    world.observe = lambda seconds: replace(plain(seconds), route=None)  # type: ignore[method-assign]
    world.turn()
    world.observe = plain  # type: ignore[method-assign]
    world.turn()
    assert world.status.route is not None
    assert (world.status.route.weight, world.weight) == (50, 5)
    world.route = RouteSeen("risk", None, 0, False)
    world.room_for = 100
    assert world.until("RolledBack", turns=10) == "RolledBack"
    assert world.status.reason == "AbortedOutside"


def test_10_a_rejected_model_is_put_back_however_often_it_is_brought() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack", turns=60) == "RolledBack"
    for i in range(12):
        world.route = RouteSeen("risk", SERVICE, 50, False) if i % 2 else RouteSeen(SERVICE, None, 0, False)
        world.turn()
        assert world.route == RouteSeen("risk", None, 0, False)


@pytest.mark.parametrize("foreign", [
    RouteSeen("risk", "risk-eeeeeeee", 50, False), RouteSeen("~foreign", None, 0, False, "gitops", ("risk", "risk-eeeeeeee"))])
def test_10_a_rejected_model_is_taken_out_each_time_also_while_another_has_a_share(foreign: RouteSeen) -> None:
    world = World()
    world.until_step(1)
    world.status = world.status.model_copy(update={"rejected_digests": ("sha256:" + "e" * 64,)})
    for _ in range(8):
        world.route = foreign
        world.turn()
        assert world.route is not None
        assert (world.route.stable, world.route.candidate, world.route.weight, world.route.others) == ("risk", SERVICE, 5, ())
    assert world.events.count("ExternalChange") == 3


def test_10_a_rejected_model_is_taken_out_of_a_route_of_any_form() -> None:
    world = World()
    world.until_step(1)
    world.bad_candidate = 0.5
    assert world.until("RolledBack") == "RolledBack"
    for _ in range(8):
        world.route = RouteSeen("~foreign", None, 0, False, "gitops", ("risk", SERVICE))
        world.turn()
        assert world.route is not None
        assert (world.route.stable, world.route.candidate, world.route.others) == ("risk", None, ())


def test_10_a_change_whose_put_back_is_refused_is_counted_once() -> None:
    """The API server refuses writes for a while: one change is no fight, however many looks find it there."""
    world = World()
    world.until_step(1)
    for time in range(2):
        world.route = RouteSeen("risk", SERVICE, 50, False, "kubectl-edit", revision=f"u/{time}")
        for _ in range(6):
            world.turn(actions_done=0)
        assert (world.weight, world.status.phase) == (50, "Progressing")
        world.turn()
        assert (world.weight, world.events.count("ExternalChange")) == (5, time + 1)
    world.route = RouteSeen("risk", SERVICE, 50, False, "kubectl-edit", revision="u/3")
    for _ in range(3):
        world.turn()
        assert (world.weight, world.status.phase) == (50, "Paused")


def test_10_a_put_back_that_never_has_an_effect_ends_in_a_pause_and_hides_no_other_trouble() -> None:
    """A webhook puts the stranger's weight into our write: no error, no new revision. Meanwhile nobody can say how the candidate does."""
    world = World()
    world.until_step(1)
    world.route = RouteSeen("risk", SERVICE, 50, False, "webhook", revision="u/7")
    world.blind = True
    for _ in range(150):
        world.turn(actions_done=0)
    assert world.status.phase == "Paused"
    assert world.events.count("ExternalChange") == 3
    assert "BlindStepDown" in world.events


def changed_while_pods_are_lacking() -> World:
    """Confirmed at 50 %, somebody takes it down to 25 % once, and by then the candidate has pods for 30 % only."""
    world = World(rollout(strategy={"steps": [{"weight": 50, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.route, world.room_for = RouteSeen("risk", SERVICE, 25, False, "kubectl", revision="u/7"), 30
    return world


def test_10_one_change_whose_put_back_waits_for_pods_pauses_nothing_however_long_it_takes() -> None:
    world = changed_while_pods_are_lacking()
    for _ in range(360):  # twelve minutes
        world.turn()
        assert (world.weight, world.status.phase, world.status.reason) == (25, "Progressing", "ExternalChange")
    world.room_for = 100
    world.until_step(0)
    assert (world.weight, world.status.phase, world.events.count("ExternalChange")) == (50, "Progressing", 1)


@pytest.mark.parametrize("route", [
    RouteSeen("other", SERVICE, 25, False, "kubectl", revision="u/7"), RouteSeen("risk", "other", 25, False, "kubectl", revision="u/7")],
    ids=["another stable one", "another candidate"])
def test_10_a_route_that_names_another_service_is_told_also_while_its_put_back_waits_for_pods(route: RouteSeen) -> None:
    world = changed_while_pods_are_lacking()
    world.route = route
    for _ in range(150):  # five minutes
        world.turn()
    assert (world.status.phase, world.events.count("ExternalChange")) == ("Paused", 3)
    assert world.route == route


def test_10_all_weights_set_to_zero_below_100_say_nothing_of_the_candidate_and_are_put_back() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 50, "minDwell": "1h", "deadline": "2h"}, {"weight": 100}]}))
    world.until_step(0)
    world.route = RouteSeen(FOREIGN, None, 0, False, "kubectl", revision="u/7", weightless=("risk", SERVICE))
    world.turn()
    assert (world.weight, world.status.phase, world.status.rollback) == (50, "Progressing", None)


def test_10_a_put_back_that_waits_for_pods_hides_no_blindness() -> None:
    world = changed_while_pods_are_lacking()
    world.turn()
    world.blind = True
    for _ in range(60):
        world.turn()
    assert "BlindStepDown" in world.events
    assert (world.weight, world.status.phase) == (0, "Paused")


def test_10_a_copy_that_is_taken_away_and_waits_for_pods_pauses_nothing() -> None:
    world = World()
    world.until_step(0)
    for _ in range(200):
        world.route = RouteSeen("risk", None, 0, False, "kubectl", revision="u/7")
        world.turn(actions_done=0)
    assert (world.status.phase, world.events.count("ExternalChange")) == ("Progressing", 1)


def test_10_a_put_back_without_effect_is_told_as_that_and_as_no_fight() -> None:
    world = World()
    world.until_step(1)
    world.route = RouteSeen("risk", SERVICE, 50, False, "webhook", revision="u/7")
    for _ in range(150):
        world.turn(actions_done=0)
    assert (world.status.phase, world.events.count("ExternalChange")) == ("Paused", 3)
    assert "its put back had no effect for 2m: left as it is, a person must settle it and Retry" in world.messages[-1]
    assert "times in ten minutes" not in " ".join([*world.messages, world.status.message])


def test_10_after_the_end_a_fight_stays_told_as_a_fight_while_the_same_change_stays() -> None:
    world = World()
    assert world.until("Promoted") == "Promoted"
    for i in range(3):
        world.route = RouteSeen("risk", SERVICE, 50, False, "gitops", revision=f"u/{i}")
        world.turn()
    for _ in range(100):
        world.turn()
    assert "3 times in ten minutes: left as it is" in world.status.message


def test_10_a_missing_route_is_written_again() -> None:
    world = World()
    world.until_step(1)
    world.route = None
    world.turn()
    assert world.weight == 5


def waiting_for_pods() -> World:
    """At 5 % in the route, and 25 % wanted, which no pod comes for."""
    world = World(room_for=5)
    world.until_step(1)
    for _ in range(200):
        world.turn()
        if world.status.step is not None and world.status.step.index == 2:
            break
    assert world.status.step is not None
    assert (world.status.step.index, world.weight) == (2, 5)
    return world


def test_10_one_change_while_a_higher_weight_waits_for_pods_counts_once_and_is_put_back_at_once() -> None:
    world = waiting_for_pods()
    world.route = RouteSeen("risk", SERVICE, 4, False, "eve")
    world.turn()
    assert world.weight == 5, "what stood there: no pod has to come for that"
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.weight, world.events.count("ExternalChange")) == ("Progressing", 5, 1)
    world.room_for = 100
    assert world.until("Promoted") == "Promoted"


def test_10_one_change_while_the_first_weight_waits_for_pods_leaves_the_candidate_without_any() -> None:
    world = World(rollout(strategy={"steps": [{"weight": 50, "minDwell": "5s"}, {"weight": 100}]}), room_for=10)
    for _ in range(5):
        world.turn()
    world.route = RouteSeen("risk", SERVICE, 90, False, "eve")
    world.turn()
    assert world.weight == 0
    for _ in range(5):
        world.turn()
    assert (world.status.phase, world.status.rollback, world.events.count("ExternalChange")) == ("Progressing", None, 1)


def test_10_a_change_while_a_lower_weight_is_not_written_yet_is_put_back_to_the_lower_one() -> None:
    world = World()
    world.until_step(2)
    world.blind = True
    while "BlindStepDown" not in world.events:
        world.turn(actions_done=0)
    assert world.weight == 25
    world.route = RouteSeen("risk", SERVICE, 90, False, "eve")
    world.turn()
    assert world.weight == 5


def test_4_blindness_takes_weight_away_also_while_a_larger_one_can_not_be_given() -> None:
    world = waiting_for_pods()
    world.blind = True
    for _ in range(40):
        world.turn()
    assert "BlindStepDown" in world.events
    for _ in range(80):
        world.turn()
    assert world.weight == 0


def test_5_a_weight_that_can_not_be_given_ends_at_the_deadline() -> None:
    world = waiting_for_pods()
    assert world.until("Paused", turns=800) == "Paused"
    assert world.status.reason == "DeadlineExceeded"
    assert "is not seen at the gateway" in world.status.message
    assert world.weight == 5


def test_a_service_that_is_gone_is_made_again_while_a_weight_waits() -> None:
    world = waiting_for_pods()
    world.managed.discard(SERVICE)
    world.turn()
    assert SERVICE in world.managed


def test_a_pause_of_the_spec_ends_with_it_whatever_was_said_meanwhile() -> None:
    world = World()
    world.until_step(1)
    world.spec = rollout(paused=True)
    assert world.until("Paused") == "Paused"
    world.actions = (UserAction(type="Promote", id="late", candidate_digest=OTHER),)
    world.turn()
    assert world.status.reason == "ActionIgnored"
    world.spec = rollout()
    assert world.until("Progressing", turns=3) == "Progressing"


# --- releases --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "kept"), [({"failureLimit": None}, True), ({"hardLimit": 0.5}, False)], ids=["added", "changed"])
def test_evidence_outlives_an_upgrade_that_adds_a_setting_and_no_change_of_a_setting(
    change: dict[str, Any], kept: bool,
) -> None:
    """The status as the release before would have written it: without the setting, or with another value that counts."""
    world = World(rollout(gates=[ERRORS], strategy={"steps": [{"weight": 20, "minDwell": "24h", "deadline": "72h"}, {"weight": 100}]}))
    world.until_step(0)
    for _ in range(20):
        world.turn()
    (gate,) = world.status.gates
    before, total = gate.state, gate.state.counts[1]
    text = json.dumps({k: v for k, v in {**json.loads(before.config), **change}.items() if v is not None or k != "failureLimit"})
    world.status = world.status.model_copy(update={
        "gates": (gate.model_copy(update={"state": before.model_copy(update={"config": text})}),)})
    world.turn()
    (gate,) = world.status.gates
    assert (gate.state.counts[1] > total) is kept
    assert gate.state.config == before.config, "it is written anew"
