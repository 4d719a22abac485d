"""A proxy that breaks what passes through it, on purpose: the demo and the tests put it before a candidate.

`units`  multiplies some of the request's features (cents for euros, metres for kilometres);
`stale`  answers every request with the features of the first one (a feed that is stuck);
`slow`   delays every answer;
`crash`  lets this process die after every N requests, in the middle of one, as a segmentation fault would.

Health checks pass through untouched and are not counted: a sick model looks healthy, that is the point.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from hafnium_contract.errors import InputError
from hafnium_contract.wire import BODY_BYTES_MAX, problem

KINDS = ("units", "stale", "slow", "crash")
_HOP = frozenset({
    "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length", "host", "content-encoding",
})
_CLIENT = web.AppKey("client", ClientSession)
_SCORING = ("/v1/score", "/v1/score/batch")


class FaultOptionsError(InputError):
    """A fault's options are not as they should be."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong. Only the fields of its kind count."""

    kind: Literal["units", "stale", "slow", "crash"]
    features: tuple[str, ...] = ()
    """`units`: these; `stale`: these, or all when empty."""
    factor: float = 100.0
    delay_ms: float = 150.0
    crash_after: int = 100

    def arguments(self) -> list[str]:
        """As command-line arguments of this module."""
        return [
            "--fault", self.kind, "--factor", repr(self.factor), "--delay-ms", repr(self.delay_ms),
            "--crash-after", str(self.crash_after), *(["--features", ",".join(self.features)] if self.features else []),
        ]


def parse_fault(kind: str, options: str) -> Fault:
    """Annotation values → Fault. `options` is JSON with features, factor, delayMs, crashAfter. Raises FaultOptionsError."""
    if kind not in KINDS:
        raise FaultOptionsError(f"unknown fault {kind!r}; known: {', '.join(KINDS)}")
    try:
        data: Any = json.loads(options)
    except ValueError as e:
        raise FaultOptionsError(f"fault options are not JSON: {e}") from e
    known = {"features", "factor", "delayMs", "crashAfter"}
    if not isinstance(data, dict) or not set(data) <= known:
        raise FaultOptionsError(f"fault options must be an object with some of {', '.join(sorted(known))}; got {options}")
    features = data.get("features", [])
    if not isinstance(features, list) or not all(isinstance(f, str) and f for f in features):
        raise FaultOptionsError(f"features must be a list of names, got {features!r}")
    if kind == "units" and not features:
        raise FaultOptionsError("units needs `features`: which values come in another unit")
    factor, delay, after = data.get("factor", 100.0), data.get("delayMs", 150.0), data.get("crashAfter", 100)
    for name, value in (("factor", factor), ("delayMs", delay), ("crashAfter", after)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise FaultOptionsError(f"{name} must be a number above 0, got {value!r}")
    if not isinstance(after, int):
        raise FaultOptionsError(f"crashAfter must be a whole number, got {after!r}")
    return Fault(cast(Any, kind), tuple(features), float(factor), float(delay), after)


class Spoiler:
    """Changes request bodies as the fault says. One per process: `stale` remembers the first row."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._first: dict[str, Any] | None = None

    def body(self, path: str, body: bytes) -> bytes:
        """The body as it goes on. Anything that is not a score request in JSON goes on unchanged."""
        if self._fault.kind not in ("units", "stale") or path not in _SCORING:
            return body
        try:
            data: Any = json.loads(body)
        except ValueError:
            return body
        if not isinstance(data, dict):
            return body
        rows = data.get("requests") if path.endswith("/batch") else [data]
        for row in cast(list[Any], rows) if isinstance(rows, list) else []:
            if isinstance(row, dict) and isinstance(row.get("features"), dict):
                self._spoil(cast(dict[str, Any], row["features"]))
        return json.dumps(data).encode()

    def _spoil(self, features: dict[str, Any]) -> None:
        if self._fault.kind == "units":
            for name in self._fault.features:
                value = features.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    features[name] = value * self._fault.factor
            return
        if self._first is None:
            self._first = dict(features)
        for name in self._fault.features or tuple(features):
            if name in features and name in self._first:
                features[name] = self._first[name]


def application(fault: Fault, upstream: str, die: Callable[[], None]) -> web.Application:
    """The proxy. `die` is called for `crash`; in a process of its own it does not return."""
    spoiler = Spoiler(fault)
    counted = 0

    async def session(app: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=512, keepalive_timeout=3)
        async with ClientSession(
            connector=connector, timeout=ClientTimeout(total=60, sock_connect=2), auto_decompress=True
        ) as client:
            app[_CLIENT] = client
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        nonlocal counted
        body = await request.read()
        scoring = request.method == "POST"
        if scoring:
            counted += 1
            if fault.kind == "crash" and counted >= fault.crash_after:
                die()
            if fault.kind == "slow":
                await asyncio.sleep(fault.delay_ms / 1000)
            body = spoiler.body(request.path, body)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP]
        headers.append(("Host", request.host))  # the host tells the transformer a mirrored copy
        try:
            async with request.app[_CLIENT].request(
                request.method, f"http://{upstream}{request.raw_path}", data=body, headers=headers, allow_redirects=False
            ) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(),
                    headers=[(k, v) for k, v in answer.headers.items() if k.lower() not in _HOP],  # type: ignore[arg-type] # pairs work
                )
        except (ClientError, TimeoutError) as e:
            text = json.dumps(problem(503, "upstream", f"fault proxy: {upstream} can't be reached: {e}"))
            return web.Response(status=503, text=text, content_type="application/problem+json")

    app = web.Application(client_max_size=BODY_BYTES_MAX + 65_536)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str] | None = None) -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m hafnium_local.faults", description="Breaks requests on purpose.")
    parser.add_argument("--listen", type=int, required=True, metavar="PORT")
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--fault", choices=KINDS, required=True)
    parser.add_argument("--features", default="", help="comma-separated request fields")
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--delay-ms", type=float, default=150.0)
    parser.add_argument("--crash-after", type=int, default=100)
    args = parser.parse_args(argv)
    fault = Fault(
        args.fault, tuple(f for f in args.features.split(",") if f), args.factor, args.delay_ms, max(1, args.crash_after)
    )
    web.run_app(
        application(fault, args.upstream, _die), host="127.0.0.1", port=args.listen, access_log=None, print=None,
        handle_signals=True, shutdown_timeout=2.0, keepalive_timeout=10.0,
    )


if __name__ == "__main__":
    main()
