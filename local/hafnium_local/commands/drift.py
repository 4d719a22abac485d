"""`hafnium drift check | watch | list`."""

from __future__ import annotations

import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.table import Table

from hafnium_contract.errors import InputError
from hafnium_contract.evidence import EvidenceError, read_evidence
from hafnium_local.commands.arguments import DEFAULT_STATE, Json, State, parse_seconds, parse_time
from hafnium_local.console import OUT, fail, print_json

app = typer.Typer(no_args_is_help=True, help="Does what a model sees still look like what it knows? Writes evidence for rollouts.")

MinRows = Annotated[int, typer.Option(help="Fewer rows in either arm are NoData, which is never a pass.", min=1)]
Looks = Annotated[int, typer.Option(help="Windows of one rollout, which share the chance of a false alarm.", min=1)]


@app.command()
def check(
    bundle: Annotated[Path, typer.Option(help="The model under test.", show_default=False)],
    log: Annotated[
        list[Path], typer.Option(help="Inference log: a service's folder (may be given again), or the folder of all.", show_default=False)],
    evidence: Annotated[Path, typer.Option(help="Folder to write the evidence to.", show_default=False)],
    stable_bundle: Annotated[
        Path | None, typer.Option(help="The model in production, compared in the same window.", show_default=False)] = None,
    window: Annotated[float, typer.Option(parser=parse_seconds, metavar="DURATION", help="Length of the window.")] = 3600.0,
    end: Annotated[
        datetime | None, typer.Option(parser=parse_time, metavar="TIME", help="End of the window; now without it.", show_default=False)
    ] = None,
    min_rows: MinRows = 1_000, looks: Looks = 72,
    report: Annotated[bool, typer.Option(help="Write Evidently's HTML report beside the evidence.")] = True,
    as_json: Json = False,
) -> None:
    """One look at one window of the inference log, as evidence.

    Exit status: 0 the verdict is Pass, Inconclusive or NoData; 1 it is Fail or Error; 2 wrong input.

    Example: hafnium drift check --bundle build/v2 --stable-bundle build/v1 --log .hafnium/state/inference-log --evidence build/evidence
    """
    from hafnium_monitoring.drift import DriftOptions, run_drift
    from hafnium_monitoring.evidence_places import FolderEvidence, write_with_report
    from hafnium_monitoring.lock import evidence_lock
    from hafnium_monitoring.settings import DriftRules, ReportSettings

    now = datetime.now(UTC)
    finish = end or now
    options = DriftOptions(
        bundle=bundle, logs=_log_folders(log), start=finish - timedelta(seconds=window), end=finish, stable_bundle=stable_bundle,
        rules=DriftRules(min_rows=min_rows, looks=looks), report=ReportSettings(folder=evidence / "reports") if report else None,
    )
    with evidence_lock(evidence):
        found = run_drift(options, now).evidence
        path = write_with_report(FolderEvidence(evidence), found, ReportSettings().keep)
    if as_json:
        print_json(found.model_dump(mode="json") | {"file": path})
    else:
        typer.echo(f"{found.verdict}: {found.message}\n{path}")
    raise typer.Exit(1 if found.verdict in ("Fail", "Error") else 0)


def _log_folders(given: list[Path]) -> tuple[Path, ...]:
    """Each service's folder: a folder of folders stands for what is in it."""
    out: list[Path] = []
    for folder in given:
        if not folder.is_dir():
            raise InputError(f"--log {folder}: no such folder; an inference log has date=…/model_version=… below it")
        below = sorted(d.parent for d in folder.glob("*/date=*"))
        out += [folder] if any(folder.glob("date=*")) or not below else dict.fromkeys(below)
    return tuple(out)


@app.command()
def watch(
    state: State = DEFAULT_STATE,
    every: Annotated[float, typer.Option(parser=parse_seconds, metavar="DURATION", help="Time between two looks.")] = 10.0,
    window_max: Annotated[
        float, typer.Option(parser=parse_seconds, metavar="DURATION", help="A window ends when both arms have enough rows, or after this.")
    ] = 60.0,
    min_rows: MinRows = 1_000, looks: Looks = 72,
    report: Annotated[bool, typer.Option(help="Write Evidently's HTML report for what was found.")] = True,
) -> None:
    """Keeps looking, one window after the other, at whatever `hafnium up` routes to; a CronJob in little. Ctrl-C ends it.

    Example: hafnium drift watch --state .hafnium/state --every 10s
    """
    from hafnium_monitoring.lock import evidence_lock
    from hafnium_monitoring.loop import DriftLoop, StateFolder, run_loop
    from hafnium_monitoring.settings import DriftRules, LoopSettings, ReportSettings

    evidence = state / "evidence"
    settings = LoopSettings(
        every_s=every, window_s_max=window_max, rules=DriftRules(min_rows=min_rows, looks=looks),
        report=ReportSettings(folder=evidence / "reports", when="findings" if report else "never"),
    )
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with evidence_lock(evidence):
        run_loop(DriftLoop(StateFolder(state), evidence, settings), stop, lambda: datetime.now(UTC))


@app.command("list")
def list_evidence(state: State = DEFAULT_STATE, as_json: Json = False) -> None:
    """All evidence of a state folder, oldest first.

    Example: hafnium drift list
    """
    if not state.is_dir():
        raise InputError(f"{state}: no such state folder; give the --state of a `hafnium up`")
    found = list(read_evidence(state / "evidence"))
    good = [e for e in found if not isinstance(e, EvidenceError)]
    if as_json:
        print_json([e.model_dump(mode="json") for e in good])
    elif not found:
        typer.echo(f"{state}: no evidence yet; `hafnium drift watch` and `hafnium drift check` write it")
    else:
        table = Table("window's end", "model", "kind", "verdict", "rows", "message", box=None)
        for e in good:
            s = e.spec
            table.add_row(f"{s.window_end:%Y-%m-%d %H:%M:%S}", s.model_digest[7:15], s.kind, s.verdict, str(s.samples), s.message)
        OUT.print(table)
    for e in found:
        if isinstance(e, EvidenceError):
            fail(str(e))
    raise typer.Exit(1 if len(good) < len(found) else 0)
