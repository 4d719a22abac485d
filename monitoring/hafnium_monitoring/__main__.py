"""`python -m hafnium_monitoring drift|performance …`. Exit status: 0 evidence written (Pass, Inconclusive, NoData), 1 it says
Fail or Error, 2 wrong usage or input, or evidence that can't be written (the verdict is on standard output all the same). With
`--rollouts` (a CronJob) 0 whatever the findings say: they are written, and a Job that is called failed would be run again.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

from hafnium_contract.bundle import open_bundle
from hafnium_contract.durations import parse_duration
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_monitoring import cluster_job
from hafnium_monitoring.api_server import this_pod
from hafnium_monitoring.bundle_places import bundle_places
from hafnium_monitoring.drift import DriftOptions, run_drift
from hafnium_monitoring.evidence_places import CLUSTER, EvidencePlace, alone, evidence_place, write_with_report
from hafnium_monitoring.lock import evidence_lock
from hafnium_monitoring.loop import FLUSH_LAG_S_DEFAULT, DriftLoop, FixedTargets, StateFolder, Target, TargetSource, run_loop
from hafnium_monitoring.performance import PerformanceOptions, run_performance
from hafnium_monitoring.settings import DriftRules, LoopSettings, ReportSettings

_EARLIEST, _LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
"""No window of an inference log ends earlier or later, and near the calendar's own ends a window can't be reckoned with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        if arguments.command == "performance":
            return _performance(arguments)
        return _drift_loop(arguments) if arguments.every is not None else _drift(arguments)
    except HafniumError as e:
        sys.stderr.write(f"{e}\n")
        return e.exit_status
    except (OSError, OverflowError) as e:
        # Status 1 would say Fail or Error
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        return InputError.exit_status


def _duration(text: str) -> timedelta:
    try:
        value = parse_duration(text)
    except (ValueError, OverflowError) as e:
        raise argparse.ArgumentTypeError(str(e)) from e
    if value <= timedelta(0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a duration above zero")
    return value


def _time(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time with zone, such as 2026-01-15T12:00:00Z")
    if not _EARLIEST <= value <= _LATEST:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a time from {_EARLIEST:%Y} to {_LATEST:%Y}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value < 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hafnium_monitoring", description="Evidence about models in production.")
    commands = parser.add_subparsers(dest="command", required=True)
    drift = commands.add_parser("drift", help="do the model's inputs still look like what it was trained on?")
    performance = commands.add_parser("performance", help="is the model still as good, by the labels that are known?")
    rules = DriftRules()
    for command in (drift, performance):
        command.add_argument("--bundle", type=Path, help="the model under test")
        command.add_argument("--log", nargs="+", action="extend", default=[], metavar="PLACE",
                             help="the inference log: folders or s3://BUCKET/PREFIX; --rollouts fills in {namespace}, {rollout}, {service}")
        command.add_argument("--evidence", metavar="PLACE",
                             help="a folder, or `kubernetes`: ModelEvidence objects in this pod's namespace")
        command.add_argument("--rollouts", action="store_true",
                             help="in a pod: look at the models of every ModelRollout of the namespace, instead of --bundle")
        command.add_argument("--volumes", type=Path, default=Path("/volumes"),
                             help="with --rollouts: pvc://CLAIM/PATH is CLAIM/PATH in this folder (default: %(default)s)")
        command.add_argument("--lag", type=_duration,
                             help="with --rollouts: the window ends at least so long ago (drift 30s, performance 30d)")
        command.add_argument("--end", type=_time, help="end of the window (default: now)")
        command.add_argument("--min-rows", type=_count, default=rules.min_rows, help="fewer rows are NoData (default: %(default)s)")
    drift.add_argument("--window", type=_duration, default=timedelta(hours=1), help="length of the window (default: 1h)")
    drift.add_argument("--stable-bundle", type=Path, help="the model in production, to compare with in the same window")
    drift.add_argument("--looks", type=_count, default=rules.looks, help="windows per rollout, which share alpha (%(default)s)")
    drift.add_argument("--alpha", type=_share, default=rules.alpha, help="chance of a false Fail over all looks (%(default)s)")
    drift.add_argument("--report-dir", type=Path, help="folder of HTML reports (default: reports/ in the evidence folder)")
    drift.add_argument("--report", choices=("always", "findings", "never"), help="default: always; with --every: findings")
    drift.add_argument("--no-report", dest="report", action="store_const", const="never")
    drift.add_argument("--keep-reports", type=_count, default=ReportSettings().keep, help="default: %(default)s")
    drift.add_argument("--every", type=_duration, help="keep running: look this often, one disjoint window after the other")
    drift.add_argument("--state", type=Path, help="state folder of `hafnium up`: follow its routes (with --every)")
    drift.add_argument("--log-lag", type=_duration,
                       help="with --every: how late rows may reach the log: the transformer's --log_flush_seconds and a second "
                       "(default: 11s, for the transformer's default; with --state by each transformer's own arguments)")
    performance.add_argument("--window", type=_duration, required=True, help="length of the window")
    performance.add_argument("--labels", type=Path, required=True, help="Parquet or CSV file with request id, label, label time")
    return parser


def _needed(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} is needed here; see --help")


def _without_lag(arguments: argparse.Namespace) -> None:
    if arguments.lag is not None and not arguments.rollouts:
        raise InputError("--lag is for --rollouts; here --end says when the window ends (with --every: --log-lag)")


def _rules(arguments: argparse.Namespace) -> DriftRules:
    return DriftRules(alpha=arguments.alpha, looks=arguments.looks, min_rows=arguments.min_rows)


def _report(arguments: argparse.Namespace, evidence: Path | None, default: ReportSettings) -> ReportSettings:
    """`evidence` None: it goes to the cluster, and a pod's disk is gone with it, so reports are written only where a folder is given."""
    folder = arguments.report_dir or (None if evidence is None else evidence / "reports")
    return replace(default, folder=folder, when=arguments.report or default.when, keep=arguments.keep_reports)


def _drift(arguments: argparse.Namespace) -> int:
    if arguments.state is not None:
        raise InputError("--state follows the routes over time: give --every as well")
    _without_lag(arguments)
    now = datetime.now(UTC)
    if arguments.rollouts:
        report = _report(arguments, None, ReportSettings())
        with _cluster(arguments, timedelta(seconds=30)) as run:
            return _told(cluster_job.drift(run, now, _rules(arguments), None if arguments.report_dir is None else report))
    _needed(arguments, "bundle", "log", "evidence")
    evidence = evidence_place(arguments.evidence)
    end: datetime = arguments.end or now
    options = DriftOptions(
        bundle=arguments.bundle, logs=tuple(arguments.log), start=end - arguments.window, end=end,
        stable_bundle=arguments.stable_bundle, rules=_rules(arguments),
        report=_report(arguments, None if arguments.evidence == CLUSTER else Path(arguments.evidence), ReportSettings()),
    )
    with alone(evidence):
        return _publish(run_drift(options, now).evidence, evidence, arguments.keep_reports)


def _publish(evidence: EvidenceSpec, place: EvidencePlace, keep_reports: int) -> int:
    sys.stdout.write(f"{evidence.verdict}: {evidence.message}\n")  # before it is written: should that fail, it is known at least
    sys.stdout.write(f"{write_with_report(place, evidence, keep_reports)}\n")
    return 1 if evidence.verdict in ("Fail", "Error") else 0


@contextmanager
def _cluster(arguments: argparse.Namespace, lag: timedelta) -> Generator[cluster_job.ClusterRun]:
    """What a run over all rollouts needs. Raises InputError for arguments that don't go with it."""
    for name in ("bundle", "end", "stable_bundle", "every"):
        if getattr(arguments, name, None) is not None:
            raise InputError(f"--{name.replace('_', '-')} and --rollouts: the ModelRollouts say which models and windows; leave one out")
    _needed(arguments, "log")
    evidence = evidence_place(arguments.evidence or CLUSTER)
    with bundle_places(arguments.volumes) as bundles:
        yield cluster_job.ClusterRun(
            server=this_pod(), evidence=evidence, bundles=bundles, logs=tuple(arguments.log), length=arguments.window,
            lag=arguments.lag or lag,
        )


def _told(counted: cluster_job.Counted) -> int:
    """Exit status of a run over all rollouts. Fail and Error are findings, which were written: the job did what it is for."""
    verdicts = ", ".join(f"{f.verdict} {f.model_digest[:15]}" for f in counted.findings) or "none"
    sys.stdout.write(
        f"written: {verdicts}; there already: {counted.there_already}; judged for another rollout: {counted.judged_elsewhere}; "
        f"not written: {counted.problems}\n"
    )
    return 2 if counted.problems else 0


def _drift_loop(arguments: argparse.Namespace) -> int:
    _without_lag(arguments)
    if arguments.rollouts:
        raise InputError("--every and --rollouts: on a cluster the CronJob's schedule says how often; leave one out")
    if arguments.evidence == CLUSTER:
        raise InputError(
            f"--every writes to a folder; for --evidence {CLUSTER} use --rollouts in a CronJob (a folder of this name is ./{CLUSTER})")
    source: TargetSource
    if arguments.state is not None:
        source = StateFolder(arguments.state)
        evidence = Path(arguments.evidence or arguments.state / "evidence")
    else:
        _needed(arguments, "bundle", "log", "evidence")
        evidence = Path(arguments.evidence)
        # Known from now on, also when a bundle gets lost
        digest = open_bundle(arguments.bundle).manifest.digest
        stable = None if arguments.stable_bundle is None else open_bundle(arguments.stable_bundle).manifest.digest
        source = FixedTargets((Target(
            "model", arguments.bundle, digest, tuple(arguments.log), arguments.stable_bundle, stable, signature="fixed",
            log_lag_s=FLUSH_LAG_S_DEFAULT if arguments.log_lag is None else 0.0,
        ),))
    settings = LoopSettings(
        every_s=arguments.every.total_seconds(), window_s_max=arguments.window.total_seconds(),
        log_lag_s=LoopSettings().log_lag_s if arguments.log_lag is None else arguments.log_lag.total_seconds(), rules=_rules(arguments),
        report=_report(arguments, evidence, LoopSettings().report),
    )
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with evidence_lock(evidence):
        run_loop(DriftLoop(source, evidence, settings), stop, lambda: datetime.now(UTC))
    return 0


def _performance(arguments: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    if arguments.rollouts:
        with _cluster(arguments, timedelta(days=30)) as run:
            return _told(cluster_job.performance(run, now, arguments.labels, arguments.min_rows))
    _without_lag(arguments)
    _needed(arguments, "bundle", "log", "evidence")
    end: datetime = arguments.end or now
    options = PerformanceOptions(
        bundle=arguments.bundle, logs=tuple(arguments.log), labels=arguments.labels, start=end - arguments.window, end=end,
        min_rows=arguments.min_rows,
    )
    return _publish(run_performance(options, now), evidence_place(arguments.evidence), ReportSettings().keep)


if __name__ == "__main__":
    sys.exit(main())
