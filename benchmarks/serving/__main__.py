"""`make bench-serving`: Hafnium's servers and their peers, one machine, one run, interleaved.

    python benchmarks/serving                        all, three rounds (about twelve minutes)
    python benchmarks/serving --rounds 1 --seconds 1 --only hafnium,kserve

Every figure with a goal is a ratio of two servers that were pressed one after the other in the same round, while all others are
suspended (SIGSTOP); the value is the median over rounds. Needs wrk and redis-server (Debian has both). Bodies, logs and environments of
peers lie in build/bench.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from contestants import Contestant, Field
from figures import OUT, Figure, publish
from load import Load, press, wrk_or_none
from processes import Process, end_in_order
from setting import Setting, git_describe, prepare

CONNECTIONS = (1, 8, 32)
FLOORS = ("floor", "floor-chain")
"""No servers (peers/floor.py): pressed with one connection and one row only."""
WARM_S = 1


@dataclass(frozen=True)
class Seen:
    """One run of one contestant."""

    contestant: str
    rows: int
    connections: int
    round: int
    load: Load
    cpu_us: float
    """CPU of all its processes per request."""


@dataclass(frozen=True)
class Case:
    contestant: Contestant
    rows: int
    connections: int
    bodies: Path
    path: str
    name: str


def cases(field: Field, setting: Setting, only: set[str]) -> list[Case]:
    """All that one round presses."""
    found: list[Case] = []
    for c in (*field.predictors.values(), *field.chains.values()):
        if only and not any(c.name == o or c.name.startswith(f"{o}-") for o in only):
            continue
        one = "v2" if c.kind == "v2" else f"{c.kind}1"
        if c.name in FLOORS:
            found.append(Case(c, 1, 1, setting.bodies[one], c.path, c.name))
            continue
        found += [Case(c, 1, n, setting.bodies[one], c.path, c.name) for n in CONNECTIONS]
        if c.kind != "v2" and not c.name.endswith("-traced"):
            path = "/v1/score/batch" if c.kind == "chain" else c.path
            found.append(Case(c, 64, 8, setting.bodies[f"{c.kind}64"], path, c.name))
        if c.kind == "chain" and not c.name.endswith(("-without-log", "-traced")):
            found.append(Case(c, 1, 1, setting.bodies["explain1"], c.path, f"{c.name}-explain"))
    return found


def check(case: Case) -> None:
    """One request by hand. Raises RuntimeError when the answer is not a score: a server that is fast at errors wins nothing."""
    body = case.bodies.read_text().splitlines()[0].encode()
    url = f"http://127.0.0.1:{case.contestant.processes[0].port}{case.path}"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        text = answer.read().decode()
    if "score" not in text and "predictions" not in text and "outputs" not in text:
        raise RuntimeError(f"{case.name}: no score in {text[:300]}")


def run(case: Case, seconds: int, number: int, script: Path) -> Seen:
    """Presses one contestant."""
    url = f"http://127.0.0.1:{case.contestant.processes[0].port}{case.path}"
    before = sum(p.cpu_ns() for p in case.contestant.processes)
    load = press(url, case.bodies, case.connections, seconds, script)
    cpu = sum(p.cpu_ns() for p in case.contestant.processes) - before
    return Seen(case.name, case.rows, case.connections, number, load, cpu / 1000.0 / max(load.requests, 1))


def spans_came(receiver: Process) -> bool:
    """Whether anything was recorded. The exporting threads send every five seconds."""
    until = time.monotonic() + 15.0
    while time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{receiver.port}/", timeout=5) as answer:
            if int(answer.read()) > 0:
                return True
        time.sleep(0.5)
    return False


class Results:
    """What was seen, by contestant, rows and connections."""

    def __init__(self, seen: list[Seen]) -> None:
        self.seen = seen

    def of(self, name: str, rows: int, connections: int) -> list[Seen]:
        return sorted((s for s in self.seen if (s.contestant, s.rows, s.connections) == (name, rows, connections)), key=lambda s: s.round)

    def ratio(self, a: str, b: str, connections: int, rows: int = 1, goal: float | None = None) -> Figure | None:
        """Requests per second of a over those of b, round by round."""
        pairs = zip(self.of(a, rows, connections), self.of(b, rows, connections), strict=False)
        each = tuple(x.load.per_s / y.load.per_s for x, y in pairs)
        return Figure(statistics.median(each), "x", "higher", goal, each) if each else None

    def median(self, name: str, rows: int, connections: int, what: str) -> float | None:
        values = [s.cpu_us if what == "cpu_us" else float(getattr(s.load, what)) for s in self.of(name, rows, connections)]
        return statistics.median(values) if values else None


def figures_of(results: Results, store: str) -> dict[str, Figure]:
    """The promises (goals) and what else is worth keeping."""
    found: dict[str, Figure | None] = {}
    for n, goal in zip(CONNECTIONS, (5.0, 10.0, 12.0), strict=True):
        found[f"predictor_v1_over_kserve_c{n}"] = results.ratio("hafnium", "kserve", n, goal=goal)
        found[f"predictor_v1_over_bare_asgi_c{n}"] = results.ratio("hafnium", "bare-asgi", n, goal=1.0)
        found[f"predictor_v2_over_kserve_c{n}"] = results.ratio("hafnium-v2", "kserve-v2", n)
    found["predictor_over_mlserver_c8"] = results.ratio("hafnium-v2", "mlserver", 8, goal=10.0)
    # The most that these ratios can be on this machine, and how much of it is reached
    found["floor_over_kserve_c1"] = results.ratio("floor", "kserve", 1)
    found["predictor_over_floor_c1"] = results.ratio("hafnium", "floor", 1)
    found["floor_over_naive_c1"] = results.ratio("floor-chain", "naive-redis", 1)
    found["floor_over_tuned_c1"] = results.ratio("floor-chain", "tuned-redis", 1)
    found["chain_over_floor_c1"] = results.ratio("hafnium-redis", "floor-chain", 1)
    for name in ("fastapi", "bentoml", "litserve"):
        found[f"predictor_over_{name}_c8"] = results.ratio("hafnium", name, 8)
    found["predictor_64_rows_over_kserve_c8"] = results.ratio("hafnium", "kserve", 8, 64, 5.0)
    for which, suffix in ((store, ""), ("sqlite", "_sqlite")):
        if which == store and suffix:
            continue
        chain, naive, tuned = f"hafnium-{which}", f"naive-{which}", f"tuned-{which}"
        for n, over_naive, over_tuned in zip(CONNECTIONS, (10.0, 30.0, 60.0), (6.0, 15.0, 25.0), strict=True):
            found[f"chain_over_naive{suffix}_c{n}"] = results.ratio(chain, naive, n, goal=over_naive)
            found[f"chain_over_tuned{suffix}_c{n}"] = results.ratio(chain, tuned, n, goal=over_tuned)
        found[f"chain_64_rows_over_naive{suffix}_c8"] = results.ratio(chain, naive, 8, 64, 5.0)
        cpu = [s.cpu_us for s in results.of(chain, 1, 8)]
        if cpu:
            found[f"chain_cpu_us{suffix}_c8"] = Figure(statistics.median(cpu), "us", "lower", 250.0, tuple(cpu))
        p99 = [a.load.p99_ms / b.load.p99_ms for a, b in zip(results.of(chain, 1, 8), results.of(naive, 1, 8), strict=False)]
        if p99:
            found[f"chain_p99_over_naive{suffix}_c8"] = Figure(statistics.median(p99), "x", "lower", 0.05, tuple(p99))
        explained = zip(results.of(f"{chain}-explain", 1, 1), results.of(chain, 1, 1), strict=False)
        added = tuple(a.load.p50_ms - b.load.p50_ms for a, b in explained)
        if added:
            found[f"explain_added_ms{suffix}"] = Figure(statistics.median(added), "ms", "lower", 0.3, added)
        shares = tuple(a.cpu_us / b.cpu_us - 1.0 for a, b in zip(
            results.of(chain, 1, 8), results.of(f"{chain}-without-log", 1, 8), strict=False))
        if shares:
            found[f"log_added_share{suffix}"] = Figure(statistics.median(shares), "", "lower", 0.03, shares)
        shares = tuple(a.cpu_us / b.cpu_us - 1.0 for a, b in zip(
            results.of(f"{chain}-traced", 1, 8), results.of(chain, 1, 8), strict=False))
        if shares:
            found[f"tracing_added_share{suffix}"] = Figure(statistics.median(shares), "", "lower", None, shares)
    return {k: f for k, f in found.items() if f is not None}


def table(results: Results, memory: dict[str, float]) -> str:
    """One line for each contestant and load."""
    lines = [f"{'':<28}{'rows':>5}{'conn':>5}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}{'bad':>5}{'MB':>6}"]
    order = dict.fromkeys(sorted((s.rows, s.contestant, s.connections) for s in results.seen))
    for rows, name, n in order:
        def m(what: str, name: str = name, rows: int = rows, n: int = n) -> float:
            return results.median(name, rows, n, what) or 0.0

        lines.append(f"{name:<28}{rows:>5}{n:>5}{m('per_s'):>10,.0f}{m('p50_ms'):>9.2f}{m('p99_ms'):>9.2f}{m('cpu_us'):>9.0f}"
                     f"{m('bad'):>5.0f}{memory.get(name, 0.0):>6.0f}")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Requests per second, one panel for predictors and one for chains."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "hafnium"
    from matplotlib import pyplot as plt

    groups = {
        "predictor, one row, 8 connections": ["hafnium", "bare-asgi", "fastapi", "kserve", "hafnium-v2", "kserve-v2", "mlserver",
                                              "bentoml", "litserve"],
        "chain with lookup, 8 connections": ["hafnium-redis", "tuned-redis", "naive-redis", "hafnium-sqlite", "tuned-sqlite",
                                             "naive-sqlite"],
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for axis, (title, names) in zip(axes, groups.items(), strict=True):
        shown = [(n, v) for n in names if (v := results.median(n, 1, 8, "per_s")) is not None][::-1]
        bars = axis.barh([n for n, _ in shown], [v for _, v in shown],
                         color=["#0b6e4f" if n.startswith("hafnium") else "#9aa5b1" for n, _ in shown])
        axis.bar_label(bars, [f"{v:,.0f}" for _, v in shown], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests/s")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each run of wrk")
    parser.add_argument("--model", choices=("small", "trained"), default="small", help="small: n-64-64-1; trained: Hafnium's network")
    parser.add_argument("--only", default="", help="contestants, or beginnings of their names, comma-separated")
    args = parser.parse_args()
    if wrk_or_none() is None:
        print("wrk is missing (Debian: apt-get install wrk)", file=sys.stderr)
        return 2
    folder = (OUT / "serving").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "inference-log", ignore_errors=True)
    setting = prepare(folder, args.model)
    field = Field(setting, folder)
    script = folder / "wrk.lua"
    script.unlink(missing_ok=True)
    seen: list[Seen] = []
    memory: dict[str, float] = {}
    missing = list(field.missing)
    order = random.Random(1)
    try:
        todo = cases(field, setting, {o.strip() for o in args.only.split(",") if o.strip()})
        used = {p.name for c in todo for p in c.contestant.processes}
        traced = any(c.name.endswith("-traced") for c in todo)
        if traced:
            used.add(field.receiver.name)
        field.processes[:] = [p for p in field.processes if p.name in used or p.running is not None]
        field.start()
        for case in list(todo):
            try:
                with field.resumed(case.contestant):
                    check(case)
            except (OSError, RuntimeError) as e:
                missing.append(f"{case.name}: {e}")
                todo.remove(case)
        for case in [c for c in todo if c.connections == 8]:
            with field.resumed(case.contestant):
                run(case, WARM_S, -1, script)
        for number in range(args.rounds):
            order.shuffle(todo)
            for k, case in enumerate(todo):
                print(f"\rround {number + 1} of {args.rounds}, {k + 1} of {len(todo)}: {case.name:<32}", end="", flush=True)
                try:
                    with field.resumed(case.contestant):
                        seen.append(run(case, args.seconds, number, script))
                except RuntimeError as e:
                    missing.append(f"{case.name}, {case.connections} connections: {e}")
        field.receiver.resume()
        if traced and not spans_came(field.receiver):
            missing.append("tracing: no span reached the receiver, so tracing_added_share says nothing")
            seen = [s for s in seen if not s.contestant.endswith("-traced")]
        for case in todo:
            memory[case.name] = sum(p.rss_mb() for p in case.contestant.processes)
    finally:
        field.stop()
    results = Results(seen)
    text = table(results, memory)
    print("\r" + text + "\n")
    (OUT / "serving.txt").write_text(f"{git_describe()}, {args.model} model, {args.rounds} rounds of {args.seconds} s\n{text}\n")
    (OUT / "serving-runs.json").write_text(json.dumps([asdict(s) for s in seen], indent=1))
    plot(results, OUT / "serving.svg")
    store = "redis" if setting.redis is not None else "sqlite"
    return 1 if publish("serving", figures_of(results, store), missing) else 0


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
