"""CanaryTrafficPercent against a real KServe in Knative mode, with requests through Kourier."""

from __future__ import annotations

import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl
from hafnium_operator import Load, OperatorProcess, digest, model_rollout, release, until, versions

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
DOOR = os.environ.get("HAFNIUM_TEST_KNATIVE", "http://127.0.0.1:8020")
"""Where Kourier answers."""
NAME = "kn"


@pytest.fixture(scope="module")
def knative(types: Kubectl) -> Iterator[Kubectl]:
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
