"""Predictor and transformer in a cluster, by their images: `modelFormat: onnx`, the custom container, and what a restart costs.

HAFNIUM_PREDICTOR_IMAGE and HAFNIUM_TRANSFORMER_IMAGE name images that the nodes have; `make test-cluster` builds them.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hafnium_desk import PYTHON, Desk, image
from hafnium_kubectl import JSON, Kubectl, eventually
from hafnium_servers import make_feature_repo

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle, synthetic_rows, synthetic_views

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
READY_S = "240s"
RESTRICTED: JSON = {
    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
    "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"},
}
PRESS = """
import json, os, sys, time, urllib.request
url, body, stop, seconds_max = json.load(sys.stdin)
data, good, bad, until = json.dumps(body).encode(), 0, [], time.monotonic() + seconds_max
print("pressing", flush=True)
while time.monotonic() < until and not os.path.exists(stop):
    try:
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()
        good += 1
    except Exception as e:
        bad.append(repr(e)[:200])
    time.sleep(0.02)
print(json.dumps({"good": good, "bad": bad[:5], "lost": len(bad)}))
"""


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(ROOT / "examples/unified-risk/contract.yaml")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, contract: ModelContract) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b1", contract, version="7", bias=-1.5)


@pytest.fixture(scope="module")
def desk(namespaced: Kubectl, bundle: Bundle, contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "files"},
             "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "100Mi"}}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "desk"}, "spec": {
        "terminationGracePeriodSeconds": 0, "volumes": [{"name": "files", "persistentVolumeClaim": {"claimName": "files"}}],
        "containers": [{
            "name": "desk", "image": image("predictor"), "imagePullPolicy": "IfNotPresent", "securityContext": {"runAsUser": 0},
            "command": [PYTHON, "-c", "import time; time.sleep(3600)"], "volumeMounts": [{"name": "files", "mountPath": "/data"}],
        }],
    }}
    namespaced("apply", "-f", "-", given=[claim, pod])
    namespaced("wait", "--for=condition=Ready", "pod/desk", "--timeout=50s")
    made = Desk(namespaced, "/data")
    made.put(bundle.path, "bundle")
    repo = tmp_path_factory.mktemp("feast") / "repo"
    make_feature_repo(repo, contract, synthetic_views(contract, 1))
    made.put(repo, "features")
    runtime = yaml.safe_load((ROOT / "kustomize/base/predictors/servingruntime.yaml").read_text())
    runtime["spec"]["containers"][0]["image"] = image("predictor")
    namespaced("apply", "-f", "-", given=runtime)
    return made


def service(name: str, bundle: str, transformer: bool) -> JSON:
    spec: JSON = {"predictor": {"model": {"modelFormat": {"name": "onnx"}, "storageUri": f"pvc://files/{bundle}"}}}
    if transformer:
        spec["transformer"] = {
            "volumes": [{"name": "files", "persistentVolumeClaim": {"claimName": "files"}}, {"name": "tmp", "emptyDir": {}}],
            "containers": [{
                "name": "kserve-container", "image": image("transformer"), "args": ["--feature_repo=/files/features"],
                "readinessProbe": {"httpGet": {"path": "/health/ready", "port": 8080}, "periodSeconds": 2},
                "lifecycle": {"preStop": {"sleep": {"seconds": 5}}}, "securityContext": RESTRICTED,
                "volumeMounts": [{"name": "files", "mountPath": "/files", "readOnly": True}, {"name": "tmp", "mountPath": "/tmp"}],
            }],
        }
    return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": name}, "spec": spec}


def wait_ready(kubectl: Kubectl, name: str) -> None:
    done = subprocess.run(
        ["kubectl", "-n", kubectl.namespace, "wait", "--for=condition=Ready", f"isvc/{name}", f"--timeout={READY_S}"],
        capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + kubectl("get", "pods") + kubectl.run("logs", "-l", f"app=isvc.{name}-transformer").stdout


@pytest.fixture(scope="module")
def chain(desk: Desk) -> Desk:
    desk.kubectl("apply", "-f", "-", given=service("risk", "bundle", True))
    wait_ready(desk.kubectl, "risk")
    return desk


def row(contract: ModelContract) -> JSON:
    return synthetic_rows(contract, 1, 5)[0]


def test_model_format_onnx_is_served_by_the_runtime_and_says_which_model_it_is(chain: Desk, bundle: Bundle) -> None:
    status, said = chain.ask("http://risk-predictor/v1/models/risk/contract")
    assert status == 200
    assert said["model_digest"] == bundle.manifest.digest
    assert said["model_version"] == "7"
    zeros = [0.0] * len(bundle.contract.inputs)
    status, said = chain.ask("http://risk-predictor/v1/models/risk:predict", {"instances": [zeros]})
    assert status == 200
    assert 0.0 <= said["predictions"][0] <= 1.0


def test_transformer_finds_features_and_predictor_through_kserves_arguments(chain: Desk, contract: ModelContract) -> None:
    status, said = chain.ask("http://risk-transformer/v1/score", {**row(contract), "explain": True})
    assert status == 200, said
    assert said["model_version"] == "7"
    assert 0.0 <= said["confidence_lower"] <= said["score"] <= said["confidence_upper"] <= 1.0
    assert said["explanation"]
    status, said = chain.ask("http://risk-transformer/v1/score", {"entity": {}, "features": {"nobody": 1}})
    assert status in (400, 422)
    assert "nobody" in json.dumps(said)


def test_bundle_that_was_changed_is_never_ready_and_says_why(desk: Desk, bundle: Bundle, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in bundle.path.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    (changed / "model.onnx").write_bytes((bundle.path / "model.onnx").read_bytes() + b"\0")
    desk.put(changed, "changed")
    desk.kubectl("apply", "-f", "-", given=service("changed", "changed", False))
    try:
        pods = ("pods", "-l", "serving.kserve.io/inferenceservice=changed")

        def pod_address() -> str:
            items = desk.kubectl.read(*pods)["items"]
            running = [p for p in items if p["status"].get("phase") == "Running" and p["status"]["containerStatuses"][0].get("started")]
            return running[0]["status"]["podIP"] if running else ""

        until = time.monotonic() + 240  # as long as the others get: an initializer copies the bundle first
        while not pod_address() and time.monotonic() < until:
            time.sleep(1)
        assert pod_address(), desk.kubectl("get", *pods) + desk.kubectl.run("describe", *pods).stdout[-2000:]
        said: JSON = {}

        def judged() -> bool:
            nonlocal said
            status, said = desk.ask(f"http://{pod_address()}:8080/health/ready")
            assert status == 503, said
            return not said["detail"].startswith("loading")

        eventually(judged, "the bundle is judged")
        assert "model.onnx" in said["detail"]
        time.sleep(15)  # longer than a liveness probe's period: it is not killed for being unready
        items = desk.kubectl.read(*pods)["items"]
        assert not items[0]["status"]["containerStatuses"][0]["ready"]
        assert items[0]["status"]["containerStatuses"][0]["restartCount"] == 0
    finally:
        desk.kubectl("delete", "isvc", "changed", "--wait=false")


def pods_of(kubectl: Kubectl, part: str) -> set[str]:
    return {p["metadata"]["name"] for p in kubectl.read("pods", "-l", f"component={part}")["items"]}


@pytest.mark.parametrize("part", ["predictor", "transformer"])
def test_rolling_restart_loses_no_request(chain: Desk, contract: ModelContract, part: str) -> None:
    kubectl = chain.kubectl
    pressing = subprocess.Popen(
        ["kubectl", "-n", kubectl.namespace, "exec", "-i", "desk", "--", PYTHON, "-c", PRESS], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True)
    try:
        assert pressing.stdin is not None
        assert pressing.stdout is not None
        pressing.stdin.write(json.dumps(["http://risk-transformer/v1/score", row(contract), f"/tmp/stop-{part}", 400]))
        pressing.stdin.close()
        assert pressing.stdout.readline().strip() == "pressing"
        before = pods_of(kubectl, part)
        # `kubectl rollout restart` writes into the Deployment, where KServe takes it back within the second: the pods stay
        restarted = {"spec": {part: {"annotations": {"hafnium.dev/restarted-at": f"{time.time():.0f}"}}}}
        kubectl("patch", "isvc", "risk", "--type", "merge", "-p", json.dumps(restarted))
        until = time.monotonic() + 300
        while before & pods_of(kubectl, part) and time.monotonic() < until:
            time.sleep(1)
        assert not before & pods_of(kubectl, part), "the old pod is still there"
        assert chain.ask("http://risk-transformer/v1/score", row(contract))[0] == 200
        chain.run("import sys; open(sys.stdin.read(), 'w').close()", f"/tmp/stop-{part}".encode())
        counted = json.loads(pressing.stdout.readline())
        assert counted["lost"] == 0, counted
        assert counted["good"] > 100
    finally:
        pressing.kill()
        pressing.wait()
