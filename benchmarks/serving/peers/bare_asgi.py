"""No framework: an ASGI function over ONNX Runtime, orjson, uvicorn with uvloop. What a careful engineer writes in an hour."""

from __future__ import annotations

import orjson
from onnx_session import open_session, score

SESSION = open_session()


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = b"{}"
    if body:
        answer = orjson.dumps({"predictions": score(SESSION, orjson.loads(body)["instances"])})
    length = str(len(answer)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
