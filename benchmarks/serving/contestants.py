"""Who is measured: Hafnium and its peers, each started as its documentation says, with logs per process under build/bench."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import Process, free_port, python_module
from setting import Setting

PEERS = Path(__file__).parent / "peers"
ENVIRONMENTS = {
    "mlserver": ["mlserver==1.7.1", "onnxruntime", "numpy"],
    "bentoml": ["bentoml==1.4.39", "onnxruntime", "numpy"],
    "litserve": ["litserve==0.2.19", "onnxruntime", "numpy"],
}
"""Peers that pin other versions than Hafnium does get an environment of their own."""


SETTLE_S = 0.2
"""Timers that came due while a contestant was suspended have fired by then: before it is measured."""
BACKGROUND_S = 2.5
"""How often spans are sent and a file of the log is written. By default it is every five and ten seconds, which would fall into no run
of three: the timers are due when a contestant is resumed."""
TRACED_SHARE = "0.01"
"""Of the requests of the traced chain: what docs/serving.md recommends in production."""


@dataclass(frozen=True)
class Contestant:
    """A server, or a chain of them, at one address."""

    name: str
    processes: tuple[Process, ...]
    """All whose CPU counts; the first is asked."""
    path: str
    kind: str
    """Prefix of the request bodies: `rows`, `v2`, `chain`, `naive`."""
    beside: tuple[Process, ...] = ()
    """What it needs and whose CPU doesn't count."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.processes[0].port}{self.path}"


def environment(name: str, folder: Path) -> Path | None:
    """python of the peer's environment, made when it is missing; None when it can't be (no index at hand)."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        uv = Path(sys.executable).with_name("uv")
        made = subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder / name], check=False)
        installed = made.returncode == 0 and subprocess.run(
            [uv, "pip", "install", "-q", "--python", python, *ENVIRONMENTS[name]], check=False
        ).returncode == 0
        if not installed:
            return None
    return python


class Field:
    """All contestants. `missing` names those that could not be had, and why."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._setting = setting
        self._logs = folder / "logs"
        self._model = {"BENCH_MODEL": str(setting.bundle.model_path)}
        self.processes: list[Process] = [setting.redis] if setting.redis else []
        self.missing: list[str] = []
        self.predictors: dict[str, Contestant] = {}
        self.chains: dict[str, Contestant] = {}
        self._predictors(folder)
        self._chains(folder)

    def _process(
        self, name: str, argv: list[str], port: int, env: dict[str, str] | None = None, *, ready: str = "/", cwd: str = "/",
    ) -> Process:
        made = Process(name, argv, port, self._logs / f"{name}.log", {**(env or {}), "BENCH_PORT": str(port)}, ready, cwd)
        self.processes.append(made)
        return made

    def _hafnium_predictor(self, name: str = "hafnium-predictor", env: dict[str, str] | None = None) -> Process:
        port = free_port()
        argv = python_module(
            "hafnium_predictor", "--model_name", "m", "--model_dir", str(self._setting.bundle.path), "--host", "127.0.0.1",
            "--http_port", str(port), "--enable_grpc", "false",
        )
        return self._process(name, argv, port, env, ready="/health/ready")

    def _kserve(self, tuned: bool) -> Process:
        env = {**self._model, "BENCH_TUNED": "1" if tuned else "0"}
        argv = [sys.executable, str(PEERS / "kserve_sdk.py")]
        return self._process(f"kserve{'-tuned' if tuned else ''}", argv, free_port(), env)

    def _uvicorn(self, name: str, app: str) -> Process:
        port = free_port()
        argv = python_module("uvicorn", f"{app}:app", "--app-dir", str(PEERS), "--host", "127.0.0.1", "--port", str(port), "--loop",
                             "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")
        return self._process(name, argv, port, self._model)

    def _floor(self, name: str, env: dict[str, str]) -> Process:
        return self._process(name, [sys.executable, str(PEERS / "floor.py")], free_port(), {**self._model, **env})

    def _predictors(self, folder: Path) -> None:
        v1 = "/v1/models/m:predict"
        hafnium, kserve = self._hafnium_predictor(), self._kserve(False)
        found = {
            "hafnium": Contestant("hafnium", (hafnium,), v1, "rows"),
            "kserve": Contestant("kserve", (kserve,), v1, "rows"),
            "bare-asgi": Contestant("bare-asgi", (self._uvicorn("bare-asgi", "bare_asgi"),), v1, "rows"),
            "fastapi": Contestant("fastapi", (self._uvicorn("fastapi", "fastapi_app"),), v1, "rows"),
            "floor": Contestant("floor", (self._floor("floor", {}),), v1, "rows"),
            "hafnium-v2": Contestant("hafnium-v2", (hafnium,), "/v2/models/m/infer", "v2"),
            "kserve-v2": Contestant("kserve-v2", (kserve,), "/v2/models/m/infer", "v2"),
        }
        for name in ENVIRONMENTS:
            python = environment(name, folder / "envs")
            if python is None:
                self.missing.append(f"{name}: its environment could not be made")
                continue
            port = free_port()
            match name:
                case "mlserver":
                    env = {**self._model, "MLSERVER_HTTP_PORT": str(port), "MLSERVER_GRPC_PORT": str(free_port()),
                           "MLSERVER_METRICS_PORT": str(free_port()), "MLSERVER_PARALLEL_WORKERS": "0", "MLSERVER_HOST": "127.0.0.1",
                           "MLSERVER_DEBUG": "false"}
                    peer = self._process(name, [str(python.with_name("mlserver")), "start", str(PEERS / "mlserver")], port, env,
                                         ready="/v2/health/ready", cwd=str(PEERS / "mlserver"))
                    found[name] = Contestant(name, (peer,), "/v2/models/m/infer", "v2")
                case "bentoml":
                    argv = [str(python.with_name("bentoml")), "serve", "service:Scorer", "--host", "127.0.0.1", "--port", str(port)]
                    peer = self._process(name, argv, port, {**self._model, "BENTOML_DO_NOT_TRACK": "True"}, ready="/readyz",
                                         cwd=str(PEERS / "bentoml"))
                    found[name] = Contestant(name, (peer,), "/predict", "rows")
                case _:
                    peer = self._process(name, [str(python), str(PEERS / "litserve_app.py")], port, self._model, ready="/health")
                    found[name] = Contestant(name, (peer,), "/predict", "rows")
        self.predictors = found

    def _chains(self, folder: Path) -> None:
        s = self._setting
        hafnium, naive_predictor, tuned_predictor = self._hafnium_predictor(), self._kserve(False), self._kserve(True)
        self.receiver = self._process("otlp-receiver", [sys.executable, str(Path(__file__).with_name("otlp_receiver.py"))], free_port())
        traced = {
            "HAFNIUM_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.receiver.port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": TRACED_SHARE,
            "OTEL_BSP_SCHEDULE_DELAY": f"{1000 * BACKGROUND_S:.0f}",
        }
        traced_predictor = self._hafnium_predictor("hafnium-predictor-traced", traced)
        if s.redis is not None:
            behind = self._floor("floor-predictor", {})
            chain = self._floor("floor-chain", {"BENCH_STORE": f"127.0.0.1:{s.redis.port}", "BENCH_PREDICTOR": f"127.0.0.1:{behind.port}"})
            self.chains["floor-chain"] = Contestant("floor-chain", (chain, behind, s.redis), "/v1/score", "naive")
        if "redis" not in s.repos:
            self.missing.append("redis: no redis-server here (Debian: apt-get install redis-server)")
        for store, repo in s.repos.items():
            more = (s.redis,) if store == "redis" and s.redis else ()
            for name, log, behind, env in (
                (f"hafnium-{store}", True, hafnium, {}), (f"hafnium-{store}-without-log", False, hafnium, {}),
                (f"hafnium-{store}-traced", True, traced_predictor, traced),
            ):
                port = free_port()
                argv = python_module(
                    "hafnium_transformer", "--model_name", "m", "--predictor_host", f"127.0.0.1:{behind.port}", "--host", "127.0.0.1",
                    "--http_port", str(port), "--feature_repo", str(repo),
                )
                argv += ["--inference_log", str(folder / "inference-log"), "--log_flush_seconds", str(BACKGROUND_S)] if log else []
                chain = self._process(f"{name}-transformer", argv, port, env, ready="/health/ready")
                beside = (self.receiver,) if env else ()
                self.chains[name] = Contestant(name, (chain, behind, *more), "/v1/score", "chain", beside)
            for name, tuned, predictor in ((f"naive-{store}", False, naive_predictor), (f"tuned-{store}", True, tuned_predictor)):
                env = {"BENCH_SPEC": s.spec, "BENCH_REPO": str(repo), "BENCH_TUNED": "1" if tuned else "0",
                       "BENCH_PREDICTOR": f"127.0.0.1:{predictor.port}"}
                chain = self._process(f"{name}-transformer", [sys.executable, str(PEERS / "naive_chain.py")], free_port(), env)
                self.chains[name] = Contestant(name, (chain, predictor, *more), "/v1/models/m:predict", "naive")

    def start(self) -> None:
        """Starts all, one after the other (each imports for seconds), and suspends them."""
        for process in self.processes:
            if process.running is None:
                process.start()
                process.wait()
        for process in self.processes:
            process.suspend()

    @contextmanager
    def resumed(self, contestant: Contestant) -> Generator[None]:
        """This one runs until the block ends, all others stand still: what they do in the background isn't measured with it."""
        needed = (*contestant.beside, *reversed(contestant.processes))
        for process in needed:
            process.resume()
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            for process in reversed(needed):
                process.suspend()

    def stop(self) -> None:
        """Stops all, whatever happened."""
        for process in self.processes:
            process.resume()  # who ends may have to ask another
        for process in reversed(self.processes):
            process.stop()
