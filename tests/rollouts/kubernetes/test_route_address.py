"""A route stands behind the gateway and under the names that its ModelRollout asks for, and keeps its weights when they change."""

from __future__ import annotations

from hafnium_reconciled import NAME, NAMESPACE, STRATEGY, Cluster, cluster, meta
from hafnium_rollout_world import rollout

from hafnium_rollout.kubernetes.kinds import GATEWAY, HTTP_ROUTE, INFERENCE_SERVICE, MODEL_ROLLOUT
from hafnium_rollout.kubernetes.reconciler import FINALIZER
from hafnium_rollout.state_folder import MANAGED_BY_LABEL, MANAGER, ROLLOUT_LABEL

MOVED = {"backend": "PairedServices", "gatewayRef": {"name": "new", "namespace": "edge"}, "hostnames": ["risk.example.org"]}


def address(found: Cluster) -> tuple[list[tuple[str, str]], list[str]]:
    spec = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"]
    return [(p["namespace"], p["name"]) for p in spec["parentRefs"]], spec["hostnames"]


def move(found: Cluster) -> None:
    found.api.put(GATEWAY, {"metadata": {"name": "new", "namespace": "edge"}, "spec": {"gatewayClassName": "class"}})
    found.ask(rollout(routing=MOVED, strategy=STRATEGY))


def held(found: Cluster) -> list[str]:
    """Its finalizers; none once it is gone."""
    return found.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {}).get("metadata", {}).get("finalizers", [])


def test_a_route_moves_to_another_gateway_and_name_with_its_weights() -> None:
    with cluster() as found:
        found.climbed()
        assert found.weight == 20
        move(found)
        found.turn()
        assert address(found) == ([("edge", "new")], ["risk.example.org"])
        assert found.weight == 20
        version = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["metadata"]["resourceVersion"]
        found.gateway_answers = False  # it writes the route's status
        found.turn()
        assert found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["metadata"]["resourceVersion"] == version
        assert sum(x["event"] == "Action" and x.get("action") == "Readdress" for x in found.log) == 1


def test_names_that_somebody_else_took_from_the_route_are_given_back() -> None:
    with cluster() as found:
        found.climbed()
        before = address(found)
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["spec"]["hostnames"] = ["stolen.example.org"]
        found.api.put(HTTP_ROUTE, route)
        found.turn()
        assert address(found) == before
        assert found.weight == 20


def test_a_candidate_climbs_behind_a_gateway_that_moved_while_nothing_was_under_way() -> None:
    with cluster() as found:
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["metadata"]["labels"] = {MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: NAME}
        route["spec"] |= {"parentRefs": [{"namespace": "kserve", "name": "kserve-ingress-gateway"}], "hostnames": ["risk-ns.example.com"]}
        found.api.put(HTTP_ROUTE, route)
        found.gateway_follows()
        move(found)
        found.climbed()
        assert found.weight == 20
        assert address(found) == ([("edge", "new")], ["risk.example.org"])


def test_a_rollout_whose_gateway_moved_can_be_deleted() -> None:
    with cluster() as found:
        found.climbed()
        move(found)
        found.gateway_answers = False
        item = found.item()
        item["metadata"]["deletionTimestamp"] = "2026-03-01T12:30:00Z"
        found.api.put(MODEL_ROLLOUT, item)
        found.turn()
        assert found.item()["metadata"]["finalizers"] == [FINALIZER], "nobody behind the new gateway has answered yet"
        found.gateway_answers = True
        found.gateway_follows()
        for _ in range(8):
            if not held(found):
                break
            found.turn()
        assert not held(found)
        assert found.weight == 0
        assert address(found)[0] == [("edge", "new")]


def test_a_deleted_rollout_that_nobody_understands_holds_on_while_a_canary_has_its_percent() -> None:
    """The operator was started anew, so it knows no last good spec; no HTTPRoute tells of a canary by KServe."""
    with cluster() as found:
        item = found.item()
        item["metadata"] |= {"finalizers": [FINALIZER], "deletionTimestamp": "2026-03-01T12:30:00Z"}
        item["spec"] = {"routing": {"backend": "CanaryTrafficPercent"}, "ofALaterRelease": True}
        found.api.put(MODEL_ROLLOUT, item)
        found.api.put(INFERENCE_SERVICE, {"metadata": meta(NAME), "spec": {"predictor": {"canaryTrafficPercent": 20}}})
        found.turn()
        assert found.item()["metadata"]["finalizers"] == [FINALIZER]
        assert any("canaryTrafficPercent" in x["message"] for x in found.log)
        found.api.put(INFERENCE_SERVICE, {"metadata": meta(NAME), "spec": {"predictor": {}}})
        found.turn()
        assert not held(found)
