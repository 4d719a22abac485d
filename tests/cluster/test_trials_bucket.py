"""components/s3-trials on a real cluster: a RayJob keeps its search in a bucket, loses its head, and another head goes on with the search.

Needs KubeRay. The bucket is an S3 server of this machine, credentials and address come from the Secret `hafnium-s3`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import yaml
from hafnium_buckets import NAME as BUCKET
from hafnium_buckets import Bucket, bucket_with
from hafnium_desk import PYTHON, Desk, image
from hafnium_install import desk_pod, lessen
from hafnium_kubectl import JSON, Kubectl, kustomized
from hafnium_operator import until
from hafnium_s3 import KEY, SECRET
from hafnium_training_cases import write_lender
from pyarrow import fs

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2_000)]
BRIDGE = os.environ.get("HAFNIUM_TEST_BRIDGE", "10.88.0.1")
"""Where pods reach this machine."""
JOB = "hafnium-training"
START_S, SEARCH_S = 400.0, 1_000.0
"""Limits and no measurements."""
LOG = "import pathlib; print(''.join(p.read_text() for p in pathlib.Path('/tmp/ray').glob('session_2*/logs/job-driver-*.log')))"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with bucket_with({}, tmp_path_factory.mktemp("s3"), BRIDGE) as made:
        yield made


@pytest.fixture(scope="module")
def place(namespaced: Kubectl, bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """A namespace where Pod Security is `restricted`, with the account of the bucket and a training table on its volume."""
    if namespaced.run("get", "crd", "rayjobs.ray.io").returncode != 0:
        pytest.skip("NOT TESTED: this cluster doesn't know RayJob; install KubeRay")
    namespaced("label", "namespace", namespaced.namespace, "pod-security.kubernetes.io/enforce=restricted")
    account = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
               "AWS_ENDPOINT_URL": f"http://{bucket.address}"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hafnium-s3"}, "stringData": account}
    objects = [d for d in objects_of_the_overlay() if d["kind"] in ("ServiceAccount", "PersistentVolumeClaim")]
    namespaced("apply", "-f", "-", given=[secret, *objects, desk_pod(("training",))])
    namespaced("wait", "--for=condition=Ready", "pod/desk", "--timeout=55s")
    folder = tmp_path_factory.mktemp("lender")
    contract, data = write_lender(folder)
    pd.read_csv(data).to_parquet(folder / "training.parquet")
    desk = Desk(namespaced, "/mnt")
    desk.put(contract, "training/contract.yaml")
    desk.put(folder / "training.parquet", "training/training.parquet")
    return namespaced


def objects_of_the_overlay() -> list[JSON]:
    """As rendered, but for the image, small requests, and access modes that a node alone can give."""
    text = yaml.safe_dump_all(kustomized("tests/cluster/jobs-bucket"))
    text = re.sub(r"image: \S*hafnium-training\S*", f"image: {image('training')}", text)
    out = list(yaml.safe_load_all(text.replace("ReadWriteMany", "ReadWriteOnce")))
    for d in out:
        lessen(d)
    return out


def kept(bucket: Bucket) -> list[str]:
    """Files of unfinished searches."""
    found = bucket.files.get_file_info(fs.FileSelector(f"{BUCKET}/trials", recursive=True, allow_not_found=True))
    return [f.path for f in found if f.type == fs.FileType.File]


def ended_trials(bucket: Bucket) -> int:
    """How many trials the newest state in the bucket knows as ended."""
    states = sorted(f for f in kept(bucket) if re.search(r"/search-[0-9a-f]+/experiment_state-[^/]*\.json$", f))
    if not states:
        return 0
    state = json.loads(bucket.files.open_input_stream(states[-1]).read())
    return sum(json.loads(trial)["status"] == "TERMINATED" for trial, _runtime in state["trial_data"])


def heads(kubectl: Kubectl) -> list[str]:
    pods = kubectl.read("pods", "-l", "ray.io/node-type=head")["items"]
    return [p["metadata"]["name"] for p in pods if not p["metadata"].get("deletionTimestamp")]


def status(kubectl: Kubectl) -> JSON:
    found: JSON = kubectl.read("rayjob", JOB).get("status", {})
    return found


def told(kubectl: Kubectl) -> str:
    """What drivers said in the heads that are there."""
    where = ("exec", "-n", kubectl.namespace, "-c", "ray-head")
    return "".join(replace(kubectl, namespace="").run(*where, pod, "--", PYTHON, "-c", LOG).stdout for pod in heads(kubectl))


def waited(kubectl: Kubectl, check: Any, what: str, seconds: float) -> None:
    try:
        until(check, what, seconds)
    except AssertionError as e:
        pods = kubectl.run("get", "pods", "-o", "wide").stdout
        raise AssertionError(f"{e}\n{pods}\n{json.dumps(status(kubectl))[-2_000:]}\n{told(kubectl)[-3_000:]}") from e


def test_a_search_whose_head_is_lost_goes_on_from_the_bucket(place: Kubectl, bucket: Bucket) -> None:
    (job,) = [d for d in objects_of_the_overlay() if d["kind"] == "RayJob"]
    entrypoint = job["spec"]["entrypoint"]
    assert "--trial-storage s3://hafnium-risk/trials" in entrypoint
    # Without MLflow, which test_jobs.py has; enough trials that there is something left to do when the head is lost
    job["spec"]["entrypoint"] = entrypoint.replace(" --tracking http://hafnium-mlflow:5000", "").replace("--trials 8", "--trials 50")
    place("apply", "-f", "-", given=job)
    waited(place, lambda: ended_trials(bucket) >= 2, "the bucket knows of trials that ended", START_S)
    (lost,) = heads(place)
    place("delete", "pod", lost, "--wait=false", "--grace-period=0", "--force")
    waited(place, lambda: status(place).get("jobDeploymentStatus") in ("Complete", "Failed"), "the RayJob ends", SEARCH_S)
    assert status(place)["jobStatus"] == "SUCCEEDED", told(place)[-3_000:]
    said = told(place)
    assert lost not in heads(place)
    assert "going on with a search that was interrupted" in said, said[-3_000:]
    desk = Desk(place, "/mnt")
    manifests = json.loads(desk.run(
        "import json, pathlib\nprint(json.dumps([p.parent.name for p in pathlib.Path('/mnt/training/bundles').glob('*/manifest.json')]))"))
    assert manifests == [JOB], "one bundle, named after the RayJob"
    assert kept(bucket) == [], "a finished search leaves nothing behind"
    assert desk.run("import pathlib; print(pathlib.Path('/mnt/training/trials').exists())").strip() == "False"
