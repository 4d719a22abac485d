"""A training that is started on a cluster: a RayJob that the API server and KubeRay's own schema accept, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl
from hafnium_rollout_world import STABLE, START, rollout

from hafnium_rollout.kubernetes.client import connect
from hafnium_rollout.kubernetes.ray_jobs import RAY_JOB, RayJobStarter
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import Attempt
from hafnium_rollout.retraining.trigger import FileAttempts, Retraining, RetrainingTrigger, proposal
from hafnium_rollout.status import ModelSeen, RolloutStatus

pytestmark = pytest.mark.cluster
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
