"""A turn over all rollouts when Prometheus is slow or gone: bounded, fair, and no sign that the process is stuck."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hafnium_rollout_world import rollout
from hafnium_scripted_api import Answer, data, scripted_api
from hypothesis import given, settings
from hypothesis import strategies as st

from hafnium_rollout.kubernetes.errors import LeaseLost
from hafnium_rollout.kubernetes.operator import Operator, in_order
from hafnium_rollout.kubernetes.prometheus_client import Prometheus, PrometheusError
from hafnium_rollout.kubernetes.reconciler import Turned
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot

ONE = Answer(200, json.dumps({"status": "success", "data": {"resultType": "scalar", "result": [1.0, "1"]}}).encode())


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- Prometheus ---------------------------------------------------------------------------------------------------------------


def test_one_failed_answer_serves_for_all_of_a_turn_and_the_next_turn_asks_anew() -> None:
    clock = Clock()
    with scripted_api(Answer(cut=True), ONE) as api:
        prometheus = Prometheus(api.url, 5.0, clock=clock)
        prometheus.begin_turn(30.0)
        with pytest.raises(PrometheusError, match="can't be asked"):
            prometheus.query("time()")
        for _ in range(3):
            with pytest.raises(PrometheusError, match="can't be asked"):
                prometheus.query("time()")
        assert len(api.asked) == 1
        clock.now += 1.0
        prometheus.begin_turn(30.0)
        with pytest.raises(PrometheusError, match="can't be asked"):
            prometheus.query("time()")
        clock.now += 5.0
        prometheus.begin_turn(30.0)
        assert prometheus.query("time()").samples[0].value == 1.0


def test_an_answer_that_says_no_is_one_rollouts_own() -> None:
    """A query that can't be evaluated says nothing about the others'."""
    with scripted_api(Answer(422, b'{"status":"error","error":"query timed out"}'), ONE) as api:
        prometheus = Prometheus(api.url)
        prometheus.begin_turn(30.0)
        with pytest.raises(PrometheusError, match="query timed out"):
            prometheus.query("heavy")
        assert prometheus.query("time()").at == 1.0


def test_a_turn_has_so_much_time_for_prometheus_and_says_so_when_it_is_over() -> None:
    clock = Clock()

    def slow(_: Any) -> Answer:
        clock.now += 4.0
        return ONE

    with scripted_api(slow) as api:
        prometheus = Prometheus(api.url, 5.0, clock=clock)
        prometheus.begin_turn(12.0)
        for _ in range(3):
            prometheus.query("time()")
        with pytest.raises(PrometheusError, match="is slow: the 12 s that a turn has for it are used up"):
            prometheus.query("time()")
        assert len(api.asked) == 3
        prometheus.begin_turn(10.0)
        prometheus.query("time()")


def test_an_answer_that_drips_is_given_up() -> None:
    clock = Clock()
    with scripted_api(Answer(200, b" " * 600_000 + ONE.body)) as api:
        prometheus = Prometheus(api.url, 5.0, clock=clock)

        class Dripping:
            def __call__(self) -> float:
                clock.now += 3.0
                return clock.now

        prometheus._clock = Dripping()  # type: ignore[assignment]
        with pytest.raises(PrometheusError, match="bytes came, and not the rest"):
            prometheus.query("time()")


# --- the loop -----------------------------------------------------------------------------------------------------------------


class Turning:
    """In the place of the reconciler: each turn is what the test says."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn
        self.turned: list[str] = []

    def turn(self, item: Any, *_: Any, **__: Any) -> Turned:
        self.turned.append(item["metadata"]["name"])
        self._turn()
        return Turned(rollout(), None)


def _operator(url: str, clock: Clock, turn: Callable[[], None], **more: Any) -> tuple[Operator, Turning]:
    with scripted_api(data({})) as api:
        operator = Operator(Settings(prometheus_url=url, threads=1, **more), api.client(), clock=clock, log=lambda _: None)
    turning = Turning(turn)
    operator._reconciler = turning  # type: ignore[assignment]
    return operator, turning


def _items(count: int) -> list[dict[str, Any]]:
    return [{"metadata": {"namespace": "n", "name": f"r{i:03d}"}} for i in range(count)]


def test_a_turn_over_many_slow_rollouts_is_no_stuck_process() -> None:
    clock, said = Clock(), list[str]()

    def slow() -> None:
        clock.now += 60.0
        said.append(operator.live())

    operator, turning = _operator("", clock, slow)
    operator._turn(_items(100), Snapshot(), "a term")
    assert len(turning.turned) == 100
    assert set(said) == {""}
    assert operator.live() == ""


def test_a_turn_that_never_ends_is_a_stuck_process() -> None:
    clock, go, began = Clock(), threading.Event(), threading.Event()

    def stuck() -> None:
        began.set()
        go.wait(60)

    operator, _ = _operator("", clock, stuck)
    thread = threading.Thread(target=operator._turn, args=(_items(3), Snapshot(), "a term"), daemon=True)
    thread.start()
    assert began.wait(30)
    clock.now += 179.0
    assert operator.live() == ""
    clock.now += 2.0
    assert "no turn of any rollout was finished for 181 s" in operator.live()
    go.set()
    thread.join(30)
    assert operator.live() == ""


def test_each_turn_begins_prometheus_time_anew() -> None:
    clock = Clock()
    with scripted_api(ONE) as api:
        def ask() -> None:
            assert operator._prometheus is not None
            operator._prometheus.query("time()")
            clock.now += 9.0

        operator, turning = _operator(api.url, clock, ask, look_s=10.0)
        for _ in range(3):
            operator._turn(_items(1), Snapshot(), "a term")
        assert len(turning.turned) == 3
        with pytest.raises(PrometheusError, match="the 10 s that a turn has"):
            operator._turn(_items(3), Snapshot(), "a term")


def test_a_lost_lease_ends_a_turn_only_when_all_of_its_rollouts_have_come_to_an_end() -> None:
    clock, lines = Clock(), list[str]()

    def lost() -> None:
        raise LeaseLost("no more")

    operator, turning = _operator("", clock, lost)
    operator._log = lambda line: lines.append(line["event"])  # type: ignore[method-assign]
    operator._turn(_items(5), Snapshot(), "a term")
    assert len(turning.turned) == 5
    assert lines == ["LeaseLost"]


def test_a_list_that_fails_is_a_failing_operator_until_the_next_one_that_does_not() -> None:
    empty = Answer(200, json.dumps({"kind": "ModelRolloutList", "items": [], "metadata": {"resourceVersion": "1"}}).encode())
    with scripted_api(Answer(403, b'{"kind":"Status","message":"no"}'), empty) as api:
        operator = Operator(Settings(watch=False), api.client(), log=lambda _: None)
        operator.metrics.leads(True)
        told = lambda: operator.metrics.exposition().decode()  # noqa: E731
        zero = 'modelrollout_failing_seconds{namespace="",rollout=""} 0.0\n'
        assert not operator.full_turn()
        assert zero not in told()
        assert operator.full_turn()
        assert zero in told()


@settings(max_examples=100, deadline=None)
@given(rollouts=st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 1e9)), max_size=12))
def test_rollbacks_come_first_and_then_who_waited_longest(rollouts: list[tuple[bool, float | None]]) -> None:
    items: list[dict[str, Any]] = []
    for i, (rollback, at) in enumerate(rollouts):
        status = {"cursor": {} if at is None else {"at": at}, **({"rollback": {"reason": "r"}} if rollback else {})}
        items.append({"metadata": {"name": str(i)}, "status": status})
    found = [rollouts[int(i["metadata"]["name"])] for i in in_order(items)]
    assert sorted(found, key=lambda r: (not r[0], r[1] or 0.0)) == found
    assert len(found) == len(rollouts)
