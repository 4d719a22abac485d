"""From a table to a bundle: reproducible, gated, recorded; over a contract that no code knows."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from hafnium_servers import free_port
from hafnium_training_cases import LENDER, days, lender, lender_table, random_model, write_lender

from hafnium_contract.bundle import open_bundle
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.progress import Silent
from hafnium_testing import make_bundle
from hafnium_training.export import Scorer, export_onnx
from hafnium_training.gates import GatesFailed
from hafnium_training.helper_process import HelperProcess
from hafnium_training.hyperparameters import Hyperparameters, read_hyperparameters
from hafnium_training.latency import measure_latency
from hafnium_training.pipeline import NotRecordedError, TrainOptions, TrainResult, git_commit, train

EPOCHS = 12
pytestmark = pytest.mark.slow


def options(folder: Path, out: str = "bundle", **changes: Any) -> TrainOptions:
    contract, data = folder / "contract.yaml", folder / "lender.csv"
    if not data.exists():
        write_lender(folder)
    return dataclasses.replace(TrainOptions(contract, data, folder / out, epochs=EPOCHS, seed=5), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in no repository, and the working folder: a commit during the tests would change the bundles."""
    with contextlib.chdir(tmp_path_factory.mktemp("lender")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainResult:
    return train(options(folder, tracking=folder / "tracking", until=days(55)), Silent())


def evaluation(result: TrainResult) -> Any:
    return json.loads((result.bundle.path / "evaluation.json").read_text())


def test_a_bundle_holds_all_that_is_promised_of_it(folder: Path, trained: TrainResult) -> None:
    bundle = open_bundle(trained.bundle.path)
    assert (bundle.path / "contract.yaml").read_bytes() == (folder / "contract.yaml").read_bytes()
    assert bundle.manifest.seed == 5
    assert bundle.manifest.opset == 20
    found = evaluation(trained)
    assert set(found["metrics"]) >= {"roc_auc", "pr_auc", "brier", "ece", "precision_at_100"}
    assert found["metrics"]["roc_auc"]["lower"] < found["metrics"]["roc_auc"]["value"] < found["metrics"]["roc_auc"]["upper"]
    assert found["metrics"]["roc_auc"]["value"] > 0.8
    assert found["robustness"]["monotonicity"]["violations"] == 0
    assert {s["attribute"] for s in found["slices"]} == {"sex", "purpose"}
    assert {f["measure"] for f in found["fairness"]["measures"]} == {
        "parity_difference", "equal_opportunity_difference", "average_odds_difference", "disparate_impact",
    }
    assert [p["observed"] for p in found["calibration"]["curve"]]
    card = json.loads((bundle.path / "model_card.json").read_text())
    value = next(m["value"] for m in card["metrics"] if m["name"] == "roc_auc")
    assert value == pytest.approx(found["metrics"]["roc_auc"]["value"], abs=1e-4)
    markdown = (bundle.path / "model_card.md").read_text()
    for heading in ("Intended use", "Metrics", "Slices", "Fairness", "Calibration", "Limitations", "Personal data"):
        assert f"## {heading}" in markdown


def test_no_file_of_a_bundle_holds_a_path_a_host_or_a_time_of_this_machine(folder: Path, trained: TrainResult) -> None:
    host = os.uname().nodename
    for path in trained.bundle.path.iterdir():
        data = path.read_bytes()
        assert str(folder).encode() not in data, path.name
        assert not re.search(b"/home/|/root/|site-packages|" + re.escape(str(Path(__file__).parents[2])).encode(), data), path.name
        assert len(host) < 4 or host.encode() not in data, path.name
        if path.suffix == ".json" and path.name != "manifest.json":
            assert not re.search(rb"second|latencyMs|elapsed|createdAt", data), path.name


def test_the_reference_sample_is_what_drift_is_measured_against(trained: TrainResult) -> None:
    table = pq.read_table(trained.bundle.path / "reference.parquet")
    names = ["feature_debt", "feature_income", "feature_late_before", "feature_purpose", "feature_debt_ratio", "score", "label"]
    assert table.column_names == names  # age is personal
    assert table.num_rows == min(10_000, table.num_rows)
    frame = table.to_pandas()
    assert frame["feature_debt"].isna().any()
    assert frame["score"].between(0, 1).all()


def test_the_served_file_gives_the_scores_that_were_recorded(trained: TrainResult) -> None:
    session = ort.InferenceSession(trained.bundle.model_path, providers=["CPUExecutionProvider"])
    table = pd.read_parquet(io.BytesIO((trained.bundle.path / "reference.parquet").read_bytes()))
    contract = trained.bundle.contract
    X = np.full((len(table), len(contract.inputs)), np.nan, np.float32)
    for j, name in enumerate(contract.input_names):
        if f"feature_{name}" in table:
            X[:, j] = table[f"feature_{name}"]
    score = session.run(["score"], {"features": X})[0]
    assert np.corrcoef(score, table["score"])[0, 1] > 0.98  # all but the personal feature


SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
from hafnium_contract.progress import Silent
from hafnium_training.pipeline import TrainOptions, train
if __name__ == "__main__":
    folder, out, trials = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    options = TrainOptions(folder / "contract.yaml", folder / "lender.csv", out, epochs=12, search_epochs=4, seed=5, trials=trials)
    r = train(options, Silent())
    print(json.dumps({"digest": r.bundle.manifest.digest, "trials": len(r.trials)}))
"""


def train_elsewhere(folder: Path, out: Path, trials: int, hash_seed: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(out), str(trials)], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("trials", [1, 2], ids=["given-hyperparameters", "search"])
def test_two_processes_make_the_same_bundle(folder: Path, tmp_path: Path, trials: int) -> None:
    options(folder)
    first = train_elsewhere(folder, tmp_path / "a" / "bundle", trials, "1")
    second = train_elsewhere(folder, tmp_path / "b" / "bundle", trials, "2")
    assert first == second
    assert first["trials"] == (0 if trials == 1 else 2)
    assert not list((tmp_path / "a").glob(".*"))


def test_other_data_or_another_seed_make_another_bundle(folder: Path, trained: TrainResult) -> None:
    other = train(options(folder, "seed6", seed=6, until=days(55)), Silent())
    assert other.bundle.manifest.digest != trained.bundle.manifest.digest
    assert other.bundle.manifest.data_digest == trained.bundle.manifest.data_digest
    assert other.bundle.manifest.model_version != trained.bundle.manifest.model_version
    earlier = train(options(folder, "earlier", until=days(40)), Silent())
    assert earlier.bundle.manifest.data_digest != trained.bundle.manifest.data_digest


def test_whatever_decides_the_model_is_in_its_default_version_and_the_number_of_processors_decides_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(name: str, **changes: Any) -> TrainResult:
        return train(options(folder, out=tmp_path / name, **{"epochs": 2, **changes}), Silent())
    first = made("first")
    others = [made("epochs", epochs=3), made("params", params={"hidden": 8}), made("production", production=first.bundle.path)]
    assert len({r.bundle.manifest.model_version for r in (first, *others)}) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    again = made("again", params={})  # the defaults, said aloud
    assert again.bundle.manifest == first.bundle.manifest


def test_a_model_without_skill_makes_no_bundle_and_is_recorded_as_failed(tmp_path: Path) -> None:
    write_lender(tmp_path, skill=0.0)
    with pytest.raises(GatesFailed, match="better_than_chance") as found:
        train(options(tmp_path, tracking=tmp_path / "tracking"), Silent())
    assert found.value.exit_status == 1
    assert not (tmp_path / "bundle").exists()
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lender")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id])[0]
    assert "better_than_chance" in run.data.tags["hafnium.gates_failed"]
    assert client.search_registered_models() == []


def test_when_mlflow_is_away_the_gates_are_told_first_and_a_written_bundle_is_recorded_by_the_next_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = f"http://127.0.0.1:{free_port()}"
    said = rf"bundle written at .*not recorded in MLflow \({away}: MLflow did not start.*run again"
    with pytest.raises(NotRecordedError, match=said) as unrecorded:
        train(options(folder, out=tmp_path / "b", epochs=4, tracking=away), Silent())
    assert unrecorded.value.exit_status == 3
    assert open_bundle(tmp_path / "b").manifest.digest == unrecorded.value.bundle.manifest.digest
    again = train(options(folder, out=tmp_path / "b", epochs=4, tracking=tmp_path / "tracking"), Silent())
    assert again.registered_version == "1"
    write_lender(tmp_path / "noise", skill=0.0)
    with pytest.raises(GatesFailed, match="better_than_chance") as found:
        train(options(tmp_path / "noise", epochs=2, tracking=away), Silent())
    assert [n for n in found.value.__notes__ if away in n]


def test_a_tracking_store_that_is_there_only_when_it_is_needed_is_enough(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "tracking"
    place.write_text("not a folder yet")

    def appear() -> None:
        time.sleep(1.0)
        place.unlink()
    result = train(options(folder, out=tmp_path / "b", epochs=2, tracking=place), Stages(write=appear))
    assert result.registered_version == "1"


def test_a_model_much_worse_than_production_stays_out(folder: Path, trained: TrainResult, tmp_path: Path) -> None:
    few = [f for f in LENDER["features"] if f["name"] in ("income", "late_before")]
    (tmp_path / "poor.yaml").write_text(json.dumps({**LENDER, "version": "4", "features": few}))
    with pytest.raises(GatesFailed, match=r"production\.pr_auc"):
        train(options(folder, contract=tmp_path / "poor.yaml", out=tmp_path / "poor", production=trained.bundle.path), Silent())
    assert not (tmp_path / "poor").exists()


def test_a_retraining_with_the_found_hyperparameters_is_compared_with_production(folder: Path, trained: TrainResult) -> None:
    given = read_hyperparameters(trained.bundle.path)
    assert given == trained.hyperparameters
    again = train(options(folder, "v2", params=given.model_dump(), production=trained.bundle.path, version="v2"), Silent())
    assert again.bundle.manifest.model_version == "v2"
    assert again.latency is not None
    found = evaluation(again)
    assert found["production"]["digest"] == trained.bundle.manifest.digest
    latency = next(g for g in found["gates"] if g["name"] == "production.latency")
    assert latency == {"name": "production.latency", "verdict": "pass", "limit": latency["limit"]}


def test_production_under_another_contract_is_scored_by_its_own(folder: Path, tmp_path: Path) -> None:
    old = lender(version="2", features=[f for f in LENDER["features"] if f["name"] in ("income", "late_before")])
    production = make_bundle(tmp_path / "old", old)
    result = train(options(folder, "newer", production=production.path), Silent())
    assert evaluation(result)["production"]["change"]["roc_auc"]["value"] > 0
    needs_more = lender(version="4", features=[*LENDER["features"], {
        "name": "limit", "description": "not in the file", "dtype": "float", "range": [0, 1], "missing": "impute"}])
    other = make_bundle(tmp_path / "other", needs_more)
    with pytest.raises(InputError, match="limit"):
        train(options(folder, "newest", production=other.path), Silent())


def test_the_run_and_the_model_are_in_the_registry_once(folder: Path, trained: TrainResult) -> None:
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{folder / 'tracking' / 'mlflow.db'}")
    version = client.get_model_version_by_alias("lender", "candidate")
    assert version.tags["hafnium.bundle_digest"] == trained.bundle.manifest.digest
    assert version.tags["hafnium.data_digest"] == trained.bundle.manifest.data_digest
    run = client.get_run(str(version.run_id))
    assert run.info.run_id == trained.run_id
    assert run.data.metrics["roc_auc"] == pytest.approx(trained.metrics["roc_auc"])
    again = train(options(folder, tracking=folder / "tracking", until=days(55)), Silent())
    assert again.bundle.manifest.digest == trained.bundle.manifest.digest
    assert again.registered_version == trained.registered_version
    assert len(client.search_model_versions("name = 'lender'")) == 1


def test_trials_become_nested_runs(tmp_path: Path) -> None:
    write_lender(tmp_path, rows=1500)
    train(options(tmp_path, trials=2, search_epochs=3, tracking=tmp_path / "tracking"), Silent())
    from mlflow import MlflowClient
    client = MlflowClient(f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lender")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert {r.info.run_name for r in nested} == {"trial-0", "trial-1"}
    assert all("learningRate" in r.data.params for r in nested)


def test_wrong_options_are_refused_before_any_work(folder: Path) -> None:
    with pytest.raises(InputError, match="--params"):
        train(options(folder, params={"learning": 1}), Silent())
    with pytest.raises(InputError, match="--epochs"):
        train(options(folder, epochs=0), Silent())
    with pytest.raises(InputError, match="no such bundle"):
        train(options(folder, production=folder / "absent"), Silent())
    (folder / "afile").write_text("x")
    for change, said in (
        ({"version": "v 1"}, "--model-version 'v 1'"), ({"seed": -1}, "--seed -1: expected 0 to"), ({"seed": 2**32}, "--seed 4294967296"),
        ({"out": folder / "afile" / "b"}, r"--out .*afile is a file"), ({"tracking": "ftp://h"}, "--tracking"),
        ({"work": "s3://b"}, "--trial-storage"),
    ):
        told = Stages()
        with pytest.raises(InputError, match=said):
            train(dataclasses.replace(options(folder, "never", trials=2), **change), told)
        assert told.names == []


class Stages(Silent):
    """Remembers the stages' names, and does something when one begins."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        self.names: list[str] = []
        self.actions = actions

    def stage(self, name: str, total: int) -> None:
        del total
        self.names.append(name)
        self.actions.get(name, lambda: None)()


def test_a_contract_that_is_edited_while_training_changes_nothing(folder: Path, tmp_path: Path) -> None:
    contract = tmp_path / "contract.yaml"
    contract.write_bytes((folder / "contract.yaml").read_bytes())
    before = contract.read_bytes()
    edit = Stages(train=lambda: contract.write_bytes(before.replace(b'"threshold": 0.3', b'"threshold": 0.6')))
    result = train(options(folder, contract=contract, out=tmp_path / "b", epochs=2), edit)
    assert contract.read_bytes() != before
    assert (result.bundle.path / "contract.yaml").read_bytes() == before
    assert open_bundle(result.bundle.path).contract.decision.threshold == 0.3


def test_a_bundle_is_never_replaced_by_another(folder: Path, trained: TrainResult) -> None:
    told = Stages()
    with pytest.raises(InputError, match=r"holds another bundle already .*other version, seed.*a bundle never changes"):
        train(options(folder, seed=9, until=days(55), trials=2), told)
    assert told.names == ["load"], "refused before the search, not after it"
    with pytest.raises(HafniumError, match="a bundle never changes"):
        train(options(folder, epochs=1, until=days(55)), Silent())  # its manifest is the same up to the end
    assert open_bundle(trained.bundle.path).manifest.digest == trained.bundle.manifest.digest


def test_a_third_contract_over_a_file_of_its_own(tmp_path: Path) -> None:
    """Machines, not people: no category, no protected attribute, no id, times as text; every column says nothing to any code."""
    rng = np.random.default_rng(3)
    rows = 2500
    heat, hours = rng.normal(60, 10, rows), rng.exponential(500, rows)
    frame = pd.DataFrame({
        "ts": pd.date_range("2025-03-01", periods=rows, freq="20min").strftime("%Y-%m-%dT%H:%M:%SZ"),
        "heat": heat, "hours": hours, "broke": (rng.random(rows) < 1 / (1 + np.exp(-(heat - 75) / 5 - hours / 800 + 1))).astype(int),
    })
    frame.to_parquet(tmp_path / "machines.parquet")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({
        "schemaVersion": 1, "name": "machines", "version": "1", "owner": "plant", "description": "Breaks within a day.",
        "data": {"eventTime": {"column": "ts"}, "label": {"column": "broke"}, "labelTime": {"delay": "1d"}},
        "features": [
            {"name": "heat", "description": "temperature", "dtype": "float", "range": [-50, 300], "monotone": "increasing"},
            {"name": "hours", "description": "since service", "dtype": "float", "range": [0, 100000], "monotone": "increasing"},
        ],
        "decision": {"threshold": 0.5},
    }))
    result = train(TrainOptions(tmp_path / "c.yaml", tmp_path / "machines.parquet", tmp_path / "out", epochs=EPOCHS), Silent())
    assert result.metrics["roc_auc"] > 0.7
    assert "no protected attribute" in (result.bundle.path / "model_card.md").read_text()


def test_another_process_exports_the_same_bytes_and_passes_errors_on(folder: Path) -> None:
    model, _, _ = random_model(lender())
    with HelperProcess("hafnium_training.export") as helper:
        assert helper.call("export_onnx", model, 6) == export_onnx(model, 6)
        with pytest.raises(HafniumError, match="AttributeError"):
            helper.call("no_such_function")
        with pytest.raises(HafniumError, match="in time"):
            helper.call("export_onnx", model, 6, timeout_s=0.0)
    with HelperProcess("hafnium_training.no_such_module") as broken, pytest.raises(HafniumError, match="no_such_module"):
        broken.call("anything")


WARM_UP_TWICE = """
from pathlib import Path
from hafnium_contract.errors import HafniumError

def warm_up(log):
    tries = Path(log).read_text().count("warm") + 1 if Path(log).exists() else 1
    with Path(log).open("a") as f:
        f.write("warm")
    if tries in (1, 3, 4):
        raise HafniumError(f"start {tries} failed")

def echo(x, *, progress=None):
    return x

def slow_but_talking(*, progress):
    import time
    for _ in range(8):
        time.sleep(0.25)
        progress.advance(0)
    return "done"
"""


def test_a_start_that_failed_is_tried_once_more_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hafnium_warm_up_twice.py").write_text(WARM_UP_TWICE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    log = tmp_path / "log"
    with HelperProcess("hafnium_warm_up_twice", str(log)) as helper:
        assert helper.call("echo", 5) == 5
        assert log.read_text() == "warm" * 2
        assert helper.call("slow_but_talking", timeout_s=1.0, progress=Silent()) == "done", "the time is for a silence, not for the whole"
    with HelperProcess("hafnium_warm_up_twice", str(log)) as helper:
        with pytest.raises(HafniumError, match="start 4 failed"):
            helper.call("echo", 5)
        assert helper.call("echo", 6) == 6, "a later call starts it anew"


def test_a_killed_helper_process_is_started_and_asked_again() -> None:
    with HelperProcess("hafnium_training.hyperparameters") as helper:
        assert helper.call("parse_hyperparameters", {}, "here") == Hyperparameters()
        (child,) = (c for c in psutil.Process().children() if "hafnium_training.helper_process" in c.cmdline())
        child.kill()
        assert helper.call("parse_hyperparameters", {"groups": 3}, "here").groups == 3


def test_a_model_is_as_fast_as_itself_and_a_slower_one_is_noticed(trained: TrainResult) -> None:
    scorer = Scorer(trained.bundle.model_path.read_bytes())
    X = np.zeros((16, 6), np.float32)

    class Slow(Scorer):
        def __call__(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            for _ in range(3):
                super().__call__(rows)
            return super().__call__(rows)
    same = measure_latency((scorer, X), (scorer, X))
    assert same.lower <= 1.0 <= same.upper or abs(same.ratio - 1) < 0.5
    assert measure_latency((Slow(trained.bundle.model_path.read_bytes()), X), (scorer, X)).lower > 1.05


def test_the_commit_is_unknown_outside_of_a_repository(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "unknown"
    assert re.fullmatch(r"[0-9a-f]{40}", git_commit(Path(__file__).parent))


def test_default_hyperparameters_are_used_without_search_and_params(trained: TrainResult) -> None:
    assert trained.hyperparameters == Hyperparameters()
    assert trained.trials == ()
    assert lender_table(rows=10).shape[0] == 10
