"""Feast's SQLite store, read directly: one statement for all views and all rows that wait, 40 to 90 µs instead of 600.

It runs in the event loop: handing it to a thread and back costs as much as the read. The file is on this machine and in the
page cache; for more than one machine there is Redis. Feast locks the file while it materialises (rollback journal), so a
locked read is tried again until its time is over. A file that was replaced is noticed and opened anew.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from hafnium_transformer.errors import DeadlineError, UnavailableError
from hafnium_transformer.online_store.records import EntityValue, Found, key_coder, value_reader
from hafnium_transformer.online_store.value_columns import ColumnReader, FoundColumns, event_times
from hafnium_transformer.plan import Plan

_LOCKED_PAUSE_S = 0.002
_LOOK_AT_FILE_S = 1.0
ROWS_MAX = 128
"""Entities in one statement: a read of more would hold the event loop for longer than 3 ms."""


_Cell = tuple[int, str, bytes | None, Any]
"""(place, name of the feature, value, event time): a row of the answer. Places count the entities of the first view, then the second's."""


@dataclass(frozen=True)
class _Query:
    """What a plan asks."""

    join_keys: tuple[str, ...]
    """One for each view."""
    coders: tuple[Callable[[EntityValue], bytes], ...]
    columns: tuple[dict[str, str], ...]
    """For each view: feature name → column."""
    tables: tuple[str, ...]
    names: dict[str, int]
    """Feature names of all views → column of `places`."""
    places: npt.NDArray[np.int64]
    """[views, names + 1]: of each feature in Plan.looked_up, -1 for what the view has and nobody asks for."""
    reader: ColumnReader

    made: dict[int, str] = field(default_factory=dict[int, str])
    """Statements by their number of entities."""

    def statement(self, rows: int) -> str:
        """For `rows` entities, whose places come back with their values."""
        found = self.made.get(rows)
        if found is None:
            found = self.made[rows] = self._statement(rows)
        return found

    def _statement(self, rows: int) -> str:
        return " UNION ALL ".join(
            f"SELECT place, feature_name, value, event_ts FROM (SELECT column1 AS place, column2 AS wanted FROM "  # noqa: S608 - tables are quoted
            f"(VALUES {','.join(f'({view * rows + i},?)' for i in range(rows))})) CROSS JOIN {table} ON entity_key = wanted"
            for view, table in enumerate(self.tables)
        )


class SqliteStore:
    """OnlineStore over the file that Feast writes."""

    def __init__(self, path: Path, project: str) -> None:
        self._path = path
        self._project = project
        self._read_value = value_reader()
        self._connection: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._looked = 0.0
        self._queries: dict[int, tuple[Plan, _Query]] = {}

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        """Values for each entity row, in order. Raises DeadlineError, UnavailableError."""
        query, found = self._query(plan), list[Found]()
        until = time.monotonic() + timeout_s
        for at in range(0, len(entities), ROWS_MAX):
            part = entities[at : at + ROWS_MAX]
            found += self._found(query, len(part), await self._part(query, part, until, wait=at > 0))
        return found

    async def read_columns(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> FoundColumns:
        """The same in columns."""
        query, parts = self._query(plan), list[FoundColumns]()
        until = time.monotonic() + timeout_s
        for at in range(0, len(entities), ROWS_MAX):
            part = entities[at : at + ROWS_MAX]
            parts.append(self._columns(query, len(part), await self._part(query, part, until, wait=at > 0)))
        if len(parts) == 1:
            return parts[0]
        return FoundColumns(
            np.concatenate([p.values for p in parts], axis=1), np.concatenate([p.times for p in parts], axis=1),
            lambda i: parts[i // ROWS_MAX].row(i % ROWS_MAX),
        )

    async def _part(
        self, query: _Query, entities: Sequence[dict[str, EntityValue]], until: float, *, wait: bool,
    ) -> list[_Cell]:
        if wait:
            await asyncio.sleep(0)  # others get their turn
        while True:
            try:
                return self._select(query, entities)
            except sqlite3.OperationalError as e:
                if e.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    self.close()
                    raise UnavailableError(f"the feature store failed: {self._path}: {e}") from e
                if time.monotonic() >= until:
                    raise DeadlineError(f"the feature store was locked all the time that was given: {self._path}") from e
                await asyncio.sleep(_LOCKED_PAUSE_S)
            except (sqlite3.Error, OSError) as e:
                self.close()
                raise UnavailableError(f"the feature store failed: {self._path}: {e}") from e

    def _select(self, query: _Query, entities: Sequence[dict[str, EntityValue]]) -> list[_Cell]:
        parameters = [
            coder(entity[join_key]) for coder, join_key in zip(query.coders, query.join_keys, strict=True) for entity in entities
        ]
        return self._open().execute(query.statement(len(entities)), parameters).fetchall()

    def _found(self, query: _Query, rows: int, cells: Iterable[_Cell]) -> list[Found]:
        found: list[Found] = [{} for _ in range(rows)]
        wanted = [(columns, target) for columns in query.columns for target in found]
        read_value = self._read_value
        times: dict[Any, float] = {}
        for place, name, data, event_ts in cells:
            columns, target = wanted[place]
            column = columns.get(name)
            value = None if column is None or data is None else read_value(data)
            if value is None or column is None:
                continue
            when = times.get(event_ts)
            if when is None:
                when = times[event_ts] = _event_time_s(event_ts)
            target[column] = (value, when)
        return found

    def _columns(self, query: _Query, rows: int, cells: list[_Cell]) -> FoundColumns:
        times = np.full((query.reader.features + 1, rows), np.nan)  # the last one is for what nobody asked for
        if not cells:
            return FoundColumns(times[:-1], times[:-1].copy(), lambda _: {})
        at, names, data, stamps = zip(*cells, strict=True)
        views, places = np.divmod(np.fromiter(at, np.int64, len(cells)), rows)
        features = query.places[views, np.fromiter(map(query.names.get, names, repeat(-1)), np.int64, len(cells))]
        times[features, places] = event_times(stamps, _event_time_s)
        by_row: dict[int, list[_Cell]] = {}

        def row(i: int) -> Found:
            if not by_row:
                for cell in cells:
                    by_row.setdefault(cell[0] % rows, []).append(cell)
            return self._found(query, rows, by_row.get(i, ()))[i]

        return FoundColumns(query.reader.scattered(data, features, places, rows), times[:-1], row)

    def _open(self) -> sqlite3.Connection:
        now = time.monotonic()
        if self._connection is not None and now - self._looked < _LOOK_AT_FILE_S:
            return self._connection
        self._looked = now
        stat = self._path.stat()
        inode = (stat.st_dev, stat.st_ino)
        if self._connection is None or inode != self._inode:
            self.close()
            uri = f"file:{quote(str(self._path))}?mode=ro"
            self._connection = sqlite3.connect(uri, uri=True, timeout=0.0, isolation_level=None, cached_statements=ROWS_MAX)
            self._inode = inode
        return self._connection

    def _query(self, plan: Plan) -> _Query:
        kept = self._queries.get(id(plan))
        if kept is None:
            self._queries.clear()  # one plan is in force
            columns = tuple({f.column.removeprefix(f"{v.name}__"): f.column for f in v.features} for v in plan.views)
            kept = self._queries[id(plan)] = (plan, _Query(
                tuple(v.join_key for v in plan.views),
                tuple(key_coder(v.join_key, plan.entity_types.get(v.join_key)) for v in plan.views), columns,
                tuple(_quoted(f"{self._project}_{v.name}") for v in plan.views), *_places(plan), ColumnReader(plan),
            ))
        return kept[1]

    def close(self) -> None:
        """Closes the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _places(plan: Plan) -> tuple[dict[str, int], npt.NDArray[np.int64]]:
    """Feature names, each once, and where each view's feature of that name stands in Plan.looked_up."""
    own = [f.column.removeprefix(f"{plan.views[f.view].name}__") for f in plan.looked_up]
    names = {name: n for n, name in enumerate(dict.fromkeys(own))}
    places = np.full((len(plan.views), len(names) + 1), -1)
    for k, (f, name) in enumerate(zip(plan.looked_up, own, strict=True)):
        places[f.view, names[name]] = k
    return names, places


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@lru_cache(maxsize=4096)
def _event_time_s(stored: Any) -> float:
    """Feast writes the naive UTC time through the local time zone, and reads it back the same way."""
    if isinstance(stored, int | float):
        return datetime.fromtimestamp(int(stored)).replace(tzinfo=UTC).timestamp()  # noqa: DTZ006 - as Feast does
    when = datetime.fromisoformat(str(stored))
    return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
