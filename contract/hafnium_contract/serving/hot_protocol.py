"""Answers plain requests for hot routes below ASGI, in uvicorn's own protocol class; all other bytes go to uvicorn untouched.

uvicorn, Starlette and KServe's app cost several times the work that a score needs, so a request that is whole, plain and meant
for a hot route is handed to that route's handler straight from `data_received`. A handler that sees anything unusual gives
the request back (`to_plain`), and uvicorn parses the very same bytes from their beginning.

This reads HTTP, so it must not disagree with uvicorn about where a request ends. It takes only what has one meaning: one
known request line, headers of visible ASCII without repetition, one plain `content-length`, no transfer coding, no upgrade, no
expectation, and nothing behind the body. A differential fuzz test holds it against uvicorn alone.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.limited_protocol import LimitedProtocol

log = logging.getLogger("hafnium.serving")
Headers = Mapping[bytes, bytes]
Handler = Callable[["HotRequest"], bool]
"""Takes a request and answers it now or later (True), or leaves it to uvicorn (False)."""

HEAD_BYTES_MAX = 16 * 1024
HOT_BODY_BYTES_MAX = 128 * 1024
"""A larger body is rare, its parsing dwarfs what this path saves, and it may wait here, unseen by other limits."""
HELD_BYTES_MAX = 64 * 1024
"""Bytes of a next request that are kept while an answer is due; then the client has to wait."""
_LINES_KEPT_MAX = 1024
_LINE_KEPT_BYTES_MAX = 128
_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++):([\t\x20-\x7e]*+)")
"""Nothing in it can match in two ways: a line of 16 KB that is wrong at its end takes microseconds, not a second."""
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer", b"content-encoding", b"http2-settings"})
_LENGTH = b"content-length"
_CONNECTION = b"connection"


class HeadReader:
    """Reads header blocks. Lines that were seen before are not read again: clients repeat most of theirs."""

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[bytes, bytes]] = {}

    def read(self, block: bytes) -> dict[bytes, bytes] | None:
        """Lines between request line and blank line, joined by CRLF → name (lower case) → value; None when anything is unusual."""
        headers: dict[bytes, bytes] = {}
        kept = self._kept
        lines = block.split(b"\r\n")
        for line in lines:
            found = kept.get(line)
            if found is None:
                found = self._line(line)
                if found is None:
                    return None
            headers[found[0]] = found[1]
        if len(headers) != len(lines) or _LENGTH not in headers:  # a repeated name has more than one meaning
            return None
        return headers

    def _line(self, line: bytes) -> tuple[bytes, bytes] | None:
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        name, value = match.group(1).lower(), match.group(2).strip(b" \t")
        if name in _UNUSUAL:
            return None
        if name == _LENGTH and not (value.isdigit() and len(value) < 10):
            return None
        if name == _CONNECTION and value.lower() != b"keep-alive":
            return None
        if len(line) <= _LINE_KEPT_BYTES_MAX:
            if len(self._kept) >= _LINES_KEPT_MAX:
                self._kept.clear()  # whoever sends ever new lines must not fill the memory
            self._kept[line] = (name, value)
        return name, value


class HotRequest:
    """One request, whole. Exactly one of `respond` and `to_plain` must be called, once, unless the handler returned False."""

    __slots__ = ("_protocol", "_raw", "arrived", "body", "headers")

    def __init__(self, protocol: HotProtocol, raw: bytes, headers: Headers, body: bytes) -> None:
        self._protocol = protocol
        self._raw = raw
        self.headers = headers
        self.body = body
        self.arrived = time.perf_counter()

    @property
    def client(self) -> str:
        """The peer's address; '' on a Unix socket."""
        peer = self._protocol.client
        return peer[0] if peer else ""

    @property
    def alone(self) -> bool:
        """No other connection is open, so nobody else's request can come in the same turn of the event loop."""
        return len(self._protocol.connections) == 1

    @property
    def gone(self) -> bool:
        """The client has closed the connection."""
        return self._protocol.transport.is_closing()

    def respond(self, head: bytes, body: bytes, status: int = 200) -> None:
        """Answers. `head`: header lines, each ending in CRLF, without date, server and content-length."""
        self._protocol.answer(STATUS_LINE[status], head, body)

    def abort(self) -> None:
        """Closes the connection: there is no answer."""
        self._protocol.transport.abort()

    def to_plain(self) -> None:
        """Leaves the request to uvicorn after all."""
        self._protocol.leave(self._raw)


class HotRoutes:
    """Request lines and their handlers. `on` switches the whole path: off, every byte goes to uvicorn."""

    def __init__(self) -> None:
        self.handlers: dict[bytes, Handler] = {}
        self.reader = HeadReader()

    def add(self, path: str, handler: Handler) -> None:
        """`POST path` goes to the handler first. The path is compared byte by byte: no query, no escapes."""
        self.handlers[f"POST {path} HTTP/1.1".encode()] = handler

    def protocol_class(self, limits: ConnectionLimits) -> type[HotProtocol]:
        """A protocol class for uvicorn's Config(http=…) with these routes and limits."""
        return cast(type[HotProtocol], type("HotProtocolOfRoutes", (HotProtocol,), {"routes": self, "limits": limits, "probes": {}}))


class _HasDefaultHeaders(Protocol):
    default_headers: list[tuple[bytes, bytes]]


class _ServerHeaders:
    """The server's own headers, written out anew when uvicorn changes them (the date, once a second)."""

    def __init__(self) -> None:
        self._of: object = None
        self._bytes = b""

    def get(self, state: _HasDefaultHeaders) -> bytes:
        current = state.default_headers
        if current is not self._of:
            self._of, self._bytes = current, b"".join(b"%s: %s\r\n" % pair for pair in current)
        return self._bytes


_SERVER_HEADERS = _ServerHeaders()


class HotProtocol(LimitedProtocol):
    """One connection."""

    routes: HotRoutes

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._due = False
        """A hot answer is due."""
        self._held = b""
        """Bytes that nobody has looked at: the beginning of a hot request, or what came while an answer was due."""
        self._needed = 0
        """Bytes that the hot request in `_held` has when it is whole; 0: it has not begun."""
        self._closing = False
        self._paused = False
        self._answered_at = 0.0
        """Loop time of the last hot answer."""

    # --- asyncio ---------------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes from the socket."""
        if self._apart:
            super().data_received(data)
            return
        if self._held or self._due:
            data = self._held + data
            self._held = b""
            if self._due or len(data) < self._needed:
                self._hold(data)
                return
        elif self._inside or super()._due_to_client():
            super().data_received(data)
            return
        self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer, or we, closed."""
        self._held, self._needed = b"", 0
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """The client has been silent for as long as it may be, or was not: hot requests don't stop this timer, and say when they were."""
        self.timeout_keep_alive_task = None
        if self._due:
            return  # its answer starts it anew
        left = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if left > 0.0:
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """The server stops: what is due is still answered, and then the connection closes."""
        if self._due:
            self._closing = True
            return
        if self._held:  # half a request: uvicorn knows how to wait for its other half
            self._needed = 0
            held, self._held = self._held, b""
            super().data_received(held)
        super().shutdown()

    # --- limits ----------------------------------------------------------------------------------------------------------------

    def _due_to_client(self) -> bool:
        return self._due or super()._due_to_client()

    def _incomplete(self) -> bool:
        return self._inside or (self._needed > 0 and not self._due)

    def _reading_paused(self) -> bool:
        return self._paused or super()._reading_paused()

    # --- the hot path ----------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Bytes at the beginning of a message, with no answer due."""
        if self.flow.write_paused:  # a client that does not read its answers: uvicorn waits until it does
            super().data_received(data)
            return
        line_end = data.find(b"\r\n", 0, 512)
        handler = self.routes.handlers.get(data[:line_end]) if line_end > 0 else None
        if handler is None:
            super().data_received(data)
            return
        head_end = data.find(b"\r\n\r\n", line_end, HEAD_BYTES_MAX)
        headers = self.routes.reader.read(data[line_end + 2 : head_end]) if head_end > line_end else None
        if headers is None:
            super().data_received(data)
            return
        begin = head_end + 4
        length = int(headers[_LENGTH])
        whole = begin + length
        if len(data) < whole and length <= HOT_BODY_BYTES_MAX:
            self._needed = whole
            self._hold(data)
            self._watch()
            return
        self._needed = 0
        if self._reading is not None:
            self._watch()
        if len(data) != whole or length > HOT_BODY_BYTES_MAX:
            super().data_received(data)
            return
        self._due = True
        try:
            taken = handler(HotRequest(self, data, headers, data[begin:]))
        except Exception:  # what a handler did not foresee is for the plain way to answer, and no reason to drop the connection
            log.exception("the hot path failed; the request takes the plain way, unless it was answered")
            taken = False
        if not taken and self._due:
            self._due = False
            super().data_received(data)

    def _hold(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._held = data
        if self._due and len(data) > HELD_BYTES_MAX and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def answer(self, status_line: bytes, head: bytes, body: bytes) -> None:
        """Writes an answer and goes on with what came meanwhile."""
        transport = self.transport
        if transport.is_closing():
            self._due = False
            return
        state = self.server_state
        state.total_requests += 1
        if self._closing:
            head += b"connection: close\r\n"
        transport.write(
            b"%s%s%scontent-length: %d\r\n\r\n%s" % (status_line, _SERVER_HEADERS.get(state), head, len(body), body)
        )
        if self._closing:
            self._due = False
            self._close()
        elif self._held:
            # Not at once: whoever answers is in a loop over the rows of others, and the next request is none of their business
            self.loop.call_soon(self._go_on)
        elif self._ended:
            self._due = False
            self._close()
        else:
            self._due = False
            self._answered_at = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def leave(self, raw: bytes) -> None:
        """Hands a request that a handler had taken to uvicorn, and what came behind it too."""
        self._due = False
        if self.transport.is_closing():
            return
        held, self._held = self._held, b""
        self._needed = 0
        self._resume()
        super().data_received(raw + held)
        if self._closing:
            super().shutdown()

    def _go_on(self) -> None:
        self._due = False
        held, self._held = self._held, b""
        self._needed = 0
        if self.transport.is_closing():
            return
        self._resume()
        if self._closing:  # the server was told to stop meanwhile
            super().data_received(held)
            super().shutdown()
        else:
            self._take(held)
            if self._ended and not self._due_to_client():  # half a request, and its other half will not come
                self._close()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
