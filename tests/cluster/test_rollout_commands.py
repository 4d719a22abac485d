"""`hafnium rollout …` and `kubectl hafnium …` against a real API server: what they read, what they write, and in whose name."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hafnium_kubectl import ROOT, Kubectl, eventually, kustomized, renamed, role_binding, sample
from hafnium_rollout_world import World

from hafnium_rollout.kubernetes.client import connect
from hafnium_rollout.kubernetes.kinds import MODEL_ROLLOUT
from hafnium_rollout.kubernetes.store import MANAGER
from hafnium_rollout.objects import parse_rollout
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.status import stored

pytestmark = pytest.mark.cluster
NAME = "risk"


def hafnium(*args: str, kubeconfig: Path | None = None, module: str = "hafnium_local") -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    env = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"} | ({"KUBECONFIG": str(kubeconfig)} if kubeconfig is not None else {})
    return subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.fixture
def rollout(namespaced: Kubectl) -> dict[str, Any]:
    """A ModelRollout at its first step, as the operator left it."""
    data = sample("modelrollout")
    data["metadata"] = {"name": NAME, "namespace": namespaced.namespace}
    spec = parse_rollout(data, "sample")
    world = World(spec.model_copy(update={"metadata": spec.metadata.model_copy(update={"name": "risk"})}))
    world.approvals = frozenset(spec.spec.approvals.required)
    for _ in range(8):
        world.turn()
    assert world.status.phase == "Progressing"
    namespaced("apply", "-f", "-", given={**rollout_data(spec), "apiVersion": "hafnium.dev/v1alpha1"})
    connect().merge(MODEL_ROLLOUT, namespaced.namespace, NAME, {"spec": {"action": None}})  # of the test before: nobody acts on it
    connect().merge(MODEL_ROLLOUT, namespaced.namespace, NAME, {"status": stored(world.status)}, subresource="status")
    return data


@pytest.mark.usefixtures("rollout")
def test_status_and_report_are_read_from_the_cluster(namespaced: Kubectl, tmp_path: Path) -> None:
    done = hafnium("rollout", "status", "-n", namespaced.namespace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:4] == [NAME, "Progressing", "0", "shadow"]
    found = json.loads(hafnium("rollout", "status", NAME, "-n", namespaced.namespace, "--json").stdout)
    assert {g["name"] for g in found["rollouts"][0]["gates"]} >= {"errors", "latency"}
    page = tmp_path / "report.html"
    done = hafnium("rollout", "report", NAME, "-n", namespaced.namespace, "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "is under way at step 0, in shadow" in re.sub("<[^>]*>", "", page.read_text())


def acted_on(namespaced: Kubectl) -> None:
    """The operator has done what was asked last, as far as its status says."""
    ids = [namespaced.read("modelrollout", NAME)["spec"]["action"]["id"]]
    connect().merge(MODEL_ROLLOUT, namespaced.namespace, NAME, {"status": {"handledActions": ids}}, subresource="status")


@pytest.mark.usefixtures("rollout")
def test_a_wish_that_waits_is_replaced_by_an_abort_only(namespaced: Kubectl) -> None:
    place = ("-n", namespaced.namespace, "--reason", "CHG-2")
    for verb in ("skip", "abort", "abort"):
        done = hafnium("rollout", verb, NAME, *place)
        assert done.returncode == 0, done.stderr
    assert "it takes the place of an earlier wish" in done.stdout
    before = namespaced.read("modelrollout", NAME)
    done = hafnium("rollout", "skip", NAME, *place)
    assert done.returncode == 1
    assert re.search(r"asked for Abort of sha256:\w+ at [-\dT:]+Z \(CHG-2\), and the operator hasn't acted on it", done.stderr)
    assert namespaced.read("modelrollout", NAME) == before
    acted_on(namespaced)
    assert hafnium("rollout", "skip", NAME, *place).returncode == 0


@pytest.mark.usefixtures("rollout")
@pytest.mark.parametrize(("verb", "kind"), [("promote", "Promote"), ("skip", "SkipStep"), ("abort", "Abort"), ("retry", "Retry")])
def test_a_wish_is_spec_action_under_a_manager_of_its_own_and_nothing_else(namespaced: Kubectl, verb: str, kind: str) -> None:
    before = namespaced.read("modelrollout", NAME, "--show-managed-fields")
    for reason in ("CHG-1", "once more"):
        done = hafnium("rollout", verb, NAME, "-n", namespaced.namespace, "--reason", reason)
        assert done.returncode == 0, done.stderr
        acted_on(namespaced)
    after = namespaced.read("modelrollout", NAME, "--show-managed-fields")
    action = after["spec"].pop("action")
    before["spec"].pop("action", None)
    assert after["spec"] == before["spec"]
    assert (action["type"], action["reason"]) == (kind, "once more")
    assert action["candidateDigest"] == before["spec"]["model"]["digest"]
    assert action["requestedBy"], "the name that the API server knows the caller by"
    mine = next(m for m in after["metadata"]["managedFields"] if m["manager"] == MANAGER)
    assert set(mine["fieldsV1"]) == {"f:spec"}
    assert set(mine["fieldsV1"]["f:spec"]) == {"f:action"}


def test_an_approval_is_an_object_in_the_callers_own_name(namespaced: Kubectl, rollout: dict[str, Any]) -> None:
    model = rollout["spec"]["model"]
    asked = ("rollout", "approve", NAME, "--stage", "security", "-n", namespaced.namespace)
    refused = hafnium(*asked)
    assert refused.returncode == 2, refused.stdout
    assert f"version {model['version']}, {model['digest']}, trained by {model['trainedBy']}" in refused.stderr
    assert namespaced.read("modelapprovals")["items"] == []
    line = next(x for x in refused.stderr.splitlines() if "--digest" in x)
    done = hafnium(*shlex.split(line)[1:])  # word for word
    assert done.returncode == 0, done.stderr
    found = namespaced.read("modelapprovals")["items"]
    who = json.loads(namespaced("auth", "whoami", "-o", "json"))["status"]["userInfo"]["username"]
    assert [(a["spec"]["stage"], a["spec"]["approver"], a["spec"]["modelDigest"]) for a in found] == [("security", who, model["digest"])]
    again = hafnium("rollout", "approve", NAME, "--stage", "validation", "--digest", model["digest"][:19], "-n", namespaced.namespace)
    assert again.returncode == 0, again.stderr
    assert len(namespaced.read("modelapprovals")["items"]) == 2


@pytest.mark.usefixtures("rollout")
def test_the_plugin_is_found_by_kubectl_and_takes_its_options_on_either_side(namespaced: Kubectl, tmp_path: Path) -> None:
    program = tmp_path / "kubectl-hafnium"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m hafnium_local.kubectl_plugin \"$@\"\n")
    program.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NO_COLOR": "1", "COLUMNS": "200"}

    def plugin(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["kubectl", "hafnium", *args], capture_output=True, text=True, env=env, timeout=120, check=False)

    for args in (("status", "-n", namespaced.namespace), ("-n", namespaced.namespace, "status", NAME)):
        done = plugin(*args)
        assert done.returncode == 0, done.stderr
        assert "Progressing" in done.stdout
    done = plugin("abort", "absent", "-n", namespaced.namespace)
    assert done.returncode == 2
    assert f"no ModelRollout 'absent' in namespace {namespaced.namespace}; there are: {NAME}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "apply" not in re.findall(r"^\W*(\w+)", plugin("--help").stdout, re.M)


@pytest.mark.usefixtures("rollout")
def test_who_may_only_look_is_refused_in_the_api_servers_words(namespaced: Kubectl, tmp_path: Path) -> None:
    namespace = namespaced.namespace
    before = namespaced.read("modelrollout", NAME)["spec"]
    roles = [d for d in renamed(kustomized("kustomize/base/access"), namespace) if d["kind"] == "ClusterRole"
             and d["metadata"]["name"].startswith("hafnium-viewer")]
    try:
        namespaced("apply", "-f", "-", given=roles)
        namespaced("create", "serviceaccount", "viewer")
        binding = role_binding("viewer", roles[0]["metadata"]["name"], "")
        binding["subjects"] = [{"kind": "ServiceAccount", "name": "viewer", "namespace": namespace}]
        namespaced("apply", "-f", "-", given=binding)
        token = namespaced("create", "token", "viewer").strip()
        config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        config["users"] = [{"name": "viewer", "user": {"token": token}}]
        context = {"cluster": config["clusters"][0]["name"], "user": "viewer", "namespace": namespace}
        config["contexts"] = [{"name": "look", "context": context}]
        config["current-context"] = "look"
        file = tmp_path / "kubeconfig"
        file.write_text(yaml.safe_dump(config))
        eventually(lambda: hafnium("rollout", "status", "--kubeconfig", str(file)).returncode == 0, "the viewer can't look")
        done = hafnium("rollout", "promote", NAME, "--context", "look", kubeconfig=file)
        assert done.returncode == 1
        assert "forbidden" in done.stderr
        assert "Traceback" not in done.stderr
        assert namespaced.read("modelrollout", NAME)["spec"] == before
    finally:
        namespaced.run("delete", "clusterrole", *[r["metadata"]["name"] for r in roles], "--ignore-not-found")


def test_the_record_is_not_on_the_cluster_and_the_command_says_where(namespaced: Kubectl, rollout: dict[str, Any]) -> None:
    assert rollout
    done = hafnium("rollout", "replay", NAME, "-n", namespaced.namespace)
    assert done.returncode == 2
    assert "on the operator's volume" in done.stderr
    assert (ROOT / "docs" / "rollout-commands.md").is_file()
