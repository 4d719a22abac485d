"""Steps that are edited under way: up only on evidence and one step at a time, down never up, promoted only from 100 % that was seen."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, SERVICE, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafnium_rollout.intake import take_in
from hafnium_rollout.objects import UserAction
from hafnium_rollout.status import RolloutStatus
from hafnium_rollout.turn import Turn

SHADOW: dict[str, Any] = {"shadow": True, "deadline": "4h"}


def step(weight: int, **more: Any) -> dict[str, Any]:
    return {"weight": weight, "minDwell": "5s", "deadline": "4h", **more}


def with_steps(*steps: dict[str, Any] | int, **more: Any) -> Any:
    return rollout(strategy={"steps": [step(s) if isinstance(s, int) else s for s in steps]}, **more)


def person(kind: str) -> tuple[UserAction, ...]:
    return (UserAction.model_validate({"type": kind, "id": kind, "candidateDigest": CANDIDATE}),)


def at(weight: int, spec: Any) -> World:
    """On its way up by `spec`, with this weight at the gateway."""
    world = World(spec)
    for _ in range(300):
        world.turn()
        found = world.status.step
        if found is not None and found.weight_desired == weight and found.weight_effective_since is not None:
            return world
    raise AssertionError(world.status.message)


def until_weight(world: World, weight: int) -> set[int]:
    """Turns until the route has this weight; all that it had on the way."""
    seen = {world.weight}
    for _ in range(300):
        world.turn()
        seen.add(world.weight)
        if world.weight == weight:
            return seen
    raise AssertionError(f"{weight} % was not reached: {world.status.phase} {world.status.message}")


def test_fewer_steps_promote_nobody_from_a_share() -> None:
    world = at(25, with_steps(SHADOW, 5, 25, 100))
    world.spec = with_steps(SHADOW, 10, step(100, minDwell="1m"))
    seen: list[int] = []
    for _ in range(200):
        world.turn()
        seen.append(world.weight)
        assert world.status.phase != "Promoted" or seen.count(100) > 30, "it bakes at 100 %, with the way back armed"
        if world.status.phase == "Promoted":
            break
    assert world.status.phase == "Promoted"


def test_the_bake_at_full_weight_after_an_edit_still_goes_back() -> None:
    gates = [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}, "hardLimit": 0.1}]
    world = at(25, with_steps(SHADOW, 5, 25, 100, gates=gates))
    world.spec = with_steps(SHADOW, 10, step(100, minDwell="10m"), gates=gates)
    until_weight(world, 100)
    world.bad_candidate = 0.5
    assert world.until("RolledBack", "Promoted", turns=60) == "RolledBack"


@pytest.mark.parametrize(("steps", "then"), [((50, 100), 0), ((3, 50, 100), 3), ((SHADOW, 4, 50, 100), 4), ((5, 100), 0), ((100,), 0)])
def test_a_step_down_for_blindness_never_gives_more(steps: tuple[Any, ...], then: int) -> None:
    world = at(5, with_steps(SHADOW, 5, 25, 100))
    world.spec = with_steps(*steps)
    world.blind = True
    for _ in range(60):
        world.turn()
        assert world.weight <= 5
        if "BlindStepDown" in world.events:
            break
    assert ("BlindStepDown" in world.events, world.weight) == (True, then)


def test_a_step_down_from_a_weight_that_was_never_given_gives_no_more_than_there_is() -> None:
    """25 % waits for pods, 5 % are there; the steps below 25 % are other ones now."""
    world = World(with_steps(SHADOW, 5, 25, 100), room_for=5)
    for _ in range(200):
        world.turn()
        if world.status.step is not None and world.status.step.weight_desired == 25:
            break
    world.spec, world.blind = with_steps(20, 100), True
    for _ in range(60):
        world.turn()
        if "BlindStepDown" in world.events:
            break
    world.room_for = 100
    for _ in range(10):
        world.turn()
        assert world.weight <= 5
    assert "BlindStepDown" in world.events


def test_the_next_step_is_the_lowest_that_gives_more() -> None:
    world = at(5, with_steps(5, 25, 100))
    world.spec = with_steps(1, 2, 3, 5, 10, 100)
    assert sorted(until_weight(world, 100)) == [5, 10, 100]


def test_a_step_put_in_front_lets_no_gate_be_left_out() -> None:
    """By its index the step at 5 % would be the shadow step now, which this gate isn't asked in."""
    gates = [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}},
             {"name": "drift", "drift": {"maxAge": "10m"}, "requiredIn": ["weight"]}]
    world = at(5, with_steps(5, 25, 100, gates=gates))
    for steps in ((SHADOW, 5, 25, 100), (SHADOW, 100), (SHADOW, 4, 100)):
        world.spec = with_steps(*steps, gates=gates)
        for _ in range(100):
            world.turn()
            assert world.weight == 5
        assert "drift" in world.status.message


@pytest.mark.parametrize(("kind", "steps", "then"), [
    ("Retry", (SHADOW, 50, 100), 0), ("Retry", (4, 50, 100), 4), ("Retry", (SHADOW, 5, 25, 100), 25), ("SkipStep", (SHADOW, 50, 100), 50),
    ("SkipStep", (10, 30, 100), 30), ("SkipStep", (SHADOW, 5, 25, 100), 100)])
def test_after_a_pause_for_want_of_room_a_person_goes_on_from_what_it_had(kind: str, steps: tuple[Any, ...], then: int) -> None:
    world = at(25, with_steps(SHADOW, 5, step(25, minDwell="1h"), 100))
    world.no_room = "0/3 nodes are available"
    assert world.until("Paused") == "Paused"
    assert world.weight == 0
    world.spec, world.no_room = with_steps(*steps), ""
    world.turn()
    world.actions = person(kind)
    world.turn()
    assert kind in world.events
    assert world.weight == then


@pytest.mark.parametrize("kind", ["Promote", "SkipStep"])
def test_no_persons_word_promotes_from_a_share(kind: str) -> None:
    world = at(25, with_steps(SHADOW, 5, step(25, minDwell="1h"), 100))
    world.spec = with_steps(SHADOW, 10, step(100, minDwell="1m"))
    world.actions = person(kind)
    world.turn()
    assert (world.status.phase, world.weight) == ("Progressing", 100)


@pytest.mark.parametrize("kind", ["Promote", "SkipStep"])
def test_a_person_promotes_at_full_weight_once_the_gateway_shows_it(kind: str) -> None:
    world = at(100, with_steps(25, step(100, minDwell="1h")))
    world.blind = True
    world.turn()
    world.actions = person(kind)
    world.turn()
    assert world.status.phase == "Progressing"
    assert world.status.reason == "ActionIgnored"
    world.blind = False
    world.turn()
    world.actions = (person(kind)[0].model_copy(update={"id": "again"}),)
    world.turn()
    assert world.status.phase == "Promoted"


def test_a_status_of_the_release_before_goes_on_where_it_was() -> None:
    world = at(5, with_steps(SHADOW, 5, 25, 100))
    data = json.loads(world.status.model_dump_json(exclude_none=True))
    assert data["step"].pop("weightEntered" if "weightEntered" in data["step"] else "weight_entered") == 5
    world.status = RolloutStatus.model_validate(data)
    assert sorted(until_weight(world, 100)) == [5, 25, 100]


# --- whatever comes -----------------------------------------------------------------------------------------------------------------

STEPS = st.sampled_from([
    (SHADOW, 5, 25, 100), (SHADOW, 10, 100), (5, 100), (50, 100), (SHADOW, 100), (100,), (1, 2, 3, 4, 5, 6, 100), (25, 50, 75, 100)])
TROUBLE = st.sampled_from(
    ["fine", "fine", "fine", "lost status", "no action", "blind", "slow gateway", "unready", "no room", "no pods", "paused", "Retry"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(life=st.lists(st.tuples(STEPS, TROUBLE, st.integers(1, 50)), min_size=1, max_size=10), seed=st.integers(0, 5))
def test_weight_only_ever_rises_on_evidence_to_the_next_step_whatever_is_edited(
    life: list[tuple[tuple[Any, ...], str, int]], seed: int,
) -> None:
    world = World(random=random.Random(seed), rate=100.0)
    asked = 0
    for steps, trouble, times in life:
        world.spec = with_steps(*steps, paused=trouble == "paused")
        world.blind, world.live_lag = trouble == "blind", 2 if trouble == "slow gateway" else 0
        world.ready, world.no_room = trouble != "unready", "no node" if trouble == "no room" else ""
        world.room_for = 5 if trouble == "no pods" else 100
        if trouble == "Retry":
            asked += 1
            world.actions = (UserAction(type="Retry", id=str(asked), candidate_digest=CANDIDATE),)
        for _ in range(times):
            old, route, before = world.status, world.weight, len(world.events)
            found = world.turn(keep_status=trouble != "lost status", actions_done=0 if trouble == "no action" else None)
            said = [e.name for e in found.events]
            del world.events[:before]
            if found.status.phase == "Promoted":
                if old.phase != "Promoted":
                    assert old.step is not None
                    assert old.step.weight_desired == 100
                    assert world.live().weights == {SERVICE: 100}
                return
            _check(Turn(world.spec, old, world.seen, world.now), found.status, said)
            if "BlindStepDown" in said:
                assert world.weight <= route
            if found.status.phase == "RolledBack":
                return


def _check(turn: Turn, new: RolloutStatus, said: list[str]) -> None:
    """No more is wanted than before, unless the run begins, a person said Retry, or every gate passes on what was seen of this step."""
    old, weights = turn.status, [s.live_weight for s in turn.rollout.spec.strategy.steps]
    if new.step is None or new.rollback is not None:
        return
    if old.step is None:
        assert new.step.weight_desired == weights[0], "it begins at the first step"
        return
    if new.step.weight_desired <= old.step.weight_desired:
        return
    if "Retry" in said:
        assert new.step.weight_desired <= max(old.step.weight_entered or 0, weights[0])
        return
    assert said == ["Advanced", "StepEntered"]
    assert new.step.weight_desired == min(w for w in weights if w > old.step.weight_desired)
    known = take_in(turn).status
    assert known.step is not None
    assert known.step.weight_observed == old.step.weight_desired
    assert known.step.weight_effective_since is not None
    assert [g.verdict for g in known.gates] == ["Pass"]
