"""The few pieces of ASGI that both servers stand on: read a body within a limit, send an answer, call the SDK's app.

No library is behind it. It lives in the kernel because the parts don't import each other and must not differ in what they
do with a body that is too long or a client that went away.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from hafnium_contract.errors import HafniumError
from hafnium_contract.wire import PROBLEM_JSON, problem

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON_TYPE: Header = (b"content-type", b"application/json")
_DISCARD_FACTOR = 4
PROBLEM_TYPE: Header = (b"content-type", PROBLEM_JSON.encode())


class BodyTooLargeError(HafniumError):
    """The body is longer than the limit. Answer 413."""


class ClientGoneError(HafniumError):
    """The client closed the connection before its body was complete. There is nobody to answer."""


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Header name (lower case) → value; of a repeated one the last."""
    return dict(scope["headers"])


def given_twice(scope: Scope, name: bytes) -> bool:
    """A header that has more than one meaning: what reads it next may take the other one."""
    return sum(key == name for key, _ in scope["headers"]) > 1


async def read_body(headers: MutableMapping[bytes, bytes], receive: Receive, bytes_max: int) -> bytes:
    """The whole body. Raises BodyTooLargeError; ClientGoneError when the client went away before its end.

    Of a body that is too long as much again is read and thrown away: a server that answers and closes with bytes unread
    resets the connection, and most clients then lose the answer that says why.
    """
    declared = headers.get(b"content-length", b"0").strip(b" \t")  # white space around a value isn't part of it (RFC 9110, 5.5)
    if not declared.isdigit() or int(declared) > bytes_max:
        await _discard(receive, _DISCARD_FACTOR * bytes_max)
        raise BodyTooLargeError(f"body of {declared[:20].decode('ascii', 'replace')} bytes; at most {bytes_max} are taken")
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False) and len(message.get("body", b"")) <= bytes_max:
        return message.get("body", b"")
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] != "http.request":
            raise ClientGoneError("the client closed the connection before its request was complete")
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > bytes_max:
            if message.get("more_body", False):
                await _discard(receive, _DISCARD_FACTOR * bytes_max)
            raise BodyTooLargeError(f"body longer than {bytes_max} bytes; no more are taken")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


async def _discard(receive: Receive, bytes_max: int) -> None:
    """Reads what is left of a body, up to a limit, and keeps none of it."""
    size = 0
    while size <= bytes_max:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def no_such_route(scope: Scope, model_name: str) -> Answer:
    """What a request that would change or ask something gets where nothing of the kind is."""
    path, method = str(scope["path"]), str(scope["method"])
    shown = f"{method} {path}"[:200]
    if path.startswith(f"/v1/models/{model_name}:") or path.startswith(f"/v2/models/{model_name}/"):
        return problem_answer(501, "Not implemented", f"{shown}: one version is served, by V1's :predict and V2's /infer")
    return problem_answer(404, "Not found", f"{shown}: no such route; the model is {model_name!r}")


async def refuse_unread(receive: Receive, send: Send, answer: Answer, bytes_max: int) -> None:
    """Answers a request whose body nobody needs. It is read, so that its sender reads the answer, and dropped."""
    await _discard(receive, _DISCARD_FACTOR * bytes_max)
    await send_answer(send, answer)


async def send_answer(send: Send, answer: Answer) -> None:
    """Sends an answer, with its content-length."""
    length = (b"content-length", str(len(answer.body)).encode())
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.body})


def problem_answer(
    status: int, title: str, detail: str, errors: list[dict[str, Any]] | None = None, headers: Iterable[Header] = (),
) -> Answer:
    """An RFC 9457 answer."""
    return Answer(status, (PROBLEM_TYPE, *headers), json.dumps(problem(status, title, detail, errors)).encode())


async def call(app: App, scope: Scope, body: bytes) -> Answer:
    """Calls an inner ASGI app with a body that was read already, and collects its whole answer."""
    status = 500
    headers: tuple[Header, ...] = ()
    parts: list[bytes] = []
    given = started = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers, started
        if message["type"] == "http.response.start":
            started = True
            status, headers = message["status"], tuple((bytes(k), bytes(v)) for k, v in message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers 500 and raises on, for a server to log. With an answer there is one to return.
        if not started:
            raise
    return Answer(status, headers, b"".join(parts))
