"""The main path: requests → rows → lookup → matrix → predictor → answers, for one row and for a thousand.

Everything is done for all rows of a request together, so a batch costs one lookup and one prediction. A row that is bad on
its own (fields, or a value the contract demands that the store doesn't have) becomes that row's error; what concerns all
(predictor gone, time over) is raised.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import assemble, encode_value
from hafnium_contract.errors import FeatureError, InputError, Problem
from hafnium_transformer.errors import (
    ContractChangedError,
    DeadlineError,
    LookedUpError,
    OverloadedError,
    RowInvalidError,
    ScoringError,
    UnavailableError,
)
from hafnium_transformer.explanation import contributions, left_out
from hafnium_transformer.feature_store import Found, Lookup, Reader
from hafnium_transformer.log_writer import InferenceLog, LogRow
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.plan import LookedUp, Plan, ViewPlan, make_plan
from hafnium_transformer.predictor_client import Deadline, Prediction, PredictorClient, Served
from hafnium_transformer.rows import EntityValue, Row, expected_form, parse_row
from hafnium_transformer.settings import Settings

log = logging.getLogger("hafnium.transformer")
Matrix = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Result = dict[str, Any] | ScoringError
CLOCK_SKEW_S = 300.0
"""A value this much younger than the event is from the future; less is two clocks that differ."""
_YIELD_ROWS = 64
"""Rows that are parsed before other requests get their turn of the event loop: 1.6 ms, at 25 µs a row."""
_WARM_READ_S = 30.0
_PING_S = 1.0


@dataclass(frozen=True)
class Context:
    """What a request brings beside its rows."""

    request_id: str
    arm: str
    deadline: Deadline
    started: float
    """time.perf_counter() at arrival."""
    passed_on: Mapping[str, str]
    """Headers that the predictor gets too: request id and trace."""


@dataclass(frozen=True)
class _Encoded:
    """A row with its looked-up values. `index`: its place in the request."""

    index: int
    row: Row
    values: dict[str, float]
    degraded: tuple[str, ...]


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
        self._clock = clock
        self._lookup: Lookup | None = None
        self._reader: Reader | None = None
        self._plan: Plan | None = None
        self._refreshing = asyncio.Lock()
        self.served: Served | None = None
        self.reason = "the contract was not fetched yet"

    @property
    def plan(self) -> Plan:
        """The contract in force. Raises UnavailableError with the reason when there is none yet."""
        if self._plan is None:
            raise UnavailableError(self.reason)
        return self._plan

    @property
    def active(self) -> bool:
        return self._plan is not None

    def use_store(self, reader: Reader) -> None:
        """From now on views are read from this store."""
        s = self._settings
        self._reader = reader
        self._lookup = Lookup(
            reader, threads=s.lookup_threads, rows_max=s.lookup_rows_max, queue_rows_max=s.lookup_queue_rows_max
        )

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
        if self._lookup is None or self._reader is None:
            names = ", ".join(v.name for v in plan.views)
            state = "is not open yet" if self._settings.feature_repo else "is not given (--feature_repo)"
            raise UnavailableError(f"the contract reads {names}, but the feature store {state}")
        try:
            types = await self._lookup.call(self._reader.entity_types, plan)
        except InputError as e:
            raise UnavailableError(f"feature store: {e}") from e
        plan = replace(plan, entity_types=types)
        await self._lookup.read(plan, [_nobody(plan)], _WARM_READ_S)  # the first read costs 0.2 s
        return plan

    async def refresh_registry(self) -> None:
        """Takes over what changed in the feature store's registry."""
        if self._lookup is not None and self._reader is not None:
            await self._lookup.call(self._reader.refresh)

    async def not_ready(self) -> str:
        """'' when a request could be answered now, else what is missing: contract, predictor or feature store."""
        if self._plan is None:
            return self.reason
        reason = await self._client.ready(_PING_S)
        if not reason and self._plan.views and self._lookup is not None:
            try:
                await self._lookup.read(self._plan, [_nobody(self._plan)], _PING_S)
            except ScoringError as e:
                reason = e.detail
        return reason

    def close(self) -> None:
        """Lets go of the store's threads."""
        if self._lookup is not None:
            self._lookup.close()

    async def score(self, items: Sequence[Any], context: Context, paths: Sequence[str] = ("",)) -> list[Result]:
        """JSON rows → for each its answer or its error. `paths[i]` goes before the paths of row i's problems.

        Raises ScoringError when no row can be answered. A contract that changed behind the predictor's address is
        fetched and the rows are read again under it, once.
        """
        plan = self.plan
        try:
            return await self._score(plan, items, context, paths)
        except ContractChangedError as e:
            log.info("predictor refused contract %s: %s", plan.digest, e)
            await self.refresh(plan)
            return await self._score(self.plan, items, context, paths)

    async def _score(self, plan: Plan, items: Sequence[Any], context: Context, paths: Sequence[str]) -> list[Result]:
        results: list[Result | None] = [None] * len(items)
        rows: list[tuple[int, Row]] = []
        now = self._clock()
        explained = 0
        for i, item in enumerate(items):
            if i % _YIELD_ROWS == _YIELD_ROWS - 1:
                await asyncio.sleep(0)
            own_id = context.request_id if len(items) == 1 else f"{context.request_id}-{i}"
            try:
                row = parse_row(plan, item, request_id=own_id, now=now, path=paths[i])
                explained += row.explain
                if row.explain and explained > self._settings.explain_rows_max:
                    message = f"more than {self._settings.explain_rows_max} explained rows in one batch"
                    raise RowInvalidError([Problem(f"{paths[i]}.explain".lstrip("."), message)])
                rows.append((i, row))
            except RowInvalidError as e:
                results[i] = e
        encoded: list[_Encoded] = []
        for (i, row), found in zip(rows, await self._look_up(plan, [r for _, r in rows], context.deadline), strict=True):
            try:
                encoded.append(self._encode(plan, i, row, found))
            except LookedUpError as e:
                results[i] = e
        if encoded:
            await self._predict(plan, encoded, context, results)
        return [r if r is not None else UnavailableError("the row was not scored") for r in results]

    async def _look_up(self, plan: Plan, rows: Sequence[Row], deadline: Deadline) -> Sequence[Found | None]:
        """What the store has for each row; None when it could not be asked (the contract's policies then decide)."""
        if not plan.views or not rows:
            return [{}] * len(rows)
        if self._lookup is None:
            return [None] * len(rows)
        timeout_s = min(self._settings.lookup_timeout_ms / 1000.0, deadline.left_s())
        start = time.perf_counter()
        try:
            return await self._lookup.read(plan, [row.entity for row in rows], timeout_s)
        except (OverloadedError, DeadlineError, UnavailableError) as e:
            log.warning("%d rows without looked-up features: %s", len(rows), e)
            return [None] * len(rows)
        finally:
            self._metrics.looked_up(plan.contract.name, time.perf_counter() - start)

    def _encode(self, plan: Plan, index: int, row: Row, found: Found | None) -> _Encoded:
        for name in row.missing:
            self._metrics.missing(name)
        if not plan.views:
            return _Encoded(index, row, row.values, row.degraded)
        values = dict(row.values)
        degraded = list(row.degraded)
        problems: list[Problem] = []
        for view in plan.views:
            for looked_up in view.features:
                value, wrong, usual = self._value(view, looked_up, row, found)
                feature = looked_up.feature
                values[feature.name] = value
                if wrong:
                    self._metrics.missing(feature.name)
                    if feature.missing == "reject":
                        problems.append(Problem(looked_up.column.replace("__", ".", 1), wrong))
                    elif feature.missing == "degrade" or not usual:
                        degraded.append(feature.name)
        if problems:
            views = sorted({p.path.split(".")[0] for p in problems})
            raise LookedUpError(f"view {', '.join(views)}: {problems[0].path} {problems[0].message}", problems)
        return _Encoded(index, row, values, tuple(degraded))

    def _value(self, view: ViewPlan, looked_up: LookedUp, row: Row, found: Found | None) -> tuple[float, str, bool]:
        """(encoded value, what is wrong with it or '', whether that is the usual case of a missing or stale value)."""
        if found is None:
            return math.nan, "could not be looked up: the feature store did not answer", False
        item = found.get(looked_up.column)
        if item is None:
            return math.nan, f"has no value for {view.join_key} {row.entity.get(view.join_key)!r}", True
        raw, event_time_s = item
        age_s = row.event_time_s - event_time_s
        self._metrics.staleness(view.name, max(age_s, 0.0))
        if age_s < -CLOCK_SKEW_S:
            return math.nan, f"is from {-age_s:.0f} s after the event: a score must not know the future", True
        if age_s > looked_up.max_age_s:
            return math.nan, f"is {age_s:.0f} s old at the event's time, the contract allows {looked_up.max_age_s:.0f} s", True
        try:
            value = encode_value(looked_up.feature, raw, looked_up.column)
        except FeatureError as e:
            return math.nan, f"in the store is not usable: {e.problems[0].message}", False
        return value, f"has no value for {view.join_key}" if math.isnan(value) else "", True

    async def _predict(
        self, plan: Plan, encoded: Sequence[_Encoded], context: Context, results: list[Result | None],
    ) -> None:
        columns: dict[str, Floats] = {
            name: np.array([e.values[name] for e in encoded]) for name in encoded[0].values
        }
        event_time = np.array([e.row.event_time_s for e in encoded])
        matrix = assemble(plan.contract, columns, event_time)
        kept: list[_Encoded] = []
        for k, e in enumerate(encoded):
            try:
                kept.append(self._check_derived(plan, e, matrix[k]))
            except ScoringError as error:
                results[e.index] = error
        if not kept:
            return
        if len(kept) < len(encoded):
            places = {e.index: k for k, e in enumerate(encoded)}
            matrix = matrix[[places[e.index] for e in kept]]
        explained = [k for k, e in enumerate(kept) if e.row.explain]
        asked = np.concatenate([matrix, *(left_out(matrix[k]) for k in explained)]) if explained else matrix
        prediction = await self._client.predict(asked, plan.digest, context.deadline, context.passed_on)
        self._answer(plan, kept, matrix, prediction, context, results)

    def _check_derived(self, plan: Plan, encoded: _Encoded, inputs: Matrix) -> _Encoded:
        """Policies of derived inputs that can't be computed (an input is missing, or x/0)."""
        degraded = list(encoded.degraded)
        for column, feature in plan.derived_inputs:
            if not math.isnan(inputs[column]):
                continue
            self._metrics.missing(feature.name)
            if feature.missing == "degrade":
                degraded.append(feature.name)
            elif feature.missing == "reject":
                problem = Problem(feature.name, f"can't be computed from this row; expected {expected_form(feature)}")
                views = plan.looked_up_behind[feature.name]
                if views:
                    raise LookedUpError(f"view {', '.join(views)}: {problem.path} {problem.message}", [problem])
                raise RowInvalidError([problem])
        return encoded if len(degraded) == len(encoded.degraded) else replace(encoded, degraded=tuple(degraded))

    def _answer(
        self, plan: Plan, rows: Sequence[_Encoded], matrix: Matrix, prediction: Prediction, context: Context,
        results: list[Result | None],
    ) -> None:
        rule, name = plan.contract.decision, plan.contract.name
        series = self._metrics.model(name, prediction.model_version)
        scores: list[float] = prediction.score[: len(rows)].tolist()
        intervals: list[list[float]] = prediction.interval[: len(rows)].tolist()
        now = self._clock()
        latency_ms = (time.perf_counter() - context.started) * 1000.0
        explained_from, width = len(rows), matrix.shape[1]
        for k, e in enumerate(rows):
            score, (lower, upper) = scores[k], intervals[k]
            decision = rule.above if score >= rule.threshold else rule.below
            result: dict[str, Any] = {
                "request_id": e.row.request_id, "score": score, "confidence_lower": lower, "confidence_upper": upper,
                "decision": decision, "model_name": name, "model_version": prediction.model_version,
                "degraded": list(e.degraded),
            }
            if e.row.explain:
                without = prediction.score[explained_from : explained_from + width]
                explained_from += width
                result["explanation"] = contributions(
                    plan.contract, matrix[k], score, without, self._settings.explain_top_k
                )
            results[e.index] = result
            series.predicted(score, decision)
            if self._log is not None:
                self._log.append(LogRow(
                    plan, e.row.request_id, now, prediction.model_version, prediction.model_digest, context.arm, score,
                    lower, upper, decision, e.degraded, latency_ms, e.row.entity, matrix[k],
                ))


def _nobody(plan: Plan) -> dict[str, EntityValue]:
    """An entity that nobody has, to ask the store whether it answers."""
    return {key: 0 if plan.entity_types.get(key) == "a whole number" else "-" for key in plan.join_keys}
