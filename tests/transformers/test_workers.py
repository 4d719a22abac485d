"""More than one worker behind one port: one set of metrics, a crash that costs little, a stop that costs nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hafnium_servers import Server, http, predictor, transformer, wait_until
from hafnium_steady_load import SteadyLoad

from hafnium_contract.bundle import Bundle
from hafnium_contract.inference_log import log_files, read_files
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import synthetic_rows

pytestmark = pytest.mark.slow
PATIENT = ["--deadline_ms", "20000", "--lookup_timeout_ms", "10000", "--workers", "2"]

SLOW_TO_STOP = """
import pathlib, signal, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
pathlib.Path("began").touch()
while not told:
    time.sleep(0.05)
time.sleep(1.0)
pathlib.Path("finished").touch()
"""

ONE_WORKER = """
import os, sys
from hafnium_transformer.metrics import TransformerMetrics
metrics = TransformerMetrics()
metrics.query_volume(3, int(sys.argv[1]))
metrics.log_written.inc(int(sys.argv[1]))
print(os.getpid())
"""
WORKER_DIED = """
import sys
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from hafnium_contract.serving.workers import forget
forget(int(sys.argv[1]))
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@dataclass(frozen=True)
class Pair:
    behind: Server
    front: Server
    bodies: list[bytes]
    log: Path


@pytest.fixture
def pair(bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path) -> Iterator[Pair]:
    bodies = [json.dumps(r).encode() for r in synthetic_rows(contract, 40, seed=0)]
    log = tmp_path / "log"
    with predictor(bundle.path, tmp_path, args=["--workers", "2"]) as behind, transformer(
        behind.port, tmp_path, repo=repo, log_dir=log, args=PATIENT,
    ) as front:
        behind.wait()
        front.wait()
        yield Pair(behind, front, bodies, log)


def workers(server: Server) -> list[psutil.Process]:
    assert server.process is not None
    return [p for p in psutil.Process(server.process.pid).children() if "python" in p.name()]


def counted(server: Server, name: str) -> float:
    text = server.get("/metrics").body.decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} ")))


def test_every_request_is_in_the_metrics_whichever_worker_answers_and_whoever_dies(pair: Pair) -> None:
    front = pair.front
    assert len(workers(front)) == 2
    asked = 0
    for body in pair.bodies:  # a connection each: both workers get some
        assert http("POST", f"{front.url}/v1/score", body).status == 200
        asked += 1
    for _ in range(6):
        assert counted(front, "inference_requests_total") == asked
        assert counted(front, "inference_duration_seconds_count") == asked
        assert counted(front, "model_predictions_total") == asked
    assert counted(pair.behind, "model_info") == 1.0
    used = [p for p in workers(front) if p.cpu_times().user > 0]
    assert len(used) == 2
    assert counted(front, "inference_active") == 2
    victim = workers(front)[0]
    victim.kill()

    def replaced() -> bool:
        nonlocal asked
        assert http("POST", f"{front.url}/v1/score", pair.bodies[0]).status == 200
        asked += 1
        return len(workers(front)) == 2 and victim.pid not in [p.pid for p in workers(front)]

    wait_until(replaced)
    for body in pair.bodies:
        assert http("POST", f"{front.url}/v1/score", body).status == 200
        asked += 1
    assert counted(front, "inference_requests_total") == asked
    assert front.stop() == 0
    table = read_files(log_files(pair.log))
    assert table is not None
    assert table.num_rows >= asked - 40  # what the killed one had not yet written is lost
    per_entity = table.select(["entity_hash", "request_id"]).to_pylist()
    hashes = {r["request_id"]: set() for r in per_entity}
    for r in per_entity:
        hashes[r["request_id"]].add(r["entity_hash"])
    assert all(len(h) == 1 for h in hashes.values())  # one key for all workers


def test_a_worker_that_died_takes_what_it_said_about_now_with_it_and_leaves_its_counts(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(code: str, *arguments: object) -> str:
        argv = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    busy, _ = [int(run(ONE_WORKER, rows)) for rows in (50_000, 5)]
    told = [line for line in run(WORKER_DIED, busy).splitlines() if not line.startswith("#")]
    assert {"inference_client_rows_max 5.0", "inference_clients 3.0", "inference_log_rows_total 50005.0"} <= set(told)


def test_sigterm_under_load_loses_nothing(pair: Pair) -> None:
    requests = [b"POST /v1/score HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (len(b), b) for b in pair.bodies]
    with SteadyLoad(pair.front.port, requests, clients=8) as load:
        load.wait_for(200)
        load.ending()
        assert pair.front.stop() == 0
    assert not load.lost


@pytest.mark.parametrize(("stop_s", "finished"), [(20.0, True), (0.3, False)], ids=["enough", "too little"])
def test_workers_get_the_time_to_stop_that_their_settings_say(tmp_path: Path, stop_s: float, finished: bool) -> None:
    (tmp_path / "slow_to_stop.py").write_text(SLOW_TO_STOP)
    code = "from hafnium_contract.serving.workers import supervise as run\n" \
        "run('slow_to_stop', [], host='127.0.0.1', port=0, workers=1, stop_s=%r)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code % stop_s], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as run:
        wait_until((tmp_path / "began").exists)
        run.terminate()
        said = run.communicate(timeout=60)[1]
    assert (tmp_path / "finished").exists() == finished
    assert ("did not stop within 0.3 s and is killed" in said) != finished


def test_a_port_that_is_taken_is_said_at_once(bundle: Bundle, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with predictor(bundle.path, tmp_path, port=s.getsockname()[1], args=["--workers", "2"]) as refused:
            assert refused.process is not None
            assert refused.process.wait(60) == 2
            assert "Address already in use" in refused.log
