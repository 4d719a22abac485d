"""Why a score is what it is: each input's share, by leaving it out.

Contribution of an input = score − score with that input missing (NaN). Missing is the baseline because the graph itself
says what missing means, by what it imputes, which training chose as the typical value: so nothing has to be shipped beside
the model and personal features, which the reference sample must not hold, are covered too. All rows go to the predictor in
one batch (0.04 ms for 17 rows in ONNX Runtime). An input that is missing already contributes 0. Derived inputs are inputs
of their own: leaving the amount out does not change the ratio that was computed from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import UNKNOWN_CATEGORY
from hafnium_contract.model_contract import Feature, ModelContract

Matrix = npt.NDArray[np.float32]


def left_out(row: Matrix) -> Matrix:
    """Encoded row [n] → [n, n]: row j has input j missing."""
    out = np.repeat(row.reshape(1, -1), row.size, axis=0)
    np.fill_diagonal(out, np.nan)
    return out


def contributions(contract: ModelContract, row: Matrix, score: float, without: Matrix, top_k: int) -> list[dict[str, Any]]:
    """The `top_k` largest contributions: {"feature", "value", "contribution"}, largest first.

    `without` [n]: scores with each input missing. Personal features show no value.
    """
    shares = score - without.astype(np.float64)
    order = np.argsort(-np.abs(shares), kind="stable")[:top_k]
    out: list[dict[str, Any]] = []
    for j in order.tolist():
        feature = contract.inputs[j]
        value = None if feature.personal else _value(feature, float(row[j]))
        out.append({"feature": feature.name, "value": value, "contribution": round(float(shares[j]), 7)})
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
