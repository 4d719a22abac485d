"""A predictor over real HTTP whose model, refusals and silences a test chooses: for what a real one can't be made to do on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.v2_binary import LENGTH_HEADER, decode_request, encode_answer
from hafnium_contract.wire import BATCH_ROWS_MAX, CONTRACT_HEADER, MODEL_DIGEST_HEADER, MODEL_VERSION_HEADER


@dataclass
class ScriptedPredictor:
    """Answers each row with a score of its values. What is changed holds from the next request on."""

    contract: ModelContract
    """What is said when it is asked for."""
    columns: int
    version: str = "1"
    digest: str = "sha256:1"
    takes: set[str] = field(default_factory=set[str])
    """Digests of contracts; rows under any other get 409."""
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    """Rows wait until it is set."""
    contract_is_told: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    """Requests for scores."""
    contract_asked: int = 0
    connections: int = 0
    """Ever made."""
    port: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set[asyncio.StreamWriter])
    _deaf: set[asyncio.StreamWriter] = field(default_factory=set[asyncio.StreamWriter])

    def lose_connections(self) -> None:
        """Those there are stay open and never bring anything again, as when a node dies. New ones work."""
        self._deaf |= self._open

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers["content-length"]))
                if writer not in self._deaf:
                    answer = await (self._infer(headers, body) if "/infer " in head[0] else self._contract())
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _infer(self, headers: dict[str, str], body: bytes) -> bytes:
        self.asked += 1
        await self.answers.wait()
        if headers[CONTRACT_HEADER] not in self.takes:
            return _http(409, b'{"detail": "another contract"}')
        request = decode_request(body, headers[LENGTH_HEADER].encode(), self.columns, BATCH_ROWS_MAX)
        weighted = np.nan_to_num(request.matrix) @ np.arange(1, self.columns + 1, dtype=np.float32)
        score = (1.0 / (1.0 + np.exp(-weighted / 100.0))).astype(np.float32)
        length, answer = encode_answer(score, np.stack([score, score], axis=1), "m", self.version, request)
        return _http(200, answer, **{LENGTH_HEADER: str(length), MODEL_VERSION_HEADER: self.version, MODEL_DIGEST_HEADER: self.digest})

    async def _contract(self) -> bytes:
        self.contract_asked += 1
        await self.contract_is_told.wait()
        return _http(200, json.dumps({
            "contract": self.contract.model_dump(mode="json"), "contract_digest": self.contract.digest,
            "model_version": self.version, "model_digest": self.digest,
        }).encode())


def plain_contract(**changed: Any) -> ModelContract:
    """Three numbers, which a request brings; `changed`: members of the document."""
    return parse_contract({
        "schemaVersion": 1, "name": "plain", "version": "1", "owner": "o", "description": "d",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "1d"}},
        "entities": [],
        "features": [
            {"name": name, "description": name, "dtype": "float", "range": [0, 100], "missing": "impute"} for name in ("a", "b", "c")
        ],
        "decision": {"threshold": 0.5},
        **changed,
    })


def _http(status: int, body: bytes, **headers: str) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}content-length: {len(body)}\r\n\r\n".encode("latin-1") + body


@asynccontextmanager
async def scripted_predictor(contract: ModelContract, columns: int) -> AsyncGenerator[ScriptedPredictor]:
    """One that listens, takes its contract and answers at once."""
    made = ScriptedPredictor(contract, columns, takes={contract.digest})
    made.answers.set()
    made.contract_is_told.set()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = int(server.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        server.close()
