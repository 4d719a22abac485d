"""V2 over gRPC with the gate's limits: requests in progress, rows by client, deadline; counted, logged and traced as HTTP is.

The SDK reads the message and calls `model.py`, as behind the gate; context and error travel beside it in the same variable.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from hafnium_contract.serving.grpc_calls import INFER, Call, Refusal, SlowMessageError, kserve_refusal
from hafnium_contract.trace_context import REQUEST_ID, request_id_of, trace_lines
from hafnium_transformer.admission import Admission, overloaded
from hafnium_transformer.errors import MalformedError, ScoringError, SlowBodyError
from hafnium_transformer.gate import EXCHANGE, FAILURES, Exchange, arm_of, counted, deadline_of
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.predictor_client import Deadline
from hafnium_transformer.request_spans import model_facts
from hafnium_transformer.scoring import Context, Scorer
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan, Tracing


class GrpcGate:
    """hafnium_contract.serving.grpc_calls.CallGate of a transformer."""

    def __init__(
        self, scorer: Scorer, admission: Admission, metrics: TransformerMetrics, settings: Settings, tracing: Tracing | None = None,
    ) -> None:
        self._scorer = scorer
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._tracing = tracing

    async def answer(self, call: Call, read: Callable[[float], Awaitable[Any]], score: Callable[[Any], Awaitable[Any]]) -> Any:
        """The answer to a call, or a Refusal."""
        request_id = request_id_of(call.metadata.get(REQUEST_ID)) or uuid.uuid4().hex
        lines, span = self._trace(call, request_id)
        exchange: Exchange | None = None
        kind: str | None = "client_gone"  # whatever ends this without an error of ours is a call that was cancelled
        status, entered = 0, False
        try:
            if self._admission.full:  # said before the message is read
                raise overloaded()
            deadline = deadline_of(call.metadata, self._settings.deadline_ms)
            if call.left_s is not None:
                deadline = Deadline(min(deadline.at, time.monotonic() + call.left_s))
            context = Context(request_id, arm_of(call.metadata), deadline, call.started, lines, span)
            message = await read(deadline.left_s())
            self._admission.enter()  # who only sends slowly takes nobody's place
            entered = True
            exchange = Exchange(context, lambda rows: self._ask(call, rows, already=1))
            self._ask(call, 1)  # how many rows it has, only the SDK finds out
            token = EXCHANGE.set(exchange)
            try:
                answer = await score(message)
            finally:
                EXCHANGE.reset(token)
            status, kind = 200, None
            return answer
        except Exception as e:  # noqa: BLE001 - the SDK's errors share no base
            refused, kind = _refused(exchange.error if exchange is not None and exchange.error is not None else e)
            status = refused.status
            return refused
        finally:
            if entered:
                self._admission.leave()
            counted(self._scorer, self._metrics, self._settings, call.started, kind)
            if status >= 500:
                FAILURES.warning(
                    time.monotonic(), f"answered {status} by gRPC", request_id=request_id, kind=kind, status=status,
                    trace_id=span and span.trace_id,
                )
            if span is not None:
                span.add(model_facts(self._scorer))
                if status:
                    span.answered(status, kind)
                else:
                    span.end(kind)

    def _ask(self, call: Call, rows: int, already: int = 0) -> None:
        self._admission.ask(self._admission.client(call.metadata, call.peer), rows, time.monotonic(), already)

    def _trace(self, call: Call, request_id: str) -> tuple[bytes, LiveSpan | None]:
        if self._tracing is None:
            return trace_lines(call.metadata), None
        span = self._tracing.accept(call.metadata, INFER, call.started)
        if isinstance(span, bytes):
            return span, None
        span.add({
            "rpc.system": "grpc", "rpc.method": "ModelInfer", "hafnium.request_id": request_id, "hafnium.arm": arm_of(call.metadata),
        })
        return b"", span


def _refused(error: Exception) -> tuple[Refusal, str]:
    """What the caller is told, and the kind that it is counted under."""
    if isinstance(error, SlowMessageError):
        error = SlowBodyError(str(error))
    if isinstance(error, ScoringError):
        hint = error.retry_after_s if error.status in (429, 503) else None
        return Refusal(error.status, f"{error.title}: {error.detail}", hint), error.kind
    refused = kserve_refusal(error)
    kinds = {400: MalformedError.kind, 404: "not_found", 501: "not_implemented", 503: "unavailable"}
    return refused, kinds.get(refused.status, "internal")
