"""One run of a CronJob: a look at every ModelRollout of the namespace, one finding each.

What can't be read is a finding too (verdict Error), and the other rollouts are looked at all the same. Evidence is about a model and not
about a rollout: where several rollouts have the same models, their rows are judged together. Where one model stands against another
stable model in each of them, only one of these findings fits into its name; the others are said and counted. They are no problems: the
Job would be run again, and nothing would be different.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_monitoring.api_server import ApiServer
from hafnium_monitoring.bundle_places import BundlePlaces
from hafnium_monitoring.drift import JOB as DRIFT_JOB
from hafnium_monitoring.drift import DriftOptions, run_drift
from hafnium_monitoring.errors import WrittenError
from hafnium_monitoring.evidence_places import GROUP, VERSION, EvidencePlace, write_with_report
from hafnium_monitoring.performance import JOB as PERFORMANCE_JOB
from hafnium_monitoring.performance import PerformanceOptions, run_performance
from hafnium_monitoring.rollouts_seen import Watched, filled, watched, window
from hafnium_monitoring.settings import DriftRules, ReportSettings

_LOG = logging.getLogger("hafnium.monitoring")


@dataclass(frozen=True)
class ClusterRun:
    """What a run looks at, beside what the rollouts say."""

    server: ApiServer
    evidence: EvidencePlace
    bundles: BundlePlaces
    logs: tuple[str, ...]
    """With {namespace}, {rollout} and {service}."""
    length: timedelta
    lag: timedelta
    """How long before now a window ends at least: for drift what the transformer keeps in memory, for performance until labels are in."""


@dataclass(frozen=True)
class Counted:
    """What became of a run."""

    findings: tuple[EvidenceSpec, ...]
    there_already: int
    judged_elsewhere: int
    """Rollouts whose model got this window's finding for another rollout, against another stable model or none."""
    problems: int
    """Rollouts about which nothing could be written."""


def drift(run: ClusterRun, now: datetime, rules: DriftRules, report: ReportSettings | None) -> Counted:
    """Drift of every rollout's model."""

    def look(together: tuple[Watched, ...], start: datetime, end: datetime) -> EvidenceSpec:
        seen = together[0]
        stable = None if seen.stable is None else run.bundles.folder(seen.stable.storage_uri)
        options = DriftOptions(
            bundle=run.bundles.folder(seen.model.storage_uri), logs=_logs(run, together), start=start, end=end,
            stable_bundle=stable, all_traffic=all(w.all_traffic for w in together), expect_digest=seen.model.digest,
            expect_stable_digest=None if seen.stable is None else seen.stable.digest, rules=rules, report=report,
        )
        return run_drift(options, now).evidence

    return _each(run, now, look, "drift", DRIFT_JOB, keep_reports=(report or ReportSettings()).keep)


def performance(run: ClusterRun, now: datetime, labels: Path, min_rows: int) -> Counted:
    """Performance of every rollout's stable model, by the labels that are known: a candidate has none yet."""

    def look(together: tuple[Watched, ...], start: datetime, end: datetime) -> EvidenceSpec:
        seen = together[0]
        return run_performance(PerformanceOptions(
            bundle=run.bundles.folder(seen.model.storage_uri), logs=_logs(run, together), labels=labels, start=start, end=end,
            min_rows=min_rows, expect_digest=seen.model.digest,
        ), now)

    def stable(seen: Watched) -> Watched:
        return seen if seen.stable is None else Watched(seen.rollout, seen.stable, None, None)

    return _each(run, now, look, "performance", PERFORMANCE_JOB, stable)


def _logs(run: ClusterRun, together: Sequence[Watched]) -> tuple[str, ...]:
    """Each place once: without {service} in it, both arms share one, and without {rollout} all rollouts."""
    models = [(w.rollout, m.service) for w in together for m in (w.model, w.stable) if m is not None]
    return tuple(dict.fromkeys(filled(log, run.server.namespace, *names) for log in run.logs for names in models))


def _each(
    run: ClusterRun, now: datetime, look: Callable[[tuple[Watched, ...], datetime, datetime], EvidenceSpec], kind: str, job: str,
    whom: Callable[[Watched], Watched] = lambda seen: seen, keep_reports: int = ReportSettings().keep,
) -> Counted:
    findings: list[EvidenceSpec] = []
    watching, problems = _watching(run, whom)
    there = elsewhere = 0
    taken: dict[str, str] = {}
    for together in watching:
        names, seen = ", ".join(w.rollout for w in together), together[0]
        try:
            times = window(now, run.length, run.lag, max((w.since for w in together if w.since is not None), default=None))
            if times is None:
                _LOG.info("%s: nothing to look at: no model of it served during the whole of the last window", names)
                continue
            if (other := taken.setdefault(seen.model.digest, names)) != names:
                elsewhere += len(together)
                _LOG.warning(
                    "%s: model %s is not judged: in this window it is judged for %s, against another model or none, and one finding about "
                    "a model and window is all that there can be", names, seen.model.digest[:15], other,
                )
                continue
            try:
                found = look(together, *times)
            except Exception as e:  # noqa: BLE001
                # Broad on purpose, as in run_drift: one rollout's odd data must not cost the others their findings
                if not isinstance(e, HafniumError):
                    _LOG.exception("%s: the %s run failed", names, kind)
                found = _error(seen, times, now, kind, job, e)
            try:
                written = write_with_report(run.evidence, found, keep_reports)
            except WrittenError:
                raise  # nothing is lost: the window was judged before
            except Exception:
                _LOG.warning("%s: not written: %s: %s", names, found.verdict, found.message)  # so that the finding isn't lost
                raise
            findings.append(found)
            _LOG.info("%s: %s: %s: %s", written, found.verdict, names, found.message)
        except WrittenError as e:
            there += len(together)
            _LOG.info("%s: %s", names, e)
        except InputError as e:
            problems += len(together)
            _LOG.error("%s: %s", names, e)
        except Exception:  # noqa: BLE001 - as above; the log has the whole of it
            problems += len(together)
            _LOG.exception("%s: nothing could be written about it", names)
    return Counted(tuple(findings), there, elsewhere, problems)


def _watching(run: ClusterRun, whom: Callable[[Watched], Watched]) -> tuple[list[tuple[Watched, ...]], int]:
    """The rollouts that have the same model, against the same stable model, together; and how many can't be understood.

    Those with a candidate come first: its finding is what a rollout waits for.
    """
    found: dict[tuple[str, str], list[Watched]] = {}
    problems = 0
    for item in run.server.list(GROUP, VERSION, "modelrollouts"):
        name = "?"
        try:
            name = str((item.get("metadata") or {}).get("name"))
            seen = watched(item)
            if seen is None:
                _LOG.info("%s: nothing to look at: no model of it served during the whole of the last window", name)
                continue
            seen = whom(seen)
            found.setdefault((seen.model.digest, "" if seen.stable is None else seen.stable.digest), []).append(seen)
        except InputError as e:
            problems += 1
            _LOG.error("%s: %s", name, e)
        except Exception:  # noqa: BLE001 - a status of any form; the other rollouts are looked at all the same
            problems += 1
            _LOG.exception("%s: nothing could be written about it", name)
    return sorted((tuple(w) for w in found.values()), key=lambda together: together[0].stable is None), problems


def _error(seen: Watched, times: tuple[datetime, datetime], now: datetime, kind: str, job: str, e: Exception) -> EvidenceSpec:
    text = str(e) if isinstance(e, HafniumError) else f"{type(e).__name__}: {e}"
    message = f"the {kind} run failed, so nothing is known: {text}"[:2_000]
    blank = EvidenceSpec(
        model_digest=seen.model.digest, kind="drift", window_start=times[0], window_end=times[1], verdict="Error", samples=0,
        message=message, job=job, created_at=now,
    )
    return blank if kind == "drift" else blank.model_copy(update={"kind": kind})

