"""`make overload`: the chain at twice its capacity. Does throughput stay, is the excess refused quickly, are the accepted in time?

    python benchmarks/serving/overload.py --rounds 3 --seconds 5 --factor 2

Each round measures the capacity (closed loop, the best of CLOSED connections) and right after it sends `factor` times that rate, in
open loop: requests come whether or not the ones before were answered. The same load generator does both.

Clients are other machines. Here the generator has a core of its own, and the three servers (transformer, predictor, Redis) share another:
else it would take twice as much from them at twice the rate, and the figure would be about itself. `--shared` lets all share all cores.

At the end a server that only refuses (peers/floor.py) gets the same load: what it needs for a request is the kernel's and the loop's, and
no server here refuses for less. `overload_floor_share` is the share of its throughput that the chain would keep with such refusals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from figures import OUT, Figure, publish
from processes import Process, end_in_order, free_port, python_module
from setting import Setting, prepare

CLOSED = (32, 128)
WARM_S = 1.0
"""Of raw_load.py, before it counts."""
SLO_MS = 100.0
"""p99 that the owners ask for."""


@dataclass(frozen=True)
class Seen:
    """One run of raw_load.py."""

    accepted_per_s: float
    accepted_p99_ms: float
    refused_per_s: float
    refused_p99_ms: float
    other: int
    """Answers that are neither a score nor a refusal, and connections that broke."""
    generator_share: float
    front_share: float
    """CPU of the transformer, of one core. It has one thread for Python: at 1 it is full."""


def press(front: Process, bodies: Path, connections: int, seconds: float, rate: float = 0.0, core: int | None = None) -> Seen:
    """Runs the generator in a process of its own, on a core of its own if there is one."""
    before = front.cpu_ns()
    program = str(Path(__file__).with_name("raw_load.py"))
    argv = [*on_core(core), sys.executable, program, str(front.port), "/v1/score", str(bodies), "--connections",
            str(connections), "--seconds", str(seconds), "--rate", str(rate)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"raw_load.py: {done.stderr.strip()[-500:]}")
    said: dict[str, Any] = json.loads(done.stdout)
    statuses: dict[str, dict[str, float]] = said["statuses"]
    accepted = statuses.get("200", {"count": 0, "p99_ms": 0.0})
    refused = [statuses[s] for s in ("429", "503") if s in statuses]
    other = sum(int(v["count"]) for s, v in statuses.items() if s not in ("200", "429", "503"))
    return Seen(
        accepted["count"] / seconds, accepted["p99_ms"], sum(r["count"] for r in refused) / seconds,
        max((r["p99_ms"] for r in refused), default=0.0), other + said["broken"], said["generator_cpu_share"],
        (front.cpu_ns() - before) / 1e9 / (seconds + WARM_S),
    )


def on_core(core: int | None) -> list[str]:
    """The words before a command that keep it on a core."""
    return [] if core is None else ["taskset", "--cpu-list", str(core)]


def refusal_floor_us(folder: Path, bodies: Path, connections: int, seconds: float, rate: float, core: int | None,
                     generator_core: int | None) -> float:
    """CPU of a refusal in a server that does nothing else, at this rate on so many connections."""
    port = free_port()
    argv = [*on_core(core), sys.executable, str(Path(__file__).with_name("peers") / "floor.py")]
    env = {"BENCH_PORT": str(port), "BENCH_REFUSE": "1"}
    floor = Process("overload-floor", argv, port, folder / "logs" / "overload-floor.log", env, ready=None)
    try:
        floor.start()
        floor.wait()
        before = floor.cpu_ns()
        seen = press(floor, bodies, connections, seconds, rate, generator_core)
        return (floor.cpu_ns() - before) / 1000.0 / (seen.refused_per_s * (seconds + WARM_S))
    finally:
        floor.stop()


def share_kept(capacity: float, factor: float, refusal_us: float) -> float:
    """Of a server whose core is full at `capacity` requests/s, asked `factor` times as many, when refusing one costs so much."""
    work = capacity * refusal_us / 1e6
    return max((1.0 - factor * work) / (1.0 - work), 0.0) if work < 1.0 else 0.0


def show(name: str, s: Seen) -> None:
    print(f"{name:<22}{s.accepted_per_s:>10,.0f}{s.accepted_p99_ms:>10.1f}{s.refused_per_s:>10,.0f}{s.refused_p99_ms:>10.1f}"
          f"{s.other:>7}{s.front_share:>11.2f}{s.generator_share:>10.2f}", flush=True)


def servers(setting: Setting, folder: Path, more: list[str], core: int | None) -> tuple[Process, Process]:
    """Predictor and transformer, with their defaults and the inference log on."""
    ports = free_port(), free_port()
    behind = Process("overload-predictor", on_core(core) + python_module(
        "hafnium_predictor", "--model_name", "m", "--model_dir", str(setting.bundle.path), "--host", "127.0.0.1", "--http_port",
        str(ports[0]), "--enable_grpc", "false"), ports[0], folder / "logs" / "overload-predictor.log", ready="/health/ready")
    front = Process("overload-transformer", on_core(core) + python_module(
        "hafnium_transformer", "--model_name", "m", "--predictor_host", f"127.0.0.1:{ports[0]}", "--host", "127.0.0.1", "--http_port",
        str(ports[1]), "--feature_repo", str(setting.repos.get("redis", setting.repos["sqlite"])), "--inference_log",
        str(folder / "inference-log"), *more), ports[1], folder / "logs" / "overload-transformer.log", ready="/health/ready")
    return behind, front


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--factor", type=float, default=2.0, help="of the capacity")
    parser.add_argument("--connections", type=int, default=900, help="of the open loop: enough that a request seldom waits for one")
    parser.add_argument("--shared", action="store_true", help="generator and servers share all cores")
    args, more = parser.parse_known_args()
    cores = sorted(os.sched_getaffinity(0))
    apart = not args.shared and len(cores) > 1
    server_core, generator_core = (cores[0], cores[1]) if apart else (None, None)
    folder = (OUT / "serving").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    setting = prepare(folder, "small")
    behind, front = servers(setting, folder, more, server_core)
    if setting.redis is not None and setting.redis.running is not None and server_core is not None:
        os.sched_setaffinity(setting.redis.running.pid, {server_core})
    print(f"servers on core {server_core}, generator on core {generator_core}" if apart else "servers and generator share all cores")
    shares: list[float] = []
    p99s: list[float] = []
    refusals: list[float] = []
    generators: list[float] = []
    capacities: list[float] = []
    other = 0
    try:
        for p in (behind, front):
            p.start()
            p.wait()
        print(f"{'':<22}{'200/s':>10}{'p99 ms':>10}{'refused/s':>10}{'p99 ms':>10}{'other':>7}{'transf.CPU':>11}{'gen. CPU':>10}")
        for number in range(args.rounds):
            capacity = 0.0
            for connections in CLOSED:
                seen = press(front, setting.bodies["chain1"], connections, args.seconds, core=generator_core)
                show(f"{number + 1}: closed, {connections}", seen)
                capacity = max(capacity, seen.accepted_per_s)
            if capacity == 0.0:
                raise RuntimeError(f"no request was answered; see {front.log}")
            seen = press(front, setting.bodies["chain1"], args.connections, args.seconds, args.factor * capacity, generator_core)
            show(f"{number + 1}: open, {args.factor:g} x", seen)
            capacities.append(capacity)
            shares.append(seen.accepted_per_s / capacity)
            p99s.append(seen.accepted_p99_ms)
            refusals.append(seen.refused_p99_ms)
            generators.append(seen.generator_share)
            other += seen.other
        front.stop()
        behind.stop()
        capacity = statistics.median(capacities)
        refusal_us = refusal_floor_us(
            folder, setting.bodies["chain1"], args.connections, args.seconds, args.factor * capacity, server_core, generator_core)
    finally:
        front.stop()
        behind.stop()
        if setting.redis is not None:
            setting.redis.stop()
    return 1 if publish("overload", {
        "overload_throughput_share": Figure(statistics.median(shares), "x", "higher", 0.9, tuple(shares)),
        "overload_floor_share": Figure(share_kept(capacity, args.factor, refusal_us), "x", "higher"),
        "overload_refusal_floor_us": Figure(refusal_us, "us", "lower"),
        "overload_accepted_p99_ms": Figure(statistics.median(p99s), "ms", "lower", SLO_MS, tuple(p99s)),
        "overload_refused_p99_ms": Figure(statistics.median(refusals), "ms", "lower", SLO_MS, tuple(refusals)),
        "overload_other": Figure(other, "", "lower", 0.0),
        "overload_generator_cpu": Figure(statistics.median(generators), "cores", "lower", None, tuple(generators)),
    }) else 0


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
