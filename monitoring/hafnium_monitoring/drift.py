"""One drift run: read the window, compare, judge, write down. Anything that goes wrong becomes evidence of verdict Error."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from hafnium_contract.bundle import Bundle, open_bundle
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.evidence import EvidenceSpec, EvidenceValue, Verdict, evidence_name
from hafnium_contract.inference_log import logged_features
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.bh import level
from hafnium_monitoring.comparison import Finding, compare, drifted, split_changed
from hafnium_monitoring.samples import Sample, Season, align, load_reference, match_season, sample_of
from hafnium_monitoring.settings import DriftRules, ReportSettings
from hafnium_monitoring.verdict import Comparisons, Judgement, judge
from hafnium_monitoring.windows import STABLE_ARMS, InferenceLog, LogRows, Selection, candidate_arms

JOB = "hafnium-monitoring drift"
VALUES_MAX = 1_000
"""Values per evidence: the largest come first. An object of Kubernetes must stay below 1.5 MB."""
_LOG = logging.getLogger("hafnium.monitoring")


@dataclass(frozen=True)
class DriftOptions:
    """What to look at. `start` ≤ time < `end`."""

    bundle: Path
    logs: tuple[Path | str, ...]
    """Folders, or s3:// URIs."""
    start: datetime
    end: datetime
    stable_bundle: Path | None = None
    """The model that the candidate is compared with. None: `bundle` is watched on its own, whatever its arm."""
    all_traffic: bool = False
    """The candidate has weight 100, so that a stable arm without rows is nothing that is missing."""
    expect_digest: str | None = None
    """The bundle must have this digest; also what Error evidence is about when the bundle can't be opened."""
    expect_stable_digest: str | None = None
    """The stable bundle must have this digest."""
    rules: DriftRules = field(default_factory=DriftRules)
    report: ReportSettings | None = None
    """None: no report."""


@dataclass(frozen=True)
class DriftOutcome:
    evidence: EvidenceSpec
    report: Path | None
    """The HTML report, when one was written."""


@dataclass(frozen=True)
class Arm:
    """One model, its rows of the window, and the part of its reference that they are compared with."""

    contract: ModelContract
    window: Sample
    season: Season


def run_drift(options: DriftOptions, now: datetime, log: InferenceLog | None = None) -> DriftOutcome:
    """Judges one window. `log`: pass the same one again to spare reading old files' footers.

    Never raises for what it reads: a damaged log, reference or bundle gives evidence with the verdict Error. Only when it
    isn't even known which model is meant (the bundle can't be opened and `expect_digest` is None) the error is raised.
    """
    if options.start >= options.end or options.start.tzinfo is None or options.end.tzinfo is None:
        raise InputError(f"window {options.start} to {options.end}: expected two times with zone, the first earlier")
    digest = options.expect_digest
    try:
        bundle = open_bundle(options.bundle, expect_digest=digest)
        digest = bundle.manifest.digest
        return _run(options, bundle, now, log or InferenceLog(options.logs))
    except Exception as e:
        # Broad on purpose: a fault of a library on strange data must be evidence that nothing is known, not a missing record.
        if digest is None:
            raise
        if not isinstance(e, HafniumError):
            _LOG.exception("drift run failed")
        text = str(e) if isinstance(e, HafniumError) else f"{type(e).__name__}: {e}"
        message = f"the drift run failed, so nothing is known about drift: {text}"
        return DriftOutcome(_evidence(options, digest, now, Judgement("Error", message[:2_000]), 0, ()), None)


def _run(options: DriftOptions, bundle: Bundle, now: datetime, log: InferenceLog) -> DriftOutcome:
    began = time.monotonic()
    rules = options.rules
    digest = bundle.manifest.digest
    stable_bundle = None
    if options.stable_bundle is not None:
        # Another bundle there has another digest, selects no row, and would look like a stable arm without traffic
        stable_bundle = open_bundle(options.stable_bundle, expect_digest=options.expect_stable_digest)
    rows = _read(log, bundle, candidate_arms(digest, None if stable_bundle is None else stable_bundle.manifest.digest), options)
    if rows.total < rules.min_rows:
        who = "the candidate" if stable_bundle is not None else "the model"
        message = f"{who} has {rows.total} rows in the window, {rules.min_rows} are needed{_absent(log)}"
        return DriftOutcome(_evidence(options, digest, now, Judgement("NoData", message), rows.total, ()), None)
    candidate = _arm(bundle, rows, options)
    stable: Arm | None = None
    stable_total = 0
    if stable_bundle is not None:
        stable_rows = _read(log, stable_bundle, STABLE_ARMS, options)  # live answers: copies are of other requests
        stable_total = stable_rows.total
        if stable_total >= rules.min_rows:
            stable = _arm(stable_bundle, stable_rows, options)
    found = compare_arms(candidate, stable, rules, stable_expected=stable_bundle is not None)
    found = replace(found, all_traffic=options.all_traffic, stable_rows=stable_total)
    judgement = judge(found)
    if judgement.verdict == "NoData":
        judgement = replace(judgement, message=judgement.message + _absent(log))
    evidence = _evidence(options, digest, now, judgement, rows.total, _values(found))
    report = _report(options, candidate, evidence)
    if report is not None:
        evidence = evidence.model_copy(update={"report": str(report)})
    _LOG.info("drift %s: %s rows, %.2f s: %s", judgement.verdict, rows.total, time.monotonic() - began, judgement.message)
    return DriftOutcome(evidence, report)


def _absent(log: InferenceLog) -> str:
    missing = log.missing()
    return f"; no such log: {', '.join(missing)}"[:1_000] if missing else ""


def _read(log: InferenceLog, bundle: Bundle, arms: frozenset[str], options: DriftOptions) -> LogRows:
    manifest = bundle.manifest
    wanted = Selection(manifest.digest, manifest.model_version, arms, options.start, options.end)
    features = [f.name for f in logged_features(bundle.contract)]
    return log.read(wanted, features, rows_max=options.rules.rows_max, seed=options.rules.seed)


def _arm(bundle: Bundle, rows: LogRows, options: DriftOptions) -> Arm:
    window = sample_of(rows)
    reference = load_reference(bundle, options.rules.min_rows)
    season = match_season(bundle.contract, reference, window, options.start, options.end, options.rules.min_rows)
    return Arm(bundle.contract, window, season)


def compare_arms(candidate: Arm, stable: Arm | None, rules: DriftRules, *, stable_expected: bool) -> Comparisons:
    """Every comparison that the rows allow. Two families may fail a candidate, so each has half of the look's alpha."""
    alpha = level(rules.alpha, rules.looks, 2 if stable_expected else 1)

    def against_reference(arm: Arm) -> tuple[Finding, ...]:
        return compare(
            arm.contract, arm.window, arm.season.reference, rules=rules, level=alpha, ignore=arm.season.clock_features,
        )

    own = against_reference(candidate)
    if stable is None:
        return Comparisons(own, stable_expected=stable_expected, other_hours=candidate.season.unmatched)
    contract, theirs = candidate.contract, stable.contract
    return Comparisons(
        candidate=own,
        stable=against_reference(stable),
        between=compare(
            contract, candidate.window, align(contract, theirs, stable.window), rules=rules, level=alpha, judge_score=False,
            pooled_bins=True,
        ),
        references=compare(
            contract, candidate.season.reference, align(contract, theirs, stable.season.reference), rules=rules, level=alpha,
            judge_score=False,
        ),
        stable_expected=True,
        split_changed=split_changed(candidate.window, stable.window, rules=rules, level=alpha),
    )


def _values(found: Comparisons) -> tuple[EvidenceValue, ...]:
    """Drifted first, then by size over threshold. Of the stable model only what drifted, named `stable:<feature>`."""
    values = [f.evidence("reference") for f in found.candidate]
    values += [f.evidence("stable") for f in found.between or ()]
    values += [f.evidence("reference", "stable:") for f in drifted(found.stable or ())]
    values.sort(key=lambda v: (not v.drifted, -abs(v.value) / (v.threshold or 1.0), v.name))
    assert all(math.isfinite(v.value) for v in values)  # noqa: S101 - shares and smoothed PSI are finite by construction
    return tuple(values[:VALUES_MAX])


def _evidence(
    options: DriftOptions, digest: str, now: datetime, judgement: Judgement, samples: int, values: Sequence[EvidenceValue],
) -> EvidenceSpec:
    verdict: Verdict = judgement.verdict
    return EvidenceSpec(
        model_digest=digest, kind="drift", window_start=options.start, window_end=options.end, verdict=verdict,
        samples=samples, values=tuple(values), message=judgement.message, both_arms=judgement.both_arms, job=JOB, created_at=now,
    )


def _report(options: DriftOptions, candidate: Arm, evidence: EvidenceSpec) -> Path | None:
    settings = options.report
    if settings is None or settings.folder is None or settings.when == "never":
        return None
    if settings.when == "findings" and evidence.verdict == "Pass":
        return None
    from hafnium_monitoring.report import write_report  # Evidently takes 3.6 s to import

    try:
        return write_report(
            settings, evidence_name(evidence), evidence, candidate.contract, candidate.window,
            candidate.season.reference, options.rules,
        )
    except Exception as e:  # noqa: BLE001 - Evidently raises anything on odd columns; the verdict rests on our own numbers
        _LOG.warning("no report: %s: %s", type(e).__name__, e)
        return None
