"""Feast itself: its registry says what there is, and stores that are not read directly are read through its SDK.

The SDK costs 0.6 ms of Python for one row and 0.15 ms a row for 32 (measured), so a queue in front of one thread, off the event
loop, is both the bound and the speed-up. Three things that Feast leaves to its caller are done here: features are found by name
(their order changes with every process), age is judged by event timestamps (TTL is not enforced online), and a missing entity
is one whose values are null (Redis reports it as present).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hafnium_contract.errors import InputError
from hafnium_contract.feast_config import check_redis, read_feast_config, without_values
from hafnium_contract.lean_imports import without
from hafnium_transformer.errors import DeadlineError, OverloadedError, UnavailableError
from hafnium_transformer.online_store.records import KEY_VERSION, EntityValue, Found, OnlineStore
from hafnium_transformer.online_store.redis import RedisStore, parse_address
from hafnium_transformer.online_store.sqlite import SqliteStore
from hafnium_transformer.online_store.value_columns import FoundColumns, columns_of
from hafnium_transformer.plan import ENTITY_NUMBER, ENTITY_TEXT, Plan

log = logging.getLogger("hafnium.transformer")

class Reader(Protocol):
    """A store that is read synchronously, in threads."""

    def entity_types(self, plan: Plan) -> dict[str, str]:
        """Join key → form of its values. Raises InputError when a view or field of the plan is not in the store."""
        ...

    def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]]) -> list[Found]:
        """Values for each entity row, in order."""
        ...

    def refresh(self) -> None:
        """Takes over what changed in the store's definition."""
        ...


class FeastReader:
    """Reader over a Feast repository (SQLite, Redis, …) with the SDK."""

    def __init__(self, repo: Path) -> None:
        """Opens the store. Importing Feast takes seconds, so this is called in a thread. Raises InputError."""
        config_file = repo / "feature_store.yaml"
        if not config_file.is_file():
            raise InputError(f"{config_file}: missing; --feature_repo is a folder that `hafnium features` made")
        feature_store, repo_config, feast_error = _import_feast()
        written = read_feast_config(config_file)
        try:
            # Training's store, and what it needs to be imported, are not in the transformer's image
            config = repo_config(**{key: value for key, value in written.items() if key not in ("offline_store", "batch_engine")})
        except (OSError, ValueError, TypeError, AttributeError, feast_error) as e:
            raise InputError(f"{config_file}: not a Feast configuration: {without_values(e)}") from None  # its traceback shows passwords
        check_redis(written)
        config.repo_path = repo.resolve()
        config.registry.cache_ttl_seconds = 0  # never expires: it would be read again inside a request
        registry = str(config.registry.path)
        if config.registry.registry_type == "file" and "://" not in registry and not (repo / registry).is_file():
            # Feast would make an empty one and report success
            raise InputError(f"{repo / registry}: Feast's registry is missing; was the repository applied?")
        logging.getLogger("feast").setLevel(logging.WARNING)  # a line for each look at the registry
        self._repo = repo.resolve()
        self._config = config
        self._store = feature_store(repo_path=str(self._repo), config=config)
        self._refresh_lock = threading.Lock()
        try:
            self._store.refresh_registry()
        except Exception as e:  # Feast's registries raise whatever their storage raises
            raise InputError(f"{repo}: Feast's registry can't be read: {type(e).__name__}: {e}") from e

    def direct_store(self, *, rows_max: int) -> OnlineStore | None:
        """A store that reads what Feast wrote without its SDK; None for kinds and settings that only the SDK knows."""
        config, online = self._config, self._config.online_store
        if int(config.entity_key_serialization_version) != KEY_VERSION or config.registry.enable_online_feature_view_versioning:
            return None
        if online.type == "sqlite":
            return SqliteStore(self._repo / str(online.path), str(config.project))
        if online.type == "redis" and str(online.redis_type) in ("redis", "RedisType.redis"):
            return RedisStore(parse_address(str(online.connection_string)), str(config.project), rows_max=rows_max)
        return None

    def entity_types(self, plan: Plan) -> dict[str, str]:
        types: dict[str, str] = {}
        for view in plan.views:
            try:
                found = self._store.get_feature_view(view.name)
            except Exception as e:  # FeatureViewNotFoundException, or what the registry's storage raises
                raise InputError(f"view {view.name}: not in Feast's registry: {e}") from e
            fields = {f.name for f in found.features}
            for looked_up in view.features:
                name = looked_up.column.removeprefix(f"{view.name}__")
                if name not in fields:
                    raise InputError(f"view {view.name}: field {name!r} is not in Feast's registry, which has {sorted(fields)}")
            keys = {c.name: str(c.dtype) for c in found.entity_columns}
            if set(keys) != {view.join_key}:
                raise InputError(f"view {view.name}: Feast joins by {sorted(keys)}, the contract by {view.join_key!r}")
            if "Int32" in keys[view.join_key]:
                raise InputError(f"view {view.name}: join key {view.join_key!r} is {keys[view.join_key]}; use String or Int64")
            types[view.join_key] = ENTITY_NUMBER if "Int" in keys[view.join_key] else ENTITY_TEXT
        return types

    def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]]) -> list[Found]:
        rows = [{key: entity[key] for key in plan.join_keys} for entity in entities]
        answer = self._store.get_online_features(list(plan.references), rows, full_feature_names=True).proto
        found: list[Found] = [{} for _ in rows]
        for name, vector in zip(answer.metadata.feature_names.val, answer.results, strict=True):
            if "__" not in name:
                continue
            for target, value, when in zip(found, vector.values, vector.event_timestamps, strict=True):
                kind = value.WhichOneof("val")
                if kind is not None and when.seconds:
                    target[name] = (getattr(value, kind), when.seconds + when.nanos * 1e-9)
        return found

    def refresh(self) -> None:
        with self._refresh_lock:
            self._store.refresh_registry()


def _import_feast() -> tuple[Any, Any, type[Exception]]:
    """Feast's store, configuration and error, without PyTorch."""
    with without("torch"):
        from feast import FeatureStore
        from feast.errors import FeastError
        from feast.repo_config import RepoConfig
    return FeatureStore, RepoConfig, FeastError


@dataclass(frozen=True)
class _Waiting:
    plan: Plan
    entity: dict[str, EntityValue]
    future: asyncio.Future[Found]


class SdkStore:
    """OnlineStore over the SDK: a queue before its threads."""

    def __init__(self, reader: Reader, *, threads: int, rows_max: int, queue_rows_max: int) -> None:
        self._reader = reader
        self._threads = threads
        self._rows_max = rows_max
        self._queue_rows_max = queue_rows_max
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feast")
        self._waiting: deque[_Waiting] = deque()
        self._running = 0

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        """Values for each entity row, in order.

        Raises OverloadedError (queue full), DeadlineError (`timeout_s` is over), UnavailableError (the store failed).
        """
        if len(self._waiting) + len(entities) > self._queue_rows_max:
            raise OverloadedError(f"{len(self._waiting)} rows already wait for the feature store")
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(plan, entity, loop.create_future()) for entity in entities]
        self._waiting.extend(waiting)
        self._start()
        futures = [w.future for w in waiting]
        try:
            async with asyncio.timeout(timeout_s):
                return [await f for f in futures]
        except TimeoutError as e:
            raise DeadlineError(f"the feature store did not answer within {timeout_s * 1000:.0f} ms") from e
        finally:
            for f in futures:
                if not f.done():
                    f.cancel()
                elif not f.cancelled():
                    f.exception()  # seen: a failed batch has one exception for all its rows

    async def read_columns(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> FoundColumns:
        """The same in columns."""
        return columns_of(plan, await self.read(plan, entities, timeout_s))

    def _start(self) -> None:
        """Hands waiting rows to a free thread: all of one plan, up to the limit."""
        loop = asyncio.get_running_loop()
        while self._waiting and self._running < self._threads:
            batch: list[_Waiting] = []
            while self._waiting and len(batch) < self._rows_max:
                if self._waiting[0].future.done():
                    self._waiting.popleft()
                elif batch and self._waiting[0].plan is not batch[0].plan:
                    break
                else:
                    batch.append(self._waiting.popleft())
            if not batch:
                return
            self._running += 1
            work = loop.run_in_executor(self._pool, self._reader.read, batch[0].plan, [w.entity for w in batch])
            work.add_done_callback(lambda done, batch=batch: self._finished(done, batch))

    def _finished(self, done: asyncio.Future[list[Found]], batch: list[_Waiting]) -> None:
        self._running -= 1
        error = None if done.cancelled() else done.exception()
        if error is not None:
            log.warning("feature store failed: %s: %s", type(error).__name__, error)
        for i, w in enumerate(batch):
            if w.future.done():
                continue
            if error is not None or done.cancelled():
                w.future.set_exception(UnavailableError(f"the feature store failed: {type(error).__name__}"))
            else:
                w.future.set_result(done.result()[i])
        self._start()

    def close(self) -> None:
        """Lets go of the threads; one that hangs in the store is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)
