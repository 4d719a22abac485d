"""The whole way on a cluster, from an overlay to a rejected model, under a load that never pauses and loses no request.

Everything is what users apply: overlays/dev with its operator, runtime, volumes and jobs, and a ModelRollout over its InferenceService. The
test only puts in its own images, namespaces and Prometheus. v2 gets there by its gates and by drift evidence; v3 is found out in its
shadow, v4, which has none, with a quarter of the traffic. Meanwhile the leading operator is killed twice and each part is restarted.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hafnium_install import Installed, for_this_cluster, installed, overlay
from hafnium_kubectl import JSON, Kubectl
from hafnium_operator import MIRRORING_GATEWAY, PROMETHEUS, host, release, until
from hafnium_progress import stable_is, wait_for
from hafnium_relay import relayed
from hafnium_scores import ScoreLoad, customers, score_requests
from hafnium_servers import make_feature_repo

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
BRIDGE = os.environ.get("HAFNIUM_TEST_BRIDGE", "10.88.0.1")
"""Where pods reach this machine."""
NAME = "unified-risk"
MODELS = "live"
"""Of the ModelRollout: an InferenceService of its name would be in its way."""
RATE = 30.0
STEP_S = 500.0
"""For one step of a rollout, pods' starts included. A limit and no measurement."""


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(ROOT / "examples/unified-risk/contract.yaml")


@pytest.fixture(scope="module")
def bundles(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """v1 and v2 differ a little; the contract of v3 and v4 forbids most of what callers send."""
    folder = tmp_path_factory.mktemp("bundles")
    amounts = next(f for f in contract.features if f.name == "transaction_amount")
    narrow = amounts.model_copy(update={"range": (0.0, 0.5)})
    strict = contract.model_copy(update={"features": tuple(narrow if f is amounts else f for f in contract.features)})
    return {
        "v1": make_bundle(folder / "v1", contract, version="v1", bias=-2.0),
        "v2": make_bundle(folder / "v2", contract, version="v2", bias=-2.1),
        "v3": make_bundle(folder / "v3", strict, version="v3", bias=-2.0),
        "v4": make_bundle(folder / "v4", strict, version="v4", bias=-2.1),
    }


@pytest.fixture(scope="module")
def requests(contract: ModelContract) -> list[JSON]:
    return score_requests(contract)


@pytest.fixture(scope="module")
def place(
    types: Kubectl, bundles: dict[str, Bundle], contract: ModelContract, tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installed]:
    """overlays/dev, without its InferenceService: here a ModelRollout makes the services."""
    suffix = secrets.token_hex(3)
    repo = tmp_path_factory.mktemp("feast") / "features"
    make_feature_repo(repo, contract, customers(contract))
    with relayed(PROMETHEUS, BRIDGE) as prometheus:
        documents = for_this_cluster(
            overlay("dev"), f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk",
            {"PROMETHEUS_URL": prometheus, "GATEWAY": "kserve/envoy", "SCRAPE_INTERVAL_S": "5"})
        with installed(types, suffix, [d for d in documents if d["kind"] != "InferenceService"],
                       ("bundles", "features", "inference-log")) as made:
            for name, bundle in bundles.items():
                made.desk.put(bundle.path, f"bundles/{name}")
            made.desk.put(repo, "features")
            (job,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == ("CronJob", "hafnium-drift")]
            container = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
            container["args"] = ["--window=1m" if a == "--window=1h" else a for a in container["args"]] + ["--min-rows=400", "--lag=15s"]
            types("apply", "-f", "-", given=job)
            try:
                yield made
            finally:
                release(made.models)


@pytest.fixture(scope="module")
def template() -> JSON:
    """The InferenceService of overlays/dev, as the ModelRollout's."""
    (found,) = [d for d in overlay("dev") if d["kind"] == "InferenceService"]
    (service,) = for_this_cluster([found], "hafnium-system", "risk")
    for component in service["spec"].values():
        component.pop("maxReplicas", None)
    service["spec"]["transformer"]["containers"][0]["args"].append("--log_flush_seconds=2")
    return service["spec"]


def rollout(bundle: Bundle, template: JSON) -> JSON:
    """The sample's steps in minutes instead of days, and gates that a few minutes of traffic can answer."""
    return {
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": {"name": MODELS},
        "spec": {
            "model": {"name": bundle.manifest.model_name, "version": bundle.manifest.model_version,
                      "storageUri": f"pvc://bundles/{bundle.manifest.model_version}", "digest": bundle.manifest.digest},
            "service": template,
            "routing": {"backend": "PairedServices"},
            "strategy": {"maxBlindDuration": "5m", "steps": [
                {"shadow": True, "minSamples": 200, "deadline": "40m"},
                {"weight": 5, "minDwell": "5s", "minSamples": 30, "deadline": "40m"},
                {"weight": 25, "minDwell": "5s", "minSamples": 100, "deadline": "40m"},
                {"weight": 100, "minDwell": "5s", "deadline": "40m"},
            ]},
            "gates": [
                {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.1, "alpha": 0.1}},
                # By copies alone: at 5 % of this load a window would be a quarter of an hour until it held enough rows
                {"name": "drift", "role": "Quality", "drift": {"maxAge": "2h"}, "requiredIn": ["shadow"]},
            ],
        },
    }


def status(kubectl: Kubectl) -> JSON:
    return kubectl.read("modelrollout", MODELS).get("status", {})


def kill_leader(system: Kubectl) -> str:
    """Its pod goes as with a node that loses power. Returns who led."""
    def holder() -> str:
        return str(system.read("lease", "hafnium-rollout-operator")["spec"].get("holderIdentity") or "")
    leader = holder().split("_")[0]
    system("delete", "pod", leader, "--force", "--grace-period=0")
    until(lambda: holder().split("_")[0] not in ("", leader), "another leads", 90)
    return leader


def restart_operators(system: Kubectl) -> None:
    """As users do it, and until only the new pods are there."""
    labels = ("pods", "-l", "app.kubernetes.io/component=rollouts")
    before = {p["metadata"]["name"] for p in system.read(*labels)["items"]}
    system("rollout", "restart", "deployment/hafnium-rollout-operator")

    def done() -> bool:
        now = system.read("deployment", "hafnium-rollout-operator")["status"]
        return now.get("availableReplicas") == 2 and not before & {p["metadata"]["name"] for p in system.read(*labels)["items"]}

    until(done, "new pods of the operator", STEP_S, 1.0)


def weights(kubectl: Kubectl) -> dict[str, int]:
    """The route's, by the service's name without its part."""
    rule = kubectl.read("httproute", MODELS)["spec"]["rules"][0]
    return {r["name"].removesuffix("-transformer"): int(r.get("weight", 1)) for r in rule["backendRefs"] if r.get("weight", 1)}


def step_of(s: JSON) -> int:
    return int((s.get("step") or {}).get("index", -1))


def test_from_an_overlay_to_a_rejected_model_without_a_lost_request(
    place: Installed, bundles: dict[str, Bundle], requests: list[JSON], template: JSON,
) -> None:
    kubectl, system = place.models, place.system
    until(lambda: system.read("deployment", "hafnium-rollout-operator").get("status", {}).get("availableReplicas") == 2,
          "two operators", STEP_S)
    kubectl("apply", "-f", "-", given=rollout(bundles["v1"], template))
    wait_for(kubectl, MODELS, stable_is(bundles["v1"]), "v1 is live", STEP_S)
    address = host(MODELS, kubectl.namespace)
    with ScoreLoad(MIRRORING_GATEWAY, address, requests[:1], rate=5) as first:
        until(lambda: first.versions["v1"] > 3, "v1 answers at the gateway", 90)  # it may follow its own report by a moment

    looked = 0.0

    def look_for_drift() -> None:
        """The CronJob, as often as its windows are long."""
        nonlocal looked
        if time.monotonic() - looked > 60.0:
            looked = time.monotonic()
            kubectl("create", "job", f"drift-{int(looked)}", "--from=cronjob/hafnium-drift")

    dead: set[str] = set()
    with ScoreLoad(MIRRORING_GATEWAY, address, requests, rate=RATE) as load:
        kubectl("apply", "-f", "-", given=rollout(bundles["v2"], template))
        wait_for(kubectl, MODELS, lambda s: s.get("phase") == "Progressing" and step_of(s) == 0, "v2 gets copies", STEP_S)
        load.next(500)
        wait_for(kubectl, MODELS, lambda s: step_of(s) == 1, "v2 has passed its shadow", STEP_S, look_for_drift)
        dead.add(kill_leader(system))
        wait_for(kubectl, MODELS, lambda s: step_of(s) == 2, "v2 has passed 5 %", STEP_S)
        dead.add(kill_leader(system))
        wait_for(kubectl, MODELS, stable_is(bundles["v2"]), "v2 is live", STEP_S)
        assert set(load.next(100)) == {"v2"}
        evidence = [e["spec"] for e in kubectl.read("modelevidences")["items"]]
        assert "Pass" in {e["verdict"] for e in evidence if e["modelDigest"] == bundles["v2"].manifest.digest}

        for part in ("predictor", "transformer"):
            restart(kubectl, f"{MODELS}-{bundles['v2'].manifest.digest[7:15]}", part)
        restart_operators(system)
        load.next(100)

        kubectl("apply", "-f", "-", given=rollout(bundles["v3"], template))
        back = wait_for(kubectl, MODELS, lambda s: s.get("phase") == "RolledBack", "v3 is rejected", STEP_S)
        assert back["rejectedDigests"] == [bundles["v3"].manifest.digest]
        assert set(load.next(100)) == {"v2"}
        assert load.lost == []
        assert load.refused == 0, "v3 was seen in its shadow, by nobody"
        assert "v3" not in load.versions

        unshadowed = rollout(bundles["v4"], template)
        unshadowed["spec"]["strategy"]["steps"] = [{"weight": 25, "minDwell": "10m", "deadline": "40m"}, {"weight": 100, "deadline": "40m"}]
        unshadowed["spec"]["gates"] = [g for g in unshadowed["spec"]["gates"] if g["name"] == "errors"]
        kubectl("apply", "-f", "-", given=unshadowed)
        wait_for(kubectl, MODELS, lambda s: s.get("phase") == "RolledBack" and bundles["v4"].manifest.digest in s["rejectedDigests"],
                 "v4 is rejected", STEP_S)
        assert load.refused > 0, "it had its share"
        assert set(weights(kubectl)) == {f"{MODELS}-{bundles['v2'].manifest.digest[7:15]}"}
        refused = load.refused
        assert set(load.next(200)) == {"v2"}
        assert load.refused == refused, "traffic is back, all of it"
        assert load.lost == []

    assert len(dead) == 2
    back = status(kubectl)
    shown = kubectl("get", "modelrollouts")
    assert "RolledBack" in shown
    events = [p["event"] for p in back["history"] if p["event"] in ("Started", "Rollback", "RolledBack")]
    assert events[-3:] == ["Started", "Rollback", "RolledBack"]
    said = system("logs", "-l", "app.kubernetes.io/component=rollouts", "--tail=-1")
    lines = [json.loads(x) for x in said.splitlines() if x.startswith("{")]
    told = [x["event"] for x in sorted(lines, key=lambda x: x["time"]) if x.get("rollout", "").endswith(f"/{MODELS}")]
    assert told.index("Rollback") < told.index("RolledBack")


def restart(kubectl: Kubectl, service: str, part: str) -> None:
    """New pods of a part, by its InferenceService: KServe takes `kubectl rollout restart` of its Deployment back."""
    pods = ("pods", "-l", f"serving.kserve.io/inferenceservice={service},component={part}")
    before = {p["metadata"]["name"] for p in kubectl.read(*pods)["items"]}
    patch = {"spec": {part: {"annotations": {"restarted": str(time.time())}}}}
    kubectl("patch", "isvc", service, "--type=merge", "-p", json.dumps(patch))

    def done() -> bool:
        names = {p["metadata"]["name"]: p for p in kubectl.read(*pods)["items"]}
        ready = [n for n, p in names.items() if all(c["ready"] for c in p["status"].get("containerStatuses", [{"ready": False}]))]
        return bool(ready) and not before & set(names)

    until(done, f"new pods of {service}-{part}", STEP_S, 1.0)
