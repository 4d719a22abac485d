"""The objects that PairedServices writes, and what a cluster must have for that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, World, rollout
from hypothesis import given
from hypothesis import strategies as st

from hafnium_rollout.kubernetes import paired_services
from hafnium_rollout.kubernetes.capabilities import ability, findings
from hafnium_rollout.kubernetes.kinds import INFERENCE_SERVICE, MODEL_EVIDENCE
from hafnium_rollout.kubernetes.objects_seen import PodSeen, live_route, route_seen
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import RouteSeen
from hafnium_rollout.status import ModelSeen, RolloutStatus

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


@pytest.mark.parametrize(("weights", "seen"), [((996, 4), 1), ((4, 996), 99), ((1000, 0), 0), ((0, 7), 100), ((1, 1), 50)])
def test_a_share_is_neither_none_nor_all_because_it_is_small(weights: tuple[int, int], seen: int) -> None:
    """A stranger may write weights of a thousand: four of them are live requests."""
    refs = [{"name": f"{n}-predictor", "weight": w} for n, w in zip("ab", weights, strict=True)]
    assert route_seen({"spec": {"rules": [{"backendRefs": refs}]}}).weight == seen


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


def test_a_template_may_name_the_service_that_it_becomes() -> None:
    query = {"query": 'x{pod=~"${HAFNIUM_SERVICE}-t.*"} $$(A)'}
    template = {"predictor": {"model": {}}, "transformer": {"autoScaling": {"metrics": [query]}}}
    model = ModelSeen(service="risk-aaaaaaaa", storage_uri="s3://b/1", digest="sha256:" + "a" * 64, version="1")
    made = paired_services.candidate_service(on_cluster(), "ns", model, template)
    assert made["spec"]["transformer"]["autoScaling"]["metrics"] == [{"query": 'x{pod=~"risk-aaaaaaaa-t.*"} $$(A)'}]
    assert "${HAFNIUM_SERVICE}" in str(template), "the template itself stays as it is"


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


# --- and back to what the template says ----------------------------------------------------------------------------------------


def test_only_what_was_raised_is_lowered_and_never_below_the_template() -> None:
    template = paired_services.pods_of_template({"predictor": {"minReplicas": 2}, "transformer": {}, "containers": []})
    assert template == {"predictor": 2, "transformer": 1}, "KServe's own default where there is none"

    def service(predictor: Any, transformer: Any) -> dict[str, Any]:
        return {"spec": {"predictor": {"minReplicas": predictor}, "transformer": {"minReplicas": transformer}}}

    assert paired_services.raised(service(10, 8), template) == {"predictor": 2, "transformer": 1}
    assert paired_services.raised(service(2, 8), template) == {"transformer": 1}
    assert paired_services.raised(service(0, 1), template) == {}
    assert paired_services.raised({"spec": {"predictor": {}, "transformer": {}}}, template) == {}
    assert paired_services.raised(service(10, 8), {"predictor": 2}) == {"predictor": 2}, "of another nothing is known"


@pytest.mark.parametrize(("managers", "lowered"), [
    ([], True), (["hafnium-rollout"], True), (["kubectl-edit"], False), (["hafnium-rollout", "argocd-controller"], False)])
def test_a_number_that_somebody_else_wrote_is_theirs(managers: list[str], lowered: bool) -> None:
    fields = {"f:spec": {"f:predictor": {"f:minReplicas": {}}}}
    item = {"metadata": {"managedFields": [{"manager": m, "fieldsV1": fields} for m in managers] + [
        {"manager": "manager", "subresource": "status", "fieldsV1": {"f:status": {}}}]}, "spec": {"predictor": {"minReplicas": 4}}}
    assert bool(paired_services.raised(item, {"predictor": 2})) == lowered


def _remembered(status: RolloutStatus, items: dict[str, Any] | None, **changes: Any) -> dict[str, dict[str, int]]:
    return paired_services.template_pods(on_cluster(service={"predictor": {"minReplicas": 2, "model": {}}}, **changes), status, items)


RUN = RolloutStatus(
    run_id="r", stable=ModelSeen(service="old", digest=STABLE), candidate=ModelSeen(service="new", digest=CANDIDATE))
NEXT = {"model": {"digest": OTHER}}
TEN = {"new": {"spec": {"predictor": {"minReplicas": 10}}}}
TWO = {"new": {"spec": {"predictor": {"minReplicas": 2}}}}


def test_the_template_is_remembered_from_before_the_candidate_is_there_until_it_is_stable_and_lowered() -> None:
    known = {"new": {"predictor": 2}}
    assert _remembered(RUN, {}) == known
    climbing = RUN.model_copy(update={"phase": "Progressing", "cursor": {"templatePods": {"new": {"predictor": 3}}}})
    assert _remembered(climbing, TEN) == known, "an edit of the template counts while it asks for this model"
    assert _remembered(climbing, TEN, **NEXT) == {"new": {"predictor": 3}}, "and one that asks for another doesn't"
    promoted = RUN.model_copy(update={"phase": "Promoted", "stable": RUN.candidate, "cursor": {"templatePods": known}})
    assert _remembered(promoted, TEN, **NEXT) == known
    assert _remembered(promoted, None, **NEXT) == known, "unread is not lowered"
    assert _remembered(promoted, TWO) == {}
    assert _remembered(promoted.model_copy(update={"cursor": {}}), TEN) == {}, "nobody raised it here: it is its owner's"


@pytest.mark.parametrize("cursor", [{"templatePods": 5}, {"templatePods": {"new": 5}}, {"templatePods": {"new": {"predictor": "x"}}}])
def test_a_cursor_that_somebody_spoiled_lowers_nothing(cursor: dict[str, Any]) -> None:
    promoted = RUN.model_copy(update={"phase": "Promoted", "stable": RUN.candidate, "cursor": cursor})
    assert _remembered(promoted, TEN, **NEXT) == {}


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


def _routed(*controllers: str, gateway: tuple[str, str] = GATEWAY) -> dict[tuple[str, str], Any]:
    """The rollout's route, taken up by these controllers for the gateway."""
    ref = {"namespace": gateway[0], "name": gateway[1]}
    parents = [{"parentRef": ref, "controllerName": c, "conditions": []} for c in controllers]
    spec = {"rules": [{"backendRefs": [{"name": "risk-bbbbbbbb-predictor", "port": 80}]}]}
    return {("ns", "risk"): {"metadata": {"name": "risk", "namespace": "ns"}, "spec": spec, "status": {"parents": parents}}}


FORBIDDEN = {"Gateway": "list gateways: forbidden (403)", "GatewayClass": "list gatewayclasses: forbidden (403)"}


@pytest.mark.parametrize(("routes", "reasons"), [
    (_routed("projectcontour.io/gateway-controller"), []),
    (_routed("traefik.io/gateway-controller"), [("MirrorUnknown", True)]),
    ({}, [("MirrorUnchecked", False)]),
    (_routed(), [("MirrorUnchecked", False)]),
    (_routed("projectcontour.io/gateway-controller", gateway=("kserve", "another")), [("MirrorUnchecked", False)]),
    (_routed("projectcontour.io/gateway-controller", "traefik.io/gateway-controller"), [("MirrorUnknown", True)]),
], ids=["known to mirror", "not known to", "no route yet", "not taken up yet", "of another gateway", "two say so"])
@pytest.mark.parametrize("gateways", [None, {GATEWAY: {"spec": {"gatewayClassName": "traefik"}}}], ids=["nor gateways", "classes alone"])
def test_a_shadow_step_behind_a_gateway_that_may_not_be_read_goes_by_the_controller_in_the_routes_status(
    routes: dict[tuple[str, str], Any], reasons: list[tuple[str, bool]], gateways: dict[tuple[str, str], Any] | None,
) -> None:
    """An operator of one namespace, without rights on gateways. Traefik would answer 500 to everybody if asked to mirror."""
    seen = snapshot(gateways=gateways, classes=None, routes=routes, errors=FORBIDDEN)
    assert _reasons(on_cluster(), seen) == reasons
    found = findings(on_cluster(), "ns", seen, SETTINGS)
    assert all("forbidden (403)" in f.message for f in found), "what was not checked, and why"
    assert _reasons(on_cluster(strategy=NO_SHADOW), seen) == []


def test_no_candidate_gets_a_copy_before_the_routes_status_names_the_controller() -> None:
    """`MirrorUnchecked` doesn't refuse, or a first model could never begin. What needs the mirror needs the route's status, too."""
    assert live_route(_routed()[("ns", "risk")], GATEWAY)[0] is None
    world = World(on_cluster())
    plain = world.observe
    world.observe = lambda seconds: replace(plain(seconds), live=None)  # type: ignore[method-assign]
    for _ in range(50):
        world.turn()
        assert world.route is not None
        assert not world.route.shadow
    assert world.status.phase == "Pending"


def test_arms_are_marked_by_the_controller_in_the_routes_status_where_classes_may_not_be_read() -> None:
    seen = snapshot(gateways=None, classes=None, errors=FORBIDDEN)
    route = _routed("projectcontour.io/gateway-controller")[("ns", "risk")]
    found = ability(seen, GATEWAY, SETTINGS.mirroring, route)
    assert found is not None
    assert (found.mirrors, found.marks_arms) == ("yes", True)
    assert ability(snapshot(classes={}), GATEWAY, SETTINGS.mirroring, route) is None, "read, and there is no class"


@pytest.mark.parametrize(("place", "reasons"), [("/logs/{rollout}", []), ("/logs/{service}", ["LogPerService"])])
def test_scores_of_two_revisions_are_not_looked_for_in_a_log_per_service(place: str, reasons: list[str]) -> None:
    spec = on_cluster(
        routing={"backend": "CanaryTrafficPercent"}, strategy=NO_SHADOW,
        gates=[{"name": "e", "role": "Safety", "requests": {}}, {"name": "s", "scores": {"unpaired": True}}])
    assert [r for r, _ in _reasons(spec, snapshot(), SETTINGS.model_copy(update={"inference_log": place}))] == reasons


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


LIVE = {"name": "risk-bbbbbbbb-predictor", "port": 80, "weight": 100}


def _found(rules: list[dict[str, Any]], status: RolloutStatus = RolloutStatus()) -> list[str]:
    routes = {("ns", "risk"): {"metadata": {"name": "risk", "namespace": "ns"}, "spec": {"rules": rules}}}
    found = findings(on_cluster(strategy=NO_SHADOW), "ns", snapshot(routes=routes), SETTINGS, status=status)
    assert all(f.reason == "RouteNotOurForm" and f.refuses for f in found)
    return [f.message for f in found]


def test_a_live_route_with_one_backend_for_all_requests_is_taken_over() -> None:
    assert _found([{"backendRefs": [LIVE]}]) == []
    assert _found([{"backendRefs": [{"name": "risk-old-predictor"}], "matches": [{"path": {"type": "PathPrefix", "value": "/"}}]}]) == []
    assert _found([{"backendRefs": [LIVE, {**LIVE, "name": "risk-old-predictor", "weight": 0}]}]) == [], "who gets nothing isn't stable"


@pytest.mark.parametrize(("rules", "named"), [
    ([], "0 rules"),
    ([{"backendRefs": [LIVE]}, {"backendRefs": [LIVE]}], "2 rules"),
    ([{"backendRefs": [LIVE], "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}]}], "/v1"),
    ([{"backendRefs": [LIVE], "filters": [{"type": "RequestHeaderModifier"}]}], "RequestHeaderModifier"),
    ([{"backendRefs": [{**LIVE, "name": "risk-old-predictor", "weight": 1}, {**LIVE, "weight": 99}]}], "risk-old 1 %, risk-bbbbbbbb 99 %"),
    ([{"backendRefs": [{**LIVE, "name": "risk-old-predictor", "weight": 0}, LIVE]}], "risk-old 0 %, risk-bbbbbbbb 100 %"),
    ([{"backendRefs": [LIVE], "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "tap"}}}]}], "tap copies"),
    ([{"backendRefs": []}], "0 backends"),
    ([{"backendRefs": [{**LIVE, "port": 8080}]}], "port 8080"),
    ([{"backendRefs": [{**LIVE, "namespace": "other"}]}], "other/risk-bbbbbbbb-predictor"),
], ids=["no rule", "two rules", "a path", "a header filter", "two answer", "the second answers", "a mirror", "nobody", "a port",
        "another namespace"])
def test_a_live_route_that_does_not_say_who_is_stable_is_not_taken_over(rules: list[dict[str, Any]], named: str) -> None:
    """What our writes keep of it is the stable service: whoever is mistaken for that gets production."""
    (message,) = _found(rules)
    assert named in message
    assert "only backend" in message
    assert _found(rules, RolloutStatus(stable=ModelSeen(service="risk-bbbbbbbb"))) == [], "from then on it is a stranger's change (rule 10)"
