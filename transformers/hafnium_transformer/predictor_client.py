"""The hop to the predictor: V2 with binary tensors over kept-alive connections, within the caller's deadline.

Scoring changes nothing, so a connection that breaks is tried again while budget and time last: that is what a restarted
predictor looks like. One that keeps failing is left alone for a while (breaker.py). The predictor's refusals keep their
meaning; the SDK's client would make all of them 500.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.errors import ContractError
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.v2_binary import LENGTH_HEADER, TensorError, decode_answer, request_header
from hafnium_contract.wire import (
    BATCH_ROWS_MAX,
    CONTRACT_HEADER,
    DEADLINE_HEADER,
    MODEL_DIGEST_HEADER,
    MODEL_VERSION_HEADER,
)
from hafnium_transformer.breaker import Breaker, RetryBudget
from hafnium_transformer.errors import (
    ContractChangedError,
    DeadlineError,
    OverloadedError,
    RefusedError,
    ScoringError,
    UnavailableError,
)
from hafnium_transformer.http_client import BrokenConnectionError, HttpAnswer, HttpClient, NotHttpError

Matrix = npt.NDArray[np.float32]
_DEADLINE = DEADLINE_HEADER.encode()
_LINES = f"content-type: application/octet-stream\r\n{LENGTH_HEADER}: %d\r\n{CONTRACT_HEADER}: %s\r\n".encode()
_ATTEMPTS_MAX = 3
_FAIR_S = 0.1
"""A predictor that did not answer within less than this has not failed."""
_RETRY_PAUSE_S = 0.03
"""A predictor that was killed closes its connections at once; its port may refuse for a moment while it comes back."""


@dataclass(frozen=True)
class Served:
    """What the predictor serves."""

    contract: ModelContract
    model_version: str
    model_digest: str


@dataclass(frozen=True)
class HopLimits:
    """How the hop treats connections and failures. Fields as in Settings."""

    connection_age_s: float = 60.0
    retry_share: float = 0.1
    retry_spare: float = 10.0
    failures_max: int = 5
    pause_first_s: float = 0.2
    pause_max_s: float = 5.0


class Prediction(NamedTuple):
    """Answer for a matrix: score [rows], interval [rows, 2], and who gave it."""

    score: Matrix
    interval: Matrix
    model_version: str
    model_digest: str


class Deadline(NamedTuple):
    """A moment on the monotonic clock by which the answer must be out."""

    at: float

    @staticmethod
    def after_ms(milliseconds: float) -> Deadline:
        return Deadline(time.monotonic() + milliseconds / 1000.0)

    def left_s(self) -> float:
        """Seconds that are left. Raises DeadlineError when none are."""
        left = self.at - time.monotonic()
        if left <= 0.0:
            raise DeadlineError("the time given for the answer is over")
        return left


class PredictorClient:
    """The predictor at one address, with what keeps a failing one from being asked too often."""

    def __init__(self, host: str, model_name: str, *, tls: bool, limits: HopLimits) -> None:
        self._client = HttpClient(host, tls=tls, connection_age_s=limits.connection_age_s)
        self._infer_path = f"/v2/models/{model_name}/infer"
        self._contract_path = f"/v1/models/{model_name}/contract"
        self.breaker = Breaker(limits.failures_max, limits.pause_first_s, limits.pause_max_s)
        self._budget = RetryBudget(limits.retry_share, limits.retry_spare)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    async def ready(self, timeout_s: float) -> str:
        """'' when the predictor is ready, else why not."""
        try:
            answer = await self._client.request("GET", "/health/ready", timeout_s=timeout_s)
        except OSError as e:  # TimeoutError is one
            return f"predictor can't be reached: {type(e).__name__}: {e}"
        return "" if answer.status == 200 else f"predictor is not ready: {_detail(answer.body)}"

    async def fetch_contract(self, timeout_s: float) -> Served:
        """The contract that the predictor serves. Raises UnavailableError that says why it can't be had."""
        try:
            answer = await self._client.request("GET", self._contract_path, timeout_s=timeout_s)
        except OSError as e:
            raise UnavailableError(f"the predictor's contract can't be fetched: {type(e).__name__}: {e}") from e
        if answer.status != 200:
            raise UnavailableError(f"the predictor's contract can't be fetched: {answer.status}: {_detail(answer.body)}")
        try:
            parsed = cast(dict[str, Any], json.loads(answer.body))
            contract = parse_contract(parsed["contract"], f"{self._client.authority}{self._contract_path}")
            served = Served(contract, str(parsed["model_version"]), str(parsed["model_digest"]))
            stated = str(parsed["contract_digest"])
        except (ValueError, KeyError, TypeError, ContractError) as e:
            raise UnavailableError(f"the predictor's contract can't be read: {type(e).__name__}: {e}") from e
        if stated != contract.digest:
            raise UnavailableError(
                f"the predictor states contract {stated}, what it sent has {contract.digest}: its Hafnium is of another version"
            )
        return served

    async def predict(self, matrix: Matrix, contract_digest: str, deadline: Deadline, passed_on: bytes) -> Prediction:
        """Encoded rows [rows, n] → Prediction. More rows than a request may hold go in several, one after the other.

        `passed_on`: header lines of request id and trace. Raises ScoringError of the kind that the predictor's answer means.
        """
        if len(matrix) <= BATCH_ROWS_MAX:
            return await self._predict(matrix, contract_digest, deadline, passed_on)
        parts = [
            await self._predict(matrix[i : i + BATCH_ROWS_MAX], contract_digest, deadline, passed_on)
            for i in range(0, len(matrix), BATCH_ROWS_MAX)
        ]
        if len({p.model_digest for p in parts}) > 1:
            raise UnavailableError("the predictor's model changed between the parts of a batch; send it again")
        return Prediction(
            np.concatenate([p.score for p in parts]), np.concatenate([p.interval for p in parts]),
            parts[0].model_version, parts[0].model_digest,
        )

    async def _predict(self, matrix: Matrix, contract_digest: str, deadline: Deadline, passed_on: bytes) -> Prediction:
        rows, columns = matrix.shape
        header = request_header(rows, columns)
        body = header + matrix.tobytes()
        lines = _LINES % (len(header), contract_digest.encode("ascii")) + passed_on
        self._budget.requested()
        attempts = 0
        while True:
            attempts += 1
            now, left = time.monotonic(), deadline.left_s()
            if not self.breaker.may_ask(now):
                raise UnavailableError(f"the predictor failed repeatedly and is asked again in {self.breaker.wait_s(now):.1f} s")
            headers = b"%s%s: %d\r\n" % (lines, _DEADLINE, max(int(left * 1000.0), 1))
            try:
                answer = await self._asked(headers, body, left)
            except TimeoutError as e:
                if left >= _FAIR_S:  # callers in a hurry must not close it for the others
                    self.breaker.failed(time.monotonic())
                    self._client.drop_silent(now)
                raise DeadlineError("the predictor did not answer in time") from e
            except NotHttpError as e:
                self.breaker.failed(time.monotonic())
                raise UnavailableError(f"the predictor's answer can't be read: {e}") from e
            except OSError as e:
                # A connection that was idle may have been closed just now: that says nothing about the predictor
                stale = isinstance(e, BrokenConnectionError) and e.reused
                if not stale:
                    self.breaker.failed(time.monotonic())
                if attempts == _ATTEMPTS_MAX or deadline.left_s() <= _RETRY_PAUSE_S or not self._budget.take():
                    raise UnavailableError(f"the predictor can't be reached: {type(e).__name__}: {e}") from e
                if not stale:
                    await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            if answer.status >= 500 and answer.status not in (503, 504):
                self.breaker.failed(time.monotonic())
            else:
                self.breaker.succeeded()
            return _prediction(answer, rows)

    async def _asked(self, headers: bytes, body: bytes, timeout_s: float) -> HttpAnswer:
        try:
            return await self._client.request("POST", self._infer_path, headers, body, timeout_s=timeout_s)
        finally:
            self.breaker.tried()


def _prediction(answer: HttpAnswer, rows: int) -> Prediction:
    if answer.status != 200:
        raise _refusal(answer.status, _detail(answer.body))
    headers = answer.headers
    try:
        score, interval = decode_answer(answer.body, headers.get(LENGTH_HEADER, ""), rows)
        return Prediction(score, interval, headers[MODEL_VERSION_HEADER], headers[MODEL_DIGEST_HEADER])
    except TensorError as e:
        raise UnavailableError(f"the predictor's answer can't be read: {e}") from e
    except KeyError as e:
        raise UnavailableError(f"the predictor's answer has no header {e}; is it a hafnium_predictor?") from e


def _refusal(status: int, detail: str) -> ScoringError:
    if status == 409:
        return ContractChangedError(detail)
    if status == 429:  # of a proxy between us
        return OverloadedError(f"predictor: {detail}")
    if status == 504:
        return DeadlineError(f"predictor: {detail}")
    if 400 <= status < 500 and status != 404:
        return RefusedError(status, f"predictor: {detail}")
    # 404 is a predictor under another name, 5xx one that is broken: neither is the caller's fault, both may pass
    return UnavailableError(f"predictor answered {status}: {detail}")


def _detail(body: bytes) -> str:
    try:
        parsed: Any = json.loads(body)
    except ValueError:
        return body[:200].decode("utf-8", "replace")
    if isinstance(parsed, dict):
        return str(cast(dict[str, Any], parsed).get("detail", parsed))[:500]
    return str(parsed)[:200]
