"""V2 over gRPC as KServe's SDK answers it, with what the SDK lacks: limits, and errors that keep their meaning.

The SDK's server takes whatever comes: there is no bound on calls in progress, every refusal of ours becomes INVALID_ARGUMENT, and
anybody may unload the model. Here a call that is one too many is answered before its message is read. A unary call and a stream of one
message are the same on the wire, and only as a stream the message can be left unread, or be waited for with an end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote

import grpc
from grpc import StatusCode, aio
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady

from hafnium_contract.errors import HafniumError
from hafnium_contract.trace_context import without_repeated

log = logging.getLogger("hafnium.serving")
SERVICE = "inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
_NOT_OURS = {f"/{SERVICE}/RepositoryModelLoad", f"/{SERVICE}/RepositoryModelUnload"}
_CODES = {
    400: StatusCode.INVALID_ARGUMENT, 404: StatusCode.NOT_FOUND, 408: StatusCode.DEADLINE_EXCEEDED, 409: StatusCode.FAILED_PRECONDITION,
    413: StatusCode.RESOURCE_EXHAUSTED, 422: StatusCode.INVALID_ARGUMENT, 429: StatusCode.RESOURCE_EXHAUSTED,
    501: StatusCode.UNIMPLEMENTED, 503: StatusCode.UNAVAILABLE, 504: StatusCode.DEADLINE_EXCEEDED,
}
_LOOK_S = 0.1
"""As often as uvicorn looks whether it is told to stop."""
_READ_S = 1.0
"""For the message of a call that has nothing to say: health, metadata."""
SEND_BYTES_MAX = 8 * 1024 * 1024
"""KServe's own limit for an answer."""


class BindError(HafniumError):
    """gRPC's port can't be had."""


@dataclass(frozen=True)
class Refusal:
    """Why a call is not answered. `status`: HTTP's word for it, which all our errors have."""

    status: int
    detail: str
    retry_after_s: float | None = None

    async def abort(self, context: aio.ServicerContext[Any, Any]) -> NoReturn:
        """Ends the call. When to come again is told as HTTP does, and as gRPC's own retries read it."""
        trailing: tuple[tuple[str, str], ...] = ()
        if self.retry_after_s is not None:
            wait_s = self.retry_after_s
            trailing = (("retry-after", str(math.ceil(wait_s))), ("grpc-retry-pushback-ms", str(math.ceil(wait_s * 1000.0))))
        await context.abort(_CODES.get(self.status, StatusCode.INTERNAL), self.detail, trailing)


@dataclass(frozen=True)
class Call:
    """A ModelInfer that arrived."""

    metadata: dict[bytes, bytes]
    """As HTTP's headers; ids and trace that were given twice are not in it."""
    peer: str
    """The caller's address."""
    left_s: float | None
    """Seconds that the caller waits for; None: it doesn't say."""
    started: float = field(default_factory=time.perf_counter)


class CallGate(Protocol):
    """What a part does with calls."""

    async def answer(self, call: Call, read: Callable[[float], Awaitable[Any]], score: Callable[[Any], Awaitable[Any]]) -> Any:
        """The answer to a call, or a Refusal.

        `read`: waits for the message, so many seconds at most. Raises SlowMessageError or NoMessageError. `score`: the SDK's way.
        """
        ...


class SlowMessageError(Exception):
    """The message did not come within the time for it."""


class NoMessageError(Exception):
    """The call ended without a message, or with one that is longer than the limit, which gRPC refuses itself."""


def kserve_refusal(error: Exception) -> Refusal:
    """What an error of the SDK, or of nobody's foresight, means."""
    if isinstance(error, SlowMessageError):
        return Refusal(408, str(error))
    if isinstance(error, InvalidInput | NoMessageError):
        return Refusal(400, str(error))
    if isinstance(error, ModelNotFound):
        return Refusal(404, str(error))
    if isinstance(error, ModelNotReady | ServerNotReady):
        return Refusal(503, str(error), 1.0)
    if isinstance(error, NotImplementedError):
        return Refusal(501, str(error) or "not implemented")
    log.error("a call over gRPC failed", exc_info=error)
    return Refusal(500, "the request could not be answered")


class _Limits(aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic when it runs
    def __init__(self, gate: CallGate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method in _NOT_OURS:
            refused = Refusal(501, "models are not loaded or unloaded over gRPC: a process serves one bundle for its whole life")
            return grpc.stream_unary_rpc_method_handler(_refusing(refused))
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        if handler_call_details.method == f"/{INFER}":
            answer = self._inferring(handler.unary_unary, _metadata(handler_call_details.invocation_metadata))
        else:
            answer = _answering(handler.unary_unary)
        return grpc.stream_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    def _inferring(self, scored: Callable[[Any, Any], Awaitable[Any]], metadata: dict[bytes, bytes]) -> Any:
        async def infer(messages: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> Any:
            call = Call(metadata, _address(context.peer()), context.time_remaining())
            answer = await self._gate.answer(
                call, lambda timeout_s: _only(messages, timeout_s), lambda message: scored(message, context))
            if isinstance(answer, Refusal):
                await answer.abort(context)
            return answer

        return infer


def _answering(answered: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """Health and metadata."""

    async def answer(messages: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> Any:
        try:
            found = await answered(await _only(messages, _READ_S), context)
        except Exception as e:  # noqa: BLE001 - the SDK's errors share no base
            found = kserve_refusal(e)
        if isinstance(found, Refusal):
            await found.abort(context)
        return found

    return answer


def _refusing(refused: Refusal) -> Any:
    async def answer(_messages: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]) -> Any:
        await refused.abort(context)

    return answer


async def _only(messages: AsyncIterator[Any], timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            async for message in messages:
                return message
    except TimeoutError as e:
        raise SlowMessageError(f"the message did not arrive within {timeout_s:g} s") from e
    raise NoMessageError("no message came")


def _metadata(pairs: Iterable[tuple[str, str | bytes]] | None) -> dict[bytes, bytes]:
    found = [(name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "replace")) for name, value in pairs or ()]
    return without_repeated(found, dict(found))


def _address(peer: str) -> str:
    """`ipv4:10.0.0.1:4711` → `10.0.0.1`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else rest


class InferenceServer:
    """The gRPC server of a part: starts, and stops after what it has in hand."""

    def __init__(
        self, address: str, gate: CallGate, *, body_bytes_max: int, grace_period_s: float, streams_max: int | None = None,
    ) -> None:
        self._address = address
        self._grace_period_s = grace_period_s
        options = [("grpc.max_receive_message_length", body_bytes_max), ("grpc.max_send_message_length", SEND_BYTES_MAX)]
        if streams_max is not None:
            options.append(("grpc.max_concurrent_streams", streams_max))
        self.server = aio.server(interceptors=(_Limits(gate),), options=options)

    async def serve(self, told_to_stop: Callable[[], bool]) -> None:
        """Until it is told to stop; then takes no more calls and waits for those in progress. Raises BindError.

        HTTP and gRPC hear of it at the same time: one grace period after the other would be longer than the pod has.
        """
        try:
            self.server.add_insecure_port(self._address)
        except RuntimeError as e:
            raise BindError(f"gRPC can't listen at {self._address}; is the port taken? Give another --grpc_port") from e
        log.info("gRPC at %s", self._address)
        await self.server.start()
        while not told_to_stop():
            await asyncio.sleep(_LOOK_S)
        await self.server.stop(self._grace_period_s)


def when_failed(task: asyncio.Task[None], failed: Callable[[], None]) -> None:
    """Calls `failed` should a task that serves end in an error, which is logged: else nobody would hear of it before the process ends."""

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("%s", error, exc_info=None if isinstance(error, BindError) else error)
        failed()

    task.add_done_callback(ended)


def listening_address(host: str, port: int) -> str:
    """As gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
