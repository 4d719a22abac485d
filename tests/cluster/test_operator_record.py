"""What the operator records on a real cluster is decided again exactly, and receivers hear of it, also across a `kill -9`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hafnium_kubectl import Kubectl
from hafnium_operator import OperatorProcess, model_rollout, service, until
from hafnium_receiver import receiver

from hafnium_rollout.dossier.facts import from_record
from hafnium_rollout.record import read_record
from hafnium_rollout.replaying import ReplayedTurn, replay
from hafnium_rollout.status import RolloutStatus

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("model_image")]
NAME = "recorded"


def test_the_operators_record_replays_exactly_and_its_events_arrive(namespaced: Kubectl, tmp_path: Path) -> None:
    kubectl, data = namespaced, tmp_path / "data"
    file = tmp_path / "settings.yaml"

    def phase() -> str:
        item = kubectl.read("modelrollout", NAME)
        status = item.get("status", {})
        return str(status.get("phase")) if status.get("observedGeneration") == item["metadata"]["generation"] else ""

    def weights() -> dict[str, int]:
        refs = kubectl.read("httproute", NAME)["spec"]["rules"][0]["backendRefs"]
        return {r["name"].removesuffix("-predictor"): r.get("weight", 1) for r in refs}

    with receiver() as found:
        file.write_text(yaml.safe_dump({"notifications": {"webhooks": [{"name": "hook", "url": found.url}]}}))
        operators = [OperatorProcess(tmp_path, kubectl.namespace, "first", data_folder=data, settings_file=file)]
        try:
            kubectl("apply", "-f", "-", given=model_rollout(NAME, 1))
            until(lambda: phase() == "Promoted", "the first model")
            operators[0].kill()
            operators.append(OperatorProcess(tmp_path, kubectl.namespace, "second", data_folder=data, settings_file=file))
            kubectl("apply", "-f", "-", given=model_rollout(NAME, 2))
            until(lambda: weights().get(service(NAME, 2)) == 20, "a fifth for the candidate")
            env = os.environ | {"NO_COLOR": "1"}
            command = [sys.executable, "-m", "hafnium_local", "rollout", "abort", NAME, "-n", kubectl.namespace, "--reason", "CHG-1"]
            subprocess.run(command, check=True, env=env, timeout=120)
            until(lambda: phase() == "RolledBack", "taken back")
            until(lambda: [r for r in found.requests if r.data["event"] == "RolledBack"], "the last event")
        finally:
            for operator in operators:
                operator.stop()
    told = list(dict.fromkeys((r.data["id"], r.data["event"]) for r in found.requests))
    assert [event for _, event in told] == ["Started", "Promoted", "Started", "Rollback", "RolledBack"]
    folder = data / "record" / kubectl.namespace / f"ModelRollout-{NAME}"
    turns = [t for t in replay(read_record(folder)) if isinstance(t, ReplayedTurn)]
    assert len(turns) > 5
    assert all(t.equal for t in turns)
    last = turns[-1].recorded.status
    kept = RolloutStatus.model_validate(kubectl.read("modelrollout", NAME)["status"])
    assert (last.phase, last.rejected_digests, last.run_id) == (kept.phase, kept.rejected_digests, kept.run_id) != ("", (), "")
    asked = from_record(folder, turns[-1].now).asked
    assert [(a.action.type, a.action.reason) for a in asked] == [("Abort", "CHG-1")]
    kubectl("delete", "modelrollout", NAME)
