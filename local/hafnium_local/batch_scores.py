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
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.wire import BATCH_ROWS_MAX, STORE_SILENT
from hafnium_local.replay import read_requests
from hafnium_local.score_client import post, session
from hafnium_local.table_rows import table_rows

COLUMNS: tuple[str, ...] = (
    "row", "request_id", "score", "confidence_lower", "confidence_upper", "decision", "model_name", "model_version", "degraded",
    "error",
)
ROWS_AGAIN_S: tuple[float, ...] = (0.5, 2.0)
"""Pauses before rows whose feature store did not answer are asked for again; what then still has no score is told as refused. A value
that the store lacks is told at once: it would be lacking again, and all of it would count as the model's errors."""
HELD_ROWS_MAX = 10 * BATCH_ROWS_MAX
"""Rows kept for one before them that waits for another turn: results come in order, and 10,000 take about 10 MB. With as many nothing
new is asked until the first is done."""


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
    yield from table_rows(file, contract)


def between(
    rows: Iterable[tuple[int, dict[str, Any]]], since: datetime | None, until: datetime | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows with since ≤ event_time < until. Raises InputError for a row whose time can't be read."""
    for number, row in rows:
        text = row.get("event_time")
        try:
            when = datetime.fromisoformat(str(text))
        except ValueError as e:
            raise InputError(f"row {number}: event_time {text!r} is not a time, so --since and --until can't be applied") from e
        when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
        if (since is None or when >= since) and (until is None or when < until):
            yield number, row


async def score_rows(
    url: str, rows: Iterable[tuple[int, dict[str, Any]]], *, batch_rows: int = BATCH_ROWS_MAX
) -> AsyncIterator[dict[str, Any]]:
    """Yields one result per (number, row), in order: the transformer's answer, or {"error": …}; each with the number as `row`.

    An async generator. A batch that stays without an answer for a minute raises InputError: the service is not there.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"url must begin with http:// or https://, got {url!r}")
    target = url.rstrip("/").removesuffix("/v1/score") + "/v1/score/batch"
    jitter = random.Random(0)  # noqa: S311 - spreads retries
    size = max(1, min(batch_rows, BATCH_ROWS_MAX))
    source = iter(rows)
    held: deque[_Held] = deque()
    async with session(4) as client:
        while True:
            batch = [r for r in held if r.result is None and r.due_s <= time.monotonic()][:size]
            if len(held) < HELD_ROWS_MAX:
                fresh = [_Held(number, row) for number, row in itertools.islice(source, size - len(batch))]
                held.extend(fresh)
                batch += fresh
            if batch:
                await _score_batch(client, target, batch, jitter)
            elif held:  # all that is left to do is to wait for the next turn
                await asyncio.sleep(max(0.0, min(r.due_s for r in held if r.result is None) - time.monotonic()))
            else:
                return
            while held and (result := held[0].result) is not None:
                yield {"row": held.popleft().number, **result}


@dataclass
class _Held:
    """A row on its way."""

    number: int
    request: dict[str, Any]
    result: dict[str, Any] | None = None
    asked: int = 0
    due_s: float = 0.0
    """Of the monotonic clock: its next turn."""


async def _score_batch(client: Any, target: str, batch: list[_Held], jitter: random.Random) -> None:
    """Gives each row its result, or its next turn."""
    answers = await _ask(client, target, [row.request for row in batch], jitter)
    for row, answer in zip(batch, answers, strict=True):
        if answer.get("title") == STORE_SILENT and row.asked < len(ROWS_AGAIN_S):
            row.due_s = time.monotonic() + ROWS_AGAIN_S[row.asked]
            row.asked += 1
        else:
            row.result = _result(answer, row.request)


async def _ask(client: Any, target: str, batch: list[dict[str, Any]], jitter: random.Random) -> list[dict[str, Any]]:
    """What the service says of each row. A row of a batch that was refused as a whole has `refusal`."""
    answer = await post(client, target, {"requests": batch}, {}, deadline_s=60.0, jitter=jitter, patient=True)
    if answer.status == 0:
        raise InputError(f"{target}: no answer within 60 s ({answer.message}); is the service ready?")
    if answer.status == 413 and len(batch) > 1:
        half = len(batch) // 2
        return await _ask(client, target, batch[:half], jitter) + await _ask(client, target, batch[half:], jitter)
    body = cast(dict[str, Any], answer.body) if isinstance(answer.body, dict) else {}
    results: Any = body.get("results")
    if 200 <= answer.status < 300 and isinstance(results, list) and len(cast(list[Any], results)) == len(batch):
        return cast(list[dict[str, Any]], results)
    if 200 <= answer.status < 300:
        raise InputError(f"{target}: the answer has no `results` of {len(batch)} rows; is this a Hafnium transformer?")
    return [{"refusal": f"{answer.status}: {_said(body)}"} for _ in batch]


def _result(result: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    if "score" in result:
        return {**result, "error": None}
    error = result.get("refusal") or f"{result.get('status', '')}: {_said(result)}".removeprefix(": ")
    return {"request_id": request.get("request_id"), "error": error}


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

    `since`, `until`: only rows of that time; `row` stays their number in `file`, from 0. A file is written beside its place and renamed
    when complete. `on_rows` hears how many rows are done. Raises InputError when the input, the output or the service is not usable; a
    row that the service refuses is in the output with its `error`.
    """
    rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(read_rows(file, contract))
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
    url: str, requests: Iterable[tuple[int, dict[str, Any]]], out: TextIO | io.TextIOBase, as_csv: bool, batch_rows: int,
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
