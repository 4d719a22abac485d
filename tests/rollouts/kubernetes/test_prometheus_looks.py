"""Looks from Prometheus: increments per pod between scrapes, and everything that makes a number unknown. It is never zero then."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from hafnium_rollout_world import rollout
from hafnium_scripted_api import Answer, Asked, scripted_api

from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.kubernetes.objects_seen import PodSeen
from hafnium_rollout.kubernetes.pod_counters import Pods, by_pod, increase
from hafnium_rollout.kubernetes.prometheus_client import Prometheus, PrometheusError, Sample
from hafnium_rollout.kubernetes.prometheus_queries import LookMade, PrometheusLooks, query_problems
from hafnium_rollout.observation import Counts, Look
from hafnium_rollout.statistics import sample_ratio
from hafnium_rollout.status import GateStatus, ModelSeen, RollbackStatus, RolloutStatus, StepStatus, stored

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SCRAPE_S = 15.0


@dataclass
class Pod:
    scraped: float = 0.0
    requests: float = 0.0
    errors: float | None = None
    slow: float = 0.0
    """Requests above 100 ms."""
    buckets: tuple[str, ...] = ("0.05", "0.1")


@dataclass
class World:
    """Two services with a pod each, Prometheus before them, and a clock."""

    now: datetime = T0
    pods: dict[str, Pod] = field(default_factory=lambda: {"s-1": Pod(), "c-1": Pod()})
    ready: dict[str, bool] = field(default_factory=dict[str, bool])
    queries: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Answers of further queries by their text: values."""
    fault: Answer | None = None
    skew_s: float = 0.0
    twice: str = ""
    """A pod that two jobs scrape, under different names."""
    asked: list[str] = field(default_factory=list[str])
    status: RolloutStatus = field(default_factory=lambda: RolloutStatus(
        stable=ModelSeen(service="stable"), candidate=ModelSeen(service="candidate"), run_id="r"))
    url: str = ""
    spec: dict[str, Any] = field(default_factory=dict[str, Any])

    def scrape(self, **changes: Pod) -> None:
        """Time goes on by a scrape, and every pod is scraped."""
        self.now += timedelta(seconds=SCRAPE_S)
        self.pods |= {k.replace("_", "-"): v for k, v in changes.items()}
        for pod in self.pods.values():
            pod.scraped = self.now.timestamp() - 3

    def answer(self, asked: Asked) -> Answer:
        if self.fault is not None:
            return self.fault
        query = parse_qs(asked.body.decode())["query"][0]
        self.asked.append(query)
        at = self.now.timestamp() + self.skew_s
        if query == "time()":
            return _ok("scalar", [at, str(at)])
        if query in self.queries:
            return _ok("vector", [{"metric": {"i": str(i)}, "value": [at, v]} for i, v in enumerate(self.queries[query])])
        match = re.search(r'pod=~"([^"]*)"', query)
        assert match is not None, query
        found = {n: p for n, p in self.pods.items() if re.fullmatch(match[1].replace("\\\\", "\\"), n)}
        jobs = {n: ("a", "b") if n == self.twice else ("a",) for n in found}
        if query.startswith("timestamp("):
            return _ok("vector", [{"metric": {"pod": n, "instance": job}, "value": [at, str(p.scraped)]}
                                  for n, p in found.items() for job in jobs[n]])
        rows: list[tuple[dict[str, str], float]] = []
        for name, p in found.items():
            rows.append(({"__name__": "inference_requests_total", "pod": name}, p.requests))
            if p.errors is not None:
                rows.append(({"__name__": "inference_errors_total", "pod": name, "type": "internal"}, p.errors))
            rows.append(({"__name__": "inference_duration_seconds_count", "pod": name}, p.requests))
            # A labelled histogram shows no bucket before its first request.
            for le, n in ((*((b, p.requests - p.slow) for b in p.buckets), ("+Inf", p.requests)) if p.requests else ()):
                rows.append(({"__name__": "inference_duration_seconds_bucket", "pod": name, "le": le}, n))
        return _ok("vector", [{"metric": {**labels, "instance": job}, "value": [at, str(v)]}
                              for labels, v in rows for job in jobs[labels["pod"]]])

    def look(self, *, keep: bool = True) -> LookMade:
        looks = PrometheusLooks(Prometheus(self.url), scrape_interval_s=SCRAPE_S, clock_skew_s_max=5.0)
        pods = {service: tuple(PodSeen(n, service, "predictor", self.ready.get(n, True), 0) for n in sorted({*self.pods, *self.ready})
                               if n.startswith(service[0])) for service in ("stable", "candidate")}
        made = looks.look(rollout(**self.spec), "ns", self.status, pods, self.now)
        if keep:  # as the API server would keep it
            cursor = json.loads(json.dumps(stored(self.status.model_copy(update={"cursor": made.cursor}))))["cursor"]
            self.status = self.status.model_copy(update={"cursor": cursor})
        return made


def _ok(kind: str, result: list[Any]) -> Answer:
    return Answer(200, json.dumps({"status": "success", "data": {"resultType": kind, "result": result}}).encode())


@pytest.fixture
def world() -> Generator[World]:
    found = World()
    with scripted_api(found.answer) as api:
        found.url = api.url
        yield found


def _made(made: LookMade) -> Look:
    assert made.look is not None, made.problems
    return made.look


def _counts(made: LookMade, gate: str = "errors") -> tuple[Counts, Counts]:
    series = _made(made).gates[gate].series[0]
    return series.stable, series.candidate


def test_the_first_reading_is_only_a_beginning(world: World) -> None:
    world.scrape(s_1=Pod(requests=1000), c_1=Pod(requests=50))
    assert world.look().look is None


def test_increments_of_both_arms_between_two_scrapes(world: World) -> None:
    world.scrape(s_1=Pod(requests=1000, errors=10), c_1=Pod(requests=50))
    world.look()
    began = world.pods["s-1"].scraped
    world.scrape(s_1=Pod(requests=1900, errors=13), c_1=Pod(requests=150, errors=2))
    made = world.look()
    assert _counts(made) == (Counts(3, 900), Counts(2, 100))
    look = _made(made)
    assert look.started.timestamp() == began, "a look begins where the oldest of its increments began, at a scrape"
    assert look.ended == world.now


def test_errors_that_appear_for_the_first_time_are_counted_from_zero(world: World) -> None:
    """A series with a label begins with its first event. The pod was there before, so it had none."""
    world.scrape(c_1=Pod(requests=50, errors=None))
    world.look()
    world.scrape(c_1=Pod(requests=60, errors=7))
    assert _counts(world.look())[1] == Counts(7, 10)


def test_a_pod_that_was_not_scraped_since_makes_no_look_and_loses_nothing(world: World) -> None:
    world.scrape(s_1=Pod(requests=100), c_1=Pod(requests=10))
    world.look()
    world.now += timedelta(seconds=5)
    made = world.look()
    assert made.look is None
    assert made.problems == ()
    world.scrape(s_1=Pod(requests=300), c_1=Pod(requests=30))
    assert _counts(world.look()) == (Counts(0, 200), Counts(0, 20))


def test_a_stale_pod_is_a_problem_and_no_zero(world: World) -> None:
    world.scrape()
    world.look()
    world.now += timedelta(seconds=4 * SCRAPE_S + 10)
    made = world.look()
    assert made.look is None
    assert "the last scrape of pod s-1 is 73 s old" in made.problems[0]


def test_a_counter_that_fell_leaves_the_look_out_for_both_arms(world: World) -> None:
    world.scrape(s_1=Pod(requests=100), c_1=Pod(requests=1000, errors=500))
    world.look()
    world.scrape(s_1=Pod(requests=200), c_1=Pod(requests=3, errors=0))
    made = world.look()
    assert made.look is None
    assert "counters of pod c-1 began anew" in made.problems[0]
    world.scrape(s_1=Pod(requests=300), c_1=Pod(requests=13, errors=1))
    assert _counts(world.look()) == (Counts(0, 100), Counts(1, 10))


def test_errors_that_fell_alone_are_a_reset_too(world: World) -> None:
    world.scrape(c_1=Pod(requests=10, errors=9))
    world.look()
    world.scrape(c_1=Pod(requests=40, errors=1))
    assert world.look().look is None


def test_a_new_pod_is_a_baseline_and_the_split_is_not_judged(world: World) -> None:
    """Its counters may hold requests from before the weight was effective."""
    world.scrape()
    world.look()
    world.scrape(s_1=Pod(requests=90), c_1=Pod(requests=10), c_2=Pod(requests=5000, errors=4000))
    made = world.look()
    assert _counts(made)[1] == Counts(0, 10)
    assert "split" not in made.cursor
    world.scrape(s_1=Pod(requests=180), c_1=Pod(requests=20), c_2=Pod(requests=5010, errors=4001))
    assert _counts(world.look())[1] == Counts(1, 20)


def test_a_pod_that_is_gone_takes_its_last_requests_along(world: World) -> None:
    world.scrape(c_2=Pod(requests=100, errors=50))
    world.look()
    del world.pods["c-2"]
    world.scrape(s_1=Pod(requests=90), c_1=Pod(requests=10))
    made = world.look()
    assert _counts(made)[1] == Counts(0, 10)
    assert "split" not in made.cursor


def test_a_ready_pod_that_is_not_scraped_is_an_error_and_no_silence(world: World) -> None:
    del world.pods["c-1"]
    world.ready["c-1"] = True
    world.scrape()
    world.look()
    world.scrape(s_1=Pod(requests=100))
    gate = _made(world.look()).gates["errors"]
    assert gate.series == ()
    assert "has no inference_requests_total of candidate (pods c-1)" in gate.error


def test_a_pod_that_is_never_scraped_hides_behind_no_other(world: World) -> None:
    """One healthy pod that is counted says nothing of three that aren't."""
    world.ready = {"c-2": True}
    world.look()
    for n in range(1, 5):
        world.scrape(s_1=Pod(requests=100.0 * n, errors=0), c_1=Pod(requests=10.0 * n, errors=0))
        assert _made(world.look()).gates["errors"].error == "", "a new pod has its time"
    world.scrape(s_1=Pod(requests=500, errors=0), c_1=Pod(requests=50, errors=0))
    error = _made(world.look()).gates["errors"].error
    assert "pods c-2" in error
    assert "are they scraped" in error
    world.scrape(c_2=Pod(requests=1))
    assert _made(world.look()).gates["errors"].error == ""


def test_a_candidate_without_pods_has_no_requests_and_that_is_known(world: World) -> None:
    del world.pods["c-1"]
    world.scrape()
    world.look()
    world.scrape(s_1=Pod(requests=100))
    made = world.look()
    assert _counts(made) == (Counts(0, 100), Counts(0, 0))


def test_a_rollback_is_not_over_while_the_candidate_cannot_be_counted(world: World) -> None:
    del world.pods["c-1"]
    world.ready["c-1"] = True
    world.scrape()
    world.look()
    world.status = world.status.model_copy(update={"rollback": RollbackStatus(reason="r", message="m", requested_at=T0, reject=True)})
    world.scrape()
    made = world.look()
    assert made.look is None
    assert "isn't known whether requests still reach the candidate" in made.problems[0]


# --- how many requests reached the candidate ------------------------------------------------------------------------------------


def test_the_candidates_requests_are_in_every_look_whatever_the_gates_ask(world: World) -> None:
    world.spec = {"gates": [{"name": "own", "role": "Safety", "prometheus": {"bad": "b", "total": "t"}}]}
    world.queries = {"b": [], "t": []}
    world.scrape(c_1=Pod(requests=10))
    world.look()
    world.scrape(c_1=Pod(requests=17))
    look = _made(world.look())
    assert look.gates["own"].error, "the gate sees nothing"
    assert look.candidate_requests == 7
    world.scrape()
    assert _made(world.look()).candidate_requests == 0


def test_without_a_count_of_every_pod_it_is_not_known(world: World) -> None:
    world.scrape()
    world.look()
    world.scrape(s_1=Pod(requests=90), c_2=Pod(requests=5000))
    assert _made(world.look()).candidate_requests is None, "a new pod is a baseline"
    world.scrape(s_1=Pod(requests=180))
    assert _made(world.look()).candidate_requests == 0
    world.ready["c-3"] = True
    world.scrape(s_1=Pod(requests=270))
    assert _made(world.look()).candidate_requests is None, "a ready pod that isn't scraped"
    world.ready["c-3"] = False
    world.scrape(s_1=Pod(requests=360))
    assert _made(world.look()).candidate_requests == 0, "a pod that isn't ready gets no requests"
    del world.pods["c-2"]
    world.scrape(s_1=Pod(requests=450))
    assert _made(world.look()).candidate_requests is None, "a pod that is gone took its last requests along"


def test_a_stable_arm_that_cannot_be_counted_leaves_the_candidates_count_known(world: World) -> None:
    del world.pods["s-1"]
    world.ready["s-1"] = True
    world.scrape()
    world.look()
    world.scrape(c_1=Pod(requests=4))
    look = _made(world.look())
    assert "of stable" in look.gates["errors"].error
    assert look.candidate_requests == 4


def test_without_prometheus_it_is_not_known(world: World) -> None:
    looks = PrometheusLooks(None, scrape_interval_s=SCRAPE_S, clock_skew_s_max=5.0)
    status = world.status.model_copy(update={"cursor": looks.look(rollout(), "ns", world.status, {}, T0).cursor})
    assert _made(looks.look(rollout(), "ns", status, {}, T0 + timedelta(seconds=30))).candidate_requests is None


# --- a pod with two scrape jobs -------------------------------------------------------------------------------------------------


def _sample(family: str, value: float, **labels: str) -> Sample:
    return Sample({"__name__": family, "pod": "c-1", "component": "transformer", "model_name": "m", "model_version": "1", **labels}, value)


def _scraped(*targets: dict[str, str], requests: float = 10.0) -> Pods:
    values = [_sample("inference_requests_total", requests, **t) for t in targets]
    values += [_sample("inference_errors_total", 2.0, type=kind, **t) for t in targets for kind in ("timeout", "internal")]
    return by_pod(values, [_sample("", 100.0 + i, **t) for i, t in enumerate(targets)])


def test_one_process_under_two_jobs_counts_once() -> None:
    two = ({"job": "pods", "instance": "10.0.0.1:8080"}, {"job": "pod-monitor", "endpoint": "http", "instance": "10.0.0.1:8080"})
    found = _scraped(*two)
    assert found.doubled == {}
    assert (found.counters["c-1"].requests, found.counters["c-1"].errors) == (10.0, 4.0)
    again = _scraped(*reversed(two))
    assert again.counters["c-1"].target == found.counters["c-1"].target, "the same one whatever the order"


def test_labels_of_the_metric_itself_make_no_second_target() -> None:
    labels = {"job": "pods", "instance": "10.0.0.1:8080"}
    values = [_sample("inference_requests_total", 1.0, **labels, model_version=v, exported_component=c) for v in "12" for c in "ab"]
    found = by_pod(values, [_sample("", 5.0, **labels, model_version=v) for v in "12"])
    assert (found.doubled, found.counters["c-1"].requests) == ({}, 4.0)


@pytest.mark.parametrize(("targets", "differ"), [
    (({"job": "a", "instance": "10.0.0.1:8080"}, {"job": "b", "instance": "c-1"}), "instance, job"),
    (({"job": "a", "instance": "c-1", "container": "x"}, {"job": "a", "instance": "c-1", "container": "y"}), "container"),
    (({"job": "a"}, {"job": "b"}), "job"),
    (({"job": "a", "instance": "i", "dc": "1"}, {"job": "a", "instance": "i", "dc": "2"}), "dc"),
], ids=["two instances", "two containers", "no instance", "an unknown label"])
def test_what_may_be_two_processes_is_no_count_and_says_in_which_labels(targets: tuple[dict[str, str], ...], differ: str) -> None:
    found = _scraped(*targets)
    assert found.counters == {}
    assert f"pod c-1 is scraped as 2 targets that differ in {differ}: " in found.doubled["c-1"]


@pytest.mark.parametrize("label", ["component", "exported_component"], ids=["its own label", "beside the pod's label"])
def test_of_transformer_and_predictor_in_one_pod_the_one_counts_that_requests_come_in_at(label: str) -> None:
    both = [{"job": "models", "container": f"c-{port}", "instance": f"10.0.0.1:{port}", "component": "predictor", label: component}
            for component, port in (("transformer", "8080"), ("predictor", "8085"))]
    values = [_sample("inference_requests_total", n, **t) for t, n in zip(both, (10.0, 70.0), strict=True)]
    times = [_sample("", at, **t) for t, at in zip(both, (100.0, 90.0), strict=True)]
    found = by_pod(values, times)
    assert found.doubled == {}
    assert (found.counters["c-1"].requests, found.counters["c-1"].scraped_at) == (10.0, 100.0)
    alone = by_pod(values[1:], times[1:])
    assert alone.counters["c-1"].requests == 70.0
    assert alone.counters["c-1"].target != found.counters["c-1"].target, "never subtracted from the other's"
    twice = by_pod([*values, _sample("inference_requests_total", 1.0, **{**both[0], "instance": "c-1"})],
                   [*times, _sample("", 95.0, **{**both[0], "instance": "c-1"})])
    assert "scraped as 2 targets that differ in instance" in twice.doubled["c-1"]


def test_a_pod_that_is_counted_twice_is_an_error_of_its_arm_and_no_number(world: World) -> None:
    world.scrape()
    world.look()
    world.twice = "c-1"
    world.scrape(s_1=Pod(requests=90), c_1=Pod(requests=10))
    look = _made(world.look())
    assert look.gates["errors"].series == ()
    assert "requests would be counted twice: let one scrape job have it" in look.gates["errors"].error
    assert look.candidate_requests is None


def test_another_target_of_the_same_pod_is_a_new_baseline() -> None:
    one, two = (_scraped({"job": j, "instance": j}, requests=n).counters for j, n in (("a", 10.0), ("b", 5000.0)))
    found = increase(one, {"c-1": replace(two["c-1"], scraped_at=200.0)}, ["c-1"])
    assert (found.requests, found.whole) == (0.0, False)


def test_latency_is_the_share_above_a_bucket(world: World) -> None:
    world.spec = {"gates": [{"name": "slow", "role": "Safety", "latency": {"slowerThan": "100ms"}}]}
    world.scrape(s_1=Pod(requests=100, slow=1), c_1=Pod(requests=10))
    world.look()
    world.scrape(s_1=Pod(requests=200, slow=3), c_1=Pod(requests=30, slow=5))
    assert _counts(world.look(), "slow") == (Counts(2, 100), Counts(5, 20))


_WITH_75 = ("0.05", "0.075", "0.1")
_SLOW = {"gates": [{"name": "slow", "role": "Safety", "latency": {"slowerThan": "75ms"}}]}


@pytest.mark.parametrize(("stable", "candidate"), [(("0.05", "0.1"), _WITH_75), (_WITH_75, ("0.05", "0.1"))], ids=["stable", "candidate"])
def test_a_latency_bucket_that_one_arm_lacks_is_not_taken_for_slow_requests(
    world: World, stable: tuple[str, ...], candidate: tuple[str, ...],
) -> None:
    world.spec = _SLOW
    world.scrape(s_1=Pod(requests=100, buckets=stable), c_1=Pod(requests=100, buckets=candidate))
    world.look()
    world.scrape(s_1=Pod(requests=1100, buckets=stable), c_1=Pod(requests=1100, slow=900, buckets=candidate))
    found = _made(world.look()).gates["slow"]
    assert [(s.label, s.stable, s.candidate) for s in found.series] == [
        (f"> {b} ms", Counts(0, 1000), Counts(900, 1000)) for b in (50, 100)]


def test_latency_arms_without_a_useful_bucket_in_common_can_not_be_compared(world: World) -> None:
    world.spec = _SLOW
    stable, candidate = ("0.005", "10"), ("0.005", "0.05", "0.1", "5")
    world.scrape(s_1=Pod(requests=100, buckets=stable), c_1=Pod(requests=100, buckets=candidate))
    world.look()
    world.scrape(s_1=Pod(requests=1100, buckets=stable), c_1=Pod(requests=1100, slow=900, buckets=candidate))
    found = _made(world.look()).gates["slow"]
    assert found.series == ()
    assert "the stable arm has 5 and 10000 ms, the candidate arm has 50 and 100 ms" in found.error


def test_two_images_in_one_arm_are_compared_at_the_buckets_of_both(world: World) -> None:
    world.spec = _SLOW
    old, new = ("0.05", "0.1"), _WITH_75
    world.scrape(s_1=Pod(requests=100, buckets=old), s_2=Pod(requests=100, buckets=new), c_1=Pod(requests=100, buckets=new))
    world.look()
    world.scrape(s_1=Pod(requests=200, buckets=old), s_2=Pod(requests=200, buckets=new), c_1=Pod(requests=200, buckets=new))
    found = _made(world.look()).gates["slow"]
    assert [(s.label, s.stable, s.candidate) for s in found.series] == [
        (f"> {b} ms", Counts(0, 200), Counts(0, 100)) for b in (50, 100)]


def test_timed_requests_without_any_bucket_are_an_error_and_not_slow(world: World) -> None:
    world.spec = _SLOW
    world.scrape(s_1=Pod(requests=100, buckets=_WITH_75), c_1=Pod(requests=100, buckets=()))
    world.look()
    world.scrape(s_1=Pod(requests=200, buckets=_WITH_75), c_1=Pod(requests=200, buckets=()))
    assert "the candidate arm has 100 timed requests and no histogram bucket" in _made(world.look()).gates["slow"].error


@pytest.mark.parametrize("threshold", ["75ms", "100ms", "60ms"])
def test_looks_before_the_first_request_settle_no_latency_thresholds(world: World, threshold: str) -> None:
    """No bucket is shown yet; the gate must be measurable once there is one."""
    world.spec = {"gates": [{"name": "slow", "role": "Safety", "latency": {"slowerThan": threshold}}]}
    gate = rollout(**world.spec).spec.gates[0]
    context = GateContext(
        now=T0, shadow=True, weight=0, digest="", step_since=T0, run_since=T0, counts_for_pass=True, counts_for_fail=True,
        alpha_fail=0.01, alpha_limit=0.01, fresh=timedelta(minutes=1))
    status = GateStatus(name="slow", role="Safety")
    said: list[str] = []
    for s_requests, c_requests in ((0, 0), (0, 0), (5, 0), (2000, 2000), (4000, 4000)):
        world.scrape(s_1=Pod(requests=s_requests, buckets=_WITH_75), c_1=Pod(requests=c_requests, buckets=("0.05", "0.1")))
        look = world.look().look
        if look is not None:
            status = judge(gate, status, look, (), "", replace(context, now=world.now))
            said.append(f"{status.verdict} {status.message}")
            assert status.state.last_seen_at == world.now, "a silent service isn't a blind gate"
    assert said[-1].startswith("Pass"), said
    assert status.samples == 4000


@pytest.mark.parametrize(("fault", "says"), [
    (Answer(cut=True), "can't be asked"),
    (Answer(503, b"starting"), "without JSON"),
    (Answer(422, b'{"status":"error","error":"query timed out"}'), "query timed out"),
    (Answer(200, b'{"status":"success","warnings":["one store is down"],"data":{"resultType":"vector","result":[]}}'), "only a part"),
    (Answer(200, b'{"status":"success","data":{"resultType":"matrix","result":[]}}'), "expected a vector"),
    (Answer(200, b'{"status":"success","data":{"resultType":"scalar","result":[1,"NaN"]}}'), "no count"),
    (Answer(200, b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{}}]}}'), "can't be read"),
], ids=["gone", "another server", "timeout", "partial", "matrix", "NaN", "half a sample"])
def test_a_prometheus_that_cannot_be_believed_gives_no_look_and_says_why(world: World, fault: Answer, says: str) -> None:
    world.scrape()
    world.look()
    world.scrape(s_1=Pod(requests=100))
    before = world.status.cursor
    world.fault = fault
    made = world.look()
    assert made.look is None
    assert says in made.problems[0]
    assert made.cursor == before, "the time that wasn't seen is part of the next look"


def test_a_clock_that_is_off_makes_every_count_doubtful(world: World) -> None:
    world.scrape()
    world.look()
    world.scrape()
    world.skew_s = 600
    made = world.look()
    assert made.look is None
    assert "clock is +600 s off ours" in made.problems[0]


def test_all_of_a_look_is_evaluated_at_one_time(world: World) -> None:
    world.scrape()
    world.look()
    assert world.asked[0] == "time()"
    assert len(world.asked) == 3


def test_without_prometheus_looks_exist_but_count_nothing(world: World) -> None:
    looks = PrometheusLooks(None, scrape_interval_s=SCRAPE_S, clock_skew_s_max=5.0)
    first = looks.look(rollout(), "ns", world.status, {}, T0)
    assert first.look is None
    status = world.status.model_copy(update={"cursor": first.cursor})
    gate = _made(looks.look(rollout(), "ns", status, {}, T0 + timedelta(seconds=30))).gates["errors"]
    assert (gate.series, "no Prometheus" in gate.error) == ((), True)


def test_the_split_is_judged_in_portions_of_many_scrapes_and_never_on_a_single_look(world: World) -> None:
    """Traffic begins between the scrapes of the two arms: in that look the candidate has everything and the stable one nothing."""
    world.scrape()
    effective = world.now - timedelta(seconds=60)
    world.status = world.status.model_copy(update={"step": StepStatus(
        index=0, entered_at=effective, weight_desired=20, weight_observed=20, weight_effective_since=effective)})
    world.look()
    world.scrape(s_1=Pod(), c_1=Pod(requests=400))
    assert _made(world.look()).routed_candidate is None
    judged = []
    for i in range(1, 25):
        world.scrape(s_1=Pod(requests=i * 2000), c_1=Pod(requests=400 + i * 500))
        look = _made(world.look())
        if look.routed_candidate is not None and look.routed_stable is not None:
            judged.append((look.routed_stable, look.routed_candidate))
    assert len(judged) == 1
    stable, candidate = judged[0]
    state = sample_ratio.add(sample_ratio.RatioState(), candidate, stable + candidate, 0.2)
    assert not sample_ratio.mismatch(state)
    assert stable + candidate == pytest.approx(1 / (4 * (1 / 20) ** 2 * 0.2 * 0.8), rel=0.1)


def test_a_split_that_is_wrong_is_found_in_its_first_portion(world: World) -> None:
    world.scrape()
    effective = world.now - timedelta(seconds=60)
    world.status = world.status.model_copy(update={"step": StepStatus(
        index=0, entered_at=effective, weight_desired=20, weight_observed=20, weight_effective_since=effective)})
    world.look()
    state = sample_ratio.RatioState()
    for i in range(1, 25):
        world.scrape(s_1=Pod(requests=i * 2000), c_1=Pod(requests=i * 900))
        look = _made(world.look())
        if look.routed_candidate is not None and look.routed_stable is not None:
            state = sample_ratio.add(state, look.routed_candidate, look.routed_stable + look.routed_candidate, 0.2)
    assert sample_ratio.mismatch(state)


# --- queries of one's own -----------------------------------------------------------------------------------------------------

OWN = {"gates": [{"name": "own", "role": "Safety", "prometheus": {
    "bad": 'sum(bad{s="$service"})', "total": 'sum(total{s="$service",n="$namespace"})'}}]}


def _own(world: World, **values: str) -> None:
    for arm in ("stable", "candidate"):
        world.queries[f'sum(bad{{s="{arm}"}})'] = [values[f"{arm}_bad"]]
        world.queries[f'sum(total{{s="{arm}",n="ns"}})'] = [values[f"{arm}_total"]]


def test_running_totals_of_a_query_are_taken_as_differences(world: World) -> None:
    world.spec = OWN
    _own(world, stable_bad="5", stable_total="1000", candidate_bad="1", candidate_total="100")
    world.scrape()
    world.look()
    _own(world, stable_bad="6", stable_total="1900", candidate_bad="4", candidate_total="200")
    world.scrape()
    assert _counts(world.look(), "own") == (Counts(1, 900), Counts(3, 100))


def test_a_window_is_the_time_since_the_last_look(world: World) -> None:
    world.spec = {"gates": [{"name": "own", "role": "Safety", "prometheus": {
        "bad": 'i(bad{s="$service"}[$window])', "total": 'i(t{s="$service"}[$window])'}}]}
    for window in ("60s", "15s"):
        for arm, bad, total in (("stable", "2", "100"), ("candidate", "1", "50")):
            world.queries[f'i(bad{{s="{arm}"}}[{window}])'] = [bad]
            world.queries[f'i(t{{s="{arm}"}}[{window}])'] = [total]
    world.scrape()
    world.look()
    world.scrape()
    assert _counts(world.look(), "own") == (Counts(2, 100), Counts(1, 50))


@pytest.mark.parametrize(("values", "says"), [
    ([], "nothing; write `or vector(0)`"), (["1", "2"], "2 series; sum them"), (["NaN"], "no count"), (["+Inf"], "no count"),
    (["-1"], "no count"),
], ids=["an empty vector", "two series", "NaN", "infinity", "below zero"])
def test_a_query_that_gives_no_count_is_that_gates_error(world: World, values: list[str], says: str) -> None:
    world.spec = OWN
    _own(world, stable_bad="5", stable_total="1000", candidate_bad="1", candidate_total="100")
    world.scrape()
    world.look()
    world.queries['sum(bad{s="candidate"})'] = values
    world.scrape()
    gate = _made(world.look()).gates["own"]
    assert gate.series == ()
    assert says in gate.error


def test_a_running_total_that_fell_is_an_error(world: World) -> None:
    world.spec = OWN
    _own(world, stable_bad="5", stable_total="1000", candidate_bad="1", candidate_total="100")
    world.scrape()
    world.look()
    _own(world, stable_bad="5", stable_total="10", candidate_bad="1", candidate_total="110")
    world.scrape()
    assert "fell from 1000 to 10" in _made(world.look()).gates["own"].error


def test_queries_are_checked_before_they_are_needed() -> None:
    def parse(asked: Asked) -> Answer:
        query = parse_qs(asked.body.decode())["query"][0]
        if "oops" in query:
            return Answer(400, b'{"status":"error","errorType":"bad_data","error":"1:5: parse error: unexpected identifier"}')
        return Answer(200, b'{"status":"success","data":{}}')

    spec = rollout(gates=[{"name": "own", "role": "Safety", "prometheus": {"bad": "sum(oops", "total": 'sum(x{s="$service"})'}}])
    with scripted_api(parse) as api:
        found = query_problems(Prometheus(api.url), spec, "ns")
        assert found == ("gate own: prometheus.bad lacks $service, so it can't tell the arms apart",
                         "gate own: prometheus.bad: 1:5: parse error: unexpected identifier")
    with pytest.raises(PrometheusError, match="can't be asked"):
        query_problems(Prometheus(api.url), spec, "ns")


def test_a_server_without_parse_query_is_asked_by_a_trial() -> None:
    def older(asked: Asked) -> Answer:
        return Answer(404, b"404 page not found") if "parse_query" in asked.path else Answer(400, b'{"error":"unexpected end of input"}')

    with scripted_api(older) as api:
        assert Prometheus(api.url).problem_of("sum(") == "unexpected end of input"
