"""What API objects are read as. The fixtures were taken from a real cluster (KServe 0.20, Gateway API by Traefik)."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes.objects_seen import (
    FOREIGN,
    PodSeen,
    approvals_seen,
    evidence_seen,
    live_route,
    other_manager,
    pod_seen,
    route_seen,
    service_seen,
    status_of,
    written_at,
)
from hafnium_rollout.observation import LiveRoute, RouteSeen
from hafnium_rollout.status import stored

HERE = Path(__file__).parent / "fixtures"
GATEWAY = ("kserve", "kserve-ingress-gateway")


def fixture(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


# --- routes -------------------------------------------------------------------------------------------------------------------


def test_weights_of_a_route_and_who_wrote_them() -> None:
    item = fixture("httproute_weights")
    seen = route_seen(item)
    item["metadata"]["generation"] += 1
    assert route_seen(item).revision not in ("", seen.revision)
    assert (seen.stable, seen.candidate, seen.weight, seen.shadow) == ("risk-aaaaaaaa", "risk-bbbbbbbb", 20, False)
    assert seen.manager == "kubectl-client-side-apply (Update, 20:57:42 UTC)"


def test_a_mirror_is_a_shadow_and_no_weight() -> None:
    seen = route_seen(fixture("httproute_mirror"))
    assert (seen.stable, seen.candidate, seen.weight, seen.shadow) == ("risk-aaaaaaaa", "risk-bbbbbbbb", 0, True)


def test_the_order_says_who_is_stable_even_when_it_gets_nothing() -> None:
    route = fixture("httproute_weights")
    refs = route["spec"]["rules"][0]["backendRefs"]
    refs[0]["weight"], refs[1]["weight"] = 0, 100
    seen = route_seen(route)
    assert (seen.stable, seen.candidate, seen.weight) == ("risk-aaaaaaaa", "risk-bbbbbbbb", 100)


def test_a_weight_that_is_not_written_is_one() -> None:
    route = fixture("httproute_weights")
    for ref in route["spec"]["rules"][0]["backendRefs"]:
        del ref["weight"]
    assert route_seen(route).weight == 50


def _foreign(change: str) -> dict[str, Any]:
    route = fixture("httproute_weights")
    rule = route["spec"]["rules"][0]
    if change == "a rule more":
        route["spec"]["rules"].append(copy.deepcopy(rule))
    elif change == "no rule":
        route["spec"]["rules"] = []
    elif change == "a third backend":
        rule["backendRefs"].append({"name": "other", "weight": 1})
    elif change == "only one path":
        rule["matches"] = [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    elif change == "only one header":
        rule["matches"] = [{"headers": [{"name": "a", "value": "b"}]}]
    elif change == "a redirect":
        rule["filters"] = [{"type": "RequestRedirect"}]
    elif change == "no weight at all":
        for ref in rule["backendRefs"]:
            ref["weight"] = 0
    elif change == "weights and a mirror":
        rule["filters"] = [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "risk-bbbbbbbb-predictor"}}}]
    return route


@pytest.mark.parametrize("change", [
    "a rule more", "no rule", "a third backend", "only one path", "only one header", "a redirect", "no weight at all",
    "weights and a mirror"])
def test_a_route_of_another_form_equals_none_that_could_be_wanted(change: str) -> None:
    assert route_seen(_foreign(change)).stable == FOREIGN


def test_a_route_in_which_nobody_has_a_weight_names_whose_it_could_be() -> None:
    assert set(route_seen(_foreign("no weight at all")).weightless) == {"risk-aaaaaaaa", "risk-bbbbbbbb"}
    assert route_seen(_foreign("only one path")).weightless == ()
    alone = _foreign("no weight at all")
    del alone["spec"]["rules"][0]["backendRefs"][1]
    assert (route_seen(alone).stable, route_seen(alone).weightless) == (FOREIGN, ("risk-aaaaaaaa",))


def test_a_route_of_another_form_still_says_which_services_it_names() -> None:
    both = route_seen(_foreign("only one path")).others
    assert len(both) == 2
    assert set(route_seen(_foreign("a third backend")).others) == {*both, "other"}
    assert route_seen(_foreign("no rule")).others == route_seen(_foreign("no weight at all")).others == ()
    mirrored = _foreign("weights and a mirror")
    mirrored["spec"]["rules"][0]["backendRefs"] = []
    assert route_seen(mirrored).others == ("risk-bbbbbbbb",)


def test_our_own_writes_name_nobody() -> None:
    route = fixture("httproute_weights")
    route["metadata"]["managedFields"][0]["manager"] = "hafnium-rollout"
    assert other_manager(route) == ""


def test_when_we_wrote_a_route_last_is_told_by_its_managed_fields() -> None:
    route = fixture("httproute_weights")
    assert written_at(route) is None
    assert written_at(route, "kubectl-client-side-apply") == datetime(2026, 11, 21, 20, 57, 42, tzinfo=UTC)


def test_the_gateway_does_what_it_took_up() -> None:
    live, problem = live_route(fixture("httproute_weights"), GATEWAY)
    assert live == LiveRoute({"risk-aaaaaaaa": 80, "risk-bbbbbbbb": 20})
    assert problem == ""


def test_a_status_about_an_older_generation_says_nothing() -> None:
    route = fixture("httproute_weights")
    route["metadata"]["generation"] = 2
    live, problem = live_route(route, GATEWAY)
    assert live is None
    assert "has not taken up the last change" in problem


def test_another_gateways_status_says_nothing() -> None:
    live, problem = live_route(fixture("httproute_weights"), ("kserve", "envoy"))
    assert live is None
    assert "kserve/envoy has not taken up" in problem


def test_a_route_whose_backend_is_not_there_does_nothing() -> None:
    live, problem = live_route(fixture("httproute_unresolved"), GATEWAY)
    assert live == LiveRoute({})
    assert "BackendNotFound" in problem


def test_a_route_that_nobody_took_up_is_not_live() -> None:
    route = fixture("httproute_weights")
    del route["status"]
    assert live_route(route, GATEWAY)[0] is None


# --- services and pods --------------------------------------------------------------------------------------------------------


def test_a_ready_service_with_its_pod() -> None:
    seen = service_seen(fixture("inferenceservice_ready"), [pod_seen(fixture("pod_ready"))])
    assert (seen.ready, seen.restarts, seen.message) == (True, 0, "")


def test_ready_is_not_believed_without_a_ready_pod_of_each_component() -> None:
    """KServe's Ready is the old one for a moment after a change."""
    service = fixture("inferenceservice_ready")
    assert not service_seen(service, []).ready
    assert "no ready pod of predictor" in service_seen(service, []).message
    service["spec"]["transformer"] = {"containers": [{}]}
    seen = service_seen(service, [pod_seen(fixture("pod_ready"))])
    assert not seen.ready
    assert "no ready pod of transformer" in seen.message


def test_a_crashing_service_says_why_and_how_often() -> None:
    pod = pod_seen(fixture("pod_crashing"))
    seen = service_seen(fixture("inferenceservice_crashing"), [pod])
    assert not seen.ready
    assert seen.restarts >= 1
    assert "CrashLoopBackOff" in seen.message
    assert "Deployment does not have minimum availability" in service_seen(fixture("inferenceservice_crashing"), []).message


def _restarts(*containers: tuple[str, int], init: int = 0) -> int:
    pod = fixture("pod_ready")
    pod["status"]["containerStatuses"] = [{"name": n, "restartCount": c} for n, c in containers]
    pod["status"]["initContainerStatuses"] = [{"name": "storage-initializer", "restartCount": init}]
    return pod_seen(pod).restarts


def test_only_the_models_own_container_counts_as_restarted() -> None:
    assert _restarts(("kserve-container", 1), ("queue-proxy", 40), ("istio-proxy", 9), init=7) == 1
    assert _restarts(("kserve-container", 1), ("transformer-container", 3), ("istio-proxy", 9)) == 3, "both parts in one pod"
    assert _restarts(("something", 1), ("else", 4), init=7) == 4


def test_a_services_restarts_are_those_of_its_worst_pod() -> None:
    pods = [replace(pod_seen(fixture("pod_ready")), name=f"p{i}", restarts=i) for i in range(4)]
    seen = service_seen(fixture("inferenceservice_ready"), pods)
    assert (seen.restarts, dict(seen.pod_restarts)) == (3, {"p1": 1, "p2": 2, "p3": 3})


def _unschedulable() -> dict[str, Any]:
    pod = fixture("pod_ready")
    pod["status"] = {"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient cpu."}]}
    return pod


def test_a_service_without_room_says_what_the_scheduler_says() -> None:
    pods = [pod_seen(_unschedulable())]
    assert service_seen(fixture("inferenceservice_crashing"), pods).no_room == "0/1 nodes are available: 1 Insufficient cpu."
    one = replace(pod_seen(fixture("pod_ready")), name="another")
    assert service_seen(fixture("inferenceservice_crashing"), [one, *pods]).no_room, "one of two has room"
    assert service_seen(fixture("inferenceservice_ready"), [one, *pods]).no_room == "", "it is ready with one"


def test_a_pod_of_a_lost_node_vetoes_no_want_of_room() -> None:
    """It stays Terminating, or Failed, for as long as its node is away; the one that stands for it is what has no room."""
    gone = replace(pod_seen(_unschedulable()), name="gone", no_room="", over=True)
    assert service_seen(fixture("inferenceservice_crashing"), [gone, pod_seen(_unschedulable())]).no_room
    failed = _unschedulable()
    failed["status"] = {"phase": "Failed", "reason": "NodeShutdown"}
    assert pod_seen(failed).over
    assert service_seen(fixture("inferenceservice_crashing"), [gone]).no_room == "", "nobody waits for room"


def test_a_crash_beside_want_of_room_is_a_crash() -> None:
    crashing = replace(pod_seen(fixture("pod_crashing")), name="another")
    assert service_seen(fixture("inferenceservice_crashing"), [crashing, pod_seen(_unschedulable())]).no_room == ""
    assert service_seen(fixture("inferenceservice_crashing"), []).no_room == "", "no pod at all is not known to be want of room"


def test_a_pod_that_its_node_sent_away_for_want_of_room_has_none() -> None:
    pod = fixture("pod_ready")
    pod["status"] = {"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"}
    assert pod_seen(pod).no_room == "OutOfcpu: Node didn't have enough resource: cpu"
    pod["status"]["reason"] = "Evicted"
    assert pod_seen(pod).no_room == "", "an evicted pod may have taken more than it asked for"


def test_a_pod_that_is_being_deleted_is_not_ready() -> None:
    pod = fixture("pod_ready")
    pod["metadata"]["deletionTimestamp"] = "2026-11-21T21:00:00Z"
    assert not pod_seen(pod).ready


@pytest.mark.parametrize("item", [{}, {"metadata": None}, {"metadata": {}, "status": {"conditions": "none"}}, {"spec": []}])
def test_objects_of_no_known_form_are_never_ready(item: dict[str, Any]) -> None:
    assert not service_seen(item, [PodSeen("p", "s", "predictor", True, 0)]).ready
    assert route_seen(item) == RouteSeen(FOREIGN, None, 0, False, "")
    assert live_route(item, GATEWAY)[0] is None


# --- status, evidence, approvals ----------------------------------------------------------------------------------------------


def test_a_status_comes_back_from_the_api_server_as_it_was_written() -> None:
    item = fixture("modelrollout_rolledback")
    status = status_of(item)
    assert status.phase == "RolledBack"
    assert status.rejected_digests == ("sha256:" + "c" * 64,)
    again = status_of({"status": json.loads(json.dumps(stored(status)))})
    assert again == status


def test_a_status_that_cannot_be_read_moves_nothing() -> None:
    item = fixture("modelrollout_rolledback")
    item["status"]["phase"] = "Sideways"
    with pytest.raises(StateError, match=r"op-try2/live: status\.phase: .*nothing is moved"):
        status_of(item)


def test_evidence_that_cannot_be_read_is_said_and_the_rest_counts() -> None:
    good = {"apiVersion": "hafnium.dev/v1alpha1", "metadata": {"name": "drift-1", "namespace": "n"}, "spec": {
        "modelDigest": "sha256:" + "a" * 64, "kind": "drift", "windowStart": "2026-03-01T11:00:00Z", "windowEnd": "2026-03-01T12:00:00Z",
        "verdict": "Pass", "samples": 1000, "message": "no drift", "createdAt": "2026-03-01T12:00:01Z"}}
    bad = {"metadata": {"name": "bad", "namespace": "n", "creationTimestamp": "2026-03-01T12:00:02Z"}, "spec": {"verdict": "Perhaps"}}
    newer = {**bad, "spec": {**good["spec"], "verdict": "Perhaps"}}
    found, unread = evidence_seen([bad, good, newer])
    assert [e.verdict for e in found] == ["Pass"]
    assert all("ModelEvidence n/bad" in u.error and "delete it" in u.error for u in unread)
    when = datetime(2026, 3, 1, 12, 0, 2, tzinfo=UTC)
    assert [(u.model_digest, u.kind, u.created_at) for u in unread] == [(None, None, when), ("sha256:" + "a" * 64, "drift", when)]


def test_an_approval_that_is_being_deleted_approves_nothing() -> None:
    spec = {"modelDigest": "sha256:" + "a" * 64, "stage": "validation", "approver": "ann"}
    there = {"metadata": {"name": "x"}, "spec": spec}
    going = {"metadata": {"name": "y", "deletionTimestamp": "2026-03-01T12:00:00Z"}, "spec": spec}
    assert [a.stage for a in approvals_seen([there, going, {"metadata": {"name": "z"}, "spec": {}}])] == ["validation"]
