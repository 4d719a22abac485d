"""How good the exported model is on the newest rows, overall and per slice, with the uncertainty of each number.

Every number comes from the ONNX file through ONNX Runtime, not from the torch model: what is measured is what will be served.
Intervals are percentile bootstraps over rows (Efron 1979), seeded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import UNKNOWN_CATEGORY
from hafnium_contract.model_contract import ModelContract
from hafnium_training.calibration import METHOD, Fit, bin_edges, wilson
from hafnium_training.dataset import Dataset
from hafnium_training.ranking import Floats, Metric, Ranked, pr_auc, precision_at, roc_auc

BOOTSTRAPS = 200
"""The 2.5 % quantile is then the fifth smallest: good to about a tenth of the interval's width."""
SLICE_BOOTSTRAPS = 100
SLICE_ROWS_MIN = 30
SLICE_POSITIVES_MIN = 10
"""With fewer positives (or negatives) a slice's ROC-AUC moves by more than 0.1 when one row changes."""
SLICES_PER_ATTRIBUTE_MAX = 50
ECE_BINS = 15
TOP = 100
DAY_US = 86_400_000_000
MISSING, UNKNOWN = "(missing)", "(unknown)"

Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Measured:
    """A number and its 95 % interval. NaN: could not be measured."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Slice:
    """One value of one attribute. `roc_auc` is None when there are too few rows of a class."""

    attribute: str
    value: str
    rows: int
    positives: int
    mean_score: float
    roc_auc: Measured | None
    pr_auc: Measured | None


@dataclass(frozen=True)
class CurvePoint:
    """Rows with similar scores: mean score and share of positives."""

    rows: int
    score: float
    observed: float


@dataclass(frozen=True)
class Quality:
    """Everything about how well the scores fit the labels of one dataset."""

    rows: int
    positives: int
    metrics: dict[str, Measured]
    slices: tuple[Slice, ...]
    curve: tuple[CurvePoint, ...]
    interval_bins: int
    """Score bins of the test rows whose interval was checked."""
    interval_covered: float
    """Share of those bins whose observed share of positives lies inside the mean interval of their rows."""


def evaluate(data: Dataset, score: Scores, interval: npt.NDArray[np.float32], threshold: float, seed: int) -> Quality:
    """Metrics of scores [rows] and intervals [rows, 2] against the dataset's labels."""
    rng = np.random.default_rng(seed)
    y = data.y
    ranked = Ranked(y, score)
    metrics = {
        "roc_auc": bootstrap(ranked, roc_auc, rng, BOOTSTRAPS), "pr_auc": bootstrap(ranked, pr_auc, rng, BOOTSTRAPS),
    }
    metrics |= _bootstrap_rows(y, score.astype(np.float64), threshold, rng)
    metrics["ece_by_chance"] = ece_by_chance(score, rng)
    if data.rows >= 2 * TOP:
        metrics[f"precision_at_{TOP}"] = _exact(precision_at(ranked, TOP), TOP)
    cards = card_precision(data, score)
    if cards is not None:
        metrics[f"card_precision_at_{TOP}"] = cards
    bins, covered = interval_coverage(y, score, interval)
    return Quality(
        data.rows, data.positives, metrics, tuple(slices_of(data, score, rng)), calibration_curve(y, score), bins, covered,
    )


def bootstrap(ranked: Ranked, metric: Metric, rng: np.random.Generator, count: int) -> Measured:
    """Metric with the percentile interval over `count` resamples of the rows (those without both classes don't count).

    With fewer than ten rows of a class the interval is too narrow: its rows are the same few in all resamples.
    """
    rows = len(ranked.y)
    found = [metric(ranked, rng.multinomial(rows, np.full(rows, 1.0 / rows)).astype(np.float64)) for _ in range(count)]
    return Measured(metric(ranked, None), *_quantiles(np.array(found)))


def _quantiles(found: Floats) -> tuple[float, float]:
    found = found[np.isfinite(found)]
    if len(found) == 0:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _exact(share: float, rows: int) -> Measured:
    return Measured(share, *wilson(share * rows, rows))


def _bootstrap_rows(y: Labels, score: Floats, threshold: float, rng: np.random.Generator) -> dict[str, Measured]:
    """Brier, Brier skill, log loss, ECE, and precision, recall and flagged share at the contract's decision threshold."""
    label = y.astype(np.float64)
    clipped = np.clip(score, 1e-7, 1.0 - 1e-7)
    squared = (score - label) ** 2
    loss = -(label * np.log(clipped) + (1.0 - label) * np.log1p(-clipped))
    flagged = score >= threshold
    order = np.argsort(score, kind="stable")
    edges = _mass_edges(len(y))

    def numbers(w: Floats) -> tuple[float, ...]:
        total = w.sum()
        prior = float((w * label).sum() / total)
        brier = float((w * squared).sum() / total)
        reference = prior * (1.0 - prior)
        hits, called, real = float((w * label * flagged).sum()), float((w * flagged).sum()), float((w * label).sum())
        ws, ss, ls = w[order], score[order], label[order]
        mass = np.add.reduceat(ws, edges)
        gap = np.abs(np.add.reduceat(ws * ss, edges) - np.add.reduceat(ws * ls, edges))
        return (
            brier, 1.0 - brier / reference if reference > 0 else math.nan, float((w * loss).sum() / total),
            float(gap.sum() / mass.sum()), hits / called if called else math.nan, hits / real if real else math.nan,
            called / float(total),
        )

    names = ("brier", "brier_skill", "log_loss", "ece", "precision_at_threshold", "recall_at_threshold", "flagged_share")
    rows = len(y)
    samples = np.array([
        numbers(rng.multinomial(rows, np.full(rows, 1.0 / rows)).astype(np.float64)) for _ in range(BOOTSTRAPS)
    ])
    value = numbers(np.ones(rows))
    return {name: Measured(value[i], *_quantiles(samples[:, i])) for i, name in enumerate(names)}


def _mass_edges(rows: int) -> npt.NDArray[np.int64]:
    """Starts of ECE_BINS bins with equal numbers of rows."""
    bins = min(ECE_BINS, rows)
    return np.array([round(rows * i / bins) for i in range(bins)], np.int64)


def expected_calibration_error(y: Labels, score: Scores) -> float:
    """Mean |mean score − share of positives| over bins of equal mass. Equal widths would put 99 % of the rows in one bin."""
    order = np.argsort(score, kind="stable")
    gap = score.astype(np.float64)[order] - y[order]
    return float(np.abs(np.add.reduceat(gap, _mass_edges(len(y)))).sum() / len(y))


def ece_by_chance(score: Scores, rng: np.random.Generator) -> Measured:
    """The calibration error that perfectly calibrated scores would show on this many rows: labels drawn from the scores.

    Never zero: with 400 rows about 0.05 (Bröcker & Smith, "Increasing the Reliability of Reliability Diagrams", 2007).
    """
    p = score.astype(np.float64)
    found = np.array([
        expected_calibration_error((rng.random(len(p)) < p).astype(np.int8), score) for _ in range(SLICE_BOOTSTRAPS)
    ])
    return Measured(float(found.mean()), *_quantiles(found))


def calibration_curve(y: Labels, score: Scores) -> tuple[CurvePoint, ...]:
    """Score bins of equal mass, the top one cut further in halves, where the positives are."""
    order = np.argsort(score, kind="stable")
    edges = bin_edges(len(y))
    return tuple(
        CurvePoint(b - a, float(score[order[a:b]].mean(dtype=np.float64)), float(y[order[a:b]].mean()))
        for a, b in itertools.pairwise(edges) if b > a
    )


def interval_coverage(y: Labels, score: Scores, interval: npt.NDArray[np.float32]) -> tuple[int, float]:
    """(bins, share of bins whose observed share of positives lies in their rows' mean interval)."""
    order = np.argsort(score, kind="stable")
    edges = bin_edges(len(y))
    inside = [
        float(interval[order[a:b], 0].mean()) <= float(y[order[a:b]].mean()) <= float(interval[order[a:b], 1].mean())
        for a, b in itertools.pairwise(edges) if b > a
    ]
    return len(inside), float(np.mean(inside))


def card_precision(data: Dataset, score: Scores) -> Measured | None:
    """Mean over days of the share of truly positive entities among the day's 100 highest-scored ones (entity's best score
    of the day); what an investigation team with room for 100 cases a day experiences. None without entities or two days."""
    if not data.contract.entities:
        return None
    key = data.contract.entities[0].join_key
    if key not in data.keys:
        return None
    owner = np.array([v or "" for v in data.keys[key]], dtype=object)
    day = data.event_time // DAY_US
    found: list[float] = []
    for d in np.unique(day):
        rows = np.flatnonzero(day == d)
        names, entity = np.unique(owner[rows].astype(str), return_inverse=True)
        if len(names) < 2 * TOP:
            continue
        best, real = np.zeros(len(names)), np.zeros(len(names))
        np.maximum.at(best, entity, score[rows].astype(np.float64))
        np.maximum.at(real, entity, data.y[rows].astype(np.float64))
        found.append(float(real[np.argsort(-best, kind="stable")[:TOP]].mean()))
    if len(found) < 2:
        return None
    half = 1.96 * float(np.std(found, ddof=1)) / math.sqrt(len(found))
    mean = float(np.mean(found))
    return Measured(mean, max(0.0, mean - half), min(1.0, mean + half))


def attributes_of(data: Dataset) -> Iterator[tuple[str, npt.NDArray[np.object_]]]:
    """Attributes to slice by: the protected ones of the file, then the contract's category features; values as text."""
    for name, values in data.protected.items():
        yield name, np.array([MISSING if v is None else v for v in values], dtype=object)
    for feature in data.contract.features:
        if feature.dtype == "category" and feature.name in data.values:
            codes = data.values[feature.name]
            names = np.array([*feature.categories, UNKNOWN, MISSING], dtype=object)
            at = np.where(np.isnan(codes), len(names) - 1, np.where(codes == UNKNOWN_CATEGORY, len(names) - 2, codes))
            yield feature.name, names[at.astype(np.int64)]


def slices_of(data: Dataset, score: Scores, rng: np.random.Generator) -> Iterator[Slice]:
    """Each value with at least SLICE_ROWS_MIN rows, most frequent first, at most SLICES_PER_ATTRIBUTE_MAX per attribute."""
    for attribute, values in attributes_of(data):
        names, counts = np.unique(values.astype(str), return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:SLICES_PER_ATTRIBUTE_MAX]
        for name in names[largest]:
            rows = np.flatnonzero(values == name)
            if len(rows) < SLICE_ROWS_MIN:
                continue
            positives = int(data.y[rows].sum())
            auc = ap = None
            if SLICE_POSITIVES_MIN <= positives <= len(rows) - SLICE_POSITIVES_MIN:
                ranked = Ranked(data.y[rows], score[rows])
                auc = bootstrap(ranked, roc_auc, rng, SLICE_BOOTSTRAPS)
                ap = bootstrap(ranked, pr_auc, rng, SLICE_BOOTSTRAPS)
            yield Slice(attribute, str(name), len(rows), positives, float(score[rows].mean(dtype=np.float64)), auc, ap)


@dataclass(frozen=True)
class Comparison:
    """Candidate against the production model on the same rows."""

    digest: str
    version: str
    candidate: dict[str, float]
    production: dict[str, float]
    change: dict[str, Measured]
    """Relative change (candidate / production − 1) with a paired bootstrap interval."""


def compare(
    digest: str, version: str, y: Labels, candidate: Scores, production: Scores, seed: int,
) -> Comparison:
    """ROC-AUC and PR-AUC of both models on the same rows and the same resamples."""
    rng = np.random.default_rng(seed)
    both = Ranked(y, candidate), Ranked(y, production)
    metrics: dict[str, Metric] = {"roc_auc": roc_auc, "pr_auc": pr_auc}
    values = [{name: metric(r, None) for name, metric in metrics.items()} for r in both]
    samples: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(BOOTSTRAPS):
        weight = rng.multinomial(len(y), np.full(len(y), 1.0 / len(y))).astype(np.float64)
        for name, metric in metrics.items():
            ours, theirs = (metric(r, weight[r.order]) for r in both)
            samples[name].append(ours / theirs - 1.0 if theirs else math.nan)
    change = {
        name: Measured(values[0][name] / values[1][name] - 1.0, *_quantiles(np.array(samples[name]))) for name in metrics
    }
    return Comparison(digest, version, values[0], values[1], change)


def interval_facts(fit: Fit, contract: ModelContract) -> dict[str, object]:
    """What the bundle says about calibration and the interval."""
    return {
        "temperature": fit.temperature, "offset": fit.offset, "intervalMethod": METHOD, "intervalKnots": len(fit.knots),
        "decisionThreshold": contract.decision.threshold,
    }
