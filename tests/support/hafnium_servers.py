"""Real servers and a real Feast repository for tests: subprocesses on free ports of 127.0.0.1, stopped whatever happens."""

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import Feature, ModelContract

START_TIMEOUT_S = 90.0
"""Imports take seconds, and a shared machine may give us a tenth of a core."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def python_of(part: str) -> str:
    """HAFNIUM_PREDICTOR_PYTHON or HAFNIUM_TRANSFORMER_PYTHON, to test an environment that holds only what the image does."""
    return os.environ.get(f"HAFNIUM_{part.upper()}_PYTHON", sys.executable)


@dataclass(frozen=True)
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http(
    method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, timeout_s: float = 30.0,
) -> Reply:
    """One request on a connection of its own; an error status is a Reply, no exception."""
    request = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as e:
        return Reply(e.code, {k.lower(): v for k, v in e.headers.items()}, e.read())


@dataclass
class Server:
    """A server process. `with` starts it (see predictor() and transformer()) and stops it."""

    argv: list[str]
    port: int
    log_path: Path
    env: dict[str, str] = field(default_factory=dict[str, str])
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def start(self) -> Self:
        """Starts the process without waiting for it."""
        # Feast, which tests import, tells prometheus_client by the environment that this is one of many processes
        own = {k: v for k, v in os.environ.items() if not k.startswith("PROMETHEUS_MULTIPROC")}
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen(
                self.argv, stdout=out, stderr=subprocess.STDOUT, env={**own, **self.env}, cwd="/",
            )
        return self

    def __enter__(self) -> Self:
        return self if self.process else self.start()

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def wait(self, path: str = "/health/ready", status: int = 200) -> Reply:
        """Waits until the path answers with the status. Raises AssertionError with the log when it does not come to it."""
        until = time.monotonic() + START_TIMEOUT_S
        last: Any = None
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"exited with {self.process.returncode}:\n{self.log}")
            try:
                last = http("GET", self.url + path, timeout_s=5.0)
                if last.status == status:
                    return last
            except OSError as e:
                last = e
            time.sleep(0.05)
        raise AssertionError(f"{path} never answered {status}, last {last}:\n{self.log}")

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)
        self.process = None

    def stop(self) -> int | None:
        """SIGTERM; SIGKILL when that does not help. Returns the exit status."""
        if self.process is None:
            return None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)
        finally:
            self.process = None

    def post(self, path: str, data: Any, headers: Mapping[str, str] | None = None) -> Reply:
        """POSTs JSON (or bytes as they are)."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return http("POST", self.url + path, body, {"content-type": "application/json", **(headers or {})})

    def get(self, path: str) -> Reply:
        return http("GET", self.url + path)


def lines_of(server: Server) -> list[dict[str, Any]]:
    """Its log, read as the JSON that it is; libraries written in C++ have a log of their own on the same pipe."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def predictor(
    bundle: Path, folder: Path, name: str = "m", port: int | None = None, args: Sequence[str] = (), env: Mapping[str, str] | None = None,
) -> Server:
    """A predictor over the bundle; not started yet."""
    port = port or free_port()
    argv = [python_of("predictor"), "-m", "hafnium_predictor", "--model_name", name, "--model_dir", str(bundle),
            "--host", "127.0.0.1", "--http_port", str(port), *args]
    if "--grpc_port" not in args:
        argv += ["--enable_grpc", "false"]
    return Server(argv, port, folder / f"predictor-{port}.log", dict(env or {}))


def transformer(
    predictor_port: int, folder: Path, name: str = "m", repo: Path | None = None, log_dir: Path | None = None,
    args: Sequence[str] = (), env: Mapping[str, str] | None = None,
) -> Server:
    """A transformer before the predictor; not started yet."""
    port = free_port()
    argv = [python_of("transformer"), "-m", "hafnium_transformer", "--model_name", name, "--predictor_host",
            f"127.0.0.1:{predictor_port}", "--host", "127.0.0.1", "--http_port", str(port), *args]
    if repo is not None:
        argv += ["--feature_repo", str(repo)]
    if log_dir is not None:
        argv += ["--inference_log", str(log_dir)]
    return Server(argv, port, folder / f"transformer-{port}.log", dict(env or {}))


def wait_until(state: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a state. Raises AssertionError when it does not come."""
    until = time.monotonic() + seconds
    while not state():
        assert time.monotonic() < until, f"still not so after {seconds:g} s"
        time.sleep(0.05)


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """It hangs: connections are taken, nothing is answered."""
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@contextmanager
def chain_of(bundle: Bundle, folder: Path, repo: Path | None, args: Sequence[str] = ()) -> Iterator[tuple[Server, Server]]:
    """A predictor and the transformer before it, both ready. `args` are the transformer's."""
    with predictor(bundle.path, folder) as behind, transformer(behind.port, folder, repo=repo, args=args) as front:
        behind.wait()
        front.wait()
        yield behind, front


def make_feature_repo(
    path: Path, contract: ModelContract, rows: Mapping[str, Sequence[Mapping[str, Any]]], redis: str | None = None,
    numbered: bool | Collection[str] = False,
) -> Any:
    """A real Feast repository with the contract's views, holding `rows` per view. Returns its FeatureStore.

    `rows`: as hafnium_testing.synthetic_views gives them. `redis`: Feast's connection string; None is SQLite. `numbered`: entities are
    whole numbers and not text; or the join keys of those that are.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Feast would import it for nothing, 6 s
    try:
        import feast
        from feast.types import Bool, Float64, Int64, String
    finally:
        if hidden:
            del sys.modules["torch"]
    import pandas as pd

    path.mkdir(parents=True)
    project = contract.name.replace("-", "_")
    online = "{type: sqlite, path: online.db}" if redis is None else f'{{type: redis, connection_string: "{redis}"}}'
    (path / "feature_store.yaml").write_text(
        f"project: {project}\nprovider: local\nregistry: registry.db\noffline_store: {{type: file}}\n"
        f"online_store: {online}\nentity_key_serialization_version: 3\n"
    )

    def kind(feature: Feature) -> Any:
        return {"float": Float64, "int": Int64, "bool": Bool, "category": String}[feature.dtype]

    store = feast.FeatureStore(repo_path=str(path))
    numbers = numbered if not isinstance(numbered, bool) else {e.join_key for e in contract.entities if numbered}
    entities = {
        e.name: feast.Entity(
            name=e.name, join_keys=[e.join_key], value_type=feast.ValueType.INT64 if e.join_key in numbers else feast.ValueType.STRING)
        for e in contract.entities
    }
    (path / "sources").mkdir()
    views: list[Any] = []
    for view in contract.views:
        source_path = path / "sources" / f"{view.name}.parquet"
        frame = pd.DataFrame(rows[view.name])
        frame.to_parquet(source_path)
        views.append(feast.FeatureView(
            name=view.name, entities=[entities[view.entity]], ttl=timedelta(days=3650),
            schema=[feast.Field(name=f.source.field, dtype=kind(f)) for f in contract.features_of(view.name)],  # type: ignore[union-attr]
            source=feast.FileSource(path=str(source_path), timestamp_field="event_timestamp"),
        ))
    store.apply([*entities.values(), *views])
    for view in contract.views:
        store.write_to_online_store(view.name, df=pd.DataFrame(rows[view.name]))
    return store
