"""V2 over gRPC with the gate's limits, counted, logged and traced as HTTP is. The SDK reads the message and calls `model.py`.

There is no count of calls in progress as at the transformer: the model answers at once, in one thread, and gRPC hands over one call at a
time, so a count would never see the line (tried: of 80 calls that came together never more than four were in progress). What bounds the
line is how many calls a connection may have (`grpc_streams_max`): those beyond it wait at the caller, where its deadline counts, or are
refused by HTTP/2 itself (UNAVAILABLE).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from hafnium_contract.serving.grpc_calls import INFER, Call, Refusal, kserve_refusal
from hafnium_contract.trace_context import REQUEST_ID, request_ids_of
from hafnium_contract.wire import DEADLINE_HEADER
from hafnium_predictor.errors import AnswerError, DeadlineError
from hafnium_predictor.gate import FAILURES, KINDS, positive
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_predictor.model import SPAN, RiskModel
from hafnium_predictor.request_spans import model_facts, request_facts
from hafnium_predictor.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

_DEADLINE = DEADLINE_HEADER.encode()


class GrpcGate:
    """hafnium_contract.serving.grpc_calls.CallGate of a predictor."""

    def __init__(self, model: RiskModel, metrics: PredictorMetrics, settings: Settings, tracing: Tracing | None = None) -> None:
        self._model = model
        self._metrics = metrics
        self._tracing = tracing
        self._read_timeout_s = settings.read_timeout_s

    async def answer(self, call: Call, read: Callable[[float], Awaitable[Any]], score: Callable[[Any], Awaitable[Any]]) -> Any:
        """The answer to a call, or a Refusal."""
        span = None
        if self._tracing is not None:
            span = self._tracing.request(call.metadata, INFER, call.started)
            SPAN.set(span)
        kind: str | None = "client_gone"  # whatever ends this without an error of ours is a call that was cancelled
        status = 0
        try:
            given = call.metadata.get(_DEADLINE)
            if given is not None and not positive(given):
                raise DeadlineError(f"{DEADLINE_HEADER}: {given.decode('latin-1')[:20]} ms are left")
            message = await read(self._read_timeout_s)
            answer = await score(message)
            status, kind = 200, None
            return answer
        except Exception as e:  # noqa: BLE001 - the SDK's errors share no base
            refused, kind = _refused(e)
            status = refused.status
            return refused
        finally:
            self._metrics.answered(time.perf_counter() - call.started, kind)
            if status >= 500 or status == 409:
                FAILURES.warning(
                    time.monotonic(), f"answered {status} by gRPC", request_id=request_ids_of(call.metadata.get(REQUEST_ID)) or None,
                    kind=kind, status=status, trace_id=span and span.trace_id,
                )
            if span is not None:
                engine = self._model.engine_or_none
                span.add({
                    "rpc.system": "grpc", **request_facts("", call.metadata), **({} if engine is None else model_facts(engine)),
                })
                span.end(kind)


def _refused(error: Exception) -> tuple[Refusal, str]:
    """What the caller is told, and the kind that it is counted under."""
    cause = error.__cause__ if isinstance(error.__cause__, AnswerError) else error
    if isinstance(cause, AnswerError):
        return Refusal(cause.status, f"{cause.title}: {cause}", 1.0 if cause.status == 503 else None), cause.kind
    refused = kserve_refusal(error)
    return refused, KINDS.get(refused.status, "internal")
