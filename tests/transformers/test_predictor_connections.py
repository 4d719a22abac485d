"""Connections to a predictor whose node dies without a word: they stay open and bring nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hafnium_scripted_predictor import ScriptedPredictor, scripted_predictor

from hafnium_contract.model_contract import ModelContract
from hafnium_transformer.errors import DeadlineError
from hafnium_transformer.predictor_client import Deadline, HopLimits, Prediction, PredictorClient

COLUMNS = 2
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
