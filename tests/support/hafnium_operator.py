"""The operator as a process of its own against a real cluster, load at a real gateway, and an API server that can be made to fail."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3
import yaml
from hafnium_kubectl import Kubectl
from kubernetes import client as k8s
from kubernetes import config as k8s_config

PROMETHEUS = os.environ.get("HAFNIUM_TEST_PROMETHEUS", "http://127.0.0.1:9090")
GATEWAY = os.environ.get("HAFNIUM_TEST_GATEWAY", "http://127.0.0.1:8000")
"""Where kserve/kserve-ingress-gateway answers (Traefik)."""
MIRRORING_GATEWAY = os.environ.get("HAFNIUM_TEST_MIRRORING_GATEWAY", "http://127.0.0.1:16010")
"""Where kserve/envoy answers."""
IMAGE = os.environ.get("HAFNIUM_TEST_IMAGE", "localhost/hafnium-test-model:1")
WAIT_S = float(os.environ.get("HAFNIUM_TEST_WAIT_S", "150"))
"""For one thing to come about. A limit and no measurement: the machine may be busy."""


def until(check: Callable[[], Any], what: str, wait_s: float = WAIT_S, every_s: float = 0.3) -> Any:
    """Waits until `check()` gives something true, and returns it."""
    end = time.monotonic() + wait_s
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {wait_s:g} s")
        time.sleep(every_s)


def environment_of(source: Path | None) -> dict[str, str]:
    """For a Python that imports the contract and the rollouts of another tree."""
    env = dict(os.environ)
    if source is not None:
        env["PYTHONPATH"] = os.pathsep.join((str(source / "contract"), str(source / "rollouts"), env.get("PYTHONPATH", "")))
    return env


# --- the process --------------------------------------------------------------------------------------------------------------


class OperatorProcess:
    """`python -m hafnium_rollout operator` with settings for a test: it looks every second, and a lease is over after four."""

    def __init__(
        self, folder: Path, namespace: str, name: str, *, kubeconfig: Path | None = None, source: Path | None = None, **settings: Any,
    ) -> None:
        """`source`: a tree of another release, whose operator it is; without one, this checkout's."""
        self.log_file = folder / f"{name}.log"
        given = {
            "namespace": namespace, "lease_namespace": namespace, "identity": name, "look_s": 1, "scrape_interval_s": 5,
            "prometheus_url": PROMETHEUS, "http_host": "127.0.0.1", "http_port": 0, "lease_duration_s": 4, "lease_renew_deadline_s": 3,
            "lease_retry_s": 0.3, "threads": 2, **settings,
        }
        env = environment_of(source)
        if kubeconfig is not None:
            env["KUBECONFIG"] = str(kubeconfig)
        flags = [f"--{k}={v}" for k, v in given.items()]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hafnium_rollout", "operator", *flags], stdout=log, stderr=subprocess.STDOUT, env=env)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a node that loses power does."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As a Deployment does."""
        if self.running:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Everything that it has logged so far."""
        out: list[dict[str, Any]] = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:
                out.append({"event": "NotJson", "message": line})
        return out

    def events(self, rollout: str = "") -> list[str]:
        return [x["event"] for x in self.lines if not rollout or x.get("rollout", "").endswith(f"/{rollout}")]

    def wait_for(self, event: str, rollout: str = "") -> dict[str, Any]:
        """The first line with this event."""
        def found() -> dict[str, Any] | None:
            if not self.running:
                raise AssertionError(f"the operator ended: {self.log_file.read_text(encoding='utf-8')[-2000:]}")
            mine = (x for x in self.lines if not rollout or x.get("rollout", "").endswith(f"/{rollout}"))
            return next((x for x in mine if x["event"] == event), None)

        return until(found, f"{event} of {rollout or 'the operator'}")

    @property
    def port(self) -> int:
        return int(self.wait_for("Started")["port"])

    def get(self, path: str) -> tuple[int, str]:
        """Its health or metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


# --- load ---------------------------------------------------------------------------------------------------------------------


class Load:
    """Requests at a gateway, at about `rate` a second, until `stop`. Counts statuses and which model version answered."""

    def __init__(self, host: str, gateway: str = GATEWAY, rate: float = 150.0, connections: int = 3) -> None:
        self._host, self._address = host, urlsplit(gateway).netloc
        self._pause_s = connections / rate
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, str]] = Counter()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(connections)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                connection.request("GET", "/v1/score", headers={"Host": self._host})
                answer = connection.getresponse()
                answer.read()
                key = (answer.status, answer.headers.get("x-hafnium-model-version") or "")
            except (OSError, http.client.HTTPException):
                connection.close()
                key = (0, "")
            with self._lock:
                self._counts[key] += 1
            self._ended.wait(max(0.0, self._pause_s - (time.monotonic() - began)))
        connection.close()

    @property
    def counts(self) -> Counter[tuple[int, str]]:
        with self._lock:
            return Counter(self._counts)

    def next(self, requests: int) -> Counter[tuple[int, str]]:
        """What the next so many requests met."""
        before = self.counts
        until(lambda: sum(self.counts.values()) - sum(before.values()) >= requests, f"{requests} requests", every_s=0.05)
        return self.counts - before

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def versions(counts: Mapping[tuple[int, str], int]) -> Counter[str]:
    """How many answers came from each model version."""
    out: Counter[str] = Counter()
    for (_, version), n in counts.items():
        out[version] += n
    return out


# --- an API server with faults ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method != "GET"


@dataclass
class FaultyApi:
    """A door before the real API server. `before` is asked about each call: None lets it pass, (status, headers) answers instead.

    It may also wait, which holds the call in flight. `answered` holds what the server said to the calls that passed.
    """

    before: Callable[[Call], tuple[int, Mapping[str, str]] | None] = lambda _: None
    kubeconfig: Path = Path()
    answered: list[tuple[Call, int]] = field(default_factory=list[tuple[Call, int]])


@contextmanager
def faulty_api(folder: Path) -> Generator[FaultyApi]:
    """The door, with the credentials of KUBECONFIG behind it and none before."""
    configuration = k8s.Configuration()
    k8s_config.load_kube_config(client_configuration=configuration)
    api = k8s.ApiClient(configuration)
    found = FaultyApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            call = Call(self.command, self.path, body)
            fault = found.before(call)
            if fault is not None:
                text = json.dumps({"kind": "Status", "message": "a fault that the test asked for", "code": fault[0]}).encode()
                self._send(fault[0], text, {"Content-Type": "application/json", **fault[1]})
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() in ("accept", "content-type")}
            api.update_params_for_auth(headers, [], ["BearerToken"], self.path, self.command, None)
            try:
                answer = api.rest_client.pool_manager.request(
                    self.command, configuration.host + self.path, body=body or None, headers=headers, retries=False,
                    timeout=urllib3.Timeout(connect=5, read=300))
            except urllib3.exceptions.HTTPError as e:
                self._send(502, str(e).encode(), {})
                return
            found.answered.append((call, answer.status))
            self._send(answer.status, answer.data, {"Content-Type": answer.headers.get("Content-Type", "application/json")})

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 - names that http.server calls

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # who asked was killed

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    found.kubeconfig = folder / "faulty.kubeconfig"
    found.kubeconfig.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "x", "user": {}}], "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }), encoding="utf-8")
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- objects ------------------------------------------------------------------------------------------------------------------


def model_rollout(
    name: str, version: int, *, bad_every: int = 0, steps: list[dict[str, Any]] | None = None, gateway: str = "", **spec: Any,
) -> dict[str, Any]:
    """A ModelRollout whose model is the test image. Version 1 has the digest 1111…, and so on."""
    climb = steps or [
        {"weight": 20, "minDwell": "1s", "minSamples": 150, "deadline": "20m"},
        {"weight": 100, "minDwell": "1s", "deadline": "20m"},
    ]
    container = {
        "name": "kserve-container", "image": IMAGE, "imagePullPolicy": "Never", "ports": [{"containerPort": 8080, "protocol": "TCP"}],
        "env": [{"name": "MODEL_VERSION", "value": str(version)}, {"name": "BAD_EVERY", "value": str(bad_every)}],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1},
    }
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080", "prometheus.io/path": "/metrics"}
    routing: dict[str, Any] = {"backend": "PairedServices"}
    if gateway:
        routing["gatewayRef"] = {"namespace": "kserve", "name": gateway}
    return {
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": {"name": name},
        "spec": {
            "model": {"name": "risk", "version": str(version), "storageUri": f"pvc://models/{version}", "digest": digest(version)},
            "service": {"predictor": {"minReplicas": 1, "annotations": scraped, "containers": [container]}},
            "routing": routing, "strategy": {"steps": climb, "maxBlindDuration": "5m"},
            "gates": [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.03, "alpha": 0.1}}], **spec,
        },
    }


def release(kubectl: Kubectl) -> None:
    """Takes the finalizers off what a test left under way: no operator is there any more that would, and the namespace has to go."""
    for item in kubectl.read("modelrollouts")["items"]:
        if item["metadata"].get("finalizers"):
            kubectl.run("patch", "modelrollout", item["metadata"]["name"], "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def digest(version: int) -> str:
    return "sha256:" + f"{version:x}"[-1] * 64


def service(name: str, version: int) -> str:
    """The InferenceService of a version."""
    return f"{name}-{digest(version)[7:15]}"


def host(name: str, namespace: str) -> str:
    return f"{name}-{namespace}.example.com"


# --- a rollout's way ------------------------------------------------------------------------------------------------------------


def apply(kubectl: Kubectl, item: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", given=item)


def status(kubectl: Kubectl, name: str) -> dict[str, Any]:
    return kubectl.read("modelrollout", name).get("status", {})


def phase(kubectl: Kubectl, name: str, *wanted: str) -> dict[str, Any]:
    """Waits for a phase of the spec as it stands now."""
    def found() -> dict[str, Any] | None:
        item = kubectl.read("modelrollout", name)
        s = item.get("status", {})
        return s if s.get("phase") in wanted and s.get("observedGeneration") == item["metadata"]["generation"] else None
    try:
        return until(found, f"{name} {' or '.join(wanted)}")
    except AssertionError as e:
        s = status(kubectl, name)
        raise AssertionError(f"{e}: it is {s.get('phase')}: {s.get('message')}") from e


def weights(kubectl: Kubectl, name: str) -> dict[str, int]:
    """Service → percent, as the route says; empty while there is none."""
    done = kubectl.run("get", "httproute", name, "--ignore-not-found", "-o", "json")
    assert done.returncode == 0, done.stderr
    refs = json.loads(done.stdout)["spec"]["rules"][0]["backendRefs"] if done.stdout.strip() else []
    return {r["name"].removesuffix("-predictor"): r.get("weight", 1) for r in refs}


def first_model(kubectl: Kubectl, name: str, **more: Any) -> None:
    """Version 1 is live. There is nothing to compare it with, so no step is waited for."""
    apply(kubectl, model_rollout(name, 1, **more))
    phase(kubectl, name, "Promoted")
    until(lambda: weights(kubectl, name) == {service(name, 1): 100}, "the route of the first model")


# --- a Prometheus that can go ---------------------------------------------------------------------------------------------------


class Door:
    """Before a real server: everything passes while `open` is set; else connections are refused an answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.open = threading.Event()
        self.open.set()
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if not door.open.is_set():
                    self.close_connection = True
                    return
                parts = urlsplit(door._url)
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
                try:
                    connection.request(self.command, self.path, body, {"Content-Type": self.headers.get("Content-Type", "")})
                    answer = connection.getresponse()
                    data = answer.read()
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                finally:
                    connection.close()

            do_GET = do_POST = _any  # noqa: N815 - names that http.server calls

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
