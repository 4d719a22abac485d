"""The demo from beginning to end, and the guardian that starts it again when it is killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.lifeline import tied_to_parent
from hafnium_local.demo import acts
from hafnium_local.demo.children import StepFailedError
from hafnium_local.demo.plan import DemoOptions, Folders
from hafnium_local.demo.report import Report, write_report
from hafnium_local.demo.traces import (
    Ended,
    calibration,
    drift_panels,
    read_json,
    read_status,
    run_points,
    story_of,
    trace,
)
from hafnium_local.demo.verdict import Verdict, judge
from hafnium_rollout.objects import load_rollout

KILLS_MAX = 5
MARK = "demo.txt"
"""In the work folder: says that it is ours and may be emptied."""


@dataclass(frozen=True)
class Played:
    """What is left when the curtain falls."""

    verdict: Verdict
    report: Path
    failure: str
    """Why it ended early; empty when it did not."""


def prepare(options: DemoOptions, *, resume: bool) -> None:
    """Checks what can be checked before minutes are spent, and empties the work folder of an earlier demo."""
    folders = Folders(options.work)
    acts.fault_of(options.fault, acts.load_contract(options.contract))
    if options.data is not None and not options.data.is_file():
        raise InputError(f"{options.data}: no such file; --data takes a CSV or Parquet file (docs/contracts.md)")
    if not resume and options.work.exists():
        if any(options.work.iterdir()) and not (options.work / MARK).is_file():
            raise InputError(f"{options.work}: holds something else than an earlier demo; give another --work")
        shutil.rmtree(options.work)
    folders.work.mkdir(parents=True, exist_ok=True)
    (folders.work / MARK).write_text("made by `hafnium demo`; the next demo empties this folder\n", encoding="utf-8")


def play(options: DemoOptions, tell: Callable[[str], None]) -> Played:
    """All acts. A step that fails ends the play early; what was shown until then is judged and reported all the same."""
    stage = acts.stage_of(options, tell)
    f = stage.folders
    began = _began(f)
    ends: dict[str, Ended] = {}
    failure = ""
    servants: acts.Servants | None = None
    try:
        cut = acts.gather(stage)
        acts.features(stage, cut)
        v1 = acts.train(stage, cut)
        stage.once("requests", lambda: acts.prepare_requests(stage, cut))
        acts.manifest(stage, "v1", v1)
        servants = acts.Servants(stage, acts.Retraining(stage, cut))
        servants.start()
        for version in ("v2", "v3"):
            ends[version] = acts.roll_out(stage, version, servants)
    except StepFailedError as e:
        failure = str(e)
        stage.story.add(f"ended early: {e}")
    finally:
        if servants is not None:
            servants.stop()
    replay: dict[str, Any] = read_json(f.replay_summary) if f.replay_summary.is_file() else {}
    verdict = judge(options.fault, ends.get("v2"), ends.get("v3"), replay, time.time() - began)
    for sentence in verdict.wrong:
        stage.story.add(f"went differently: {sentence}")
    path = write_report(_report(stage, ends, verdict, cut_off=bool(failure)), f.report)
    return Played(verdict, path, failure)


def _began(folders: Folders) -> float:
    """When the demo began, also when this is not its first process."""
    return (folders.work / MARK).stat().st_mtime


def _report(stage: acts.Stage, ends: dict[str, Ended], verdict: Verdict, *, cut_off: bool) -> Report:
    f, o = stage.folders, stage.options
    status = read_status(f.state, stage.contract.name)
    runs = run_points(status.history) if status is not None else []
    versions = [v for v in ("v2", "v3") if f.manifest(v).is_file()]
    traces = tuple(
        trace(version, points, load_rollout(f.manifest(version)), ends.get(version))
        for version, points in zip(versions, runs, strict=False)
    )
    bundles = {v: f.bundle(v) for v in ("v1", "v2", "v3") if f.bundle(v).is_dir()}
    digests = {str(read_json(path / "manifest.json")["digest"]): version for version, path in bundles.items()}
    curves = [calibration(version, path) for version, path in bundles.items()]
    data = "simulated transactions" if o.data is None else o.data.name
    return Report(
        title=f"Hafnium demo: {stage.contract.name}",
        subtitle=f"{data}, fault {o.fault}, seed {o.seed}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC{'; ended early' if cut_off else ''}",
        rows=verdict.rows, traces=traces, drift=drift_panels(f.state / "evidence", digests),
        calibration=tuple(c for c in curves if c is not None), story=story_of(f.story), end=datetime.now(UTC),
    )


def guard(argv: list[str], tell: Callable[[str], None]) -> int:
    """Runs the play as a child and starts it again, to go on where it was, when a signal ended it. Returns its exit status.

    Ctrl-C and SIGTERM are passed on: the play then stops what it started and ends.
    """
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: object) -> None:
        if child is not None:
            child.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    for attempt in range(KILLS_MAX):
        resume = ["--resume"] if attempt else []
        child = subprocess.Popen([*argv, *resume], preexec_fn=tied_to_parent(), process_group=0)
        while True:
            try:
                status = child.wait()
                break
            except InterruptedError:
                continue
        if status >= 0:
            return status
        tell(f"the demo was killed by {signal.Signals(-status).name}; going on where it was")
    raise HafniumError(f"the demo was killed {KILLS_MAX} times; giving up")


def inner_command(arguments: list[str]) -> list[str]:
    """argv of the play as the guardian's child."""
    return [sys.executable, "-u", "-m", "hafnium_local", "demo", "--unguarded", *arguments]
