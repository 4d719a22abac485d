"""Pods that a candidate was given for its weight: the promoted service gives them back to its autoscaler, once, when nothing moves.

`World.act` refuses to take any from a service that doesn't answer alone, in every test that has a world.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hafnium_rollout_world import OTHER, SERVICE, World, rollout

from hafnium_rollout.actions import LowerPods
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import Observation, RouteSeen


def _lowered(world: World, turns: int = 5) -> list[str]:
    return [a.service for _ in range(turns) for a in world.turn().actions if isinstance(a, LowerPods)]


def test_a_promoted_service_is_lowered_to_its_template_once_and_not_while_it_climbs() -> None:
    world = World()
    found: list[str] = []
    while world.status.phase != "Promoted":
        found += _lowered(world, 1)
    assert SERVICE in world.raised
    assert found == []
    assert _lowered(world) == [SERVICE]
    assert world.raised == set()


@pytest.mark.parametrize("unseen", ["the gateway", "the route", "services"])
def test_nothing_is_lowered_before_it_is_seen_that_the_service_answers_alone(unseen: str) -> None:
    world = World()
    world.until("Promoted")
    plain = world.observe

    def observe(seconds: float) -> Observation:
        seen = plain(seconds)
        match unseen:
            case "the gateway":
                return replace(seen, live=None)
            case "the route":
                return replace(seen, route=None)
            case _:
                return replace(seen, services=None)

    world.observe = observe  # type: ignore[method-assign]
    assert _lowered(world, 2) == []
    world.observe = plain  # type: ignore[method-assign]
    assert _lowered(world) == [SERVICE]


def test_a_crash_before_the_write_is_followed_by_the_write() -> None:
    world = World()
    world.until("Promoted")
    for _ in range(3):
        assert any(isinstance(a, LowerPods) for a in world.turn(actions_done=0).actions)
    assert _lowered(world) == [SERVICE]


def test_a_stranger_in_the_route_is_no_time_to_lower() -> None:
    world = World()
    world.until("Promoted")
    world.route = RouteSeen("risk", SERVICE, 50, False, "kubectl-edit")
    decision = world.turn()
    assert not any(isinstance(a, LowerPods) for a in decision.actions), "it is put back first"
    assert _lowered(world) == [SERVICE]


def test_a_rollback_leaves_stables_pods_alone() -> None:
    world = World()
    world.until_step(2)
    world.bad_candidate = 0.5
    found: list[str] = []
    while world.status.phase != "RolledBack":
        found += _lowered(world, 1)
    assert found + _lowered(world) == []


def test_what_a_release_in_a_hurry_left_raised_is_lowered_after_the_next_ones_rollback() -> None:
    """The next candidate comes while the gateway can't be asked: no time to lower, and stable keeps its pods through that climb."""
    world = World()
    world.until("Promoted")
    world.spec = rollout(model={"digest": OTHER, "version": "3", "storageUri": "file:///bundles/3"})
    world.blind = True
    assert _lowered(world, 1) == []
    assert world.status.phase == "Pending"
    world.blind = False
    while world.status.step is None:
        assert _lowered(world, 1) == []
    abort = {"type": "Abort", "id": "1", "candidateDigest": OTHER, "reason": "CHG-1"}
    world.actions = (UserAction.model_validate(abort),)
    while world.status.phase != "RolledBack":
        assert _lowered(world, 1) == []
    assert _lowered(world) == [SERVICE]
