"""The demo from beginning to end, and the guardian that starts it again when it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.lifeline import tied_to_parent
from hafnium_contract.whole_files import write_atomically
from hafnium_local.demo import acts
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
from hafnium_local.ports import is_free
from hafnium_rollout.objects import load_rollout

KILLS_MAX = 5
MARK = "hafnium-demo.json"
"""In the work folder: says that it is ours and may be emptied, what it was asked for, and when it began."""
INTERRUPTED = 130
"""As shells say it: 128 and the number of SIGINT."""


@dataclass(frozen=True)
class Played:
    """What is left when the curtain falls."""

    verdict: Verdict
    report: Path
    failure: str
    """Why it ended early; empty when it did not."""
    exit_status: int
    """0 as it should be, 1 not, 2 a step said that its input is wrong."""


@contextlib.contextmanager
def prepared(options: DemoOptions, *, resume: bool) -> Generator[None]:
    """Checks what can be checked before minutes are spent, and empties the work folder of an earlier demo.

    Until its end no other demo can use the folder: the kernel drops the lock when its holder dies, however it dies.
    """
    acts.fault_of(options.fault, acts.load_contract(options.contract))
    if options.data is not None and not options.data.is_file():
        raise InputError(f"{options.data}: no such file; --data takes a CSV or Parquet file (docs/contracts.md)")
    if options.port is not None and not is_free(options.port):
        raise InputError(f"--port {options.port}: something else listens there; choose another, or none for any free one")
    work = options.work.resolve()
    if work.exists() and not work.is_dir():
        raise InputError(f"--work {options.work}: is no folder")
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        lock = work.with_name(f".{work.name}.lock").open("a", encoding="utf-8")
    except OSError as e:
        raise InputError(f"--work {work}: can't be used: {e.strerror}") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"--work {work}: another demo runs there; give another --work") from e
        mark = work / MARK
        if resume:
            if not mark.is_file():
                raise InputError(f"--resume: {work} holds no demo that was interrupted (there is no {MARK}); leave --resume out")
            asked = read_json(mark).get("options")
            if asked != options.as_json():
                raise InputError(f"--resume: the demo in {work} was asked for {asked}; give the same options, or leave --resume out")
        else:
            if work.exists() and any(work.iterdir()) and not mark.is_file():
                raise InputError(f"{work}: holds something else than an earlier demo; give another --work")
            try:
                _empty(work)
            except OSError as e:
                raise InputError(f"--work {options.work}: can't be emptied: {e.strerror}") from e
            made = {"madeBy": "hafnium demo; the next one empties this folder", "options": options.as_json(), "began": time.time()}
            write_atomically(mark, json.dumps(made, indent=1))
        yield


def _empty(work: Path) -> None:
    """A new folder in its place. The old one is moved away whole first: a kill in between leaves nothing that looks like a user's."""
    aside = work.with_name(f".{work.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if work.exists():
        work.rename(aside)
    work.mkdir(parents=True)
    shutil.rmtree(aside, ignore_errors=True)


def play(options: DemoOptions, tell: Callable[[str], None], *, resumed: bool = False) -> Played:
    """All acts. A step that fails ends the play early; what was shown until then is judged and reported all the same."""
    stage = acts.stage_of(options, tell, resumed=resumed)
    f = stage.folders
    began = _began(f)
    ends: dict[str, Ended] = {}
    failure, status = "", 1
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
    except HafniumError as e:
        failure, status = str(e), e.exit_status
        stage.story.add(f"ended early: {e}")
    finally:
        if servants is not None:
            servants.stop()
    replay: dict[str, Any] = read_json(f.replay_summary) if f.replay_summary.is_file() else {}
    verdict = judge(options.fault, ends.get("v2"), ends.get("v3"), replay, time.time() - began)
    for sentence in verdict.wrong:
        stage.story.add(f"went differently: {sentence}")
    path = write_report(_report(stage, ends, verdict, cut_off=bool(failure)), f.report)
    return Played(verdict, path, failure, 0 if verdict.good and not failure else status)


def _began(folders: Folders) -> float:
    """When the demo began, also when this is not its first process."""
    return float(read_json(folders.work / MARK)["began"])


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

    Ctrl-C, SIGTERM and a terminal that is closed are passed on: the play then stops what it started and ends.
    """
    child: subprocess.Popen[bytes] | None = None
    asked_to_stop = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        if child is not None:
            child.send_signal(signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, pass_on)
    for attempt in range(KILLS_MAX):
        if asked_to_stop:
            return INTERRUPTED
        resume = ["--resume"] if attempt else []
        child = subprocess.Popen([*argv, *resume], preexec_fn=tied_to_parent(), process_group=0)
        if asked_to_stop:  # while it was being started
            child.send_signal(signal.SIGINT)
        while True:
            try:
                status = child.wait()
                break
            except InterruptedError:
                continue
        if asked_to_stop:
            return INTERRUPTED
        if status >= 0:
            return status
        tell(f"the demo was killed by {signal.Signals(-status).name}; going on where it was")
    raise HafniumError(f"the demo was killed {KILLS_MAX} times; giving up")


def inner_command(arguments: list[str]) -> list[str]:
    """argv of the play as the guardian's child."""
    return [sys.executable, "-u", "-m", "hafnium_local", "demo", "--unguarded", *arguments]
