"""Rows that are scored together, by columns: those of one request, read here, or of many that left together (coalescing.py).

A row that is plainly good costs a third in columns of what it costs alone. A row with anything unusual in it (a missing value, a number
out of range, a field too many) is given to `parse_row`, which knows what is wrong, and its values are put into the columns afterwards: the
unusual costs what it costs, and only for that row. A property test holds both ways together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from hafnium_contract.encoding import Floats
from hafnium_transformer.errors import RowInvalidError
from hafnium_transformer.online_store.records import EntityValue
from hafnium_transformer.plan import ENTITY_TEXT, Plan
from hafnium_transformer.rows import KEYS, NOTHING, TEXT_MAX, Lacking, Row, is_key, parse_row, plain_event_time

_NOTHING_GIVEN: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Batch:
    """Valid rows."""

    request_ids: list[str]
    event_times_s: list[float]
    """Seconds since 1970-01-01 UTC."""
    entities: list[dict[str, EntityValue]]
    explained: list[bool]
    lacking: dict[int, Lacking]
    """Of the rows in which request features are missing."""
    values: Floats | None
    """[request features, rows], encoded, in the order of Plan.request_features; NaN = missing. None: they are in `rows`."""
    rows: Sequence[Row] = ()
    """The rows themselves, when they were read one by one."""

    def __len__(self) -> int:
        return len(self.request_ids)

    @staticmethod
    def of(rows: Sequence[Row]) -> Batch:
        """Rows that were read one by one."""
        if len(rows) == 1:  # most of them, and five comprehensions are 2 µs
            row = rows[0]
            return Batch([row.request_id], [row.event_time_s], [row.entity], [row.explain],
                         {} if row.lacking is NOTHING else {0: row.lacking}, None, rows)
        return Batch(
            [row.request_id for row in rows], [row.event_time_s for row in rows], [row.entity for row in rows],
            [row.explain for row in rows], {i: row.lacking for i, row in enumerate(rows) if row.lacking is not NOTHING}, None, rows,
        )

    def columns(self, plan: Plan) -> Floats:
        """`values`, which rows that were read one by one don't have yet."""
        if self.values is not None:
            return self.values
        made = np.array([[row.values[feature.name] for row in self.rows] for _, feature in plan.request_features], np.float64)
        return made.reshape(len(plan.request_features), len(self))

    def row(self, plan: Plan, i: int) -> Row:
        """One of them."""
        if self.values is None:
            return self.rows[i]
        values = {feature.name: value for (_, feature), value in zip(plan.request_features, self.values[:, i].tolist(), strict=True)}
        return Row(self.request_ids[i], self.event_times_s[i], self.entities[i], values, self.lacking.get(i, NOTHING), self.explained[i])

    def only(self, kept: Sequence[int]) -> Batch:
        """Some of them, in order."""
        if self.values is None:
            return Batch.of([self.rows[i] for i in kept])
        new = {i: k for k, i in enumerate(kept)}
        return Batch(
            [self.request_ids[i] for i in kept], [self.event_times_s[i] for i in kept], [self.entities[i] for i in kept],
            [self.explained[i] for i in kept], {new[i]: lacks for i, lacks in self.lacking.items() if i in new}, self.values[:, kept],
        )

    def and_then(self, plan: Plan, more: Batch) -> Batch:
        """These rows and `more` behind them."""
        return Batch(
            self.request_ids + more.request_ids, self.event_times_s + more.event_times_s, self.entities + more.entities,
            self.explained + more.explained, self.lacking | {len(self) + i: lacks for i, lacks in more.lacking.items()},
            np.concatenate([self.columns(plan), more.columns(plan)], axis=1),
        )


class Parsed(NamedTuple):
    """What became of a request's rows."""

    batch: Batch
    places: list[int]
    """Of the batch's rows among all."""
    errors: dict[int, RowInvalidError]
    """Of the others."""


def parse_each(plan: Plan, items: Sequence[Any], *, request_ids: Sequence[str], now_s: float, path_of: Callable[[int], str]) -> Parsed:
    """JSON rows → Parsed, one by one: for few of them."""
    rows: list[Row] = []
    places: list[int] = []
    errors: dict[int, RowInvalidError] = {}
    for i, item in enumerate(items):
        try:
            rows.append(parse_row(plan, item, request_id=request_ids[i], now_s=now_s, path=path_of(i)))
            places.append(i)
        except RowInvalidError as e:
            errors[i] = e.with_traceback(None)
    return Parsed(Batch.of(rows), places, errors)


def parse_columns(plan: Plan, items: Sequence[Any], *, request_ids: Sequence[str], now_s: float, path_of: Callable[[int], str]) -> Parsed:
    """The same by columns: for many."""
    values = np.empty((len(plan.request_features), len(items)))
    batch, odd = _plainly(plan, items, list(request_ids), now_s, values)
    errors: dict[int, RowInvalidError] = {}
    for i in sorted(odd):
        try:
            row = parse_row(plan, items[i], request_id=request_ids[i], now_s=now_s, path=path_of(i))
        except RowInvalidError as e:
            errors[i] = e.with_traceback(None)
            continue
        batch.request_ids[i], batch.event_times_s[i], batch.entities[i] = row.request_id, row.event_time_s, row.entity
        batch.explained[i] = row.explain
        values[:, i] = [row.values[feature.name] for _, feature in plan.request_features]
        if row.lacking is not NOTHING:
            batch.lacking[i] = row.lacking
    places = list(range(len(items)))
    if errors:
        places = [i for i in places if i not in errors]
        batch = batch.only(places)
    return Parsed(batch, places, errors)


def _plainly(plan: Plan, items: Sequence[Any], request_ids: list[str], now_s: float, values: Floats) -> tuple[Batch, set[int]]:
    """The columns, and which rows have to be read by themselves: what the columns hold of those means nothing. Fills `values`."""
    rows = len(items)
    batch = Batch(request_ids, [now_s] * rows, [{}] * rows, [False] * rows, {}, values)
    if {dict} != set(map(type, items)):
        return batch, set(range(rows))
    bodies = cast(Sequence[dict[str, Any]], items)
    keys: set[str] = set().union(*bodies)
    if not keys <= KEYS:
        return batch, set(range(rows))
    odd: set[int] = set()
    if "request_id" in keys:
        for i, given in enumerate([body.get("request_id") for body in bodies]):
            if type(given) is str and 0 < len(given) <= TEXT_MAX:
                request_ids[i] = given
            elif given is not None:
                odd.add(i)
    if "event_time" in keys:
        for i, given in enumerate([body.get("event_time") for body in bodies]):
            if given is not None:
                seconds = plain_event_time(given)
                if seconds is None:
                    odd.add(i)
                else:
                    batch.event_times_s[i] = seconds
    if "explain" in keys:
        for i, given in enumerate([body.get("explain", False) for body in bodies]):
            if type(given) is bool:
                batch.explained[i] = given
            else:
                odd.add(i)
    batch.entities[:] = _plain_entities(plan, [body.get("entity") for body in bodies], odd)
    _plain_values(plan, [body.get("features") for body in bodies], values, odd)
    return batch, odd


def _plain_entities(plan: Plan, given: list[Any], odd: set[int]) -> list[dict[str, EntityValue]]:
    """Entities with the same keys as the first one has, each a good one; the others are odd."""
    usual = cast(dict[str, Any], given[0]).keys() if type(given[0]) is dict else None
    if usual is None or not (plan.needed_keys <= usual <= plan.declared_keys):
        odd.update(range(len(given)))
        return [{}] * len(given)
    entities = cast(list[dict[str, EntityValue]], given)
    other = [i for i, entity in enumerate(given) if type(entity) is not dict or cast(dict[str, Any], entity).keys() != usual]
    if other:
        odd.update(other)
        entities = [cast(dict[str, EntityValue], _NOTHING_GIVEN) if i in odd else entity for i, entity in enumerate(entities)]
    for key in usual:
        expected = plan.entity_types.get(key)
        values: list[Any] = [entity.get(key) for entity in entities]
        if not (expected == ENTITY_TEXT and {str} == set(map(type, values)) and all(values) and max(map(len, values)) <= TEXT_MAX):
            odd.update([i for i, value in enumerate(values) if not is_key(value, expected)])
    return entities


def _plain_values(plan: Plan, given: list[Any], values: Floats, odd: set[int]) -> None:
    """Fills `values`. Rows with a value that is not plainly good, or with more or fewer of them, are odd."""
    features = cast(list[dict[str, Any]], given)
    if {dict} != set(map(type, given)):
        features = [f if type(f) is dict else _NOTHING_GIVEN for f in features]
    fields = len(plan.request_features)
    odd.update([i for i, count in enumerate(map(len, features)) if count != fields])
    for k, (name, column) in enumerate(plan.plain_columns):
        values[k] = column([f.get(name) for f in features])
    odd.update(np.flatnonzero(~plan.plain_request.good(values).all(axis=0)).tolist())
