"""`make soak`: ten minutes of mixed load, and whether memory, descriptors, threads or objects grow.

    python benchmarks/serving/soak.py --minutes 10 --rate 200

A leak shows as a slope over the second half, when caches and pools are full: PSS in MB an hour (pages that processes share count once),
the rest per hour. More than ALLOWED fails. A minute's noise looks like a slope of an hour: what the line's own error leaves open is not
called a leak, so that a short run sees only a large one.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from figures import OUT, Figure, publish
from processes import Process, end_in_order, free_port
from raw_load import status_of
from setting import Setting, prepare

LOOK_S = 3.0
ALLOWED = {"pss_mb": 60.0, "descriptors": 12.0, "threads": 6.0, "gc_objects": 60_000.0, "blocks": 300_000.0}
"""Growth an hour. 60 MB: a pod of 1 GiB would live for half a day, and a ten-minute run sees 5 MB of it."""
SIGMAS = 2.0


def post(path: str, body: bytes, more: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s" % (
        path.encode(), more, len(body), body)


def mix(setting: Setting) -> dict[str, tuple[str, list[bytes]]]:
    """Kind → who is asked, and requests. All protocols, good and bad."""
    def lines(name: str) -> list[bytes]:
        return [line.encode() for line in setting.bodies[name].read_text().splitlines()]

    rows = [json.loads(line) for line in lines("chain1")]
    return {
        "single": ("transformer", [post("/v1/score", b) for b in lines("chain1")]),
        "batch": ("transformer", [post("/v1/score/batch", b) for b in lines("chain64")]),
        "explain": ("transformer", [post("/v1/score", b) for b in lines("explain1")]),
        "V1": ("transformer", [post("/v1/models/m:predict", json.dumps({"instances": [r]}).encode()) for r in rows[:50]]),
        "bad field": ("transformer", [post("/v1/score", json.dumps({**r, "more": 1}).encode()) for r in rows[:50]]),
        "no JSON": ("transformer", [post("/v1/score", json.dumps(r).encode()[:-3]) for r in rows[:50]]),
        "new ids": ("transformer", []),
        "predictor V1": ("predictor", [post("/v1/models/m:predict", b) for b in lines("rows1")]),
        "predictor V2": ("predictor", [post("/v2/models/m/infer", b) for b in lines("v2")]),
        "predictor, bad": ("predictor", [post("/v2/models/m/infer", b[:-4]) for b in lines("v2")[:50]]),
    }


WEIGHTS = {"single": 50, "batch": 3, "explain": 8, "V1": 5, "bad field": 5, "no JSON": 3, "new ids": 10, "predictor V1": 8,
           "predictor V2": 6, "predictor, bad": 2}


class Asker:
    """Keeps one connection to each server; a new one now and then, since connections are made and dropped in life too."""

    def __init__(self, ports: dict[str, int]) -> None:
        self._ports = ports
        self._sockets: dict[str, socket.socket] = {}
        self._count = 0
        self.statuses: Counter[tuple[str, int]] = Counter()

    def ask(self, kind: str, who: str, request: bytes) -> None:
        self._count += 1
        if self._count % 500 == 0:
            self.close()
        s = self._sockets.get(who)
        if s is None:
            s = self._sockets[who] = socket.create_connection(("127.0.0.1", self._ports[who]), timeout=10)
        raw = b""
        try:
            s.sendall(request)
            while not status_of(raw):
                part = s.recv(2**18)
                if not part:
                    raise ConnectionError
                raw += part
            self.statuses[(kind, status_of(raw))] += 1
        except OSError:
            self.statuses[(kind, 0)] += 1
            s.close()
            del self._sockets[who]

    def close(self) -> None:
        for s in self._sockets.values():
            s.close()
        self._sockets.clear()


def look(process: Process) -> dict[str, float]:
    assert process.running is not None
    p = psutil.Process(process.running.pid)
    counted = json.loads(counts(process.port).read_text())
    return {"pss_mb": process.rss_mb(), "descriptors": float(p.num_fds()), "threads": float(p.num_threads()),
            "gc_objects": float(counted["gc_objects"]), "blocks": float(counted["blocks"])}


def counts(port: int) -> Path:
    """Where watched.py writes."""
    return (OUT / "serving" / f"soak-{port}.json").resolve()


def watched(module: str, port: int, *args: str) -> list[str]:
    """argv of a server that counts its objects."""
    return [sys.executable, str(Path(__file__).with_name("watched.py").resolve()), str(counts(port)), module, "--model_name", "m",
            "--host", "127.0.0.1", "--http_port", str(port), *args]


def slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Least squares: growth per hour, and its standard error."""
    mean_t, mean_v = statistics.fmean(times), statistics.fmean(values)
    spread = sum((t - mean_t) ** 2 for t in times)
    if len(times) < 3 or spread == 0.0:
        return 0.0, float("inf")
    b = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread
    rest = sum((v - mean_v - b * (t - mean_t)) ** 2 for t, v in zip(times, values, strict=True))
    return b * 3600.0, (rest / (len(times) - 2) / spread) ** 0.5 * 3600.0


def plot(seen: dict[str, list[tuple[float, dict[str, float]]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "hafnium"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(ALLOWED), figsize=(13, 3), constrained_layout=True)
    for axis, what in zip(axes, ALLOWED, strict=True):
        for name, points in seen.items():
            axis.plot([t / 60.0 for t, _ in points], [v[what] for _, v in points], label=name)
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("minutes")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    args = parser.parse_args()
    folder = (OUT / "serving").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    setting = prepare(folder, "small")
    ports = {"predictor": free_port(), "transformer": free_port()}
    behind = Process("soak-predictor", watched(
        "hafnium_predictor", ports["predictor"], "--model_dir", str(setting.bundle.path), "--enable_grpc", "false",
    ), ports["predictor"], folder / "logs" / "soak-predictor.log", ready="/health/ready")
    front = Process("soak-transformer", watched(
        "hafnium_transformer", ports["transformer"], "--predictor_host", f"127.0.0.1:{ports['predictor']}",
        "--feature_repo", str(setting.repos.get("redis", setting.repos["sqlite"])), "--inference_log", str(folder / "inference-log"),
    ), ports["transformer"], folder / "logs" / "soak-transformer.log", ready="/health/ready")
    processes = {"transformer": front, "predictor": behind}
    requests, rng, asker = mix(setting), random.Random(1), Asker(ports)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    singles = [json.loads(line) for line in setting.bodies["chain1"].read_text().splitlines()]
    seen: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in processes}
    try:
        for p in (behind, front):
            p.start()
            p.wait()
        began = time.monotonic()
        due, next_look, count = began, began, 0
        while (now := time.monotonic()) - began < args.minutes * 60.0:
            if now >= next_look:
                next_look = now + LOOK_S
                for name, p in processes.items():
                    seen[name].append((now - began, look(p)))
                print(f"\r{(now - began) / 60.0:5.1f} min, {count} requests, " + ", ".join(
                    f"{n} {v[-1][1]['pss_mb']:.1f} MB" for n, v in seen.items()), end="", flush=True)
            if now < due:
                time.sleep(due - now)
            due = max(due + 1.0 / args.rate, now - 1.0)  # what a pause of the machine cost is not caught up beyond a second
            kind = rng.choices(kinds, weights)[0]
            if kind == "new ids":  # never the same twice: what keeps what it was told grows by them
                row = rng.choice(singles)
                row = {**row, "request_id": f"r-{count}", "entity": {key: f"{key}-{count}" for key in row["entity"]}}
                asker.ask(kind, "transformer", post("/v1/score", json.dumps(row).encode(), b"x-api-key: k-%d\r\n" % count))
            else:
                who, made = requests[kind]
                asker.ask(kind, who, rng.choice(made))
            count += 1
    finally:
        asker.close()
        front.stop()
        behind.stop()
        if setting.redis is not None:
            setting.redis.stop()
    figures: dict[str, Figure] = {"soak_minutes": Figure(args.minutes, "min", "higher"), "soak_requests": Figure(count, "", "higher")}
    print(f"\n{'kind':<18}{'status':>7}{'count':>9}")
    for (kind, status), n in sorted(asker.statuses.items()):
        print(f"{kind:<18}{status:>7}{n:>9}")
    bad = sum(n for (_, status), n in asker.statuses.items() if status == 0 or status >= 500)
    figures["soak_failures"] = Figure(bad, "", "lower", 0.0)
    print(f"\n{'':<13}{'':<13}{'begin':>9}{'half':>9}{'end':>9}{'per hour':>11}{'±':>9}{'allowed':>9}")
    for name, points in seen.items():
        second = points[len(points) // 2 :]
        for what, allowed in ALLOWED.items():
            growth, error = slope([t for t, _ in second], [v[what] for _, v in second])
            print(f"{name:<13}{what:<13}{points[0][1][what]:>9.1f}{second[0][1][what]:>9.1f}{points[-1][1][what]:>9.1f}"
                  f"{growth:>11.1f}{SIGMAS * error:>9.1f}{allowed:>9g}")
            # what is certain, not what is possible: the lower end of the interval
            figures[f"soak_{name}_{what}_per_hour"] = Figure(max(growth - SIGMAS * error, 0.0), "/h", "lower", allowed, (growth, error))
    plot(seen, OUT / "soak.svg")
    return 1 if publish("soak", figures) else 0


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
