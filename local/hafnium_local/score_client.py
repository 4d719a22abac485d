"""One score request, sent until it is answered: what a careful caller of the gateway does.

A connection that fails, and 502, 503 or 504, mean that nobody answered; scoring changes nothing, so the request goes out again
until its deadline. Every other status is an answer, also a refusal (4xx) and a failure (500). Who has time may wait for a 429, too, as
long as it says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

UNANSWERED = frozenset({502, 503, 504})
BUSY = 429
"""The caller's share is used up for the moment; Retry-After says how long."""
DEADLINE_S = 60.0
"""A request without an answer for so long is lost: nobody waits longer for a payment."""
ATTEMPT_S = 15.0
BACK_OFF_S = (0.05, 1.0)
"""First and longest pause between attempts, before jitter."""


@dataclass(frozen=True)
class Answer:
    """`status` 0: no answer until the deadline. `body` is the JSON, or None when there is none."""

    status: int
    body: Any
    headers: Mapping[str, str]
    attempts: int
    message: str = ""


def session(connections_max: int) -> ClientSession:
    """A client session with at most so many connections, for use with `async with` in a running loop."""
    connector = TCPConnector(limit=connections_max, keepalive_timeout=30)
    return ClientSession(connector=connector, timeout=ClientTimeout(total=ATTEMPT_S))


async def post(
    client: ClientSession, url: str, body: Any, headers: Mapping[str, str], *, deadline_s: float, jitter: random.Random,
    give_up: Callable[[], bool] = lambda: False, patient: bool = False,
) -> Answer:
    """POSTs JSON until it is answered, `deadline_s` has passed, or `give_up` says so between two attempts.

    `patient`: also sends again what was refused with 429, and waits for Retry-After before that and after a 503. A 429 that lasts
    beyond the deadline is the answer. Whatever the network does ends as an Answer, never as an exception.
    """
    started = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        refusal: Answer | None = None
        asked_s = 0.0
        try:
            async with client.post(url, json=body, headers=headers) as response:
                if patient:
                    asked_s = _seconds(response.headers.get("Retry-After", ""))
                if response.status not in UNANSWERED:
                    answer = Answer(response.status, await _json(response), dict(response.headers), attempt)
                    if not patient or response.status != BUSY:
                        return answer
                    refusal = answer
                message = f"status {response.status}"
                await response.read()
        except (ClientError, TimeoutError, OSError) as e:
            message = f"{type(e).__name__}: {e}"
        pause = min(BACK_OFF_S[1], BACK_OFF_S[0] * 2 ** min(attempt - 1, 10)) * (0.5 + jitter.random())
        pause = max(pause, asked_s)
        if time.monotonic() + pause - started > deadline_s or give_up():
            return refusal or Answer(0, None, {}, attempt, message)
        await asyncio.sleep(pause)


def _seconds(retry_after: str) -> float:
    """0 for what is no number of seconds: a date needs two clocks that agree."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


async def _json(response: Any) -> Any:
    try:
        return await response.json(content_type=None)
    except ValueError:
        return None
