"""An overlay on a real cluster, from nothing: the operator leads, the model answers, and a ModelRollout's first model goes live.

HAFNIUM_ROLLOUT_IMAGE, HAFNIUM_PREDICTOR_IMAGE, … name images that the nodes have; `make test-cluster` builds them.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator

import pytest
from hafnium_install import Installed, for_this_cluster, installed, overlay
from hafnium_kubectl import ROOT, Kubectl
from hafnium_operator import until
from hafnium_servers import make_feature_repo

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_testing import make_bundle, synthetic_rows, synthetic_views

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    contract = load_contract(ROOT / "examples/unified-risk/contract.yaml")
    return make_bundle(tmp_path_factory.mktemp("bundles") / "v1", contract, version="1", bias=-1.5)


@pytest.fixture(scope="module")
def place(types: Kubectl, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """overlays/dev as it is, but for names and images; its volumes filled by a pod that is as restricted as all others."""
    suffix = secrets.token_hex(3)
    repo = tmp_path_factory.mktemp("files") / "repo"
    make_feature_repo(repo, bundle.contract, synthetic_views(bundle.contract, 1))
    documents = for_this_cluster(overlay("dev"), f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk")
    with installed(types, suffix, documents, ("bundles", "features")) as made:
        made.desk.put(bundle.path, "bundles/v1")
        made.desk.put(repo, "features")
        # Pods that came before the files: a bundle that isn't whole is never ready, and never looked at again
        made.models("delete", "pod", "-l", "serving.kserve.io/inferenceservice=unified-risk", "--wait=false")
        yield made


def wait(kubectl: Kubectl, what: str, condition: str, seconds: int = 300) -> None:
    done = subprocess.run(["kubectl", "-n", kubectl.namespace, "wait", f"--for=condition={condition}", what, f"--timeout={seconds}s"],
                          capture_output=True, text=True, timeout=seconds + 30, check=False)
    assert done.returncode == 0, "\n".join((done.stderr, kubectl("get", "pods"), kubectl.run("get", "events").stdout[-3000:]))


def test_two_operators_run_and_one_of_them_leads(place: Installed) -> None:
    wait(place.system, "deployment/hafnium-rollout-operator", "Available")
    until(lambda: place.system.read("deployment", "hafnium-rollout-operator")["status"].get("readyReplicas") == 2, "both are ready")
    holder = place.system.read("lease", "hafnium-rollout-operator")["spec"]["holderIdentity"]
    pods = {p["metadata"]["name"]: p for p in place.system.read("pods")["items"]}
    assert holder.split("_")[0] in pods
    assert all(p["status"]["containerStatuses"][0]["restartCount"] == 0 for p in pods.values())
    gone = holder.split("_")[0]
    place.system("delete", "pod", gone, "--wait=false")
    until(lambda: (place.system.read("lease", "hafnium-rollout-operator")["spec"].get("holderIdentity") or gone).split("_")[0] != gone,
          "the other one leads")


def test_the_model_answers_with_what_the_store_knows(place: Installed, bundle: Bundle) -> None:
    wait(place.models, "isvc/unified-risk", "Ready", 500)
    row = synthetic_rows(bundle.contract, 1, 5)[0]
    status, said = place.desk.ask("http://unified-risk-transformer/v1/score", row)
    assert status == 200
    assert said["model_version"] == "1"
    assert 0.0 <= said["score"] <= 1.0
    for pod in place.models.read("pods", "-l", "serving.kserve.io/inferenceservice=unified-risk")["items"]:
        assert not [v for v in pod["spec"]["volumes"] if v["name"].startswith("kube-api-access")], "no token is in the pod"
    budgets = {b["metadata"]["name"]: b["status"]["expectedPods"] for b in place.models.read("pdb")["items"]}
    assert budgets == {"predictors": 1, "transformers": 1}


def test_a_rollouts_first_model_goes_live_by_the_operators_own_hand(place: Installed, bundle: Bundle) -> None:
    """The ModelRollout of overlays/staging, for a bundle of this cluster and a gateway that copies nothing."""
    documents = for_this_cluster(overlay("staging"), place.system.namespace, place.models.namespace)
    (rollout,) = [d for d in documents if d["kind"] == "ModelRollout"]
    rollout["metadata"]["name"] = "live"
    spec = rollout["spec"]
    spec["model"] |= {"storageUri": "pvc://bundles/v1", "digest": bundle.manifest.digest, "version": "1"}
    spec["strategy"]["steps"] = [{"weight": 100}]
    spec["gates"] = [{"name": "drift", "role": "Safety", "drift": {"maxAge": "24h"}}]
    del spec["approvals"]
    for component in ("predictor", "transformer"):
        spec["service"][component] |= {"minReplicas": 1}
    del spec["service"]["predictor"]["storageContainerName"]  # of staging, and nobody installed that here
    container = spec["service"]["transformer"]["containers"][0]
    del container["env"]  # bucket and Redis
    place.models("delete", "isvc", "unified-risk", "--ignore-not-found")  # the node is small
    place.models("apply", "-f", "-", given=rollout)
    try:
        until(lambda: place.models.read("modelrollout", "live").get("status", {}).get("phase") == "Promoted", "it is promoted", 400)
    except AssertionError as e:
        said = place.models.run("get", "modelrollouts,isvc,pods", "-o", "wide").stdout
        raise AssertionError(f"{e}\n{said}\n{place.models.read('modelrollout', 'live').get('status')}") from e
    route = place.models.read("httproute", "live")
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    status, said = place.desk.ask(f"http://{backend['name']}/v1/score", synthetic_rows(bundle.contract, 1, 6)[0])
    assert status == 200
    assert said["model_version"] == "1"
    assert "Promoted" in place.models("get", "modelrollouts")
