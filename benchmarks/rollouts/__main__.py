"""`make bench-rollouts`: how often production's `decide` is wrong, and how long it takes to be right, beside the rules of others.

    python benchmarks/rollouts                          everything: 1,000 rollouts in each world, 25 minutes on two cores
    python benchmarks/rollouts --rollouts 100           a tenth of it
    python benchmarks/rollouts --world wave,retries     false rollbacks in these worlds only

Whole climbs of the sample ModelRollout go through `decide` with all of its gates; the 1,000 in each world are the same gates' evidence over
arrays, which a test holds equal to production's `judge`. docs/rollout-figures.md explains.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# ruff: noqa: E402 - siblings are imported once their folder is known
import numpy as np
import plots
import rivals
import speed
import studies
import worlds
from climb import Ending
from figures import OUT, Figure, publish
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import beta

OURS = "Hafnium, φ measured"
PLAIN = "Hafnium, φ not given"
CLIMBS = "Hafnium, whole climbs through decide"
AA_GOAL, BAD_GOAL, MARGIN_GOAL, PLAN_GOAL, DECIDE_MS_GOAL = 10.0, 1.0, 2.0, 0.2, 5.0
DELAY_GOALS = {
    "+0.5 pt": ("0_5pt", 0.75, 0.45), "+1 pt": ("1pt", 1.05, 0.95), "+2 pt": ("2pt", 1.35, 1.15), "p99 × 1.3": ("p99_x1_3", 0.8, 0.45),
    "+1 pt after 60 min": ("late", 1.15, None),
}
TUNE_ROLLOUTS = 10_000
"""So many that a tuned rule's own rate is 10 ± 1 per 1,000 (one standard deviation); ± 2 moves its delay by 5 %."""
RIVAL_CHUNK = 250


@dataclass
class Results:
    """All that is printed, plotted and written."""

    rollouts: int
    climbs: int
    bad_climbs: int
    seed: int
    aa: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict[str, Any])
    """Rule → world → (rolled back, of)."""
    aa_why: dict[str, dict[str, int]] = field(default_factory=dict[str, Any])
    aa_ends: dict[str, dict[str, int]] = field(default_factory=dict[str, Any])
    phi: dict[str, tuple[float, ...]] = field(default_factory=dict[str, Any])
    bad: dict[str, dict[str, int]] = field(default_factory=dict[str, Any])
    delays: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict[str, Any])
    """Harm → rule → median, p90, missed."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict[str, Any])
    across: dict[str, dict[str, float]] = field(default_factory=dict[str, Any])
    """The same for scores compared across arms."""
    plan: list[tuple[str, float, float]] = field(default_factory=list[Any])
    decide_ms: list[float] = field(default_factory=list[float])
    seconds: float = 0.0


def interval(found: int, of: int) -> tuple[float, float]:
    """Clopper-Pearson, 95 %, per 1,000."""
    low = 0.0 if found == 0 else float(beta.ppf(0.025, found, of - found + 1))
    high = 1.0 if found == of else float(beta.ppf(0.975, found + 1, of - found))
    return 1000 * low, 1000 * high


def quantiles(values: np.ndarray) -> dict[str, float]:
    known = np.sort(values[~np.isnan(values)])
    if not known.size:
        return {"median": float("nan"), "p90": float("nan"), "missed": float("nan"), "count": 0}
    at = {q: float(known[min(int(np.ceil(q * known.size)) - 1, known.size - 1)]) for q in (0.5, 0.9)}
    return {"median": at[0.5], "p90": at[0.9], "missed": float(np.mean(np.isinf(known))), "count": int(known.size)}


def gate_of(e: Ending) -> str:
    return e.message.split(":")[0].removeprefix("Safety gate ").removeprefix("Quality gate ") if e.reason == "GateFailed" else e.reason


def false_rollbacks(lab: studies.Laboratory, wanted: list[str], results: Results) -> None:
    """All gates together: the counted ones on paths of each world, scores and drift beside them, rollout by rollout."""
    for world in wanted:
        nothing = worlds.Harm()
        counted = lab.counted(f"paths of {world}", world, nothing, shadow=studies.SHADOW, with_phi=True)[0] < rivals.NEVER
        scores, drift = (np.array(x) for x in lab.false_otherwise(world))
        any_gate = counted | scores | drift
        results.aa.setdefault(OURS, {})[world] = (int(any_gate.sum()), len(any_gate))
        results.aa_why[world] = {"errors, latency": int(counted.sum()), "scores": int(scores.sum()), "drift": int(drift.sum())}
        results.phi[world] = tuple(  # φ at ½ and its clumps, of errors and of slow requests
            float(np.median([getattr(p[i], part) for p in lab.phi(world)])) for i in (0, 1) for part in ("phi", "clump"))
        if world in studies.PLAIN_WORLDS:
            plain = lab.counted(f"paths of {world}, no φ", world, nothing, shadow=studies.SHADOW, with_phi=False)[0] < rivals.NEVER
            results.aa.setdefault(PLAIN, {})[world] = (int((plain | scores | drift).sum()), len(plain))


def whole_climbs(lab: studies.Laboratory, wanted: list[str], results: Results) -> None:
    """Equal candidates through the whole of `decide`."""
    for case in studies.AA:
        if case.world not in wanted:
            continue
        ends = lab.run(case, results.climbs)
        results.aa.setdefault(CLIMBS, {})[case.world] = (sum(e.rolled_back for e in ends), len(ends))
        results.aa_ends[case.world] = {
            "promoted on evidence alone": sum(e.phase == "Promoted" and not e.skipped for e in ends),
            "a person had to go on": sum(e.phase == "Promoted" and bool(e.skipped) for e in ends),
            "rolled back": sum(e.rolled_back for e in ends), "looks": sum(e.looks for e in ends),
        }
        for gate, count in Counter(gate_of(e) for e in ends if e.rolled_back).items():
            results.aa_ends[case.world][f"by {gate}"] = count


def bad_candidates(lab: studies.Laboratory, results: Results) -> None:
    for case in (*studies.BAD, *studies.AT_MARGIN):
        ends = lab.run(case, results.bad_climbs)
        results.bad[case.name] = {"promoted": sum(e.phase == "Promoted" for e in ends), "rolled back": sum(e.rolled_back for e in ends),
                                  "paused": sum(e.phase == "Paused" for e in ends), "of": len(ends)}


def delays(lab: studies.Laboratory, results: Results) -> None:
    for case in studies.DELAYS:
        for name, with_phi in ((OURS, True), (PLAIN, False)):
            label = case.name if with_phi else f"{case.name}, no φ"
            values = lab.counted(label, case.world, case.harm, shadow=0, with_phi=with_phi)[1]
            results.delays.setdefault(case.name, {})[name] = quantiles(values)
    results.scores = {name: quantiles(np.array(v)) for name, v in lab.shifts().items()}
    results.across = {name: quantiles(np.array(v)) for name, v in lab.across().items()}


def others(rollouts: int, seed: int, wanted: list[str], with_delays: bool, bars: Progress, results: Results) -> None:
    """The rivals, in this process: they are vectorised."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, 99)))
    told = [c.harm.errors for c in studies.DELAYS if c.harm.errors and not c.harm.from_look] if with_delays else []
    tuning = bars.add_task("rivals tuned", total=rivals.TUNING_STEPS)
    rules = rivals.Rivals(rng, TUNE_ROLLOUTS, told, lambda: bars.advance(tuning))
    chunks = [min(RIVAL_CHUNK, rollouts - i) for i in range(0, rollouts, RIVAL_CHUNK)]
    bar = bars.add_task("rivals", total=len(chunks) * (len(wanted) + (len(studies.DELAYS) if with_delays else 0)))
    for world in wanted:
        for count in chunks:
            found = rules.fails_at(rivals.draw(world, rng, count, worlds.Harm()))
            for name, looks in found.items():
                before = results.aa.setdefault(name, {}).get(world, (0, 0))
                results.aa[name][world] = (before[0] + int((looks < rivals.NEVER).sum()), before[1] + count)
            bars.advance(bar)
    for case in studies.DELAYS if with_delays else ():
        gathered: dict[str, list[np.ndarray]] = {}
        for count in chunks:
            paths = rivals.draw("constant", rng, count, case.harm)
            for name, looks in rules.fails_at(paths, None if case.harm.from_look else case.harm.errors).items():
                value = rivals.delay(paths, looks, case.harm.from_look)
                gathered.setdefault(name, []).append(value)
            bars.advance(bar)
        for name, parts in gathered.items():
            results.delays.setdefault(case.name, {})[name] = quantiles(np.concatenate(parts))


def best_fixed(row: dict[str, dict[str, float]], quantile: str) -> tuple[str, float]:
    """The tuned fixed threshold that is quickest in this row."""
    names = [n for n in row if n.endswith(", tuned") and n.startswith(("Argo", "Flagger", "fixed"))]
    name = min(names, key=lambda n: row[n][quantile])
    return name, row[name][quantile]


def figures(results: Results) -> dict[str, Figure]:
    out: dict[str, Figure] = {}
    for world, (found, of) in results.aa.get(OURS, {}).items():
        low, high = interval(found, of)
        out[f"aa_false_rollbacks_per_1000_{world}"] = Figure(1000 * found / of, "", "lower", AA_GOAL, (low, high))
    if results.bad:
        for key, cases, goal in (("bad_promoted_per_1000", studies.BAD, BAD_GOAL),
                                 ("bad_promoted_at_margin_per_1000", studies.AT_MARGIN, MARGIN_GOAL)):
            rows = [results.bad[c.name] for c in cases]
            of_all = 1000 * sum(r["promoted"] for r in rows) / sum(r["of"] for r in rows)
            out[key] = Figure(of_all, "", "lower", goal, tuple(1000 * r["promoted"] / r["of"] for r in rows))
    for name, (key, median_goal, p90_goal) in DELAY_GOALS.items():
        row = results.delays.get(name)
        if row is None or OURS not in row:
            continue
        for quantile, goal, prefix in (("median", median_goal, "delay_vs_tuned"), ("p90", p90_goal, "delay_p90_vs_tuned")):
            ratio = row[OURS][quantile] / best_fixed(row, quantile)[1]
            out[f"{prefix}_{key}"] = Figure(ratio, "×", "lower", goal)
    if results.plan:
        errors = tuple(abs(planned / found - 1.0) for _, planned, found in results.plan)
        out["plan_error_share"] = Figure(max(errors), "", "lower", PLAN_GOAL, errors)
    if results.decide_ms:
        ordered = sorted(results.decide_ms)
        out["decide_ms_50_gates"] = Figure(ordered[len(ordered) // 2], "ms", "lower", DECIDE_MS_GOAL)
        out["decide_ms_50_gates_p99"] = Figure(ordered[int(0.99 * len(ordered))], "ms", "lower")
    return out


def tables(results: Results, wanted: list[str]) -> list[Table]:
    out = [Table("False rollbacks per 1,000 [95 %]", *wanted, box=None)]
    for rule, row in sorted(results.aa.items(), key=lambda x: not x[0].startswith("Hafnium")):
        cells: list[str] = []
        for world in wanted:
            found, of = row.get(world, (0, 0))
            low, high = interval(found, of) if of else (0.0, 0.0)
            cells.append(f"{1000 * found / of:.3g} [{low:.1f}, {high:.1f}]" if of and rule.startswith("Hafnium")
                         else f"{1000 * found / of:.0f}" if of else "")
        out[-1].add_row(rule, *cells)
    if results.aa_ends:
        table = Table("Good candidates, whole climbs", *wanted, box=None)
        for what in dict.fromkeys(k for row in results.aa_ends.values() for k in row):
            table.add_row(what, *(str(results.aa_ends.get(w, {}).get(what, "")) for w in wanted))
        why = [", ".join(f"{k} {v}" for k, v in results.aa_why.get(w, {}).items()) for w in wanted]
        table.add_row("of the rollouts as arrays: rolled back by", *why)
        phis = ["{:.2f} ({:.2f}), {:.2f} ({:.2f})".format(*results.phi[w]) if w in results.phi else "" for w in wanted]
        table.add_row("φ at ½ (its clumps): errors, slow", *phis)
        out.append(table)
    if results.bad:
        table = Table("Bad candidates", "promoted", "rolled back", "paused", "of", box=None)
        for name, row in results.bad.items():
            table.add_row(name, *(str(row[k]) for k in ("promoted", "rolled back", "paused", "of")))
        out.append(table)
    if results.delays:
        names = list(results.delays)
        table = Table("Candidate requests until rollback: median / p90 (missed)", *names, box=None)
        rules = dict.fromkeys(rule for row in results.delays.values() for rule in row)
        for rule in rules:
            table.add_row(rule, *(_delay(results.delays[n].get(rule)) for n in names))
        table.add_row("ratio to the best tuned fixed threshold", *(
            " / ".join(f"{results.delays[n][OURS][q] / best_fixed(results.delays[n], q)[1]:.2f}" for q in ("median", "p90"))
            if OURS in results.delays[n] and len(results.delays[n]) > 2 else "" for n in names))
        out.append(table)
    if results.scores:
        table = Table("Mean score shifted by", "pairs until Fail, median", "p90", box=None)
        for name, row in results.scores.items():
            table.add_row(name, f"{row['median']:.0f}", f"{row['p90']:.0f}")
        out.append(table)
    if results.across:
        table = Table("Scores across arms at 5 %, margin .05", "of 1,000", "median scores", "p90", box=None)
        for name, row in results.across.items():
            table.add_row(name, f"{1000 * (1 - row['missed']):.0f}", _count(row["median"]), _count(row["p90"]))
        out.append(table)
    if results.plan:
        table = Table("Median candidate requests", "planned", "simulated", "error", box=None)
        for what, planned, found in results.plan:
            table.add_row(what, f"{planned:,.0f}", f"{found:,.0f}", f"{planned / found - 1:+.0%}")
        out.append(table)
    return out


def _count(value: float) -> str:
    return "∞" if np.isinf(value) else f"{value:,.0f}"


def _delay(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    if not row["count"]:
        return "before it began"
    cells = " / ".join("∞" if np.isinf(row[q]) else f"{row[q]:,.0f}" if row[q] >= 100 else f"{row[q]:.1f}" for q in ("median", "p90"))
    return cells + (f" ({row['missed']:.0%})" if row["missed"] > 0.0005 else "")


def markdown(table: Table) -> str:
    """The same table for a document."""
    cells = zip(*(c.cells for c in table.columns), strict=True)
    rows = [[str(c.header) for c in table.columns], *([str(cell) for cell in row] for row in cells)]
    lines = [f"| {' | '.join(r)} |" for r in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1000, help="in each world, and for each delay")
    parser.add_argument("--climbs", type=int, default=300, help="of equal candidates in each world, through the whole of decide")
    parser.add_argument("--bad", type=int, default=1000, help="of each kind of bad candidate, through the whole of decide")
    parser.add_argument("--world", default="", help=f"comma-separated, of: {', '.join(worlds.WORLDS)}; false rollbacks only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    wanted = [w for w in args.world.split(",") if w] or list(worlds.WORLDS)
    if unknown := set(wanted) - set(worlds.WORLDS):
        parser.error(f"no such world: {', '.join(sorted(unknown))}")
    if min(args.rollouts, args.processes, args.climbs, args.bad) < 1:
        parser.error("--rollouts, --climbs, --bad and --processes must be at least 1")
    everything = not args.world
    results = Results(args.rollouts, args.climbs, args.bad, args.seed)
    began = time.monotonic()
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn"), initializer=studies.settle) as pool,
          Progress(*columns, console=Console(stderr=True)) as bars):
        if everything:
            results.decide_ms = speed.decide_ms()
        lab = studies.Laboratory(pool, bars, args.rollouts, args.seed)
        false_rollbacks(lab, wanted, results)
        if everything:
            delays(lab, results)
            results.plan = lab.plan()
        others(args.rollouts, args.seed, wanted, everything, bars, results)
        whole_climbs(lab, wanted, results)
        if everything:
            bad_candidates(lab, results)
    results.seconds = time.monotonic() - began
    console = Console(width=240)
    made = tables(results, wanted)
    for table in made:
        console.print(table)
        console.print()
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "rollouts.md").write_text("\n\n".join(markdown(t) for t in made) + "\n", encoding="utf-8")
    (OUT / "rollouts-details.json").write_text(json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots.draw(results, wanted, OUT)
    print(f"{args.rollouts} rollouts and {args.climbs} whole climbs in each world, {args.bad} of each bad candidate, "
          f"seed {args.seed}, {results.seconds:.0f} s")
    return 1 if publish("rollouts", figures(results)) else 0


if __name__ == "__main__":
    sys.exit(main())
