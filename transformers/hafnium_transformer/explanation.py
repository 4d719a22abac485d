"""Why a score is what it is: each input's share, found by asking the model for the same row with inputs left out.

Left out means missing (NaN): the graph itself says what missing means, by what it imputes, which training chose as the typical value.
So nothing has to be shipped beside the model, and personal features, which the reference sample must not hold, are covered too. All
rows of an explanation go to the predictor in one batch with the row itself. An input that is missing already contributes 0. Derived
inputs are inputs of their own: leaving the amount out does not change the ratio that was computed from it.

`shapley`: the Shapley value (Castro et al., "Polynomial calculation of the Shapley value based on sampling", Computers & Operations
Research 2009): the mean, over orders in which inputs become known, of what each adds to the score when its turn comes. Of the n! orders a
few are taken, in pairs of an order and its reverse (Mitchell et al., JMLR 2022), shifted so that each input stands early and late. Its
contributions add up to the score less the score of a row with everything missing; for a model without interactions, and with
interactions of two, they are the exact Shapley values. The orders are fixed by the number of inputs: the same row gets the same
explanation whenever it is asked for, and whoever asks.

`substitution`: score − score with that one input missing. A third of the cost, and good for what matters most; its numbers add up to
nothing, since two inputs that say the same both look unimportant and two that need each other are both counted whole. What both are worth
against exact values: docs/serving.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import UNKNOWN_CATEGORY
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_contract.wire import BATCH_ROWS_MAX

Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Method = Literal["shapley", "substitution"]
ROWS_MAX = BATCH_ROWS_MAX - 1
"""Rows for one explanation: with the row itself they have to fit one prediction."""
_SEED = 20
_SHIFTS = 4
"""Pairs that are one drawn order, shifted: each input then stands in each quarter. More shifts have too many neighbours in common."""


@dataclass(frozen=True, slots=True)
class Explainer:
    """Which rows to ask for, worked out once for a number of inputs."""

    known: Bools
    """[rows, n]: which inputs each of the asked rows keeps. Of `shapley` the first keeps none."""
    places: npt.NDArray[np.int64] | None
    """[orders, n]: at which place of each order an input becomes known; None: `substitution`."""

    @classmethod
    def of(cls, inputs: int, method: Method, orders: int) -> Self | None:
        """An explainer of at most ROWS_MAX rows: with many inputs fewer orders, then substitution; None when even that is too much."""
        if method == "shapley":
            pairs = min(orders // 2, (ROWS_MAX - 1) // (2 * max(inputs - 1, 1)))
            if pairs >= 1:
                return cls(*_orders(inputs, pairs))
        return cls(~np.eye(inputs, dtype=bool), None) if inputs <= ROWS_MAX else None

    @property
    def rows(self) -> int:
        return len(self.known)

    def asked(self, row: Matrix) -> Matrix:
        """Encoded row [n] → the rows [rows, n] whose scores are needed."""
        return np.where(self.known, row, np.float32(np.nan))

    def shares(self, score: float, scores: Matrix) -> tuple[Floats, float | None]:
        """Score of the row and scores [rows] of those asked → each input's share [n], and what they add up from (None: nothing)."""
        if self.places is None:
            return score - scores.astype(np.float64), None
        base = float(scores[0])
        orders, inputs = self.places.shape
        steps = np.empty((orders, inputs + 1))
        steps[:, 0], steps[:, 1:-1], steps[:, -1] = base, scores[1:].reshape(orders, inputs - 1), score
        gains = np.diff(steps, axis=1)
        return np.take_along_axis(gains, self.places, axis=1).mean(axis=0), base


def _orders(inputs: int, pairs: int) -> tuple[Bools, npt.NDArray[np.int64]]:
    rng = np.random.default_rng(_SEED)
    drawn: list[npt.NDArray[np.int64]] = []
    for start in range(0, pairs, _SHIFTS):
        order, shifts = rng.permutation(inputs), min(_SHIFTS, pairs - start)
        for k in range(shifts):
            shifted = np.roll(order, round(k * inputs / shifts))
            drawn += [shifted, shifted[::-1]]
    orders = np.array(drawn)
    places = np.argsort(orders, axis=1)
    # after k steps those are known whose place is below k
    prefixes = places[:, None, :] < np.arange(1, inputs)[None, :, None]
    return np.concatenate([np.zeros((1, inputs), bool), prefixes.reshape(-1, inputs)]), places


def contributions(contract: ModelContract, row: Matrix, shares: Floats, top_k: int, decimals: int) -> list[dict[str, Any]]:
    """The `top_k` largest contributions: {"feature", "value", "contribution"}, largest first. Personal features show no value."""
    order = np.argsort(-np.abs(shares), kind="stable")[:top_k]
    out: list[dict[str, Any]] = []
    for j in order.tolist():
        feature = contract.inputs[j]
        value = None if feature.personal else _value(feature, float(row[j]))
        out.append({"feature": feature.name, "value": value, "contribution": round(float(shares[j]), decimals)})
    return out


def _value(feature: Feature, encoded: float) -> Any:
    """Encoded value → what a reader knows it by."""
    if np.isnan(encoded):
        return None
    if feature.dtype == "category":
        return "unknown" if encoded == UNKNOWN_CATEGORY else feature.categories[int(encoded)]
    if feature.dtype == "bool":
        return bool(encoded)
    return int(encoded) if feature.dtype == "int" else float(f"{encoded:.7g}")
