"""What manifests/ holds, as tests look at it: objects, and the pods that come of them, those of KServe and KubeRay too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "manifests"
Json = dict[str, Any]
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SERVICE_LABEL = "serving.kserve.io/inferenceservice"


@cache
def load(name: str) -> list[Json]:
    """Objects of one manifest, to be looked at only: they are read once."""
    return [d for d in yaml.load_all((FOLDER / name).read_text(encoding="utf-8"), Loader) if d]


@dataclass(frozen=True)
class Pod:
    """One pod template. `labels` as its controller will set them."""

    where: str
    namespace: str
    labels: Mapping[str, str]
    spec: Json
    lasting: bool
    """It is meant to run for ever."""

    def containers(self) -> Iterator[Json]:
        yield from self.spec.get("initContainers", [])
        yield from self.spec["containers"]


def pods(objects: list[Json]) -> list[Pod]:
    """All pods that a manifest makes, with a ServingRuntime's container in the predictors that use it."""
    runtimes = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "ServingRuntime"}
    out: list[Pod] = []
    started = [yaml.safe_load(o["data"]["rayjob.yaml"]) for o in objects if o["kind"] == "ConfigMap" and "rayjob.yaml" in o["data"]]
    where_models_are = next((o["metadata"]["namespace"] for o in objects if o["kind"] == "ModelRollout"), "")
    for job in started:  # by the operator, in the namespace of the ModelRollout
        job["metadata"]["namespace"] = where_models_are
    for o in [*objects, *started]:
        kind, spec, meta = o["kind"], o.get("spec", {}), o["metadata"]
        where, namespace = f"{kind}/{meta['name']}", meta.get("namespace", "")
        if kind in ("Deployment", "StatefulSet", "DaemonSet"):
            template = spec["template"]
            out.append(Pod(where, namespace, template["metadata"]["labels"], template["spec"], True))
        elif kind in ("CronJob", "Job"):
            template = (spec["jobTemplate"]["spec"] if kind == "CronJob" else spec)["template"]
            made = {"batch.kubernetes.io/job-name": f"{meta['name']}-1"}
            out.append(Pod(where, namespace, {**template.get("metadata", {}).get("labels", {}), **made}, template["spec"], False))
        elif kind == "RayJob":
            cluster = spec["rayClusterSpec"]
            for name, group in [("head", cluster["headGroupSpec"]), *((g["groupName"], g) for g in cluster.get("workerGroupSpecs", []))]:
                template = group["template"]
                made = {"ray.io/cluster": f"{meta['name']}-1", "ray.io/is-ray-node": "yes"}
                labels = {**template.get("metadata", {}).get("labels", {}), **made}
                out.append(Pod(f"{where}/{name}", namespace, labels, template["spec"], False))
        elif kind in ("InferenceService", "ModelRollout"):
            out += _served(where, namespace, meta, spec if kind == "InferenceService" else spec["service"], runtimes)
    return out


def _served(where: str, namespace: str, meta: Json, spec: Json, runtimes: Mapping[str, Json]) -> Iterator[Pod]:
    for component in ("predictor", "transformer"):
        if component not in spec:
            continue
        found = dict(spec[component])
        model = found.pop("model", None)
        containers = list(found.get("containers", []))
        if model is not None:
            runtime = runtimes[model["runtime"]]
            base = {**runtime["containers"][0]}
            base["args"] = [*base.get("args", []), *model.get("args", [])]
            base.update({k: v for k, v in model.items() if k in ("ports", "readinessProbe", "startupProbe", "livenessProbe", "resources")})
            containers.insert(0, base)
            found["volumes"] = [*found.get("volumes", []), *runtime.get("volumes", [])]
        labels = {SERVICE_LABEL: meta["name"], "component": component, "app": f"isvc.{meta['name']}-{component}", **meta.get("labels", {})}
        yield Pod(f"{where}/{component}", namespace, labels, {**found, "containers": containers}, True)


def selects(selector: Json | None, labels: Mapping[str, str]) -> bool:
    """A Kubernetes label selector."""
    selector = selector or {}
    if any(labels.get(k) != v for k, v in selector.get("matchLabels", {}).items()):
        return False
    for e in selector.get("matchExpressions", []):
        value, operator = labels.get(e["key"]), e["operator"]
        ok = {"Exists": value is not None, "DoesNotExist": value is None, "In": value in e.get("values", []),
              "NotIn": value not in e.get("values", [])}[operator]
        if not ok:
            return False
    return True
