"""Kills the demo's processes with SIGKILL while it runs, one after another, and sees whether it still ends with the right answer.

    python benchmarks/kills.py                      all in PLAN, in one demo (six to eight minutes)
    python benchmarks/kills.py --only envoy,play    some of them
    python benchmarks/kills.py -- --fault crash     with options of the demo's

The outermost process, `demo`, has nobody who would start it again: what it started must end with it, and --resume goes on.

Exit status: 0 when every kill hit a process and the demo ended 0 (v2 promoted, v3 rejected for the right reason, nothing lost).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

WORK = Path("build/kills")
PERIOD_S = 0.05
WAIT_FOR_PROCESS_S = 60.0
DEMO_S_MAX = 1500.0
ORPHANS_S = 5.0
"""After a kill of the outermost process all others have to be gone within this."""


@dataclass(frozen=True)
class Kill:
    """Kills `role` `delay_s` after the demo's story has a line with `after` in it; "" is its beginning."""

    role: str
    after: str
    delay_s: float = 0.0


OUTLIVED = "outlived it"

PLAN = (
    Kill("simulate", "", 3.0),
    Kill("features", "v1 knows what was known", 4.0),
    Kill("exporter", "training.parquet:", 3.0),
    Kill("train", "training.parquet:", 6.0),
    Kill("recorder", "train-v1: killed", 4.0),
    Kill("raylet", "train-v1: killed", 20.0),
    Kill("trial", "train-v1: killed", 22.0),
    Kill("replay", "v1 answers at", 4.0),
    Kill("drift", "v1 answers at", 6.0),
    Kill("retraining", "v1 answers at", 9.0),
    Kill("envoy", "v1 answers at", 14.0),
    Kill("stable predictor", "v1 answers at", 20.0),
    Kill("stable transformer", "v1 answers at", 30.0),
    Kill("apply", "trained beside: bundles/v2"),
    Kill("rollout", "v2 Started", 3.0),
    Kill("play", "v2 StepEntered: step 0", 4.0),
    Kill("candidate transformer", "v2 StepEntered: step 1", 3.0),
    Kill("candidate predictor", "v2 StepEntered: step 2", 3.0),
    Kill("demo", "v2 StepEntered: step 2", 8.0),
    Kill("up", "v2 Promoted", 3.0),
    Kill("envoy", "v3 Started", 1.0),
    Kill("fault proxy", "v3 Started", 2.0),
    Kill("candidate predictor", "v3 StepEntered", 1.0),
    Kill("candidate transformer", "v3 StepEntered", 2.0),
)
"""Roles, in the order of the story."""


def _has(*parts: str) -> Callable[[list[str]], bool]:
    return lambda argv: all(any(p in a for a in argv) for p in parts)


ROLES: dict[str, Callable[[list[str]], bool]] = {
    "simulate": lambda argv: "hafnium_local" in argv and "simulate" in argv,
    "recorder": _has("hafnium_training.helper_process", "hafnium_training.tracking"),
    "apply": lambda argv: "hafnium_local" in argv and "rollout" in argv and "apply" in argv,
    "fault proxy": _has("hafnium_local.faults"),
    "play": _has("hafnium_local", "--unguarded"),
    "features": lambda argv: argv[-1:] != [] and "hafnium_local" in argv and "features" in argv,
    "train": lambda argv: "hafnium_local" in argv and "train" in argv,
    "retraining": lambda argv: "hafnium_local" in argv and "train" in argv,
    "exporter": _has("hafnium_training.helper_process", "hafnium_training.export"),
    "raylet": lambda argv: argv[0].endswith("raylet/raylet"),
    "trial": lambda argv: argv[0].startswith("ray::") and ("ImplicitFunc" in argv[0] or "run_trial" in argv[0]),
    "replay": _has("hafnium_local.replay"),
    "drift": lambda argv: "drift" in argv and "watch" in argv,
    "envoy": lambda argv: argv[0].endswith("envoy"),
    "rollout": lambda argv: "hafnium_rollout" in argv,
    "up": lambda argv: "hafnium_local" in argv and "up" in argv,
    "stable predictor": lambda argv: "hafnium_predictor" in argv,
    "candidate predictor": lambda argv: "hafnium_predictor" in argv,
    "stable transformer": lambda argv: "hafnium_transformer" in argv,
    "candidate transformer": lambda argv: "hafnium_transformer" in argv,
}
"""Role → whether an argv is one. Of several processes the candidate is the youngest, anything else the oldest."""


def find(demo: psutil.Process, role: str) -> psutil.Process | None:
    """The process of this role below the demo, or the demo itself."""
    if role == "demo":
        return demo
    found: list[psutil.Process] = []
    for process in demo.children(recursive=True):
        try:
            argv = process.cmdline()
            if argv and ROLES[role](argv):
                found.append(process)
        except psutil.Error:
            continue  # it ended while we looked
    found.sort(key=lambda p: p.create_time())
    if role.startswith("candidate"):
        return found[-1] if len(found) > 1 else None
    return found[0] if found else None


@dataclass
class Due:
    kill: Kill
    at: float | None = None
    done: str = ""


def events(story: Path) -> list[str]:
    """Lines of the story so far; a half-written last one is left for the next time."""
    try:
        lines = story.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    found: list[str] = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a kill has cut one in half
            found.append(str(json.loads(line)["event"]))
    return found


def end_of_outermost(demo: psutil.Process) -> str:
    """Kills the outermost process. Says who is left after ORPHANS_S; nobody should."""
    below = demo.children(recursive=True)
    demo.kill()
    _, left = psutil.wait_procs(below, timeout=ORPHANS_S)
    names: list[str] = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline()[:4]) or process.name())
            process.kill()
    return f", but {len(names)} {OUTLIVED}: {names}" if names else f", and the {len(below)} below it ended"


def step(demo: psutil.Process, plan: list[Due], story: list[str], now: float) -> None:
    """Kills what is due."""
    for due in plan:
        if due.done:
            continue
        if due.at is None:
            if not due.kill.after or any(due.kill.after in line for line in story):
                due.at = now + due.kill.delay_s
            continue
        if now < due.at:
            continue
        process = find(demo, due.kill.role)
        if process is not None:
            said = f"killed process {process.pid} at {time.strftime('%H:%M:%S')}"
            with contextlib.suppress(psutil.NoSuchProcess):
                if process == demo:
                    said += end_of_outermost(demo)
                else:
                    process.kill()
            due.done = said
            print(f"--- kill -9: {due.kill.role}", file=sys.stderr, flush=True)
        elif now > due.at + WAIT_FOR_PROCESS_S:
            due.done = "MISSED: no such process"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"comma-separated, of: {', '.join(dict.fromkeys(k.role for k in PLAN))}")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("demo", nargs="*", help="options of the demo's, after --")
    args = parser.parse_args()
    only = {r.strip() for r in args.only.split(",") if r.strip()}
    if unknown := only - {k.role for k in PLAN}:
        parser.error(f"no such role: {', '.join(sorted(unknown))}")
    plan = [Due(k) for k in PLAN if not only or k.role in only]
    if "train" not in {d.kill.role for d in plan}:  # nobody will have killed it, so count from its beginning
        plan = [
            Due(Kill(d.kill.role, "training.parquet:", d.kill.delay_s)) if d.kill.after == "train-v1: killed" else d for d in plan
        ]
    story = args.work / "story.jsonl"
    story.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hafnium_local", "demo", "--work", str(args.work), *args.demo]
    began = time.monotonic()
    child = subprocess.Popen(command)
    try:
        while child.poll() is None and time.monotonic() - began < DEMO_S_MAX:
            step(psutil.Process(child.pid), plan, events(story), time.monotonic())
            if child.poll() == -signal.SIGKILL:  # by us
                child = subprocess.Popen([*command, "--resume"])
            time.sleep(PERIOD_S)
    finally:
        if child.poll() is None:
            child.terminate()
        status = child.wait()
    table = Table("kill -9 of", "", box=None)
    for due in plan:
        table.add_row(due.kill.role, due.done or "MISSED: the moment never came")
    Console().print(table)
    missed = [d for d in plan if not d.done.startswith("killed") or OUTLIVED in d.done]
    print(f"demo: exit status {status} after {time.monotonic() - began:.0f} s; {len(plan) - len(missed)} of {len(plan)} kills")
    return 0 if status == 0 and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
