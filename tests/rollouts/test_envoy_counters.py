"""Which of the real Envoy's counters tell the truth about an arm. If a new Envoy counts otherwise, this fails and not the gate."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

import pytest
from hafnium_rollout_gateway import Gateway, free_port, gateway

from hafnium_rollout.envoy_counters import ArmCounters, EnvoyAdmin, from_data, was_reset
from hafnium_rollout.errors import StateError

NAME = "risk-aaaaaaaa"


@pytest.fixture
def envoy(tmp_path: Path) -> Generator[Gateway]:
    with gateway(tmp_path) as found:
        yield found


def counted(envoy: Gateway, *, at_least: int) -> tuple[ArmCounters, ArmCounters]:
    """(stable, candidate) once the candidate's attempts and the histogram are there."""
    admin = EnvoyAdmin(envoy.admin)
    for _ in range(100):
        now = admin.counters(["risk", NAME])
        c, s = now[NAME], now["risk"]
        if c.success + c.error >= at_least and c.timed + s.timed >= at_least and c.completed >= at_least:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # two more flushes: what is still to come is there then
    now = admin.counters(["risk", NAME])
    return now["risk"], now[NAME]


@pytest.mark.parametrize("mode", ["error", "reset"])
def test_a_failed_attempt_counts_once_for_the_candidate_and_its_retry_for_nobody(envoy: Gateway, mode: str) -> None:
    envoy.wait_for_weight(100)
    envoy.candidate.mode = mode
    assert envoy.send(30) == {200: 30}
    stable, candidate = counted(envoy, at_least=30)
    assert (candidate.error, candidate.success) == (30, 0)
    assert (stable.error, stable.success, stable.completed) == (0, 0, 0)
    assert candidate.completed == 30
    assert envoy.stable.seen == 30


def test_a_refused_connection_counts_as_a_failed_attempt(envoy: Gateway) -> None:
    envoy.wait_for_weight(100)
    envoy.candidate.stop()
    assert envoy.send(20) == {200: 20}
    _, candidate = counted(envoy, at_least=20)
    assert (candidate.error, candidate.success, candidate.completed) == (20, 0, 20)


def test_a_timeout_counts_as_a_failed_attempt_and_as_slow(envoy: Gateway) -> None:
    envoy.wait_for_weight(100)
    envoy.candidate.mode = "hang"
    assert envoy.send(2) == {200: 2}
    _, candidate = counted(envoy, at_least=2)
    assert (candidate.error, candidate.success) == (2, 0)
    assert candidate.timed - candidate.not_slower[1000.0] == 2


def test_a_refused_request_is_counted_apart_from_a_failed_one(envoy: Gateway) -> None:
    envoy.wait_for_weight(100)
    envoy.candidate.mode = "bad_request"
    assert envoy.send(10) == {422: 10}
    _, candidate = counted(envoy, at_least=10)
    assert (candidate.error, candidate.success, candidate.refused) == (0, 10, 10)


def test_refused_copies_are_counted(envoy: Gateway) -> None:
    envoy.wait_for_weight(0, shadow=True)
    envoy.candidate.mode = "bad_request"
    assert envoy.send(10) == {200: 10}
    stable, candidate = counted(envoy, at_least=10)
    assert (stable.refused, candidate.refused) == (0, 10)


@pytest.mark.parametrize(("mode", "errors"), [("ok", 0), ("error", 20)])
def test_copies_in_shadow_are_counted_like_requests(envoy: Gateway, mode: str, errors: int) -> None:
    envoy.wait_for_weight(0, shadow=True)
    envoy.candidate.mode = mode
    assert envoy.send(20) == {200: 20}
    stable, candidate = counted(envoy, at_least=20)
    assert (candidate.error, candidate.success) == (errors, 20 - errors)
    assert (stable.error, stable.success) == (0, 20)
    assert candidate.timed == 20


def test_slow_copies_show_in_the_buckets(envoy: Gateway) -> None:
    envoy.wait_for_weight(0, shadow=True)
    envoy.candidate.mode, envoy.candidate.every = "slow", 2
    envoy.send(20)
    _, candidate = counted(envoy, at_least=20)
    assert candidate.timed - candidate.not_slower[100.0] == 10


def test_weights_and_copies_are_read_from_the_gateway_itself(envoy: Gateway) -> None:
    admin = EnvoyAdmin(envoy.admin)
    envoy.wait_for_weight(5)
    assert admin.live_route("risk").weights == {"risk": 95, NAME: 5}
    envoy.wait_for_weight(0, shadow=True)
    live = admin.live_route("risk")
    assert (dict(live.weights), live.mirrors) == ({"risk": 100}, frozenset({NAME}))
    assert admin.live_route("another").weights == {}


def test_counters_of_a_restarted_gateway_are_known_to_be_new(envoy: Gateway) -> None:
    envoy.wait_for_weight(50)
    envoy.send(20)
    before = EnvoyAdmin(envoy.admin).counters(["risk"])["risk"]
    envoy.stop_envoy()
    envoy.start_envoy()
    after = EnvoyAdmin(envoy.admin).counters(["risk"])["risk"]
    assert was_reset(before, after)
    assert not was_reset(after, after)


def test_a_gateway_that_is_away_is_an_error_and_not_zero() -> None:
    with pytest.raises(StateError, match="can't be asked"):
        EnvoyAdmin(free_port()).counters(["risk"])


def test_counters_survive_the_status_and_nonsense_does_not() -> None:
    counters = ArmCounters("127.0.0.1:1", 5, 2, 7, 7, {0.5: 1, 100.0: 6})
    assert from_data(counters.as_data()) == counters
    assert from_data(None) is None
    assert from_data({"endpoint": "x"}) is None
    assert from_data({k: v for k, v in counters.as_data().items() if k != "refused"}) is None, "of an older version"
