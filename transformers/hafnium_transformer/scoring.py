"""The main path: rows → lookup → matrix → predictor → answers, for one row, for a thousand, and for rows of many requests at once.

Everything is done for all rows together, so that they share one lookup and one prediction. A row that is bad on its own
(fields, or a value the contract demands that the store doesn't have) becomes that row's error; what concerns all (predictor
gone, time over) is raised.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import assemble, matrix_of
from hafnium_contract.errors import InputError, Problem
from hafnium_contract.trace_context import id_line
from hafnium_contract.wire import BATCH_ROWS_MAX
from hafnium_transformer.breaker import Breaker
from hafnium_transformer.errors import (
    ContractChangedError,
    DeadlineError,
    LookedUpError,
    OverloadedError,
    RowInvalidError,
    ScoringError,
    UnavailableError,
)
from hafnium_transformer.explanation import ROWS_MAX, Explainer, contributions
from hafnium_transformer.hop_spans import HopSpans
from hafnium_transformer.log_writer import InferenceLog, LogBatch, LogRow
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.feast import Reader
from hafnium_transformer.online_store.records import EntityValue, Found, OnlineStore
from hafnium_transformer.plan import ENTITY_TEXT, Plan, make_plan
from hafnium_transformer.predictor_client import Deadline, Prediction, PredictorClient, Served
from hafnium_transformer.row_encoding import Encoded, check_derived, encode_row
from hafnium_transformer.rows import Row, parse_row
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan

log = logging.getLogger("hafnium.transformer")
Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Result = dict[str, Any] | ScoringError
_YIELD_ROWS = 64
"""Rows that are parsed before other requests get their turn of the event loop: about 1 ms."""
_SHARE_DECIMALS = 7
"""What float32 scores hold."""
_ONE_BY_ONE_MAX = 16
"""Rows up to which numpy's cost per column is more than Python's per value."""
_WARM_READ_S = 30.0
_PING_S = 1.0
_FAIR_S = 0.1
"""A store that did not answer within less than this has not failed: callers in a hurry must not close it for the others."""
_COMPLAINT_PAUSE_S = 5.0
"""A store that stays away is reported this often, not at every row."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a request brings beside its rows."""

    request_id: str
    arm: str
    deadline: Deadline
    started: float
    """time.perf_counter() at arrival."""
    trace_lines: bytes
    """Header lines that hand the caller's trace on to the predictor; empty when there is none."""
    span: LiveSpan | None = None
    """Of a request that is recorded: then its own children are what the predictor hears of."""


class Asked(NamedTuple):
    """A row and the request it came with."""

    row: Row
    context: Context


class Scorer:
    """Holds the contract that is in force, and scores with it."""

    def __init__(
        self, settings: Settings, client: PredictorClient, metrics: TransformerMetrics, inference_log: InferenceLog | None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings = settings
        self._client = client
        self._metrics = metrics
        self._log = inference_log
        self.clock = clock
        self._reader: Reader | None = None
        self._store: OnlineStore | None = None
        self._store_breaker = Breaker(
            settings.breaker_failures_max, settings.breaker_pause_first_s, settings.breaker_pause_max_s
        )
        self._fair_s = min(_FAIR_S, settings.lookup_timeout_ms / 1000.0)
        self._complained = -_COMPLAINT_PAUSE_S
        self._plan: Plan | None = None
        self._explainers: dict[int, Explainer | None] = {}
        self._refreshing = asyncio.Lock()
        self._refreshes: set[asyncio.Task[None]] = set()
        self.served: Served | None = None
        self.reason = "the contract was not fetched yet"

    # --- what is in force ------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The contract in force. Raises UnavailableError with the reason when there is none yet."""
        if self._plan is None:
            raise UnavailableError(self.reason)
        return self._plan

    @property
    def active(self) -> bool:
        return self._plan is not None

    def use_store(self, reader: Reader, store: OnlineStore) -> None:
        """From now on views are read from this store; `reader` knows what there is in it."""
        self._reader, self._store = reader, store

    async def refresh(self, replaced: Plan | None) -> None:
        """Fetches the contract and puts it in force, unless another request already replaced `replaced`.

        Raises UnavailableError that says why there is no usable contract.
        """
        async with self._refreshing:
            if self._plan is not replaced:
                return
            served = await self._client.fetch_contract(min(self._settings.deadline_ms / 1000.0, 5.0))
            plan = make_plan(served.contract)
            if plan.views:
                plan = await self._with_store(plan)
            self._plan, self.served, self.reason = plan, served, ""
            log.info("contract %s of %s version %s is in force", plan.digest, plan.contract.name, served.model_version)

    async def _with_store(self, plan: Plan) -> Plan:
        if self._store is None or self._reader is None:
            names = ", ".join(v.name for v in plan.views)
            state = "is not open yet" if self._settings.feature_repo else "is not given (--feature_repo)"
            raise UnavailableError(f"the contract reads {names}, but the feature store {state}")
        try:
            types = await asyncio.to_thread(self._reader.entity_types, plan)
        except InputError as e:
            raise UnavailableError(f"feature store: {e}") from e
        plan = replace(plan, entity_types=types)
        await self._store.read(plan, [_nobody(plan)], _WARM_READ_S)  # the first read opens connections
        return plan

    async def refreshed(self, replaced: Plan, deadline: Deadline) -> None:
        """`refresh`, waited for until the deadline only; it goes on for those who come later. Raises DeadlineError."""
        task = asyncio.get_running_loop().create_task(self.refresh(replaced))
        self._refreshes.add(task)
        task.add_done_callback(self._refresh_ended)
        try:
            async with asyncio.timeout(deadline.left_s()):
                await asyncio.shield(task)
        except TimeoutError as e:
            raise DeadlineError("the predictor's new contract was not there in time") from e

    def _refresh_ended(self, task: asyncio.Task[None]) -> None:
        self._refreshes.discard(task)
        if not task.cancelled():
            task.exception()  # who waited has it

    async def refresh_registry(self) -> None:
        """Takes over what changed in the feature store's registry."""
        if self._reader is not None:
            await asyncio.to_thread(self._reader.refresh)

    async def not_ready(self) -> str:
        """'' when a request could be answered now, else what is missing: contract, predictor or feature store."""
        if self._plan is None:
            return self.reason
        reason = await self._client.ready(_PING_S)
        if not reason and self._plan.views and self._store is not None:
            try:
                await self._store.read(self._plan, [_nobody(self._plan)], _PING_S)
            except ScoringError as e:
                reason = e.detail
        return reason

    def close(self) -> None:
        """Lets go of the store."""
        if self._store is not None:
            self._store.close()

    # --- scoring ---------------------------------------------------------------------------------------------------------------

    async def score(self, items: Sequence[Any], context: Context, paths: Sequence[str] = ("",)) -> list[Result]:
        """JSON rows of one request → for each its answer or its error. `paths[i]` goes before the paths of row i's problems.

        Raises ScoringError when no row can be answered. A contract that changed behind the predictor's address is
        fetched and the rows are read again under it, once.
        """
        plan = self.plan
        try:
            return await self._score(plan, items, context, paths)
        except ContractChangedError as e:
            log.info("predictor refused contract %s: %s", plan.digest, e)
            await self.refreshed(plan, context.deadline)
            return await self._score(self.plan, items, context, paths)

    async def _score(self, plan: Plan, items: Sequence[Any], context: Context, paths: Sequence[str]) -> list[Result]:
        results: list[Result | None] = [None] * len(items)
        asked: list[Asked] = []
        places: list[int] = []
        now = self.clock().timestamp()
        explained = 0
        for i, item in enumerate(items):
            if i % _YIELD_ROWS == _YIELD_ROWS - 1:
                await asyncio.sleep(0)
            own_id = context.request_id if len(items) == 1 else f"{context.request_id}-{i}"
            try:
                row = parse_row(plan, item, request_id=own_id, now_s=now, path=paths[i])
                explained += row.explain
                if row.explain and explained > self._settings.explain_rows_max:
                    message = f"more than {self._settings.explain_rows_max} explained rows in one batch"
                    raise RowInvalidError([Problem(f"{paths[i]}.explain".lstrip("."), message)])
                asked.append(Asked(row, context))
                places.append(i)
            except RowInvalidError as e:
                results[i] = e
        if asked:
            spans = None if context.span is None else HopSpans([context.span])
            lines = id_line([context.request_id], 1) + context.trace_lines
            for i, result in zip(places, await self.score_rows(plan, asked, context.deadline, lines, spans), strict=True):
                results[i] = result
        return [r if r is not None else UnavailableError("the row was not scored") for r in results]

    async def score_rows(
        self, plan: Plan, asked: Sequence[Asked], deadline: Deadline, passed_on: bytes, spans: HopSpans | None = None,
    ) -> list[Result]:
        """Valid rows, perhaps of several requests → for each its answer or its error. `deadline` is for all of them.

        `passed_on`: header lines for the predictor: ids, and the trace when there are no `spans` whose trace it is.
        Raises ScoringError when no row can be answered; ContractChangedError when the predictor has another contract.
        """
        results: list[Result | None] = [None] * len(asked)
        encoded: list[Encoded] = []
        places: list[int] = []
        rows = [a.row for a in asked]
        if spans is None or not plan.views:
            looked_up = await self._look_up(plan, rows, deadline)
        else:
            with spans.lookup(plan, len(rows)) as lookup:
                looked_up = await self._look_up(plan, rows, deadline)
                lookup.found(looked_up)
        for i, (row, found) in enumerate(zip(rows, looked_up, strict=True)):
            try:
                encoded.append(encode_row(plan, row, found))
                places.append(i)
            except LookedUpError as e:
                results[i] = e
                for feature in e.features:
                    self._metrics.missing(feature)
        if encoded:
            await self._predict(plan, encoded, places, asked, deadline, passed_on, spans, results)
        return [r if r is not None else UnavailableError("the row was not scored") for r in results]

    async def _look_up(self, plan: Plan, rows: Sequence[Row], deadline: Deadline) -> Sequence[Found | None]:
        """What the store has for each row; None when it could not be asked (the contract's policies then decide)."""
        if not plan.views:
            return [{}] * len(rows)
        start = time.perf_counter()
        timeout_s = min(self._settings.lookup_timeout_ms / 1000.0, deadline.left_s())
        if self._store is None or not self._store_breaker.may_ask(time.monotonic()):
            return [None] * len(rows)
        try:
            found = await self._store.read(plan, [row.entity for row in rows], timeout_s)
        except (OverloadedError, DeadlineError, UnavailableError) as e:
            if isinstance(e, UnavailableError) or (isinstance(e, DeadlineError) and timeout_s >= self._fair_s):
                self._store_breaker.failed(time.monotonic())
            if time.monotonic() - self._complained >= _COMPLAINT_PAUSE_S:
                self._complained = time.monotonic()
                log.warning("%d rows without looked-up features: %s", len(rows), e)
            return [None] * len(rows)
        else:
            self._store_breaker.succeeded()
            self._count_ages(plan, rows[0], found[0])
            return found
        finally:
            self._metrics.looked_up(plan.contract.name, time.perf_counter() - start)

    def _count_ages(self, plan: Plan, row: Row, found: Found) -> None:
        """Age of the values just read, one row of a batch: what is stale is stale for all."""
        for view in plan.views:
            item = found.get(view.features[0].column)
            if item is not None:
                self._metrics.staleness(view.name, max(row.event_time_s - item[1], 0.0))

    async def _predict(
        self, plan: Plan, encoded: Sequence[Encoded], places: Sequence[int], asked: Sequence[Asked], deadline: Deadline,
        passed_on: bytes, spans: HopSpans | None, results: list[Result | None],
    ) -> None:
        matrix = assembled(plan, encoded)
        kept: list[tuple[int, Encoded]] = []
        lines: list[int] = []
        explainer = self._explainer(matrix.shape[1]) if any(e.row.explain for e in encoded) else None
        for k, e in enumerate(encoded):
            try:
                if e.row.explain and explainer is None:
                    raise RowInvalidError([Problem("explain", f"a model of more than {ROWS_MAX} inputs can't be explained")])
                kept.append((places[k], check_derived(plan, e, matrix[k]) if plan.derived_inputs else e))
                lines.append(k)
            except ScoringError as error:
                results[places[k]] = error
        if not kept:
            return
        if len(kept) < len(encoded):
            matrix = matrix[lines]
        if explainer is None:
            prediction = await self._ask(plan, matrix, deadline, passed_on, spans)
            self._answer(plan, kept, asked, matrix, prediction, None, results)
            return
        # A row and what explains it go together, since another model may answer the next prediction
        predicted: list[tuple[slice, Prediction]] = []
        for part in parts_of([1 + explainer.rows * e.row.explain for _, e in kept], BATCH_ROWS_MAX):
            sent = [matrix[part], *(explainer.asked(matrix[k]) for k in range(part.start, part.stop) if kept[k][1].row.explain)]
            predicted.append((part, await self._ask(plan, np.concatenate(sent), deadline, passed_on, spans)))
        for part, prediction in predicted:
            self._answer(plan, kept[part], asked, matrix[part], prediction, explainer, results)

    async def _ask(self, plan: Plan, sent: Matrix, deadline: Deadline, passed_on: bytes, spans: HopSpans | None) -> Prediction:
        if spans is None:
            return await self._client.predict(sent, plan.digest, deadline, passed_on)
        with spans.predict(plan, len(sent)) as hop:
            prediction = await self._client.predict(sent, plan.digest, deadline, passed_on + hop.lines)
            hop.answered(prediction)
        return prediction

    def _explainer(self, inputs: int) -> Explainer | None:
        if inputs not in self._explainers:
            self._explainers[inputs] = Explainer.of(inputs, self._settings.explain_method, self._settings.explain_orders)
        return self._explainers[inputs]

    def _answer(
        self, plan: Plan, rows: Sequence[tuple[int, Encoded]], asked: Sequence[Asked], matrix: Matrix, prediction: Prediction,
        explainer: Explainer | None, results: list[Result | None],
    ) -> None:
        rule, name = plan.contract.decision, plan.contract.name
        version, digits = prediction.model_version, self._settings.score_decimals
        series = self._metrics.model(name, version)
        scores: list[float] = prediction.score[: len(rows)].tolist()
        intervals: list[list[float]] = prediction.interval[: len(rows)].tolist()
        now, ended = self.clock(), time.perf_counter()
        explained_from = len(rows)
        logged: list[LogRow] | None = [] if self._log is not None else None
        decided = {rule.above: 0, rule.below: 0}
        above, below, threshold = rule.above, rule.below, rule.threshold
        for k, (place, e) in enumerate(rows):
            row, score = e.row, scores[k]
            lower, upper = intervals[k]
            decision = above if score >= threshold else below
            decided[decision] += 1
            shown = (round(score, digits), round(lower, digits), round(upper, digits)) if digits else (score, lower, upper)
            result: dict[str, Any] = {
                "request_id": row.request_id, "score": shown[0], "confidence_lower": shown[1], "confidence_upper": shown[2],
                "decision": decision, "model_name": name, "model_version": version, "degraded": list(e.degraded),
            }
            if row.explain and explainer is not None:
                shares, base = explainer.shares(score, prediction.score[explained_from : explained_from + explainer.rows])
                explained_from += explainer.rows
                result["explanation"] = contributions(
                    plan.contract, matrix[k], shares, self._settings.explain_top_k, digits or _SHARE_DECIMALS,
                )
                if base is not None:
                    result["explanation_base"] = round(base, digits) if digits else base
            results[place] = result
            for feature in e.missing:
                self._metrics.missing(feature)
            if logged is not None:
                context = asked[place].context
                logged.append(LogRow(
                    row.request_id, context.arm, score, lower, upper, decision, e.degraded, (ended - context.started) * 1000.0,
                    row.entity,
                ))
        series.predicted(scores, decided)
        if self._log is not None and logged is not None:
            self._log.append(LogBatch(plan, now, version, prediction.model_digest, logged, matrix))


def parts_of(sizes: Sequence[int], rows_max: int) -> list[slice]:
    """Neighbours whose sizes add up to at most `rows_max`; one that is larger stands alone."""
    parts: list[slice] = []
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > rows_max:
            parts.append(slice(start, i))
            start, total = i, 0
        total += size
    parts.append(slice(start, len(sizes)))
    return parts


def assembled(plan: Plan, encoded: Sequence[Encoded]) -> Matrix:
    """Encoded rows → float32 [rows, n]: few of them one by one, many column by column, to the same bits."""
    if len(encoded) <= _ONE_BY_ONE_MAX:
        return matrix_of([plan.assemble_row(e.values, e.row.event_time_s) for e in encoded])
    columns: dict[str, Floats] = {name: np.array([e.values[name] for e in encoded]) for name in encoded[0].values}
    return assemble(plan.contract, columns, np.array([e.row.event_time_s for e in encoded]))


def _nobody(plan: Plan) -> dict[str, EntityValue]:
    """An entity that nobody has, to ask the store whether it answers."""
    return {key: "-" if plan.entity_types.get(key, ENTITY_TEXT) == ENTITY_TEXT else 0 for key in plan.join_keys}
