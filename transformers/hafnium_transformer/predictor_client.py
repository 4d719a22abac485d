"""The hop to the predictor: V2 with binary tensors over kept-alive connections, within the caller's deadline.

Scoring changes nothing, so a connection that breaks is tried once more: that is what a restarted predictor looks like.
The predictor's refusals keep their meaning; the SDK's client would make all of them 500.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
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
from hafnium_transformer.errors import (
    ContractChangedError,
    DeadlineError,
    OverloadedError,
    RefusedError,
    ScoringError,
    UnavailableError,
)

Matrix = npt.NDArray[np.float32]
_CONTRACT_BYTES_MAX = 8 * 1024 * 1024
_RETRY_PAUSE_S = 0.03
"""A predictor that was killed closes its connections at once; its port may refuse for a moment while it comes back."""


@dataclass(frozen=True)
class Served:
    """What the predictor serves."""

    contract: ModelContract
    model_version: str
    model_digest: str


@dataclass(frozen=True)
class Prediction:
    """Answer for a matrix: score [rows], interval [rows, 2], and who gave it."""

    score: Matrix
    interval: Matrix
    model_version: str
    model_digest: str


@dataclass(frozen=True)
class Deadline:
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
    """Connections to one predictor address."""

    def __init__(self, host: str, model_name: str, *, ssl: bool, connections_max: int) -> None:
        base = f"{'https' if ssl else 'http'}://{host}"
        self._infer_url = f"{base}/v2/models/{model_name}/infer"
        self._contract_url = f"{base}/v1/models/{model_name}/contract"
        self._ready_url = f"{base}/health/ready"
        self._connections_max = connections_max
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections_max, keepalive_timeout=60.0, ttl_dns_cache=10)
            self._session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"), read_bufsize=2**18,
            )
        return self._session

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def ready(self, timeout_s: float) -> str:
        """'' when the predictor is ready, else why not."""
        try:
            async with self._open().get(self._ready_url, timeout=aiohttp.ClientTimeout(timeout_s)) as answer:
                if answer.status == 200:
                    return ""
                return f"predictor is not ready: {_detail(await answer.read())}"
        except (TimeoutError, aiohttp.ClientError) as e:
            return f"predictor can't be reached: {type(e).__name__}: {e}"

    async def fetch_contract(self, timeout_s: float) -> Served:
        """The contract that the predictor serves. Raises UnavailableError that says why it can't be had."""
        try:
            async with self._open().get(self._contract_url, timeout=aiohttp.ClientTimeout(timeout_s)) as answer:
                body = await answer.content.read(_CONTRACT_BYTES_MAX)
                status = answer.status
        except (TimeoutError, aiohttp.ClientError) as e:
            raise UnavailableError(f"the predictor's contract can't be fetched: {type(e).__name__}: {e}") from e
        if status != 200:
            raise UnavailableError(f"the predictor's contract can't be fetched: {status}: {_detail(body)}")
        try:
            parsed = cast(dict[str, Any], json.loads(body))
            contract = parse_contract(parsed["contract"], self._contract_url)
            served = Served(contract, str(parsed["model_version"]), str(parsed["model_digest"]))
            stated = str(parsed["contract_digest"])
        except (ValueError, KeyError, TypeError, ContractError) as e:
            raise UnavailableError(f"the predictor's contract can't be read: {type(e).__name__}: {e}") from e
        if stated != contract.digest:
            raise UnavailableError(
                f"the predictor states contract {stated}, what it sent has {contract.digest}: its Hafnium is of another version"
            )
        return served

    async def predict(
        self, matrix: Matrix, contract_digest: str, deadline: Deadline, passed_on: Mapping[str, str],
    ) -> Prediction:
        """Encoded rows [rows, n] → Prediction. More rows than a request may hold go in several, one after the other.

        `passed_on`: the caller's tracing headers. Raises ScoringError of the kind that the predictor's answer means.
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

    async def _predict(
        self, matrix: Matrix, contract_digest: str, deadline: Deadline, passed_on: Mapping[str, str],
    ) -> Prediction:
        rows, columns = matrix.shape
        header = request_header(rows, columns)
        body = header + matrix.tobytes()
        headers = {
            **passed_on, "content-type": "application/octet-stream", LENGTH_HEADER: str(len(header)),
            CONTRACT_HEADER: contract_digest,
        }
        for attempt in (1, 2):
            left = deadline.left_s()
            headers[DEADLINE_HEADER] = f"{left * 1000:.0f}" if left >= 0.001 else "1"
            try:
                timeout = aiohttp.ClientTimeout(total=left)
                async with self._open().post(self._infer_url, data=body, headers=headers, timeout=timeout) as answer:
                    out = await answer.read()
                    return _prediction(answer.status, answer.headers, out, rows)
            except TimeoutError as e:
                raise DeadlineError("the predictor did not answer in time") from e
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as e:
                if attempt == 2 or deadline.left_s() <= _RETRY_PAUSE_S:
                    raise UnavailableError(f"the predictor can't be reached: {type(e).__name__}: {e}") from e
                await asyncio.sleep(_RETRY_PAUSE_S)
            except aiohttp.ClientError as e:
                raise UnavailableError(f"the predictor's answer can't be read: {type(e).__name__}: {e}") from e
        raise UnavailableError("the predictor can't be reached")


def _prediction(status: int, headers: Mapping[str, str], body: bytes, rows: int) -> Prediction:
    if status != 200:
        raise _refusal(status, _detail(body))
    try:
        score, interval = decode_answer(body, headers.get(LENGTH_HEADER, ""), rows)
        return Prediction(score, interval, headers[MODEL_VERSION_HEADER], headers[MODEL_DIGEST_HEADER])
    except TensorError as e:
        raise UnavailableError(f"the predictor's answer can't be read: {e}") from e
    except KeyError as e:
        raise UnavailableError(f"the predictor's answer has no header {e}; is it a hafnium_predictor?") from e


def _refusal(status: int, detail: str) -> ScoringError:
    if status == 409:
        return ContractChangedError(detail)
    if status == 429:
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
