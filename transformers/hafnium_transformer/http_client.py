"""HTTP/1.1 to one address over kept-alive connections: whole requests, whole answers, a tenth of the CPU of aiohttp.

llhttp reads the answers (httptools, which uvicorn brings). A connection serves one exchange at a time and is used again
until it is old, so that new pods behind a Service get their share. Only what the hop needs: no redirects, no cookies, no
decompression.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, cast

import httptools

from hafnium_transformer.expiry import Expiry

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""1,000 rows take 12 kB; whatever is this long is not an answer of a predictor."""
_IDLE_MAX = 64
_HEAD_KEPT_BYTES_MAX = 2048
_HEADS_KEPT_MAX = 256


class HttpAnswer(NamedTuple):
    """A whole answer. Header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Head(NamedTuple):
    """What llhttp made of the bytes before a body, which so many bytes follow; the connection may serve again after it."""

    status: int
    headers: Mapping[str, str]
    body_bytes: int


class BrokenConnectionError(ConnectionError):
    """The connection broke. `reused`: it had served before, so the server may just have closed it while it was idle."""

    def __init__(self, message: str, *, reused: bool) -> None:
        super().__init__(message)
        self.reused = reused


class NotHttpError(ConnectionError):
    """What came back is no HTTP. Asking again won't help."""


class _Heads:
    """Heads that were read before. A predictor's differ in date and length only, and reading one takes as long as the rest of the hop."""

    def __init__(self) -> None:
        self._kept: dict[bytes, _Head] = {}

    def answer(self, data: bytes) -> HttpAnswer | None:
        """A whole answer with a head that is known, and nothing behind it; None for everything else."""
        end = data.find(b"\r\n\r\n", 0, _HEAD_KEPT_BYTES_MAX) + 4
        head = self._kept.get(data[:end])
        if head is None or len(data) - end != head.body_bytes:
            return None
        return HttpAnswer(head.status, head.headers, data[end:])

    def keep(self, data: bytes, answer: HttpAnswer) -> None:
        """`data`: what llhttp read as this very answer, after which the connection may serve again."""
        end = data.find(b"\r\n\r\n", 0, _HEAD_KEPT_BYTES_MAX) + 4
        size = len(data) - end
        stated = answer.headers.get("content-length") == str(size) and "transfer-encoding" not in answer.headers
        if end < 4 or not stated or len(answer.body) != size:  # 204 and 304 have none, whatever they state
            return
        if len(self._kept) >= _HEADS_KEPT_MAX:
            self._kept.clear()
        self._kept[data[:end]] = _Head(answer.status, answer.headers, len(data) - end)


class _Connection(asyncio.Protocol):
    def __init__(self, heads: _Heads) -> None:
        self._loop = asyncio.get_running_loop()
        self._heads = heads
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._future: asyncio.Future[HttpAnswer] | None = None
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._keep = False
        self._inside = False
        """llhttp has the beginning of an answer."""
        self._read: HttpAnswer | None = None
        """What llhttp read from the bytes in hand."""
        self.opened = self.answered = time.monotonic()
        self.served = 0

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(f"the connection was closed{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        if self._future is None:  # nobody asked: whatever this is, it is not ours to read
            self.close()
            return
        begins = not self._inside
        if begins and (answer := self._heads.answer(data)) is not None:
            self._keep = True
            self._answered(answer)
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self._fail(NotHttpError(f"no HTTP answer: {e}"))
            self.close()
            return
        if begins and self._read is not None and self._keep:
            self._heads.keep(data, self._read)
        self._read = None

    # llhttp

    def on_message_begin(self) -> None:
        if self._future is None:
            raise ValueError("another answer follows")
        self._inside = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > ANSWER_BYTES_MAX:
            raise ValueError(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and the like: the answer follows
            self._headers, self._body, self._size = {}, [], 0
            return
        self._inside = False
        self._keep = self._parser.should_keep_alive()
        self._read = HttpAnswer(status, self._headers, self._body[0] if len(self._body) == 1 else b"".join(self._body))
        self._headers = {}
        self._answered(self._read)

    def _answered(self, answer: HttpAnswer) -> None:
        future, self._future = self._future, None
        self.served += 1
        self.answered = time.monotonic()
        if future is not None and not future.done():
            future.set_result(answer)

    # the client

    @property
    def reusable(self) -> bool:
        """It may serve again."""
        return self._keep and self._future is None and self._transport is not None and not self._transport.is_closing()

    def ask(self, request: bytes) -> asyncio.Future[HttpAnswer]:
        """Sends a request; its answer, or BrokenConnectionError."""
        future: asyncio.Future[HttpAnswer] = self._loop.create_future()
        self._future = future
        self._headers, self._body, self._size = {}, [], 0
        if self._transport is None or self._transport.is_closing():
            self._fail("the connection was closed")
        else:
            self._transport.write(request)
        return future

    def _fail(self, why: str | NotHttpError) -> None:
        future, self._future = self._future, None
        if future is not None and not future.done():
            future.set_exception(BrokenConnectionError(why, reused=self.served > 0) if isinstance(why, str) else why)

    def close(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()
        self._fail("the connection was given up")


class HttpClient:
    """Connections to one address."""

    def __init__(self, host: str, *, tls: bool, connection_age_s: float) -> None:
        self.authority = host
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        if not name or not port.isdigit():
            name, port = host, "443" if tls else "80"
        self._host = name.strip("[]")
        self._port = int(port)
        self._tls = ssl.create_default_context() if tls else None
        self._age_s = connection_age_s
        self._idle: list[_Connection] = []
        self._heads = _Heads()
        self._expiry = Expiry()

    async def request(self, method: str, path: str, headers: bytes = b"", body: bytes = b"", *, timeout_s: float) -> HttpAnswer:
        """One exchange. `headers`: whole lines, each ending in CRLF.

        Raises TimeoutError, BrokenConnectionError, NotHttpError, or another OSError when no connection can be had.
        """
        until = time.monotonic() + timeout_s
        connection = self._take()
        if connection is None:
            async with asyncio.timeout(timeout_s):
                connection = await self._open()
        try:
            due = connection.ask(b"%s%d\r\n%s\r\n%s" % (_request_line(method, path, self.authority), len(body), headers, body))
            self._expiry.add(due, until)
            try:
                answer = await due
            finally:
                self._expiry.remove(due)
        except BaseException:  # also when we are cancelled: its answer would be read by the next who asks
            connection.close()
            raise
        if connection.reusable and len(self._idle) < _IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def _take(self) -> _Connection | None:
        """The connection that was used last, so that those in excess grow old."""
        oldest = time.monotonic() - self._age_s
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.opened > oldest:
                return connection
            connection.close()
        return None

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._heads), self._host, self._port, ssl=self._tls)
        return connection

    def drop_silent(self, since: float) -> None:
        """Closes what is idle and has brought no answer since then: one that says nothing to a request may not be the only one.

        A node that dies closes no connection, and each of them would cost a caller its time. `since`: of time.monotonic().
        """
        heard = [c for c in self._idle if c.answered >= since]
        for connection in self._idle:
            if connection.answered < since:
                connection.close()
        self._idle = heard

    def close(self) -> None:
        """Closes what is idle; what is in use closes with its exchange."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()


@lru_cache(maxsize=64)
def _request_line(method: str, path: str, authority: str) -> bytes:
    """Up to the value of `content-length`."""
    return f"{method} {path} HTTP/1.1\r\nhost: {authority}\r\ncontent-length: ".encode("latin-1")
