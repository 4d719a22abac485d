"""What a row costs the transformer when 64 come in one request: CPU of its process, this checkout beside others.

    python benchmarks/batch.py                          this checkout, on SQLite and on Redis, with and without inference log
    python benchmarks/batch.py before=CHECKOUT          another one besides, in turn with it, and whether both answer alike
    python benchmarks/batch.py --profile sqlite         where the time goes, function by function

Each checkout has a process of its own with gate, hot path, store, scorer and inference log in it, and all share one predictor. They
are asked in process, without sockets, so that the client's cost is not in it; the hop to the predictor and to Redis is. The least of
many rounds is what a row costs, the median what this machine made of it. Data and model are those of `benchmarks/serving`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

HERE = Path(__file__).resolve().parent
PARTS = ("contract", "predictors", "transformers", "training", "monitoring", "rollouts", "local")
ROWS = 64
REQUESTS = {"batch": 40, "batch-log": 160, "one": 300, "eight": 60}
"""In a measurement. With the log: enough rows for two files, which are written within it."""
OWN = "this"

if TYPE_CHECKING:
    from hafnium_transformer.gate import Gate
    from hafnium_transformer.hot_path import HotPath


# --- the process that is measured ----------------------------------------------------------------------------------------------


class _Chain:
    """A transformer without its sockets. What is asked is answered as the server would answer it."""

    def __init__(self, predictor: str, repo: Path, bodies: Path, log: Path) -> None:
        from hafnium_transformer.settings import Settings

        self._settings = Settings(
            model_name="m", predictor_host=predictor, feature_repo=repo, deadline_ms=60_000, lookup_timeout_ms=30_000)
        self._log = log
        self.batches = [line.encode() for line in (bodies / "chain64.jsonl").read_text().splitlines()]
        self.rows = [line.encode() for line in (bodies / "chain1.jsonl").read_text().splitlines()]

    async def open(self) -> None:
        """Opens store and connection, once."""
        from prometheus_client import CollectorRegistry

        from hafnium_transformer.metrics import TransformerMetrics
        from hafnium_transformer.online_store.feast import FeastReader
        from hafnium_transformer.predictor_client import HopLimits, PredictorClient

        assert self._settings.feature_repo is not None
        reader = FeastReader(self._settings.feature_repo)
        store = reader.direct_store(rows_max=5_000)
        assert store is not None
        self._metrics = TransformerMetrics(CollectorRegistry())
        self._client = PredictorClient(self._settings.predictor_host, "m", tls=False, limits=HopLimits())
        self._store = (reader, store)
        self._gate, self._hot_path = await self._parts(None)

    async def _parts(self, inference_log: Any) -> tuple[Gate, HotPath]:
        from hafnium_transformer.admission import Admission
        from hafnium_transformer.coalescing import Coalescer
        from hafnium_transformer.gate import Gate
        from hafnium_transformer.hot_path import HotPath
        from hafnium_transformer.scoring import Scorer

        s = self._settings
        scorer = Scorer(s, self._client, self._metrics, inference_log)
        scorer.use_store(*self._store)
        await scorer.refresh(None)
        admission = Admission(s, self._metrics)
        coalescer = Coalescer(scorer, admission.limit, batches_max=s.batches_in_flight_max, rows_max=s.coalesced_rows_max)

        async def nobody(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("the benchmark's requests are not for the SDK")

        return Gate(nobody, scorer, admission, self._metrics, s), HotPath(scorer, coalescer, admission, self._metrics, s)

    async def asked(self, what: str, count: int) -> dict[str, Any]:
        """CPU and time of `count` requests, and a digest of all answers."""
        from hafnium_transformer.log_target import log_target
        from hafnium_transformer.log_writer import EntityHash, InferenceLog

        gate, hot_path, inference_log = self._gate, self._hot_path, None
        s = self._settings
        if what == "batch-log":
            inference_log = InferenceLog(
                log_target(str(self._log)), self._metrics, flush_seconds=s.log_flush_seconds, flush_rows=s.log_flush_rows,
                queue_rows_max=s.log_queue_rows_max, entity_hash=EntityHash("k"))
            gate, hot_path = await self._parts(inference_log)
        digest = hashlib.blake2b(digest_size=16)
        cpu, begin = time.process_time_ns(), time.perf_counter_ns()
        if what.startswith("batch"):
            for k in range(count):
                digest.update(await _through_gate(gate, self.batches[k % len(self.batches)], f"b{k}"))
        else:
            together = 8 if what == "eight" else 1
            for k in range(count):
                chosen = [self.rows[(k * together + i) % len(self.rows)] for i in range(together)]
                for body in await asyncio.gather(*[_through_hot_path(hot_path, b, f"r{k}-{i}") for i, b in enumerate(chosen)]):
                    digest.update(body)
        if inference_log is not None:
            inference_log.close()
        rows = count * {"one": 1, "eight": 8}.get(what, ROWS)
        return {"cpu_us": (time.process_time_ns() - cpu) / 1e3 / rows, "us": (time.perf_counter_ns() - begin) / 1e3 / rows,
                "digest": digest.hexdigest()}


async def _through_gate(gate: Gate, body: bytes, request_id: str) -> bytes:
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200, message
        parts.append(message.get("body", b""))

    headers = [(b"host", b"h"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
               (b"x-request-id", request_id.encode())]
    scope: Any = {"type": "http", "path": "/v1/score/batch", "method": "POST", "headers": headers, "client": ("127.0.0.1", 1)}
    await gate(scope, cast(Any, receive), cast(Any, send))
    return b"".join(parts)


class _Caller:
    """What a HotRequest has of its protocol."""

    client = ("127.0.0.1", 1)
    connections = ("this", "another")

    def __init__(self) -> None:
        self.body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def answer(self, status_line: bytes, head: bytes, body: bytes) -> None:
        assert b" 200 " in status_line, body
        self.body.set_result(body)


async def _through_hot_path(hot_path: HotPath, body: bytes, request_id: str) -> bytes:
    from hafnium_contract.serving.hot_protocol import HotRequest

    caller = _Caller()
    request = HotRequest(cast(Any, caller), body, {b"host": b"h", b"x-request-id": request_id.encode()}, body)
    assert hot_path.routes.handlers[b"POST /v1/score HTTP/1.1"](request)
    return await caller.body


def measured(predictor: str, repos: dict[str, Path], bodies: Path, log: Path, profile: str) -> None:
    """Reads what to measure from stdin, line by line, and answers on stdout."""
    import numpy as np
    import uvloop

    from hafnium_contract.serving.garbage import settle

    np.seterr(over="ignore")
    sys.setswitchinterval(0.0005)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        chains = {store: _Chain(predictor, repo, bodies, log) for store, repo in repos.items()}
        for chain in chains.values():
            runner.run(chain.open())
            for what in REQUESTS:
                runner.run(chain.asked(what, 20))
        settle()
        if profile:
            _profile(runner, chains[profile])
            return
        print("ready", flush=True)
        for line in sys.stdin:
            store, what, count = line.split()
            print(json.dumps(runner.run(chains[store].asked(what, int(count)))), flush=True)


def _profile(runner: asyncio.Runner, chain: _Chain) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as p:
        runner.run(chain.asked("batch", 200))
    pstats.Stats(p).sort_stats("tottime").print_stats(45)


# --- who measures --------------------------------------------------------------------------------------------------------------


def environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports that checkout."""
    from processes import own_environment

    return {**own_environment(), "PYTHONPATH": os.pathsep.join(str(checkout / part) for part in PARTS)}


class _Measured:
    """The process of one checkout."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        argv = [sys.executable, str(HERE / "batch.py"), "--measured", *arguments]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(checkout), text=True)
        self._in, self._out = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def ready(self) -> None:
        if self._out.readline().strip() != "ready":
            raise RuntimeError("a checkout's process did not start; what it said stands above")

    def ask(self, store: str, what: str) -> dict[str, Any]:
        self._in.write(f"{store} {what} {REQUESTS[what]}\n")
        self._in.flush()
        return cast(dict[str, Any], json.loads(self._out.readline()))

    def stop(self) -> None:
        self._in.close()
        self._process.wait(30)


@contextmanager
def processes(folder: Path) -> Iterator[tuple[str, dict[str, Path], Path]]:
    """Predictor and Redis, as `benchmarks/serving` sets them up: (predictor's address, repositories, bodies)."""
    sys.path[:0] = [str(HERE), str(HERE / "serving")]
    from processes import Process, free_port, python_module
    from setting import prepare

    setting = prepare(folder, "small")
    port = free_port()
    argv = python_module("hafnium_predictor", "--model_name", "m", "--model_dir", str(setting.bundle.path), "--host", "127.0.0.1",
                         "--http_port", str(port), "--enable_grpc", "false")
    predictor = Process("predictor", argv, port, folder / "logs" / "batch-predictor.log", ready="/health/ready")
    try:
        predictor.start()
        predictor.wait()
        yield f"127.0.0.1:{port}", setting.repos, setting.bodies["chain64"].parent
    finally:
        predictor.stop()
        if setting.redis is not None:
            setting.redis.stop()


def compared(checkouts: dict[str, Path], arguments: list[str], stores: list[str], rounds: int) -> int:
    """All checkouts in turn, round by round. Returns the number of goals that were missed."""
    from figures import Figure, publish

    running: dict[str, _Measured] = {}
    taken: dict[tuple[str, str, str], list[float]] = {}
    digests: dict[tuple[str, str], set[str]] = {}
    try:
        for name, checkout in checkouts.items():
            running[name] = _Measured(checkout, arguments)
            running[name].ready()
        for number in range(rounds):
            for store in stores:
                for what in REQUESTS:
                    order = list(running.items())
                    for name, process in order if number % 2 == 0 else reversed(order):
                        said = process.ask(store, what)
                        taken.setdefault((store, what, name), []).append(float(said["cpu_us"]))
                        digests.setdefault((store, what), set()).add(str(said["digest"]))
    finally:
        for process in running.values():
            process.stop()
    figures: dict[str, Figure] = {}
    for (store, what, name), each in taken.items():
        own = "" if name == OWN else f"_{name}"
        figures[f"{store}_{what}_us_row{own}"] = Figure(min(each), "µs", "lower", rounds=tuple(each))
        figures[f"{store}_{what}_us_row_median{own}"] = Figure(statistics.median(each), "µs", "lower")
        if name != OWN:
            ratios = tuple(a / b for a, b in zip(taken[(store, what, OWN)], each, strict=True))
            figures[f"{store}_{what}_over_{name}"] = Figure(statistics.median(ratios), "x", "lower", rounds=ratios)
    unlike = [f"{store}, {what}: answers differ" for (store, what), found in digests.items() if len(found) > 1]
    for text in unlike:
        print(text, file=sys.stderr)
    return publish("batch", figures) + len(unlike)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="NAME=CHECKOUT", help="others, to be measured in turn with this one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", default="", metavar="STORE", help="functions by their own time instead")
    parser.add_argument("--measured", nargs=4, metavar=("PREDICTOR", "REPOS", "BODIES", "LOG"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured:
        predictor, repos, bodies, log = args.measured
        measured(predictor, {k: Path(v) for k, v in json.loads(repos).items()}, Path(bodies), Path(log), args.profile)
        return 0
    checkouts = {OWN: HERE.parent, **{name: Path(path).resolve() for name, _, path in (c.partition("=") for c in args.checkouts)}}
    folder = Path("build/bench/serving").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with processes(folder) as (predictor, repos, bodies):
        arguments = [predictor, json.dumps({k: str(v) for k, v in repos.items()}), str(bodies), str(folder / "inference-log-batch")]
        if args.profile:
            argv = [sys.executable, str(HERE / "batch.py"), "--profile", args.profile, "--measured", *arguments]
            return subprocess.run(argv, env=environment(HERE.parent), check=False).returncode
        return 1 if compared(checkouts, arguments, list(repos), args.rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
