"""The hot route of the transformer: `POST /v1/score`, answered below ASGI; rows of many requests share lookups and predictions.

What is unusual goes back to the gate, from its first byte: a row that breaks the contract, a body that is no JSON, a deadline
that can't be read. What becomes of a good row later (store or predictor gone, time over) is answered here, in the gate's words.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from random import Random
from typing import Any

import orjson

from hafnium_contract.asgi import PROBLEM_TYPE
from hafnium_contract.serving.hot_protocol import HotRequest, HotRoutes
from hafnium_contract.wire import DEADLINE_HEADER, REQUEST_ID_HEADER
from hafnium_transformer.admission import Admission
from hafnium_transformer.coalescing import Coalescer, Waiting
from hafnium_transformer.errors import OverloadedError, RateLimitedError, RowInvalidError, ScoringError
from hafnium_transformer.gate import FAILURES, arm_of, retry_after
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.predictor_client import Deadline
from hafnium_transformer.rows import TEXT_MAX, parse_row
from hafnium_transformer.scoring import Context, Result, Scorer
from hafnium_transformer.settings import Settings

_REQUEST_ID, _DEADLINE = REQUEST_ID_HEADER.encode(), DEADLINE_HEADER.encode()
_TRACE = (b"traceparent", b"tracestate")
_PROBLEM_HEAD = b"%s: %s\r\n" % PROBLEM_TYPE


class HotPath:
    """Handler of the hot route over one scorer."""

    def __init__(
        self, scorer: Scorer, coalescer: Coalescer, admission: Admission, metrics: TransformerMetrics, settings: Settings,
    ) -> None:
        self._scorer = scorer
        self._coalescer = coalescer
        self._admission = admission
        self._metrics = metrics
        self._settings = settings
        self._random = Random(secrets.randbits(256))  # noqa: S311 - ids have to differ, nobody has to fail to guess them
        self._deadline_s = settings.deadline_ms / 1000.0
        self.routes = HotRoutes()
        self.routes.add("/v1/score", self._score)

    def _score(self, request: HotRequest) -> bool:
        scorer, headers = self._scorer, request.headers
        if not scorer.active or len(request.body) > self._settings.body_bytes_max:
            return False
        now = time.monotonic()
        deadline_s = self._deadline_s
        given_deadline = headers.get(_DEADLINE)
        if given_deadline is not None:
            if len(given_deadline) > 9 or not given_deadline.isdigit() or not given_deadline.strip(b"0"):
                return False
            deadline_s = min(deadline_s, int(given_deadline) / 1000.0)
        given_id = headers.get(_REQUEST_ID, b"")
        if len(given_id) > TEXT_MAX:
            return False
        request_id = given_id.decode("latin-1") or f"{self._random.getrandbits(128):032x}"
        try:
            item: Any = orjson.loads(request.body)
            plan = scorer.plan
            row = parse_row(plan, item, request_id=request_id, now_s=scorer.clock().timestamp())
        except (orjson.JSONDecodeError, RowInvalidError):
            return False
        context = Context(request_id, arm_of(headers), Deadline(now + deadline_s), request.arrived, _passed_on(headers, request_id))
        waiting = Waiting(plan, item, row, context, request, self._done)
        try:
            self._admission.enter()
        except OverloadedError as e:
            self._respond(waiting, e)
            return True
        try:
            self._admission.ask(self._admission.client(headers, request.client), 1, now)
        except RateLimitedError as e:
            self._done(waiting, e)
            return True
        self._coalescer.submit(waiting)
        return True

    def _done(self, waiting: Waiting, result: Result) -> None:
        self._admission.leave()
        self._respond(waiting, result)

    def _respond(self, waiting: Waiting, result: Result) -> None:
        context, request = waiting.context, waiting.request
        echo = b"x-request-id: %s\r\n" % context.request_id.encode("latin-1")
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
                    status=result.status,
                )
            request.respond(_PROBLEM_HEAD + echo + retry, orjson.dumps(result.document()), result.status)
        else:
            request.respond(b"content-type: application/json\r\n" + echo, orjson.dumps(result))
        series.duration.observe(time.perf_counter() - context.started)


def _passed_on(headers: Mapping[bytes, bytes], request_id: str) -> bytes:
    lines = b"%s: %s\r\n" % (_REQUEST_ID, request_id.encode("latin-1"))
    for name in _TRACE:
        value = headers.get(name)
        if value is not None:
            lines += b"%s: %s\r\n" % (name, value)
    return lines
