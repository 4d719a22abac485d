"""Which of a window's rows stay in memory when there are more than fit, and for how many each of them stands then.

For drift a uniform sample will do: shares and quantiles of 200,000 rows are as good as those of all. By labels it won't: what is known
about a model's skill is known from its few frauds, and from the rows that score as high as they do. So those all stay, and the others
are sampled. Frauds aren't known while the log is read; the label file says which requests may be some. It need not be right: a row's
weight follows from the group that it was sorted into before anything was drawn, so that every group counts for its whole size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at import, so type checkers can't see them

Kept = list[tuple[pa.Table, float]]
"""Rows, and how many rows of the log each of them stands for."""


class RowSample(Protocol):
    """Takes rows and keeps a bounded number of them."""

    def add(self, table: pa.Table) -> None: ...

    def kept(self) -> Kept:
        """Once, after the last row."""
        ...


class UniformSample:
    """Each row draws a random key, and the `rows_max` smallest keys stay, in the order in which they came."""

    def __init__(self, rows_max: int, rng: np.random.Generator) -> None:
        self._rows_max, self._rng = rows_max, rng
        self._tables: list[pa.Table] = []
        self._keys: list[npt.NDArray[np.float64]] = []
        self._held = self._given = 0

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._keys.append(self._rng.random(len(table)))
        self._held += len(table)
        self._given += len(table)
        if self._held > 2 * self._rows_max:
            self._thin()

    def kept(self) -> Kept:
        if not self._given:
            return []
        self._thin()
        return [(self._tables[0], self._given / self._held)]

    def _thin(self) -> None:
        table, key = pa.concat_tables(self._tables), np.concatenate(self._keys)
        if len(table) > self._rows_max:
            chosen = np.sort(np.argpartition(key, self._rows_max)[: self._rows_max])
            table, key = table.take(pa.array(chosen)), key[chosen]
        self._tables, self._keys, self._held = [table], [key], len(table)


class LabelledSample:
    """All rows while they are no more than `rows_max`; else all of requests that may be positive (up to `rows_max`), and of the others
    the half of `rows_max` with the highest scores and as many drawn from the rest."""

    def __init__(self, rows_max: int, rng: np.random.Generator, positives: Callable[[], pa.Array]) -> None:
        """`positives`: request ids that may be positive; asked for once, and only when rows must be left out."""
        self._rows_max, self._find = rows_max, positives
        self._positives: pa.Array | None = None
        self._waiting: list[pa.Table] = []
        self._held = 0
        self._likely = UniformSample(rows_max, rng)
        self._highest: list[pa.Table] = []
        self._others = UniformSample(max(1, rows_max // 2), rng)

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._held += len(table)
        if self._held > 2 * self._rows_max:
            self._sort()

    def kept(self) -> Kept:
        if self._positives is None and self._held <= self._rows_max:
            return [(table, 1.0) for table in self._waiting]
        if self._waiting:
            self._sort()
        return [*self._likely.kept(), *((table, 1.0) for table in self._highest), *self._others.kept()]

    def _sort(self) -> None:
        if self._positives is None:
            self._positives = self._find()
        table = pa.concat_tables(self._waiting)
        self._waiting, self._held = [], 0
        likely = pc.is_in(table["request_id"].cast(pa.string()), value_set=self._positives)
        self._likely.add(table.filter(likely))
        rest = pa.concat_tables([*self._highest, table.filter(pc.invert(likely))])
        score = np.nan_to_num(np.asarray(pc.fill_null(rest["score"], np.nan).to_numpy(), np.float64), nan=-np.inf)
        high = np.zeros(len(rest), np.bool_)
        # Not by the keys, also where scores are equal: what is drawn from the rest would no longer be drawn evenly
        high[np.argsort(-score, kind="stable")[: self._rows_max // 2]] = True
        self._highest = [rest.filter(pa.array(high))]
        self._others.add(rest.filter(pa.array(~high)))
