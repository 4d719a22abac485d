"""Feast's Redis store, read directly: one HMGET for all views of an entity, many in flight on one connection.

All views of one entity share one hash, so one command serves them; hiredis reads the answers. redis-py takes twice the CPU for
the same (docs/performance.md). A single server or a proxy that speaks for several is meant; with Redis Cluster or Sentinel
Feast's SDK is asked instead (feast.py). A broken connection is opened anew by the next read, and reads are tried once more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, cast

import hiredis
import mmh3
import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from hafnium_contract.errors import InputError
from hafnium_contract.feast_config import split_connection
from hafnium_transformer.errors import DeadlineError, OverloadedError, UnavailableError
from hafnium_transformer.expiry import Expiry
from hafnium_transformer.online_store.records import EntityValue, Found, key_coder, value_reader
from hafnium_transformer.online_store.value_columns import ColumnReader, FoundColumns, event_times
from hafnium_transformer.plan import Plan

log = logging.getLogger("hafnium.transformer")
_OPTIONS = ("db", "ssl", "username", "password")
_CONNECT_S = 1.0
_HANGS_S = 0.1
"""Answers are due in a millisecond. A connection that says nothing for this long is opened anew: what is behind it may be gone."""
_ATTEMPTS = 2
_READ_BYTES_MAX = 64 * 1024 * 1024
"""An answer that is larger comes from something else than Feast's Redis."""


@dataclass(frozen=True)
class RedisAddress:
    """Feast's connection string, `host:port,db=0,ssl=true,username=…,password=…`, read."""

    host: str
    port: int
    database: int = 0
    username: str = ""
    password: str = ""
    tls: bool = False


def parse_address(connection_string: str) -> RedisAddress:
    """Feast's connection string → RedisAddress. Raises InputError; the message shows no password."""
    host, port, options = split_connection(connection_string, _OPTIONS)
    try:
        database = int(options.get("db", "0"))
    except ValueError:
        raise InputError("online_store.connection_string: db: expected a number") from None  # it may be of a password with a comma
    return RedisAddress(host, port, database, _text(options.get("username", "")), _text(options.get("password", "")),
                        options.get("ssl", "false").lower() == "true")


def _text(value: str) -> str:
    """Feast reads each value as JSON if it can: `"secret"` and `secret` are the same."""
    try:
        return str(json.loads(value))
    except ValueError:
        return value


class _Asked:
    """Commands whose answers are due."""

    __slots__ = ("count", "future", "replies")

    def __init__(self, count: int, future: asyncio.Future[list[Any]]) -> None:
        self.count = count
        self.future = future
        self.replies: list[Any] = []


class _Connection(asyncio.Protocol):
    """One connection. Answers come in the order of the commands."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._asked: deque[_Asked] = deque()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._heard = 0.0
        """time.monotonic() of the last answer, or of the first command after a time in which none was due."""

    def silent_s(self) -> float:
        """Seconds for which answers have been due and none came, whoever waits for them."""
        return time.monotonic() - self._heard if self._asked else 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        error = ConnectionError(f"Redis closed the connection{f': {exc}' if exc else ''}")
        for asked in self._asked:
            if not asked.future.done():
                asked.future.set_exception(error)
        self._asked.clear()

    def data_received(self, data: bytes) -> None:
        if not self._asked:
            self.abort("Redis spoke without being asked")
            return
        self._heard = time.monotonic()
        self._reader.feed(data)
        try:
            while self._asked:
                reply = self._reader.gets()
                if reply is False:
                    if self._reader.len() > _READ_BYTES_MAX:
                        raise hiredis.ProtocolError("the answer does not end")
                    return
                asked = self._asked[0]
                asked.replies.append(reply)
                if len(asked.replies) == asked.count:
                    self._asked.popleft()
                    if not asked.future.done():
                        asked.future.set_result(asked.replies)
        except hiredis.ProtocolError as e:
            self.abort(f"no answer of a Redis: {e}")

    def ask(self, commands: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Sends `count` commands. The future fails with ConnectionError when the connection breaks."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            future.set_exception(ConnectionError("not connected"))
            return future
        if not self._asked:
            self._heard = time.monotonic()
        self._asked.append(_Asked(count, future))
        self._transport.write(commands)
        return future

    def abort(self, why: str) -> None:
        """Closes at once; who waits gets a ConnectionError."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        for asked in self._asked:
            if not asked.future.done():
                asked.future.set_exception(ConnectionError(why))
        self._asked.clear()


@dataclass(frozen=True)
class _Group:
    """Views of one entity: one command for each row."""

    join_key: str
    coder: Callable[[EntityValue], bytes]
    before: bytes
    after: bytes
    columns: tuple[tuple[str, int], ...]
    """(column, place of its view's event time among the answer's values)."""
    places: tuple[int, ...]
    """Of these columns in Plan.looked_up."""
    width: int
    """Values in an answer."""


class RedisStore:
    """OnlineStore over the Redis that Feast writes."""

    def __init__(self, address: RedisAddress, project: str, *, rows_max: int) -> None:
        self._address = address
        self._project = project.encode()
        self._rows_max = rows_max
        self._rows = 0
        """Rows that wait for an answer."""
        self._read_value = value_reader()
        self._expiry = Expiry()
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None
        self._groups: tuple[Plan, tuple[_Group, ...]] | None = None
        self._column_reader: tuple[Plan, ColumnReader] | None = None

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        """Values for each entity row, in order. Raises OverloadedError, DeadlineError, UnavailableError."""
        groups, replies = await self._replies(plan, entities, timeout_s)
        return self._found(groups, len(entities), replies)

    async def read_columns(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> FoundColumns:
        """The same in columns."""
        groups, replies = await self._replies(plan, entities, timeout_s)
        return self._columns(plan, groups, len(entities), replies)

    async def _replies(
        self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float,
    ) -> tuple[Sequence[_Group], list[Any]]:
        """All groups' answers: those of the first group for each row, then the second's."""
        if self._rows + len(entities) > self._rows_max:
            raise OverloadedError(f"{self._rows} rows already wait for the feature store")
        groups = self._grouped(plan)
        commands = b"".join([
            b"%s%d\r\n%s%s" % (g.before, len(key), key, g.after)
            for g in groups for key in [g.coder(entity[g.join_key]) + self._project for entity in entities]
        ])
        self._rows += len(entities)
        until = time.monotonic() + timeout_s
        try:
            replies = await self._ask(commands, len(groups) * len(entities), until)
        finally:
            self._rows -= len(entities)
        return groups, replies if set(map(type, replies)) == {list} else _only_values(groups, len(entities), replies)

    async def _ask(self, commands: bytes, count: int, until: float) -> list[Any]:
        connection: _Connection | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                connection = self._connection
                if connection is None or not connection.usable:
                    connection = None
                    connection = await self._connected(max(until - time.monotonic(), 0.0))
                return await self._answer_to(connection, commands, count, until)
            except TimeoutError as e:
                # An answer that comes after all is read for nobody. What says that Redis hangs is how long it has said nothing to anybody,
                # not how long this caller waited: nobody may have the time, and a node that died never closes its connections
                if connection is not None and connection.silent_s() >= _HANGS_S:
                    connection.abort("Redis did not answer in time")
                raise DeadlineError("the feature store did not answer in time") from e
            except (OSError, hiredis.HiredisError) as e:
                if attempt == _ATTEMPTS:
                    raise UnavailableError(f"the feature store can't be reached: {type(e).__name__}: {e}") from e
        raise UnavailableError("the feature store can't be reached")

    async def _connected(self, timeout_s: float) -> _Connection:
        connecting = self._reconnect()
        async with asyncio.timeout(timeout_s):  # wait_for would swallow a cancellation that comes together with the connection
            await asyncio.shield(connecting)
        return connecting.result()

    async def _answer_to(self, connection: _Connection, commands: bytes, count: int, until: float) -> list[Any]:
        answer = connection.ask(commands, count)
        self._expiry.add(answer, until)
        try:
            return await answer
        finally:
            self._expiry.remove(answer)

    def _reconnect(self) -> asyncio.Task[_Connection]:
        """One attempt to connect, shared by all who wait for it."""
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(_seen)
        return self._connecting

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(_CONNECT_S):
                connection = await self._open()
        except TimeoutError as e:  # ours, not the caller's, who may have time for another attempt
            raise ConnectionError(f"no answer within {_CONNECT_S:g} s of connecting") from e
        self._connection = connection
        return connection

    async def _open(self) -> _Connection:
        a = self._address
        tls = ssl.create_default_context() if a.tls else None
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, a.host, a.port, ssl=tls)
        try:
            await self._greet(connection)
        except BaseException:  # also when its time is over: nobody else would close it
            connection.abort("Redis did not let us in")
            raise
        return connection

    async def _greet(self, connection: _Connection) -> None:
        a = self._address
        greeting = _command(b"AUTH", *((a.username.encode(),) if a.username else ()), a.password.encode()) if a.password else b""
        greeting += _command(b"SELECT", str(a.database).encode())
        for reply in await connection.ask(greeting, 2 if a.password else 1):
            if isinstance(reply, Exception):
                raise ConnectionError(f"Redis refused: {reply}")

    def _found(self, groups: Sequence[_Group], rows: int, replies: list[Any]) -> list[Found]:
        found: list[Found] = [{} for _ in range(rows)]
        read_value, k = self._read_value, 0
        for group in groups:
            for target in found:
                reply = replies[k]
                k += 1
                values = cast(list[bytes | None], reply)
                times: dict[int, float] = {}
                for (column, at), data in zip(group.columns, values, strict=False):
                    if not data:
                        continue
                    value = read_value(data)
                    if value is None:
                        continue
                    when = times.get(at)
                    if when is None:
                        when = times[at] = _event_time_s(values[at])
                    if when:
                        target[column] = (value, when)
        return found

    def _columns(self, plan: Plan, groups: Sequence[_Group], rows: int, replies: list[Any]) -> FoundColumns:
        cells: list[list[bytes | None]] = [[]] * len(plan.looked_up)
        times = np.empty((len(plan.looked_up), rows))
        for n, group in enumerate(groups):
            # Values of all rows in a line, so that each column is every so-many-th of them
            flat: list[bytes | None] = list(chain.from_iterable(replies[n * rows : (n + 1) * rows]))
            width = group.width
            seen = {at: event_times(flat[at::width], _event_time_s) for at in {at for _, at in group.columns}}
            for k, (place, (_, at)) in enumerate(zip(group.places, group.columns, strict=True)):
                cells[place], times[place] = flat[k::width], seen[at]
        times[times == 0.0] = np.nan

        def row(i: int) -> Found:
            return self._found(groups, 1, replies[i::rows])[0]

        return FoundColumns(self._reader(plan).table(cells, rows), times, row)

    def _reader(self, plan: Plan) -> ColumnReader:
        if self._column_reader is None or self._column_reader[0] is not plan:
            self._column_reader = (plan, ColumnReader(plan))
        return self._column_reader[1]

    def _grouped(self, plan: Plan) -> tuple[_Group, ...]:
        if self._groups is None or self._groups[0] is not plan:
            self._groups = (plan, tuple(self._group(plan, key) for key in plan.join_keys))
        return self._groups[1]

    def _group(self, plan: Plan, join_key: str) -> _Group:
        views = [v for v in plan.views if v.join_key == join_key]
        fields = [(v.name, f.column) for v in views for f in v.features]
        hashed = [_field(f"{view}:{column.removeprefix(f'{view}__')}") for view, column in fields]
        times = [f"_ts:{v.name}".encode() for v in views]
        places = {v.name: len(fields) + i for i, v in enumerate(views)}
        arguments = hashed + times
        return _Group(
            join_key, key_coder(join_key, plan.entity_types.get(join_key)), b"*%d\r\n$5\r\nHMGET\r\n$" % (2 + len(arguments)),
            b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in arguments),
            tuple((column, places[view]) for view, column in fields),
            tuple(k for k, f in enumerate(plan.looked_up) if plan.views[f.view].join_key == join_key), len(arguments),
        )

    def close(self) -> None:
        """Closes the connection."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abort("the transformer stops")


def _seen(task: asyncio.Task[_Connection]) -> None:
    if not task.cancelled():
        task.exception()  # who waited has it; without anybody waiting asyncio would complain


def _only_values(groups: Sequence[_Group], rows: int, replies: Sequence[Any]) -> list[Any]:
    """Answers, with nothing for a key that holds something else than Feast's hash: one such entity is not a store that failed for all.

    Raises UnavailableError for whatever else Redis said in the place of values.
    """
    found: list[Any] = []
    for k, reply in enumerate(replies):
        if type(reply) is list:
            found.append(reply)
        elif str(reply).startswith("WRONGTYPE"):
            found.append([None] * groups[k // rows].width)
        else:
            raise UnavailableError(f"the feature store failed: {str(reply)[:200]}")
    return found


def _field(name: str) -> bytes:
    """Feast's field of `view:feature`: murmur3, 32 bits, little endian."""
    return mmh3.hash(name, signed=False).to_bytes(4, "little")


def _command(*arguments: bytes) -> bytes:
    return b"*%d\r\n" % len(arguments) + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in arguments)


@lru_cache(maxsize=4096)  # the same entities come again and again
def _event_time_s(data: bytes | None) -> float:
    """A protobuf Timestamp → seconds since 1970; 0: there is none."""
    if not data:
        return 0.0
    try:
        when = Timestamp.FromString(data)
    except DecodeError:
        return 0.0
    return when.seconds + when.nanos * 1e-9
