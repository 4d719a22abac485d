"""Retention(asked, now, newest).surplus(found): which findings nobody needs any more. Pure.

A monitoring job writes one finding for each rollout and hour, for ever, and the operator reads all of them at every turn. What is kept is
what a decision could still rest on, and a little for people:

- *young*: no older than any gate that could look at it allows (`maxAge`), and a day in any case;
- *of a run under way*: about its models, since it began (and what was young then): its gates may be changed while it goes;
- *the newest*, of each kind and model that a ModelRollout of the namespace names: `newest` of them, and as many that say anything
  (no NoData, no Error) over windows that don't overlap. A retraining needs up to 20 Fails in a row, and must see what breaks the row.

What was found about a model that no ModelRollout names any more goes when it isn't young. A list that isn't whole may be gone by as well:
each finding goes for its age, and for newer ones that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hafnium_rollout.gates import CLOCK_SKEW_MAX

OF_TRAFFIC = frozenset({"drift", "performance"})
"""Gates count these only over windows within their own run, so what is older than a run is nothing to it."""
TRAFFIC_KEPT = timedelta(days=1)
"""Findings about traffic are young for so long whatever gates ask for: that is `maxAge` where nothing else is said."""
MODEL_TESTS_KEPT = timedelta(days=90)
"""Smoke and fairness tests are about the model itself: written once, maybe long before the ModelRollout that asks for them is there."""
SLACK = timedelta(hours=1)
"""Longer than a turn and clocks that differ: what counts for a gate now isn't removed a moment later."""
_SILENT = frozenset({"NoData", "Error"})
_NEVER = timedelta()


@dataclass(frozen=True, slots=True)
class Stored:
    """A finding, as far as it matters for how long it is needed. What can't be read is None."""

    namespace: str
    name: str
    uid: str
    digest: str | None
    kind: str | None
    verdict: str
    window_start: datetime | None
    window_end: datetime | None
    """None: it can't be read, or isn't known to be about the time that it says. It counts by when it was stored."""
    created_at: datetime | None
    """By its job's clock."""
    stored_at: datetime | None
    """By the API server's."""

    @property
    def newest_time(self) -> datetime | None:
        """What its age is counted from. None: it isn't known."""
        return self.stored_at if self.window_end is None else max(self.window_end, self.created_at or self.window_end)


@dataclass(frozen=True, slots=True)
class Asked:
    """What one ModelRollout needs."""

    digests: frozenset[str]
    """Its models: wanted, candidate, stable."""
    ages: tuple[tuple[str, timedelta], ...] = ()
    """(kind, maxAge) of each gate over findings of jobs."""
    run_since: datetime | None = None
    """Start of the run that is under way; None when none is."""


@dataclass
class _Needs:
    """What a namespace's rollouts need together."""

    in_use: set[str] = field(default_factory=set[str])
    age: dict[tuple[str, str], timedelta] = field(default_factory=dict[tuple[str, str], timedelta])
    """By kind and model."""
    age_of_kind: dict[str, timedelta] = field(default_factory=dict[str, timedelta])
    runs: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """Model → since when it takes part in a run that is under way."""

    def add(self, asked: Asked) -> None:
        self.in_use |= asked.digests
        for kind, age in asked.ages:
            self.age_of_kind[kind] = max(age, self.age_of_kind.get(kind, _NEVER))
            for digest in asked.digests:
                self.age[kind, digest] = max(age, self.age.get((kind, digest), _NEVER))
        if asked.run_since is not None:
            for digest in asked.digests:
                self.runs[digest] = min(asked.run_since, self.runs.get(digest, asked.run_since))

    def young_for(self, found: Stored) -> timedelta:
        kind, digest = found.kind, found.digest
        if kind is None:
            return max(MODEL_TESTS_KEPT, *self.age_of_kind.values(), _NEVER)
        if kind not in OF_TRAFFIC:
            return max(MODEL_TESTS_KEPT, self.age_of_kind.get(kind, _NEVER))
        asked = self.age_of_kind if digest is None or found.window_end is None else None
        return max(TRAFFIC_KEPT, self.age.get((kind, digest or ""), _NEVER) if asked is None else asked.get(kind, _NEVER))

    def needs_by_time(self, found: Stored, now: datetime) -> bool:
        at, young = found.newest_time, self.young_for(found) + SLACK
        if at is None or now - at <= young:
            return True
        since = self.runs.get(found.digest or "")
        return since is not None and at >= since - young


class Retention:
    """What is needed at one moment."""

    def __init__(self, asked: Mapping[str, Iterable[Asked]], now: datetime, newest: int) -> None:
        """`asked`: of every ModelRollout, by namespace."""
        self._now, self._newest_kept = now, newest
        self._needs: dict[str, _Needs] = {}
        for namespace, rollouts in asked.items():
            mine = self._needs[namespace] = _Needs()
            for each in rollouts:
                mine.add(each)

    def looked_at(self, found: Stored) -> bool:
        """A rollout may rest on it, however old it is: it is about a model of its own, or about one that can't be told."""
        return found.digest is None or found.digest in self._of(found).in_use

    def by_time(self, found: Stored) -> bool:
        """It is young, or of a run under way."""
        return self._of(found).needs_by_time(found, self._now)

    def surplus(self, found: Iterable[Stored]) -> tuple[Stored, ...]:
        """What may go, oldest first."""
        out: list[Stored] = []
        groups: dict[tuple[str, str, str], list[Stored]] = {}
        for each in found:
            if each.digest is not None and each.kind is not None and each.window_end is not None and self.looked_at(each):
                groups.setdefault((each.namespace, each.kind, each.digest), []).append(each)
            elif not self.by_time(each):
                out.append(each)
        for group in groups.values():
            kept = {f.uid for f in _newest(group, self._now, self._newest_kept)}
            out += [f for f in group if f.uid not in kept and not self.by_time(f)]
        return tuple(sorted(out, key=lambda f: (f.newest_time or self._now, f.namespace, f.name)))

    def _of(self, found: Stored) -> _Needs:
        return self._needs.get(found.namespace, _NOBODYS)


_NOBODYS = _Needs()


def _newest(group: Sequence[Stored], now: datetime, newest: int) -> Iterator[Stored]:
    """The newest of one kind about one model, and the newest that say anything over as many windows that don't overlap."""
    known = [(f.window_end, f.created_at or f.window_end, f) for f in group if f.window_end is not None]
    there = [x for x in known if max(x[0], x[1]) <= now + CLOCK_SKEW_MAX]  # others count when their time has come
    ordered = [f for _, _, f in sorted(there, key=lambda x: x[:2], reverse=True)]
    yield from ordered[:newest]
    until: datetime | None = None
    windows = 0
    for f in ordered:
        if f.verdict in _SILENT or f.window_end is None or f.window_start is None or f.window_start > f.window_end:
            continue
        if until is None or f.window_end <= until:
            if windows == newest:
                return
            windows, until = windows + 1, f.window_start
        yield f
