"""Real processes for the tests of the local runtime: scoring servers, supervisors, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
PATIENCE_S = 60.0
"""Longest wait for something that must happen: a bound for a broken build, not an expectation."""


def eventually(holds: Callable[[], Any], what: str = "condition") -> Any:
    """The first truthy value of `holds`; fails when there is none in time."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = holds()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {PATIENCE_S:g} s: {what}")
        time.sleep(0.05)


def call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    """GET, or POST of JSON: (status, body, headers). Status 0 when nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json", **(headers or {})})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, _json(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as e:
        return e.code, _json(e.read()), dict(e.headers)
    except OSError:
        return 0, None, {}


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def marked(state: Path) -> list[int]:
    """Processes that carry the state folder's mark."""
    mark = f"HAFNIUM_SUPERVISED_BY={state.resolve()}".encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0") and alive(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def inference_service(
    name: str, *args: str, annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None
) -> dict[str, Any]:
    """An InferenceService whose predictor is backend.py."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations or {}, "labels": labels or {}},
        "spec": {"predictor": {"containers": [{
            "name": "kserve-container", "command": [sys.executable, str(HERE / "backend.py")], "args": list(args),
            "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}},
        }]}},
    }


class Backend:
    """backend.py as a plain process."""

    def __init__(self, port: int, *args: str) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, str(HERE / "backend.py"), "--http_port", str(port), *args])
        eventually(lambda: call(f"{self.url}/v2/health/ready")[0] == 200, "backend ready")

    def seen(self) -> list[dict[str, Any]]:
        return call(f"{self.url}/seen")[1]["seen"]

    def control(self, **changes: Any) -> None:
        assert call(f"{self.url}/control", changes)[0] == 200


class Up:
    """A supervisor in a process of its own."""

    def __init__(self, state: Path, *files: Path, port: int = 0) -> None:
        self.state = state
        state.parent.mkdir(parents=True, exist_ok=True)
        self.output = state.parent / f"up-{time.monotonic_ns()}.txt"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "up.py"), str(state), str(port), *map(str, files)], stdout=out, stderr=out
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def file(self, name: str) -> Any:
        try:
            return json.loads((self.state / name).read_text())
        except (OSError, ValueError):
            return {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.file('runtime.json')['gatewayPort']}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.file('runtime.json')['adminPort']}"

    def service(self, name: str) -> dict[str, Any]:
        return next((s for s in self.file("services.json").get("services", []) if s["name"] == name), {})

    @property
    def mine(self) -> bool:
        """The files in the folder are this supervisor's and not those of one before it."""
        return self.file("runtime.json").get("pid") == self.process.pid

    def wait_ready(self, *names: str) -> None:
        for name in names:
            eventually(
                lambda name=name: self.process.poll() is not None or (self.mine and self.service(name).get("ready")),
                f"{name} ready; said {self.said}",
            )
        assert self.process.poll() is None, self.said

    def score(self, host: str = "x", **features: Any) -> tuple[int, Any, dict[str, str]]:
        return call(f"{self.url}/v1/score", {"features": features}, {"host": host})

    def wait_answers(self, version: str | None = None) -> None:
        def answered() -> bool:
            status, body, _ = self.score() if self.mine else (0, None, {})
            return status == 200 and (version is None or body["model_version"] == version)
        eventually(answered, f"the gateway answers by version {version}; said {self.said}")

    def apply(self, *objects: dict[str, Any]) -> None:
        """As the rollout controller does: into the folder of wanted objects, atomically."""
        for o in objects:
            file = self.state / "objects" / f"{o['kind']}-{o['metadata']['name']}.yaml"
            staging = file.with_suffix(".new")
            staging.write_text(yaml.safe_dump(o))
            staging.replace(file)

    def route(self, name: str, stable: str, candidate: str | None = None, weight: int = 0, shadow: bool = False) -> None:
        file = self.state / "routes" / f"{name}.json"
        staging = file.with_suffix(".new")
        staging.write_text(json.dumps({"name": name, "stable": stable, "candidate": candidate, "weight": weight, "shadow": shadow}))
        staging.replace(file)

    def child(self, name: str) -> int:
        """Pid of the process with `name` in its command line; 0 when there is none."""
        return next((p for p in marked(self.state) if name.encode() in Path(f"/proc/{p}/cmdline").read_bytes()), 0)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def backend() -> Iterator[Callable[..., Backend]]:
    made: list[Backend] = []

    def make(*args: str, port: int = 0) -> Backend:
        made.append(Backend(port or free_port(), *args))
        return made[-1]

    yield make
    for b in made:
        b.process.kill()
        b.process.wait()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts supervisors; ends them and all that they started, also when the test failed."""
    made: list[Up] = []

    def make(*objects: dict[str, Any], state: Path | None = None, port: int = 0) -> Up:
        files: list[Path] = []
        if objects:
            files.append(tmp_path / f"given-{len(made)}.yaml")
            files[0].write_text(yaml.safe_dump_all(objects))
        made.append(Up(state or tmp_path / "state", *files, port=port))
        return made[-1]

    yield make
    for u in made:
        if u.process.poll() is None:
            u.process.send_signal(signal.SIGTERM)
            try:
                u.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                u.kill()
        for pid in marked(u.state):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def tools() -> Any:
    """The helpers above, for tests that can't import this file."""
    return sys.modules[__name__]
