"""Another model behind the predictor's address: with the same contract, with another one, and while pods of both answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from hafnium_scripted_predictor import ScriptedPredictor, plain_contract, scripted_predictor
from prometheus_client import CollectorRegistry

from hafnium_contract.serving.hot_protocol import HotRequest
from hafnium_transformer.admission import QueueLimit
from hafnium_transformer.coalescing import Coalescer, Waiting
from hafnium_transformer.errors import ScoringError, UnavailableError
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.predictor_client import Deadline, HopLimits, PredictorClient
from hafnium_transformer.rows import parse_row
from hafnium_transformer.scoring import Context, Result, Scorer
from hafnium_transformer.settings import Settings

PATIENT_MS = 30_000.0
ROW: dict[str, Any] = {"features": {"a": 1, "b": 2, "c": 3}}


@pytest.fixture
async def behind() -> AsyncIterator[ScriptedPredictor]:
    async with scripted_predictor(plain_contract(), 3) as running:
        yield running


@pytest.fixture
async def scorer(behind: ScriptedPredictor) -> AsyncIterator[Scorer]:
    client = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=HopLimits())
    made = Scorer(Settings(predictor_host="unused:1"), client, TransformerMetrics(CollectorRegistry()), None)
    await made.refresh(None)
    yield made
    made.close()
    client.close()


def context(name: str = "id") -> Context:
    return Context(name, "stable", Deadline.after_ms(PATIENT_MS), time.perf_counter(), b"")


async def ask(scorer: Scorer) -> Result:
    try:
        return (await scorer.score([ROW], context()))[0]
    except ScoringError as e:
        return e


async def ask_coalesced(scorer: Scorer, count: int) -> list[Result]:
    """Rows of as many requests, which leave together."""
    results: list[Result] = []

    def done(_: Waiting, result: Result) -> None:
        results.append(result)

    coalescer = Coalescer(scorer, QueueLimit(256, 0.02), batches_max=1, rows_max=100)
    for k in range(count):
        row = parse_row(scorer.plan, ROW, request_id=str(k), now_s=0.0)
        coalescer.submit(Waiting(scorer.plan, ROW, row, context(str(k)), cast(HotRequest, None), done))
    await coalescer.drain()
    return results


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENT_MS / 1000.0):
        while not condition():
            await asyncio.sleep(0.001)


async def test_another_model_with_the_same_contract_is_the_served_one_from_its_first_answer_on(
    behind: ScriptedPredictor, scorer: Scorer,
) -> None:
    plan = scorer.plan
    for version in ("1", "2", "1", "3"):  # to and fro: pods of two models at one address
        behind.version, behind.digest = version, f"sha256:{version}"
        for result in [await ask(scorer), *await ask_coalesced(scorer, 3)]:
            assert not isinstance(result, ScoringError)
            assert result["model_version"] == version
        assert scorer.served is not None
        assert (scorer.served.model_version, scorer.served.model_digest) == (version, f"sha256:{version}")
        assert scorer.served.contract is plan.contract
    assert scorer.plan is plan
    assert behind.contract_asked == 1


async def test_a_late_answer_under_the_contract_before_does_not_bring_its_model_back(behind: ScriptedPredictor, scorer: Scorer) -> None:
    behind.answers.clear()
    late = asyncio.create_task(ask(scorer))
    await until(lambda: behind.asked == 1)
    behind.contract, behind.version, behind.digest = plain_contract(version="2"), "2", "sha256:2"
    await scorer.refresh(scorer.plan)
    behind.version, behind.digest = "1", "sha256:1"
    behind.answers.set()
    result = await late
    assert not isinstance(result, ScoringError)
    assert result["model_version"] == "1"
    assert scorer.served is not None
    assert (scorer.served.model_version, scorer.served.contract.version) == ("2", "2")


async def test_rows_that_pods_of_two_contracts_refuse_in_turn_are_told_503_and_not_409(behind: ScriptedPredictor, scorer: Scorer) -> None:
    behind.takes = set()  # who tells the contract is never the one who is asked for scores
    for result in [await ask(scorer), *await ask_coalesced(scorer, 1), *await ask_coalesced(scorer, 3)]:
        assert isinstance(result, UnavailableError)
        assert result.status == 503
        assert "contract is changing" in result.detail
    behind.takes = {behind.contract.digest}
    assert not isinstance(await ask(scorer), ScoringError)


async def test_a_contract_that_can_not_be_taken_over_is_fetched_once_for_all_who_wait_for_it(
    behind: ScriptedPredictor, scorer: Scorer, caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hafnium.transformer")
    looked_up = {"name": "d", "description": "d", "dtype": "float", "range": [0, 100], "missing": "impute",
                 "source": {"view": "v", "field": "d"}}
    given = {"name": "a", "description": "a", "dtype": "float", "range": [0, 100], "missing": "impute"}
    behind.contract = plain_contract(  # there is no store to read it from
        entities=[{"name": "e", "joinKey": "e_id"}], views=[{"name": "v", "entity": "e", "maxAge": "1h"}], features=[given, looked_up])
    behind.takes = set()
    behind.contract_is_told.clear()
    asked = [asyncio.create_task(ask(scorer)) for _ in range(12)]
    await until(lambda: caplog.text.count("predictor refused contract") == 12)
    behind.contract_is_told.set()
    for result in await asyncio.gather(*asked):
        assert isinstance(result, UnavailableError)
        assert "--feature_repo" in result.detail
    assert behind.contract_asked == 2  # with the one at the start
    await ask(scorer)
    assert behind.contract_asked == 3  # tried again by the next
