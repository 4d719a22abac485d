"""The outermost ASGI app: answers scoring, health and the contract itself, and passes everything else to KServe's app.

`/v1/score` and `/v1/score/batch` are ours, and so is V1 in its plain form. What else there is of KServe's V1 and V2 goes through its
SDK into `model.py` and comes back to the same scorer; since the SDK keeps no status of ours, the error travels beside it in a context
variable.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import orjson

from hafnium_contract.asgi import (
    JSON_TYPE,
    PROBLEM_TYPE,
    Answer,
    App,
    BodyTooLargeError,
    ClientGoneError,
    Header,
    Receive,
    Scope,
    Send,
    call,
    given_twice,
    headers_of,
    no_such_route,
    problem_answer,
    read_body,
    refuse_unread,
    send_answer,
)
from hafnium_contract.json_nesting import NESTING_MAX, holds_more_than, nested_too_deep
from hafnium_contract.serving.exposition import metrics_answer
from hafnium_contract.serving.json_log import Sampled
from hafnium_contract.serving.workers import others_missing
from hafnium_contract.trace_context import REQUEST_ID, request_id_of, trace_lines, without_repeated
from hafnium_contract.v2_binary import LENGTH_HEADER, TensorError, check_layout
from hafnium_contract.wire import ARM_HEADER, DEADLINE_HEADER
from hafnium_transformer.admission import Admission, overloaded
from hafnium_transformer.errors import DeadlineError, MalformedError, NotSupportedError, OverloadedError, ScoringError, SlowBodyError
from hafnium_transformer.failed_rows import FailedRows
from hafnium_transformer.metrics import ModelSeries, TransformerMetrics
from hafnium_transformer.openapi import document
from hafnium_transformer.predictor_client import Deadline
from hafnium_transformer.request_spans import batch_facts, model_facts, request_facts, span_name
from hafnium_transformer.rows import KEYS
from hafnium_transformer.scoring import Context, Result, Scorer
from hafnium_transformer.sdk_errors import sdk_detail
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan, Tracing

log = logging.getLogger("hafnium.transformer")
_DEADLINE = DEADLINE_HEADER.encode()
_ARM = ARM_HEADER.encode()
_LENGTH = LENGTH_HEADER.encode()
FAILURES = Sampled(log, lines_per_s=10.0)
"""One line for an answer of 5xx, so that an id from a caller's log is found in ours."""
_VALUES_OF_TENSOR = 20
"""Name, shape, datatype and parameters of one of V2's."""
_VALUES_SPARE = 1000
"""For what else a caller puts in."""
_READY_KEPT_S = 1.0
"""A readiness answer is kept this long, so that probes by many don't become load on the predictor."""
SHADOW_SUFFIX = "-shadow"


class Exchange:
    """One request's context on its way through the SDK, and the error that came of it."""

    def __init__(self, context: Context, charge: Callable[[int], None] | None = None) -> None:
        self.context = context
        self.charge = charge
        """Counts all rows for the client, in place of the one that was counted when nobody knew how many there are. Raises
        RateLimitedError."""
        self.error: ScoringError | None = None


EXCHANGE: ContextVar[Exchange] = ContextVar("hafnium_exchange")
"""Of the request in hand. The SDK is between the gates, HTTP's and gRPC's, and `model.py`."""


class Gate:
    """ASGI app around KServe's."""

    def __init__(
        self, inner: App, scorer: Scorer, admission: Admission, metrics: TransformerMetrics, settings: Settings,
        tracing: Tracing | None = None,
    ) -> None:
        self._inner = inner
        self._scorer = scorer
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._tracing = tracing
        self.stopping = False
        name = self._name = settings.model_name
        self._v1_path = f"/v1/models/{name}:predict"
        self._sdk_paths = {self._v1_path, f"/v2/models/{name}/infer"}
        self._contract_path = f"/v1/models/{name}/contract"
        self._ready_until = 0.0
        self._ready_reason = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        path: str = scope["path"]
        if path == "/v1/score" or path == "/v1/score/batch" or path in self._sdk_paths:
            if scope["method"] == "POST":
                await self._answer_scoring(scope, receive, send)
            else:
                await send_answer(send, problem_answer(405, "Method not allowed", "expected POST", headers=[(b"allow", b"POST")]))
        elif scope["method"] == "GET" and path in ("/health/ready", "/v2/health/ready"):
            await send_answer(send, await self._ready())
        elif scope["method"] == "GET" and path == "/health/live":
            await send_answer(send, Answer(200, (JSON_TYPE,), b'{"live":true}'))
        elif scope["method"] == "GET" and path == self._contract_path:
            await send_answer(send, self._contract())
        elif scope["method"] == "GET" and path == "/metrics":
            await send_answer(send, metrics_answer())
        elif scope["method"] == "GET" and path == "/openapi.json":
            await send_answer(send, self._openapi())
        elif path.startswith("/v2/repository"):
            # The SDK lets anybody unload the model by a POST
            await send_answer(send, problem_answer(501, "Not implemented", "models are not loaded or unloaded over HTTP"))
        elif scope["method"] not in ("GET", "HEAD"):
            # The SDK would read any body whole, for models and routes that aren't here
            await refuse_unread(receive, send, no_such_route(scope, self._name), self._settings.body_bytes_max)
        else:
            await self._inner(scope, receive, send)

    async def _answer_scoring(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers = without_repeated(scope["headers"], headers_of(scope))
        request_id = request_id_of(headers.get(REQUEST_ID)) or uuid.uuid4().hex
        echo: Header = (REQUEST_ID, request_id.encode("ascii"))
        span: LiveSpan | None = None
        if self._tracing is None:
            lines = trace_lines(headers)
        else:
            path: str = scope["path"]
            found = self._tracing.accept(headers, span_name(path), started)
            lines = b""
            if isinstance(found, bytes):
                lines = found
            else:
                span = found
                span.add(request_facts(path, request_id, arm_of(headers)))
        kind: str | None = None
        entered = False
        try:
            if self._admission.full:  # said before the body is read
                raise overloaded()
            deadline = deadline_of(headers, self._settings.deadline_ms)
            context = Context(request_id, arm_of(headers), deadline, started, lines, span)
            try:
                async with asyncio.timeout(context.deadline.left_s()):
                    body = await read_body(headers, receive, self._settings.body_bytes_max)
            except TimeoutError as e:
                raise SlowBodyError("the body did not come within the time given for the answer") from e
            self._admission.enter()  # who only sends slowly takes nobody's place
            entered = True
            answer, kind = await self._score(scope, headers, body, context, echo)
        except ClientGoneError:
            self._count(started, "client_gone")
            if span is not None:
                span.end("client_gone")
            return
        except BodyTooLargeError as e:
            kind = "too_large"
            answer = problem_answer(413, "Content too large", str(e), headers=[echo])
        except ScoringError as e:
            kind = e.kind
            answer = _error_answer(e, echo)
        except Exception:  # whatever was not foreseen is our fault: a 500 with no inside showing, and a trace in the log
            log.exception("request failed", extra={"request_id": request_id})
            kind = "internal"
            answer = problem_answer(500, "Internal error", "the request could not be answered", headers=[echo])
        finally:
            if entered:
                self._admission.leave()
        await send_answer(send, answer)
        self._count(started, kind)
        if answer.status >= 500:
            FAILURES.warning(
                time.monotonic(), f"answered {answer.status}", request_id=request_id, kind=kind, status=answer.status,
                trace_id=span and span.trace_id,
            )
        if span is not None:
            span.add(model_facts(self._scorer))
            span.answered(answer.status, kind)

    def _count(self, started: float, kind: str | None) -> None:
        counted(self._scorer, self._metrics, self._settings, started, kind)

    async def _score(
        self, scope: Scope, headers: dict[bytes, bytes], body: bytes, context: Context, echo: Header,
    ) -> tuple[Answer, str | None]:
        """The answer, and the type of error that it counts as although it is one of 200."""
        if scope["path"] == "/v1/score":
            item = _json(body)
            self._ask(scope, headers, 1)
            result = (await self._scorer.score([item], context))[0]
            if isinstance(result, ScoringError):
                raise result
            if context.span is not None:
                context.span.add(batch_facts([result]))
            return Answer(200, (JSON_TYPE, echo), orjson.dumps(result)), None
        if scope["path"] == "/v1/score/batch":
            items = batch_items(_json(body), "requests", self._settings.batch_rows_max)
            self._ask(scope, headers, len(items))
            results = await self._scorer.score(items, context, [f"requests[{i}]" for i in range(len(items))])
            if context.span is not None:
                context.span.add(batch_facts(results))
            shown = [r.document() if isinstance(r, ScoringError) else r for r in results]
            return Answer(200, (JSON_TYPE, echo), orjson.dumps({"results": shown})), self._count_rows(results, context)
        if scope["path"] == self._v1_path and _LENGTH not in headers and (instances := self._plain_v1(body)) is not None:
            self._ask(scope, headers, len(instances))
            answers = await self._scorer.score_all(instances, context, [f"instances[{i}]" for i in range(len(instances))])
            if context.span is not None:
                context.span.add(batch_facts(answers))
            return Answer(200, (JSON_TYPE, echo), orjson.dumps({"predictions": answers})), None
        self._ask(scope, headers, 1)  # how many rows it has, only the SDK finds out
        return await self._through_sdk(scope, body, context, echo), None

    def _count_rows(self, results: Sequence[Result], context: Context) -> str | None:
        """Counts and logs the rows of a batch that failed. Returns the type of error that the whole counts as."""
        failed = FailedRows.of(results)
        for kind, count in failed.kinds.items():
            series_of(self._scorer, self._metrics, self._settings).row_errors(kind, count)
        if failed.ours:
            FAILURES.warning(
                time.monotonic(), f"answered 200, but 5xx for {failed.ours} of {len(results)} rows", request_id=context.request_id,
                kind=failed.ours_kind, status=200, trace_id=context.span and context.span.trace_id,
            )
        return failed.kind

    def _plain_v1(self, body: bytes) -> list[Any] | None:
        """The rows of `{"instances": [row, …]}`; None: another form, or the SDK is to answer all."""
        if not self._settings.hot_path:
            return None
        parsed = _json(body)
        if type(parsed) is not dict or list(cast(dict[str, Any], parsed)) != ["instances"] or nested_too_deep(parsed):
            return None
        instances: Any = parsed["instances"]
        if type(instances) is not list or not 1 <= len(cast(list[Any], instances)) <= self._settings.batch_rows_max:
            return None
        return cast(list[Any], instances)

    def _ask(self, scope: Scope, headers: dict[bytes, bytes], rows: int, already: int = 0) -> None:
        peer = scope.get("client")
        self._admission.ask(self._admission.client(headers, peer[0] if peer else ""), rows, time.monotonic(), already)

    async def _through_sdk(self, scope: Scope, body: bytes, context: Context, echo: Header) -> Answer:
        """KServe's own app. Without a length header V2's body is JSON, and V1's always is, whatever its label says."""
        exchange = Exchange(context, lambda rows: self._ask(scope, headers_of(scope), rows, already=1))
        token = EXCHANGE.set(exchange)
        try:
            length = headers_of(scope).get(_LENGTH)
            binary = length is not None
            if length is not None:
                if given_twice(scope, _LENGTH):
                    raise MalformedError(f"{LENGTH_HEADER}: given twice")
                try:
                    check_layout(body, length)
                except TensorError as e:
                    raise MalformedError(str(e)) from e
            else:
                self._check_json(_json(body))  # Python's parser takes Infinity for JSON, too, and the app's answer can't be written
            kept = [(k, v) for k, v in scope["headers"] if k != b"content-type" and not k.startswith(b"ce-")]
            label: Header = (b"content-type", b"application/octet-stream") if binary else JSON_TYPE
            answer = await call(self._inner, {**scope, "headers": [*kept, label]}, body)
        finally:
            EXCHANGE.reset(token)
        if exchange.error is not None:
            raise exchange.error
        if answer.status < 400:
            sdk_headers = [h for h in answer.headers if h[0] != b"content-length"]
            return Answer(answer.status, (*sdk_headers, echo), answer.body)
        if answer.status in (400, 422) or binary:
            # The SDK decodes binary bodies without checks, and fails with 500 on those that are not well formed
            raise MalformedError(f"KServe could not read the request: {sdk_detail(answer.body)}")
        if answer.status == 501:
            raise NotSupportedError(sdk_detail(answer.body))
        raise ScoringError(f"KServe answered {answer.status}: {sdk_detail(answer.body)}")

    def _check_json(self, parsed: Any) -> None:
        """What the SDK would take a second for, or fail on. Raises MalformedError."""
        rows = self._settings.batch_rows_max
        plan = self._scorer.plan if self._scorer.active else None
        fields = 0 if plan is None else len(plan.fields) + len(plan.declared_keys) + len(KEYS)
        if plan is not None and holds_more_than(parsed, (2 * rows + _VALUES_OF_TENSOR) * fields + _VALUES_SPARE):
            raise MalformedError(f"the body holds more than {rows} rows of {fields} fields do")
        if nested_too_deep(parsed):
            raise MalformedError(f"the body is nested deeper than {NESTING_MAX}")

    async def _ready(self) -> Answer:
        if self.stopping:
            return problem_answer(503, "Not ready", "stopping")
        now = time.monotonic()
        if now >= self._ready_until:
            missing = others_missing()
            self._ready_reason = await self._scorer.not_ready() or (f"{missing} workers are not ready yet" if missing else "")
            self._ready_until = time.monotonic() + _READY_KEPT_S
        if self._ready_reason:
            return problem_answer(503, "Not ready", self._ready_reason)
        return Answer(200, (JSON_TYPE,), b'{"ready":true}')

    def _contract(self) -> Answer:
        served = self._scorer.served
        if served is None:
            return problem_answer(503, "Not ready", self._scorer.reason)
        contract = served.contract
        return Answer(200, (JSON_TYPE,), orjson.dumps({
            "model_name": contract.name, "model_version": served.model_version, "model_digest": served.model_digest,
            "contract_digest": contract.digest, "contract": contract.model_dump(mode="json"),
        }))

    def _openapi(self) -> Answer:
        served = self._scorer.served
        if served is None:
            return problem_answer(503, "Not ready", self._scorer.reason)
        made = document(self._scorer.plan, self._settings.model_name, served.model_version, self._settings.batch_rows_max)
        return Answer(200, (JSON_TYPE,), orjson.dumps(made))


def series_of(scorer: Scorer, metrics: TransformerMetrics, settings: Settings) -> ModelSeries:
    """Series of the model that is in force."""
    served = scorer.served
    return metrics.model(served.contract.name if served else settings.model_name, served.model_version if served else "none")


def counted(scorer: Scorer, metrics: TransformerMetrics, settings: Settings, started: float, kind: str | None) -> None:
    """One request was answered. `kind`: of its error, None for success."""
    series = series_of(scorer, metrics, settings)
    series.requests.inc()
    if kind != OverloadedError.kind:  # refused unread: thousands of them would make an overload look fast
        series.duration.observe(time.perf_counter() - started)
    if kind is not None:
        series.error(kind)


def deadline_of(headers: Mapping[bytes, bytes], deadline_ms: float) -> Deadline:
    """When the answer is due: what the caller gives, at most `deadline_ms`. Raises MalformedError or DeadlineError."""
    given = headers.get(_DEADLINE)
    if given is not None:
        try:
            deadline_ms = min(deadline_ms, float(given))
        except ValueError as e:
            raise MalformedError(f"{DEADLINE_HEADER}: expected milliseconds, got {given[:20]!r}") from e
        if not deadline_ms > 0.0:
            raise DeadlineError(f"{DEADLINE_HEADER}: {given.decode('latin-1')[:20]} ms are left")
    return Deadline.after_ms(deadline_ms)


def arm_of(headers: Mapping[bytes, bytes]) -> str:
    """`shadow` for a mirrored copy (Envoy puts -shadow behind its host's name), else what the gateway says."""
    host = headers.get(b"host", b"").decode("latin-1")
    if host.partition(":")[0].endswith(SHADOW_SUFFIX) or host.endswith(SHADOW_SUFFIX):
        return "shadow"
    return "candidate" if headers.get(_ARM) == b"candidate" else "stable"


def batch_items(data: Any, key: str, rows_max: int) -> list[Any]:
    """The list of rows under `key`. Raises MalformedError."""
    items: Any = cast(dict[str, Any], data).get(key) if isinstance(data, dict) else None
    if not isinstance(items, list) or not 1 <= len(cast(list[Any], items)) <= rows_max:
        got = f"{len(cast(list[Any], items))} rows" if isinstance(items, list) else "no such list"
        raise MalformedError(f'expected {{"{key}": [1 to {rows_max} rows]}}, got {got}')
    return cast(list[Any], items)


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise MalformedError(f"body: not JSON: {e}") from e


def _error_answer(e: ScoringError, echo: Header) -> Answer:
    # Its traceback leads to a frame that holds it: a cycle, with the request's body in it, which the collector seldom looks for
    e.__traceback__ = None
    return Answer(e.status, (PROBLEM_TYPE, echo, *retry_after(e)), orjson.dumps(e.document()))


def retry_after(e: ScoringError) -> tuple[Header, ...]:
    """When to come again, in whole seconds."""
    return ((b"retry-after", b"%d" % math.ceil(e.retry_after_s)),) if e.status in (429, 503) else ()
