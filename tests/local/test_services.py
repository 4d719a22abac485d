"""InferenceService → processes: KServe's rules for arguments and environment, and clear errors for what can't run here."""

from __future__ import annotations

import copy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.contract_file import load_contract
from hafnium_local.manifests import Manifest, ManifestError, read_manifests
from hafnium_local.ports import Ports, is_free
from hafnium_local.services import ServicePlan, plan_service, revision_of, taken_ports
from hafnium_testing import make_bundle

CONTRACT = Path(__file__).parents[2] / "examples" / "creditcard" / "contract.yaml"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b 1", load_contract(CONTRACT), "3", rows=200)


@pytest.fixture
def data(bundle: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": "fraud", "labels": {"hafnium.dev/model-digest": bundle.digest8}, "annotations": {}},
        "spec": {
            "predictor": {"model": {
                "modelFormat": {"name": "onnx"}, "runtime": "hafnium-onnx", "storageUri": f"file://{str(bundle.path).replace(' ', '%20')}",
            }},
            "transformer": {"containers": [{
                "name": "kserve-container", "image": "ghcr.io/hafnium/hafnium-transformer:0.1.0@sha256:ab",
                "args": ["--feature_repo", "/f"],
            }]},
        },
    }


def manifest(folder: Path, data: dict[str, Any]) -> Manifest:
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return read_manifests([file]).objects[0]


def plan(folder: Path, data: dict[str, Any]) -> ServicePlan:
    return plan_service(manifest(folder, data), Ports(folder / "ports.json"), folder / "state")


def option(argv: tuple[str, ...], name: str) -> str:
    assert argv.count(name) == 1, argv
    return argv[argv.index(name) + 1]


def test_bundle_becomes_predictor_and_transformer(tmp_path: Path, data: dict[str, Any], bundle: Any) -> None:
    found = plan(tmp_path, data)
    predictor, transformer = (p.argv for p in found.processes)
    assert predictor[:4] == (sys.executable, "-u", "-m", "hafnium_predictor")
    assert transformer[:4] == (sys.executable, "-u", "-m", "hafnium_transformer")
    assert option(predictor, "--model_dir") == str(bundle.path)
    assert option(predictor, "--model_name") == option(transformer, "--model_name") == "fraud"
    assert option(transformer, "--predictor_host") == f"127.0.0.1:{found.predictor_port}"
    assert option(transformer, "--feature_repo") == "/f"
    assert option(transformer, "--inference_log") == str(tmp_path / "state" / "inference-log" / "fraud")
    assert option(transformer, "--http_port") == str(found.port)
    assert (found.model_version, found.model_digest, found.health_path) == ("3", bundle.manifest.digest, "/v2/health/ready")
    assert ("INFERENCE_SERVICE_NAME", "fraud") in found.processes[1].env
    ports = [option(predictor, "--grpc_port"), option(transformer, "--grpc_port"), str(found.port), str(found.predictor_port)]
    assert len(set(ports)) == 4


def test_predictor_alone_is_what_the_gateway_talks_to(tmp_path: Path, data: dict[str, Any]) -> None:
    del data["spec"]["transformer"]
    found = plan(tmp_path, data)
    assert len(found.processes) == 1
    assert found.port == found.predictor_port


def test_own_arguments_stay_and_ports_are_decided_here(tmp_path: Path, data: dict[str, Any]) -> None:
    container = data["spec"]["transformer"]["containers"][0]
    container["args"] = ["--http_port=8080", "--model_name", "mine", "--inference_log=/l", "--x", "$(WHERE)/$$(A)/$(NO)"]
    container["env"] = [
        {"name": "WHERE", "value": "here"}, {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "MAYBE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
    ]
    found = plan(tmp_path, data)
    argv = found.processes[1].argv
    assert option(argv, "--model_name") == "mine"
    assert "--inference_log=/l" in argv
    assert "--inference_log" not in argv
    assert "--http_port=8080" not in argv
    assert option(argv, "--http_port") == str(found.port)
    assert option(argv, "--x") == "here/$(A)/$(NO)"
    environment = dict(found.processes[1].env)
    assert (environment["WHERE"], environment["ME"], "MAYBE" in environment) == ("here", "fraud", False)


def test_secret_comes_from_the_environment_of_up(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "t")
    container = data["spec"]["transformer"]["containers"][0]
    container["env"] = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    assert ("TOKEN", "t") in plan(tmp_path, data).processes[1].env


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *steps, last = path.split("/")
    here: Any = data
    for step in steps:
        here = here[int(step)] if step.isdigit() else here.setdefault(step, {})
    here[last] = value


@pytest.mark.parametrize(("path", "value", "message"), [
    ("spec/predictor/model/storageUri", "s3://b/m", "expected file:///absolute/path/of/a/bundle, got 's3://b/m'"),
    ("spec/predictor/model/storageUri", "file:///no/such", "no such bundle"),
    ("spec/predictor/model/storageUri", None, "required here: file:///path"),
    ("spec/predictor/model/storage", {"key": "k"}, "one machine reads bundles from storageUri"),
    ("spec/predictor/model/modelFormat/name", "sklearn", "expected onnx, the format of a Hafnium bundle, got 'sklearn'"),
    ("spec/predictor/model/runtime", "kserve-tritonserver", "expected hafnium-onnx, the runtime on one machine"),
    ("spec/predictor", {"minReplicas": 1}, "expected `model` (an ONNX bundle) or `containers`"),
    ("spec/transformer/containers/0/image", "x/other:1", "image 'x/other:1' can't be run without a container runtime"),
    ("spec/transformer/containers", [], None),
    ("spec/transformer/initContainers", [{"name": "i"}], "init containers don't run"),
    ("spec/transformer/containers/0/envFrom", [{"configMapRef": {"name": "c"}}], "ConfigMaps and Secrets don't exist"),
    ("spec/transformer/containers/0/env", [{"name": "UNSET_TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
     "set UNSET_TOKEN in the environment of `hafnium up`"),
    ("spec/explainer", {"containers": [{"name": "e"}]}, "explainer can't run on one machine"),
    ("metadata/labels/hafnium.dev~model-digest", "00000000", "says 00000000, but the bundle at"),
    ("metadata/annotations/local.hafnium.dev~fault", "fire", "unknown fault 'fire'; known: units, stale, slow, crash"),
], ids=lambda v: str(v)[:40])
def test_what_cannot_run_here_is_a_clear_error(tmp_path: Path, data: dict[str, Any], path: str, value: Any, message: str | None) -> None:
    changed = copy.deepcopy(data)
    *steps, last = path.split("/")
    _set(changed, "/".join([*steps, last.replace("~", "/")]) if "~" not in last else path, value)
    if "~" in last:
        changed["metadata"][steps[-1]].pop(last, None)
        changed["metadata"][steps[-1]][last.replace("~", "/")] = value
    with pytest.raises(ManifestError) as e:
        plan(tmp_path, changed)
    assert e.value.problems[0][1].line
    if message is not None:
        assert message in str(e.value)


def test_changed_bundle_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    bad = make_bundle(tmp_path / "bad", load_contract(CONTRACT), rows=200)
    (bad.path / "model.onnx").write_bytes(b"x")
    data["metadata"]["labels"] = {}
    data["spec"]["predictor"]["model"]["storageUri"] = f"file://{bad.path}"
    with pytest.raises(ManifestError, match=r"model.onnx: changed"):
        plan(tmp_path, data)


def test_custom_container_hears_its_port_in_three_ways(tmp_path: Path, tools: Any) -> None:
    data = tools.inference_service("fraud", "--again", "$(PORT)")
    found = plan(tmp_path, data)
    process = found.processes[0]
    assert option(process.argv, "--http_port") == option(process.argv, "--again") == dict(process.env)["PORT"] == str(found.port)
    assert found.health_path == "/v2/health/ready"
    del data["spec"]["predictor"]["containers"][0]["readinessProbe"]
    assert plan(tmp_path, data).health_path is None


def test_declared_container_port_is_kept(tmp_path: Path, tools: Any) -> None:
    data = tools.inference_service("fraud")
    data["spec"]["predictor"]["containers"][0]["ports"] = [{"containerPort": 9123}]
    found = plan(tmp_path, data)
    assert found.port == found.predictor_port == 9123
    assert "--http_port" not in found.processes[0].argv


def test_custom_container_needs_a_command(tmp_path: Path, tools: Any) -> None:
    data = tools.inference_service("fraud")
    del data["spec"]["predictor"]["containers"][0]["command"]
    with pytest.raises(ManifestError, match="needs a `command`"):
        plan(tmp_path, data)


def test_fault_stands_before_the_service(tmp_path: Path, data: dict[str, Any]) -> None:
    without = plan(tmp_path, data)
    data["metadata"]["annotations"] = {
        "local.hafnium.dev/fault": "units", "local.hafnium.dev/fault-options": '{"features": ["Amount"], "factor": 100}',
    }
    found = plan(tmp_path, data)
    argv = found.processes[2].argv
    assert option(argv, "--fault") == "units"
    assert option(argv, "--features") == "Amount"
    assert option(argv, "--upstream") == f"127.0.0.1:{found.processes[1].probe.port}"
    assert option(argv, "--listen") == str(found.port)
    assert found.revision != without.revision


def test_revision_changes_with_what_matters_only(tmp_path: Path, data: dict[str, Any]) -> None:
    before = revision_of(manifest(tmp_path, data))
    data["metadata"]["annotations"]["note"] = "x"
    assert revision_of(manifest(tmp_path, data)) == before
    data["spec"]["transformer"]["containers"][0]["args"].append("--y")
    assert revision_of(manifest(tmp_path, data)) != before


def test_ports_are_kept_in_the_file_and_renewed_when_taken(tmp_path: Path) -> None:
    first = Ports(tmp_path / "ports.json")
    port = first.get("a")
    assert first.get("b") != port
    first.save()
    second = Ports(tmp_path / "ports.json")
    assert second.get("a") == port
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
        s.listen()
        assert not is_free(port)
        assert second.claim("c", port) != port
        assert second.renew("a") != port
    second.keep_only({"b"})
    assert second.claim("d", port) == port


def test_damaged_port_file_costs_only_the_ports(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text('{"ports": 3}')
    assert Ports(tmp_path / "ports.json").get("a") >= 20_000


def test_taken_ports_are_seen(tmp_path: Path, tools: Any) -> None:
    found = plan(tmp_path, tools.inference_service("fraud"))
    assert taken_ports(found) == []
    with socket.socket() as s:
        s.bind(("127.0.0.1", found.port))
        s.listen()
        assert taken_ports(found) == [found.port]
