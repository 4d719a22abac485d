"""Runs, trials and model versions in MLflow: a server, or one SQLite file and a folder of artifacts beside it.

Runs in a helper process, because importing MLflow and creating its database takes as long as training the model. The tracking
store is a record, not a part of the product: what is served is the bundle, and its digest is how the two are tied together.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hafnium_contract.errors import HafniumError, InputError

DATABASE = "mlflow.db"
ARTIFACTS = "artifacts"
ALIAS = "candidate"
NODE_TAG = "hafnium.node"
REQUEST_TIMEOUT_S, REQUEST_TRIES_MAX = "30", "5"
"""Of a server, with MLflow's own growing pauses between tries: a restart is waited for, two minutes at most."""
DIGEST_TAG = "hafnium.bundle_digest"


@dataclass(frozen=True)
class TrialRecord:
    """One nested run."""

    name: str
    parameters: Mapping[str, float]
    metrics: Mapping[str, float]
    node: str = ""
    """Host that it ran on."""


@dataclass(frozen=True)
class RunRecord:
    """One training, as it is written down. Metrics that are not finite are left out: MLflow has no place for them."""

    experiment: str
    name: str
    parameters: Mapping[str, object]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    """Holds git commit, and the digests of data, contract and bundle."""
    trials: tuple[TrialRecord, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Artifact name → text."""
    onnx: bytes | None = None
    """The model to register under the experiment's name; None: a run without a model (its gates failed)."""
    inputs: int = 0
    """Width of the model's input."""
    requirements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tracked:
    """Where a training was written down. `model_version` is None when no model was registered."""

    run_id: str
    model_version: str | None
    already_registered: bool = False


def warm_up(place: Path | str) -> None:
    """Imports MLflow and creates (or migrates) the database in a folder, or asks the server whether it is there.

    Raises HafniumError when it is not.
    """
    _quiet()
    from mlflow.exceptions import MlflowException

    try:
        _client(place)
    except (MlflowException, OSError) as e:
        raise HafniumError(f"{place}: MLflow did not start: {e}") from e


def is_server(place: Path | str) -> bool:
    """Whether runs go to a server. Raises InputError for what is neither http(s):// nor a folder."""
    text = str(place)
    if isinstance(place, Path) or "://" not in text:
        return False
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--tracking {text!r}: expected a folder or http(s)://HOST:PORT of an MLflow server")
    if parts.username or parts.password:
        raise InputError("--tracking: user and password belong into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, not the address")
    return True


def _quiet() -> None:
    """Before MLflow is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", REQUEST_TRIES_MAX)


def _client(place: Path | str) -> Any:
    server = is_server(place)
    if not server:
        Path(place).mkdir(parents=True, exist_ok=True)
    import mlflow
    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = str(place) if server else f"sqlite:///{(Path(place) / DATABASE).resolve()}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = mlflow.MlflowClient(uri, uri)
    client.search_experiments(max_results=1)
    return client


def record(place: Path | str, run: RunRecord) -> Tracked:
    """Writes the run, its trials and its model. A bundle that is registered already is found by its digest and not added again.

    A run of the same bundle that was killed half-way is found by its digest too, and finished: what it has is not written twice.
    Raises HafniumError when MLflow can't write.
    """
    _quiet()
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        client = _client(place)
        experiment = client.get_experiment_by_name(run.experiment)
        # A server has a place for artifacts of its own
        artifacts = None if is_server(place) else (Path(place) / ARTIFACTS).resolve().as_uri()
        identity = experiment.experiment_id if experiment else client.create_experiment(run.experiment, artifact_location=artifacts)
        known = None if run.onnx is None else _registered(client, run.experiment, run.tags[DIGEST_TAG])
        if known is not None:
            client.set_registered_model_alias(run.experiment, ALIAS, known.version)
            return Tracked(known.run_id or "", str(known.version), True)
        half = None if run.onnx is None else _half_recorded(client, identity, run.tags[DIGEST_TAG])
        there = set[str]() if half is None else _trials_of(client, identity, half)
        begun: dict[str, Any] = {"run_name": run.name, "tags": dict(run.tags)} if half is None else {"run_id": half}
        with mlflow.start_run(experiment_id=identity, **begun) as active:
            run_id = active.info.run_id
            # a run with a name and nothing else was killed, or its server went away, before it had any
            if half is None or not client.get_run(half).data.metrics:
                _log(client, run_id, run.parameters, run.metrics)
            for trial in run.trials:
                if trial.name in there:
                    continue
                nested = client.create_run(identity, run_name=trial.name, tags={"mlflow.parentRunId": run_id, NODE_TAG: trial.node})
                _log(client, nested.info.run_id, trial.parameters, trial.metrics)
                client.set_terminated(nested.info.run_id)
            for name, text in run.files.items():
                client.log_text(run_id, text, name)
            version = None if run.onnx is None else _register(client, identity, run_id, run, run.onnx)
        return Tracked(run_id, version)
    except (MlflowException, OSError) as e:
        raise HafniumError(f"{place}: MLflow could not record the run: {e}") from e


def _log(client: Any, run_id: str, parameters: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, Param
    now = int(time.time() * 1000)
    client.log_batch(
        run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items() if math.isfinite(v)],
        params=[Param(k, str(v)) for k, v in parameters.items()],
    )


def _registered(client: Any, name: str, digest: str) -> Any | None:
    """The version that holds this bundle's model, if there is one."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'", max_results=1)
    return found[0] if found else None


def _half_recorded(client: Any, experiment: str, digest: str) -> str | None:
    """Id of the newest run of this bundle, whose model can't have been registered (see `record`); None when there is no run."""
    found = client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'", max_results=1, order_by=["attributes.start_time DESC"])
    return found[0].info.run_id if found else None


def _trials_of(client: Any, experiment: str, run_id: str) -> set[str]:
    """Names of the trials below a run that are whole."""
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'")
    return {str(r.info.run_name) for r in found}


def _register(client: Any, experiment: str, run_id: str, run: RunRecord, model: bytes) -> str:
    """Logs the model, unless the run has it already, and registers it. Returns the version's number."""
    import mlflow

    # MLflow's own filter over `status` compares with a number
    logged = [m for m in client.search_logged_models([experiment], f"source_run_id = '{run_id}'") if m.status == "READY"]
    identity = logged[0].model_id if logged else _log_model(run, model)
    # one call with all tags: a version that was killed before its digest was on it would never be found again
    version = str(mlflow.register_model(f"models:/{identity}", run.experiment, tags=dict(run.tags)).version)
    client.set_registered_model_alias(run.experiment, ALIAS, version)
    return version


def _log_model(run: RunRecord, model: bytes) -> str:
    import numpy as np
    import onnx
    from mlflow import onnx as mlflow_onnx
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), (-1, run.inputs), "features")]),
        Schema([TensorSpec(np.dtype("float32"), (-1,), "score"), TensorSpec(np.dtype("float32"), (-1, 2), "interval")]),
    )
    logged = mlflow_onnx.log_model(
        onnx.load_from_string(model), name="model", signature=signature, pip_requirements=list(run.requirements),
        onnx_execution_providers=["CPUExecutionProvider"], save_as_external_data=False,
    )
    return str(logged.model_id)
