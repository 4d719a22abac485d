"""A batch and what the store has for it → the matrix that the model takes, and what each row lacks.

Few rows go one by one: numpy's cost per column is then larger than Python's per value. Many go by columns, and those among them in which
anything is not plainly good, one by one after all: a missing value, a stale one, one out of range. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import Floats, Matrix, assemble, matrix_of
from hafnium_transformer.batch import Batch
from hafnium_transformer.errors import LookedUpError
from hafnium_transformer.online_store.records import Found
from hafnium_transformer.online_store.value_columns import FoundColumns
from hafnium_transformer.plan import Plan
from hafnium_transformer.row_encoding import CLOCK_SKEW_S, encode_row
from hafnium_transformer.rows import NOTHING, Lacking

ONE_BY_ONE_MAX = 16
"""Rows up to which one by one is faster."""


class Encoded(NamedTuple):
    """Rows that can be scored."""

    places: list[int]
    """Of the matrix's rows in the batch."""
    matrix: Matrix
    """[rows, n], derived inputs included."""
    lacking: dict[int, Lacking]
    """By place in the batch; rows that lack nothing are not in it."""
    errors: dict[int, LookedUpError]
    """Of the rows that can't."""
    silent: bool
    """The store could not be asked."""


def encode(plan: Plan, batch: Batch, found: Sequence[Found] | FoundColumns | None) -> Encoded:
    """`found`: what the store has for each row; None when it could not be asked, and the contract's policies decide."""
    if found is None:
        return encode_each(plan, batch, [None] * len(batch)) if len(batch) <= ONE_BY_ONE_MAX else encode_columns(plan, batch, None)
    return encode_columns(plan, batch, found) if isinstance(found, FoundColumns) else encode_each(plan, batch, found)


def encode_each(plan: Plan, batch: Batch, found: Sequence[Found | None]) -> Encoded:
    """Rows one by one. None in `found`: the store could not be asked."""
    places: list[int] = []
    lines: list[list[float]] = []
    lacking: dict[int, Lacking] = {}
    errors: dict[int, LookedUpError] = {}
    for i, one in enumerate(found):
        try:
            values, lacks = encode_row(plan, batch.row(plan, i), one)
        except LookedUpError as e:
            errors[i] = e.with_traceback(None)
            continue
        places.append(i)
        lines.append(plan.assemble_row(values, batch.event_times_s[i]))
        if lacks is not NOTHING:
            lacking[i] = lacks
    matrix = matrix_of(lines) if lines else np.empty((0, len(plan.contract.inputs)), np.float32)
    return Encoded(places, matrix, lacking, errors, all(one is None for one in found))


def encode_columns(plan: Plan, batch: Batch, found: FoundColumns | None) -> Encoded:
    """All rows at once. `found`: None when the store could not be asked."""
    event_times_s = np.array(batch.event_times_s, np.float64)
    lacking, errors = dict(batch.lacking), dict[int, LookedUpError]()
    columns = {feature.name: column for (_, feature), column in zip(plan.request_features, batch.columns(plan), strict=True)}
    if plan.looked_up:
        if found is None:
            values, odd = np.full((len(plan.looked_up), len(batch)), np.nan), range(len(batch))
        else:
            values = found.values
            odd = np.flatnonzero(~_plainly_good(plan, found, event_times_s).all(axis=0)).tolist()
        for i in odd:
            try:
                row, lacks = encode_row(plan, batch.row(plan, i), None if found is None else found.row(i))
            except LookedUpError as e:
                errors[i] = e.with_traceback(None)
                lacking.pop(i, None)
                continue
            if lacks is not NOTHING:
                lacking[i] = lacks
            values[:, i] = [row[looked_up.feature.name] for looked_up in plan.looked_up]
        columns |= {looked_up.feature.name: column for looked_up, column in zip(plan.looked_up, values, strict=True)}
    matrix = assemble(plan.contract, columns, event_times_s)
    places = list(range(len(batch)))
    if errors:
        places = [i for i in places if i not in errors]
        matrix = matrix[places]
    return Encoded(places, matrix, lacking, errors, found is None)


def _plainly_good(plan: Plan, found: FoundColumns, event_times_s: Floats) -> npt.NDArray[np.bool_]:
    """Which values are there, of their time, and in range: [features, rows]."""
    age_s = event_times_s - found.times
    return (age_s >= -CLOCK_SKEW_S) & (age_s <= plan.max_age_s) & plan.plain.good(found.values)


def rows_without_derived(plan: Plan, matrix: Matrix) -> Sequence[int]:
    """Rows in which a derived input may be missing; `check_derived` looks closer."""
    if not plan.derived_inputs:
        return ()
    if len(matrix) <= ONE_BY_ONE_MAX:
        return range(len(matrix))
    return np.flatnonzero(np.isnan(matrix[:, plan.derived_columns]).any(axis=1)).tolist()
