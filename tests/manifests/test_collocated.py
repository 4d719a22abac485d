"""Transformer and predictor in one pod (components/collocated-transformer): they end in the right order, and both are scraped.

No overlay has it, so it is rendered here, where something renders.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from hafnium_manifests import ROOT, Json, Pod, pods, selects

from hafnium_contract.errors import InputError
from hafnium_local import rendered_manifests as rendered
from hafnium_predictor import settings as predictor
from hafnium_transformer import settings as transformer

COMPONENTS = ("monitoring", "network-policy", "collocated-transformer")


def render(folder: Path, *components: str) -> list[Json]:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")

    def place(path: str) -> str:
        return os.path.relpath(ROOT / "kustomize" / path, folder)

    (folder / "kustomization.yaml").write_text(yaml.safe_dump({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [place("overlays/dev")],
        "components": [place(f"components/{c}") for c in components]}), encoding="utf-8")
    return [o for o in yaml.safe_load_all(renderer(folder)) if o]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    return render(tmp_path_factory.mktemp("collocated").resolve(), *COMPONENTS)


@pytest.fixture(scope="module")
def pod(objects: list[Json]) -> Pod:
    (found,) = [p for p in pods(objects) if p.where.startswith("InferenceService/")]
    return found


def _container(pod: Pod, name: str) -> Json:
    (found,) = [c for c in pod.containers() if c["name"] == name]
    return found


def _pause_s(container: Json) -> int:
    return container["lifecycle"]["preStop"]["sleep"]["seconds"]


def _ports(pod: Pod) -> set[int]:
    return {p["containerPort"] for c in pod.containers() for p in c["ports"]}


def test_the_predictor_answers_until_the_transformer_has_nothing_in_hand(pod: Pod) -> None:
    """Both get SIGTERM at one time, each after its own hook; the predictor would close under requests that still need it."""
    asks, answers = _container(pod, "transformer-container"), _container(pod, "kserve-container")
    asking, answering = transformer.Settings(predictor_host="p:80"), predictor.Settings()
    drained_s = _pause_s(asks) + asking.grace_period_s
    assert not any("grace_period" in a for c in (asks, answers) for a in c["args"]), "the defaults hold"
    assert _pause_s(answers) > drained_s
    end_s = max(_pause_s(asks) + asking.stop_s, _pause_s(answers) + answering.stop_s)
    assert pod.spec["terminationGracePeriodSeconds"] >= end_s


def test_both_are_scraped_and_prometheus_may_come_to_both(objects: list[Json], pod: Pod) -> None:
    assert _ports(pod) == {8080, 8085}
    (monitor,) = [o["spec"] for o in objects if o["kind"] == "PodMonitor"]
    assert selects(monitor["selector"], pod.labels)
    assert {e["portNumber"] for e in monitor["podMetricsEndpoints"]} == _ports(pod)
    assert "component" not in monitor["podTargetLabels"], "the pod's label would name the transformer a predictor"
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"].get("namespace") == pod.namespace
                and selects(o["spec"]["podSelector"], pod.labels)]
    let_in = {
        p["port"] for spec in policies for rule in spec.get("ingress", []) for p in rule.get("ports", [])
        if any(selects(f.get("namespaceSelector"), {"kubernetes.io/metadata.name": "monitoring"}) for f in rule.get("from", [])
               if "namespaceSelector" in f)}
    assert let_in >= _ports(pod)


def test_with_autoscaling_their_pod_scales_by_what_is_asked_of_the_transformer(tmp_path: Path) -> None:
    found = render(tmp_path.resolve(), "autoscaling", "collocated-transformer", "model-rollout")
    (service,) = [o["spec"]["service"] for o in found if o["kind"] == "ModelRollout"]
    assert "transformer" not in service
    assert "scaleMetric" not in service["predictor"], "KServe refuses both"
    metrics = service["predictor"]["autoScaling"]["metrics"]
    assert [m["type"] for m in metrics] == ["Resource", "External", "External"]
    for query in (m["external"]["metric"]["query"] for m in metrics if m["type"] == "External"):
        selectors = re.findall(r"\{(namespace=.*?\.\*\")\}", query)
        assert selectors, query
        for selector in selectors:
            assert 'component="transformer"' in selector, "the predictor beside it counts under the same names"
            assert re.fullmatch(re.findall(r'pod=~"(.*)"', selector)[0].replace("${HAFNIUM_SERVICE}", "risk"), "risk-predictor-7d9-x")


def test_autoscaling_after_it_is_refused_where_it_is_rendered(tmp_path: Path) -> None:
    """It would bring a transformer back that has metrics and no containers."""
    with pytest.raises(InputError, match=r"components/autoscaling.*test operation.*/spec/transformer/containers"):
        render(tmp_path.resolve(), "collocated-transformer", "autoscaling", "model-rollout")
