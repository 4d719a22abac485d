"""Single rows of many requests → few batches: rows that come while enough batches are on their way leave together.

Nobody waits for company: a row that finds a free place leaves in the same turn of the event loop. Each row keeps its own
deadline; a batch gets the longest of them, and a row whose time is over is answered without it.

Rows that are to be explained stand in a queue of their own: each asks for some sixty rows of the predictor, and whoever wants a score only
must not wait for them. Their batches are no larger, in rows for the predictor, than those of plain rows, and one is on its way at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hafnium_contract.serving.hot_protocol import HotRequest
from hafnium_contract.serving.json_log import Sampled
from hafnium_contract.trace_context import id_line
from hafnium_transformer.admission import QueueLimit
from hafnium_transformer.errors import ContractChangedError, DeadlineError, RefusedError, RowInvalidError, ScoringError
from hafnium_transformer.hop_spans import HopSpans
from hafnium_transformer.plan import Plan
from hafnium_transformer.predictor_client import Deadline
from hafnium_transformer.rows import Row, parse_row
from hafnium_transformer.scoring import Context, Result, Scorer, two_contracts

log = logging.getLogger("hafnium.transformer")
_SWEEP_S = 0.02
"""How late a row may learn that its time is over."""
FAILED = Sampled(log, lines_per_s=10.0)
"""One line for a batch that failed as a whole, with all its ids: the rows' own lines are too many to be let through."""


@dataclass(slots=True)
class Waiting:
    """A row on its way. `done` is called once, with its result."""

    plan: Plan
    item: Any
    row: Row
    context: Context
    request: HotRequest
    done: Callable[[Waiting, Result], None]
    shown_as: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """How an answer is written; None: as it is."""
    answered: bool = False

    def answer(self, result: Result) -> None:
        """Hands the result over, unless the row was answered before."""
        if self.answered:
            return
        self.answered = True
        try:
            self.done(self, result)
        except Exception:  # one row's answer that can't be written must not cost the others of its batch theirs
            log.exception("an answer could not be written", extra={"request_id": self.context.request_id})
            self.request.abort()


class Coalescer:
    """Used from the event loop only."""

    def __init__(self, scorer: Scorer, limit: QueueLimit, *, batches_max: int, rows_max: int, traced: bool = False) -> None:
        self._scorer = scorer
        self._limit = limit
        self._batches_max = batches_max
        self._rows_max = rows_max
        self._traced = traced
        self._waiting: deque[Waiting] = deque()
        """Plain rows."""
        self._to_explain: deque[Waiting] = deque()
        self._explaining: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._batches: dict[asyncio.Task[None], list[Waiting]] = {}
        self._scheduled = False
        self._sweeping = False

    def submit(self, waiting: Waiting, *, alone: bool = False) -> None:
        """Takes a row; it leaves in this turn of the event loop or when a batch comes back. `alone`: no other row can come in this turn."""
        (self._to_explain if waiting.row.explain else self._waiting).append(waiting)
        if alone:
            try:
                self._start()
            except Exception:  # the row is in the queue: whoever submitted it must not take it for refused
                log.exception("a batch did not leave")
                asyncio.get_running_loop().call_soon(self._start)
        elif not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._start)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _start(self) -> None:
        """Plain rows first; explained ones beside them, so that neither keeps the other from leaving."""
        self._scheduled = False
        while self._waiting and len(self._running) < self._batches_max:
            if (batch := _batch(self._waiting, self._rows_max)) is None:
                break
            self._running.add(self._leave(batch))
        if self._to_explain and self._explaining is None:
            rows_each = self._scorer.rows_asked(self._to_explain[0].plan)
            if (batch := _batch(self._to_explain, max(self._rows_max // rows_each, 1))) is not None:
                self._explaining = self._leave(batch)

    def _leave(self, batch: list[Waiting]) -> asyncio.Task[None]:
        self._limit.left(time.perf_counter() - batch[0].context.started, time.monotonic())
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._batches[task] = batch
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task is self._explaining:
            self._explaining = None
        batch = self._batches.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a batch of %d rows failed", len(batch), exc_info=error)
        for waiting in batch:  # those that nobody answered: a batch that failed by itself
            waiting.answer(ScoringError("the request could not be answered"))
        if self._waiting or self._to_explain:
            self._start()

    async def _run(self, batch: list[Waiting]) -> None:
        plan = batch[0].plan
        try:
            await self._score(plan, batch)
        except ContractChangedError as e:
            log.info("predictor refused contract %s: %s", plan.digest, e)
            try:
                await self._scorer.refreshed(plan, Deadline(max(w.context.deadline.at for w in batch)))
                await self._score_anew(self._scorer.plan, batch)
            except ContractChangedError as again:
                _all(batch, two_contracts(again))
            except ScoringError as again:
                _all(batch, again)
        except RefusedError as e:
            if len(batch) == 1:
                _all(batch, e)
            for waiting in batch if len(batch) > 1 else ():  # one row must not cost the others their answers
                if waiting.answered:
                    continue
                try:
                    await self._score(plan, [waiting])
                except ContractChangedError as changed:
                    waiting.answer(two_contracts(changed))
                except ScoringError as own:
                    waiting.answer(own)
        except ScoringError as e:
            _all(batch, e)

    async def _score(self, plan: Plan, batch: list[Waiting]) -> None:
        deadline = batch[0].context.deadline if len(batch) == 1 else Deadline(max(w.context.deadline.at for w in batch))
        spans = [w.context.span for w in batch if w.context.span is not None] if self._traced else None
        results = await self._scorer.score_rows(plan, batch, deadline, passed_on(batch), HopSpans(spans) if spans else None)
        for waiting, result in zip(batch, results, strict=True):
            waiting.answer(result)

    async def _score_anew(self, plan: Plan, batch: list[Waiting]) -> None:
        """Rows read again, under the contract that is in force now."""
        now_s = self._scorer.clock().timestamp()
        good: list[Waiting] = []
        for waiting in batch:
            if waiting.answered:
                continue
            try:
                row = parse_row(plan, waiting.item, request_id=waiting.context.request_id, now_s=now_s)
            except RowInvalidError as e:
                waiting.answer(e)
            else:
                waiting.plan, waiting.row = plan, row
                good.append(waiting)
        if good:
            await self._score(plan, good)

    def _sweep(self) -> None:
        """Answers rows whose time is over, and comes again while any is on its way."""
        now = time.monotonic()
        on_their_way = [w for group in (self._waiting, self._to_explain, *self._batches.values()) for w in group if not w.answered]
        self._sweeping = bool(on_their_way)
        if on_their_way:
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        for waiting in on_their_way:
            if waiting.context.deadline.at <= now:
                waiting.answer(DeadlineError("the time given for the answer is over"))

    async def drain(self) -> None:
        """Waits until every row is answered."""
        while self._waiting or self._to_explain or self._batches:
            await asyncio.gather(*self._batches, return_exceptions=True)
            await asyncio.sleep(0)


def _batch(queue: deque[Waiting], rows_max: int) -> list[Waiting] | None:
    """The first rows of a queue that are of one contract; None when nobody in it waits any more."""
    batch: list[Waiting] = []
    while queue and len(batch) < rows_max:
        if queue[0].answered:
            queue.popleft()
        elif batch and queue[0].plan is not batch[0].plan:
            break
        else:
            batch.append(queue.popleft())
    return batch or None


def _all(batch: list[Waiting], error: ScoringError) -> None:
    if len(batch) > 1 and error.status >= 500:
        FAILED.warning(
            time.monotonic(), f"a batch of {len(batch)} rows failed", kind=error.kind, status=error.status,
            request_ids=[w.context.request_id for w in batch],
        )
    for waiting in batch:
        waiting.answer(error)


def passed_on(batch: list[Waiting]) -> bytes:
    """Header lines of a batch: the ids of its rows, and the trace of the first row that has one.

    A batch that is recorded has a span of its own, and its line in the place of these.
    """
    ids = id_line([w.context.request_id for w in batch], len(batch))
    if len(batch) == 1:
        context = batch[0].context
        return ids if context.span is not None else ids + context.trace_lines
    if any(w.context.span is not None for w in batch):
        return ids
    return ids + next((w.context.trace_lines for w in batch if w.context.trace_lines), b"")
