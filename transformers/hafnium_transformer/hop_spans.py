"""Spans of one lookup and one prediction, which rows of several callers may share.

A span has one parent, a batch has many callers. Its two spans are children of the first caller that is recorded, so that at a small
sampling share, where a batch seldom has a second one, a trace is whole from caller to predictor. Where there are several, the two spans
have links to all of them; the others' have links to these, and events that say when lookup and prediction were over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hafnium_transformer.errors import ContractChangedError, RefusedError, ScoringError

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan, Value
    from hafnium_transformer.plan import Plan
    from hafnium_transformer.predictor_client import Prediction


class HopSpans:
    """`callers`: spans of the requests that are recorded, at least one."""

    def __init__(self, callers: Sequence[LiveSpan]) -> None:
        self._callers = callers

    def lookup(self, plan: Plan, rows: int) -> Lookup:
        """Around the feature lookup."""
        return Lookup(self._callers, plan, rows)

    def predict(self, plan: Plan, rows: int) -> Hop:
        """Around the call of the predictor."""
        return Hop(self._callers, plan, rows)


class _Shared:
    """A span of several callers. An exception that passes ends it as an error, by its kind and not by its words."""

    name = ""
    kind = "internal"

    def __init__(self, callers: Sequence[LiveSpan], plan: Plan, rows: int) -> None:
        self._callers = callers
        self._attributes: dict[str, Value] = {
            "hafnium.model.name": plan.contract.name, "hafnium.contract.digest": plan.digest, "hafnium.rows": rows,
        }

    def __enter__(self) -> Any:
        self._began = time.perf_counter()
        callers = self._callers
        self._span = callers[0].child(self.name, self.kind, links=callers if len(callers) > 1 else ())
        for caller in callers[1:]:
            caller.link(self._span)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        error = None if e is None else _word(e)
        if isinstance(e, (ContractChangedError, RefusedError)):  # the others may stand for no answer at all
            self._attributes["http.response.status_code"] = e.status
        self._span.add(self._attributes)
        self._span.end(error)
        if len(self._callers) > 1:
            event: dict[str, Value] = {"hafnium.duration_ms": (time.perf_counter() - self._began) * 1000.0}
            if error is not None:
                event["error.type"] = error
            for caller in self._callers[1:]:
                caller.event(self.name, event)


class Lookup(_Shared):
    """The lookup of all rows together."""

    name = "lookup"

    def found(self, rows_without: int) -> None:
        """How many rows the store gave nothing for. They go on by the contract's policies."""
        self._attributes["hafnium.rows_without_lookup"] = rows_without


class Hop(_Shared):
    """The call of the predictor, with its retries."""

    name = "predict"
    kind = "client"

    @property
    def lines(self) -> bytes:
        """Header lines that make the predictor's span a child of this one."""
        return self._span.lines()

    def answered(self, prediction: Prediction) -> None:
        """Who answered."""
        self._attributes["hafnium.model.version"] = prediction.model_version
        self._attributes["hafnium.model.digest"] = prediction.model_digest
        self._attributes["http.response.status_code"] = 200


def _word(e: BaseException) -> str:
    if isinstance(e, ScoringError):
        return e.kind
    return "cancelled" if isinstance(e, asyncio.CancelledError) else type(e).__name__
