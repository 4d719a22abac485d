"""Logit → probability, and an interval around it, both fitted on the validation rows.

Probability: temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017), with an offset besides,
because a rare class makes the mean as important as the spread: two numbers, fitted by Newton's method on the log loss.

Interval: the 95 % score interval of a proportion (Wilson, "Probable Inference, the Law of Succession, and Statistical
Inference", JASA 1927) for the share of positives among validation rows with similar scores. Rows are cut into bins by score
alone (halves of what is left towards the top, so that the sparse high scores get bins of their own), never by label: bins
chosen by label would look more certain than they are. Between the bins' mean logits the bounds are joined by straight lines,
forced to rise with the score and to contain it. It says how well the model's history supports the number. It is not a promise
about one transaction, which is fraud or not, and it knows nothing of drift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hafnium_training.ranking import Floats

Z95 = 1.959963984540054
BIN_ROWS_MIN = 50
"""A Wilson interval of fewer rows spans a third of the unit interval and says nothing."""
BINS_MAX = 12
EVEN_BINS = 4
"""Equal bins below the median score; above it each bin takes half of what is left."""
TEMPERATURES = (0.05, 20.0)
OFFSET_MAX = 10.0
NEWTON_STEPS_MAX = 50
METHOD = "Wilson score interval (1927), 95 %, of the positive share in score bins of validation rows; linear between bins"


@dataclass(frozen=True)
class Fit:
    """score = sigmoid((logit + offset) / temperature); interval bounds `lower`, `upper` at the calibrated logits `knots`."""

    offset: float
    temperature: float
    knots: Floats
    lower: Floats
    upper: Floats


def calibrate(logit: Floats, y: npt.NDArray[np.int8], prior_correction: float) -> Fit:
    """Fits on validation logits [rows] and labels [rows]; `prior_correction` is added to the logit first."""
    shift, temperature = fit_temperature(logit + prior_correction, y)
    offset = prior_correction + shift
    knots, lower, upper = fit_interval((logit + offset) / temperature, y)
    return Fit(offset, temperature, knots, lower, upper)


def fit_temperature(logit: Floats, y: npt.NDArray[np.int8]) -> tuple[float, float]:
    """(offset, temperature) that minimise the log loss of sigmoid((logit + offset) / temperature), within bounds.

    Newton's method on slope 1/T and intercept; Platt's smoothed targets keep it finite when the classes can be separated. When
    scores are worse than useless (slope would be ≤ 0) the temperature is the largest allowed: the score then says little.
    """
    positives = float(y.sum())
    negatives = len(y) - positives
    target = np.where(y == 1, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
    slope, intercept = 1.0, 0.0
    loss = _log_loss(slope * logit + intercept, target)
    for _ in range(NEWTON_STEPS_MAX):
        p = _sigmoid(slope * logit + intercept)
        residual = p - target
        gradient = np.array([float((residual * logit).sum()), float(residual.sum())])
        w = p * (1.0 - p) + 1e-12
        hessian = np.array([
            [float((w * logit * logit).sum()) + 1e-9, float((w * logit).sum())], [float((w * logit).sum()), float(w.sum()) + 1e-9],
        ])
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8:
            tried = _log_loss((slope - size * step[0]) * logit + intercept - size * step[1], target)
            if tried < loss:
                break
            size /= 2.0
        else:
            break
        slope, intercept = slope - size * float(step[0]), intercept - size * float(step[1])
        done, loss = loss - tried < 1e-12 * abs(loss), tried
        if done:
            break
    low, high = TEMPERATURES
    temperature = high if slope <= 1.0 / high else max(low, 1.0 / slope)
    # against the clipped temperature the intercept still has to match the number of positives
    offset = intercept * temperature
    return float(np.clip(offset, -OFFSET_MAX * temperature, OFFSET_MAX * temperature)), float(temperature)


def _log_loss(z: Floats, target: Floats) -> float:
    return float((np.logaddexp(0.0, z) - target * z).sum())


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)), np.float64)


def wilson(positives: float, rows: float, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion: (lower, upper), within [0, 1]. (0, 1) without rows."""
    if rows <= 0:
        return 0.0, 1.0
    share = positives / rows
    center = (share + z * z / (2.0 * rows)) / (1.0 + z * z / rows)
    half = z * math.sqrt(share * (1.0 - share) / rows + z * z / (4.0 * rows * rows)) / (1.0 + z * z / rows)
    return max(0.0, center - half), min(1.0, center + half)


def bin_edges(rows: int) -> list[int]:
    """Where bins begin and end among rows sorted by score: even ones to the median, then halves of the rest, each ≥ 50 rows."""
    even = max(1, min(EVEN_BINS, rows // (2 * BIN_ROWS_MIN)))
    edges = [round(rows * i / (2 * even)) for i in range(even + 1)]
    while len(edges) <= BINS_MAX and rows - edges[-1] >= 2 * BIN_ROWS_MIN:
        edges.append(edges[-1] + (rows - edges[-1]) // 2)
    edges.append(rows)
    return edges


def fit_interval(calibrated: Floats, y: npt.NDArray[np.int8]) -> tuple[Floats, Floats, Floats]:
    """(knots, lower, upper) over calibrated logits [rows]. Equal scores share a bin, as they share a score."""
    order = np.argsort(calibrated, kind="stable")
    z, label = calibrated[order], y[order].astype(np.float64)
    knots: list[float] = []
    lower: list[float] = []
    upper: list[float] = []
    edges = bin_edges(len(z))
    start = 0
    for edge in edges[1:]:
        end = max(edge, start)
        while 0 < end < len(z) and z[end] == z[end - 1]:
            end += 1
        if end == start:
            continue
        knot = float(z[start:end].mean())
        low, high = wilson(float(label[start:end].sum()), float(end - start))
        if knots and knot - knots[-1] < 1e-6:
            low, high, knot = min(low, lower.pop()), max(high, upper.pop()), knots.pop()
        knots.append(knot)
        lower.append(low)
        upper.append(high)
        start = end
    if len(knots) == 1:
        knots, lower, upper = [knots[0], knots[0] + 1.0], lower * 2, upper * 2
    # A higher score must not promise less: the lower bound becomes the smallest to come, the upper the largest so far.
    # Both moves only widen.
    low_bounds = np.minimum.accumulate(np.array(lower)[::-1])[::-1]
    return np.array(knots), np.array(low_bounds), np.maximum.accumulate(np.array(upper))
