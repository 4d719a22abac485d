"""The quickstart on a real cluster, word for word: README's two commands, and how docs/kubernetes.md has the first bundle come in.

With released names, so for a cluster that nobody else installs into: its operator watches all namespaces, and its admission policies
hold in all of them. No other suite may run beside it.
"""

from __future__ import annotations

import http.client
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hafnium_kubectl import CLUSTER_WIDE, ROOT, Kubectl
from hafnium_operator import GATEWAY, host, until
from hafnium_servers import make_feature_repo

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_testing import make_bundle, synthetic_rows, synthetic_views

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2_400)]
SYSTEM, MODELS = "hafnium-system", "risk"
OURS = "hafnium.dev/test"
"""A label of namespaces that a test made."""
READY_S = 500.0
"""A limit and no measurement."""
FOLDERS = {"predictor": "predictors", "transformer": "transformers", "rollout": "rollouts"}


def commands() -> list[list[str]]:
    """The `kubectl apply` lines of README's section about clusters."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## On a cluster\n")[2].partition("\n## ")[0]
    return [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("kubectl apply")]


def first_bundle() -> str:
    """The script of docs/kubernetes.md."""
    section = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8").partition("\n## The first bundle\n")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


def provide_images(kubectl: Kubectl) -> None:
    """The released images on the nodes; beside the cluster of the repository's neighbour they are built. Skips where they aren't."""
    documents = yaml.safe_load_all((ROOT / "manifests/dev.yaml").read_text(encoding="utf-8"))
    servers = yaml.safe_dump_all([d for d in documents if d["kind"] != "CronJob"])  # a job's is pulled when its hour comes
    wanted = set(re.findall(r"image: (\S*/hafnium-\S+)", servers))
    tool = shutil.which("image") or str(ROOT.parent / "shared/cluster/image")
    for name in sorted(wanted) if Path(tool).is_file() else ():  # always: one of this name may be of yesterday's code
        (folder,) = (f for part, f in FOLDERS.items() if f"hafnium-{part}:" in name)
        subprocess.run([tool, name, ".", f"{folder}/Dockerfile"], cwd=ROOT, check=True, timeout=900, capture_output=True)
    there = {n for node in kubectl.read("nodes")["items"] for i in node["status"].get("images", []) for n in i.get("names") or []}
    if missing := wanted - there:
        pytest.skip(f"NOT TESTED: the nodes haven't got {sorted(missing)}; docs/kubernetes.md, \"kind\", says how they get them")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    contract = load_contract(ROOT / "examples/unified-risk/contract.yaml")
    return make_bundle(tmp_path_factory.mktemp("bundles") / "v1", contract, version="1", bias=-1.5)


def take_away(kubectl: Kubectl) -> None:
    """Everything but the types."""
    kubectl("delete", "namespace", SYSTEM, MODELS, "--ignore-not-found", "--wait=false")
    documents = yaml.safe_load_all((ROOT / "manifests/install.yaml").read_text(encoding="utf-8"))
    kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", given=[d for d in documents if d["kind"] in CLUSTER_WIDE])
    until(lambda: all(kubectl.run("get", "namespace", n).returncode for n in (SYSTEM, MODELS)), "the namespaces are gone", READY_S)


@pytest.fixture(scope="module")
def said(cluster: Kubectl) -> Iterator[list[str]]:
    """What kubectl said to each command. All of it is taken away again."""
    for name in (SYSTEM, MODELS):
        done = cluster.run("get", "namespace", name, "-o", "json")
        if done.returncode == 0 and OURS not in json.loads(done.stdout)["metadata"].get("labels", {}):
            pytest.skip(f"NOT TESTED: somebody's namespace {name} is in this cluster already")
    take_away(cluster)  # of a run that was killed
    provide_images(cluster)
    try:
        out: list[str] = []
        for argv in commands():
            done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
            # First of all, so that what a killed run leaves is known as a test's (.ci/cluster looks for it, too)
            cluster.run("label", "namespace", "--overwrite", SYSTEM, MODELS, f"{OURS}=quickstart")
            assert done.returncode == 0, f"{shlex.join(argv)}: {done.stderr}"
            out.append(done.stdout + done.stderr)
        yield out
    finally:
        take_away(cluster)


def test_the_readme_has_the_commands_that_install() -> None:
    assert commands() == [
        ["kubectl", "apply", "-f", "manifests/crds.yaml", "-f", "manifests/install.yaml"],
        ["kubectl", "apply", "-k", "kustomize/overlays/dev"],
    ]


def test_types_operator_and_policies_come_with_the_first_command(cluster: Kubectl, said: list[str]) -> None:
    assert "modelrollouts.hafnium.dev" in said[0]
    system = replace(cluster, namespace=SYSTEM)
    until(lambda: system.read("deployment", "hafnium-rollout-operator")["status"].get("readyReplicas") == 2, "two operators", READY_S)
    assert system.read("lease", "hafnium-rollout-operator")["spec"]["holderIdentity"]
    cluster("get", "modelrollouts", "-A")  # in other namespaces there may be some
    cluster("explain", "modelrollout.spec.gates")


def test_the_model_answers_once_its_files_are_there(cluster: Kubectl, said: list[str], bundle: Bundle, tmp_path: Path) -> None:
    assert "inferenceservice.serving.kserve.io/unified-risk created" in said[1]
    make_feature_repo(tmp_path / "build/features", bundle.contract, synthetic_views(bundle.contract, 1))
    shutil.copytree(bundle.path, tmp_path / "build/v1")
    (tmp_path / "kustomize").symlink_to(ROOT / "kustomize")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", first_bundle()], cwd=tmp_path, capture_output=True, text=True, timeout=1_300,
                          check=False)
    models = replace(cluster, namespace=MODELS)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{models('get', 'pods')}"
    row = synthetic_rows(bundle.contract, 1, 5)[0]

    def asked() -> dict[str, Any] | None:
        """Through the gateway, which hears of a service when it is ready, and not before."""
        connection = http.client.HTTPConnection(urlsplit(GATEWAY).netloc, timeout=10)
        try:
            headers = {"content-type": "application/json", "host": host("unified-risk", MODELS)}
            connection.request("POST", "/v1/score", json.dumps(row), headers)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status in (200, 404, 502, 503), body
            return json.loads(body) if answer.status == 200 else None
        finally:
            connection.close()

    answer = until(asked, "the gateway knows the service")
    assert answer["model_version"] == "1"
    assert 0.0 <= answer["score"] <= 1.0


@pytest.mark.parametrize(("namespace", "deployment", "package"), [
    (SYSTEM, "hafnium-rollout-operator", "pydantic"), (MODELS, "unified-risk-transformer", "feast"),
    (MODELS, "unified-risk-predictor", "onnxruntime")])
def test_an_image_says_what_is_in_it(cluster: Kubectl, said: list[str], namespace: str, deployment: str, package: str) -> None:
    sbom = json.loads(cluster("exec", "-n", namespace, f"deployment/{deployment}", "--", "cat", "/opt/hafnium/app/sbom.cdx.json"))
    assert sbom["bomFormat"] == "CycloneDX"
    assert package in {c["name"] for c in sbom["components"]}
