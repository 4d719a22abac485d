"""Asking a process on this machine whether it is alive and ready, with one bounded request on a connection of its own.

A supervisor that asks a handful of processes once a second needs no HTTP client library: this keeps it small and means that
a hung server can only cost its own probe.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Literal

ANSWER_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class Probe:
    """Where to ask. `path` None: being able to connect is the answer."""

    host: str
    port: int
    path: str | None = "/v2/health/ready"
    timeout_s: float = 2.0
    period_s: float = 1.0


@dataclass(frozen=True)
class ProbeResult:
    """`ready`: answers and can work; `unready`: answers that it can't yet, `message` is why; `silent`: no answer."""

    state: Literal["ready", "unready", "silent"]
    message: str = ""


async def ask(probe: Probe) -> ProbeResult:
    """One probe. Never raises: whatever goes wrong on the way is `silent` with its reason."""
    try:
        async with asyncio.timeout(probe.timeout_s):
            return await _ask(probe)
    except TimeoutError:
        return ProbeResult("silent", f"no answer within {probe.timeout_s:g} s")
    except (OSError, ValueError, asyncio.IncompleteReadError) as e:
        return ProbeResult("silent", f"{type(e).__name__}: {e}" if str(e) else type(e).__name__)


async def _ask(probe: Probe) -> ProbeResult:
    reader, writer = await asyncio.open_connection(probe.host, probe.port)
    try:
        if probe.path is None:
            return ProbeResult("ready")
        writer.write(f"GET {probe.path} HTTP/1.1\r\nHost: {probe.host}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while len(answer) < ANSWER_BYTES_MAX:
            block = await reader.read(ANSWER_BYTES_MAX)
            if not block:
                break
            answer += block
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return ProbeResult("silent", "the answer is not HTTP")
    status = int(parts[1])
    if 200 <= status < 400:
        return ProbeResult("ready")
    return ProbeResult("unready", _reason(status, body))


def _reason(status: int, body: bytes) -> str:
    """The sentence in a problem document or in KServe's {"error": …}; the status when there is none."""
    try:
        data: Any = json.loads(body[body.find(b"{"): body.rfind(b"}") + 1])
    except ValueError:
        return f"status {status}"
    for key in ("detail", "error", "title"):
        if isinstance(data, dict) and isinstance(data.get(key), str):
            return data[key]
    return f"status {status}"
