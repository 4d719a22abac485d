"""Ports of the processes, chosen once and kept in a file, so that what is restarted is found where it was.

They come from below the kernel's ephemeral range: a port from inside it may be taken by any outgoing connection in the moment
in which its server restarts, and then the server can't start.
"""

from __future__ import annotations

import json
import socket
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hafnium_contract.errors import InputError
from hafnium_contract.whole_files import write_atomically

FIRST = 20_000
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now, on any address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection's remains don't matter
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def _last() -> int:
    try:
        start = int(_RANGE_FILE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        start = 32_768
    return start - 1 if start - FIRST > 1_000 else 32_767


class Ports:
    """Key (such as `fraud@1a2b3c4d/predictor`) → port. `save` after changes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ports: dict[str, int] = {}
        self._saved = ""
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
            self._ports = {str(k): int(v) for k, v in data["ports"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._ports = {}  # only a convenience is lost: everything gets a new port

    def get(self, key: str) -> int:
        """The key's port; a new one when it has none yet. Raises InputError when no port is free."""
        return self._ports[key] if key in self._ports else self.renew(key)

    def claim(self, key: str, port: int | None) -> int:
        """This very port for the key when it is free and nobody else's, else another."""
        if port is not None and is_free(port) and port not in {p for k, p in self._ports.items() if k != key}:
            self._ports[key] = port
            return port
        return self.renew(key)

    def renew(self, key: str) -> int:
        """Another port for the key: the one that it had is taken."""
        first, last = FIRST, _last()
        size = last - first + 1
        # two supervisors that start at the same moment begin their search at different places
        start = zlib.crc32(str(self._file.resolve()).encode()) % size
        used = set(self._ports.values())
        for i in range(size):
            port = first + (start + i) % size
            if port not in used and is_free(port):
                self._ports[key] = port
                return port
        raise InputError(f"no free TCP port between {first} and {last} on this machine")

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets the ports of everything else."""
        self._ports = {k: v for k, v in self._ports.items() if k in keys}

    def save(self) -> None:
        """Writes the file when something changed."""
        text = json.dumps({"ports": dict(sorted(self._ports.items()))}, indent=1)
        if text != self._saved:
            write_atomically(self._file, text)
            self._saved = text
