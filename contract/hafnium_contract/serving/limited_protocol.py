"""uvicorn's protocol with an end to everything that a client may do slowly: send a request, read its answer, or nothing at all.

uvicorn limits only the pause after an answer. A client that sends a byte a minute, a header without end, or never reads what it
asked for would keep its connection and its memory for ever. A request that arrives whole costs no timer here.

uvicorn reads on after every answer, however many requests wait behind it: ten clients that asked and never read took 4 GB (measured).
Here its parser gets a slice only when nothing waits.

A client that has closed its sending side (`shutdown(SHUT_WR)`) still gets the answers that are due.

Places are limited, and whoever fills them all must not make the kubelet think that the process is dead: a connection too many may still
ask how the server is. It has a second for it, is answered that and nothing else, and the newest of them push the oldest out.
"""

from __future__ import annotations

import fcntl
import re
import struct
import termios
from asyncio import TimerHandle
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from hafnium_contract.asgi import Answer, problem_answer
from hafnium_contract.serving.connection_limits import ConnectionLimits

_GOODBYE_S = 1.0
"""How long a refused client may take to read why. Closing at once, with its bytes unread, would take the answer away from it."""


_LOOKS = 4
"""How often it is looked within `write_timeout_s` whether a client still reads."""
PROBES_MAX = 128
"""Connections beyond the limit that are listened to at a time; one more ends the oldest."""
_PROBE_ANSWER_S = 5.0
"""How long one of them lasts when it has asked: readiness looks at predictor and store, and Kubernetes waits for a second by default."""
_PROBE = re.compile(rb"GET (?:/|/health/live|/health/ready|/v2/health/live|/v2/health/ready|/metrics) HTTP/1\.[01]\r\n")
"""What a connection too many may ask: how the server is. `/` is where KServe's own probes look."""
_SLICE_BYTES = 4096
"""What uvicorn's parser gets at a time: as many requests as fit in it may wait behind one that is being answered."""


class _Flow(FlowControl):
    """uvicorn's, but for those who resume reading without asking what waits."""

    held = False

    def resume_reading(self) -> None:
        """Reads on, unless bytes wait already."""
        if not self.held:
            super().resume_reading()


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    limits = ConnectionLimits()
    probes: dict[LimitedProtocol, None]
    """Connections beyond the limit, oldest first; of all connections of a server."""

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._inside = False
        """uvicorn's parser is inside a message."""
        self._in_head = False
        self._head_bytes = 0
        """Bytes of a head, but for those that came together with its beginning."""
        self._without_body = 0
        """Bytes since the last byte of a body: sizes of chunks, and fields behind them."""
        self._refusal: tuple[int, str, str] | None = None
        """What to say when the answers that are due are out."""
        self._unparsed = b""
        """Bytes behind requests that wait for their turn."""
        self._ended = False
        """The client will send no more."""
        self._refused = False
        self._probe = False
        """One too many: it may ask how the server is."""
        self._apart = False
        """No usual connection: refused, or one too many."""
        self._reading: TimerHandle | None = None
        self._writing: TimerHandle | None = None
        self._probation: TimerHandle | None = None
        self._unread = 0
        """Bytes that the client had not read when it was looked last."""
        self._read_at = 0.0
        """When it had read something last."""
        self._read_until = 0.0

    # --- asyncio ---------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """A client came."""
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        if len(self.connections) > self.limits.connections_max:
            self.connections.discard(self)  # or a flood of refused ones would keep others out
            self._probe = self._apart = True
            self.probes[self] = None
            if len(self.probes) > PROBES_MAX:
                oldest = next(iter(self.probes))
                del self.probes[oldest]
                oldest._give_up()
            self._probation = self.loop.call_later(_GOODBYE_S, self._one_too_many)
            return
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Bytes from the socket, for uvicorn's parser."""
        if self._refused or self._refusal is not None:
            return
        if self._probe and not self._inside and not _PROBE.match(data):
            self._one_too_many()
            return
        if self._unparsed:
            self._unparsed += data
            return
        for at in range(0, len(data), _SLICE_BYTES):
            if self.pipeline:
                self._unparsed = data[at:]
                self._flow.held = True
                self._flow.pause_reading()
                break
            part = data[at : at + _SLICE_BYTES] if len(data) > _SLICE_BYTES else data
            if self._in_head:
                self._head_bytes += len(part)
                if self._head_bytes > self.limits.head_bytes_max:
                    self._refuse_in_turn()
                    return
            self._without_body += len(part)
            super().data_received(part)
            if self._inside and not self._in_head and self._without_body > self.limits.head_bytes_max:
                self._refuse_in_turn()
                return
            if self.transport.is_closing():
                break
        self._watch()
        self._keep_alive()
        self._abort_unread()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client closed its side. What is due is still answered."""
        self._ended = True
        return bool(self._unparsed) or (self._due_to_client() and not self._incomplete())

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer, or we, closed."""
        self._stop_reading_timer()
        self._stop_writing_timer()
        self._unset_keepalive_if_required()
        if self._probation is not None:
            self._probation.cancel()
            self.probes.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what it was sent."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._stop_writing_timer()
        self._abort_unread()

    # --- uvicorn ---------------------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """uvicorn's parser has the first byte of a message."""
        self._inside = self._in_head = True
        self._head_bytes = 0
        self._stop_reading_timer()  # the time of the request before
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """uvicorn's parser has a head."""
        self._in_head = False
        self._without_body = 0
        super().on_headers_complete()
        cycle = cast(Any, self.cycle)
        if self._probation is not None and cycle is not None:
            self._probation.cancel()
            self._probation = self.loop.call_later(_PROBE_ANSWER_S, self._one_too_many)
            cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """uvicorn's parser has a part of a body."""
        self._without_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """uvicorn's parser has the last byte of a message."""
        self._inside = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn has sent an answer."""
        super().on_response_complete()
        if self._unparsed and not self.pipeline:
            self.loop.call_soon(self._parse_on)
        if self._refusal is not None and not self._due_to_client():
            self._refuse(*self._refusal)
        if self._ended and not self._due_to_client():
            self._close()
        self._abort_unread()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol takes the connection over."""
        self._inside = False
        self._stop_reading_timer()
        self._stop_writing_timer()
        super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        """The client has been silent for as long as it may be."""
        self._close()

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        self._abort_unread()

    # --- limits ----------------------------------------------------------------------------------------------------------------

    def _due_to_client(self) -> bool:
        """An answer is due."""
        cycle = cast(Any, self.cycle)
        return bool(self._unparsed) or bool(self.pipeline) or (cycle is not None and not cycle.response_complete)

    def _incomplete(self) -> bool:
        """A request has begun to arrive and is not whole."""
        return self._inside

    def _reading_paused(self) -> bool:
        """We are who does not read."""
        return self.flow.read_paused

    def _parse_on(self) -> None:
        """The requests before are answered: what came behind them has its turn."""
        unparsed, self._unparsed = self._unparsed, b""
        if self._refused or self.transport.is_closing():
            return
        self._flow.held = False
        self._flow.resume_reading()
        LimitedProtocol.data_received(self, unparsed)
        if self._ended and not self._due_to_client():
            self._close()

    def _watch(self) -> None:
        """Starts or stops the time that a request may take to arrive."""
        if self._probe:
            return  # it has a time of its own
        if not self._incomplete():
            self._stop_reading_timer()
        elif self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(self.limits.read_timeout_s, self._too_slow)

    def _too_slow(self) -> None:
        self._reading = None
        if self.transport.is_closing() or not self._incomplete():
            return
        # it waits for us, or for the answers to those before it
        if self._reading_paused() or self.pipeline or (self._in_head and self._due_to_client()):
            self._watch()
            return
        cycle = cast(Any, self.cycle)
        if self._inside and not self._in_head and cycle is not None and cycle.response_started:
            self._give_up()  # its answer has begun, or is complete, and it goes on to send: nothing else can be said
            return
        detail = f"the request did not arrive within {self.limits.read_timeout_s:g} s"
        self._refuse(408, "Request timeout", detail)

    def _keep_alive(self) -> None:
        """A client that sent nothing of a request (an empty line, say) is as idle as one that sent nothing."""
        idle = not self._inside and not self._due_to_client() and not self.transport.is_closing()
        if idle and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse_in_turn(self) -> None:
        """431, behind the answers that are due: overtaking them it would be taken for one of them."""
        detail = f"head, or fields behind the body, are longer than {self.limits.head_bytes_max} bytes"
        if self._in_head and self._due_to_client():
            self._refusal = (431, "Head too large", detail)
            self._flow.held = True
            self._flow.pause_reading()
            return
        cycle = cast(Any, self.cycle)
        if not self._in_head and (self.pipeline or (cycle is not None and cycle.response_started)):
            self._give_up()  # in the middle of what nobody can answer any more
            return
        self._refuse(431, "Head too large", detail)

    def _one_too_many(self) -> None:
        """A connection beyond the limit asked for something else, or nothing, or has not read its answer."""
        if cast(Any, self.cycle) is not None or self._refused:
            self._give_up()
            return
        self._refuse(503, "Overloaded", f"{self.limits.connections_max} connections are open; try again")

    def _refuse(self, status: int, title: str, detail: str) -> None:
        """Answers below ASGI and closes."""
        self._refused = self._apart = True
        self._inside = False
        self._stop_reading_timer()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        answer: Answer = problem_answer(status, title, detail, headers=[(b"retry-after", b"1")] if status == 503 else [])
        lines = b"".join(b"%s: %s\r\n" % h for h in (*self.server_state.default_headers, *answer.headers))
        self.transport.write(
            b"%s%scontent-length: %d\r\nconnection: close\r\n\r\n%s" % (STATUS_LINE[status], lines, len(answer.body), answer.body)
        )
        cycle = cast(Any, self.cycle)
        if cycle is not None:  # whoever still waits for its body, or wants to answer
            cycle.disconnected = True
            cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self._writing is not None:
            self._writing.cancel()
        self._writing = self.loop.call_later(_GOODBYE_S, self._give_up)

    def _close(self) -> None:
        """Closes; what the client has not read by then it never reads."""
        if not self.transport.is_closing():
            self.transport.close()
            self._abort_unread()

    def _abort_unread(self) -> None:
        """A connection that closes waits for its client to read the rest: not for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_reader()

    def _watch_reader(self) -> None:
        """An answer waits for its client to read: for as long as it does read, and not for ever."""
        if self._writing is not None:
            return
        now = self.loop.time()
        self._unread, self._read_at, self._read_until = self._bytes_unread(), now, now + self.limits.write_total_timeout_s
        self._writing = self.loop.call_later(self.limits.write_timeout_s / _LOOKS, self._look_at_reader)

    def _look_at_reader(self) -> None:
        self._writing = None
        unread, now = self._bytes_unread(), self.loop.time()
        if unread != self._unread:  # fewer: it reads. More, because another answer was written: it will be seen the next time
            self._unread, self._read_at = unread, now
        ends = min(self._read_at + self.limits.write_timeout_s, self._read_until)
        if now >= ends:
            self._give_up()
            return
        self._writing = self.loop.call_later(min(self.limits.write_timeout_s / _LOOKS, ends - now), self._look_at_reader)

    def _bytes_unread(self) -> int:
        """Bytes on their way to the client: here, and in the kernel, which may hold megabytes that a slow one reads for a minute."""
        waiting = self.transport.get_write_buffer_size()
        try:
            sock = self.transport.get_extra_info("socket")
            in_kernel = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        except (OSError, AttributeError):  # no such thing on this system, or closed just now: what waits here has to do
            return waiting
        return waiting + int(in_kernel)

    def _give_up(self) -> None:
        self._writing = None
        self.transport.abort()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None and not self._refused:
            self._writing.cancel()
            self._writing = None


def limited_protocol_class(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """A protocol class for uvicorn's Config(http=…) with these limits and no hot routes."""
    return cast(type[LimitedProtocol], type("LimitedProtocolOfServer", (LimitedProtocol,), {"limits": limits, "probes": {}}))
