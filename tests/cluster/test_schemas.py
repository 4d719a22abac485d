"""The API server's own judgement of everything that is rendered: server-side dry run, with KServe's webhooks, in namespaces of the test.

Kinds that the cluster hasn't got are held against their CRDs, installed in a group of the test's own so that no controller takes them for
real: those that HAFNIUM_TEST_CRDS names (files or folders, by `:`), else, where there is Go, those of the module RELEASED, which Go fetches
and checks by its sum.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hafnium_kubectl import JSON, Kubectl, eventually, kustomized, moved
from hafnium_manifests import load

from hafnium_local.rendered_manifests import PRODUCTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
TEST_GROUP = "schemas.test"
RELEASED = ("github.com/prometheus-operator/prometheus-operator@v0.79.2", "example/prometheus-operator-crd")
"""The oldest release that docs/kubernetes.md asks for, and where its CRDs are."""
FETCH_S = 300


class _WithEquals(yaml.SafeLoader):
    """Reads a plain `=` as text, which YAML 1.1 has a type for and PyYAML no constructor: an enum of Prometheus' operator has one."""


_WithEquals.add_constructor("tag:yaml.org,2002:value", yaml.SafeLoader.construct_yaml_str)


def places() -> list[Path]:
    """Where CRDs of what isn't installed are."""
    named = os.environ.get("HAFNIUM_TEST_CRDS")
    if named is not None:
        return [Path(p) for p in named.split(":") if p]
    go = shutil.which("go")
    if go is None:
        return []
    argv = [go, "mod", "download", "-json", RELEASED[0]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FETCH_S, check=False, cwd="/")
    return [Path(json.loads(done.stdout)["Dir"]) / RELEASED[1]] if done.returncode == 0 else []


def crds() -> dict[tuple[str, str], JSON]:
    """(group, kind) → CRD, of what is rendered and has one there."""
    rendered = {(d["apiVersion"].partition("/")[0], d["kind"]) for name in PRODUCTS for d in load(name)}
    out: dict[tuple[str, str], JSON] = {}
    for place in places():
        for path in sorted(place.rglob("*.yaml")) if place.is_dir() else [place]:
            for d in yaml.load_all(path.read_text(encoding="utf-8"), _WithEquals):
                if isinstance(d, dict) and d.get("kind") == "CustomResourceDefinition":
                    key = (d["spec"]["group"], d["spec"]["names"]["kind"])
                    if key in rendered:
                        out[key] = d
    return out


@pytest.fixture(scope="module")
def place(types: Kubectl) -> Iterator[tuple[Kubectl, dict[str, str], str]]:
    """Two namespaces, restricted as ours are."""
    suffix = f"hafnium-test-{secrets.token_hex(3)}"
    names = {"hafnium-system": f"{suffix}-system", "risk": f"{suffix}-risk"}
    for name in names.values():
        types("create", "namespace", name)
        types("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield types, names, suffix
    finally:
        types("delete", "namespace", *names.values(), "--wait=false")


@pytest.fixture(scope="module")
def foreign(place: tuple[Kubectl, dict[str, str], str]) -> Iterator[dict[tuple[str, str], str]]:
    """(group, kind) → the group that the kind is known by here; empty when the cluster has it anyway."""
    kubectl, _, suffix = place
    there = {i["spec"]["group"] + "/" + i["spec"]["names"]["kind"] for i in kubectl.read("crd")["items"]}
    out: dict[tuple[str, str], str] = {}
    made: list[str] = []
    try:
        for (group, kind), crd in crds().items():
            if f"{group}/{kind}" in there:
                continue
            own = f"{group}.{suffix}.{TEST_GROUP}"
            item: JSON = {"apiVersion": crd["apiVersion"], "kind": crd["kind"], "spec": {**crd["spec"], "group": own}}
            item["metadata"] = {"name": f"{crd['spec']['names']['plural']}.{own}"}
            item["spec"].pop("conversion", None)
            kubectl("apply", "--server-side", "-f", "-", given=item)
            made.append(item["metadata"]["name"])
            eventually(lambda name=made[-1]: _established(kubectl, name), f"{made[-1]} is established")
            out[(group, kind)] = own
        yield out
    finally:
        for name in made:
            kubectl.run("delete", "crd", name, "--wait=false")


def services_of(rollout: JSON) -> list[JSON]:
    """What the operator would make of a ModelRollout: KServe's webhooks have something to say about that."""
    mode = "Knative" if rollout["spec"]["routing"].get("backend") == "CanaryTrafficPercent" else "Standard"
    return [{"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "spec": rollout["spec"]["service"],
             "metadata": {"name": "unified-risk-00000000", "namespace": rollout["metadata"]["namespace"],
                          "annotations": {"serving.kserve.io/deploymentMode": mode}}}]


@pytest.mark.parametrize("product", sorted(PRODUCTS.values()))
def test_the_api_server_takes_every_object(
    product: str, place: tuple[Kubectl, dict[str, str], str], foreign: dict[tuple[str, str], str],
) -> None:
    kubectl, names, suffix = place
    objects = moved(kustomized(f"kustomize/{product}"), names, suffix)
    if product == "crds":
        kubectl("apply", "--server-side", "--dry-run=server", "--force-conflicts", "-f", "-", given=objects)
        return
    objects += [s for o in objects if o["kind"] == "ModelRollout" for s in services_of(o)]
    unknown: list[str] = []
    known: list[JSON] = []
    for o in objects:
        group, _, version = o["apiVersion"].partition("/")
        if (group, o["kind"]) in foreign:
            o["apiVersion"] = f"{foreign[(group, o['kind'])]}/{version}"
        elif "." in group and not _served(kubectl, group, o["kind"]):
            unknown.append(f"{o['apiVersion']} {o['kind']}")
            continue
        if o["kind"] != "Namespace":
            known.append(o)
    done = replace(kubectl, namespace="").run(
        "apply", "--server-side", "--dry-run=server", "--force-conflicts", "--validate=strict", "-f", "-", given=known)
    assert done.returncode == 0, done.stderr
    assert "would violate PodSecurity" not in done.stderr, done.stderr
    if unknown:
        pytest.skip(f"{len(known)} objects are taken; no CRD for {', '.join(sorted(set(unknown)))} (HAFNIUM_TEST_CRDS)")


def _established(kubectl: Kubectl, name: str) -> bool:
    conditions = kubectl.read("crd", name).get("status", {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


_KINDS: dict[str, set[str]] = {}


def _served(kubectl: Kubectl, group: str, kind: str) -> bool:
    if group not in _KINDS:
        lines = kubectl("api-resources", f"--api-group={group}", "--no-headers").splitlines()
        _KINDS[group] = {line.split()[-1] for line in lines if line.strip()}
    return kind in _KINDS[group]


def test_a_wrong_field_is_refused(place: tuple[Kubectl, dict[str, str], str]) -> None:
    """The dry run above isn't blind."""
    kubectl, names, suffix = place
    (deployment,) = [o for o in moved(kustomized("kustomize/install"), names, suffix) if o["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    said = kubectl.run("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", given=deployment)
    assert said.returncode != 0
    assert "readinesProbe" in said.stderr
