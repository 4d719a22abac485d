"""What text in a table's cell means: the same for training, which reads a file whole, and for `hafnium score`, which reads it in blocks."""

from __future__ import annotations

from hafnium_contract.model_contract import Feature

MISSING_NUMBERS: tuple[str, ...] = ("", "NaN", "nan", "NA", "N/A", "null", "NULL", "None")
"""In a column of numbers alone: the category or country NA is not missing."""
TRUTH = {"1": 1.0, "1.0": 1.0, "true": 1.0, "0": 0.0, "0.0": 0.0, "false": 0.0}
WHOLE_WITH_FRACTION = r"-?[0-9]{1,15}\.0"
"""Matches `12.0` whole. A column in which all values look so held whole numbers and a gap, and was written by a program whose whole
numbers have no gaps: 12 is meant."""


def is_literal(feature: Feature) -> bool:
    """Whether the contract knows a category of it like `1.0`: then no whole number is meant by one."""
    return any(c.endswith(".0") for c in feature.categories)
