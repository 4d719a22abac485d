"""An overlay of the repository in namespaces of a test's own: its images, small requests, an operator that sees nobody else's rollouts."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml
from hafnium_desk import PYTHON, Desk, image
from hafnium_kubectl import CLUSTER_WIDE, JSON, Kubectl, kustomized, moved

PARTS = ("rollout", "predictor", "transformer", "monitoring", "training")


@dataclass(frozen=True)
class Installed:
    """An overlay, and a pod `desk` in the models' namespace that has its volumes below /mnt."""

    system: Kubectl
    models: Kubectl

    @property
    def desk(self) -> Desk:
        return Desk(self.models, "/mnt")


def for_this_cluster(documents: list[JSON], system: str, models: str, settings: Mapping[str, str] | None = None) -> list[JSON]:
    """Images that the nodes have, an operator for one namespace alone, and requests that a small node can grant. Jobs come when called."""
    text = yaml.safe_dump_all(moved(documents, {"hafnium-system": system, "risk": models}, system))
    for part in PARTS:
        here = f"ghcr.io/hafnium/hafnium-{part}:0.1.0"
        text = text.replace(here, image(part)) if here in text else text
    out = list(yaml.safe_load_all(text))
    own = {"NAMESPACE": models, "LEASE_NAMESPACE": system, "LOOK_S": "2", **(settings or {})}
    for d in out:
        if d["kind"] == "ConfigMap" and d["metadata"]["name"].startswith("hafnium-rollout-settings"):
            d["data"] |= {f"HAFNIUM_OPERATOR_{k}": v for k, v in own.items()}
        if d["kind"] == "CronJob":
            d["spec"]["suspend"] = True
        lessen(d)
    return out


def lessen(value: Any) -> None:
    """Requests that fit a node with two cores for everything; limits stay."""
    if isinstance(value, dict):
        requests = value.get("requests")
        if isinstance(requests, dict) and "cpu" in requests:
            requests |= {"cpu": "20m", "memory": "64Mi"}
        for v in value.values():
            lessen(v)
    elif isinstance(value, list):
        for v in value:
            lessen(v)


@contextmanager
def installed(types: Kubectl, suffix: str, documents: list[JSON], claims: tuple[str, ...]) -> Generator[Installed]:
    """Applies them, gives a desk with the volumes, and takes all of it away again."""
    system, models = f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk"
    try:
        types("apply", "-f", "-", given=documents)
        made = Installed(replace(types, namespace=system), replace(types, namespace=models))
        made.models("apply", "-f", "-", given=desk_pod(claims))
        made.models("wait", "--for=condition=Ready", "pod/desk", "--timeout=55s")
        yield made
    finally:
        types("delete", "namespace", system, models, "--ignore-not-found", "--wait=false")
        types("delete", "--ignore-not-found", "--wait=false", "-f", "-", given=[d for d in documents if d["kind"] in CLUSTER_WIDE])


def overlay(name: str) -> list[JSON]:
    """One of kustomize/overlays, rendered."""
    return kustomized(f"kustomize/overlays/{name}")


def desk_pod(claims: tuple[str, ...]) -> JSON:
    """A pod that holds the volumes, as restricted as all others."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "desk"}, "spec": {
        "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims],
        "containers": [{
            "name": "desk", "image": image("predictor"), "command": [PYTHON, "-c", "import time; time.sleep(7200)"],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [{"name": c, "mountPath": f"/mnt/{c}"} for c in claims],
        }],
    }}
