"""CRDs are made from the types: structural, limited, described, and no stricter than what the types accept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hafnium_rollout_objects import MISTAKES, evidence, rollouts, with_mistake
from hafnium_rollout_world import START, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from hafnium_contract.evidence import EvidenceSpec, ModelEvidence
from hafnium_contract.model_contract import Strict
from hafnium_local.__main__ import app
from hafnium_rollout import crd_rules, crds
from hafnium_rollout.crd_schema import Extras, structural
from hafnium_rollout.errors import RolloutFileError, SchemaError
from hafnium_rollout.gate_spec import Role
from hafnium_rollout.objects import ApprovalSpec, ModelApproval, ModelRollout, RolloutSpec, parse_rollout
from hafnium_rollout.reporting import MESSAGE_CHARACTERS_MAX
from hafnium_rollout.statistics.betting import STAKES, BettingState
from hafnium_rollout.status import STORED_BYTES_MAX, GateState, GateStatus, HistoryPoint, RolloutStatus, stored

ROOT = Path(__file__).parents[2]
SCHEMAS = {d.kind: crds.schema(d) for d in crds.DEFINITIONS}
VALIDATORS = {kind: Draft4Validator(s) for kind, s in SCHEMAS.items()}
"""Draft 4 is the one whose exclusive bounds are flags, as OpenAPI 3.0's are."""
ALLOWED = {
    "type", "description", "properties", "required", "items", "enum", "pattern", "format", "default", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "additionalProperties",
    "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-map-type",
}


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from nodes(node["additionalProperties"], f"{path}.*")


ALL = [(kind, path, node) for kind, s in SCHEMAS.items() for path, node in nodes(s, "")]
SPECS = [(f"{kind}{path}", node) for kind, path, node in ALL if path.startswith(".spec")]


def test_schemas_are_structural() -> None:
    for kind, path, node in ALL:
        assert set(node) <= ALLOWED, f"{kind}{path}"
        assert isinstance(node.get("type"), str), f"{kind}{path} has no type"
        assert not ("properties" in node and "additionalProperties" in node), f"{kind}{path}"
        assert set(node.get("required", [])) <= set(node.get("properties", {})), f"{kind}{path}"


def test_everything_that_a_person_writes_has_a_limit() -> None:
    for where, node in SPECS:
        if node["type"] == "string":
            assert "maxLength" in node or "enum" in node or node.get("format") == "date-time", where
        elif node["type"] == "array":
            assert "maxItems" in node, where
        elif node["type"] == "object":
            assert "additionalProperties" not in node, where


def test_every_field_says_what_it_is() -> None:
    missing = [f"{kind}{path}" for kind, path, node in ALL
               if path.split(".")[-1] not in ("", "metadata", "name") and not path.endswith("[]") and not node.get("description")]
    assert missing == []


def test_a_status_is_never_refused_on_a_formality() -> None:
    for kind, path, node in ALL:
        if path.startswith(".status"):
            assert not set(node) & {"pattern", "minimum", "maximum", "maxLength", "minLength", "maxItems", "x-kubernetes-validations"}, (
                f"{kind}{path}")


def test_list_keys_are_required_and_gates_and_conditions_merge_by_them() -> None:
    keyed = {f"{kind}{path}": node for kind, path, node in ALL if node.get("x-kubernetes-list-type") == "map"}
    assert set(keyed) == {"ModelRollout.spec.gates", "ModelRollout.status.conditions"}
    for node in keyed.values():
        assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"])


def test_defaults_are_those_of_the_types() -> None:
    spec = SCHEMAS["ModelRollout"]["properties"]["spec"]["properties"]
    step = spec["strategy"]["properties"]["steps"]["items"]["properties"]
    assert step["deadline"]["default"] == "7d"
    assert spec["gates"]["items"]["properties"]["requiredIn"]["default"] == ["shadow", "weight"]
    assert "default" not in spec["strategy"]["properties"]["scrapeLag"], "only the operator knows how often is scraped"
    assert "default" not in spec["routing"]["properties"]["backend"], "another one fits on each side"


def test_every_validator_of_the_spec_has_its_rule_in_the_crd() -> None:
    def classes(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
        seen.add(model)
        for field in model.model_fields.values():
            todo = [field.annotation]
            while todo:
                t = todo.pop()
                todo += list(getattr(t, "__args__", ()))
                if isinstance(t, type) and issubclass(t, BaseModel) and t not in seen:
                    classes(t, seen)
        return seen

    ruled = set(crd_rules.OBJECTS) | {name.split(".")[0] for name in crd_rules.FIELDS}
    for root in (RolloutSpec, ApprovalSpec, EvidenceSpec):
        for model in classes(root, set()):
            if model.__pydantic_decorators__.model_validators:
                assert model.__name__ in ruled, f"{model.__name__} is validated here and not on the cluster"


def test_the_backend_is_held_by_a_rule_that_sees_spec_and_status() -> None:
    """What it says is tested on a cluster (tests/cluster/test_objects.py); a rule inside `spec` could not know whether a run has begun."""
    (rule,) = SCHEMAS["ModelRollout"]["x-kubernetes-validations"]
    assert "oldSelf.spec.routing.backend" in rule["rule"]
    assert "oldSelf.status.runId" in rule["rule"]
    assert rule["message"].startswith("spec.routing.backend never changes once a rollout has begun")
    assert [k for k in SCHEMAS if "x-kubernetes-validations" in SCHEMAS[k]] == ["ModelRollout"]


@given(rollouts())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_rollout_that_the_types_accept_fits_its_schema(data: dict[str, Any]) -> None:
    parsed = parse_rollout(data, "test")
    for form in (data, parsed.model_dump(mode="json", exclude_none=True, exclude={"metadata": {"namespace", "generation"}})):
        errors = [e.message for e in VALIDATORS["ModelRollout"].iter_errors(form)]
        assert errors == []


@given(rollouts(), st.sampled_from(sorted(MISTAKES)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mistakes_are_mistakes_to_the_types(data: dict[str, Any], mistake: str) -> None:
    with pytest.raises(RolloutFileError):
        parse_rollout(with_mistake(data, mistake), "test")


@given(evidence())
@settings(max_examples=100, deadline=None)
def test_every_finding_that_the_types_accept_fits_its_schema(data: dict[str, Any]) -> None:
    parsed = ModelEvidence.model_validate(data)
    for form in (data, parsed.model_dump(mode="json", exclude_none=True)):
        assert [e.message for e in VALIDATORS["ModelEvidence"].iter_errors(form)] == []


def test_a_whole_rollouts_status_fits_its_schema_at_every_turn() -> None:
    gates = [
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02, "dispersion": {"phi": 1.5}}, "hardLimit": 0.3},
        {"name": "scores", "scores": {}, "compare": {"margin": 0.05}}, {"name": "drift", "role": "Advisory", "drift": {}},
    ]
    world = World(rollout(gates=gates), random=random.Random(3))
    status = Draft4Validator(SCHEMAS["ModelRollout"]["properties"]["status"])
    for _ in range(120):
        world.turn()
        data = stored(world.status)
        assert [e.message for e in status.iter_errors(data)] == []
        assert RolloutStatus.model_validate(data) == world.status
    assert world.status.phase == "Promoted"
    assert world.status.weight == 100


# --- what is stored ----------------------------------------------------------------------------------------------------------------


def _long(looks: int, events: int) -> RolloutStatus:
    points = tuple(HistoryPoint(time=START + timedelta(seconds=i), event="Look", weight=5, message="x" * 400) for i in range(looks))
    told = tuple(HistoryPoint(time=START, event="Advanced", weight=5, message="€" * MESSAGE_CHARACTERS_MAX) for _ in range(events))
    return RolloutStatus(phase="Progressing", history=(*points, *told))


def test_a_long_history_is_thinned_until_the_api_server_takes_it() -> None:
    status = _long(2_000, 500)
    data = stored(status)
    assert len(json.dumps(data, ensure_ascii=False).encode()) < 1_000_000
    events = [p["event"] for p in data["history"]]
    assert events.count("Advanced") == 500, "what happened is worth more than looks"
    assert data["phase"] == "Progressing"


def test_a_short_history_is_kept_whole() -> None:
    assert len(stored(_long(10, 10))["history"]) == 20


def _large(role: Role) -> RolloutStatus:
    """As many gates over scores, pods and rejected digests as there may be."""
    money = tuple(-1.2345678901234567 - i for i in range(21 * len(STAKES)))
    bets = BettingState(tuple(i / 100 for i in range(21)), money, money, 10**6, 1.0 / 3, 1.0 / 3)
    gate = GateStatus(name="x", role=role, message="m" * 200, state=GateState(config="{}", betting=bets, betting_step=bets))
    pods = {f"risk-aaaaaaaa-predictor-{i:05d}": {"at": 1.5e9, "requests": 1e6, "notSlower": {str(b): 1e6 for b in range(40)}}
            for i in range(200)}
    return RolloutStatus(
        phase="Progressing", gates=tuple(gate.model_copy(update={"name": f"g{i}"}) for i in range(50)),
        rejected_digests=tuple(f"sha256:{i:064x}" for i in range(1_000)), history=_long(10, 10).history,
        cursor={"at": 1.5e9, "arms": ["a", "b"], "stable": pods, "candidate": pods, "log": {"stable": ["f" * 60] * 100},
                "templatePods": {"a": 3}})


@pytest.mark.parametrize("role", ["Advisory", "Quality"])
def test_a_status_too_large_without_its_history_loses_no_evidence_that_decides_and_no_rejected_digest(role: Role) -> None:
    """Nothing could be written before, not even a rollback."""
    status = _large(role)
    data = stored(status)
    assert len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()) <= STORED_BYTES_MAX
    again = RolloutStatus.model_validate(data)
    assert again.rejected_digests == status.rejected_digests
    assert again.history == status.history
    if role == "Advisory":
        assert again.cursor == status.cursor
        assert {g.state for g in again.gates} == {GateState()}
    else:
        assert again.gates == status.gates
        assert again.cursor == {"templatePods": {"a": 3}}, "looks begin anew; what a backend has to put back is still known"


def test_a_status_that_cant_be_made_small_enough_is_an_error() -> None:
    with pytest.raises(ValueError, match="without any history"):
        stored(RolloutStatus(message="x" * 1000), bytes_max=500)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_json_cant_hold_is_never_written(bad: float) -> None:
    gate = GateStatus(name="errors", role="Safety").model_copy(update={"statistic": bad})
    with pytest.raises(ValueError, match="JSON compliant"):
        stored(RolloutStatus(gates=(gate,)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_finding_holds_no_infinite_number(bad: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        ModelEvidence.model_validate({"metadata": {"name": "e"}, "spec": {
            "modelDigest": "sha256:" + "a" * 64, "kind": "drift", "windowStart": START, "windowEnd": START, "createdAt": START,
            "verdict": "Pass", "samples": 1, "message": "", "values": [{"name": "x", "statistic": "psi", "value": bad}]}})


# --- the converter -----------------------------------------------------------------------------------------------------------------


class Union(Strict):
    value: int | str


class Mixed(Strict):
    value: tuple[int, str]


class Fine(Strict):
    """What it is."""

    kind: Literal["only"]
    pair: tuple[float, float] | None = None
    labels: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    other: dict[str, Any] = {}  # noqa: RUF012


def test_a_type_that_no_crd_can_express_is_an_error_here() -> None:
    with pytest.raises(SchemaError, match=r"Union\.value: a choice between 2 types"):
        structural(Union, Extras())
    with pytest.raises(SchemaError, match=r"Mixed\.value: a tuple of different types"):
        structural(Mixed, Extras())


def test_a_rule_for_a_field_that_is_gone_is_an_error() -> None:
    with pytest.raises(SchemaError, match=r"Fine\.gone"):
        structural(Fine, Extras(fields={"Fine.gone": {"x-kubernetes-list-type": "set"}}))


def test_const_optional_tuple_and_free_mappings_are_written_structurally() -> None:
    found = structural(Fine, Extras())
    assert found["properties"] == {
        "kind": {"type": "string", "enum": ["only"]},
        "pair": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}, "default": {}},
        "other": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "default": {}},
    }
    assert found["required"] == ["kind"]


# --- files and the command -----------------------------------------------------------------------------------------------------------


def test_the_committed_files_are_those_of_the_types() -> None:
    assert list(crds.stale(ROOT / "kustomize/crds")) == []


def test_the_command_writes_checks_and_prints(tmp_path: Path) -> None:
    run = CliRunner().invoke
    folder = tmp_path / "crds"
    assert run(app, ["crds", "--check", "-o", str(folder)]).exit_code == 1
    assert run(app, ["crds", "-o", str(folder)]).exit_code == 0
    assert run(app, ["crds", "--check", "-o", str(folder)]).exit_code == 0
    (folder / "hafnium.dev_modelrollouts.yaml").write_text("kind: Other\n")
    found = run(app, ["crds", "--check", "-o", str(folder)])
    assert found.exit_code == 1
    assert "hafnium.dev_modelrollouts.yaml" in found.output
    printed = list(yaml.safe_load_all(run(app, ["crds"]).stdout))
    assert [d["spec"]["names"]["kind"] for d in printed] == ["ModelRollout", "ModelEvidence", "ModelApproval"]


def test_samples_are_what_the_types_accept() -> None:
    samples = ROOT / "kustomize/samples"
    models: dict[str, type[BaseModel]] = {"modelrollout": ModelRollout, "modelevidence": ModelEvidence, "modelapproval": ModelApproval}
    for name, model in models.items():
        data = yaml.safe_load((samples / f"{name}.yaml").read_text(encoding="utf-8"))
        model.model_validate(data)
        assert [e.message for e in VALIDATORS[data["kind"]].iter_errors(data)] == []
