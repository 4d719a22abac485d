"""Is the model still as good as when it was evaluated, by the labels that have arrived?

Labels come weeks late, and not at random: confirmed fraud is known first. So a window is judged only when nearly all of its
rows have a label by now (`labelled_share_min`); earlier it is NoData, since the AUC of the early labels is another number.

What it is compared with was measured too, often on a few dozen frauds. So the loss, window − evaluation · (1 − drop), gets an
interval from both (MOVER: Zou & Donner, "Construction of confidence limits about effect measures", 2008; it takes intervals that
are not symmetric as they are). And PR-AUC depends on the share of frauds, which is no quality of the model: negatives are weighted
so that the window's share is the evaluation's.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import special

from hafnium_contract.bundle import Bundle, open_bundle
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.evidence import EvidenceSpec, EvidenceValue, Verdict
from hafnium_monitoring.labels import known_labels, possible_positives
from hafnium_monitoring.windows import ALL_ARMS, InferenceLog, LogRows, Selection

_LOG = logging.getLogger("hafnium.monitoring")
JOB = "hafnium-monitoring performance"
SCORE_NAME = "score"
LABEL_DATE_SLACK = timedelta(days=1)
"""Label times may be dates, and then lie before the request of that day."""
BASELINE_KEYS = {"roc_auc": ("rocauc",), "pr_auc": ("prauc", "averageprecision"), "brier": ("brier", "brierscore")}
"""Metric → its names in evaluation.json, compared without case, `_` and `-`."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PerformanceOptions:
    """What to look at. `start` ≤ time < `end`."""

    bundle: Path
    logs: tuple[Path | str, ...]
    """Folders, or s3:// URIs."""
    labels: Path
    """Parquet or CSV with the contract's request id, label and (when it has one) label time columns."""
    start: datetime
    end: datetime
    expect_digest: str | None = None
    """The bundle must have this digest."""
    min_rows: int = 1_000
    positives_min: int = 30
    """Fewer frauds leave the interval of PR-AUC wider than any drop worth finding."""
    labelled_share_min: float = 0.9
    drop_max: float = 0.02
    """Relative loss of ROC-AUC or PR-AUC that fails: the owners' export gate, applied to production."""
    confidence: float = 0.95
    resamples: int = 500
    rows_max: int = 200_000
    """Rows in memory beside those that may be positive, of which it may be as many again; `LabelledSample` says which."""
    seed: int = 0


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap percentile interval."""

    value: float
    lower: float
    upper: float


def run_performance(options: PerformanceOptions, now: datetime) -> EvidenceSpec:
    """Judges one window by the labels known at `now`. Whatever can't be read gives the verdict Error, as in `run_drift`."""
    if options.start >= options.end or options.start.tzinfo is None or options.end.tzinfo is None:
        raise InputError(f"window {options.start} to {options.end}: expected two times with zone, the first earlier")
    bundle = open_bundle(options.bundle, expect_digest=options.expect_digest)
    try:
        return _run(options, bundle, now)
    except Exception as e:  # noqa: BLE001 - as in drift.py: strange data must leave a record that nothing is known
        if not isinstance(e, HafniumError):
            _LOG.exception("performance run failed")
        text = str(e) if isinstance(e, HafniumError) else f"{type(e).__name__}: {e}"
        return _evidence(options, bundle, now, "Error", f"the performance run failed, so nothing is known: {text}"[:2_000], 0, ())


def _run(options: PerformanceOptions, bundle: Bundle, now: datetime) -> EvidenceSpec:
    manifest = bundle.manifest
    wanted = Selection(manifest.digest, manifest.model_version, ALL_ARMS, options.start, options.end)

    def positives() -> pa.Array:
        return possible_positives(options.labels, bundle.contract, now, since=options.start - LABEL_DATE_SLACK)

    rows = InferenceLog(options.logs).read(wanted, [], rows_max=options.rows_max, seed=options.seed, positives=positives)
    if rows.kept == 0:
        return _evidence(options, bundle, now, "NoData", "no row of the model in the window", 0, ())
    scores = _scores(rows)
    known = known_labels(options.labels, bundle.contract, now, answered_by=options.end, wanted=list(scores))
    score, truth, weight = _join(scores, known)
    asked, frauds = sum(w for _, w in scores.values()), int(truth.sum())
    short = (
        f"{weight.sum():.0f} of {asked:.0f} rows have a label by now, {options.labelled_share_min:.0%} are needed"
        if weight.sum() < options.labelled_share_min * asked else
        f"{len(truth)} labelled rows, {options.min_rows} are needed" if len(truth) < options.min_rows else
        f"{frauds} positive labels, at least {options.positives_min} of either kind are needed"
        if min(frauds, len(truth) - frauds) < options.positives_min else ""
    )
    if short:
        return _evidence(options, bundle, now, "NoData", short, len(truth), ())
    evaluated = evaluation(bundle)
    found = measure(
        score, truth, weight, confidence=options.confidence, resamples=options.resamples, seed=options.seed,
        share=evaluated.positive_share,
    )
    return _judged(options, bundle, now, found, evaluated, len(truth))


def _judged(
    options: PerformanceOptions, bundle: Bundle, now: datetime, found: Mapping[str, Interval], evaluated: Evaluation, samples: int,
) -> EvidenceSpec:
    kept = 1.0 - options.drop_max
    # Without the evaluation's share of positives its PR-AUC is a number about another population: shown, not judged
    asked = ("roc_auc", "pr_auc") if evaluated.positive_share is not None else ("roc_auc",)
    baseline = {m: evaluated.metrics[m] for m in asked if m in evaluated.metrics}
    over = {m: difference(found[m], x, kept, options.confidence) for m, x in baseline.items()}
    failed = [m for m, x in over.items() if x.upper < 0]
    values: list[EvidenceValue] = []
    for metric, x in found.items():
        floor = baseline[metric].value * kept if metric in baseline else None
        values.append(EvidenceValue(name=SCORE_NAME, statistic=metric, value=x.value, threshold=floor, drifted=metric in failed))
        values.append(EvidenceValue(name=SCORE_NAME, statistic=f"{metric}_lower", value=x.lower))
        values.append(EvidenceValue(name=SCORE_NAME, statistic=f"{metric}_upper", value=x.upper))
    text = ", ".join(f"{m} {_shown(found[m])} against {_shown(x)}" for m, x in baseline.items())
    if any(x.lower == x.upper for x in baseline.values()):
        text += " (the evaluation gives no interval and is taken as exact)"
    if not baseline:
        verdict, message = "Inconclusive", (
            "the bundle's evaluation.json has no roc_auc to compare with, and no pr_auc with the rows and positives of data.parts.test"
        )
    elif failed:
        verdict, message = "Fail", f"down by more than {options.drop_max:.0%} since the evaluation: {text}"
    elif all(x.lower >= 0 for x in over.values()):
        verdict, message = "Pass", f"as good as when it was evaluated: {text}"
    else:
        verdict, message = "Inconclusive", f"the intervals still contain a loss of more than {options.drop_max:.0%}: {text}"
    return _evidence(options, bundle, now, verdict, message, samples, values)


def _shown(x: Interval) -> str:
    return f"{x.value:.3f} [{x.lower:.3f}, {x.upper:.3f}]"


def difference(window: Interval, evaluated: Interval, kept: float, confidence: float) -> Interval:
    """window − `kept` · evaluated, at `confidence`, as `window` is; the evaluation's interval is one of 95 %."""
    scale = kept * float(special.ndtri(0.5 + confidence / 2.0) / special.ndtri(0.975))
    value = window.value - kept * evaluated.value
    return Interval(
        value,
        value - math.hypot(window.value - window.lower, scale * (evaluated.upper - evaluated.value)),
        value + math.hypot(window.upper - window.value, scale * (evaluated.value - evaluated.lower)),
    )


def _scores(rows: LogRows) -> dict[str, tuple[float, float]]:
    """Request id → score and weight. A request counts once, also when it was asked again."""
    pairs = zip(rows.score.astype(np.float64).tolist(), rows.weight.tolist(), strict=True)
    return dict(zip(rows.request_id.tolist(), pairs, strict=True))


def _join(scores: Mapping[str, tuple[float, float]], known: Mapping[str, float]) -> tuple[Floats, Floats, Floats]:
    """(score, label, weight) of the requests that have a label."""
    found = np.array([(s, known[i], w) for i, (s, w) in scores.items() if i in known], np.float64).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def measure(
    score: Floats, truth: Floats, weight: Floats | None = None, *, confidence: float, resamples: int, seed: int, share: float | None = None,
) -> dict[str, Interval]:
    """ROC-AUC, PR-AUC (average precision) and Brier score with bootstrap intervals. `score`, `truth`: [rows].

    `weight`: how many rows each stands for (None: one); a resample draws rows with their weights, so that what a sample leaves open
    is in the interval. `share`: PR-AUC as it were with this share of positives; None: as many as there are.
    """
    weight = np.ones(len(score)) if weight is None else weight
    order = np.argsort(-score, kind="stable")
    score, truth, weight = score[order], truth[order], weight[order]
    starts = np.flatnonzero(np.r_[True, np.diff(score) != 0])  # rows of one score count as one step, not in file order
    rng = np.random.default_rng(seed)
    point = _metrics(score, truth, weight, starts, share)
    rows = len(score)
    draws = np.array([
        _metrics(score, truth, weight * np.bincount(rng.integers(0, rows, rows), minlength=rows), starts, share)
        for _ in range(resamples)
    ])
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(draws, [tail, 1.0 - tail], axis=0)
    return {
        m: Interval(float(point[i]), float(low[i]), float(high[i])) for i, m in enumerate(("roc_auc", "pr_auc", "brier"))
    }


def _metrics(
    score: Floats, truth: Floats, weight: Floats, starts: npt.NDArray[np.int64], share: float | None,
) -> tuple[float, float, float]:
    """Weighted metrics; `score` falls, `starts` are the first rows of each distinct score."""
    positive = np.add.reduceat(weight * truth, starts)
    negative = np.add.reduceat(weight * (1.0 - truth), starts)
    above, false = np.cumsum(positive), np.cumsum(negative)
    all_positive, all_negative = above[-1], false[-1]
    if all_positive == 0 or all_negative == 0:
        return (np.nan, np.nan, float(np.average((score - truth) ** 2, weights=weight)))
    roc = float(np.sum(negative * (above - positive / 2.0)) / (all_positive * all_negative))
    if share is not None:  # in every resample anew: their share varies too, and is no part of what is asked
        false = false * (all_positive * (1.0 - share) / (share * all_negative))
    taken = above + false
    precision = np.divide(above, taken, out=np.zeros_like(above), where=taken > 0)
    return roc, float(np.sum(precision * positive) / all_positive), float(np.average((score - truth) ** 2, weights=weight))


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json says."""

    metrics: Mapping[str, Interval]
    """With 95 % intervals; a number without one is an interval of length 0."""
    positive_share: float | None
    """Of the rows that it was measured on; None when the file doesn't say."""


def evaluation(bundle: Bundle) -> Evaluation:
    """`metrics` of evaluation.json (a number each, or an object with `value`, `lower`, `upper`), and the counts of data.parts.test."""
    path = bundle.path / "evaluation.json"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: can't be read: {e}") from e
    plain = {str(k).lower().replace("_", "").replace("-", ""): v for k, v in _object(data, "metrics").items()}
    found: dict[str, Interval] = {}
    for metric, keys in BASELINE_KEYS.items():
        for key in keys:
            x = plain.get(key)
            fields: dict[str, Any] = x if isinstance(x, dict) else {"value": x}
            value, lower, upper = (_number(fields.get(name)) for name in ("value", "lower", "upper"))
            if value is None:
                continue
            if lower is None or upper is None or not lower <= value <= upper:
                lower = upper = value
            found.setdefault(metric, Interval(value, lower, upper))
    test = _object(data, "data", "parts", "test")
    rows, positives = _number(test.get("rows")), _number(test.get("positives"))
    if rows is None or positives is None or not 0 < positives < rows:
        return Evaluation(found, None)
    return Evaluation(found, positives / rows)


def _object(data: Any, *names: str) -> dict[str, Any]:
    """The object at this path; empty when there is none."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _evidence(
    options: PerformanceOptions, bundle: Bundle, now: datetime, verdict: Verdict, message: str, samples: int,
    values: list[EvidenceValue] | tuple[EvidenceValue, ...],
) -> EvidenceSpec:
    return EvidenceSpec(
        model_digest=bundle.manifest.digest, kind="performance", window_start=options.start, window_end=options.end,
        verdict=verdict, samples=samples, values=tuple(values), message=message, job=JOB, created_at=now,
    )
