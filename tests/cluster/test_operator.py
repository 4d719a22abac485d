"""The operator against a real cluster: real pods, a real gateway that splits real requests, a real Prometheus that counts them."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl, kustomized, renamed, without_pods
from hafnium_operator import (
    MIRRORING_GATEWAY,
    Call,
    Door,
    Load,
    OperatorProcess,
    apply,
    digest,
    faulty_api,
    first_model,
    model_rollout,
    phase,
    service,
    status,
    until,
    versions,
    weights,
)

pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("surroundings", "left_behind")]
Start = Callable[..., OperatorProcess]


# --- the whole way ------------------------------------------------------------------------------------------------------------


def test_a_good_candidate_climbs_and_is_promoted_and_a_bad_one_goes_back(
    namespaced: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    kubectl, name = namespaced, "whole"
    operator = start()
    first_model(kubectl, name)
    assert kubectl.read("modelrollout", name)["metadata"].get("finalizers", []) == [], "at rest it can be deleted by anyone"
    traffic = load(name)
    until(lambda: versions(traffic.counts)["1"] > 20, "the first model answers at the gateway")

    apply(kubectl, model_rollout(name, 2))
    until(lambda: weights(kubectl, name).get(service(name, 2)) == 20, "a fifth for the candidate")
    met = versions(traffic.next(1000))
    assert 150 <= met["2"] <= 250, "Traefik's weights are exact"
    promoted = phase(kubectl, name, "Promoted")
    assert promoted["stable"]["digest"] == digest(2)
    until(lambda: weights(kubectl, name) == {service(name, 2): 100}, "the candidate alone")
    until(lambda: kubectl.run("get", "inferenceservice", service(name, 1)).returncode != 0, "the old service is gone")
    assert set(versions(traffic.next(200))) == {"2"}

    apply(kubectl, model_rollout(name, 3, bad_every=3))
    back = phase(kubectl, name, "RolledBack")
    assert back["rejectedDigests"] == [digest(3)]
    assert back["reason"] == "GateFailed"
    assert weights(kubectl, name) == {service(name, 2): 100}
    assert set(versions(traffic.next(200))) == {"2"}
    assert {s for (s, v) in traffic.counts if v in ("1", "2")} == {200}, "callers of the good models met no error"
    conditions = {c["type"]: c for c in back["conditions"]}
    assert conditions["RolledBack"]["status"] == "True"
    assert all(c["observedGeneration"] == 3 for c in conditions.values())

    told = [e for e in operator.events(name) if e in ("Started", "StepEntered", "Advanced", "Promoted", "Rollback", "RolledBack")]
    assert told == ["Started", "Promoted", "Started", "StepEntered", "Advanced", "StepEntered", "Promoted",
                    "Started", "StepEntered", "Rollback", "RolledBack"], "the log tells the story in order"
    reasons = {e["reason"]: e["type"] for e in kubectl.read(
        "events", "--field-selector", f"involvedObject.kind=ModelRollout,involvedObject.name={name}")["items"]}
    assert reasons["Rollback"] == "Warning"
    assert {"Started", "StepEntered", "Promoted", "RolledBack"} <= set(reasons)
    text = operator.get("/metrics")[1]
    assert f'modelrollout_phase{{namespace="{kubectl.namespace}",phase="RolledBack",rollout="{name}"}} 1.0' in text
    assert f'modelrollout_rollback_latency_seconds_count{{namespace="{kubectl.namespace}",rollout="{name}"}} 1.0' in text
    assert "modelrollout_leader 1.0" in text
    assert operator.get("/health/ready") == (200, "ok\n")
    assert operator.get("/health/live") == (200, "ok\n")

    # At rest nothing is written: the object stays as it is.
    version = kubectl.read("modelrollout", name)["metadata"]["resourceVersion"]
    traffic.next(600)
    assert kubectl.read("modelrollout", name)["metadata"]["resourceVersion"] == version


def test_silence_promotes_nobody(namespaced: Kubectl, start: Start) -> None:
    """No request at all: the candidate gets its share of nothing, and stays at its first step."""
    kubectl, name = namespaced, "silence"
    start()
    first_model(kubectl, name)
    apply(kubectl, model_rollout(name, 2))
    until(lambda: weights(kubectl, name).get(service(name, 2)) == 20, "a fifth for the candidate")
    until(lambda: (status(kubectl, name).get("step") or {}).get("weightEffectiveSince"), "the weight is effective")
    looks = len([p for p in status(kubectl, name)["history"] if p["event"] == "Look"])
    until(lambda: len([p for p in status(kubectl, name)["history"] if p["event"] == "Look"]) >= looks + 4, "four more looks")
    s = status(kubectl, name)
    assert s["step"]["index"] == 0
    assert s["gates"][0]["verdict"] in ("NoData", "Inconclusive")
    kubectl("delete", "modelrollout", name)


# --- leaders ------------------------------------------------------------------------------------------------------------------


def test_a_leader_killed_between_status_and_weight_at_each_step_changes_no_outcome(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    """At each write of the route the leader is killed before the write gets through. The next one finds the intent in the status."""
    kubectl, name = namespaced, "killed"
    operators = [start("first")]
    first_model(kubectl, name)
    operators[0].stop()
    kills: list[str] = []

    def before(call: Call) -> tuple[int, dict[str, str]] | None:
        if call.method != "PATCH" or f"/httproutes/{name}" not in call.path:
            return None
        wanted = ",".join(str(r["weight"]) for r in json.loads(call.body)["spec"]["rules"][0]["backendRefs"])
        if wanted in kills:
            return None
        kills.append(wanted)
        operators[-1].kill()
        return 503, {}

    with faulty_api(tmp_path) as api:
        api.before = before
        operators.append(start("killed-0", kubeconfig=api.kubeconfig, watch=False))
        load(name)
        apply(kubectl, model_rollout(name, 2))
        one, two = service(name, 1), service(name, 2)
        for number, (intent, there) in enumerate((
            (20, {one: 100}), (100, {one: 80, two: 20}), (0, {one: 0, two: 100}),
        ), start=1):
            until(lambda n=number: len(kills) >= n and not operators[-1].running, f"kill {number}")
            said = status(kubectl, name)["route"]
            assert (said.get("weight", 0), weights(kubectl, name)) == (intent, there), "intent in the status, nothing done yet"
            operators.append(start(f"killed-{number}", kubeconfig=api.kubeconfig, watch=False))
        phase(kubectl, name, "Promoted")
        until(lambda: weights(kubectl, name) == {two: 100}, "the candidate alone")
        operators[-1].stop()
    assert kills == ["80,20", "0,100", "100"]


def test_an_old_leader_that_wakes_up_writes_nothing(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    """Its write of the weight is on its way when it is stopped. The new leader writes the same weight; the late write is a Conflict."""
    kubectl, name = namespaced, "sleeper"
    operator = start("before")
    first_model(kubectl, name)
    operator.stop()
    held, go, sleepers = threading.Event(), threading.Event(), list[OperatorProcess]()

    def before(call: Call) -> None:
        if call.method == "PATCH" and f"/httproutes/{name}" in call.path and not held.is_set():
            sleepers[0].signal(signal.SIGSTOP)  # after its check of the lease, before the API server has its write
            held.set()
            go.wait(300)

    with faulty_api(tmp_path) as api:
        api.before = before
        sleepers.append(start("old", kubeconfig=api.kubeconfig, watch=False))
        load(name)
        apply(kubectl, model_rollout(name, 2, bad_every=2))
        until(held.is_set, "the old leader's write is on its way")
        new = start("new")
        back = phase(kubectl, name, "RolledBack")  # the new leader has moved to 20 % and, since the model is bad, back
        assert weights(kubectl, name) == {service(name, 1): 100}
        go.set()
        late = until(lambda: [s for c, s in api.answered if c.method == "PATCH" and f"/httproutes/{name}" in c.path], "the late write")
        assert late == [409], "the API server refuses what was decided on an older route"
        sleepers[0].signal(signal.SIGCONT)
        until(lambda: {"NotLeading", "LeaseLost"} & set(sleepers[0].events()), "the old leader knows that it leads no more")
        writes = len([1 for c, _ in api.answered if c.writes])
        api_calls = len(api.answered)
        until(lambda: len(api.answered) > api_calls + 5, "it goes on asking for the lease")
        since = [c for c, _ in api.answered if c.writes][writes:]
        assert [c.path for c in since if "/leases/" not in c.path] == [], "and it writes nothing"
        assert new.running
        assert status(kubectl, name)["runId"] == back["runId"]
        assert weights(kubectl, name) == {service(name, 1): 100}
        sleepers[0].stop()


# --- strangers ----------------------------------------------------------------------------------------------------------------


def test_a_replace_that_strips_our_fields_never_gives_the_bad_model_everything(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    """GitOps replaces the route by what its repository says: at 20 % with the stable model alone, after that with the candidate alone."""
    kubectl, name = namespaced, "replaced"
    operator = start()
    first_model(kubectl, name)
    committed = kubectl.read("httproute", name)
    for key in ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp", "labels"):
        committed["metadata"].pop(key, None)
    committed.pop("status", None)
    traffic = load(name)
    apply(kubectl, model_rollout(name, 2))
    until(lambda: (status(kubectl, name).get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
    kubectl("replace", "-f", "-", given=committed)
    back = phase(kubectl, name, "RolledBack")
    assert back["reason"] == "AbortedOutside", "somebody took the candidate's weight: that is a person's word"
    assert "kubectl-replace" in back["message"]
    assert back["rejectedDigests"] == [digest(2)]

    until(lambda: kubectl.run("get", "inferenceservice", service(name, 2)).returncode != 0, "the rejected one's service is gone")
    bad = json.loads(json.dumps(committed))
    bad["spec"]["rules"][0]["backendRefs"][0]["name"] = f"{service(name, 2)}-predictor"
    kubectl("replace", "-f", "-", given=bad)
    operator.wait_for("ExternalChange", name)
    until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "the stable model is put back")
    text = next(x["message"] for x in operator.lines if x["event"] == "ExternalChange")
    assert "kubectl-replace" in text
    assert "modelrollout_external_change_total" in operator.get("/metrics")[1]
    until(lambda: set(versions(traffic.next(100))) == {"1"}, "and it answers all")


def test_a_stranger_who_moves_the_weight_is_named_and_put_back(namespaced: Kubectl, start: Start, load: Callable[..., Load]) -> None:
    kubectl, name = namespaced, "moved"
    operator = start()
    first_model(kubectl, name)
    load(name)
    apply(kubectl, model_rollout(name, 2, steps=[
        {"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]))
    until(lambda: (status(kubectl, name).get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
    kubectl("patch", "httproute", name, "--type=json", "--field-manager=somebody", "-p", json.dumps([
        {"op": "replace", "path": "/spec/rules/0/backendRefs/0/weight", "value": 10},
        {"op": "replace", "path": "/spec/rules/0/backendRefs/1/weight", "value": 90}]))
    line = operator.wait_for("ExternalChange", name)
    assert "somebody" in line["message"]
    until(lambda: weights(kubectl, name) == {service(name, 1): 80, service(name, 2): 20}, "put back")


def test_a_modelrollout_that_gets_a_name_and_is_deleted_under_way_leaves_the_stable_service_answering(
    namespaced: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    kubectl, name = namespaced, "deleted"
    operator = start()
    first_model(kubectl, name)
    traffic = load(name)
    until(lambda: set(versions(traffic.next(20))) == {"1"}, "the gateway does what the new route says")
    before = traffic.counts
    apply(kubectl, model_rollout(name, 2, steps=[
        {"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]))
    until(lambda: versions(traffic.next(50))["2"] > 0, "the candidate answers")
    names = [*kubectl.read("httproute", name)["spec"]["hostnames"], "also.example.com"]
    kubectl("patch", "modelrollout", name, "--type", "merge", "-p", json.dumps({"spec": {"routing": {"hostnames": names}}}))
    until(lambda: kubectl.read("httproute", name)["spec"]["hostnames"] == names, "the route has the new name, too")
    assert weights(kubectl, name) == {service(name, 1): 80, service(name, 2): 20}, "a name is no reason to move traffic"
    kubectl("delete", "modelrollout", name, "--timeout=120s")
    operator.wait_for("Deleted", name)
    assert weights(kubectl, name) == {service(name, 1): 100}
    until(lambda: kubectl.run("get", "inferenceservice", service(name, 2)).returncode != 0, "the candidate's service is gone")
    assert set(versions(traffic.next(200))) == {"1"}
    assert {s for s, _ in traffic.counts - before} == {200}, "nobody met an error"


# --- faults -------------------------------------------------------------------------------------------------------------------


def test_a_rollback_gets_through_an_api_server_that_answers_409_429_and_500(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    kubectl, name = namespaced, "faults"
    operator = start("before")
    first_model(kubectl, name)
    operator.stop()
    # Drawn, not counted: a turn always makes the same number of calls, and a fault at each third would meet the same write for ever
    draws = random.Random(6)
    given: list[int] = []

    def before(call: Call) -> tuple[int, dict[str, str]] | None:
        if "/leases/" in call.path:
            return None
        drawn = draws.random()
        fault = (500, {}) if drawn < 1 / 6 else (429, {"Retry-After": "1"}) if drawn < 2 / 6 else None
        if fault is None and call.writes and draws.random() < 1 / 3:
            fault = (409, {})
        if fault is not None:
            given.append(fault[0])
        return fault

    with faulty_api(tmp_path) as api:
        api.before = before
        operator = start("through", kubeconfig=api.kubeconfig, watch=False)
        load(name)
        apply(kubectl, model_rollout(name, 2, bad_every=2))
        back = phase(kubectl, name, "RolledBack")
        assert back["rejectedDigests"] == [digest(2)]
        assert weights(kubectl, name) == {service(name, 1): 100}
        operator.stop()
    assert {409, 429, 500} <= set(given)


def test_an_operator_that_cannot_ask_prometheus_moves_nothing_up(namespaced: Kubectl, start: Start, load: Callable[..., Load]) -> None:
    kubectl, name = namespaced, "blind"
    operator = start(prometheus_url="http://127.0.0.1:1")
    first_model(kubectl, name)
    load(name)
    apply(kubectl, model_rollout(name, 2))
    until(lambda: status(kubectl, name)["reason"] == "ModelUnknown", "it isn't known which model the candidate's pods serve")
    assert "can't be asked" in status(kubectl, name)["message"]
    assert weights(kubectl, name) == {service(name, 1): 100}
    assert status(kubectl, name)["phase"] == "Pending"
    assert "StepEntered" not in operator.events(name)


def test_a_rollback_that_nobody_can_count_ends_when_the_candidates_pods_are_gone(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], prometheus: Door,
) -> None:
    """Prometheus goes for good. The rollback isn't called done for that; the candidate's service goes, and then it is."""
    kubectl, name = namespaced, "uncounted"
    operator = start(prometheus_url=prometheus.url)
    first_model(kubectl, name)
    load(name)
    item = model_rollout(name, 2)
    item["spec"]["strategy"]["maxBlindDuration"] = "15s"
    apply(kubectl, item)
    until(lambda: (status(kubectl, name).get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
    prometheus.open.clear()
    item["spec"]["action"] = {"type": "Abort", "id": "1", "candidateDigest": digest(2)}
    apply(kubectl, item)
    operator.wait_for("Rollback", name)
    until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "the route is back at once")
    line = operator.wait_for("RollbackUnconfirmed", name)
    assert (line["reason"], line["alert"]) == ("NotCounted", True)
    assert "can't be asked" in line["message"]
    back = phase(kubectl, name, "RolledBack")
    assert "service and pods are gone" in back["message"]
    assert back["rejectedDigests"] == [digest(2)]
    assert kubectl.run("get", "inferenceservice", service(name, 2)).returncode != 0
    told = [e for e in operator.events(name) if e in ("Rollback", "RollbackUnconfirmed", "RolledBack")]
    assert told == ["Rollback", "RollbackUnconfirmed", "RolledBack"]
    apply(kubectl, model_rollout(name, 3))
    until(lambda: (status(kubectl, name).get("candidate") or {}).get("digest") == digest(3), "the next model begins")


def test_the_rights_of_its_own_role_are_enough(
    namespaced: Kubectl, start: Start, load: Callable[..., Load], tmp_path: Path,
) -> None:
    """With the service account of kustomize/base/rollouts: a first model, a candidate under way, a deletion. Nothing is forbidden."""
    kubectl, name = namespaced, "rights"
    documents = renamed(without_pods(kustomized("kustomize/base/rollouts")), kubectl.namespace)
    kubectl("apply", "--server-side", "-f", "-", given=documents)
    try:
        token = kubectl("create", "token", "hafnium-rollout-operator").strip()
        admin = json.loads(kubectl("config", "view", "--minify", "--raw", "--flatten", "-o", "json"))
        admin["users"] = [{"name": admin["users"][0]["name"], "user": {"token": token}}]
        kubeconfig = tmp_path / "account.kubeconfig"
        kubeconfig.write_text(json.dumps(admin), encoding="utf-8")
        operator = start(kubeconfig=kubeconfig, lease_name="hafnium-rollout-operator")
        first_model(kubectl, name)
        load(name)
        apply(kubectl, model_rollout(name, 2, steps=[
            {"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]))
        until(lambda: (status(kubectl, name).get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
        kubectl("delete", "modelrollout", name, "--timeout=120s")
        assert weights(kubectl, name) == {service(name, 1): 100}
        assert [x for x in operator.lines if "(403)" in x.get("message", "")] == []
        assert kubectl.read("events", "--field-selector", f"involvedObject.name={name}")["items"], "its events are there"
    finally:
        cluster_wide = [d for d in documents if d["kind"].startswith(("Cluster", "Validating"))]
        kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", given=cluster_wide)


# --- what the cluster can do ----------------------------------------------------------------------------------------------------

SHADOW: list[dict[str, Any]] = [
    {"shadow": True, "minSamples": 100, "deadline": "20m"}, {"weight": 100, "minDwell": "1s", "deadline": "20m"}]


def test_a_shadow_step_is_refused_where_the_gateway_does_not_mirror(namespaced: Kubectl, start: Start) -> None:
    """Traefik would accept the mirror and answer 500 to everybody."""
    kubectl, name = namespaced, "traefik"
    start()
    apply(kubectl, model_rollout(name, 1, steps=SHADOW))

    def refused() -> dict[str, Any] | None:
        return next((c for c in status(kubectl, name).get("conditions", []) if c["type"] == "Accepted" and c["status"] == "False"), None)

    found = until(refused, "the condition")
    assert found["reason"] == "MirrorNotSupported"
    assert "kserve/kserve-ingress-gateway (traefik.io/gateway-controller) doesn't" in found["message"]
    assert kubectl.run("get", "httproute", name).returncode != 0, "nothing was begun"
    assert kubectl.run("get", "inferenceservice", service(name, 1)).returncode != 0


def test_a_shadow_gets_copies_and_changes_no_answer(namespaced: Kubectl, start: Start, load: Callable[..., Load]) -> None:
    kubectl, name = namespaced, "mirrored"
    operator = start()
    first_model(kubectl, name, gateway="envoy")
    traffic = load(name, MIRRORING_GATEWAY)
    until(lambda: (200, "1") in traffic.counts, "the first model answers at Envoy")
    apply(kubectl, model_rollout(name, 2, bad_every=2, steps=SHADOW, gateway="envoy"))
    back = phase(kubectl, name, "RolledBack")
    assert back["reason"] == "GateFailed", "its errors are seen"
    assert set(versions(traffic.counts)) <= {"1", ""}, "by nobody but the operator"
    copies = [x["message"] for x in operator.lines if x["event"] == "Action" and "copies to" in x["message"]]
    assert copies


def test_a_query_that_cannot_be_parsed_is_refused_before_anything_moves(namespaced: Kubectl, start: Start) -> None:
    kubectl, name = namespaced, "query"
    start()
    bad = {"name": "own", "role": "Safety", "prometheus": {"bad": 'sum(x{s="$service"}', "total": 'sum(x{s="$service"})'}}
    apply(kubectl, model_rollout(name, 1, gates=[bad]))

    def refused() -> dict[str, Any] | None:
        return next((c for c in status(kubectl, name).get("conditions", []) if c["type"] == "Accepted" and c["status"] == "False"), None)

    found = until(refused, "the condition")
    assert found["reason"] == "QueryInvalid"
    assert "gate own: prometheus.bad" in found["message"]
    assert "parse error" in found["message"]
