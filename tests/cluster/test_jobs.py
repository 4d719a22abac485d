"""The jobs in a cluster, by their images, in a namespace where Pod Security is `restricted`: drift, materialisation, training, MLflow.

HAFNIUM_MONITORING_IMAGE and HAFNIUM_TRAINING_IMAGE name images that the nodes have; `make test-cluster` builds them.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hafnium_desk import image
from hafnium_inference_log import write_log
from hafnium_kubectl import JSON, Kubectl, kustomized, sample

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle, synthetic_matrix

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2_000)]
ROOT = Path(__file__).parents[2]
PYTHON = "/opt/hafnium/bin/python"
CLAIMS = ("bundles", "inference-log", "features", "training")
LENGTH = timedelta(minutes=10)
SMALL: JSON = {"requests": {"cpu": "50m", "memory": "128Mi"}}
"""Of a node that has two cores for everything; the limits stay."""
CONTAINER: JSON = {
    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
    "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
}
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.stdin.read(), timeout=30).read().decode())"
COUNT = """
import sqlite3, sys
db = sqlite3.connect("file:/data/features/online.db?mode=ro", uri=True)
tables = [row[0] for row in db.execute("select name from sqlite_master where type = 'table'")]
print(sum(db.execute(f'select count(*) from "{name}"').fetchone()[0] for name in tables))
"""


@dataclass(frozen=True)
class Desk:
    """A pod that has all volumes: puts files there, looks at them, asks services."""

    kubectl: Kubectl

    def run(self, code: str, given: bytes = b"") -> str:
        done = subprocess.run(
            ["kubectl", "-n", self.kubectl.namespace, "exec", "-i", "desk", "--", PYTHON, "-c", code], input=given, capture_output=True,
            timeout=180, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def put(self, source: Path, place: str) -> None:
        """Copies a file or folder of this machine to /data/PLACE."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(source, arcname=place)
        self.run(
            "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall('/data')", packed.getvalue())

    def ask(self, url: str) -> Any:
        return json.loads(self.run(ASK, url.encode()))


def until(check: Callable[[], bool], what: str, seconds: float, said: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s\n{said()}"
        time.sleep(2)


def lessened(item: Any) -> Any:
    """The same object with small requests, wherever it has containers."""
    if isinstance(item, dict):
        return {k: {**v, **SMALL} if k == "resources" and "limits" in v else lessened(v) for k, v in item.items()}
    return [lessened(x) for x in item] if isinstance(item, list) else item


def rendered(name: str, kind: str) -> JSON:
    """One object of the overlay, with the images of this test."""
    (item,) = [d for d in kustomized("tests/cluster/jobs") if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    text = json.dumps(lessened(item))
    for part in ("monitoring", "training"):
        named = rf'"image": "[^"]*hafnium-{part}(:[^"]*)?"'
        if re.search(named, text):
            text = re.sub(named, f'"image": "{image(part)}"', text)
    made = json.loads(text)
    if kind == "CronJob":
        made["spec"]["suspend"] = True  # jobs start when the test says so
    return made


@pytest.fixture(scope="module")
def desk(namespaced: Kubectl) -> Desk:
    namespaced("label", "namespace", namespaced.namespace, "pod-security.kubernetes.io/enforce=restricted")
    claims = [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
               "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}} for name in CLAIMS]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "desk"}, "spec": {
        "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False,
        "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in CLAIMS],
        "containers": [{
            "name": "desk", "image": image("monitoring"), "imagePullPolicy": "IfNotPresent", "securityContext": CONTAINER,
            "command": [PYTHON, "-c", "import time; time.sleep(7200)"], "resources": SMALL,
            "volumeMounts": [{"name": name, "mountPath": f"/data/{name}"} for name in CLAIMS],
        }],
    }}
    namespaced("apply", "-f", "-", given=[*claims, pod])
    namespaced("wait", "--for=condition=Ready", "pod/desk", "--timeout=55s")
    return Desk(namespaced)


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(ROOT / "examples/unified-risk/contract.yaml")


def job_from(kubectl: Kubectl, cronjob: str, name: str) -> str:
    """Runs the CronJob's job now; what it said. It must complete."""
    kubectl("create", "job", f"--from=cronjob/{cronjob}", name)

    def ended() -> bool:
        status = kubectl.read("job", name)["status"]
        return bool(status.get("succeeded") or any(c["type"] == "Failed" for c in status.get("conditions", [])))

    def said() -> str:
        return kubectl.run("logs", f"job/{name}").stdout + kubectl.run("describe", "pods", "-l", f"job-name={name}").stdout[-3_000:]

    until(ended, f"job {name} ends", 300, said)
    assert kubectl.read("job", name)["status"].get("succeeded") == 1, said()
    return kubectl("logs", f"job/{name}")


@pytest.fixture(scope="module")
def rollout(desk: Desk, contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A candidate at 25 %, whose geo_risk_score is always 0, and ten minutes and more of traffic of both arms."""
    folder = tmp_path_factory.mktemp("drift")
    stable = make_bundle(folder / "v1", contract, version="1", seed=1, rows=5_000)
    candidate = make_bundle(folder / "v2", contract, version="2", seed=2, rows=5_000)
    now = datetime.now(UTC)
    begin = datetime.fromtimestamp(now.timestamp() // LENGTH.total_seconds() * LENGTH.total_seconds(), UTC) - 2 * LENGTH
    rows = np.random.default_rng(3).permutation(synthetic_matrix(contract, 16_000, seed=77))
    moved = rows[:8_000].copy()
    moved[:, contract.input_names.index("geo_risk_score")] = 0.0
    # the last whole window of the grid; the one before it, while rows may still be late (settle_s); and the one after it, should the job
    # start that late
    seconds = 4 * LENGTH.total_seconds()
    write_log(folder / "log", candidate, moved, "candidate", start=begin, seconds=seconds, ids="c", files=6)
    write_log(folder / "log", stable, rows[8_000:], "stable", start=begin, seconds=seconds, ids="s", files=6)
    for bundle, name in ((stable, "v1"), (candidate, "v2")):
        desk.put(bundle.path, f"bundles/{name}")
    for day in (folder / "log").iterdir():
        desk.put(day, f"inference-log/{day.name}")
    item = sample("modelrollout")
    item["metadata"]["name"] = "jobs"
    item["spec"].pop("approvals")
    item["spec"]["model"] |= {"version": "2", "storageUri": "pvc://bundles/v2", "digest": candidate.manifest.digest}
    kubectl = desk.kubectl
    kubectl("apply", "-f", "-", given=item)
    effective = (begin - timedelta(minutes=5)).isoformat()
    status = {
        "phase": "Progressing",
        "stable": {"service": "jobs-1", "digest": stable.manifest.digest, "storageUri": "pvc://bundles/v1", "version": "1"},
        "candidate": {"service": "jobs-2", "digest": candidate.manifest.digest, "storageUri": "pvc://bundles/v2", "version": "2"},
        "step": {"index": 1, "enteredAt": effective, "weightDesired": 25, "weightObserved": 25, "weightEffectiveSince": effective},
    }
    kubectl("patch", "modelrollout", "jobs", "--type=merge", "--subresource=status", "-p", json.dumps({"status": status}))
    for name, kind in (("hafnium-monitoring", "ServiceAccount"), ("hafnium-monitoring", "Role"), ("hafnium-monitoring", "RoleBinding")):
        made = rendered(name, kind)
        for subject in made.get("subjects", []):
            subject["namespace"] = kubectl.namespace
        kubectl("apply", "-f", "-", given=made)
    job = rendered("hafnium-drift", "CronJob")
    args = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
    args[args.index("--window=1h")] = f"--window={int(LENGTH.total_seconds())}s"
    kubectl("apply", "-f", "-", given=job)
    return stable, candidate


def test_the_drift_cronjob_writes_evidence_about_the_candidate_that_drifted(desk: Desk, rollout: tuple[Bundle, Bundle]) -> None:
    _, candidate = rollout
    said = job_from(desk.kubectl, "hafnium-drift", "drift-1")
    (evidence,) = desk.kubectl.read("modelevidences", "--show-managed-fields")["items"]
    spec = evidence["spec"]
    assert spec["modelDigest"] == candidate.manifest.digest
    assert (spec["kind"], spec["verdict"]) == ("drift", "Fail"), spec["message"]
    drifted = {v["name"] for v in spec["values"] if v["drifted"] and v["comparedWith"] == "stable"}
    assert "geo_risk_score" in drifted
    start, end = (datetime.fromisoformat(spec[k]) for k in ("windowStart", "windowEnd"))
    assert end - start == LENGTH
    assert "Fail" in said
    assert evidence["metadata"]["managedFields"][0]["manager"] == "hafnium-monitoring"


def test_the_same_window_is_written_once_however_often_the_job_runs(desk: Desk, rollout: tuple[Bundle, Bundle]) -> None:
    job_from(desk.kubectl, "hafnium-drift", "drift-2")
    job_from(desk.kubectl, "hafnium-drift", "drift-3")
    ends = [e["spec"]["windowEnd"] for e in desk.kubectl.read("modelevidences")["items"]]
    assert len(ends) == len(set(ends))
    assert len(ends) <= 2, "a window of ten minutes may have ended meanwhile"


def test_a_job_without_the_right_says_so_and_writes_nothing(desk: Desk, rollout: tuple[Bundle, Bundle]) -> None:
    job = rendered("hafnium-drift", "CronJob")
    job["metadata"]["name"] = "no-rights"
    job["spec"]["jobTemplate"]["spec"]["backoffLimit"] = 0
    job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"] = "default"
    kubectl = desk.kubectl
    kubectl("apply", "-f", "-", given=job)
    before = len(kubectl.read("modelevidences")["items"])
    kubectl("create", "job", "--from=cronjob/no-rights", "no-rights")

    def failed() -> bool:
        return any(c["type"] == "Failed" for c in kubectl.read("job", "no-rights")["status"].get("conditions", []))

    until(failed, "the job fails", 180)
    said = kubectl("logs", "job/no-rights")
    assert "cannot list resource" in said
    assert "see kustomize/base/monitoring" in said
    assert len(kubectl.read("modelevidences")["items"]) == before


def test_materialisation_fills_the_online_store(desk: Desk, contract: ModelContract, tmp_path: Path) -> None:
    from hafnium_training.feature_store import write_repo
    from hafnium_training.simulation import simulate

    kubectl = desk.kubectl
    for name, kind in (("hafnium-features", "ServiceAccount"), ("hafnium-materialise", "CronJob")):
        kubectl("apply", "-f", "-", given=rendered(name, kind))
    simulate(tmp_path / "data", days=10, seed=7, transactions_per_day=100)
    repo = write_repo(contract, tmp_path / "data", tmp_path / "repo").path
    for path in repo.iterdir():
        desk.put(path, f"features/{path.name}")
    desk.put(ROOT / "examples/unified-risk/contract.yaml", "features/contract.yaml")
    job = rendered("hafnium-materialise", "CronJob")
    spec = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    # simulated days are long past: materialise as of their end, and not as of now
    spec["args"].append("--until=" + json.loads((tmp_path / "data/summary.json").read_text())["end"])
    kubectl("apply", "-f", "-", given=job)
    said = job_from(kubectl, "hafnium-materialise", "materialise-1")
    assert "online store as of" in said
    assert int(desk.run(COUNT)) > 100


@pytest.fixture(scope="module")
def mlflow(desk: Desk) -> str:
    """The server's address, once it answers."""
    for name, kind in (("hafnium-mlflow", "ServiceAccount"), ("mlflow", "PersistentVolumeClaim"), ("hafnium-mlflow", "Service"),
                       ("hafnium-mlflow", "Deployment")):
        desk.kubectl("apply", "-f", "-", given=rendered(name, kind))

    def available() -> bool:
        return (desk.kubectl.read("deployment", "hafnium-mlflow")["status"].get("availableReplicas") or 0) == 1

    until(available, "MLflow answers", 400, lambda: desk.kubectl.run("logs", "deploy/hafnium-mlflow").stdout[-3_000:])
    return "http://hafnium-mlflow:5000"


def test_mlflow_answers_under_its_name_and_under_no_other(desk: Desk, mlflow: str) -> None:
    found = desk.ask(f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
    assert found["experiment"]["lifecycle_stage"] == "active"
    refused = desk.run(
        "import urllib.error, urllib.request\n"
        f"r = urllib.request.Request('{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0', headers={{'Host': 'evil.example'}})\n"
        "try: print(urllib.request.urlopen(r, timeout=30).status)\n"
        "except urllib.error.HTTPError as e: print(e.code)")
    assert refused.strip() == "403"


BOTH_WORKERS = (
    "python -c 'import ray, time; ray.init(); "
    "[time.sleep(1) for _ in iter(lambda: ray.cluster_resources().get(\"CPU\", 0) < 2, False)]'"
)
"""Shell: waits until Ray has the CPUs of two workers; the head has none."""


def test_a_rayjob_searches_on_two_workers_and_registers_the_model(desk: Desk, mlflow: str, tmp_path: Path) -> None:
    import pandas as pd
    from hafnium_training_cases import write_lender  # imports torch

    kubectl = desk.kubectl
    if kubectl.run("get", "crd", "rayjobs.ray.io").returncode != 0:
        pytest.skip("NOT TESTED: this cluster doesn't know RayJob; install KubeRay")
    # So many rows that a trial takes longer than the second worker's process needs to begin: until then the first takes every trial
    contract, data = write_lender(tmp_path / "lender", rows=40_000)
    pd.read_csv(data).to_parquet(tmp_path / "training.parquet")
    desk.put(contract, "training/contract.yaml")
    desk.put(tmp_path / "training.parquet", "training/training.parquet")
    kubectl("apply", "-f", "-", given=rendered("hafnium-training", "ServiceAccount"))
    job = rendered("hafnium-training", "RayJob")
    job["spec"]["entrypoint"] = f"{BOTH_WORKERS} && {job['spec']['entrypoint']}"
    kubectl("apply", "-f", "-", given=job)

    def state() -> str:
        return str(kubectl.read("rayjob", "hafnium-training").get("status", {}).get("jobStatus", ""))

    def said() -> str:
        pods = kubectl.run("get", "pods", "-o", "wide").stdout
        return f"{state()}\n{pods}\n{kubectl('get', 'rayjob', 'hafnium-training', '-o', 'yaml')[-3_000:]}"

    until(lambda: state() in ("SUCCEEDED", "FAILED", "STOPPED"), "the RayJob ends", 1_200, said)
    assert state() == "SUCCEEDED", said()
    found: dict[str, str] = json.loads(desk.run(
        "import json, pathlib\n"
        "print(json.dumps({p.parent.name: p.read_text() for p in pathlib.Path('/data/training/bundles').glob('*/manifest.json')}))"))
    ((name, text),) = found.items()
    assert name.startswith("hafnium-training"), f"{name}: named after the RayJob"
    manifest = json.loads(text)
    (version,) = desk.ask(f"{mlflow}/api/2.0/mlflow/model-versions/search?filter=name%3D%27lender%27")["model_versions"]
    tags = {t["key"]: t["value"] for t in version["tags"]}
    assert tags["hafnium.bundle_digest"] == manifest["digest"]
    runs = json.loads(desk.run(
        "import json, sys, urllib.request\n"
        f"e = json.load(urllib.request.urlopen('{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=lender', timeout=30))\n"
        "body = json.dumps({'experiment_ids': [e['experiment']['experiment_id']]}).encode()\n"
        f"r = urllib.request.Request('{mlflow}/api/2.0/mlflow/runs/search', body, {{'content-type': 'application/json'}})\n"
        "print(urllib.request.urlopen(r, timeout=30).read().decode())"))["runs"]
    nodes = [t["value"] for r in runs for t in r["data"]["tags"] if t["key"] == "hafnium.node"]
    assert len(nodes) == 8
    assert len(set(nodes)) == 2, f"trials on {nodes}"
    assert all("trials-worker" in n for n in nodes)
