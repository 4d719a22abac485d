"""What training minimises: cross-entropy + λ1 · monotonicity + λ2 · smoothness.

Cross-entropy: positives weigh w = (negatives / positives)^power, so that a batch with three frauds still says something. A
model trained so estimates odds that are w times too high; subtracting log w from the logit takes that back exactly (Elkan,
"The Foundations of Cost-Sensitive Learning", IJCAI 2001), and calibration then only corrects what is left.

Monotonicity: the network can't break a direction of its own inputs, so a penalty on those derivatives would always be zero.
What construction does not cover is a *cause* that reaches the score along several inputs: the amount also sits in
`amount / mean`, and a contract may derive `limit - amount` and declare it free. The caller who raises the amount moves both.
The penalty is on that total derivative: rows are recomputed with the cause moved a step, and a fall of the logit per step
counts. It is a hint, not a guarantee; `robustness.py` measures what is left of it. Without derived inputs it is zero.

Smoothness: squared change of the logit under small noise on the scaled inputs, per variance of the noise: an estimate of the
squared gradient (Bishop, "Training with Noise is Equivalent to Tikhonov Regularization", 1995) that needs no second derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hafnium_contract.encoding import Matrix, assemble
from hafnium_contract.model_contract import FromDerived, ModelContract
from hafnium_training.dataset import Dataset
from hafnium_training.network import Prepared

NOISE = 0.1
"""Standard deviation of the smoothness noise, in standard deviations of an input: below what separates two customers."""
HINT_STEP = 0.25
"""Step of a cause in the monotonicity hint, in its standard deviations."""


@dataclass(frozen=True)
class Hint:
    """Rows before and after a cause has moved by one step in the direction of more risk."""

    cause: str
    before: Prepared
    after: Prepared


def causes(contract: ModelContract) -> tuple[str, ...]:
    """Monotone features that other inputs are derived from: their effect on the score has more than one path."""
    fed = {
        name for f in contract.inputs if isinstance(f.source, FromDerived) for name in f.source.derived.inputs
    }
    return tuple(
        f.name for f in contract.features
        if f.monotone != "none" and f.name in fed and not isinstance(f.source, FromDerived)
    )


def moved(data: Dataset, cause: str) -> Matrix:
    """The rows' inputs (float32 [rows, n]) after `cause` moved a step towards more risk, inside its range, and everything
    derived from it was computed anew."""
    feature = data.contract.by_name[cause]
    values = data.values[cause]
    deviation = float(np.nanstd(values)) if bool(np.isfinite(values).any()) else 0.0
    step = HINT_STEP * deviation if feature.monotone == "increasing" else -HINT_STEP * deviation
    low, high = feature.range if feature.range is not None else (0.0, 1.0)
    shifted = np.clip(values + step, min(low, float(np.nanmin(values, initial=low))), high)
    return assemble(data.contract, {**data.values, cause: shifted}, data.event_time / 1e6)


def positive_weight(positives: int, rows: int, power: float) -> float:
    """(negatives / positives) ** power, at least 1."""
    return max(1.0, ((rows - positives) / max(positives, 1)) ** power)


def prior_correction(weight: float) -> float:
    """What is added to the logit of a model trained with that weight on positives, to make it a probability again."""
    return -math.log(weight)


def supervised(logit: Tensor, y: Tensor, weight: float) -> Tensor:
    """Weighted binary cross-entropy of logits [rows, members], each member by itself: mean per row and member, divided by the
    mean weight so that λ1 and λ2 mean the same for any weight."""
    target = y.unsqueeze(1).expand_as(logit)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, target, pos_weight=torch.tensor(weight, dtype=logit.dtype))
    return loss / (1.0 + (weight - 1.0) * y.mean()).detach()


def monotonicity(before: Tensor, after: Tensor) -> Tensor:
    """Mean squared fall of the logit when a cause of risk rises by a step."""
    return nn.functional.relu(before - after).square().mean()


def nearby(rows: Prepared, generator: torch.Generator) -> Prepared:
    """The rows with a little noise on their numeric inputs."""
    def noisy(x: Tensor) -> Tensor:
        return x + NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return Prepared(noisy(rows.monotone), noisy(rows.free), rows.missing, rows.codes)


def smoothness(logit: Tensor, near: Tensor) -> Tensor:
    """Mean squared slope of the logit along the noise of `nearby`."""
    return ((near - logit) / NOISE).square().mean()
