"""The hot routes of the transformer, `POST /v1/score` and KServe's V1 with one instance, answered below ASGI; rows of many requests share
lookups and predictions.

What is unusual goes back to the gate, from its first byte: a row that breaks the contract, a body that is no JSON, a deadline
that can't be read. What becomes of a good row later (store or predictor gone, time over) is answered here, in the gate's words.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from random import Random
from typing import TYPE_CHECKING, Any, cast

import orjson

from hafnium_contract.asgi import PROBLEM_TYPE
from hafnium_contract.serving.hot_protocol import HotRequest, HotRoutes
from hafnium_contract.trace_context import REQUEST_ID, REQUEST_ID_CHARS_MAX, request_id_of, trace_lines
from hafnium_contract.v2_binary import LENGTH_HEADER
from hafnium_contract.wire import DEADLINE_HEADER
from hafnium_transformer.admission import Admission, overloaded
from hafnium_transformer.coalescing import Coalescer, Waiting
from hafnium_transformer.errors import RateLimitedError, RowInvalidError, ScoringError
from hafnium_transformer.gate import FAILURES, arm_of, retry_after
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.predictor_client import Deadline
from hafnium_transformer.request_spans import model_facts, request_facts, span_name
from hafnium_transformer.rows import parse_row
from hafnium_transformer.scoring import Context, Result, Scorer
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

log = logging.getLogger("hafnium.transformer")
_DEADLINE = DEADLINE_HEADER.encode()
_LENGTH = LENGTH_HEADER.encode()
_SCORE = "/v1/score"
_PROBLEM_HEAD = b"%s: %s\r\n" % PROBLEM_TYPE
_COUNT_S = 0.05
_OVERLOADED = overloaded()
_OVERLOADED_BODY = orjson.dumps(_OVERLOADED.document())
_OVERLOADED_HEAD = _PROBLEM_HEAD + b"".join(b"%s: %s\r\n" % h for h in retry_after(_OVERLOADED))


class HotPath:
    """Handlers of the hot routes over one scorer."""

    def __init__(
        self, scorer: Scorer, coalescer: Coalescer, admission: Admission, metrics: TransformerMetrics, settings: Settings,
        tracing: Tracing | None = None,
    ) -> None:
        self._scorer = scorer
        self._coalescer = coalescer
        self._admission = admission
        self._metrics = metrics
        self._tracing = tracing
        self._settings = settings
        self._random = Random(secrets.randbits(256))  # noqa: S311 - ids have to differ, nobody has to fail to guess them
        self._deadline_s = settings.deadline_ms / 1000.0
        self._refused = 0
        """Refusals that the metrics don't have yet: counting each would take longer than refusing it."""
        self.routes = HotRoutes()
        self._v1_path = f"/v1/models/{settings.model_name}:predict"
        self.routes.add(_SCORE, self._score)
        self.routes.add(self._v1_path, self._v1)

    def _score(self, request: HotRequest) -> bool:
        return self._take(request, _SCORE)

    def _v1(self, request: HotRequest) -> bool:
        return self._take(request, self._v1_path)

    def _take(self, request: HotRequest, path: str) -> bool:
        scorer, headers = self._scorer, request.headers
        if not scorer.active or len(request.body) > self._settings.body_bytes_max or (path is not _SCORE and _LENGTH in headers):
            return False
        if self._admission.full:  # said before anything is read: at twice the load there is half as much time for it
            self._refuse(request, path)
            return True
        now = time.monotonic()
        deadline_s = self._deadline_s
        given_deadline = headers.get(_DEADLINE)
        if given_deadline is not None:
            if len(given_deadline) > 9 or not given_deadline.isdigit() or not given_deadline.strip(b"0"):
                return False
            deadline_s = min(deadline_s, int(given_deadline) / 1000.0)
        given_id = headers.get(REQUEST_ID, b"")
        if len(given_id) > REQUEST_ID_CHARS_MAX or b"\t" in given_id:
            return False
        request_id = given_id.decode("ascii") or self._drawn_id()
        try:
            item: Any = orjson.loads(request.body)
            if path is not _SCORE:
                item = only_instance(item)
            plan = scorer.plan
            row = parse_row(plan, item, request_id=request_id, now_s=scorer.clock().timestamp())
        except (orjson.JSONDecodeError, RowInvalidError, NotHotError):
            return False
        if self._tracing is None:
            context = Context(request_id, arm_of(headers), Deadline(now + deadline_s), request.arrived, trace_lines(headers))
            done = self._done
        else:
            context = _traced(self._tracing, request, path, request_id, Deadline(now + deadline_s))
            done = self._done if context.span is None else self._done_traced
        waiting = Waiting(plan, item, row, context, request, done, None if path is _SCORE else as_v1)
        self._admission.enter()
        try:
            self._admission.ask(self._admission.client(headers, request.client), 1, now)
        except RateLimitedError as e:
            waiting.answer(e)
            return True
        except BaseException:
            self._admission.leave()
            raise
        self._coalescer.submit(waiting, alone=request.alone)
        return True

    def _drawn_id(self) -> str:
        return f"{self._random.getrandbits(128):032x}"

    def _refuse(self, request: HotRequest, path: str) -> None:
        """503 at once. What is said is the same for all, but for the request's id."""
        request_id = request_id_of(request.headers.get(REQUEST_ID)) or self._drawn_id()
        request.respond(b"%sx-request-id: %s\r\n" % (_OVERLOADED_HEAD, request_id.encode("ascii")), _OVERLOADED_BODY, _OVERLOADED.status)
        if not self._refused:
            asyncio.get_running_loop().call_later(_COUNT_S, self._count_refused)
        self._refused += 1
        if self._tracing is not None:
            self._record_refused(self._tracing, request, path, request_id)

    def _record_refused(self, tracing: Tracing, request: HotRequest, path: str, request_id: str) -> None:
        """The span of a request that was refused; nobody waits for it."""
        try:
            span = tracing.request(request.headers, span_name(path), request.arrived)
            if span is not None:
                span.add({**request_facts(path, request_id, arm_of(request.headers)), **model_facts(self._scorer)})
                span.answered(_OVERLOADED.status, _OVERLOADED.kind)
        except Exception:  # the answer is out; a span that can't be written must not cost the connection
            log.exception("a span could not be written")

    def _count_refused(self) -> None:
        refused, self._refused = self._refused, 0
        served = self._scorer.served
        series = self._metrics.model(self._scorer.plan.contract.name, served.model_version if served else "none")
        series.requests.inc(refused)
        series.error(_OVERLOADED.kind, refused)
        FAILURES.warning(time.monotonic(), f"{refused} requests were answered 503", kind=_OVERLOADED.kind, status=_OVERLOADED.status)

    def _done(self, waiting: Waiting, result: Result) -> None:
        self._admission.leave()
        self._respond(waiting, result)

    def _done_traced(self, waiting: Waiting, result: Result) -> None:
        """`_done` of a request that is recorded. Its span ends behind the answer: nobody waits for it."""
        self._done(waiting, result)
        span = waiting.context.span
        if span is None:
            return
        try:
            span.add(model_facts(self._scorer))
            if isinstance(result, ScoringError):
                span.answered(result.status, result.kind)
            else:
                span.add({"hafnium.model.version": result["model_version"], "hafnium.degraded": result["degraded"], "hafnium.rows": 1})
                span.answered(200, None)
        except Exception:  # the answer is out; a span that can't be written must not cost the connection
            log.exception("a span could not be written")

    def _respond(self, waiting: Waiting, result: Result) -> None:
        context, request = waiting.context, waiting.request
        echo = b"x-request-id: %s\r\n" % context.request_id.encode("ascii")
        contract = waiting.plan.contract
        served = self._scorer.served
        series = self._metrics.model(contract.name, served.model_version if served else "none")
        series.requests.inc()
        if isinstance(result, ScoringError):
            retry = b"".join(b"%s: %s\r\n" % h for h in retry_after(result))
            series.error(result.kind)
            if result.status >= 500:
                FAILURES.warning(
                    time.monotonic(), f"answered {result.status}", request_id=context.request_id, kind=result.kind,
                    status=result.status, trace_id=context.span and context.span.trace_id,
                )
            request.respond(_PROBLEM_HEAD + echo + retry, orjson.dumps(result.document()), result.status)
        else:
            shown = result if waiting.shown_as is None else waiting.shown_as(result)
            request.respond(b"content-type: application/json\r\n" + echo, orjson.dumps(shown))
        series.duration.observe(time.perf_counter() - context.started)


class NotHotError(Exception):
    """A form of V1 that is the gate's business."""


def only_instance(body: Any) -> Any:
    """The row of `{"instances": [row]}`. Raises NotHotError for every other form."""
    if type(body) is not dict or list(cast(dict[str, Any], body)) != ["instances"]:
        raise NotHotError
    instances: Any = body["instances"]
    if type(instances) is not list or len(cast(list[Any], instances)) != 1:
        raise NotHotError
    return instances[0]


def as_v1(result: dict[str, Any]) -> dict[str, Any]:
    """An answer in V1's form."""
    return {"predictions": [result]}


def _traced(tracing: Tracing, request: HotRequest, path: str, request_id: str, deadline: Deadline) -> Context:
    headers = request.headers
    arm = arm_of(headers)
    span = tracing.accept(headers, span_name(path), request.arrived)
    if isinstance(span, bytes):
        return Context(request_id, arm, deadline, request.arrived, span)
    span.add(request_facts(path, request_id, arm))
    return Context(request_id, arm, deadline, request.arrived, b"", span)
