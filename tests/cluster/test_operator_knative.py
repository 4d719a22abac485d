"""CanaryTrafficPercent against a real KServe in Knative mode, with requests through Kourier."""

from __future__ import annotations

import json
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl
from hafnium_operator import Call, Load, OperatorProcess, digest, faulty_api, model_rollout, release, until, versions

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
DOOR = os.environ.get("HAFNIUM_TEST_KNATIVE", "http://127.0.0.1:8020")
"""Where Kourier answers."""
NAME = "kn"


@pytest.fixture(scope="module")
def knative(types: Kubectl, model_image: None) -> Iterator[Kubectl]:
    """A namespace on a cluster that has Knative."""
    if types.run("get", "crd", "revisions.serving.knative.dev").returncode != 0:
        pytest.skip("the cluster has no Knative Serving")
    try:
        urllib.request.urlopen(DOOR, timeout=5).close()  # noqa: S310 - an address of the test's own settings
    except urllib.error.HTTPError:
        pass
    except OSError as e:
        pytest.skip(f"Kourier does not answer at {DOOR}: {e}")
    name = f"hafnium-test-{secrets.token_hex(3)}"
    types("create", "namespace", name)
    try:
        yield replace(types, namespace=name)
    finally:
        release(replace(types, namespace=name))
        types("delete", "namespace", name, "--wait=false")


def apply(kubectl: Kubectl, version: int, **more: Any) -> None:
    item = model_rollout(NAME, version, **more)
    item["spec"]["routing"] = {"backend": "CanaryTrafficPercent"}
    kubectl("apply", "-f", "-", given=item)


def phase(kubectl: Kubectl, wanted: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        item = kubectl.read("modelrollout", NAME)
        s = item.get("status", {})
        return s if s.get("phase") == wanted and s.get("observedGeneration") == item["metadata"]["generation"] else None
    return until(found, wanted)


def service(kubectl: Kubectl) -> dict[str, Any]:
    return kubectl.read("inferenceservice", NAME)


def percent(kubectl: Kubectl) -> int | None:
    return service(kubectl)["spec"]["predictor"].get("canaryTrafficPercent")


def model(kubectl: Kubectl) -> str:
    """The version in the template."""
    env = service(kubectl)["spec"]["predictor"]["containers"][0]["env"]
    return next(e["value"] for e in env if e["name"] == "MODEL_VERSION")


def settled(kubectl: Kubectl, version: str) -> bool:
    """The template is this version's, no percent is left, and its own revision has everything."""
    status = service(kubectl)["status"]["components"]["predictor"]
    latest = [t for t in status.get("traffic", []) if t.get("latestRevision") and t.get("percent") == 100]
    ready = status.get("latestReadyRevision") == status.get("latestCreatedRevision")
    return (model(kubectl), percent(kubectl)) == (version, None) and bool(latest) and ready


def test_promotion_rollback_in_the_canary_and_rollback_after_full_traffic(knative: Kubectl, tmp_path: Path) -> None:
    kubectl = knative
    operator = OperatorProcess(tmp_path, kubectl.namespace, "operator")
    traffic: Load | None = None
    try:
        apply(kubectl, 1)
        phase(kubectl, "Promoted")
        traffic = Load(f"{NAME}-predictor.{kubectl.namespace}.example.com", DOOR)
        until(lambda: versions(traffic.counts)["1"] > 20, "the first model answers")

        apply(kubectl, 2)
        until(lambda: percent(kubectl) == 20, "a fifth for the candidate")
        assert phase(kubectl, "Promoted")["stable"]["digest"] == digest(2)
        until(lambda: settled(kubectl, "2"), "no percent is left")
        assert set(versions(traffic.next(200))) == {"2"}

        apply(kubectl, 3, bad_every=3)
        assert phase(kubectl, "RolledBack")["reason"] == "GateFailed"
        until(lambda: settled(kubectl, "2"), "the stable template is back, and no percent is left")
        assert set(versions(traffic.next(300))) == {"2"}, "removing the percent did not bring the bad one back"
        third = versions(traffic.counts)["3"]

        # Straight to 100, where there is nobody to compare with, and back by a person's word.
        apply(kubectl, 4, steps=[{"weight": 100, "minDwell": "1h", "deadline": "2h"}])
        until(lambda: (kubectl.read("modelrollout", NAME)["status"].get("step") or {}).get("weightEffectiveSince"), "all for the candidate")
        until(lambda: set(versions(traffic.next(50))) == {"4"}, "it answers everything")
        action = {"type": "Abort", "id": "a-1", "candidateDigest": digest(4), "reason": "a test"}
        apply(kubectl, 4, steps=[{"weight": 100, "minDwell": "1h", "deadline": "2h"}], action=action)
        assert phase(kubectl, "RolledBack")["reason"] == "Aborted"
        until(lambda: settled(kubectl, "2"), "the stable template is back, and no percent is left")
        assert set(versions(traffic.next(300))) == {"2"}
        assert versions(traffic.counts)["3"] == third, "the rejected one of before never came back"
        assert {s for s, v in traffic.counts if v in ("1", "2", "4")} == {200}, "callers of the good models met no error"
    finally:
        if traffic is not None:
            traffic.stop()
        operator.stop()


def test_a_shadow_step_and_a_service_in_standard_mode_are_refused(knative: Kubectl, tmp_path: Path) -> None:
    kubectl = knative
    operator = OperatorProcess(tmp_path, kubectl.namespace, "operator")
    try:
        item = model_rollout("mirrored", 1, steps=[{"shadow": True, "deadline": "1h"}, {"weight": 100, "deadline": "1h"}])
        item["spec"]["routing"] = {"backend": "CanaryTrafficPercent"}
        kubectl("apply", "-f", "-", given=item)
        plain = model_rollout("plain", 1)
        kubectl("apply", "-f", "-", given={
            "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "spec": plain["spec"]["service"],
            "metadata": {"name": "plain", "annotations": {"serving.kserve.io/deploymentMode": "Standard"}}})
        plain["spec"]["routing"] = {"backend": "CanaryTrafficPercent"}
        kubectl("apply", "-f", "-", given=plain)

        def reason(name: str) -> str:
            found = kubectl.read("modelrollout", name).get("status", {}).get("conditions", [])
            return next((c["reason"] for c in found if c["type"] == "Accepted" and c["status"] == "False"), "")

        until(lambda: reason("mirrored") == "MirrorNotSupported", "the shadow is refused")
        until(lambda: reason("plain") == "NotKnative", "the mode is refused")
    finally:
        operator.stop()


def test_a_canary_rollback_gets_through_when_kserves_webhook_is_back(knative: Kubectl, tmp_path: Path) -> None:
    """While it is down no InferenceService can be written. Nothing is called done meanwhile, and the bad model gains nothing."""
    kubectl, name = knative, "hooked"
    down = threading.Event()

    def before(call: Call) -> tuple[int, dict[str, str]] | None:
        if down.is_set() and call.writes and "/inferenceservices/" in call.path:
            return 500, {}  # as the API server answers when a webhook can't be called
        return None

    def item(version: int, **more: Any) -> dict[str, Any]:
        found = model_rollout(name, version, steps=[
            {"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}], **more)
        return {**found, "spec": {**found["spec"], "routing": {"backend": "CanaryTrafficPercent"}}}

    def status() -> dict[str, Any]:
        return kubectl.read("modelrollout", name).get("status", {})

    def percent_now() -> int | None:
        return kubectl.read("inferenceservice", name)["spec"]["predictor"].get("canaryTrafficPercent")

    with faulty_api(tmp_path) as api:
        api.before = before
        operator = OperatorProcess(tmp_path, kubectl.namespace, "hooked", kubeconfig=api.kubeconfig, watch=False)
        traffic: Load | None = None
        try:
            kubectl("apply", "-f", "-", given=item(1))
            until(lambda: status().get("phase") == "Promoted", "the first model")
            traffic = Load(f"{name}-predictor.{kubectl.namespace}.example.com", DOOR)
            until(lambda: versions(traffic.counts)["1"] > 20, "it answers")
            kubectl("apply", "-f", "-", given=item(2))
            until(lambda: (status().get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
            down.set()
            action = {"type": "Abort", "id": "a-1", "candidateDigest": digest(2), "reason": "a test"}
            kubectl("apply", "-f", "-", given=item(2, action=action))
            until(lambda: status().get("rollback"), "the rollback is wanted")
            until(lambda: [x for x in operator.lines if x["event"] == "TurnFailed"], "it is refused, and said")
            calls = len(api.answered)
            until(lambda: len(api.answered) > calls + 30, "it goes on trying")
            assert status()["phase"] == "Progressing", "not done before it is seen"
            assert percent_now() == 20
            down.clear()
            until(lambda: status().get("phase") == "RolledBack", "rolled back")
            until(lambda: percent_now() is None, "no percent is left")
            assert set(versions(traffic.next(200))) == {"1"}
        finally:
            down.clear()
            if traffic is not None:
                traffic.stop()
            operator.stop()


def test_anothers_template_is_replaced_and_a_share_that_a_person_takes_to_zero_ends_the_run(knative: Kubectl, tmp_path: Path) -> None:
    """The operator brings the candidate in again at 0 %. Whose that 0 is, the API server knows."""
    kubectl, name = knative, "shared"

    def item(version: int) -> dict[str, Any]:
        found = model_rollout(name, version, steps=[
            {"weight": 20, "minDwell": "30m", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}])
        return {**found, "spec": {**found["spec"], "routing": {"backend": "CanaryTrafficPercent"}}}

    def status() -> dict[str, Any]:
        return kubectl.read("modelrollout", name).get("status", {})

    def predictor() -> dict[str, Any]:
        return kubectl.read("inferenceservice", name)["spec"]["predictor"]

    def history() -> list[str]:
        return [h["event"] for h in status().get("history", [])]

    operator = OperatorProcess(tmp_path, kubectl.namespace, "shared")
    try:
        kubectl("apply", "-f", "-", given=item(1))
        until(lambda: status().get("phase") == "Promoted", "the first model")
        kubectl("apply", "-f", "-", given=item(2))
        until(lambda: (status().get("step") or {}).get("weightEffectiveSince"), "the candidate has its fifth")
        candidates = predictor()["containers"][0]["env"]
        theirs = [{**e, "value": "7"} if e["name"] == "MODEL_VERSION" else e for e in candidates]
        kubectl("patch", "inferenceservice", name, "--type=json", "-p", json.dumps([
            {"op": "replace", "path": "/spec/predictor/containers/0/env", "value": theirs},
            {"op": "replace", "path": "/spec/predictor/annotations/hafnium.dev~1model-digest", "value": digest(7)}]))
        until(lambda: predictor()["containers"][0]["env"] == candidates, "the candidate's template is back")
        until(lambda: predictor().get("canaryTrafficPercent") == 20, "with its share, when it is ready")
        assert (status()["phase"], history().count("ExternalChange")) == ("Progressing", 1)

        kubectl("patch", "inferenceservice", name, "--type=merge", "-p", '{"spec": {"predictor": {"canaryTrafficPercent": 0}}}')
        until(lambda: status().get("phase") == "RolledBack", "a person's 0 is an abort")
        assert status()["reason"] == "AbortedOutside"
        assert "kubectl-patch" in status()["message"]
    finally:
        operator.stop()


def test_a_service_in_the_middle_of_somebodys_canary_is_not_taken_over(knative: Kubectl, tmp_path: Path) -> None:
    kubectl, name = knative, "busy"

    def service_of(version: int, percent: int | None) -> dict[str, Any]:
        spec = model_rollout(name, version)["spec"]["service"]
        spec["predictor"] |= {"canaryTrafficPercent": percent} if percent is not None else {}
        return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "spec": spec,
                "metadata": {"name": name, "annotations": {"serving.kserve.io/deploymentMode": "Knative"}}}

    def accepted() -> tuple[str, str]:
        found = kubectl.read("modelrollout", name).get("status", {}).get("conditions", [])
        return next(((c["status"], c["reason"]) for c in found if c["type"] == "Accepted"), ("", ""))

    def revisions() -> int:
        parts = kubectl.read("inferenceservice", name).get("status", {}).get("components", {}).get("predictor", {})
        return len([t for t in parts.get("traffic", []) if t.get("percent")])

    operator = OperatorProcess(tmp_path, kubectl.namespace, "busy")
    try:
        kubectl("apply", "-f", "-", given=service_of(8, None))
        until(lambda: revisions() == 1, "somebody's service answers")
        kubectl("apply", "-f", "-", given=service_of(9, 30))
        until(lambda: revisions() == 2, "somebody's canary has its share")
        item = model_rollout(name, 2)
        item["spec"]["routing"] = {"backend": "CanaryTrafficPercent"}
        kubectl("apply", "-f", "-", given=item)
        until(lambda: accepted() == ("False", "NotAtRest"), "it is refused")
        assert kubectl.read("inferenceservice", name)["spec"]["predictor"]["canaryTrafficPercent"] == 30, "and left as it is"
        kubectl("patch", "inferenceservice", name, "--type=json", "-p",
                '[{"op": "remove", "path": "/spec/predictor/canaryTrafficPercent"}]')
        until(lambda: accepted() == ("True", "Accepted"), "finished by its owner, it is taken over")
    finally:
        operator.stop()
