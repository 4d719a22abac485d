"""The operator on a real cluster while what it needs is gone: Prometheus, pods, its lease, itself."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl
from hafnium_operator import (
    Call,
    Door,
    Load,
    OperatorProcess,
    apply,
    digest,
    faulty_api,
    first_model,
    host,
    model_rollout,
    phase,
    release,
    service,
    status,
    until,
    versions,
    weights,
)

from hafnium_rollout.kubernetes.objects_seen import status_of, written_at

pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("surroundings", "left_behind")]
Start = Callable[..., OperatorProcess]
HELD = [{"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]
"""Nothing but a fault moves it from its first step."""


def effective(kubectl: Kubectl, name: str, index: int) -> bool:
    step = status(kubectl, name).get("step") or {}
    return step.get("index") == index and bool(step.get("weightEffectiveSince"))


# --- the lease ----------------------------------------------------------------------------------------------------------------


def test_a_leader_that_slept_and_leads_again_does_nothing_of_what_it_had_decided_before(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    """It is stopped in the middle of looking at a candidate that has its fifth. Another operator leads, finds the candidate bad, takes it
    back, and goes. Then the first wakes up and has the lease again at once, with its old turn still to be finished."""
    kubectl, name = namespaced, "term"
    operator = start("before")
    first_model(kubectl, name)
    operator.stop()
    held, go, sleepers = threading.Event(), threading.Event(), list[OperatorProcess]()

    def before(call: Call) -> None:
        if call.method != "GET" or "/modelapprovals" not in call.path or go.is_set():
            return
        if not held.is_set() and effective(kubectl, name, 0):
            sleepers[0].signal(signal.SIGSTOP)  # the ModelRollout and the route are read; approvals come last
            held.set()
        if held.is_set():
            go.wait(600)

    with faulty_api(tmp_path) as api:
        api.before = before
        sleepers.append(start("old", kubeconfig=api.kubeconfig, watch=False))
        load(name)
        apply(kubectl, model_rollout(name, 2, bad_every=2))
        until(held.is_set, "the old leader is stopped while it looks")
        new = start("new")
        back = phase(kubectl, name, "RolledBack")
        new.stop()
        until(lambda: not kubectl.read("lease", "hafnium-rollout-operator")["spec"].get("holderIdentity"), "the lease is given up")
        written = len(api.answered)
        sleepers[0].signal(signal.SIGCONT)
        until(lambda: sleepers[0].events().count("Leading") >= 2, "it leads again, in another term")
        go.set()
        line = sleepers[0].wait_for("LeaseLost")
        assert "nothing is written" in line["message"]  # which of the fence's two reasons it is depends on who wakes up first
        writes = [(c.method, c.path) for c, _ in api.answered[written:] if c.writes and "/leases/" not in c.path]
        assert [w for w in writes if "/httproutes/" in w[1]] == []
        assert weights(kubectl, name) == {service(name, 1): 100}
        found = status(kubectl, name)
        assert (found["phase"], found["runId"], found["rejectedDigests"]) == ("RolledBack", back["runId"], [digest(2)])
        sleepers[0].stop()


def test_an_operator_killed_again_and_again_changes_no_outcome(
    namespaced: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    """`kill -9` right after each change that can be seen, whatever it is then about to do. A good one gets through, a bad one goes back."""
    kubectl, name = namespaced, "restless"
    operators = [start("restless-0")]
    first_model(kubectl, name)
    traffic = load(name)
    until(lambda: versions(traffic.counts)["1"] > 20, "the first model answers")

    def through(version: int, end: str, **more: Any) -> dict[str, Any]:
        seen = set[str]()
        apply(kubectl, model_rollout(name, version, **more))

        def moved() -> bool:
            item = kubectl.read("modelrollout", name)
            s = item.get("status", {})
            refs = ",".join(f"{k}={v}" for k, v in sorted(weights(kubectl, name).items()))
            now = f"{s.get('phase')} {s.get('step', {}).get('index')} {bool(s.get('rollback'))} {refs}"
            if now not in seen:
                seen.add(now)
                operators[-1].kill()
                operators.append(start(f"restless-{len(operators)}"))
            return s.get("phase") == end and s.get("observedGeneration") == item["metadata"]["generation"]

        until(moved, f"{end} of version {version}", wait_s=600)
        return status(kubectl, name)

    assert through(2, "Promoted")["stable"]["digest"] == digest(2)
    until(lambda: weights(kubectl, name) == {service(name, 2): 100}, "the good one alone")
    assert through(3, "RolledBack", bad_every=3)["rejectedDigests"] == [digest(3)]
    until(lambda: weights(kubectl, name) == {service(name, 2): 100}, "the stable one alone")
    assert len(operators) > 5
    assert set(versions(traffic.next(200))) == {"2"}


# --- Prometheus ---------------------------------------------------------------------------------------------------------------


def test_without_prometheus_the_candidate_goes_down_step_by_step_and_up_again_only_by_a_persons_word(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], prometheus: Door,
) -> None:
    """Away for two maxBlindDuration, with weight at the second step. What it had gathered before brings nobody up again by itself."""
    kubectl, name = namespaced, "gone"
    operator = start(prometheus_url=prometheus.url)
    first_model(kubectl, name)
    load(name)
    steps = [{"weight": 20, "minDwell": "1s", "minSamples": 150, "deadline": "30m"},
             {"weight": 50, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]
    item = model_rollout(name, 2, steps=steps)
    item["spec"]["strategy"]["maxBlindDuration"] = "15s"
    apply(kubectl, item)
    until(lambda: effective(kubectl, name, 1), "half of the requests")
    prometheus.open.clear()
    until(lambda: weights(kubectl, name).get(service(name, 2)) == 20, "one step down")
    assert "the counters can't be read" in operator.wait_for("BlindStepDown", name)["message"]
    until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "and down to nothing")
    until(lambda: status(kubectl, name)["phase"] == "Paused", "paused")
    prometheus.open.set()
    looks = len(status(kubectl, name)["history"])
    until(lambda: len(status(kubectl, name)["history"]) > looks + 3, "it sees again")
    assert weights(kubectl, name) == {service(name, 1): 100}
    action = {"type": "Retry", "id": "r-1", "candidateDigest": digest(2), "reason": "Prometheus is back"}
    apply(kubectl, {**item, "spec": {**item["spec"], "action": action}})
    until(lambda: weights(kubectl, name).get(service(name, 2)) == 20, "a fifth again, by a person's word")
    kubectl("delete", "modelrollout", name, "--timeout=120s")


# --- pods ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(types: Kubectl) -> Iterator[Kubectl]:
    """A namespace for one test, whose number of pods is the test's."""
    kubectl = replace(types, namespace=f"hafnium-test-{secrets.token_hex(3)}")
    types("create", "namespace", kubectl.namespace)
    try:
        yield kubectl
    finally:
        release(kubectl)
        types("delete", "namespace", kubectl.namespace, "--wait=false")


def pods_at_most(kubectl: Kubectl, number: int) -> None:
    kubectl("apply", "-f", "-", given={
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "pods"}, "spec": {"hard": {"pods": str(number)}}})


def two_stable_pods(item: dict[str, Any]) -> dict[str, Any]:
    item["spec"]["service"]["predictor"]["minReplicas"] = 2
    return item


def test_one_of_two_pods_that_it_needs_is_not_enough_for_more_weight(own: Kubectl, tmp_path: Path) -> None:
    """There is room for one pod of the candidate: enough for a fifth of what two stable ones do, and not for all of it."""
    kubectl, name = own, "room"
    operator = OperatorProcess(tmp_path, kubectl.namespace, "operator")
    traffic: Load | None = None
    try:
        apply(kubectl, two_stable_pods(model_rollout(name, 1)))
        phase(kubectl, name, "Promoted")
        until(lambda: ready(kubectl, service(name, 1)) == 2, "two stable pods")
        pods_at_most(kubectl, 3)
        traffic = Load(host(name, kubectl.namespace))
        apply(kubectl, model_rollout(name, 2))
        until(lambda: (status(kubectl, name).get("step") or {}).get("index") == 1, "the first step is passed")
        line = until(lambda: next((x for x in operator.lines if x["event"] == "Waiting" and "100 %" in x["message"]), None), "it waits")
        assert "1 of 2 predictor pods are ready" in line["message"]
        assert weights(kubectl, name) == {service(name, 1): 80, service(name, 2): 20}
        assert status(kubectl, name)["phase"] == "Progressing"
        kubectl("delete", "resourcequota", "pods")
        assert phase(kubectl, name, "Promoted")["stable"]["digest"] == digest(2)
        until(lambda: kubectl.read("isvc", service(name, 2))["spec"]["predictor"]["minReplicas"] == 1, "what its template says again")
        until(lambda: "templatePods" not in status(kubectl, name).get("cursor", {}), "and that is over")
    finally:
        if traffic is not None:
            traffic.stop()
        operator.stop()


def ready(kubectl: Kubectl, name: str) -> int:
    items = kubectl.read("pods", "-l", f"serving.kserve.io/inferenceservice={name}")["items"]
    return sum(any(c["type"] == "Ready" and c["status"] == "True" for c in i["status"].get("conditions", [])) for i in items)


def test_a_candidate_without_pods_goes_back_within_the_time_for_it_and_the_route_within_seconds_of_the_verdict(
    own: Kubectl, tmp_path: Path,
) -> None:
    """At a fifth its pods go, and none comes up again."""
    kubectl, name = own, "nopods"
    operator = OperatorProcess(tmp_path, kubectl.namespace, "operator")
    traffic: Load | None = None
    try:
        first_model(kubectl, name)
        traffic = Load(host(name, kubectl.namespace))
        item = model_rollout(name, 2, steps=HELD)
        item["spec"]["strategy"]["maxBlindDuration"] = "10s"
        apply(kubectl, item)
        until(lambda: effective(kubectl, name, 0), "the candidate has its fifth")
        pods_at_most(kubectl, 0)
        kubectl("delete", "pod", "-l", f"serving.kserve.io/inferenceservice={service(name, 2)}", "--wait=false")
        operator.wait_for("Rollback", name)
        until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "the stable model alone")
        written = written_at(kubectl.read("httproute", name, "--show-managed-fields"))
        verdict = next(p.time for p in status_of(kubectl.read("modelrollout", name)).history if p.event == "Rollback")
        assert written is not None
        assert (written - verdict).total_seconds() <= 5, "a promise, and not a measurement: the route is the next thing that is written"
        assert set(versions(traffic.next(100))) == {"1"}
        assert status(kubectl, name)["reason"] in ("CandidateUnavailable", "RollingBack", "Blind")
    finally:
        if traffic is not None:
            traffic.stop()
        operator.stop()


# --- candidates that come in between ----------------------------------------------------------------------------------------------


def test_a_new_candidate_at_a_fifth_a_rejected_one_again_and_back_to_stable_on_the_way(
    namespaced: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    kubectl, name = namespaced, "between"
    operator = start()
    first_model(kubectl, name)
    traffic = load(name)
    apply(kubectl, model_rollout(name, 2, steps=HELD))
    until(lambda: effective(kubectl, name, 0), "the second has its fifth")
    apply(kubectl, model_rollout(name, 3, bad_every=2, steps=HELD))
    until(lambda: status(kubectl, name).get("rejectedDigests") == [digest(3)], "the second went back unrejected, and the third was bad")
    phase(kubectl, name, "RolledBack")
    assert "Superseded" in [x.get("reason") for x in operator.lines]

    apply(kubectl, model_rollout(name, 4, steps=HELD))
    until(lambda: effective(kubectl, name, 0), "the fourth has its fifth")
    third = versions(traffic.counts)["3"]
    apply(kubectl, model_rollout(name, 3, bad_every=2, steps=HELD))  # it was rejected: nothing is begun with it
    looks = len(status(kubectl, name)["history"])
    until(lambda: len(status(kubectl, name)["history"]) > looks + 3, "more looks")
    assert weights(kubectl, name) == {service(name, 1): 80, service(name, 4): 20}
    apply(kubectl, model_rollout(name, 1, steps=HELD))
    assert phase(kubectl, name, "Promoted")["stable"]["digest"] == digest(1), "what is stable is what is wanted"
    assert "Reverted" in [x.get("reason") for x in operator.lines]
    until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "the stable one alone")
    assert versions(traffic.counts)["3"] == third, "the rejected one never came back"
