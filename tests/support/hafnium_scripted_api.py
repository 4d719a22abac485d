"""A server on loopback that answers as a script says: for faults that a real API server can't be made to show on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kubernetes import client as k8s

from hafnium_rollout.kubernetes.client import KubernetesClient


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    """Close the connection without an answer."""


def says(status: int, message: str = "", **headers: str) -> Answer:
    """A Kubernetes Status object."""
    body = json.dumps({"kind": "Status", "status": "Failure", "message": message, "code": status}).encode()
    return Answer(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def data(item: Any) -> Answer:
    return Answer(200, json.dumps(item).encode())


class ScriptedApi:
    """Answers in the order given; the last one stays. What was asked is in `asked`."""

    def __init__(self, *answers: Answer | Callable[[Asked], Answer]) -> None:
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, asked: Asked) -> Answer:
        with self._lock:
            self.asked.append(asked)
            following = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return following(asked) if callable(following) else following

    def client(self, **options: Any) -> KubernetesClient:
        return KubernetesClient(k8s.ApiClient(k8s.Configuration(host=self.url)), **options)


@contextmanager
def scripted_api(*answers: Answer | Callable[[Asked], Answer], port: int = 0) -> Generator[ScriptedApi]:
    """`port`: one that an earlier server had, to come back there."""
    api = ScriptedApi(*answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self.rfile.read(length))
            answer = api.answer(asked)
            if answer.cut:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 - names that http.server calls

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
