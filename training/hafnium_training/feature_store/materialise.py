"""Fills the online store as it stood at a chosen moment.

Feast's own materialise prints, shows bars of its own and can't go back in time; what it does is small: the newest row of each
entity within a window, written through the provider. Here the same, in batches, with the window limited by the maximum age
(an older value counts as missing, so it need not be there) and with a step back in time that leaves nothing from the future.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from hafnium_contract.errors import InputError
from hafnium_contract.feast_config import check_redis, read_feast_config
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.progress import Progress, Silent
from hafnium_training.feature_store.definitions import CONFIG, EVENT_TIMESTAMP, ONLINE, SOURCES, ViewSpec, view_specs
from hafnium_training.feature_store.repository import MATERIALISED, FeatureRepo, open_repo, open_store

BATCH_ENTITIES = 2_000
"""One transaction of the online store: short enough that a server's reads, which wait for it, take no notice."""


@dataclass(frozen=True)
class ViewMaterialised:
    view: str
    entities: int
    oldest: datetime | None
    newest: datetime | None
    """Times of the oldest and the newest value written; None when there was none."""


@dataclass(frozen=True)
class MaterialiseReport:
    until: datetime
    views: tuple[ViewMaterialised, ...]
    emptied: bool
    """The store had been filled up to a later moment, so it was emptied first."""
    seconds: float


def materialise(
    contract: ModelContract, repo: FeatureRepo | Path, *, until: datetime, since: datetime | None = None,
    progress: Progress | None = None,
) -> MaterialiseReport:
    """Writes, per entity, the newest value of time within (`since`, or `until` less the maximum age) to `until`, both included.

    With `since`, only newer rows are looked at, which is enough to go on from an earlier `until`. Raises InputError for
    times without an offset, a `since` after `until`, and for a step back in time on Redis.
    """
    listener = progress or Silent()
    began = time.perf_counter()
    if until.tzinfo is None or (since is not None and since.tzinfo is None):
        raise InputError("materialise: give `until` and `since` with an offset, for example 2026-01-31T00:00:00Z")
    if since is not None and since > until:
        raise InputError(f"materialise: since {since.isoformat()} is after until {until.isoformat()}")
    specs = view_specs(contract)
    if not specs:
        listener.event(f"contract {contract.name} has no views: nothing to materialise")
        return MaterialiseReport(until, (), False, time.perf_counter() - began)
    found = open_repo(contract, repo)
    check_redis(read_feast_config(found.path / CONFIG))
    emptied = _go_back(found, until)
    if emptied and since is not None:
        since = None  # nothing is left to go on from
    store = open_store(found.path)
    chosen = {s.view.name: _newest(found.path, s, until, since) for s in specs}
    listener.stage("materialise", sum(len(rows) for rows in chosen.values()))
    done: list[ViewMaterialised] = []
    for spec in specs:
        rows = chosen[spec.view.name]
        view = store.get_feature_view(spec.view.name)
        for begin in range(0, len(rows), BATCH_ENTITIES):
            batch = rows.iloc[begin:begin + BATCH_ENTITIES]
            # The provider and not write_to_online_store: that one passes over a batch in which every value is missing.
            store.provider.ingest_df(view, batch.reset_index(drop=True))
            listener.advance(len(batch))
        times = rows[EVENT_TIMESTAMP]
        done.append(ViewMaterialised(
            spec.view.name, len(rows),
            None if rows.empty else times.min().to_pydatetime(), None if rows.empty else times.max().to_pydatetime(),
        ))
    _remember(found.path, until)
    return MaterialiseReport(until, tuple(done), emptied, time.perf_counter() - began)


def _newest(repo: Path, spec: ViewSpec, until: datetime, since: datetime | None) -> pd.DataFrame:
    """The newest row of each entity within the window."""
    oldest = max(until - spec.ttl, since) if since is not None else until - spec.ttl
    file = repo / SOURCES / f"{spec.view.name}.parquet"
    # pushed down, so that a year of rows is not read for three days of them
    table = pq.read_table(file, filters=[(EVENT_TIMESTAMP, ">=", oldest), (EVENT_TIMESTAMP, "<=", until)])
    frame = table.to_pandas(ignore_metadata=True).sort_values(EVENT_TIMESTAMP, kind="stable")
    return frame.drop_duplicates(spec.join_key, keep="last")[[spec.join_key, EVENT_TIMESTAMP, *spec.columns]]


def _go_back(repo: FeatureRepo, until: datetime) -> bool:
    """Empties the online store when it holds values from after `until`."""
    file = repo.path / MATERIALISED
    if not file.is_file():
        return False
    known: Any = json.loads(file.read_text(encoding="utf-8"))
    before = datetime.fromisoformat(known["until"])
    if until >= before:
        return False
    if repo.online != "sqlite":
        raise InputError(
            f"{repo.path}: the online store was filled up to {before.isoformat()}; {repo.online} keeps newer values, so it can't "
            f"go back to {until.isoformat()}: use another database for that"
        )
    # Rows are deleted and not the file: a server that has it open goes on with the same store.
    with closing(sqlite3.connect(repo.path / ONLINE)) as db, db:
        names = [str(row[0]) for row in db.execute("select name from sqlite_master where type = 'table'")]
        for name in names:
            if name.startswith(repo.project):
                db.execute(f'delete from "{name}"')  # noqa: S608 - a name that the database itself gave
    return True


def _remember(repo: Path, until: datetime) -> None:
    staging = repo / f".{MATERIALISED}.tmp"
    staging.write_text(json.dumps({"until": until.astimezone(UTC).isoformat()}) + "\n", encoding="utf-8")
    staging.replace(repo / MATERIALISED)
