"""kubectl for tests: the real one, as an admin or in somebody else's name, and the repository's kustomizations in a test's own names."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
SEEN_S_MAX = 30.0
JSON = dict[str, Any]
CLUSTER_WIDE = frozenset({
    "ClusterRole", "ClusterRoleBinding", "ClusterStorageContainer", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"})


@dataclass(frozen=True)
class Kubectl:
    """Commands in one namespace. `user` and `groups`: in whose name (impersonation)."""

    namespace: str = ""
    user: str = ""
    groups: tuple[str, ...] = ()

    def of(self, user: str, *groups: str) -> Kubectl:
        """The same in somebody else's name."""
        return replace(self, user=user, groups=groups)

    def account(self, name: str, namespace: str = "") -> Kubectl:
        """The same as a service account."""
        return self.of(f"system:serviceaccount:{namespace or self.namespace}:{name}")

    def run(self, *arguments: str, given: Any = None) -> subprocess.CompletedProcess[str]:
        """Runs it, whatever comes of it. `given`: one document, or several, for standard input."""
        text = None
        if given is not None:
            text = yaml.safe_dump_all(given if isinstance(given, list) else [given])
        where = ["-n", self.namespace] if self.namespace else []
        who = ["--as", self.user] if self.user else []
        who += [f"--as-group={g}" for g in self.groups]
        return subprocess.run(
            ["kubectl", *arguments, *where, *who], input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    def __call__(self, *arguments: str, given: Any = None) -> str:
        """Runs it; what it says. Fails the test when kubectl does."""
        done = self.run(*arguments, given=given)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def refused(self, *arguments: str, given: Any = None) -> str:
        """Runs it, and it must be refused; with which words."""
        done = self.run(*arguments, given=given)
        assert done.returncode != 0, f"kubectl {' '.join(arguments)} was not refused: {done.stdout}"
        return done.stderr

    def read(self, *arguments: str) -> JSON:
        """`kubectl get … -o json`."""
        return json.loads(self("get", *arguments, "-o", "json"))

    def established(self, *crds: str) -> None:
        """Waits until the API server serves these. `kubectl wait` gives up on one that has no conditions yet, just after it was made."""
        until = time.monotonic() + SEEN_S_MAX
        waiting = ("wait", "--for=condition=Established", *crds, "--timeout=30s")
        while "accessor error" in self.run(*waiting).stderr and time.monotonic() < until:
            time.sleep(0.2)
        self(*waiting)

    def can(self, verb: str, resource: str, *more: str) -> bool:
        """`kubectl auth can-i`."""
        return self.run("auth", "can-i", verb, resource, *more).stdout.strip() == "yes"


def sample(name: str) -> JSON:
    """One of kustomize/samples."""
    return yaml.safe_load((ROOT / "kustomize/samples" / f"{name}.yaml").read_text(encoding="utf-8"))


def kustomized(folder: str) -> list[JSON]:
    """What `kubectl kustomize` makes of a folder of the repository."""
    return list(yaml.safe_load_all(Kubectl()("kustomize", str(ROOT / folder))))


def renamed(documents: Sequence[JSON], namespace: str) -> list[JSON]:
    """The same objects for one test: in its namespace, cluster-wide ones under its own names, policies for its namespace only.

    A shared cluster's other users thus see nothing of it.
    """
    out = moved([d for d in documents if d["kind"] != "Namespace"], {}, namespace)
    for d in out:
        d["metadata"].pop("namespace", None)
        for subject in d.get("subjects", []):
            if subject["kind"] == "ServiceAccount":
                subject["namespace"] = namespace
    return out


def moved(documents: Sequence[JSON], namespaces: Mapping[str, str], suffix: str) -> list[JSON]:
    """The same objects in other namespaces, cluster-wide ones with a suffix, policies for those namespaces (or the suffix's) only."""
    out = list(yaml.safe_load_all(yaml.safe_dump_all(documents)))
    names = [d["metadata"]["name"] for d in out if d["kind"] in CLUSTER_WIDE]
    for d in out:
        meta = d["metadata"]
        if d["kind"] == "Namespace":
            meta["name"] = namespaces[meta["name"]]
        if meta.get("namespace") in namespaces:
            meta["namespace"] = namespaces[meta["namespace"]]
        if d["kind"] in CLUSTER_WIDE:
            meta["name"] += f"-{suffix}"
        for service in (d["spec"].get("service"), d["spec"]) if d["kind"] in ("ModelRollout", "InferenceService") else ():
            predictor = (service or {}).get("predictor", {})
            if predictor.get("storageContainerName") in names:
                predictor["storageContainerName"] += f"-{suffix}"
        if "roleRef" in d and d["roleRef"]["name"] in names:
            d["roleRef"]["name"] += f"-{suffix}"
        for subject in d.get("subjects", []):
            if subject.get("namespace") in namespaces:
                subject["namespace"] = namespaces[subject["namespace"]]
        if d["kind"] == "ValidatingAdmissionPolicyBinding":
            d["spec"]["policyName"] += f"-{suffix}"
            values = list(namespaces.values()) or [suffix]
            d["spec"]["matchResources"] = {"namespaceSelector": {"matchExpressions": [
                {"key": "kubernetes.io/metadata.name", "operator": "In", "values": values}]}}
    return out


def without_pods(documents: Sequence[JSON]) -> list[JSON]:
    """Accounts, rights and policies alone: whoever tests those starts programs of their own, or none."""
    return [d for d in documents if d["kind"] not in ("Deployment", "StatefulSet", "Service", "PodDisruptionBudget")]


def role_binding(name: str, role: str, subject: str, kind: str = "User", role_kind: str = "ClusterRole") -> JSON:
    """A RoleBinding for one user or group."""
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": role_kind, "name": role}, "subjects": [{"apiGroup": group, "kind": kind, "name": subject}],
    }


def eventually(check: Callable[[], bool], what: str) -> None:
    """Waits until `check()` is true: the API server's caches follow a write by some moments."""
    end = time.monotonic() + SEEN_S_MAX
    while not check():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {SEEN_S_MAX:g} s")
        time.sleep(0.2)
