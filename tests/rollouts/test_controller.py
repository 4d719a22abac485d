"""The controller on a real state folder behind a real Envoy, with real traffic."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hafnium_rollout_gateway import CANDIDATE_DIGEST, Gateway, gateway

from hafnium_rollout import commands
from hafnium_rollout.controller import Controller, only_one
from hafnium_rollout.objects import load_rollout
from hafnium_rollout.record import read_record
from hafnium_rollout.record_lines import RecordedTurn
from hafnium_rollout.replaying import ReplayedTurn, replay
from hafnium_rollout.state_folder import StateFolder
from hafnium_rollout.status import RolloutStatus

NAME = "risk-aaaaaaaa"


def manifest(slower_than: str = "2500ms", **changes: Any) -> dict[str, Any]:
    """`slower_than` is far from what a busy test machine does by itself."""
    spec: dict[str, Any] = {
        "model": {"name": "risk", "version": "2", "storageUri": "file:///bundles/2", "digest": CANDIDATE_DIGEST},
        "service": {"predictor": {"model": {"modelFormat": {"name": "onnx"}, "runtime": "hafnium-onnx"}}},
        "strategy": {
            "steps": [{"shadow": True, "minSamples": 100}, {"weight": 50, "minDwell": "1s", "minSamples": 50},
                      {"weight": 100, "minDwell": "1s"}],
            "maxBlindDuration": "20s", "scrapeLag": "200ms",
        },
        "gates": [
            {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.1}},
            {"name": "latency", "role": "Safety", "latency": {"slowerThan": slower_than}, "compare": {"margin": 0.1}},
        ],
    }
    spec.update(changes)
    return {"apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout",
            "metadata": {"name": "risk", "annotations": {"local.hafnium.dev/fault": "slow", "other": "x"}}, "spec": spec}


@pytest.fixture
def envoy(tmp_path: Path) -> Generator[Gateway]:
    with gateway(tmp_path / "state") as found:
        yield found


@contextmanager
def traffic(envoy: Gateway) -> Generator[None]:
    """Requests without a break, and the supervisor's part beside them."""
    stop = threading.Event()
    failed: list[dict[int, int]] = []

    def requests() -> None:
        while not stop.is_set():
            try:
                failed.append({s: n for s, n in envoy.send(20).items() if s != 200})
            except OSError:
                time.sleep(0.05)

    def supervise() -> None:
        while not stop.is_set():
            envoy.sync()
            stop.wait(0.05)

    threads = [threading.Thread(target=requests), threading.Thread(target=supervise)]
    for t in threads:
        t.start()
    try:
        yield
    finally:
        stop.set()
        for t in threads:
            t.join(15)


def apply(envoy: Gateway, **changes: Any) -> None:
    file = envoy.state.parent / "rollout.yaml"
    file.write_text(yaml.safe_dump(manifest(**changes)))
    commands.apply(envoy.state, file)


def until(
    condition: Callable[[], bool], what: Callable[[], object], *, turn: Callable[[], object] = lambda: None, limit_s: float = 90,
) -> None:
    for _ in range(int(limit_s / 0.4)):
        turn()
        if condition():
            return
        time.sleep(0.4)
    raise AssertionError(f"did not come about: {what()}")


def status(envoy: Gateway) -> RolloutStatus:
    return commands.read_status(envoy.state, "risk")


def later(_: float) -> None:
    raise TimeoutError("it would wait")


@pytest.mark.slow
def test_a_good_candidate_is_promoted_and_the_commands_tell_the_story(envoy: Gateway) -> None:
    apply(envoy)
    lines: list[dict[str, Any]] = []
    controller = Controller(StateFolder(envoy.state), log=lines.append)
    with traffic(envoy):
        until(lambda: status(envoy).phase == "Promoted", lambda: commands.status_table(envoy.state), turn=controller.turn)
        until(lambda: not list((envoy.state / "status").glob("*.new")), lambda: "", turn=controller.turn, limit_s=2)
    route = json.loads((envoy.state / "routes" / "risk.json").read_text())
    assert route == {"name": "risk", "stable": NAME, "candidate": None, "weight": 0, "shadow": False}
    service = yaml.safe_load((envoy.state / "objects" / f"InferenceService-{NAME}.yaml").read_text())
    assert service["spec"]["predictor"]["model"]["storageUri"] == "file:///bundles/2"
    assert service["metadata"]["labels"]["hafnium.dev/model-digest"] == "aaaaaaaa"
    assert service["metadata"]["annotations"] == {"local.hafnium.dev/fault": "slow"}
    assert (envoy.state / "objects" / "InferenceService-risk.yaml").is_file()  # a person's service is not ours to delete
    assert [x["event"] for x in lines if x["event"] in ("Started", "StepEntered", "Promoted")] == [
        "Started", "StepEntered", "StepEntered", "StepEntered", "Promoted"]
    json.dumps(lines, default=str)
    replayed = [t for t in replay(read_record(commands.record_of(envoy.state, "risk"))) if isinstance(t, ReplayedTurn)]
    assert len(replayed) > 5
    assert all(t.equal for t in replayed), "a replay of what really happened decides the same at every turn"
    assert replayed[-1].recorded.status.phase == "Promoted"
    told = [p.event for p in commands.watch(envoy.state, "risk", lambda _: None)]
    assert told[0] == "Started"
    assert told[-1] == "Promoted"
    following = {"name": "risk", "version": "3", "storageUri": "file:///bundles/3", "digest": "sha256:" + "b" * 64}
    apply(envoy, model=following)  # the next model is applied, and nobody has looked yet
    with pytest.raises(TimeoutError):
        list(commands.watch(envoy.state, "risk", later))
    table = commands.status_table(envoy.state).splitlines()
    assert table[0].split() == list(commands.COLUMNS)
    assert table[1].split()[:4] == ["risk", "Promoted", "-", "100%"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "every", "gate"), [("error", 3, "errors"), ("slow", 2, "latency"), ("reset", 3, "errors")])
def test_a_bad_candidate_goes_back_before_or_under_live_traffic(envoy: Gateway, mode: str, every: int, gate: str) -> None:
    apply(envoy, slower_than="100ms")
    envoy.candidate.mode, envoy.candidate.every = mode, every
    controller = Controller(StateFolder(envoy.state), log=lambda _: None)
    with traffic(envoy):
        until(lambda: status(envoy).phase == "RolledBack", lambda: commands.status_table(envoy.state), turn=controller.turn)
        until(lambda: not (envoy.state / "objects" / f"InferenceService-{NAME}.yaml").exists(), lambda: "not retired",
              turn=controller.turn)
    assert gate in status(envoy).message
    assert json.loads((envoy.state / "routes" / "risk.json").read_text())["candidate"] is None


@pytest.mark.slow
def test_the_process_may_be_killed_at_any_time_and_only_one_acts(envoy: Gateway) -> None:
    apply(envoy)
    command = [sys.executable, "-m", "hafnium_rollout", "--state", str(envoy.state), "--look-seconds", "0.4"]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=(envoy.state.parent / f"log{len(started)}").open("wb"))
        started.append(process)
        return process

    try:
        with traffic(envoy):
            first = start()
            until(lambda: (envoy.state / "status" / "ModelRollout-risk.json").exists(), lambda: "no status")
            second = start()
            until(lambda: b"Standby" in (envoy.state.parent / "log1").read_bytes(), lambda: "the second acts or is dead")
            for _ in range(3):
                os.kill(first.pid, signal.SIGKILL)
                first.wait()
                first, second = second, start()
                time.sleep(1.0)
            until(lambda: status(envoy).phase == "Promoted", lambda: commands.status_table(envoy.state))
        standby = (envoy.state.parent / "log1").read_text()
        # On a busy machine the other one may have promoted, while this one still imports and would just be killed
        until(lambda: (envoy.state.parent / f"log{started.index(first)}").stat().st_size > 0, lambda: "it says nothing")
        first.terminate()
        assert first.wait(10) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert all(json.loads(x) for x in standby.splitlines())


@pytest.mark.slow
def test_a_restarted_gateway_costs_one_look_and_moves_nothing(envoy: Gateway) -> None:
    apply(envoy)
    controller = Controller(StateFolder(envoy.state), log=lambda _: None)
    with traffic(envoy):
        until(lambda: (s := status(envoy).step) is not None and s.index == 1, lambda: commands.status_table(envoy.state),
              turn=controller.turn)
        envoy.stop_envoy()
        controller.turn()
        envoy.start_envoy()
        until(lambda: status(envoy).phase == "Promoted", lambda: commands.status_table(envoy.state), turn=controller.turn)


def test_a_second_controller_does_not_act(tmp_path: Path) -> None:
    folder, stop, told = StateFolder(tmp_path), threading.Event(), list[dict[str, Any]]()
    with only_one(folder, stop, told.append) as held:
        assert held
        other = threading.Event()
        threading.Timer(0.3, other.set).start()
        with only_one(folder, other, told.append, poll_s=0.05) as second:
            assert not second
    assert [x["event"] for x in told] == ["Standby"]
    with only_one(folder, stop, told.append) as held:
        assert held


def test_a_broken_file_leaves_the_candidate_guarded_and_is_told_once(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    folder = StateFolder(tmp_path)
    (tmp_path / "objects").mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest()))
    controller = Controller(folder, log=lines.append)
    controller.turn()
    folder.rollout("risk").write_text("apiVersion: hafnium.dev/v1alpha1\nkind: ModelRollout\nmetadata: {name: risk}\nspec: {}\n")
    controller.turn()
    controller.turn()
    Controller(folder, log=lines.append).turn()  # a new process finds it too
    invalid = [x for x in lines if x["event"] == "SpecInvalid"]
    assert len(invalid) == 2, "once by each process"
    assert "spec.strategy" in invalid[0]["message"]
    assert all("going on with the last good one" in x["message"] for x in invalid)


def test_a_damaged_copy_of_the_last_good_object_is_told_and_put_right(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    folder = StateFolder(tmp_path)
    for sub in ("objects", "status"):
        (tmp_path / sub).mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest()))
    folder.last_good("risk").write_text("{half")
    Controller(folder, log=lines.append).turn()
    assert [x["event"] for x in lines if x["event"] in ("LastGoodInvalid", "TurnFailed")] == ["LastGoodInvalid"]
    assert load_rollout(folder.last_good("risk")) == load_rollout(folder.rollout("risk"))


def test_a_copy_without_its_object_goes_away(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    for sub in ("objects", "status"):
        (tmp_path / sub).mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest()))
    controller = Controller(folder, log=lambda _: None)
    controller.turn()
    folder.rollout("risk").unlink()
    folder.status("risk").unlink(missing_ok=True)
    Controller(folder, log=lambda _: None).turn()
    assert not folder.last_good("risk").exists()


def test_a_status_that_cannot_be_read_stops_that_rollout_and_no_other(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    folder = StateFolder(tmp_path)
    for sub in ("objects", "status"):
        (tmp_path / sub).mkdir()
    for name in ("risk", "other"):
        data = manifest()
        data["metadata"]["name"] = name
        folder.rollout(name).write_text(yaml.safe_dump(data))
    folder.status("risk").write_text("{half")
    Controller(folder, log=lines.append).turn()
    assert folder.status("risk").read_text() == "{half"
    assert folder.status("other").is_file()
    assert any(x["event"] == "TurnFailed" and "nothing is moved" in x["message"] for x in lines)


def test_a_record_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    folder = StateFolder(tmp_path)
    (tmp_path / "objects").mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest()))
    folder.record("risk").parent.mkdir()
    folder.record("risk").write_text("a file where the folder should be")
    controller = Controller(folder, log=lines.append)
    controller.turn()
    controller.turn()
    assert [x["event"] for x in lines if x["event"] in ("RecordFailed", "TurnFailed")] == ["RecordFailed"]
    assert folder.status("risk").is_file()
    folder.record("risk").unlink()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest(paused=True)))
    controller.turn()
    assert [type(e).__name__ for e in read_record(folder.record("risk"))] == ["Start", "RecordedTurn"]


def test_a_turn_whose_actions_fail_is_recorded_all_the_same(tmp_path: Path) -> None:
    """The status is written by then, and the next turn goes on from it."""
    lines: list[dict[str, Any]] = []
    folder = StateFolder(tmp_path)
    (tmp_path / "objects").mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(manifest()))
    (tmp_path / "services.json").write_text('{"services": []}')
    controller = Controller(folder, log=lines.append)
    controller.turn()
    (tmp_path / "objects" / f"InferenceService-{NAME}.yaml").mkdir()  # a folder where the candidate's object should be written
    for _ in range(3):
        controller.turn()
    assert "TurnFailed" in [x["event"] for x in lines]
    replayed = list(replay(read_record(folder.record("risk"))))
    assert len(replayed) >= 2
    assert all(isinstance(t, ReplayedTurn) and t.equal for t in replayed)
    assert [a["type"] for e in read_record(folder.record("risk")) if isinstance(e, RecordedTurn) for a in e.actions][:1] == [
        "EnsureCandidate"]


def test_a_rollout_deleted_under_way_leaves_all_traffic_to_stable(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    (tmp_path / "status").mkdir()
    folder.status("risk").write_text(json.dumps({
        "phase": "Progressing", "runId": "x", "stable": {"service": "risk"}, "candidate": {"service": NAME, "digest": CANDIDATE_DIGEST}}))
    lines: list[dict[str, Any]] = []
    Controller(folder, log=lines.append).turn()
    assert json.loads(folder.route("risk").read_text()) == {
        "name": "risk", "stable": "risk", "candidate": None, "weight": 0, "shadow": False}
    assert not folder.status("risk").exists()
    assert lines[0]["event"] == "Deleted"
