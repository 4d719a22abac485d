"""Starts a training as a RayJob made from a template, once for each attempt: the attempt's id is the object's name."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, cast

import yaml

from hafnium_contract.errors import InputError
from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict
from hafnium_rollout.kubernetes.kinds import Json, Kind
from hafnium_rollout.kubernetes.objects_seen import dig
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import Attempt
from hafnium_rollout.status import ModelSeen

RAY_JOB = Kind("ray.io", "v1", "rayjobs", "RayJob")
MANAGER = "hafnium-retraining"
ANNOTATION = "hafnium.dev/retraining-proposal"
LABELS = {"app.kubernetes.io/managed-by": MANAGER}
TEMPLATE_BYTES_MAX = 256 * 1024


def read_template(path: Path) -> Json:
    """The RayJob to be filled in. Raises InputError that says what is wrong, at the operator's start and not at the first drift."""
    try:
        if path.stat().st_size > TEMPLATE_BYTES_MAX:
            raise InputError(f"{path}: more than {TEMPLATE_BYTES_MAX} bytes; expected one RayJob")
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: can't be read: {e}") from e
    if not isinstance(data, dict) or (data.get("apiVersion"), data.get("kind")) != (RAY_JOB.api_version, RAY_JOB.name):
        raise InputError(f"{path}: expected one object, apiVersion: {RAY_JOB.api_version}, kind: {RAY_JOB.name}")
    found = cast("Json", data)
    if not isinstance(found.get("spec"), dict) or not isinstance(found["spec"].get("entrypoint"), str):
        raise InputError(f"{path}: spec.entrypoint is missing: without a program there is nothing to train")
    return found


def ray_job(template: Json, attempt: Attempt, rollout: ModelRollout, proposal: str) -> Json:
    """The object of an attempt. Pure.

    `${HAFNIUM_RETRAINING_…}` in any text of the spec is filled in. An entrypoint is run by a shell, so only values go in whose
    form is known to hold nothing that a shell would read: names, digests. The rest is in the annotation, as JSON.
    """
    values = {
        "HAFNIUM_RETRAINING_ID": attempt.id, "HAFNIUM_RETRAINING_NAMESPACE": rollout.metadata.namespace,
        "HAFNIUM_RETRAINING_ROLLOUT": rollout.name, "HAFNIUM_RETRAINING_MODEL": rollout.spec.model.name,
        "HAFNIUM_RETRAINING_STABLE_DIGEST": attempt.digest, "HAFNIUM_RETRAINING_KIND": attempt.kind,
    }
    found = copy.deepcopy(template)
    meta = cast("Json", found.get("metadata") or {})
    return {
        "metadata": {
            "name": attempt.id, "namespace": rollout.metadata.namespace,
            "labels": {**(meta.get("labels") or {}), **LABELS, "hafnium.dev/rollout": rollout.name},
            "annotations": {**(meta.get("annotations") or {}), ANNOTATION: proposal},
        },
        "spec": _filled(found["spec"], values),
    }


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return Template(value).safe_substitute(values)  # what is not ours, a shell's $HOME for example, stays as it is
    if isinstance(value, dict):
        return {k: _filled(v, values) for k, v in cast("Json", value).items()}
    if isinstance(value, list):
        return [_filled(v, values) for v in cast("list[Any]", value)]
    return value


class RayJobStarter:
    """Creates RayJobs in the namespace of their rollout."""

    def __init__(self, client: KubernetesClient, template: Json) -> None:
        self._client, self._template = client, template
        self._where: dict[str, str] = {}

    def start(self, attempt: Attempt, rollout: ModelRollout, stable: ModelSeen, proposal: str) -> Attempt:
        del stable  # the proposal has it
        namespace = rollout.metadata.namespace
        self._where[attempt.id] = namespace
        detail = f"RayJob {namespace}/{attempt.id}"
        try:
            self._client.create(RAY_JOB, ray_job(self._template, attempt, rollout, proposal), manager=MANAGER)
        except Conflict as e:
            if not self._mine(attempt, namespace):
                raise StateError(f"{detail} exists and is not this attempt's: delete it, or this one ends when its time is over") from e
            detail += ", which was there already"  # created, and killed before that was written down
        return attempt.model_copy(update={"state": "Started", "detail": detail})

    def find(self, attempt: Attempt, rollout: ModelRollout) -> Attempt:
        namespace = rollout.metadata.namespace
        self._where[attempt.id] = namespace
        if self._mine(attempt, namespace):
            return attempt.model_copy(update={"state": "Started", "detail": f"RayJob {namespace}/{attempt.id}, which was there already"})
        text = f"it was being started when the operator ended, and RayJob {namespace}/{attempt.id} isn't there (any more)"
        return attempt.model_copy(update={"state": "Unknown", "detail": text})

    def _mine(self, attempt: Attempt, namespace: str) -> bool:
        """A RayJob of the attempt's name was made for it, as the proposal in it says."""
        found = self._client.find(RAY_JOB, namespace, attempt.id)
        try:
            told = json.loads(str(dig(found, "metadata", "annotations", ANNOTATION)))
        except ValueError:
            return False
        return dig(told, "id") == attempt.id and dig(told, "time") == attempt.time.isoformat()

    def look(self, attempt: Attempt) -> Attempt:
        namespace = self._where.get(attempt.id) or attempt.detail.removeprefix("RayJob ").split("/")[0]
        found = self._client.find(RAY_JOB, namespace, attempt.id)
        if found is None:
            return attempt.model_copy(update={"state": "Unknown", "detail": f"RayJob {namespace}/{attempt.id} is gone"})
        status = dig(found, "status", "jobStatus")
        if status == "SUCCEEDED":
            return attempt.model_copy(update={"state": "Succeeded", "detail": f"RayJob {namespace}/{attempt.id} succeeded"})
        if status in ("FAILED", "STOPPED") or dig(found, "status", "jobDeploymentStatus") == "Failed":
            message = dig(found, "status", "message")
            return attempt.model_copy(update={"state": "Failed", "detail": f"RayJob {namespace}/{attempt.id}: {message or status}"})
        return attempt
