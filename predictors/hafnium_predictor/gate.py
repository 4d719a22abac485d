"""The outermost ASGI app: answers the hot and the operational routes itself and passes everything else to KServe's app.

Hot is V2 with binary tensors, which is what the transformer sends: bytes in, one `session.run`, bytes out, without the
SDK's pydantic models and lists, which cost ten times the inference. V1 and V2 JSON go through the SDK, with a limit on the
body before it and RFC 9457 documents in place of its errors. A later protocol below ASGI answers `infer_binary` and leaves
the rest here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson

from hafnium_contract.asgi import (
    JSON_TYPE,
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
from hafnium_contract.trace_context import REQUEST_ID, request_id_of, request_ids_of, without_repeated
from hafnium_contract.v2_binary import LENGTH_HEADER, TensorError, decode_request, encode_answer
from hafnium_contract.wire import CONTRACT_HEADER, DEADLINE_HEADER, MODEL_DIGEST_HEADER, MODEL_VERSION_HEADER
from hafnium_predictor.engine import Engine
from hafnium_predictor.errors import AnswerError, DeadlineError, RowsError
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_predictor.model import SPAN, RiskModel, check_contract
from hafnium_predictor.request_spans import model_facts, request_facts
from hafnium_predictor.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan, Tracing

log = logging.getLogger("hafnium.predictor")
FAILURES = Sampled(log, lines_per_s=10.0)
"""One line for an answer of 5xx or 409, so that an id, or one of those of a batch, is found in ours."""
_CONTRACT = CONTRACT_HEADER.encode()
_LENGTH = LENGTH_HEADER.encode()
_DEADLINE = DEADLINE_HEADER.encode()
_OCTETS: Header = (b"content-type", b"application/octet-stream")
_TITLES = {400: "Bad request", 404: "Not found", 405: "Method not allowed", 501: "Not implemented", 503: "Not ready"}
KINDS = {400: "bad_request", 404: "not_found", 409: "contract_mismatch", 413: "too_large", 501: "not_implemented",
          503: "not_ready", 504: "deadline"}

_VALUES_SPARE = 1000
"""For names, shapes and parameters of V2."""

Handler = Callable[[Scope, Receive], Awaitable[Answer]]


class Gate:
    """ASGI app around KServe's."""

    def __init__(
        self, inner: App, model: RiskModel, metrics: PredictorMetrics, settings: Settings, tracing: Tracing | None = None,
    ) -> None:
        self._inner = inner
        self._model = model
        self._metrics = metrics
        self._tracing = tracing
        self._bytes_max = settings.body_bytes_max
        self._rows_max = settings.rows_max
        name = self._name = settings.model_name
        self._infer_path = f"/v2/models/{name}/infer"
        self._inference = {self._infer_path, f"/v1/models/{name}:predict"}
        self._operational: dict[tuple[str, str], Callable[[], Answer]] = {
            ("GET", f"/v1/models/{name}/contract"): self._contract,
            ("GET", "/health/live"): lambda: Answer(200, (JSON_TYPE,), b'{"live":true}'),
            ("GET", "/health/ready"): self._ready,
            ("GET", "/v2/health/ready"): self._ready,
            ("GET", "/metrics"): metrics_answer,
        }
        self._facts: tuple[Engine, tuple[Header, ...]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        path: str = scope["path"]
        if path in self._inference and scope["method"] == "POST":
            await self._answer_inference(scope, receive, send)
        elif (operational := self._operational.get((scope["method"], path))) is not None:
            await send_answer(send, operational())
        elif path.startswith("/v2/repository"):
            # The SDK lets anybody unload the model by a POST. A process serves one bundle for its whole life.
            await send_answer(send, problem_answer(501, "Not implemented", "models are not loaded or unloaded over HTTP"))
        elif scope["method"] not in ("GET", "HEAD"):
            # The SDK would read any body whole, for models and routes that aren't here
            await refuse_unread(receive, send, no_such_route(scope, self._name), self._bytes_max)
        else:
            await self._inner(scope, receive, send)

    async def _answer_inference(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        headers = without_repeated(scope["headers"], headers_of(scope))
        kind: str | None = None
        span: LiveSpan | None = None
        if self._tracing is not None:
            span = self._tracing.request(headers, f"POST {scope['path']}", start)
            SPAN.set(span)
        try:
            answer = await self._infer(scope, headers, receive)
        except ClientGoneError:
            self._metrics.answered(time.perf_counter() - start, "client_gone")
            if span is not None:
                span.end("client_gone")
            return
        except BodyTooLargeError as e:
            answer = problem_answer(413, "Content too large", str(e), headers=self._identity())
        except AnswerError as e:
            answer = problem_answer(e.status, e.title, str(e), headers=self._identity())
            kind = e.kind
        if answer.status >= 400 and kind is None:
            kind = KINDS.get(answer.status, "internal")
        if answer.status >= 400 and (request_id := request_id_of(headers.get(REQUEST_ID))):
            answer = replace(answer, headers=(*answer.headers, (REQUEST_ID, request_id.encode("ascii"))))
        await send_answer(send, answer)
        self._metrics.answered(time.perf_counter() - start, kind)
        if answer.status >= 500 or answer.status == 409:
            FAILURES.warning(
                time.monotonic(), f"answered {answer.status}", request_id=request_ids_of(headers.get(REQUEST_ID)) or None, kind=kind,
                status=answer.status, trace_id=span and span.trace_id,
            )
        if span is not None:
            engine = self._model.engine_or_none
            span.add({**request_facts(scope["path"], headers), **({} if engine is None else model_facts(engine))})
            span.answered(answer.status, kind)

    async def _infer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Answer:
        body = await read_body(headers, receive, self._bytes_max)
        engine = self._model.loaded
        digest = headers.get(_CONTRACT)
        if digest is not None:
            check_contract(engine, digest.decode("latin-1"))
        deadline = headers.get(_DEADLINE)
        if deadline is not None and not positive(deadline):
            raise DeadlineError(f"{DEADLINE_HEADER}: {deadline.decode('latin-1')[:20]} ms are left")
        length = headers.get(_LENGTH)
        if length is not None and scope["path"] == self._infer_path:
            if given_twice(scope, _LENGTH):
                raise RowsError(f"{LENGTH_HEADER}: given twice")
            return self.infer_binary(engine, body, length)
        return await self._through_sdk(scope, body, engine.rows_max * (engine.columns + 1) + _VALUES_SPARE)

    def infer_binary(self, engine: Engine, body: bytes, length: bytes) -> Answer:
        """V2 body with binary tensors → answer. Raises AnswerError."""
        try:
            request = decode_request(body, length, engine.columns, engine.rows_max)
        except TensorError as e:
            raise RowsError(str(e)) from e
        score, interval = engine.run(request.matrix)
        if self._tracing is not None and (span := SPAN.get()) is not None:
            span.add({"hafnium.rows": len(score)})
        manifest = engine.bundle.manifest
        header_length, out = encode_answer(score, interval, manifest.model_name, manifest.model_version, request)
        if header_length is None:
            return Answer(200, (JSON_TYPE, *self._identity()), out)
        return Answer(200, (_OCTETS, (_LENGTH, str(header_length).encode()), *self._identity()), out)

    async def _through_sdk(self, scope: Scope, body: bytes, values_max: int) -> Answer:
        """KServe's own app. It takes any body that is not labelled JSON for bytes and fails on it, so JSON it is called.

        Python's parser, which the app uses for V2, takes Infinity and NaN for JSON, and its answer about them then can't be written.
        """
        try:
            parsed: Any = orjson.loads(body)
        except orjson.JSONDecodeError as e:
            raise RowsError(f"the body is not JSON: {e}") from e
        if holds_more_than(parsed, values_max):  # the app would convert all of them before anybody looks how many there are
            raise RowsError(f"the body holds more values than the {self._rows_max} rows that are taken at most")
        if nested_too_deep(parsed):  # the app fails somewhere below Python's limit of recursion
            raise RowsError(f"the body is nested deeper than {NESTING_MAX}")
        kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-type", _LENGTH) and not k.startswith(b"ce-")]
        answer = await call(self._inner, {**scope, "headers": [*kept, JSON_TYPE]}, body)
        if answer.status < 400:
            headers = [h for h in answer.headers if h[0] != b"content-length"]
            return Answer(answer.status, (*headers, *self._identity()), answer.body)
        status = 400 if answer.status == 422 else answer.status
        if status >= 500 and status not in (501, 503):
            log.error("SDK answered %d: %s", status, answer.body[:500])
        return problem_answer(status, _TITLES.get(status, "Error"), _sdk_detail(answer.body), headers=self._identity())

    def _identity(self) -> tuple[Header, ...]:
        """Headers that say which model answered."""
        engine = self._model.engine_or_none
        if engine is None:
            return ()
        if self._facts is None or self._facts[0] is not engine:
            m = engine.bundle.manifest
            facts = ((CONTRACT_HEADER, m.contract_digest), (MODEL_VERSION_HEADER, m.model_version),
                     (MODEL_DIGEST_HEADER, m.digest))
            self._facts = (engine, tuple((k.encode(), v.encode()) for k, v in facts))
        return self._facts[1]

    def _contract(self) -> Answer:
        engine = self._model.engine_or_none
        if engine is None:
            return problem_answer(503, "Model not ready", self._model.reason)
        manifest = engine.bundle.manifest
        body = {
            "model_name": manifest.model_name, "model_version": manifest.model_version, "model_digest": manifest.digest,
            "contract_digest": manifest.contract_digest, "contract": engine.bundle.contract.model_dump(mode="json"),
        }
        return Answer(200, (JSON_TYPE, *self._identity()), json.dumps(body).encode())

    def _ready(self) -> Answer:
        missing = others_missing()
        if self._model.ready and missing:
            return problem_answer(503, "Model not ready", f"{missing} workers are not ready yet")
        if self._model.ready:
            return Answer(200, (JSON_TYPE, *self._identity()), b'{"ready":true}')
        return problem_answer(503, "Model not ready", self._model.reason or "stopping")


def positive(milliseconds: bytes) -> bool:
    """Whether a deadline is still to come."""
    try:
        return float(milliseconds) > 0.0
    except ValueError:
        return True  # a deadline that can't be read is no reason to refuse a request


def _sdk_detail(body: bytes) -> str:
    try:
        parsed: Any = json.loads(body)
    except ValueError:
        return body[:300].decode("utf-8", "replace")
    if isinstance(parsed, dict):
        detail: Any = parsed.get("error") or parsed.get("detail") or parsed
        if isinstance(detail, list):
            # FastAPI's list of what its models missed, which repeats the input: keep place and message only
            parts = [f"{'.'.join(str(x) for x in d.get('loc', ()))}: {d.get('msg', '')}" for d in detail if isinstance(d, dict)]
            return "; ".join(parts[:5])
        return str(detail)[:500]
    return str(parsed)[:300]
