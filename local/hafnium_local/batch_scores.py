"""Scores for a file: `hafnium score --url URL FILE`. Rows go to `/v1/score/batch`, a bad row costs only itself.

JSONL holds score requests as they are sent. CSV and Parquet are tables: with a contract its columns are told apart by name (join
keys, request fields, id and time of the event; other columns are left out); without one they are called `entity.NAME` and
`features.NAME`, besides `request_id` and `event_time`.
"""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from hafnium_contract.encoding import category_text
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_contract.wire import BATCH_ROWS_MAX
from hafnium_local.replay import read_requests
from hafnium_local.score_client import post, session

COLUMNS: tuple[str, ...] = (
    "row", "request_id", "score", "confidence_lower", "confidence_upper", "decision", "model_name", "model_version", "degraded",
    "error",
)
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FIXED = ("request_id", "event_time")


@dataclass(frozen=True)
class ScoreSummary:
    """Rows read, and how many got a score or an error of their own."""

    rows: int
    scored: int
    refused: int


def read_rows(file: Path, contract: ModelContract | None = None) -> Iterator[dict[str, Any]]:
    """Score requests of a .jsonl, .csv or .parquet file, read in blocks. Raises InputError that says what is wrong with it."""
    kind = file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from read_requests(file)
        return
    if kind not in (".csv", ".parquet"):
        raise InputError(f"{file}: expected a .jsonl, .csv or .parquet file")
    try:
        if kind == ".csv":
            with pacsv.open_csv(file) as reader:
                yield from _table_rows(reader.schema.names, iter(reader), contract, file)
        else:
            with pq.ParquetFile(file) as parquet:
                yield from _table_rows(parquet.schema_arrow.names, parquet.iter_batches(batch_size=8192), contract, file)
    except (OSError, pa.ArrowException) as e:
        raise InputError(f"{file}: can't be read: {e}") from e


def _table_rows(
    names: list[str], batches: Iterable[pa.RecordBatch], contract: ModelContract | None, file: Path
) -> Iterator[dict[str, Any]]:
    convert = _by_contract(names, contract, file) if contract is not None else _by_prefix(names, file)
    for batch in batches:
        for row in cast(list[dict[str, Any]], batch.to_pylist()):
            # JSON has no infinity, and training reads one as missing too
            yield convert({k: v for k, v in row.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))})


def _by_prefix(names: list[str], file: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    for name in names:
        if name not in _FIXED and not name.startswith(("entity.", "features.")):
            raise InputError(
                f"{file}: column {name!r}: without a contract, columns are request_id, event_time, entity.NAME and features.NAME; "
                "give --contract to have them told apart by their names"
            )

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {k: _value(v) for k, v in row.items() if k in _FIXED}
        for part in ("entity", "features"):
            out[part] = {k.removeprefix(f"{part}."): _value(v) for k, v in row.items() if k.startswith(f"{part}.")}
        return out

    return convert


def _by_contract(names: list[str], contract: ModelContract, file: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    fields = contract.request_fields
    keys = {e.join_key for e in contract.entities}
    if not set(names) & set(fields):
        raise InputError(f"{file}: none of its columns is a request field of {contract.name}: {', '.join(sorted(fields))}")
    time, id_column = contract.data.event_time, contract.data.request_id

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {
            "entity": {k: _key(row[k]) for k in keys if k in row},
            "features": {k: _typed(row[k], fields[k]) for k in fields if k in row},
        }
        if id_column is not None and id_column in row:
            out["request_id"] = str(row[id_column])
        if time.column in row:
            value = row[time.column]
            if time.unit is not None and isinstance(value, int | float):
                value = time.origin + timedelta(seconds=value * _UNIT_S[time.unit])
            out["event_time"] = _value(_moment(value))
        return out

    return convert


def _key(value: Any) -> Any:
    """A join key as training reads it: a column of whole numbers with gaps comes as floats, and 12.0 is the key 12."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else _value(value)


def _moment(value: Any) -> Any:
    """A date alone is its midnight UTC, as in training."""
    if isinstance(value, str) and len(value) == len("2026-01-31"):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            return value  # the service says what is wrong with it
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    return value


def _typed(value: Any, feature: Feature) -> Any:
    if feature.dtype == "bool" and value in (0, 1):
        return bool(value)
    if feature.dtype == "category":
        return category_text(feature, value)
    return _value(value)


def _value(value: Any) -> Any:
    """As JSON: times with their zone (UTC when they have none)."""
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).isoformat()
    return value.isoformat() if isinstance(value, date) else value


def between(rows: Iterable[dict[str, Any]], since: datetime | None, until: datetime | None) -> Iterator[dict[str, Any]]:
    """Rows with since ≤ event_time < until. Raises InputError for a row whose time can't be read."""
    for number, row in enumerate(rows):
        text = row.get("event_time")
        try:
            when = datetime.fromisoformat(str(text))
        except ValueError as e:
            raise InputError(f"row {number}: event_time {text!r} is not a time, so --since and --until can't be applied") from e
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        if (since is None or when >= since) and (until is None or when < until):
            yield row


async def score_rows(
    url: str, rows: Iterable[dict[str, Any]], *, batch_rows: int = BATCH_ROWS_MAX
) -> AsyncIterator[dict[str, Any]]:
    """Yields one result per row, in order: the transformer's answer, or {"error": …}; each with `row`, counted from 0.

    An async generator. A batch that stays without an answer for a minute raises InputError: the service is not there.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"url must begin with http:// or https://, got {url!r}")
    target = url.rstrip("/").removesuffix("/v1/score") + "/v1/score/batch"
    jitter = random.Random(0)  # noqa: S311 - spreads retries
    number = 0
    source = iter(rows)
    async with session(4) as client:
        while batch := list(itertools.islice(source, max(1, min(batch_rows, BATCH_ROWS_MAX)))):
            for result in await _score_batch(client, target, batch, jitter):
                yield {"row": number, **result}
                number += 1


async def _score_batch(client: Any, target: str, batch: list[dict[str, Any]], jitter: random.Random) -> list[dict[str, Any]]:
    answer = await post(client, target, {"requests": batch}, {}, deadline_s=60.0, jitter=jitter)
    if answer.status == 0:
        raise InputError(f"{target}: no answer within 60 s ({answer.message}); is the service ready?")
    if answer.status == 413 and len(batch) > 1:
        half = len(batch) // 2
        return await _score_batch(client, target, batch[:half], jitter) + await _score_batch(client, target, batch[half:], jitter)
    body = cast(dict[str, Any], answer.body) if isinstance(answer.body, dict) else {}
    results = body.get("results")
    if 200 <= answer.status < 300 and isinstance(results, list) and len(cast(list[Any], results)) == len(batch):
        return [_result(r, b) for r, b in zip(cast(list[dict[str, Any]], results), batch, strict=True)]
    if 200 <= answer.status < 300:
        raise InputError(f"{target}: the answer has no `results` of {len(batch)} rows; is this a Hafnium transformer?")
    return [{"request_id": b.get("request_id"), "error": f"{answer.status}: {_said(body)}"} for b in batch]


def _result(result: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if "score" in result:
        return {**result, "error": None}
    return {"request_id": request.get("request_id"), "error": f"{result.get('status', '')}: {_said(result)}".removeprefix(": ")}


def _said(body: dict[str, Any]) -> str:
    """The sentence of a problem document, with its fields."""
    fields: Any = body.get("errors")
    text = str(body.get("detail") or body.get("title") or body.get("error") or "no reason given")
    if not isinstance(fields, list) or not fields:
        return text
    listed = "; ".join(f"{f.get('path')}: {f.get('message')}" for f in cast(list[Any], fields) if isinstance(f, dict))
    return listed if listed and listed not in text else text


def score_file(
    url: str, file: Path, out: Path | TextIO, *, contract: ModelContract | None = None, batch_rows: int = BATCH_ROWS_MAX,
    on_rows: Callable[[int], None] = lambda _: None, since: datetime | None = None, until: datetime | None = None,
) -> ScoreSummary:
    """Scores every row of `file` and writes one row each to `out`: JSONL, or CSV when the file's name ends so.

    `since`, `until`: only rows of that time. A file is written beside its place and renamed when complete. `on_rows` hears how many
    rows are done. Raises InputError when the input, the output or the service is not usable; a row that the service refuses is in
    the output with its `error`.
    """
    rows = read_rows(file, contract)
    if since is not None or until is not None:
        rows = between(rows, since, until)
    if not isinstance(out, Path):
        return asyncio.run(_write(url, rows, out, False, batch_rows, on_rows))
    if out.suffix.lower() not in (".csv", ".jsonl", ".ndjson"):
        raise InputError(f"{out}: expected a .jsonl or .csv file for the scores")
    staging = ""
    try:
        fd, staging = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        with os.fdopen(fd, "w", encoding="utf-8", newline="") as f:
            summary = asyncio.run(_write(url, rows, f, out.suffix.lower() == ".csv", batch_rows, on_rows))
        Path(staging).chmod(0o644)
        Path(staging).replace(out)
    except OSError as e:
        raise InputError(f"{out}: can't be written: {e.strerror}") from e
    finally:
        if staging:
            Path(staging).unlink(missing_ok=True)
    return summary


async def _write(
    url: str, requests: Iterable[dict[str, Any]], out: TextIO | io.TextIOBase, as_csv: bool, batch_rows: int,
    on_rows: Callable[[int], None],
) -> ScoreSummary:
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n") if as_csv else None
    if table is not None:
        table.writeheader()
    rows = scored = 0
    async for result in score_rows(url, requests, batch_rows=batch_rows):
        rows += 1
        scored += result["error"] is None
        if table is not None:
            table.writerow({**result, "degraded": ";".join(result.get("degraded") or ())})
        else:
            out.write(json.dumps(result) + "\n")
        on_rows(rows)
    return ScoreSummary(rows, scored, rows - scored)
