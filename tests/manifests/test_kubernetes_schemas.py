"""Everything of Kubernetes' own that is rendered, against the schemas of each supported version. No cluster: a node has one version only.

Pods that KServe and KubeRay make are looked at as pods. What a schema can't say (feature gates, admission, immutable fields) the API server
of the test cluster says for its own version (tests/cluster/test_schemas.py).
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
from functools import cache
from typing import Any

import pytest
from hafnium_manifests import ROOT, Json, load, pods
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from hafnium_local.rendered_manifests import PRODUCTS

SCHEMAS = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
OLDEST = (1, 32)
"""As docs/kubernetes.md says."""
VERSIONS = sorted({(int(m[1]), int(m[2])) for d in SCHEMAS.iterdir() if (m := re.match(r"v(\d+)\.(\d+)\..*-local-strict$", d.name))})
SUPPORTED = [v for v in VERSIONS if v >= OLDEST]
FOREIGN = {"hafnium.dev", "serving.kserve.io", "ray.io", "monitoring.coreos.com"}
KSERVES = {
    "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "autoScaling", "containerConcurrency", "timeout", "labels", "annotations",
    "deploymentStrategy", "storageContainerName",
}
"""What KServe adds to a pod's fields in an InferenceService's component; its CRD judges that on the cluster."""
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
POD_SPEC = {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.api.core.v1.PodSpec"}


def read(version: tuple[int, int], file: str) -> Json:
    return json.loads((SCHEMAS / f"v{version[0]}.{version[1]}.0-local-strict" / file).read_text(encoding="utf-8"))


@cache
def registry(version: tuple[int, int]) -> Registry[Any]:
    return Resource.from_contents(read(version, "_definitions.json")) @ Registry()


@cache
def validator(version: tuple[int, int], kind: str) -> Draft202012Validator:
    """`kind` as the files are called: kind-group-version, in small letters; or `podspec`."""
    schema = POD_SPEC if kind == "podspec" else read(version, f"{kind}.json")
    return Draft202012Validator(schema, registry=registry(version))


def file_of(o: Json) -> str:
    """rbac.authorization.k8s.io/v1 Role → role-rbac-v1."""
    group, _, version = o["apiVersion"].rpartition("/")
    return "-".join(filter(None, (o["kind"].lower(), group.partition(".")[0], version)))


def problems(version: tuple[int, int], o: Json, kind: str = "") -> list[str]:
    found = validator(version, kind or file_of(o)).iter_errors(o)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:300]}" for e in found]


def is_of_kubernetes(o: Json) -> bool:
    group = o["apiVersion"].rpartition("/")[0]
    assert "." not in group or group.endswith(".k8s.io") or group in FOREIGN, f"{o['apiVersion']}: whose is it?"
    return group not in FOREIGN


def objects_of_kubernetes() -> list[tuple[str, Json]]:
    return once([(f"{name}:{o['kind']}/{o['metadata']['name']}", o) for name in PRODUCTS for o in load(name) if is_of_kubernetes(o)])


def once(found: list[tuple[str, Json]]) -> list[tuple[str, Json]]:
    """Most objects are the same in all overlays."""
    return list({json.dumps(o, sort_keys=True, default=str): (where, o) for where, o in found}.values())


def test_the_supported_versions_are_those_of_the_docs() -> None:
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
    (line,) = [x for x in text.splitlines() if x.startswith("| Kubernetes ")]
    said = re.search(r"Kubernetes (\d+)\.(\d+) or newer .*1\.34; schemas of 1\.32 to (\d+)\.(\d+)", line)
    assert said is not None, line
    major, minor, *newest = map(int, said.groups())
    assert (major, minor) == OLDEST == SUPPORTED[0]
    assert tuple(newest) == SUPPORTED[-1]
    assert SUPPORTED[:3] == [(1, 32), (1, 33), (1, 34)]


@pytest.mark.parametrize("version", SUPPORTED, ids=lambda v: f"{v[0]}.{v[1]}")
def test_every_object_of_kubernetes_is_valid(version: tuple[int, int]) -> None:
    objects = objects_of_kubernetes()
    assert len({o["kind"] for _, o in objects}) > 15
    assert {where: p for where, o in objects if (p := problems(version, o))} == {}


@pytest.mark.parametrize("version", SUPPORTED, ids=lambda v: f"{v[0]}.{v[1]}")
def test_every_pod_that_others_make_is_valid(version: tuple[int, int]) -> None:
    found = [(f"{name}:{p.where}", p.spec) for name in PRODUCTS for p in pods(load(name))]
    made = once([(where, {k: v for k, v in spec.items() if k not in KSERVES}) for where, spec in found])
    kinds = {where.partition(":")[2].partition("/")[0] for where, _ in made}
    assert {"RayJob", "InferenceService", "ModelRollout"} <= kinds
    assert {where: p for where, spec in made if (p := problems(version, spec, "podspec"))} == {}


@pytest.mark.parametrize("version", SUPPORTED, ids=lambda v: f"{v[0]}.{v[1]}")
@pytest.mark.parametrize(("path", "value"), [
    (("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
    (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "eighty"),
    (("spec", "replicas"), "two"),
    (("spec", "template", "spec", "containers", 0, "securityContext", "capabilities", "drop"), "ALL"),
    (("spec", "selektor"), {}),
    (("status", "ok"), True),
], ids=lambda x: ".".join(map(str, x)) if isinstance(x, tuple) else "")
def test_a_wrong_field_is_refused(version: tuple[int, int], path: tuple[Any, ...], value: Any) -> None:
    """The tests above aren't blind."""
    (deployment,) = [copy.deepcopy(o) for o in load("install.yaml") if o["kind"] == "Deployment"]
    place = deployment
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = value
    found = problems(version, deployment)
    assert len(found) == 1, found
    assert str(path[-1]) in found[0]


@pytest.mark.parametrize("version", SUPPORTED, ids=lambda v: f"{v[0]}.{v[1]}")
def test_an_unknown_field_is_refused_in_every_object(version: tuple[int, int]) -> None:
    taken: list[str] = []
    for where, o in objects_of_kubernetes():
        wrong = [{**o, "bogus": 1}, {**o, "metadata": {**o["metadata"], "bogus": 1}}]
        wrong += [{**o, "spec": {**o["spec"], "bogus": 1}}] if "spec" in o else []
        taken += [where for x in wrong if not any("'bogus' was unexpected" in p for p in problems(version, x))]
    assert taken == []


def test_a_version_that_is_too_old_is_told_apart() -> None:
    """preStop's `sleep` came after 1.25: the schemas of another version are really another's."""
    spec = next(p.spec for p in pods(load("staging.yaml")) if p.where == "Deployment/hafnium-mlflow")
    assert problems(OLDEST, spec, "podspec") == []
    assert any("'sleep'" in p for p in problems((1, 25), spec, "podspec"))
