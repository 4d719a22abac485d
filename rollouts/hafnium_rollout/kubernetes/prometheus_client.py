"""Prometheus' HTTP API: an instant query, and a check of a query. Every call has a time and a size limit.

What isn't certain is an error and never a number: a failed or partial answer (`warnings`), NaN, infinity, more series than asked for.

Many rollouts ask one server. When it doesn't answer one of them, that serves for all until the turn is over; and a turn has so much time
for Prometheus and no more (`begin_turn`), so that a slow one delays no rollback of another rollout.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlencode

import urllib3

from hafnium_contract.errors import HafniumError
from hafnium_rollout.kubernetes.kinds import Json

ANSWER_BYTES_MAX = 32 * 1024 * 1024
"""200 pods with 50 series each are 3 MB."""
_READ_BYTES = 256 * 1024


class PrometheusError(HafniumError):
    """Prometheus can't be asked, or its answer can't be used. The message says which query and why."""


@dataclass(frozen=True, slots=True)
class Sample:
    labels: Mapping[str, str]
    value: float
    """Never NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Samples of one evaluation."""

    at: float
    """The evaluation's time by Prometheus' clock, in Unix seconds; 0 when there is no sample to tell it."""
    samples: tuple[Sample, ...]


class Prometheus:
    """One server. Safe between threads. `clock` is a seam for tests."""

    def __init__(
        self, url: str, timeout_s: float = 5.0, connections_max: int = 16, *, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._pool = urllib3.PoolManager(maxsize=connections_max, retries=False)
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None
        """When this turn's time is over; None: no turn has begun, so there is no limit but each query's own."""
        self._turn_s = 0.0
        self._failed: tuple[float, str] | None = None
        """When it did not answer last, and how."""

    def begin_turn(self, seconds: float) -> None:
        """From now on all queries together may take so long. A failure is forgotten, unless it was a moment ago."""
        now = self._clock()
        with self._lock:
            self._until, self._turn_s = now + seconds, seconds
            if self._failed is not None and now - self._failed[0] >= self._timeout_s:
                self._failed = None

    @property
    def url(self) -> str:
        return self._url

    def query(self, expression: str, at: float | None = None) -> Answer:
        """Evaluates an expression at a time (now by Prometheus' clock without one). Raises PrometheusError."""
        fields = {"query": expression, "timeout": f"{self._timeout_s:g}s"} | ({"time": f"{at:.3f}"} if at is not None else {})
        data = cast("Json", self._ask("query", fields).get("data") or {})
        kind, result = data.get("resultType"), data.get("result")
        if kind == "scalar" and isinstance(result, list):
            return self._answer([{"metric": {}, "value": result}], expression)
        if kind != "vector" or not isinstance(result, list):
            raise PrometheusError(f"query {_short(expression)}: it gives a {kind}, expected a vector or a scalar")
        return self._answer(cast("list[Json]", result), expression)

    def problem_of(self, expression: str) -> str:
        """What is wrong with an expression; empty when it can be parsed. Raises PrometheusError when Prometheus can't be asked."""
        status, body = self._send("parse_query", {"query": expression})
        if status == 404:  # an older or another server: evaluate it instead
            status, body = self._send("query", {"query": expression, "timeout": f"{self._timeout_s:g}s"})
        if status == 400:
            return str(body.get("error") or "it can't be parsed")
        if status != 200:
            raise PrometheusError(f"{self._url} answered {status}: {body.get('error') or 'no message'}")
        return ""

    def _answer(self, result: list[Json], expression: str) -> Answer:
        samples: list[Sample] = []
        at = 0.0
        for row in result:
            try:
                when, text = row["value"]
                value, at = float(text), float(when)
                labels = {str(k): str(v) for k, v in row["metric"].items()}
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise PrometheusError(f"query {_short(expression)}: a sample can't be read: {e!r}") from e
            if not math.isfinite(value):
                raise PrometheusError(f"query {_short(expression)}: it gives {text}, which is no count")
            samples.append(Sample(labels, value))
        return Answer(at, tuple(samples))

    def _ask(self, path: str, fields: Mapping[str, str]) -> Json:
        status, body = self._send(path, fields)
        if status != 200 or body.get("status") != "success":
            raise PrometheusError(
                f"query {_short(fields.get('query', ''))}: {self._url} answered {status}: {body.get('error') or 'no message'}")
        if body.get("warnings"):
            raise PrometheusError(f"query {_short(fields.get('query', ''))}: only a part could be read: {body['warnings']}")
        return body

    def _left_s(self) -> float:
        """How long a query may take. Raises PrometheusError when it needn't be tried."""
        with self._lock:
            failed, until = self._failed, self._until
        if failed is not None:
            raise PrometheusError(failed[1])  # in the same words: what is said again and again is logged once
        left = self._timeout_s + 1.0 if until is None else min(self._timeout_s + 1.0, until - self._clock())
        if left <= 0.0:
            raise PrometheusError(
                f"Prometheus at {self._url} is slow: the {self._turn_s:g} s that a turn has for it are used up; who wasn't looked at comes "
                "first in the next")
        return left

    def _send(self, path: str, fields: Mapping[str, str]) -> tuple[int, Json]:
        left_s = self._left_s()
        end = self._clock() + left_s
        try:
            answer = self._pool.request(
                "POST", f"{self._url}/api/v1/{path}", body=urlencode(fields), preload_content=False, redirect=False,
                headers={"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"},
                timeout=urllib3.Timeout(total=left_s),
            )
            data = self._body(answer, end)
        except (urllib3.exceptions.HTTPError, OSError) as e:
            text = f"Prometheus at {self._url} can't be asked: {e}"
            with self._lock:
                if self._until is not None and left_s > self._timeout_s:  # else it may have been the turn's end, which is no fault of its
                    self._failed = (self._clock(), text)
            raise PrometheusError(text) from e
        if len(data) > ANSWER_BYTES_MAX:
            raise PrometheusError(f"Prometheus at {self._url}: an answer is larger than {ANSWER_BYTES_MAX} bytes")
        try:
            body: Any = json.loads(data)
        except ValueError:
            body = None
        if isinstance(body, dict):
            return answer.status, cast("Json", body)
        if answer.status in (404, 405):
            return 404, {}
        raise PrometheusError(f"Prometheus at {self._url} answered {answer.status} without JSON; is it Prometheus?")


    def _body(self, answer: urllib3.BaseHTTPResponse, end: float) -> bytes:
        """All of an answer, as long as it comes in time: a socket's own limit begins anew with every byte."""
        data = bytearray()
        try:
            while part := answer.read1(_READ_BYTES):
                data += part
                if len(data) > ANSWER_BYTES_MAX:
                    break
                if self._clock() > end:
                    raise TimeoutError(f"{len(data)} bytes came, and not the rest")
        except BaseException:
            answer.close()
            raise
        answer.release_conn()
        return bytes(data)


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 120 else expression[:117] + "...")
