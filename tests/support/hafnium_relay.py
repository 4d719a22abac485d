"""A door at another address: pods of the test cluster reach this machine at its bridge, and what listens on loopback not at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def relayed(url: str, address: str) -> Generator[str]:
    """`url`, reachable at `address` on a free port while the context lasts. Gives the new URL."""
    target = urlsplit(url)
    listening = socket.create_server((address, 0))

    def accept() -> None:
        while True:
            try:
                here, _ = listening.accept()
            except OSError:
                return  # closed: the context is over
            try:
                there = socket.create_connection((target.hostname, target.port), timeout=10)
            except OSError:
                here.close()
                continue
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"{target.scheme}://{address}:{listening.getsockname()[1]}{target.path}"
    finally:
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while part := one.recv(65536):
            other.sendall(part)
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
            end.close()
