"""`kubectl hafnium`, as a process, against a small API server: what it says to do next can be done word for word."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hafnium_rollout_world import CANDIDATE, rollout
from hafnium_scripted_api import Answer, Asked, data, says
from hafnium_small_api import SmallApi, small_api

from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_ROLLOUT
from hafnium_rollout.record_lines import rollout_data


@pytest.fixture
def place(tmp_path: Path) -> Generator[tuple[SmallApi, Path]]:
    """The server with one ModelRollout, and credentials whose present context is another server's."""

    def vera(asked: Asked) -> Answer | None:
        return data({"status": {"userInfo": {"username": "vera"}}}) if "selfsubjectreviews" in asked.path else None

    with small_api() as (api, door):
        api.before = vera
        item = rollout_data(rollout(approvals={"required": ["security"]}))
        api.put(MODEL_ROLLOUT, item | {"metadata": {"name": "risk", "namespace": "risk-ns"}, "status": {}})
        file = tmp_path / "credentials of vera"
        file.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "closed", "users": [{"name": "vera", "user": {"token": "t"}}],
            "clusters": [{"name": "open", "cluster": {"server": door.url}}, {"name": "closed", "cluster": {"server": "http://127.0.0.1:9"}}],
            "contexts": [{"name": n, "context": {"cluster": n, "user": "vera"}} for n in ("open", "closed")]}))
        yield api, file


def plugin(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NO_COLOR": "1"}
    command = [sys.executable, "-m", "hafnium_local.kubectl_plugin", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_an_approval_without_a_digest_is_answered_with_the_command_that_has_it(place: tuple[SmallApi, Path]) -> None:
    api, file = place
    options = ("-n", "risk-ns", "--context", "open", "--kubeconfig", str(file))
    for refused in (plugin("approve", "risk", "--stage", "security", *options), plugin(*options, "approve", "risk", "--stage", "security")):
        assert refused.returncode == 2
        assert f"version 2, {CANDIDATE}, trained by thea" in refused.stderr
        assert [k for k in api.objects if k[0] == MODEL_APPROVAL.plural] == []
    line = shlex.split(refused.stderr.splitlines()[-1])
    assert line[:2] == ["kubectl", "hafnium"]
    done = plugin(*line[2:])
    assert done.returncode == 0, done.stderr
    assert "vera approved version 2, sha256:aaaaaaaaaaaa, for security" in done.stdout
    (found,) = [i["spec"] for k, i in api.objects.items() if k[0] == MODEL_APPROVAL.plural]
    assert found == {"modelDigest": CANDIDATE, "stage": "security", "approver": "vera"}


def test_an_abort_does_not_fail_for_the_name_of_who_asks(place: tuple[SmallApi, Path]) -> None:
    api, file = place
    api.before = lambda asked: says(403, "no selfsubjectreviews") if "selfsubjectreviews" in asked.path else None
    done = plugin("abort", "risk", "-n", "risk-ns", "--context", "open", "--kubeconfig", str(file))
    assert done.returncode == 0, done.stderr
    action = api.get(MODEL_ROLLOUT, "risk-ns", "risk")["spec"]["action"]
    assert (action["type"], action["requestedBy"]) == ("Abort", "")


def test_a_refused_wish_is_answered_with_the_patch_for_the_same_server(place: tuple[SmallApi, Path]) -> None:
    _, file = place
    options = ("-n", "risk-ns", "--context", "open", "--kubeconfig", str(file))
    assert plugin("abort", "risk", *options).returncode == 0
    refused = plugin("skip", "risk", *options)
    assert refused.returncode == 1
    assert f"kubectl --context open --kubeconfig '{file}' patch modelrollout risk -n risk-ns" in refused.stderr
