"""Bundle → the YAML that serves it: an InferenceService, or a ModelRollout that brings it in step by step.

The same YAML goes to `hafnium up` and to `kubectl apply`; on a cluster `storageUri` and the feature store's folder are whatever
storage that cluster has, which is why they are arguments.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from hafnium_contract.bundle import Bundle
from hafnium_contract.wire import DIGEST_LABEL, VERSION_LABEL

FAULT_ANNOTATION = "local.hafnium.dev/fault"
FAULT_OPTIONS_ANNOTATION = "local.hafnium.dev/fault-options"
"""Read by hafnium_local.services; on a cluster they mean nothing."""
TRANSFORMER_IMAGE = "ghcr.io/hafnium/hafnium-transformer:0.1.0"


@dataclass(frozen=True)
class Fault:
    """A fault that the local runtime puts in front of a service (see hafnium_local.faults), with its options."""

    kind: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Serving:
    """How a bundle is served. `feature_repo`: folder of the Feast store as the transformer sees it, or None without views."""

    feature_repo: str | None = None
    log_flush_seconds: float = 30.0
    fault: Fault | None = None


@dataclass(frozen=True)
class Pace:
    """How fast a rollout goes, and how sure it wants to be. The defaults are the owners' for production."""

    shadow_samples: int = 1000
    shadow_deadline: str = "6h"
    weights: tuple[tuple[int, str, int, str], ...] = ((5, "24h", 2000, "72h"), (25, "48h", 5000, "120h"))
    """(weight, minDwell, minSamples, deadline) of each step below 100."""
    bake: str = "1h"
    margin: float = 0.005
    """Share of requests (failed, slow) that the candidate may be worse by before it may not pass."""
    alpha: float = 0.01
    score_shift: float = 0.05
    slower_than: str = "100ms"
    blind: str = "10m"
    drift_waited_for: tuple[str, ...] = ("shadow", "weight")
    """Kinds of step that are not left without a drift window that passes. A failing window counts in all of them."""


def service_spec(bundle: Bundle, storage_uri: str, serving: Serving) -> dict[str, Any]:
    """InferenceServiceSpec: the ONNX predictor and the transformer in front of it."""
    args = [f"--log_flush_seconds={serving.log_flush_seconds:g}"]
    if serving.feature_repo is not None:
        args.append(f"--feature_repo={serving.feature_repo}")
    return {
        "predictor": {"model": {"modelFormat": {"name": "onnx"}, "runtime": "hafnium-onnx", "storageUri": storage_uri}},
        "transformer": {"containers": [{"name": "kserve-container", "image": TRANSFORMER_IMAGE, "args": args}]},
    }


def _annotations(fault: Fault | None) -> dict[str, str]:
    if fault is None:
        return {}
    return {FAULT_ANNOTATION: fault.kind, FAULT_OPTIONS_ANNOTATION: json.dumps(fault.options)}


def inference_service(bundle: Bundle, storage_uri: str, serving: Serving, name: str | None = None) -> dict[str, Any]:
    """The InferenceService that serves the bundle under `name` (the model's own name unless given)."""
    metadata: dict[str, Any] = {
        "name": name or bundle.manifest.model_name,
        "labels": {DIGEST_LABEL: bundle.digest8, VERSION_LABEL: bundle.manifest.model_version},
    }
    if serving.fault is not None:
        metadata["annotations"] = _annotations(serving.fault)
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata,
        "spec": service_spec(bundle, storage_uri, serving),
    }


def model_rollout(bundle: Bundle, storage_uri: str, serving: Serving, pace: Pace, backend: str = "Local") -> dict[str, Any]:
    """The ModelRollout that brings the bundle in through shadow and the pace's weights, each step on evidence."""
    compare = {"margin": pace.margin, "alpha": pace.alpha}
    metadata: dict[str, Any] = {"name": bundle.manifest.model_name}
    if serving.fault is not None:
        metadata["annotations"] = _annotations(serving.fault)
    steps: list[dict[str, Any]] = [{"shadow": True, "minSamples": pace.shadow_samples, "deadline": pace.shadow_deadline}]
    steps += [{"weight": w, "minDwell": d, "minSamples": n, "deadline": end} for w, d, n, end in pace.weights]
    steps.append({"weight": 100, "minDwell": pace.bake})
    return {
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": metadata,
        "spec": {
            "model": {
                "name": bundle.manifest.model_name, "version": bundle.manifest.model_version,
                "storageUri": storage_uri, "digest": bundle.manifest.digest,
            },
            "service": service_spec(bundle, storage_uri, serving),
            "routing": {"backend": backend},
            "strategy": {"steps": steps, "onNewCandidate": "Restart", "maxBlindDuration": pace.blind, "rollbackWindow": 3},
            "gates": [
                {"name": "errors", "role": "Safety", "requests": {}, "compare": compare, "hardLimit": 0.2},
                {"name": "latency", "role": "Safety", "latency": {"slowerThan": pace.slower_than}, "compare": compare},
                {"name": "scores", "role": "Quality", "scores": {}, "compare": {"margin": pace.score_shift, "alpha": pace.alpha}},
                {"name": "drift", "role": "Quality", "drift": {}, "requiredIn": list(pace.drift_waited_for)},
            ],
        },
    }


def to_yaml(*documents: dict[str, Any]) -> str:
    """Documents → one YAML text, keys in the order in which a reader expects them."""
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)
