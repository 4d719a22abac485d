"""The RayJob of an attempt, from a template that a person wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hafnium_rollout_world import STABLE, START, rollout
from hafnium_scripted_api import ScriptedApi, says
from hafnium_small_api import small_api

from hafnium_contract.errors import InputError
from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes.companions import companions_of
from hafnium_rollout.kubernetes.leader import Leader
from hafnium_rollout.kubernetes.ray_jobs import ANNOTATION, RAY_JOB, RayJobStarter, ray_job, read_template
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.retraining.policy import Attempt
from hafnium_rollout.retraining.trigger import proposal
from hafnium_rollout.status import ModelSeen

TEMPLATE: dict[str, Any] = {
    "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "ignored", "labels": {"team": "risk"}},
    "spec": {"entrypoint": "train --of ${HAFNIUM_RETRAINING_STABLE_DIGEST} --home $HOME", "suspend": False,
             "rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"containers": [
                 {"name": "head", "env": [{"name": "ID", "value": "$HAFNIUM_RETRAINING_ID"}]}]}}}}},
}
ATTEMPT = Attempt(id="risk-retrain-bbbbbbbb-1", time=START, digest=STABLE, kind="drift", findings=("a",), message="m", state="Intended")

CLIENT = ScriptedApi(says(500)).client()
SEEN = ModelSeen(service="risk", digest=STABLE)
LEADER = Leader(CLIENT, "ops", "hafnium", "me")


def test_names_and_digests_are_filled_in_and_nothing_else_is_touched() -> None:
    spec = rollout(model={"storageUri": "s3://x/$(rm -rf /)"})
    made = ray_job(TEMPLATE, ATTEMPT, spec, '{"a": 1}')
    assert made["metadata"]["name"] == ATTEMPT.id
    assert made["metadata"]["namespace"] == "default"
    assert made["metadata"]["labels"]["team"] == "risk"
    assert made["metadata"]["annotations"][ANNOTATION] == '{"a": 1}'
    assert made["spec"]["entrypoint"] == f"train --of {STABLE} --home $HOME"
    assert made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][0]["value"] == ATTEMPT.id
    assert made["spec"]["suspend"] is False
    assert "rm -rf" not in str(made)
    assert TEMPLATE["spec"]["entrypoint"].startswith("train --of ${")


@pytest.mark.parametrize(("text", "words"), [
    ("{half", "can't be read"), ("kind: Job", "expected one object"), ("[]", "expected one object"),
    ("apiVersion: ray.io/v1\nkind: RayJob\nspec: {}", "entrypoint is missing")])
def test_a_template_that_cannot_work_is_refused_at_the_start(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_template(path)
    with pytest.raises(InputError, match="can't be read"):
        read_template(tmp_path / "absent")


@pytest.mark.parametrize(("given", "folder", "words"), [
    ({"notifications": {"webhooks": [{"name": "a", "url": "http://a/"}]}}, False, "give --data_folder"),
    ({"retraining": {"policy": "propose"}}, False, "give --data_folder"),
    ({"retraining": {"policy": "start", "command": ["train"]}}, True, "for one machine"),
    ({"retraining": {"policy": "start", "rayJobTemplate": "/nowhere.yaml"}}, True, "nowhere")])
def test_operator_settings_that_cannot_work_are_refused_at_the_start(
    tmp_path: Path, given: dict[str, Any], folder: bool, words: str,
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(given))
    settings = Settings(settings_file=path, data_folder=tmp_path / "data" if folder else None)
    with pytest.raises(InputError, match=words):
        companions_of(settings, CLIENT, print, LEADER)


def test_alertmanager_alone_needs_no_volume(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"notifications": {"alertmanagers": [{"name": "a", "url": "http://a/"}]}}))
    found = companions_of(Settings(settings_file=path), CLIENT, print, LEADER)
    assert found.notifier is not None
    assert found.record_folder is None


def test_a_ray_job_of_the_same_name_that_is_not_the_attempts_is_no_start_of_it() -> None:
    with small_api() as (api, door):
        starter = RayJobStarter(door.client(), TEMPLATE)
        api.put(RAY_JOB, {"metadata": {"name": ATTEMPT.id, "namespace": "default"}, "spec": {}})
        with pytest.raises(StateError, match="is not this attempt's"):
            starter.start(ATTEMPT, rollout(), SEEN, proposal(ATTEMPT, rollout(), SEEN))
        assert starter.find(ATTEMPT, rollout()).state == "Unknown"


def test_a_start_that_was_cut_off_is_found_by_its_proposal() -> None:
    with small_api() as (api, door):
        assert RayJobStarter(door.client(), TEMPLATE).find(ATTEMPT, rollout()).state == "Unknown"
        RayJobStarter(door.client(), TEMPLATE).start(ATTEMPT, rollout(), SEEN, proposal(ATTEMPT, rollout(), SEEN))
        assert RayJobStarter(door.client(), TEMPLATE).find(ATTEMPT, rollout()).state == "Started"
        again = RayJobStarter(door.client(), TEMPLATE).start(ATTEMPT, rollout(), SEEN, proposal(ATTEMPT, rollout(), SEEN))
        assert again.state == "Started"
        assert api.writes == ["POST rayjobs"]
