"""The objects that PairedServices writes, and what a cluster must have for that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, rollout
from hypothesis import given
from hypothesis import strategies as st

from hafnium_rollout.kubernetes import paired_services
from hafnium_rollout.kubernetes.capabilities import ability, findings
from hafnium_rollout.kubernetes.kinds import INFERENCE_SERVICE, MODEL_EVIDENCE
from hafnium_rollout.kubernetes.objects_seen import PodSeen, route_seen
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import RouteSeen
from hafnium_rollout.status import ModelSeen

HERE = Path(__file__).parent / "fixtures"
GATEWAY = ("kserve", "kserve-ingress-gateway")
SETTINGS = Settings(prometheus_url="http://prometheus:9090")


def fixture(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def on_cluster(**changes: Any) -> ModelRollout:
    return rollout(**{"routing": {"backend": "PairedServices"}, **changes})


def snapshot(**changes: Any) -> Snapshot:
    base = Snapshot(
        services={}, pods={}, routes={}, gateways={GATEWAY: fixture("gateway_traefik")},
        classes={("", "traefik"): fixture("gatewayclass_traefik")}, evidence={}, approvals={})
    return replace(base, **changes)


# --- routes -------------------------------------------------------------------------------------------------------------------


@given(weight=st.integers(1, 100))
def test_a_route_is_read_back_as_it_was_written(weight: int) -> None:
    item = paired_services.http_route(
        on_cluster(), "ns", GATEWAY, "example.com", [("a-predictor", 100 - weight), ("b-transformer", weight)], None, mark_arms=True)
    assert route_seen(item) == RouteSeen("a", "b", weight, False, "")


def test_a_mirror_is_read_back_as_it_was_written() -> None:
    item = paired_services.http_route(on_cluster(), "ns", GATEWAY, "example.com", [("a-predictor", 100)], "b-predictor", mark_arms=False)
    assert route_seen(item) == RouteSeen("a", "b", 0, True, "")


def test_weights_that_do_not_sum_to_100_are_never_written() -> None:
    with pytest.raises(ValueError, match="don't sum to 100"):
        paired_services.http_route(on_cluster(), "ns", GATEWAY, "d", [("a", 80), ("b", 30)], None, mark_arms=False)


def test_each_arm_is_told_which_it_is_where_the_gateway_can() -> None:
    def headers(mark: bool) -> list[Any]:
        item = paired_services.http_route(on_cluster(), "ns", GATEWAY, "d", [("a", 80), ("b", 20)], None, mark_arms=mark)
        return [r.get("filters") for r in item["spec"]["rules"][0]["backendRefs"]]

    marked = [f[0]["requestHeaderModifier"]["set"][0] for f in headers(True)]
    assert marked == [{"name": "x-hafnium-arm", "value": "stable"}, {"name": "x-hafnium-arm", "value": "candidate"}]
    assert headers(False) == [None, None]


def test_a_rollout_without_hostnames_has_one_of_its_own() -> None:
    assert paired_services.hostnames(on_cluster(), "ns", "example.com") == ["risk-ns.example.com"]
    given_ones = on_cluster(routing={"backend": "PairedServices", "hostnames": ["risk.example.org"]})
    assert paired_services.hostnames(given_ones, "ns", "example.com") == ["risk.example.org"]


def test_requests_go_to_the_transformer_where_there_is_one() -> None:
    spec = on_cluster()
    service = {"spec": {"predictor": {}, "transformer": {}}}
    assert paired_services.backend_name("a", service, None, spec) == "a-transformer"
    assert paired_services.backend_name("a", {"spec": {"predictor": {}}}, None, spec) == "a-predictor"
    route = paired_services.http_route(spec, "ns", GATEWAY, "d", [("a-transformer", 100)], None, mark_arms=False)
    assert paired_services.backend_name("a", None, route, spec) == "a-transformer", "a service that is gone is named as it was"
    assert paired_services.backend_name("b", None, route, spec) == "b-predictor"


def test_the_candidates_service_says_whose_it_is_and_which_model() -> None:
    model = ModelSeen(service="risk-aaaaaaaa", storage_uri="s3://models/2", digest=CANDIDATE, version="2")
    item = paired_services.candidate_service(on_cluster(), "ns", model, {"predictor": {"model": {"modelFormat": {"name": "onnx"}}}})
    assert item["spec"]["predictor"]["model"]["storageUri"] == "s3://models/2"
    assert item["metadata"]["annotations"]["hafnium.dev/model-digest"] == CANDIDATE
    assert item["metadata"]["labels"]["hafnium.dev/rollout"] == "risk"
    assert item["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"


# --- enough pods before the weight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ready", "percent", "wanted"), [
    (1, 5, 1), (10, 5, 1), (10, 25, 3), (10, 100, 10), (4, 25, 1), (4, 26, 2), (0, 100, 1)])
def test_replicas_follow_what_the_stable_pods_carry(ready: int, percent: int, wanted: int) -> None:
    assert paired_services.replicas_wanted(ready, percent) == wanted


def _pods(service: str, **ready: int) -> list[PodSeen]:
    return [PodSeen(f"{service}-{c}-{i}", service, c, True, 0) for c, n in ready.items() for i in range(n)]


def test_the_candidate_gets_pods_before_it_gets_traffic() -> None:
    item = {"spec": {"predictor": {"minReplicas": 1}, "transformer": {}}}
    stable = _pods("s", predictor=4, transformer=8)
    change, waiting = paired_services.capacity_lacking(item, _pods("c", predictor=1, transformer=1), stable, 25)
    assert change == {"transformer": {"minReplicas": 2}}
    assert waiting == "1 of 2 transformer pods are ready"
    assert paired_services.capacity_lacking(item, _pods("c", predictor=1, transformer=2), stable, 25)[1] == ""


def test_what_the_template_allows_at_most_is_kept_to() -> None:
    item = {"spec": {"predictor": {"minReplicas": 1, "maxReplicas": 3}}}
    change, waiting = paired_services.capacity_lacking(item, _pods("c", predictor=3), _pods("s", predictor=10), 100)
    assert change == {"predictor": {"minReplicas": 3}}
    assert waiting == ""


def test_more_replicas_than_needed_are_left_alone() -> None:
    item = {"spec": {"predictor": {"minReplicas": 5}}}
    assert paired_services.capacity_lacking(item, _pods("c", predictor=5), _pods("s", predictor=2), 100) == ({}, "")


# --- capabilities -------------------------------------------------------------------------------------------------------------

NO_SHADOW = {"steps": [{"weight": 5}, {"weight": 100}]}


def _reasons(spec: ModelRollout, seen: Snapshot, settings: Settings = SETTINGS) -> list[tuple[str, bool]]:
    return [(f.reason, f.refuses) for f in findings(spec, "ns", seen, settings)]


def test_a_cluster_that_has_everything_has_no_findings() -> None:
    assert _reasons(on_cluster(strategy=NO_SHADOW), snapshot()) == []


def test_a_gateway_that_says_what_it_can_and_does_not_name_mirroring_does_not_mirror() -> None:
    found = findings(on_cluster(), "ns", snapshot(), SETTINGS)
    assert [f.reason for f in found] == ["MirrorNotSupported"]
    assert "Gateway kserve/kserve-ingress-gateway (traefik.io/gateway-controller) doesn't" in found[0].message


def _class(controller: str, *features: str) -> dict[tuple[str, str], Any]:
    status = {"supportedFeatures": [{"name": f} for f in features]} if features else {}
    return {("", "traefik"): {"spec": {"controllerName": controller}, "status": status}}


@pytest.mark.parametrize(("classes", "reasons"), [
    (_class("gateway.example.com/new", "HTTPRoute", "HTTPRouteRequestMirror"), []),
    (_class("projectcontour.io/gateway-controller"), []),
    (_class("gateway.example.com/new"), ["MirrorUnknown"]),
    ({}, ["MirrorUnknown"]),
], ids=["it says so", "known to", "says nothing", "no class"])
def test_mirroring_is_believed_when_it_is_said_or_known(classes: dict[tuple[str, str], Any], reasons: list[str]) -> None:
    assert [r for r, _ in _reasons(on_cluster(), snapshot(classes=classes))] == reasons


def test_a_controller_that_was_tried_can_be_named() -> None:
    settings = SETTINGS.model_copy(update={"mirroring_controllers": "gateway.example.com/new"})
    assert _reasons(on_cluster(), snapshot(classes=_class("gateway.example.com/new")), settings) == []
    found = ability(snapshot(classes=_class("gateway.example.com/new")), GATEWAY, settings.mirroring)
    assert found is not None
    assert found.mirrors == "yes"


def test_a_gateway_that_is_not_there_is_said_with_its_name() -> None:
    spec = on_cluster(strategy=NO_SHADOW, routing={"backend": "PairedServices", "gatewayRef": {"name": "mine"}})
    found = findings(spec, "ns", snapshot(), SETTINGS)
    assert [f.reason for f in found] == ["GatewayMissing"]
    assert "ns/mine" in found[0].message


def test_kinds_that_are_not_installed_are_said_with_what_to_install() -> None:
    seen = snapshot(services=None, evidence=None, missing=frozenset({INFERENCE_SERVICE.name, MODEL_EVIDENCE.name}))
    found = findings(on_cluster(strategy=NO_SHADOW), "ns", seen, SETTINGS)
    assert [(f.reason, f.refuses) for f in found] == [("KindMissing", True), ("KindMissing", False)]
    assert "install KServe" in found[0].message


def test_what_could_not_be_read_is_not_missing() -> None:
    seen = snapshot(gateways=None, classes=None, errors={"Gateway": "no answer"})
    assert _reasons(on_cluster(strategy=NO_SHADOW), seen) == []


def test_counted_gates_without_prometheus_and_scores_without_a_log_are_refused() -> None:
    spec = on_cluster(gates=[{"name": "e", "role": "Safety", "requests": {}}, {"name": "s", "scores": {}}])
    seen = snapshot(classes=_class("projectcontour.io/gateway-controller"))
    assert [r for r, _ in _reasons(spec, seen, Settings())] == ["NoPrometheus", "NoInferenceLog"]


def test_a_name_that_kserve_makes_routes_for_is_refused() -> None:
    owned = {("ns", "risk"): {"metadata": {"name": "risk", "namespace": "ns", "ownerReferences": [
        {"kind": "InferenceService", "name": "risk", "controller": True}]}}}
    assert [r for r, _ in _reasons(on_cluster(strategy=NO_SHADOW), snapshot(routes=owned))] == ["NameTaken"]
    service = {("ns", "risk"): {"metadata": {"name": "risk", "namespace": "ns"}}}
    assert [r for r, _ in _reasons(on_cluster(strategy=NO_SHADOW), snapshot(services=service))] == ["NameTaken"]
