"""Rows of a batch that failed. Its answer is 200 whatever became of them, so whoever counts answers would take a model that fails every
row for one without errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hafnium_transformer.errors import ScoringError
from hafnium_transformer.scoring import Result


class FailedRows(NamedTuple):
    """Those of one batch."""

    kinds: Counter[str]
    """How many ended with which type of error."""
    ours: int
    """How many of them with one of 5xx."""
    ours_kind: str | None
    """What most of these have."""
    kind: str | None
    """The type that the batch is counted under as a request: None when any row has a score. Else what most rows have, of 5xx before what
    callers did wrong: the model gave nothing, and one bad row among them doesn't make that the caller's mistake.
    """

    @staticmethod
    def of(results: Sequence[Result]) -> FailedRows:
        """What became of a batch's rows."""
        errors = [r for r in results if isinstance(r, ScoringError)]
        kinds, ours = Counter(e.kind for e in errors), Counter(e.kind for e in errors if e.status >= 500)
        ours_kind = _most(ours)
        return FailedRows(kinds, ours.total(), ours_kind, (ours_kind or _most(kinds)) if len(errors) == len(results) else None)


def _most(kinds: Counter[str]) -> str | None:
    return max(kinds, key=kinds.__getitem__, default=None)
