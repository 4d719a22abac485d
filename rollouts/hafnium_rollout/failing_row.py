"""Which Fails of a job still stand, and how many there are in a row: by the windows that they are about, never by when they came.

Only a Pass about a later window ends a Fail, and only one that is no second opinion: it overlaps neither that Fail nor any other. What
says neither (Inconclusive, NoData, Error) neither counts nor ends anything: a night without traffic makes nobody well.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from hafnium_contract.evidence import EvidenceSpec


def age_in_row(e: EvidenceSpec, max_age: timedelta, run_since: datetime | None) -> timedelta:
    """How old a finding may be to stand in a row: of this run however old, or windows as long as `max_age` would never make one. Whether
    the newest Fail of the row is too old is asked by who asks for the row."""
    return timedelta.max if run_since is not None and e.window_start >= run_since else max_age


def standing(fails: Sequence[EvidenceSpec], passes: Sequence[EvidenceSpec]) -> list[EvidenceSpec]:
    """The Fails that no Pass has ended."""
    good = [p for p in passes if all(_after(p, f) or _after(f, p) for f in fails)]
    return [f for f in fails if not any(_after(p, f) for p in good)]


def in_a_row(fails: Sequence[EvidenceSpec]) -> int:
    """How many windows that don't overlap: what one window shows is shown once, however many jobs look at it."""
    row: list[EvidenceSpec] = []
    for f in sorted(fails, key=lambda e: (e.window_end, e.window_start)):
        if not row or _after(f, row[-1]):
            row.append(f)
    return len(row)


def _after(later: EvidenceSpec, earlier: EvidenceSpec) -> bool:
    """Windows that touch don't overlap; two of the same moment do."""
    return later.window_start >= earlier.window_end and later.window_end > earlier.window_end
