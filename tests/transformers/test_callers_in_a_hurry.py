"""Callers that give little time while the store hangs: they get what the contract has for missing values, and it is left alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hafnium_redis import Redis
from hafnium_scripted_predictor import ScriptedPredictor, scripted_predictor
from hafnium_servers import make_feature_repo
from prometheus_client import CollectorRegistry

from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_testing import synthetic_rows, synthetic_views
from hafnium_transformer.errors import DeadlineError, ScoringError, UnavailableError
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.feast import FeastReader
from hafnium_transformer.online_store.records import EntityValue, Found
from hafnium_transformer.online_store.value_columns import FoundColumns, columns_of
from hafnium_transformer.plan import Plan
from hafnium_transformer.predictor_client import Deadline, HopLimits, PredictorClient
from hafnium_transformer.scoring import Context, Scorer
from hafnium_transformer.settings import Settings

HURRY_MS = 80.0
PATIENT_MS = 20_000.0
BOUND_S = 60.0


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def behind(contract: ModelContract) -> AsyncIterator[ScriptedPredictor]:
    async with scripted_predictor(contract, len(contract.inputs)) as running:
        yield running


@pytest.fixture
async def scorer(behind: ScriptedPredictor, registry: CollectorRegistry) -> AsyncIterator[Scorer]:
    client = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=HopLimits())
    made = Scorer(Settings(predictor_host="unused:1"), client, TransformerMetrics(registry), None)
    yield made
    made.close()
    client.close()


def failures(registry: CollectorRegistry, contract: ModelContract, kind: str) -> float:
    return registry.get_sample_value("feature_lookup_failures_total", {"model_name": contract.name, "type": kind}) or 0.0


async def ask(scorer: Scorer, row: dict[str, Any], ms: float) -> dict[str, Any] | ScoringError:
    try:
        return (await scorer.score([row], Context("id", "stable", Deadline.after_ms(ms), time.perf_counter(), b"")))[0]
    except ScoringError as e:
        return e


@pytest.mark.slow
async def test_a_store_that_hangs_costs_callers_in_a_hurry_its_values_and_not_their_answers(
    contract: ModelContract, scorer: Scorer, registry: CollectorRegistry, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    looked_up = [f.name for f in contract.features if isinstance(f.source, FromView)]
    with Redis(tmp_path) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        reader = FeastReader(tmp_path / "repo")
        store = reader.direct_store(rows_max=100)
        assert store is not None
        scorer.use_store(reader, store)
        await scorer.refresh(None)
        redis.stall()
        until = time.monotonic() + BOUND_S
        degraded = 0
        # on a busy machine a caller may still come too late; before, all of them did, for as long as the store hung
        while time.monotonic() < until and not (degraded and failures(registry, contract, "not_asked")):
            answer = await ask(scorer, row, HURRY_MS)
            if isinstance(answer, ScoringError):
                assert isinstance(answer, DeadlineError)
            else:
                assert answer["degraded"] == looked_up
                degraded += 1
        assert degraded
        assert failures(registry, contract, "hurry")
        assert failures(registry, contract, "not_asked")
        redis.go_on()
        until = time.monotonic() + BOUND_S
        answer = await ask(scorer, row, PATIENT_MS)
        while time.monotonic() < until and (isinstance(answer, ScoringError) or answer["degraded"]):
            await asyncio.sleep(0.01)
            answer = await ask(scorer, row, PATIENT_MS)
        assert not isinstance(answer, ScoringError)
        assert answer["degraded"] == []


class _Slow:
    """A store that is well and takes 60 ms: who gives less gets nothing."""

    def __init__(self) -> None:
        self.answered = 0

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        await asyncio.sleep(0)
        if timeout_s < 0.06:
            raise DeadlineError("slower than that")
        self.answered += 1
        return [{} for _ in entities]

    async def read_columns(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> FoundColumns:
        return columns_of(plan, await self.read(plan, entities, timeout_s))

    def close(self) -> None: ...


class _AnyReader:
    def entity_types(self, plan: Plan) -> dict[str, str]:
        return {}

    def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]]) -> list[Found]:
        return [{} for _ in entities]

    def refresh(self) -> None: ...


async def test_haste_alone_never_closes_a_store_that_answers(
    contract: ModelContract, scorer: Scorer, registry: CollectorRegistry,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    store = _Slow()
    scorer.use_store(_AnyReader(), store)
    await scorer.refresh(None)
    for _ in range(30):
        await ask(scorer, row, HURRY_MS)
        await asyncio.sleep(0)  # for the lookup beside it
    assert failures(registry, contract, "hurry") >= 1
    assert store.answered > 1
    assert failures(registry, contract, "not_asked") == 0


FAILURES = Settings(predictor_host="unused:1").breaker_failures_max


class _Hanging(_Slow):
    """A store that fails, and then hangs until it is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.well = True

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        if self.well:
            return [{} for _ in entities]
        if self.answered < FAILURES:
            self.answered += 1
            raise UnavailableError("gone")
        self.asked.set()
        await asyncio.sleep(BOUND_S)
        raise AssertionError("it was given up before")


async def test_the_one_who_may_try_the_store_keeps_nobody_from_it_by_going_away(
    contract: ModelContract, behind: ScriptedPredictor, registry: CollectorRegistry,
) -> None:
    client = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=HopLimits())
    settings = Settings(predictor_host="unused:1", breaker_pause_max_s=BOUND_S)
    scorer, store = Scorer(settings, client, TransformerMetrics(registry), None), _Hanging()
    row = synthetic_rows(contract, 1, seed=0)[0]
    try:
        scorer.use_store(_AnyReader(), store)
        await scorer.refresh(None)
        store.well = False
        until = time.monotonic() + BOUND_S
        trying = asyncio.create_task(ask(scorer, row, 2 * PATIENT_MS))
        while not store.asked.is_set() and time.monotonic() < until:
            await asyncio.wait([trying], timeout=0.02)
            if trying.done():
                trying = asyncio.create_task(ask(scorer, row, 2 * PATIENT_MS))
        assert store.asked.is_set()
        before = failures(registry, contract, "not_asked")
        assert before, "the breaker was open"
        trying.cancel()
        await asyncio.wait([trying])
        store.well = True
        await ask(scorer, row, PATIENT_MS)
        assert failures(registry, contract, "not_asked") == before
    finally:
        scorer.close()
        client.close()
