"""kustomize/ as far as rollouts and access go: nothing forgotten, one object per file, no right that is wider than it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_rollout.crds import DEFINITIONS

ROOT = Path(__file__).parents[2] / "kustomize"
FOLDERS = ["crds", "base/rollouts", "base/access", "base/monitoring"]


def objects(folder: str) -> list[dict[str, Any]]:
    names = yaml.safe_load((ROOT / folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return [yaml.safe_load((ROOT / folder / name).read_text(encoding="utf-8")) for name in names]


ROLES = [(f"{folder}/{o['metadata']['name']}", o) for folder in FOLDERS for o in objects(folder) if o["kind"] in ("Role", "ClusterRole")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_listed_and_holds_one_object(folder: str) -> None:
    listed = yaml.safe_load((ROOT / folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    there = {p.name for p in (ROOT / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == there
    for name in listed:
        assert (ROOT / folder / name).read_text(encoding="utf-8").count("\nkind:") == 1, name


def test_no_role_has_a_wildcard_or_a_secret() -> None:
    assert len(ROLES) == 9
    for name, role in ROLES:
        for rule in role["rules"]:
            said = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not any("*" in x for x in said), name
            assert not {"secrets", "serviceaccounts/token", "pods/exec"} & set(rule["resources"]), name
            assert not {"escalate", "bind", "impersonate", "deletecollection"} & set(rule["verbs"]), name


def test_only_the_operators_role_writes_a_status() -> None:
    writers = [name for name, role in ROLES for rule in role["rules"]
               if "modelrollouts/status" in rule["resources"] and set(rule["verbs"]) - {"get", "list", "watch"}]
    assert writers == ["base/rollouts/hafnium-rollout-operator"]


def test_only_viewing_is_part_of_kubernetes_own_roles() -> None:
    aggregated = [(name, role) for name, role in ROLES if any("aggregate-to" in k for k in role["metadata"].get("labels", {}))]
    assert [name for name, _ in aggregated] == ["base/access/hafnium-viewer"]
    for rule in aggregated[0][1]["rules"]:
        assert set(rule["verbs"]) == {"get", "list", "watch"}


def test_policies_refuse_when_they_cant_be_asked_and_each_is_bound() -> None:
    found = [*objects("base/access"), *objects("base/rollouts")]
    policies = {o["metadata"]["name"]: o for o in found if o["kind"] == "ValidatingAdmissionPolicy"}
    bound = {o["spec"]["policyName"]: o["spec"]["validationActions"] for o in found if o["kind"] == "ValidatingAdmissionPolicyBinding"}
    assert bound == {name: ["Deny"] for name in policies}
    for name, policy in policies.items():
        assert policy["spec"]["failurePolicy"] == "Fail", name
        for v in policy["spec"]["validations"]:
            assert v.get("message") or v.get("messageExpression"), name


def test_the_stages_of_the_sample_have_roles() -> None:
    sample = yaml.safe_load((ROOT / "samples/modelrollout.yaml").read_text(encoding="utf-8"))
    stages = [n.removeprefix("base/access/hafnium-approve-") for n, _ in ROLES if "hafnium-approve-" in n]
    assert set(sample["spec"]["approvals"]["required"]) == set(stages)


def test_names_of_types_are_the_same_everywhere() -> None:
    known = {d.plural for d in DEFINITIONS} | {"approvalstages"}
    for name, role in ROLES:
        for rule in role["rules"]:
            if "hafnium.dev" in rule["apiGroups"]:
                assert {r.split("/")[0] for r in rule["resources"]} <= known, name
