"""One HTTP POST with a limit on everything, and what its answer means."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

ANSWER_BYTES_MAX = 64 * 1024
"""Only the first line of an answer is ever shown."""
_AGAIN = (408, 425, 429)
Result = Literal["Delivered", "Again", "Refused"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an attempt."""

    result: Result
    message: str
    retry_after_s: float | None = None


def post(url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float, ca_file: Path | None = None) -> Answer:
    """Sends once, within `timeout_s` from connecting to the end of the answer. Never raises for what a receiver does.

    Redirects are not followed: a receiver that moved is told apart from one that works, and the secret goes nowhere else.
    """
    parts = urlsplit(url)
    host, path = parts.hostname or "", (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    late = threading.Event()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=str(ca_file) if ca_file is not None else None)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    except OSError as e:
        return Answer("Again", f"{ca_file}: {e}")

    def end() -> None:
        """A socket's timeout is for each read; who sends a byte a second would hold us for ever."""
        late.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(timeout_s, end)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", "User-Agent": "hafnium-rollout", **headers})
        answer = connection.getresponse()
        text = answer.read(ANSWER_BYTES_MAX)
        if late.is_set():
            return Answer("Again", f"no whole answer within {timeout_s:g} s")
        return _meaning(answer.status, text, answer.getheader("Retry-After"))
    except (OSError, http.client.HTTPException, ValueError) as e:
        if late.is_set():
            return Answer("Again", f"no whole answer within {timeout_s:g} s")
        # The text of the others is what was to be sent: a token, an address with a key in it.
        shown = isinstance(e, OSError | http.client.HTTPException) and not isinstance(e, http.client.InvalidURL)
        text = str(e) if shown else "a header or the address holds a character that can't be sent; it isn't shown here"
        return Answer("Again", f"{type(e).__name__}: {text}")
    finally:
        watchdog.cancel()
        connection.close()


def _meaning(status: int, text: bytes, retry_after: str | None) -> Answer:
    line = text.decode(errors="replace").strip().splitlines()
    said = f"HTTP {status}" + (f": {line[0][:200]}" if line else "")
    if 200 <= status < 300:
        return Answer("Delivered", said)
    if status >= 500 or status in _AGAIN:
        wait = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
        return Answer("Again", said, wait)
    return Answer("Refused", said)


def wait_s(attempt: int, first_s: float, max_s: float, drawn: float, retry_after_s: float | None = None) -> float:
    """Before attempt number `attempt` + 1: doubled each time, drawn between half and all of it, at least what the receiver asked for
    and never above the maximum. `drawn` in [0, 1)."""
    backoff = min(first_s * 2.0 ** min(attempt - 1, 60), max_s)
    return min(max(backoff * (0.5 + 0.5 * drawn), retry_after_s or 0.0), max_s)
