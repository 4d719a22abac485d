"""The supervisor with real processes and the real Envoy: what is wanted runs, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.errors import InputError
from hafnium_local.runtime import run


@pytest.fixture
def fraud(tools: Any) -> dict[str, Any]:
    return tools.inference_service("fraud", "--version", "1")


def test_up_serves_through_the_gateway_and_ends_with_nothing_left(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    runtime.wait_answers("1")
    status, body, headers = runtime.score(amount=3)
    assert (status, body["model_version"], headers["x-hafnium-arm"]) == (200, "1", "stable")
    assert json.loads((runtime.state / "routes" / "fraud.json").read_text()) == {
        "name": "fraud", "stable": "fraud", "candidate": None, "weight": 0, "shadow": False,
    }
    assert "gateway: http://127.0.0.1:" in runtime.said
    pids = tools.marked(runtime.state)
    assert len(pids) == 2
    assert runtime.end() == 0
    assert tools.marked(runtime.state) == []
    assert "stopped" in runtime.said


def test_ctrl_c_ends_everything(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    runtime.process.send_signal(signal.SIGINT)
    assert runtime.process.wait(60) == 0
    assert tools.marked(runtime.state) == []


def test_kill_9_leaves_no_orphan_and_the_next_run_goes_on_with_the_same_ports(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    first = up(fraud)
    first.wait_ready("fraud")
    before, port = first.file("runtime.json"), first.service("fraud")["port"]
    pids = tools.marked(first.state)
    first.kill()
    tools.eventually(lambda: not any(tools.alive(p) for p in pids), "children die with the supervisor")
    second = up(state=first.state)  # no file: what is wanted is in the state folder
    second.wait_answers("1")
    second.wait_ready("fraud")
    assert second.service("fraud")["port"] == port
    assert {k: second.file("runtime.json")[k] for k in ("gatewayPort", "adminPort")} == {
        k: before[k] for k in ("gatewayPort", "adminPort")
    }


def test_what_a_killed_supervisors_child_had_started_is_ended_by_the_next_run(up: Any, tools: Any) -> None:
    first = up(tools.inference_service("fraud", "--child"))
    first.wait_ready("fraud")
    first.kill()
    tools.eventually(lambda: len(tools.marked(first.state)) == 1, "only the grandchild lives")
    second = up(state=first.state)
    second.wait_ready("fraud")
    assert "ended 1 process that the last run had left behind" in second.said


def test_second_supervisor_on_the_same_folder_is_refused(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    first = up(fraud)
    first.wait_ready("fraud")
    second = up(fraud, state=first.state)
    assert second.process.wait(60) == 2
    assert f"in use by another `hafnium up` (process {first.process.pid})" in second.said
    assert first.score()[0] == 200


def test_changed_service_is_replaced_without_a_lost_request(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_answers("1")
    answers: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(runtime.score()[0])

    thread = threading.Thread(target=client)
    thread.start()
    try:
        runtime.apply(tools.inference_service("fraud", "--version", "2"))
        runtime.wait_answers("2")
        tools.eventually(lambda: len(tools.marked(runtime.state)) == 2, "the old revision has ended")
    finally:
        stop.set()
        thread.join()
    assert set(answers) == {200}


def test_revision_that_never_gets_ready_changes_nothing_and_says_why(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_answers("1")
    runtime.apply(tools.inference_service("fraud", "--fail-start"))
    message = tools.eventually(
        lambda: (m := runtime.service("fraud").get("message", "")) and "no such file" in m and m, "the reason is shown"
    )
    assert "a new revision is coming up" in message
    assert "ended with status 3; last lines: the model is broken: no such file" in message
    assert runtime.service("fraud")["ready"] is True
    runtime.wait_answers("1")


def test_removed_service_stops_and_its_route_and_cluster_go(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud, tools.inference_service("other", "--version", "9"))
    runtime.wait_ready("fraud", "other")
    assert runtime.score("other")[1]["model_version"] == "9"
    (runtime.state / "objects" / "InferenceService-other.yaml").unlink()
    tools.eventually(lambda: not runtime.service("other"), "entry removed")
    tools.eventually(lambda: "other::" not in str(tools.call(f"{runtime.admin}/clusters")[1]), "cluster removed")
    assert not (runtime.state / "routes" / "other.json").exists()
    tools.eventually(lambda: len(tools.marked(runtime.state)) == 2, "process ended")


def test_crashed_service_is_restarted_on_its_port_and_counted(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    port = runtime.service("fraud")["port"]
    os.kill(runtime.child("backend.py"), signal.SIGKILL)
    tools.eventually(lambda: runtime.service("fraud")["restarts"] == 1 and runtime.service("fraud")["ready"], "restarted")
    assert runtime.service("fraud")["port"] == port
    assert "fraud: fraud-predictor: killed by SIGKILL" in runtime.said
    runtime.wait_answers("1")


def test_killed_gateway_comes_back_on_the_same_port_with_the_same_routes(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud, tools.inference_service("next", "--version", "2", labels={"hafnium.dev/rollout": "fraud"}))
    runtime.wait_ready("fraud", "next")
    runtime.route("fraud", "fraud", "next", weight=100)
    runtime.wait_answers("2")
    url = runtime.url
    os.kill(runtime.child("bin/envoy"), signal.SIGKILL)
    tools.eventually(lambda: "gateway: killed by SIGKILL" in runtime.said, "noticed")
    runtime.wait_answers("2")
    assert runtime.url == url
    assert not (runtime.state / "routes" / "next.json").exists(), "a service that a rollout owns gets no route of its own"


@pytest.mark.slow
def test_service_that_hangs_is_restarted(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    tools.call(f"http://127.0.0.1:{runtime.service('fraud')['port']}/control", {"hang": True})
    tools.eventually(lambda: runtime.service("fraud")["restarts"] == 1 and runtime.service("fraud")["ready"], "restarted")
    assert "hung: no answer from" in runtime.said


def test_readiness_follows_the_service_and_gives_its_reason(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    tools.call(f"http://127.0.0.1:{runtime.service('fraud')['port']}/control", {"ready": False})
    tools.eventually(lambda: not runtime.service("fraud")["ready"], "not ready")
    assert runtime.service("fraud")["message"] == "fraud-predictor: not ready: the feature store is away"
    assert runtime.service("fraud")["restarts"] == 0


def test_bad_object_or_route_in_the_folder_is_told_and_what_ran_goes_on(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_answers("1")
    (runtime.state / "objects" / "InferenceService-fraud.yaml").write_text("kind: [")
    (runtime.state / "routes" / "fraud.json").write_text('{"name": "fraud", "stable": "fraud", "weight": 300}')
    tools.eventually(lambda: runtime.said.count("not taken over") == 2, "told")
    assert "InferenceService-fraud.yaml:1: not YAML" in runtime.said
    assert "weight must be a number from 0 to 100, got 300" in runtime.said
    assert runtime.score()[0] == 200


def test_state_that_cannot_be_written_is_told_and_tried_again(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_ready("fraud")
    port, file = runtime.service("fraud")["port"], runtime.state / "services.json"
    file.unlink()
    file.mkdir()  # a full disk can't be had here; this fails in the same place
    tools.call(f"http://127.0.0.1:{port}/control", {"ready": False})
    tools.eventually(lambda: "can't be written or read" in runtime.said, "told")
    assert runtime.score()[0] == 200
    file.rmdir()
    tools.eventually(lambda: runtime.service("fraud").get("ready") is False, "written again")
    assert runtime.said.count("can't be written or read") == 1


def test_rollout_controller_runs_while_there_is_a_rollout_and_comes_back(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    rollout = {
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": {"name": "fraud"},
        "spec": {
            "model": {"name": "fraud", "version": "2", "storageUri": "file:///no", "digest": "sha256:" + "a" * 64},
            "service": fraud["spec"], "strategy": {"steps": [{"weight": 100, "minDwell": "1m"}]},
            "gates": [{"name": "errors", "role": "Safety", "requests": {}}],
        },
    }
    runtime = up(fraud, rollout)
    runtime.wait_answers("1")
    first = tools.eventually(lambda: runtime.child("hafnium_rollout"), "controller runs")
    os.kill(first, signal.SIGKILL)
    tools.eventually(lambda: runtime.child("hafnium_rollout") not in (0, first), "controller is back")
    tools.eventually(lambda: "rollout controller: killed by SIGKILL" in runtime.said, "told")
    assert json.loads((runtime.state / "routes" / "fraud.json").read_text())["stable"] == "fraud"
    (runtime.state / "objects" / "ModelRollout-fraud.yaml").unlink()
    tools.eventually(lambda: runtime.child("hafnium_rollout") == 0, "controller ended")


def test_port_that_is_taken_is_a_clear_error(up: Any, fraud: dict[str, Any]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        runtime = up(fraud, port=s.getsockname()[1])
        assert runtime.process.wait(60) == 2
        assert f"port {s.getsockname()[1]} is taken by another program; use another --port" in runtime.said


def test_kept_port_that_was_taken_meanwhile_moves(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    first = up(fraud)
    first.wait_ready("fraud")
    taken = first.service("fraud")["port"]
    assert first.end() == 0
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", taken))
        s.listen()
        second = up(state=first.state)
        second.wait_answers("1")
        assert second.service("fraud")["port"] != taken


def test_port_that_is_taken_while_its_service_is_down_is_left_for_another(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_answers("1")
    taken = runtime.service("fraud")["port"]
    with _taken(runtime, tools, taken):
        tools.eventually(lambda: f"port {taken} was taken by another program; moving" in runtime.said, "told")
        runtime.wait_answers("1")
        assert runtime.service("fraud")["port"] != taken
        assert runtime.service("fraud")["restarts"] >= 2, "they happened, though it has other processes now"


@contextlib.contextmanager
def _taken(runtime: Any, tools: Any, port: int) -> Generator[None]:
    """Kills the service's process, and is the stranger that takes its port and answers each request there with 200."""
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any, **__: Any) -> None:
            pass

    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def bound() -> bool:
            os.kill(runtime.child("backend.py") or runtime.process.pid, signal.SIGKILL)
            try:
                s.bind(("127.0.0.1", port))  # before the restarted interpreter comes to that
            except OSError:
                tools.eventually(lambda: runtime.child("backend.py"), "up again")
                return False
            s.listen()
            return True

        tools.eventually(bound, "port taken")
        server = ThreadingHTTPServer(("127.0.0.1", port), Stranger, bind_and_activate=False)
        server.socket.close()
        server.socket = s
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_declared_port_that_another_program_took_is_told_and_that_one_is_never_called_ready(up: Any, tools: Any) -> None:
    port = tools.free_port()
    service = tools.inference_service("fraud", "--version", "1")
    service["spec"]["predictor"]["containers"][0]["ports"] = [{"containerPort": port}]
    runtime = up(service)
    runtime.wait_answers("1")
    with _taken(runtime, tools, port):
        tools.eventually(lambda: f"port {port}, which its container declares, is taken" in runtime.service("fraud")["message"], "told")
        before = len(runtime.said)
        tools.eventually(lambda: runtime.service("fraud")["restarts"] >= 6, "tried again and again")
        assert "ready" not in runtime.said[before:].replace("not ready", "")
        assert "moving" not in runtime.said, "there is nothing to move to"
        assert runtime.said.count("which its container declares") <= 2
        assert not runtime.service("fraud")["ready"]
    runtime.wait_answers("1")


def test_container_that_insists_on_its_port_is_stopped_before_its_next_revision_starts(up: Any, tools: Any) -> None:
    port = tools.free_port()

    def service(version: str) -> dict[str, Any]:
        out = tools.inference_service("fraud", "--version", version)
        out["spec"]["predictor"]["containers"][0]["ports"] = [{"containerPort": port}]
        return out

    runtime = up(service("1"))
    runtime.wait_answers("1")
    runtime.apply(service("2"))
    runtime.wait_answers("2")
    assert runtime.service("fraud")["port"] == port
    runtime.apply({**service("3"), "metadata": {"name": "other"}})
    tools.eventually(lambda: f"port {port}, which its container declares, is taken" in runtime.service("other").get("message", ""), "told")
    runtime.wait_answers("2")
    (runtime.state / "objects" / "InferenceService-fraud.yaml").unlink()
    tools.eventually(lambda: runtime.service("other").get("ready"), "it starts when the port is free")


def test_change_of_mind_during_a_replacement_ends_at_the_last_wish(up: Any, tools: Any, fraud: dict[str, Any]) -> None:
    runtime = up(fraud)
    runtime.wait_answers("1")
    for version in ("2", "3", "4"):
        runtime.apply(tools.inference_service("fraud", "--version", version))
        tools.eventually(lambda: "coming up" in runtime.service("fraud")["message"], "the next one starts")
    runtime.wait_answers("4")
    tools.eventually(lambda: len(tools.marked(runtime.state)) == 2, "the others have ended")
    runtime.apply(tools.inference_service("fraud", "--fail-start"))
    tools.eventually(lambda: "coming up" in runtime.service("fraud")["message"], "a bad one starts")
    runtime.apply(tools.inference_service("fraud", "--version", "4"))
    tools.eventually(lambda: runtime.service("fraud")["message"] == "", "back without a change")
    assert runtime.service("fraud")["restarts"] == 0


def test_bad_yaml_applies_nothing(up: Any, fraud: dict[str, Any]) -> None:
    fraud["spec"]["predictor"]["containers"][0]["imagePulPolicy"] = "Always"
    runtime = up(fraud)
    assert runtime.process.wait(60) == 2
    assert 'imagePulPolicy: unknown field; did you mean "imagePullPolicy"?' in runtime.said
    assert list((runtime.state / "objects").iterdir()) == []


def test_empty_state_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to run"):
        run([], tmp_path / "state", None, lambda _: None)


def test_state_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(InputError, match="can't be used as a state folder"):
        run([], tmp_path / "state", None, lambda _: None)


def test_whole_life_in_this_process(tmp_path: Path, tools: Any, fraud: dict[str, Any]) -> None:
    """The same as above without a process in between, so that coverage sees the supervisor."""
    file = tmp_path / "given.yaml"
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "risk"}}
    file.write_text(yaml.safe_dump_all([namespace, fraud, tools.inference_service("next", "--version", "2")]))
    state, said, failed = tmp_path / "state", list[str](), list[str]()

    def services() -> dict[str, Any]:
        try:
            return {s["name"]: s for s in json.loads((state / "services.json").read_text())["services"]}
        except (OSError, ValueError):
            return {}

    def user() -> None:
        try:
            tools.eventually(lambda: len(services()) == 2 and all(s["ready"] for s in services().values()), "ready")
            pid = tools.call(f"http://127.0.0.1:{services()['next']['port']}/seen")[1]["pid"]
            os.kill(pid, signal.SIGKILL)
            tools.eventually(lambda: services()["next"]["restarts"] == 1 and services()["next"]["ready"], "restarted")
            (state / "objects" / "InferenceService-next.yaml").unlink()
            tools.eventually(lambda: "next" not in services(), "removed")
            changed = tools.inference_service("fraud", "--version", "3")
            (state / "objects" / "InferenceService-fraud.yaml").write_text(yaml.safe_dump(changed))
            url = f"http://127.0.0.1:{json.loads((state / 'runtime.json').read_text())['gatewayPort']}/v1/score"
            tools.eventually(lambda: (a := tools.call(url, {"features": {}}))[0] == 200 and a[1]["model_version"] == "3", "replaced")
        except BaseException as e:
            failed.append(repr(e))
            raise
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=user)
    thread.start()
    try:
        assert run([file], state, None, said.append) == 0
    finally:
        thread.join()
    assert failed == []
    assert tools.marked(state) == []
    assert any("Namespace risk: ignored" in line for line in said)
    assert "stopped" in said
