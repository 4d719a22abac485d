"""Connections to a predictor whose node dies without a word: they stay open and bring nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hafnium_scripted_predictor import ScriptedPredictor, scripted_predictor

from hafnium_contract.model_contract import ModelContract
from hafnium_transformer.errors import DeadlineError, UnavailableError
from hafnium_transformer.predictor_client import Deadline, HopLimits, Prediction, PredictorClient

COLUMNS = 2
HURRY_MS = 50.0
FAIR_MS = 300.0
PATIENT_MS = 10_000.0


@pytest.fixture
async def behind(contract: ModelContract) -> AsyncIterator[ScriptedPredictor]:
    async with scripted_predictor(contract, COLUMNS) as running:
        yield running


@pytest.fixture
async def client(behind: ScriptedPredictor) -> AsyncIterator[PredictorClient]:
    made = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=HopLimits())
    yield made
    made.close()


async def ask(client: PredictorClient, behind: ScriptedPredictor, ms: float) -> Prediction:
    return await client.predict(np.zeros((1, COLUMNS), np.float32), behind.contract.digest, Deadline.after_ms(ms), b"")


async def on_their_way(behind: ScriptedPredictor, asked: int) -> None:
    async with asyncio.timeout(PATIENT_MS / 1000.0):
        while behind.asked < asked:
            await asyncio.sleep(0.001)


async def test_one_connection_that_says_nothing_costs_its_caller_and_the_other_dead_ones_nobody(
    behind: ScriptedPredictor, client: PredictorClient,
) -> None:
    behind.answers.clear()
    asked = [asyncio.create_task(ask(client, behind, PATIENT_MS)) for _ in range(6)]
    await on_their_way(behind, 6)
    behind.answers.set()
    await asyncio.gather(*asked)
    assert behind.connections == 6
    behind.lose_connections()
    with pytest.raises(DeadlineError):
        await ask(client, behind, FAIR_MS)
    assert (await ask(client, behind, PATIENT_MS)).model_version == "1"
    assert behind.connections == 7


async def test_a_predictor_that_was_slow_once_loses_no_request_and_no_connection_that_answered_meanwhile(
    behind: ScriptedPredictor, client: PredictorClient,
) -> None:
    behind.answers.clear()
    late = asyncio.create_task(ask(client, behind, FAIR_MS))
    in_use = asyncio.create_task(ask(client, behind, PATIENT_MS))
    await on_their_way(behind, 2)
    assert await client.ready(PATIENT_MS / 1000.0) == ""  # over a third one, which is idle afterwards
    with pytest.raises(DeadlineError):
        await late
    behind.answers.set()
    assert (await in_use).model_version == "1"
    await asyncio.gather(ask(client, behind, PATIENT_MS), ask(client, behind, PATIENT_MS))
    assert behind.connections == 3


async def test_a_caller_in_a_hurry_who_may_try_a_failed_predictor_keeps_nobody_else_from_it(behind: ScriptedPredictor) -> None:
    limits = HopLimits(failures_max=1, pause_first_s=0.01, pause_max_s=3600.0)
    client = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=limits)
    try:
        behind.answers.clear()
        with pytest.raises(DeadlineError):
            await ask(client, behind, FAIR_MS)
        assert client.breaker.is_open
        await asyncio.sleep(2.0 * limits.pause_first_s)
        with pytest.raises(DeadlineError):
            await ask(client, behind, HURRY_MS)
        behind.answers.set()
        assert (await ask(client, behind, PATIENT_MS)).model_version == "1"
    finally:
        client.close()


async def test_a_connection_that_was_closed_meanwhile_does_not_use_up_the_only_try() -> None:
    """A predictor that fails and then closes its connections, as one that restarts does: the next connection answers."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        mine = connections
        for status in (b"500", b"") if mine == 1 else (b"404",):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            if status:
                writer.write(b"HTTP/1.1 %s X\r\ncontent-length: 2\r\n\r\n{}" % status)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    limits = HopLimits(failures_max=1, pause_first_s=0.01, pause_max_s=3600.0)
    client = PredictorClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", tls=False, limits=limits)
    rows = np.zeros((1, COLUMNS), np.float32)
    try:
        with pytest.raises(UnavailableError, match="answered 500"):
            await client.predict(rows, "d", Deadline.after_ms(PATIENT_MS), b"")
        assert client.breaker.is_open
        await asyncio.sleep(2.0 * limits.pause_first_s)
        with pytest.raises(UnavailableError, match="answered 404"):
            await client.predict(rows, "d", Deadline.after_ms(PATIENT_MS), b"")
        assert connections == 2
        assert not client.breaker.is_open
    finally:
        client.close()
        server.close()
