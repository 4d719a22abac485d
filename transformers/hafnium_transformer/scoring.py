"""The main path: rows → lookup → matrix → predictor → answers, for one row, for a thousand, and for rows of many requests at once.

Everything is done for all rows together, so that they share one lookup and one prediction. A row that is bad on its own
(fields, or a value the contract demands that the store doesn't have) becomes that row's error; what concerns all (predictor
gone, time over) is raised.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hafnium_contract.errors import InputError, Problem
from hafnium_contract.trace_context import id_line
from hafnium_contract.wire import BATCH_ROWS_MAX
from hafnium_transformer.batch import Batch, Parsed, parse_columns, parse_each
from hafnium_transformer.batch_encoding import ONE_BY_ONE_MAX, Encoded, encode, rows_without_derived
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
from hafnium_transformer.log_writer import InferenceLog, LogBatch
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.feast import Reader
from hafnium_transformer.online_store.records import EntityValue, Found, OnlineStore
from hafnium_transformer.online_store.value_columns import NO_COLUMNS, FoundColumns
from hafnium_transformer.plan import ENTITY_TEXT, Plan, make_plan
from hafnium_transformer.predictor_client import Deadline, Prediction, PredictorClient, Served
from hafnium_transformer.row_encoding import check_derived
from hafnium_transformer.rows import NOTHING, Lacking, Row
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan

log = logging.getLogger("hafnium.transformer")
Matrix = npt.NDArray[np.float32]
Result = dict[str, Any] | ScoringError
_YIELD_ROWS = 256
"""Rows that are parsed before other requests get their turn of the event loop: about 1 ms."""
_SHARE_DECIMALS = 7
"""What float32 scores hold."""
_WARM_READ_S = 30.0
_PING_S = 1.0
_FAIR_S = 0.1
"""A store that did not answer within less than this has not failed: callers in a hurry must not close it for the others."""
_AGES_EVERY_S = 0.05
_COMPLAINT_PAUSE_S = 5.0
"""A store that stays away is reported this often, not at every row."""


class Context(NamedTuple):
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


class Asked(Protocol):
    """A row and the request it came with."""

    row: Row
    context: Context
    answered: bool
    """Its time was over before there was an answer: who asked was told so, and no score of it counts."""


_ANSWERED = attrgetter("answered")


class _Ready(NamedTuple):
    """Rows that the predictor was asked for. `places`: of the prediction's rows in the batch, in `contexts` and in `asked`."""

    batch: Batch
    places: list[int]
    lacking: dict[int, Lacking]
    contexts: Sequence[Context]
    asked: Sequence[Asked]
    """Empty: rows of one request, which waits for all of them."""


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
        self._asking_store: asyncio.Task[None] | None = None
        """One lookup for nobody at a time, with enough time; see `_ask_store_with_time`."""
        self._complained = -_COMPLAINT_PAUSE_S
        self._ages_counted = -_AGES_EVERY_S
        self._plan: Plan | None = None
        self._explainers: dict[int, Explainer | None] = {}
        self._refreshing = asyncio.Lock()
        self._replacing: asyncio.Task[None] | None = None
        """Fetches what takes the place of a contract that the predictor refused; one for all who wait for it."""
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
            self._metrics.active()
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
        if self._plan is None:
            # The first read opens connections, and shows that address and password are right: a pod that can't read its store never takes
            # the place of one that can. After that a store that is gone keeps no new contract out, whose policies answer without it
            await self._store.read(plan, [_nobody(plan)], _WARM_READ_S)
        return plan

    async def refreshed(self, replaced: Plan, deadline: Deadline) -> None:
        """`refresh`, one for all who wait, each until its deadline only; it goes on for those who come later. Raises DeadlineError."""
        if self._plan is not replaced:
            return
        task = self._replacing
        if task is None or task.done():
            task = self._replacing = asyncio.get_running_loop().create_task(self.refresh(replaced))
            task.add_done_callback(_seen)
        try:
            async with asyncio.timeout(deadline.left_s()):
                await asyncio.shield(task)
        except TimeoutError as e:
            raise DeadlineError("the predictor's new contract was not there in time") from e

    async def refresh_registry(self) -> None:
        """Takes over what changed in the feature store's registry."""
        if self._reader is not None:
            await asyncio.to_thread(self._reader.refresh)

    async def not_ready(self) -> str:
        """'' when a request could be answered now, else what is missing: contract or predictor.

        There is no contract before the store was read once. A store that went away later is no reason: requests are answered without it,
        and it is one for all pods, which would be taken out together.
        """
        return self.reason if self._plan is None else await self._client.ready(_PING_S)

    def close(self) -> None:
        """Lets go of the store."""
        if self._asking_store is not None:
            self._asking_store.cancel()
        if self._store is not None:
            self._store.close()

    # --- scoring ---------------------------------------------------------------------------------------------------------------

    async def score_all(self, items: Sequence[Any], context: Context, paths: Sequence[str]) -> list[dict[str, Any]]:
        """`score` for protocols without errors of rows: raises the first row's error that there is.

        Known before the predictor is asked: rows whose scores nobody gets are neither logged nor counted.
        """
        results: list[dict[str, Any]] = []
        for result in await self.score(items, context, paths, whole=True):
            if isinstance(result, ScoringError):
                raise result
            results.append(result)
        return results

    async def score(
        self, items: Sequence[Any], context: Context, paths: Sequence[str] = ("",), *, whole: bool = False,
    ) -> list[Result]:
        """JSON rows of one request → for each its answer or its error. `paths[i]` goes before the paths of row i's problems.

        Raises ScoringError when no row can be answered. A contract that changed behind the predictor's address is
        fetched and the rows are read again under it, once; then it is UnavailableError. `whole`: no row is scored when one is bad.
        """
        plan = self.plan
        try:
            return await self._score(plan, items, context, paths, whole)
        except ContractChangedError as e:
            log.info("predictor refused contract %s: %s", plan.digest, e)
            await self.refreshed(plan, context.deadline)
            try:
                return await self._score(self.plan, items, context, paths, whole)
            except ContractChangedError as again:
                raise two_contracts(again) from again

    async def _score(self, plan: Plan, items: Sequence[Any], context: Context, paths: Sequence[str], whole: bool) -> list[Result]:
        now_s = self.clock().timestamp()
        if len(items) == 1:
            parsed = parse_each(plan, items, request_ids=[context.request_id], now_s=now_s, path_of=paths.__getitem__)
        else:
            parsed = await self._parse(plan, items, context, now_s, paths)
        batch, places, errors = parsed.batch, parsed.places, dict[int, ScoringError](parsed.errors)
        if sum(batch.explained) > self._settings.explain_rows_max:
            explained = [k for k, explain in enumerate(batch.explained) if explain][self._settings.explain_rows_max :]
            message = f"more than {self._settings.explain_rows_max} explained rows in one batch"
            for k in explained:
                errors[places[k]] = RowInvalidError([Problem(f"{paths[places[k]]}.explain".lstrip("."), message)])
            kept = sorted(set(range(len(batch))) - set(explained))
            batch, places = batch.only(kept), [places[k] for k in kept]
        if whole:
            _raise_first(errors)
        results: list[Result | None] = [errors.get(i) for i in range(len(items))] if errors else [None] * len(items)
        if places:
            spans = None if context.span is None else HopSpans([context.span])
            lines = id_line([context.request_id], 1) + context.trace_lines
            scored = await self._score_batch(plan, batch, [context] * len(batch), context.deadline, lines, spans, whole=whole)
            for i, result in zip(places, scored, strict=True):
                results[i] = result
        return [r if r is not None else UnavailableError("the row was not scored") for r in results]

    async def _parse(self, plan: Plan, items: Sequence[Any], context: Context, now_s: float, paths: Sequence[str]) -> Parsed:
        """The rows of a batch, of which a thousand would keep others waiting."""
        parse = parse_each if len(items) <= ONE_BY_ONE_MAX else parse_columns
        parts: list[Parsed] = []
        for begin in range(0, len(items), _YIELD_ROWS):
            if begin:
                await asyncio.sleep(0)
            part = items[begin : begin + _YIELD_ROWS]
            request_ids = [f"{context.request_id}-{i}" for i in range(begin, begin + len(part))]
            parts.append(parse(plan, part, request_ids=request_ids, now_s=now_s, path_of=lambda i, begin=begin: paths[begin + i]))
        parsed = parts[0]
        for n, part in enumerate(parts[1:], 1):
            begin = n * _YIELD_ROWS
            parsed = Parsed(
                parsed.batch.and_then(plan, part.batch), parsed.places + [begin + i for i in part.places],
                parsed.errors | {begin + i: e for i, e in part.errors.items()},
            )
        return parsed

    async def score_rows(
        self, plan: Plan, asked: Sequence[Asked], deadline: Deadline, passed_on: bytes, spans: HopSpans | None = None,
    ) -> list[Result]:
        """Valid rows, perhaps of several requests → for each its answer or its error. `deadline` is for all of them.

        `passed_on`: header lines for the predictor: ids, and the trace when there are no `spans` whose trace it is.
        Raises ScoringError when no row can be answered; ContractChangedError when the predictor has another contract.
        """
        return await self._score_batch(
            plan, Batch.of([a.row for a in asked]), [a.context for a in asked], deadline, passed_on, spans, asked)

    async def _score_batch(
        self, plan: Plan, batch: Batch, contexts: Sequence[Context], deadline: Deadline, passed_on: bytes, spans: HopSpans | None,
        asked: Sequence[Asked] = (), whole: bool = False,
    ) -> list[Result]:
        results: list[Result | None] = [None] * len(batch)
        if spans is None or not plan.views:
            found = await self._look_up(plan, batch, deadline)
        else:
            with spans.lookup(plan, len(batch)) as lookup:
                found = await self._look_up(plan, batch, deadline)
                lookup.found(len(batch) if found is None else 0)
        encoded = encode(plan, batch, found)
        if encoded.errors:
            self._metrics.rows(plan.contract.name, len(batch) if whole else len(encoded.errors))
        for i, error in encoded.errors.items():
            results[i] = error
            for feature in (*error.features, *batch.lacking.get(i, NOTHING).missing):
                self._metrics.missing(plan.contract.name, feature)
        if whole:
            _raise_first(encoded.errors)
        if encoded.places:
            await self._predict(plan, batch, encoded, contexts, deadline, passed_on, spans, asked, results, whole)
        return [r if r is not None else UnavailableError("the row was not scored") for r in results]

    async def _look_up(self, plan: Plan, batch: Batch, deadline: Deadline) -> Sequence[Found] | FoundColumns | None:
        """What the store has for each row; None when it could not be asked (the contract's policies then decide)."""
        if not plan.views:
            return [{}] * len(batch) if len(batch) <= ONE_BY_ONE_MAX else NO_COLUMNS
        start = time.perf_counter()
        # Half of what is left stays for the prediction: a store that hangs ends as one without values, also for who gives little time
        timeout_s = min(self._settings.lookup_timeout_ms / 1000.0, deadline.left_s() / 2.0)
        name = plan.contract.name
        if self._store is None or not self._store_breaker.may_ask(time.monotonic()):
            self._metrics.lookup_failed(name, "not_asked")
            return None
        try:
            if len(batch) <= ONE_BY_ONE_MAX:
                found = await self._store.read(plan, batch.entities, timeout_s)
            else:
                found = await self._store.read_columns(plan, batch.entities, timeout_s)
        except (OverloadedError, DeadlineError, UnavailableError) as e:
            hurried = isinstance(e, DeadlineError) and timeout_s < self._fair_s
            if hurried:
                self._ask_store_with_time(self._store, plan)
            elif isinstance(e, OverloadedError):  # nothing was asked
                self._store_breaker.tried()
            else:
                self._store_breaker.failed(time.monotonic())
            self._metrics.lookup_failed(name, "hurry" if hurried else e.kind)
            if time.monotonic() - self._complained >= _COMPLAINT_PAUSE_S:
                self._complained = time.monotonic()
                log.warning("%d rows without looked-up features: %s", len(batch), e)
            return None
        except BaseException:  # the caller went away: nobody found out anything, so the next one may
            self._store_breaker.tried()
            raise
        else:
            self._store_breaker.succeeded()
            self._count_ages(plan, found)
            return found
        finally:
            self._metrics.looked_up(name, time.perf_counter() - start)

    def _ask_store_with_time(self, store: OnlineStore, plan: Plan) -> None:
        """Finds out, beside the requests, whether the store hangs or only a caller was in a hurry: all of them may be."""
        if self._asking_store is None or self._asking_store.done():
            self._asking_store = asyncio.get_running_loop().create_task(self._try_store(store, plan))

    async def _try_store(self, store: OnlineStore, plan: Plan) -> None:
        try:
            await store.read(plan, [_nobody(plan)], self._fair_s)
        except OverloadedError:  # nothing was asked
            self._store_breaker.tried()
        except (DeadlineError, UnavailableError):
            self._store_breaker.failed(time.monotonic())
        else:
            self._store_breaker.succeeded()

    def _count_ages(self, plan: Plan, found: Sequence[Found] | FoundColumns) -> None:
        """Age of the values just read, one row of a batch: what is stale is stale for all. By our clock: events have their callers'.

        Now and then: nobody looks at a gauge a thousand times a second.
        """
        now = time.monotonic()
        if now < self._ages_counted + _AGES_EVERY_S:
            return
        now_s = self.clock().timestamp()
        for view in plan.views:
            if isinstance(found, FoundColumns):
                seconds = found.time_of_first(plan, view)
            else:
                item = found[0].get(view.features[0].column)
                seconds = None if item is None else item[1]
            if seconds is not None:
                self._ages_counted = now
                self._metrics.staleness(view.name, max(now_s - seconds, 0.0))

    async def _predict(
        self, plan: Plan, batch: Batch, encoded: Encoded, contexts: Sequence[Context], deadline: Deadline, passed_on: bytes,
        spans: HopSpans | None, asked: Sequence[Asked], results: list[Result | None], whole: bool,
    ) -> None:
        places, matrix = encoded.places, encoded.matrix
        explainer = self._explainer(matrix.shape[1]) if any(batch.explained) else None
        refused = self._check(plan, batch, encoded, explainer)
        if refused:
            name = plan.contract.name
            self._metrics.rows(name, len(places) if whole else len(refused))
            for i, error in refused.items():
                results[i] = error
                # Who is told 503 for a derived input lacks what it is made of: an outage must show there, as in rows that are answered
                derived = error.features if isinstance(error, LookedUpError) else ()
                for feature in (*derived, *encoded.lacking.get(i, NOTHING).missing):
                    self._metrics.missing(name, feature)
            if whole:
                _raise_first(refused)
            kept = [k for k, i in enumerate(places) if i not in refused]
            if not kept:
                return
            places, matrix = [places[k] for k in kept], matrix[kept]
        ready = _Ready(batch, places, encoded.lacking, contexts, asked)
        if explainer is None:
            prediction = await self._ask(plan, matrix, deadline, passed_on, spans)
            self._answer(plan, ready, matrix, prediction, None, results)
            return
        # A row and what explains it go together, since another model may answer the next prediction
        predicted: list[tuple[slice, Prediction]] = []
        for part in parts_of([1 + explainer.rows * batch.explained[i] for i in places], BATCH_ROWS_MAX):
            sent = [matrix[part], *(explainer.asked(matrix[k]) for k in range(part.start, part.stop) if batch.explained[places[k]])]
            predicted.append((part, await self._ask(plan, np.concatenate(sent), deadline, passed_on, spans)))
        for part, prediction in predicted:
            self._answer(plan, ready._replace(places=places[part]), matrix[part], prediction, explainer, results)

    def _check(self, plan: Plan, batch: Batch, encoded: Encoded, explainer: Explainer | None) -> dict[int, ScoringError]:
        """Rows that can't be scored after all, by place; what derived inputs lack is added to `encoded.lacking`."""
        refused: dict[int, ScoringError] = {}
        if explainer is None and any(batch.explained):
            for i in encoded.places:
                if batch.explained[i]:
                    refused[i] = RowInvalidError([Problem("explain", f"a model of more than {ROWS_MAX} inputs can't be explained")])
        for k in rows_without_derived(plan, encoded.matrix):
            i = encoded.places[k]
            if i in refused:
                continue
            try:
                lacking = encoded.lacking.get(i, NOTHING)
                encoded.lacking[i] = check_derived(plan, lacking, encoded.matrix[k], silent=encoded.silent)
            except ScoringError as error:
                refused[i] = error
        return refused

    async def _ask(self, plan: Plan, sent: Matrix, deadline: Deadline, passed_on: bytes, spans: HopSpans | None) -> Prediction:
        if spans is None:
            return await self._client.predict(sent, plan.digest, deadline, passed_on)
        with spans.predict(plan, len(sent)) as hop:
            prediction = await self._client.predict(sent, plan.digest, deadline, passed_on + hop.lines)
            hop.answered(prediction)
        return prediction

    def rows_asked(self, plan: Plan) -> int:
        """Rows that the predictor is asked for when one row is explained, itself included."""
        explainer = self._explainer(len(plan.contract.inputs))
        return 1 + (explainer.rows if explainer is not None else 0)

    def _explainer(self, inputs: int) -> Explainer | None:
        if inputs not in self._explainers:
            self._explainers[inputs] = Explainer.of(inputs, self._settings.explain_method, self._settings.explain_orders)
        return self._explainers[inputs]

    def _answer(
        self, plan: Plan, ready: _Ready, matrix: Matrix, prediction: Prediction, explainer: Explainer | None, results: list[Result | None],
    ) -> None:
        served = self.served
        if served is not None and prediction.model_digest != served.model_digest and plan is self._plan:
            # Another model with the same contract. While pods of both answer, who answered last is told; either is true
            self.served = replace(served, model_version=prediction.model_version, model_digest=prediction.model_digest)
        if any(map(_ANSWERED, ready.asked)):
            ready, matrix, prediction = _unanswered(ready, matrix, prediction, explainer)
            if not ready.places:
                return
        batch, places, lacking, contexts, _ = ready
        rule, name, version = plan.contract.decision, plan.contract.name, prediction.model_version
        scores: list[float] = prediction.score[: len(places)].tolist()
        intervals: list[list[float]] = prediction.interval[: len(places)].tolist()
        now, ended = self.clock(), time.perf_counter()
        above, below, threshold = rule.above, rule.below, rule.threshold
        decisions = [above if score >= threshold else below for score in scores]
        shown, bounds, digits = scores, intervals, self._settings.score_decimals
        if digits:
            shown = [round(score, digits) for score in scores]
            bounds = [[round(lower, digits), round(upper, digits)] for lower, upper in intervals]
        request_ids = [batch.request_ids[i] for i in places]
        answers: list[dict[str, Any]] = [
            {"request_id": request_id, "score": score, "confidence_lower": lower, "confidence_upper": upper, "decision": decision,
             "model_name": name, "model_version": version, "degraded": []}
            for request_id, score, (lower, upper), decision in zip(request_ids, shown, bounds, decisions, strict=True)
        ]
        for i, answer in zip(places, answers, strict=True):
            results[i] = answer
        self._metrics.rows(name, len(places))
        lacks = [(k, lacking[i]) for k, i in enumerate(places) if i in lacking] if lacking else []
        for k, (degraded, missing) in lacks:
            answers[k]["degraded"] = list(degraded)
            for feature in missing:
                self._metrics.missing(name, feature)
        if explainer is not None:
            self._explain(plan, [k for k, i in enumerate(places) if batch.explained[i]], answers, scores, matrix, prediction, explainer)
        series = self._metrics.model(name, version)
        series.predicted(scores, {decision: decisions.count(decision) for decision in {above, below}})
        if self._log is not None:
            asked = [contexts[i] for i in places]
            logged_scores, logged_intervals = prediction.score, prediction.interval
            if len(logged_scores) > len(places):  # rows of explanations, which what is queued would keep
                logged_scores, logged_intervals = logged_scores[: len(places)].copy(), logged_intervals[: len(places)].copy()
            self._log.append(LogBatch(
                plan, now, version, prediction.model_digest, request_ids, [context.arm for context in asked],
                logged_scores, logged_intervals, decisions,
                {k: degraded for k, (degraded, _) in lacks}, [(ended - context.started) * 1000.0 for context in asked],
                [batch.entities[i] for i in places], matrix,
            ))

    def _explain(
        self, plan: Plan, explained: Sequence[int], answers: Sequence[dict[str, Any]], scores: Sequence[float], matrix: Matrix,
        prediction: Prediction, explainer: Explainer,
    ) -> None:
        """Adds explanations. Their rows stand behind all others in the prediction."""
        digits, begin = self._settings.score_decimals, len(scores)
        for k in explained:
            shares, base = explainer.shares(scores[k], prediction.score[begin : begin + explainer.rows])
            begin += explainer.rows
            answers[k]["explanation"] = contributions(
                plan.contract, matrix[k], shares, self._settings.explain_top_k, digits or _SHARE_DECIMALS,
            )
            if base is not None:
                answers[k]["explanation_base"] = round(base, digits) if digits else base


def _raise_first(errors: Mapping[int, ScoringError]) -> None:
    if errors:
        raise errors[min(errors)]


def _unanswered(
    ready: _Ready, matrix: Matrix, prediction: Prediction, explainer: Explainer | None,
) -> tuple[_Ready, Matrix, Prediction]:
    """Without the rows that were answered while the predictor was asked, and without what explains them."""
    batch, places, asked = ready.batch, ready.places, ready.asked
    kept: list[int] = []
    explaining: list[int] = []
    begin = len(places)
    for k, i in enumerate(places):
        end = begin + (explainer.rows if explainer is not None and batch.explained[i] else 0)
        if not asked[i].answered:
            kept.append(k)
            explaining.extend(range(begin, end))
        begin = end
    rows = kept + explaining
    return (ready._replace(places=[places[k] for k in kept]), matrix[kept],
            prediction._replace(score=prediction.score[rows], interval=prediction.interval[rows]))


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


def two_contracts(again: ContractChangedError) -> UnavailableError:
    """For rows that were refused under the contract just fetched, too: pods of both answer at this address. That passes, and no caller can
    do anything about it, so it is no 409.
    """
    return UnavailableError(f"the predictor's contract is changing: {again.detail}")


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # who waited has it; without anybody waiting asyncio would complain


def _nobody(plan: Plan) -> dict[str, EntityValue]:
    """An entity that nobody has, to ask the store whether it answers."""
    return {key: "-" if plan.entity_types.get(key, ENTITY_TEXT) == ENTITY_TEXT else 0 for key in plan.join_keys}
