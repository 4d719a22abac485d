"""ModelRollout files: what is accepted, and what is said about what isn't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import rollout

from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.gate_spec import Compare, Gate
from hafnium_rollout.objects import load_rollout

YAML = """\
apiVersion: hafnium.dev/v1alpha1
kind: ModelRollout
metadata:
  name: unified-risk
spec:
  model:
    name: unified-risk
    version: "2"
    storageUri: file:///bundles/2
    digest: sha256:{digest}
    trainedBy: thea
  service:
    predictor: {{model: {{modelFormat: {{name: onnx}}}}}}
  strategy:
    steps:
    - {{shadow: true, minSamples: 1000, deadline: 6h}}
    - {{weight: 5, minDwell: 24h, minSamples: 2000, deadline: 72h}}
    - {{weight: 25, minDwell: 48h, minSamples: 5000, deadline: 120h}}
    - {{weight: 100, minDwell: 1h}}
    onNewCandidate: Restart
    maxBlindDuration: 10m
    rollbackWindow: 3
  gates:
  - {{name: errors, role: Safety, requests: {{}}, compare: {{margin: 0.005, alpha: 0.01}}, hardLimit: 0.05}}
  - {{name: latency, role: Safety, latency: {{slowerThan: 100ms}}}}
  - {{name: scores, role: Quality, scores: {{}}, compare: {{margin: 0.05}}}}
  - {{name: drift, drift: {{}}}}
  - {{name: smoke, role: Advisory, evidence: {{kind: smoke}}}}
  approvals: {{required: [validation, security, compliance]}}
  paused: false
"""


def test_the_rollout_of_the_design_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(YAML.format(digest="a" * 64))
    found = load_rollout(file)
    assert [g.kind for g in found.spec.gates] == ["requests", "latency", "scores", "drift", "evidence"]
    assert found.spec.strategy.steps[1].deadline.total_seconds() == 72 * 3600
    assert found.service_name(found.spec.model.digest) == "unified-risk-aaaaaaaa"


def test_every_problem_comes_with_its_path_and_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = YAML.format(digest="xyz").replace("minSamples: 2000", "minSample: 2000").replace("slowerThan: 100ms", "slowerThan: fast")
    file.write_text(text)
    with pytest.raises(RolloutFileError) as e:
        load_rollout(file)
    lines = {p.path: p.line for p in e.value.problems}
    assert lines["spec.model.digest"] == 10
    assert lines["spec.strategy.steps[1].minSample"] == 17
    assert lines["spec.gates[1].latency.slowerThan"] == 25
    assert "line 17" in str(e.value)


def test_yaml_that_is_none_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("a: [1\nb: 2\n")
    with pytest.raises(RolloutFileError, match="line 2"):
        load_rollout(file)


SAFE: dict[str, Any] = {"name": "errors", "role": "Safety", "requests": {}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"strategy": {"steps": [{"weight": 50}, {"weight": 50}, {"weight": 100}]}}, "does not rise"),
    ({"strategy": {"steps": [{"weight": 5}, {"shadow": True}, {"weight": 100}]}}, "does not rise"),
    ({"strategy": {"steps": [{"weight": 5}, {"weight": 50}]}}, "last step must have weight 100"),
    ({"strategy": {"steps": [{"shadow": True, "weight": 5}, {"weight": 100}]}}, "exactly one of `shadow"),
    ({"strategy": {"steps": [{"weight": 5, "minDwell": "2h", "deadline": "1h"}, {"weight": 100}]}}, "longer than minDwell"),
    ({"strategy": {"steps": []}}, "at least 1"),
    ({"gates": [{**SAFE, "role": "Quality"}]}, "at least one must have role: Safety"),
    ({"gates": []}, "at least 1"),
    ({"gates": [SAFE, SAFE]}, "named twice: errors"),
    ({"gates": [{**SAFE, "latency": {"slowerThan": "1s"}}]}, "exactly one of"),
    ({"gates": [{"name": "x", "role": "Safety"}]}, "given: none"),
    ({"gates": [{**SAFE, "failureLimit": 3}]}, "failureLimit is for Quality"),
    ({"gates": [{**SAFE, "requiredIn": []}]}, "silence promotes"),
    ({"gates": [{**SAFE, "requiredIn": ["shadow"]}], "strategy": {"steps": [{"weight": 10}, {"weight": 100}]}}, "silence promotes"),
    ({"gates": [SAFE, {"name": "l", "role": "Safety", "latency": {"slowerThan": "1s"}, "requiredIn": ["shadow"]}],
      "strategy": {"steps": [{"weight": 10}, {"weight": 100}]}}, "gates: l: requiredIn names no kind of step"),
    ({"gates": [SAFE, {"name": "s", "role": "Safety", "scores": {}, "requiredIn": ["weight"]}]}, "gates: s: requiredIn"),
    ({"gates": [SAFE, {"name": "d", "drift": {}, "hardLimit": 0.1}]}, "hardLimit is for counted"),
    ({"gates": [{**SAFE, "compare": {"margin": 0.01, "harmless": 0.02}}]}, "must be below"),
    ({"gates": [SAFE, {"name": "s", "scores": {}}], "strategy": {"steps": [{"weight": 5}, {"weight": 100}]}}, "needs a step with shadow"),
    ({"service": {}}, "expected an InferenceServiceSpec"),
    *(({"model": {"version": v}}, "model.version: string should")
      for v in ("", "1.4.0+build.7", "v1/2", "-v1", "2026-03-01 rc1", "v1\n", "v" * 64)),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_makes_no_sense_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutFileError, match=message):
        rollout(**changes)


@pytest.mark.parametrize("version", ["1", "1.4.0-build.7", "2026-03-01_rc1", "v" * 63])
def test_a_version_may_be_what_a_label_may(version: str) -> None:
    assert rollout(model={"version": version}).spec.model.version == version


@pytest.mark.parametrize("changes", [
    {"gates": [{**SAFE, "requiredIn": ["shadow"]}]},
    {"gates": [{**SAFE, "requiredIn": ["weight"]}], "strategy": {"steps": [{"weight": 100}]}},
    {"gates": [SAFE, {"name": "s", "role": "Safety", "scores": {}, "requiredIn": ["shadow"]}]},
    {"gates": [SAFE, {"name": "d", "drift": {}, "requiredIn": ["shadow"]}], "strategy": {"steps": [{"weight": 100}]}},
], ids=["shadow", "weight", "pairs", "a Quality gate that no step waits for"])
def test_a_safety_gate_that_some_step_waits_for_is_accepted(changes: dict[str, Any]) -> None:
    rollout(**changes)


def test_what_is_worked_out_from_a_gates_settings_does_not_outlive_them() -> None:
    gate = Gate.model_validate({"name": "a", "requests": {}, "compare": {"margin": 0.02}})
    assert (gate.kind, gate.margin, '"margin":0.02' in gate.config) == ("requests", 0.02, True)
    other = gate.model_copy(update={"compare": Compare(margin=0.03)})
    assert (other.margin, '"margin":0.03' in other.config) == (0.03, True)
    assert (gate.margin, gate == Gate.model_validate(gate.model_dump())) == (0.02, True)


@pytest.mark.parametrize(("change", "same"), [
    (lambda d: d, True),
    (lambda d: {k: v for k, v in d.items() if k != "failureLimit"}, True),
    (lambda d: {**d, "compare": {**d["compare"], "margin": None}}, False),
    (lambda d: {**d, "ofALaterRelease": None}, False),
], ids=["the same", "written before a setting came", "another margin", "a setting that isn't known here"])
def test_evidence_of_the_release_before_counts_when_new_settings_are_at_their_defaults(
    change: Callable[[dict[str, Any]], dict[str, Any]], same: bool,
) -> None:
    gate = Gate.model_validate({"name": "a", "requests": {}, "compare": {"margin": 0.02}})
    assert gate.same_settings(json.dumps(change(json.loads(gate.config)))) is same
    assert not gate.same_settings("")
    assert not gate.same_settings("{")
