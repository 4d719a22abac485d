"""A small scoring server for the tests: real HTTP in a real process, which can be told to fail. Run by path, not imported."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from typing import Any

from aiohttp import web


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--http_port", type=int, default=int(os.environ.get("PORT", "0")))
    parser.add_argument("--version", default="1")
    parser.add_argument("--status", type=int, default=200, help="of every score")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--fail-start", action="store_true")
    parser.add_argument("--child", action="store_true", help="also start a process that outlives its parent")
    args, rest = parser.parse_known_args()
    if args.fail_start:
        print("the model is broken: no such file", flush=True)  # noqa: T201
        sys.exit(3)
    state: dict[str, Any] = {"ready": True, "hang": False, "status": args.status, "seen": []}

    async def score(request: web.Request) -> web.Response:
        body = await request.json()
        state["seen"].append({
            "id": request.headers.get("x-request-id", ""), "arm": request.headers.get("x-hafnium-arm", ""), "host": request.host,
            "features": body.get("features"), "time": time.monotonic(),
        })
        if state["status"] != 200:
            return web.json_response({"title": "told to fail", "detail": "told to fail"}, status=state["status"])
        return web.json_response({
            "request_id": request.headers.get("x-request-id", body.get("request_id", "")), "score": 0.25, "decision": "approve",
            "model_name": "m", "model_version": args.version, "features": body.get("features"),
        })

    async def batch(request: web.Request) -> web.Response:
        results: list[dict[str, Any]] = []
        for row in (await request.json())["requests"]:
            if row.get("features", {}).get("amount") == "bad":
                results.append({"title": "bad", "status": 422, "detail": "amount: expected a number"})
            else:
                results.append({"request_id": row.get("request_id"), "score": 0.5, "model_version": args.version})
        return web.json_response({"results": results})

    async def ready(_: web.Request) -> web.Response:
        while state["hang"]:
            await asyncio.sleep(0.1)
        if not state["ready"]:
            return web.json_response({"detail": "the feature store is away"}, status=503)
        return web.json_response({"ready": True})

    async def control(request: web.Request) -> web.Response:
        state.update(await request.json())
        return web.json_response({})

    async def seen(_: web.Request) -> web.Response:
        me = {"argv": sys.argv[1:], "rest": rest, "env": dict(os.environ), "pid": os.getpid()}
        return web.json_response({"seen": state["seen"], **me})

    app = web.Application(client_max_size=8 * 1024 * 1024)
    app.router.add_post("/v1/score", score)
    app.router.add_post("/v1/score/batch", batch)
    app.router.add_get("/v2/health/ready", ready)
    app.router.add_get("/v2/health/live", ready)
    app.router.add_post("/control", control)
    app.router.add_get("/seen", seen)

    async def run() -> None:
        if args.child:
            await asyncio.create_subprocess_exec("sleep", "300")
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", args.http_port).start()
        stop = asyncio.Event()
        if args.ignore_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await runner.cleanup()

    asyncio.run(run())


if __name__ == "__main__":
    main()
