"""A training that is started on a cluster: a RayJob that the API server and KubeRay's own schema accept, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hafnium_kubectl import ROOT, Kubectl, kustomized
from hafnium_operator import until
from hafnium_rollout_world import STABLE, START, rollout
from kubernetes import client as k8s
from kubernetes import config as k8s_config

from hafnium_rollout.kubernetes.client import KubernetesClient, connect
from hafnium_rollout.kubernetes.errors import KubernetesError
from hafnium_rollout.kubernetes.ray_jobs import RAY_JOB, RayJobStarter, read_template
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import Attempt
from hafnium_rollout.retraining.trigger import FileAttempts, Retraining, RetrainingTrigger, proposal
from hafnium_rollout.status import ModelSeen, RolloutStatus

pytestmark = pytest.mark.cluster
COMPONENT = ROOT / "kustomize/components/retraining"
STABLE_SEEN = ModelSeen(service="risk", digest=STABLE)
ATTEMPT = Attempt(
    id="risk-retrain-bbbbbbbb-1", time=START, digest=STABLE, kind="drift", findings=("a",), message="geo moved", state="Intended")
TEMPLATE: dict[str, Any] = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {
    "entrypoint": "python train.py --instead-of ${HAFNIUM_RETRAINING_STABLE_DIGEST}", "suspend": True,
    "rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}, "template": {"spec": {"containers": [
        {"name": "ray-head", "image": "localhost/ray:none"}]}}}}}}


@pytest.fixture
def rollout_there(namespaced: Kubectl) -> ModelRollout:
    if namespaced.run("get", "crd", "rayjobs.ray.io").returncode != 0:
        pytest.skip("NOT TESTED: this cluster doesn't know RayJob; install KubeRay, or its CRDs")
    found = rollout()
    return found.model_copy(update={"metadata": found.metadata.model_copy(update={"namespace": namespaced.namespace})})


def test_a_ray_job_is_made_once_however_often_it_is_asked_for(
    namespaced: Kubectl, rollout_there: ModelRollout, tmp_path: Path,
) -> None:
    attempts = FileAttempts(tmp_path)
    key = f"{namespaced.namespace}/risk"
    settings = Retraining.model_validate({"policy": "start", "rayJobTemplate": "/not/read/here"})
    status = RolloutStatus(phase="Promoted", stable=STABLE_SEEN)
    for _ in range(3):
        attempts.save(key, (ATTEMPT,))  # killed each time after the RayJob was made and before that was written down
        trigger = RetrainingTrigger(settings, attempts, RayJobStarter(connect(), TEMPLATE), lambda _: None)
        trigger.turn(rollout_there, status, (), START)
        assert [a.state for a in attempts.load(key)] == ["Started"]
    items = namespaced.read("rayjobs")["items"]
    assert [i["metadata"]["name"] for i in items] == [ATTEMPT.id]
    assert items[0]["spec"]["entrypoint"] == f"python train.py --instead-of {STABLE}"
    assert items[0]["metadata"]["labels"]["hafnium.dev/rollout"] == "risk"


def test_what_becomes_of_a_ray_job_is_seen_after_a_restart_too(namespaced: Kubectl, rollout_there: ModelRollout) -> None:
    client = connect()
    attempt = ATTEMPT.model_copy(update={"id": "risk-retrain-bbbbbbbb-2"})
    started = RayJobStarter(client, TEMPLATE).start(attempt, rollout_there, STABLE_SEEN, proposal(attempt, rollout_there, STABLE_SEEN))
    again = RayJobStarter(client, TEMPLATE)
    assert again.look(started) == started
    client.merge(RAY_JOB, namespaced.namespace, attempt.id, {"status": {"jobStatus": "FAILED", "message": "out of memory"}},
                 subresource="status")
    found = again.look(started)
    assert (found.state, found.detail) == ("Failed", f"RayJob {namespaced.namespace}/{attempt.id}: out of memory")
    client.delete(RAY_JOB, namespaced.namespace, attempt.id)
    assert again.look(started).state == "Unknown"


def test_the_overlays_training_is_started_by_the_operators_own_account_and_taken_up_by_kuberay(
    namespaced: Kubectl, rollout_there: ModelRollout,
) -> None:
    """As components/retraining has it: Role and RayJob. Which account it is, the overlay says; here it is of the test's namespace."""
    where = namespaced.namespace
    rbac = [d for d in yaml.safe_load_all((COMPONENT / "rbac.yaml").read_text(encoding="utf-8")) if d["kind"] in ("Role", "RoleBinding")]
    for d in rbac:
        for subject in d.get("subjects", []):
            subject["namespace"] = where
    beside = [d for d in kustomized("kustomize/base/training") if d["kind"] in ("ServiceAccount", "PersistentVolumeClaim")]
    namespaced("apply", "-f", "-", given=[*rbac, *beside])
    namespaced("create", "serviceaccount", "hafnium-rollout-operator")
    operator, stranger = account(namespaced, "hafnium-rollout-operator"), account(namespaced, "default")
    template = read_template(COMPONENT / "rayjob.yaml")
    attempt = ATTEMPT.model_copy(update={"id": "risk-retrain-bbbbbbbb-3"})
    said = proposal(attempt, rollout_there, STABLE_SEEN)
    with pytest.raises(KubernetesError, match="cannot"):
        RayJobStarter(stranger, template).start(attempt, rollout_there, STABLE_SEEN, said)
    started = RayJobStarter(operator, template).start(attempt, rollout_there, STABLE_SEEN, said)
    assert started.state == "Started"

    def taken_up() -> str:
        return str(namespaced.read("rayjob", attempt.id).get("status", {}).get("rayClusterName", ""))

    cluster = until(taken_up, "KubeRay makes a cluster for it")
    assert cluster.startswith(attempt.id[:10])
    heads = until(lambda: namespaced.read("pods", "-l", f"ray.io/cluster={cluster},ray.io/node-type=head")["items"], "its head is made")
    assert heads[0]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert RayJobStarter(operator, template).look(started).state == "Started"
    with pytest.raises(KubernetesError, match="cannot delete"):
        operator.delete(RAY_JOB, where, attempt.id)


def account(kubectl: Kubectl, name: str) -> KubernetesClient:
    """The API with a token of a service account."""
    configuration = k8s.Configuration()
    k8s_config.load_kube_config(client_configuration=configuration)
    configuration.cert_file = configuration.key_file = None  # the admin's
    configuration.api_key = {"authorization": f"Bearer {kubectl('create', 'token', name).strip()}"}
    return KubernetesClient(k8s.ApiClient(configuration))
