"""Leader election: who may write, by rules alone and against a scripted API server. The real one: tests/cluster/test_election.py."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from hafnium_scripted_api import Answer, Asked, ScriptedApi, data, says, scripted_api

from hafnium_rollout.kubernetes.errors import LeaseLost
from hafnium_rollout.kubernetes.leader import Leader, LeaseTimes, Record, in_term, next_record

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
TIMES = LeaseTimes()
OTHERS = Record("other", 15.0, "2026-03-01T11:00:00Z", "2026-03-01T11:00:00Z", 4)


def test_a_lease_that_nobody_has_is_taken() -> None:
    found = next_record(None, 0.0, "me", TIMES, NOW)
    assert found is not None
    assert (found.holder, found.transitions) == ("me", 0)


def test_a_lease_of_another_is_left_alone_while_its_record_is_fresh_by_our_own_clock() -> None:
    """Its renewTime is an hour old by our wall clock: clocks may differ, so only what we saw ourselves counts."""
    assert next_record(OTHERS, 14.9, "me", TIMES, NOW) is None


def test_a_lease_whose_record_stood_still_for_its_duration_is_taken() -> None:
    found = next_record(OTHERS, 15.0, "me", TIMES, NOW)
    assert found is not None
    assert (found.holder, found.transitions) == ("me", 5)


def test_a_lease_that_was_given_up_is_taken_at_once() -> None:
    found = next_record(Record("", 1.0, "", "", 4), 0.0, "me", TIMES, NOW)
    assert found is not None
    assert found.holder == "me"


def test_ones_own_lease_is_renewed_and_keeps_its_beginning() -> None:
    mine = Record("me", 15.0, "2026-03-01T11:59:58.000000Z", "2026-03-01T11:00:00.000000Z", 4)
    assert next_record(mine, 100.0, "me", TIMES, NOW) == Record(
        "me", 15.0, "2026-03-01T12:00:00.000000Z", "2026-03-01T11:00:00.000000Z", 4)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class LeaseServer:
    """One Lease with compare-and-swap, as the API server has it."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.fault: Answer | None = None
        self.uid = "u"

    def __call__(self, asked: Asked) -> Answer:
        if self.fault is not None:
            return self.fault
        if asked.method == "GET":
            return says(404) if self.lease is None else data(self.lease)
        body = json.loads(asked.body)
        version = int(self.lease["metadata"]["resourceVersion"]) if self.lease is not None else 0
        if (asked.method == "POST") != (self.lease is None) or (
                asked.method == "PUT" and body["metadata"]["resourceVersion"] != str(version)):
            return says(409, "the object has been modified")
        body["metadata"] |= {"resourceVersion": str(version + 1), "uid": self.uid}
        self.lease = body
        return data(body)


def _leader(api: ScriptedApi, identity: str, clock: Clock) -> Leader:
    return Leader(api.client(clock=clock, sleep=lambda _: None), "ops", "hafnium-rollout", identity, TIMES, clock=clock, now=lambda: NOW)


def test_of_two_one_leads_and_the_other_takes_over_when_it_is_gone() -> None:
    clock = Clock()
    with scripted_api(LeaseServer()) as api:
        first, second = _leader(api, "first", clock), _leader(api, "second", clock)
        assert first.step()
        assert not second.step()
        clock.seconds += 14
        assert not second.step()
        clock.seconds += 2
        assert second.step()
        with pytest.raises(LeaseLost, match="not renewed in time"):
            first.check()
        assert not first.step()
        with pytest.raises(LeaseLost, match="second holds it"):
            first.check()


def test_a_leader_that_cannot_renew_stops_writing_before_another_may_begin() -> None:
    clock, server = Clock(), LeaseServer()
    with scripted_api(server) as api:
        leader = _leader(api, "first", clock)
        assert leader.step()
        server.fault = says(500, "etcd is down")
        for _ in range(4):
            clock.seconds += 2
            assert leader.step()
        clock.seconds += 2
        assert not leader.step()
        assert "etcd is down" in leader.problem
        assert clock.seconds - 1000 < TIMES.duration_s


def test_a_leader_that_slept_knows_it_at_its_next_write() -> None:
    """The process was stopped between its check and its next one: nothing ran in between that could have told it."""
    clock = Clock()
    with scripted_api(LeaseServer()) as api:
        leader = _leader(api, "first", clock)
        leader.step()
        leader.check()
        clock.seconds += 3600
        with pytest.raises(LeaseLost):
            leader.check()


def test_what_was_decided_before_another_led_is_not_written_though_one_leads_again() -> None:
    """A turn of the first was held up. The second has led, moved things and gone; the first has the lease again, and its turn goes on."""
    clock = Clock()
    with scripted_api(LeaseServer()) as api:
        first, second = _leader(api, "first", clock), _leader(api, "second", clock)
        assert first.step()
        began = first.term
        assert not second.step()
        clock.seconds += 16
        assert second.step()
        second.release()
        assert first.step()
        first.check()
        with in_term(began), pytest.raises(LeaseLost, match="another process had it since this was decided"):
            first.check()
        with in_term(first.term):
            first.check()
        first.check()


def test_a_lease_that_ran_out_and_that_nobody_took_goes_on_in_the_same_term() -> None:
    clock = Clock()
    with scripted_api(LeaseServer()) as api:
        leader = _leader(api, "first", clock)
        leader.step()
        began = leader.term
        clock.seconds += 60
        with in_term(began), pytest.raises(LeaseLost, match="not renewed in time"):
            leader.check()
        assert leader.step()
        with in_term(began):
            leader.check()


def test_a_lease_that_was_deleted_and_made_anew_is_another_term() -> None:
    clock, server = Clock(), LeaseServer()
    with scripted_api(server) as api:
        leader = _leader(api, "first", clock)
        leader.step()
        began = leader.term
        server.lease, server.uid = None, "another"
        clock.seconds += 60
        assert leader.step()
        assert leader.term != began


def test_a_lease_given_up_is_free_at_once() -> None:
    clock = Clock()
    with scripted_api(LeaseServer()) as api:
        first, second = _leader(api, "first", clock), _leader(api, "second", clock)
        first.step()
        assert not second.step()
        first.release()
        with pytest.raises(LeaseLost):
            first.check()
        assert second.step()


def test_two_that_see_the_same_free_lease_do_not_both_get_it() -> None:
    clock, server = Clock(), LeaseServer()

    def racing(asked: Asked) -> Answer:
        answer = server(asked)
        if asked.method == "GET" and server.lease is None:  # somebody is faster, right after this look
            server(Asked("POST", "", {}, json.dumps({"metadata": {}, "spec": {"holderIdentity": "faster"}}).encode()))
        return answer

    with scripted_api(racing) as api:
        leader = _leader(api, "first", clock)
        assert not leader.step()
        assert "in between" in leader.problem


def test_run_tells_of_the_beginning_and_gives_the_lease_up_at_the_end() -> None:
    server, stop, told = LeaseServer(), threading.Event(), []

    def changed(leads: bool) -> None:
        told.append(leads)
        stop.set()

    with scripted_api(server) as api:
        leader = Leader(api.client(), "ops", "hafnium-rollout", "me", LeaseTimes(retry_s=0.01))
        leader.run(stop, changed)
    assert told == [True]
    assert server.lease is not None
    assert server.lease["spec"]["holderIdentity"] == ""


def test_a_listener_that_fails_ends_no_election_and_is_told_again() -> None:
    server, stop, told = LeaseServer(), threading.Event(), []

    def changed(leads: bool) -> None:
        told.append(leads)
        if len(told) == 1:
            raise BrokenPipeError("nobody reads the log")
        stop.set()

    with scripted_api(server) as api:
        leader = Leader(api.client(), "ops", "hafnium-rollout", "me", LeaseTimes(retry_s=0.01))
        leader.run(stop, changed)
    assert told == [True, True]


def test_run_tells_of_another_term_though_each_step_leads() -> None:
    """The process was stopped between two steps; meanwhile another had the lease, and gave it up."""
    server, stop, told, clock = LeaseServer(), threading.Event(), [], Clock()

    def changed(leads: bool) -> None:
        told.append(leads)
        if len(told) == 1:
            clock.seconds += 16
            with scripted_api(server) as other:
                second = _leader(other, "second", clock)
                second.step()
                clock.seconds += 16
                assert second.step()
                second.release()
        if len(told) == 3:
            stop.set()

    with scripted_api(server) as api:
        Leader(api.client(), "ops", "hafnium-rollout", "me", LeaseTimes(retry_s=0.01), clock=clock).run(stop, changed)
    assert told == [True, False, True]
