"""Differences between groups of a protected attribute at the contract's decision threshold.

Definitions as in fairlearn: largest minus smallest over the groups, and for disparate impact smallest over largest selection
rate. "Selected" means score ≥ threshold, which here is the bad outcome.

With 0.5 % frauds, a group of 300 rows has one or two: its true positive rate is a coin. Such groups are left out and named, and
where fewer than two groups remain the answer is "not enough data", which is neither pass nor fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hafnium_training.dataset import Dataset

GROUP_ROWS_MIN = 30
GROUP_POSITIVES_MIN = 20
"""True positives are counted out of these: with 20, one more or less moves the rate by 5 percentage points."""
GROUP_SELECTED_MIN = 20
SAMPLES = 1000
MEASURES = ("parity_difference", "equal_opportunity_difference", "average_odds_difference", "disparate_impact")


@dataclass(frozen=True)
class Group:
    value: str
    rows: int
    positives: int
    selected: int
    selection_rate: float
    true_positive_rate: float | None
    false_positive_rate: float | None


@dataclass(frozen=True)
class Fairness:
    """One measure for one attribute. `value` is None when fewer than two groups have enough data."""

    attribute: str
    measure: str
    value: float | None
    lower: float | None
    upper: float | None
    groups: tuple[str, ...]
    left_out: tuple[str, ...]


def groups_of(data: Dataset, attribute: str, score: npt.NDArray[np.float32], threshold: float) -> tuple[Group, ...]:
    """Groups with at least GROUP_ROWS_MIN rows, by name."""
    values = data.protected[attribute]
    out: list[Group] = []
    for name in sorted({v for v in values if v is not None}):
        rows = np.flatnonzero(values == name)
        if len(rows) < GROUP_ROWS_MIN:
            continue
        y, selected = data.y[rows] == 1, score[rows] >= threshold
        positives, negatives = int(y.sum()), int((~y).sum())
        out.append(Group(
            name, len(rows), positives, int(selected.sum()), float(selected.mean()),
            float(selected[y].mean()) if positives else None, float(selected[~y].mean()) if negatives else None,
        ))
    return tuple(out)


def fairness_of(attribute: str, groups: tuple[Group, ...], seed: int) -> tuple[Fairness, ...]:
    """All MEASURES of one attribute, with 95 % intervals from resampling each group's confusion counts."""
    rng = np.random.default_rng(seed)
    return tuple(_measure(attribute, measure, groups, rng) for measure in MEASURES)


def _measure(attribute: str, measure: str, groups: tuple[Group, ...], rng: np.random.Generator) -> Fairness:
    def enough(g: Group) -> bool:
        if measure in ("equal_opportunity_difference", "average_odds_difference"):
            return g.positives >= GROUP_POSITIVES_MIN
        # the ratio of two small shares is noise until both have been counted
        return measure != "disparate_impact" or g.selected >= GROUP_SELECTED_MIN
    used = [g for g in groups if enough(g)]
    left_out = tuple(g.value for g in groups if not enough(g))
    names = tuple(g.value for g in used)
    if len(used) < 2:
        return Fairness(attribute, measure, None, None, None, names, left_out)
    cells = [_cells(g) for g in used]
    value = float(_value(measure, [c[None, :].astype(np.float64) for c in cells])[0])
    samples = [
        rng.multinomial(g.rows, c / g.rows, size=SAMPLES).astype(np.float64) for g, c in zip(used, cells, strict=True)
    ]
    low, high = np.nanquantile(_value(measure, samples), [0.025, 0.975])
    return Fairness(attribute, measure, value, float(low), float(high), names, left_out)


def _cells(g: Group) -> npt.NDArray[np.int64]:
    """[true positives, false negatives, false positives, true negatives]"""
    hit = round((g.true_positive_rate or 0.0) * g.positives)
    return np.array([hit, g.positives - hit, g.selected - hit, g.rows - g.positives - (g.selected - hit)], np.int64)


def _value(measure: str, counts: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """One value per sample from counts [samples, 4] of each group."""
    def rates(top: tuple[int, ...], bottom: tuple[int, ...]) -> npt.NDArray[np.float64]:
        table = np.stack([np.stack([c[:, list(top)].sum(axis=1), c[:, list(bottom)].sum(axis=1)]) for c in counts])
        return np.divide(table[:, 0], table[:, 1], out=np.full_like(table[:, 0], np.nan), where=table[:, 1] > 0)

    def spread(r: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return r.max(axis=0) - r.min(axis=0)
    selected = rates((0, 2), (0, 1, 2, 3))
    if measure == "parity_difference":
        return spread(selected)
    if measure == "disparate_impact":
        largest = selected.max(axis=0)
        return np.divide(selected.min(axis=0), largest, out=np.full_like(largest, np.nan), where=largest > 0)
    true = spread(rates((0,), (0, 1)))
    return true if measure == "equal_opportunity_difference" else (true + spread(rates((2,), (2, 3)))) / 2.0
