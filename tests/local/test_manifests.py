"""Manifests: what is wrong is said with file, line, path and the nearest name, and nothing is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.errors import HafniumError, InputError
from hafnium_local import kserve_schema
from hafnium_local.manifests import ManifestError, read_manifests, read_object, store

GOOD = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: fraud
  labels: {hafnium.dev/model-version: "1"}
  annotations: {since: 2026-01-02}
spec:
  predictor:
    minReplicas: 2
    model:
      modelFormat: {name: onnx}
      storageUri: file:///b
      resources: {limits: {cpu: 1, memory: 1Gi}}
  transformer:
    containers:
    - name: kserve-container
      image: x/hafnium-transformer:1
      args: [--feature_repo, /f]
"""


def write(folder: Path, text: str, name: str = "given.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ManifestError) as e:
        read_manifests([write(folder, text)])
    return [f"{p.line} {p.path}: {p.message}" for _, p in e.value.problems]


def test_good_manifest_is_read_and_dates_stay_text(tmp_path: Path) -> None:
    found = read_manifests([write(tmp_path, GOOD)])
    assert [(m.kind, m.name, m.line) for m in found.objects] == [("InferenceService", "fraud", 1)]
    assert found.objects[0].annotations == {"since": "2026-01-02"}
    assert found.ignored == ()


@pytest.mark.parametrize(("before", "after", "expected"), [
    ("storageUri:", "storageURI:", '12 spec.predictor.model.storageURI: unknown field; did you mean "storageUri"?'),
    ("minReplicas: 2", "minReplicas: two", "9 spec.predictor.minReplicas: expected a whole number, got str 'two'"),
    ("minReplicas: 2", "minReplicas: true", "9 spec.predictor.minReplicas: expected a whole number, got bool True"),
    ("      modelFormat: {name: onnx}\n", "",
     "10 spec.predictor.model.modelFormat: required field is missing (V1beta1ModelFormat)"),
    ("    - name: kserve-container\n      image", "    - image",
     "16 spec.transformer.containers[0].name: required field is missing (str)"),
    ("args: [--feature_repo, /f]", "args: [--port, 8080]",
     "18 spec.transformer.containers[0].args[1]: expected a string (put it in quotes), got int 8080"),
    ("args: [--feature_repo, /f]", "args: --x", "18 spec.transformer.containers[0].args: expected a list, got str '--x'"),
    ("{limits: {cpu: 1, memory: 1Gi}}", "{limits: {cpu: [1]}}",
     "13 spec.predictor.model.resources.limits.cpu: expected a quantity such as 500m or 1Gi, got a list of 1"),
    ('"1"}', "1}", "5 metadata.labels.hafnium.dev/model-version: expected a string (put it in quotes), got int 1"),
    ("serving.kserve.io/v1beta1", "serving.kserve.io/v1",
     "1 apiVersion: expected serving.kserve.io/v1beta1 for a InferenceService, got 'serving.kserve.io/v1'"),
    ("kind: InferenceService", "kind: InferenceServices",
     "2 kind: kind 'InferenceServices' can't run on one machine; known here: InferenceService, ModelRollout, ModelApproval"),
    ("name: fraud", "name: Fraud_1",
     "4 metadata.name: expected a DNS label (lower-case letters, digits and -, at most 63), got 'Fraud_1'"),
    ("    minReplicas: 2\n", "    minReplicas: 2\n    minReplicas: 3\n", "10 minReplicas: this key is written twice in one mapping"),
    ("spec:", "spec: [", "9 : not YAML"),
], ids=["unknown field", "wrong type", "bool is no int", "missing", "missing in a list", "int for a string", "no list", "no quantity",
        "label", "version", "kind", "name", "key twice", "no yaml"])
def test_problem_is_told_with_its_line(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in GOOD
    found = problems(tmp_path, GOOD.replace(before, after, 1))
    assert any(p.startswith(expected) for p in found), found


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD.replace("storageUri", "storageURI"), "a.yaml")
    second = write(tmp_path, "---\n" + GOOD.replace("minReplicas: 2", "minReplicas: x").replace("fraud", "other"), "b.yaml")
    with pytest.raises(ManifestError) as e:
        read_manifests([first, second])
    assert f"{first}:12:" in str(e.value)
    assert f"{second}:10:" in str(e.value)
    assert str(e.value).startswith("2 problems; nothing was applied")
    assert e.value.exit_status == 2


def test_kinds_that_mean_nothing_here_are_ignored_with_a_line(tmp_path: Path) -> None:
    other = "apiVersion: v1\nkind: Namespace\nmetadata: {name: risk}\n---\n---\n"
    found = read_manifests([write(tmp_path, other + GOOD)])
    assert [m.line for m in found.objects] == [6]
    assert found.ignored == (f"{tmp_path}/given.yaml:1: Namespace risk: ignored, it means nothing on one machine",)


def test_list_and_folder_are_read_as_kubectl_does(tmp_path: Path) -> None:
    item = yaml.safe_load(GOOD.replace("2026-01-02", "x"))
    write(tmp_path, yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [item]}), "list.json")
    write(tmp_path, "not a manifest", "readme.txt")
    assert [m.name for m in read_manifests([tmp_path]).objects] == ["fraud"]


def test_same_name_twice_is_an_error(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "---\n" + GOOD)
    assert found == [f"23 metadata.name: InferenceService 'fraud' was given already, at {tmp_path}/given.yaml:1"]


def test_document_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    assert problems(tmp_path, "- a\n") == ["1 : expected an object with apiVersion, kind and metadata, got list"]


@pytest.mark.parametrize(("make", "message"), [
    (lambda f: f / "absent.yaml", "can't be read: No such file"),
    (lambda f: write(f, "") and f, "__never__"),
], ids=["absent", "folder with an empty file"])
def test_unreadable_input(tmp_path: Path, make: Any, message: str) -> None:
    path = make(tmp_path)
    if message == "__never__":
        assert read_manifests([path]).objects == ()
        return
    with pytest.raises(InputError, match=message):
        read_manifests([path])


def test_folder_without_manifests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*.yaml"):
        read_manifests([tmp_path])


def test_bytes_that_are_not_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_manifests([tmp_path / "x.yaml"])


def test_file_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger than"):
        read_manifests([write(tmp_path, "#" * (4 * 1024 * 1024 + 1))])


def test_alias_bomb_ends_with_an_error_and_not_with_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    bomb = "".join(f"  {line}\n" for line in lines)
    found = problems(tmp_path, GOOD.replace("spec:\n", f"x:\n{bomb}spec:\n"))
    assert found == ["1 : 50000 values or more in one document; is a YAML alias repeated?"]


def test_alias_of_itself_is_an_error(tmp_path: Path) -> None:
    assert "values or more" in problems(tmp_path, GOOD.replace("args: [", "args: &a [*a, "))[0]


def test_aliases_work_as_in_kubectl(tmp_path: Path) -> None:
    text = GOOD.replace("name: fraud", "name: &n fraud").replace("args: [--feature_repo, /f]", "args: [*n]")
    spec = read_manifests([write(tmp_path, text)]).objects[0].data["spec"]
    assert spec["transformer"]["containers"][0]["args"] == ["fraud"]


def test_every_type_that_the_schema_reaches_is_known() -> None:
    """A new SDK that writes its tables otherwise would make everything valid: this fails then."""
    seen: set[str] = set()
    todo = [kserve_schema.ROOT_CLASS]
    unknown: set[str] = set()
    while todo:
        name = todo.pop()
        for form in (kserve_schema._LIST, kserve_schema._DICT):
            while (inner := form.fullmatch(name)) is not None:
                name = inner.group(1)
        if name in seen:
            continue
        seen.add(name)
        found = kserve_schema.table(name)
        if found is None:
            unknown.add(name)
        else:
            todo += found.types.values()
    assert len(seen) > 120
    status_only = {"KnativeAddressable", "KnativeCondition", "KnativeURL", "KnativeDevServingPkgApisServingV1TrafficTarget", "V1Time"}
    assert unknown - status_only == {"str", "int", "bool", "datetime", "object", "ResourceQuantity", "V1beta1MetricQuantity"}
    assert kserve_schema.table("V1Container").required == {"name"}  # type: ignore[union-attr]


def test_stored_objects_are_read_back_equal_and_written_only_when_changed(tmp_path: Path) -> None:
    found = read_manifests([write(tmp_path, GOOD)]).objects
    folder = tmp_path / "objects"
    assert [f.name for f in store(found, folder)] == ["InferenceService-fraud.yaml"]
    assert store(found, folder) == []
    assert read_object(folder / "InferenceService-fraud.yaml").data == found[0].data


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    found = read_manifests([write(tmp_path, GOOD)]).objects
    (tmp_path / "objects").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        store(found, tmp_path / "objects")


ROLLOUT = """\
apiVersion: hafnium.dev/v1alpha1
kind: ModelRollout
metadata: {name: fraud}
spec:
  model: {name: fraud, version: "2", storageUri: "file:///b", digest: "sha256:%s"}
  service:
    predictor:
      model: {modelFormat: {name: onnx}}
  strategy:
    steps:
    - {weight: 5, minDwell: 1m, minSamples: 100, deadline: 1h}
    - {weight: 100, minDwell: 1m}
  gates:
  - {name: errors, role: Safety, requests: {}}
""" % ("a" * 64)


def test_rollout_is_checked_by_the_operators_types(tmp_path: Path) -> None:
    assert read_manifests([write(tmp_path, ROLLOUT)]).objects[0].kind == "ModelRollout"
    found = problems(tmp_path, ROLLOUT.replace("weight: 100", "weight: 4"))
    assert any(p.startswith("9 spec.strategy") or p.startswith("10 ") for p in found), found


def test_rollouts_service_template_is_checked_by_kserves_schema(tmp_path: Path) -> None:
    found = problems(tmp_path, ROLLOUT.replace("modelFormat: {name: onnx}", "modelFormat: {name: onnx}, runtim: x"))
    assert found == ['8 spec.service.predictor.model.runtim: unknown field; did you mean "runtime"?']


APPROVAL = """\
apiVersion: hafnium.dev/v1alpha1
kind: ModelApproval
metadata: {name: fraud-security}
spec: {modelDigest: "sha256:%s", stage: security, approver: kim}
""" % ("a" * 64)


def test_approval_is_checked_by_the_operators_types(tmp_path: Path) -> None:
    assert read_manifests([write(tmp_path, APPROVAL)]).objects[0].kind == "ModelApproval"
    assert problems(tmp_path, APPROVAL.replace("sha256:", "sha512:"))[0].startswith("4 spec.modelDigest: String should match")


def test_errors_are_hafnium_errors(tmp_path: Path) -> None:
    with pytest.raises(HafniumError):
        read_manifests([write(tmp_path, "kind: Pod\n")])
