"""Runs and models in a real MLflow server, over HTTP."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hafnium_servers import free_port
from onnx import TensorProto, helper

from hafnium_contract.errors import HafniumError, InputError
from hafnium_training.tracking import DIGEST_TAG, NODE_TAG, RunRecord, TrialRecord, is_server, record

START_S_MAX = 240


def model() -> bytes:
    x = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([helper.make_node("Identity", ["features"], ["score"])], "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


RUN = RunRecord(
    experiment="lender", name="lender-1", parameters={"seed": 7}, metrics={"roc_auc": 0.8, "nothing": float("nan")},
    tags={DIGEST_TAG: "sha256:aa"}, trials=(TrialRecord("trial-0", {"units": 4.0}, {"epochs": 3.0}, "pod-1"),),
    files={"model_card.md": "# lender"}, onnx=model(), inputs=2, requirements=("onnx",),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    argv = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        end = time.monotonic() + START_S_MAX
        while time.monotonic() < end:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_bundle_is_registered_once_whoever_asks_again(server: str) -> None:
    from mlflow import MlflowClient

    first = record(server, RUN)
    assert (first.model_version, first.already_registered) == ("1", False)
    again = record(server, replace(RUN, name="lender-2"))
    assert (again.run_id, again.model_version, again.already_registered) == (first.run_id, "1", True)
    client = MlflowClient(server, server)
    version = client.get_model_version_by_alias("lender", "candidate")
    assert version.tags[DIGEST_TAG] == "sha256:aa"
    experiment = client.get_experiment_by_name("lender")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:"), "the server's own place"
    nested = client.search_runs([experiment.experiment_id], "tags.`mlflow.parentRunId` != ''")
    assert [r.data.tags[NODE_TAG] for r in nested] == ["pod-1"]
    assert {a.path for a in client.list_artifacts(first.run_id)} >= {"model_card.md"}


KILLED = """
import os, pickle, signal, sys
from mlflow import MlflowClient
from hafnium_training import tracking

def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = sys.argv[2].split(".")
setattr({"MlflowClient": MlflowClient, "tracking": tracking}[owner], name, die)
tracking.record(sys.argv[1], pickle.load(sys.stdin.buffer))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["tracking._log", "MlflowClient.log_text", "tracking._register", "MlflowClient._create_model_version",
                                "MlflowClient.set_registered_model_alias"])
def test_a_recording_that_is_killed_anywhere_leaves_one_run_and_one_version_with_all_tags(tmp_path: Path, at: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), at], input=pickle.dumps(RUN), capture_output=True, check=False, timeout=200,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    done = record(tmp_path, RUN)
    assert done.model_version == "1"
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (version,) = client.search_model_versions("name = 'lender'")
    assert {k: version.tags[k] for k in RUN.tags} == dict(RUN.tags)
    assert client.get_model_version_by_alias("lender", "candidate").version == version.version
    experiment = client.get_experiment_by_name("lender")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(r.info.run_name) for r in runs) == ["lender-1", "trial-0"]
    logged = {str(r.info.run_name): (r.data.params, r.data.metrics) for r in runs}
    assert logged == {"lender-1": ({"seed": "7"}, {"roc_auc": 0.8}), "trial-0": ({"units": "4.0"}, {"epochs": 3.0})}
    assert len(client.search_logged_models([experiment.experiment_id])) == 1
    assert version.run_id == done.run_id or at == "MlflowClient.set_registered_model_alias"


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(HafniumError, match=f"{place}: MLflow could not record the run"):
        record(place, RUN)


def test_folders_and_servers_are_told_apart(tmp_path: Path) -> None:
    assert not is_server(tmp_path)
    assert not is_server("build/mlflow")
    assert is_server("https://mlflow.example:5000")
    for place in ("ftp://h/x", "http://"):
        with pytest.raises(InputError, match="expected a folder or http"):
            is_server(place)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_USERNAME") as e:
        is_server("http://me:secret@mlflow:5000")
    assert "secret" not in str(e.value)
