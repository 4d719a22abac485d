"""Rows that share a batch, of which one's time is over before the predictor has answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hafnium_scripted_predictor import ScriptedPredictor, plain_contract, scripted_predictor
from prometheus_client import CollectorRegistry

from hafnium_contract.inference_log import log_files, read_files
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.serving.hot_protocol import HotRequest
from hafnium_transformer.admission import QueueLimit
from hafnium_transformer.coalescing import Coalescer, Waiting
from hafnium_transformer.errors import DeadlineError, ScoringError
from hafnium_transformer.log_target import log_target
from hafnium_transformer.log_writer import EntityHash, InferenceLog
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.predictor_client import Deadline, HopLimits, PredictorClient
from hafnium_transformer.rows import parse_row
from hafnium_transformer.scoring import Context, Result, Scorer
from hafnium_transformer.settings import Settings

PATIENT_MS = 30_000.0
HURRY_MS = 50.0


@pytest.fixture
def contract() -> ModelContract:
    return plain_contract()


@pytest.fixture
async def behind(contract: ModelContract) -> AsyncIterator[ScriptedPredictor]:
    async with scripted_predictor(contract, len(contract.inputs)) as running:
        yield running


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> TransformerMetrics:
    return TransformerMetrics(registry)


@pytest.fixture
def inference_log(metrics: TransformerMetrics, tmp_path: Path) -> Iterator[InferenceLog]:
    """It writes when it is closed."""
    made = InferenceLog(
        log_target(str(tmp_path / "log")), metrics, flush_seconds=3600.0, flush_rows=1000, queue_rows_max=1000,
        entity_hash=EntityHash(None),
    )
    yield made
    made.close()


@pytest.fixture
async def logged(behind: ScriptedPredictor, metrics: TransformerMetrics, inference_log: InferenceLog) -> AsyncIterator[Scorer]:
    client = PredictorClient(f"127.0.0.1:{behind.port}", "m", tls=False, limits=HopLimits())
    made = Scorer(Settings(predictor_host="unused:1"), client, metrics, inference_log)
    await made.refresh(None)
    yield made
    made.close()
    client.close()


def waiting(scorer: Scorer, name: str, ms: float, answers: dict[str, Result], *, explain: bool = False) -> Waiting:
    item: dict[str, Any] = {"features": {"a": 1 + len(name), "b": 2 * len(name), "c": 3}, "explain": explain}
    row = parse_row(scorer.plan, item, request_id=name, now_s=time.time())

    def done(one: Waiting, result: Result) -> None:
        answers[one.row.request_id] = result

    context = Context(name, "stable", Deadline.after_ms(ms), time.perf_counter(), b"")
    return Waiting(scorer.plan, item, row, context, cast(HotRequest, None), done)


@pytest.mark.parametrize("explain", [False, True], ids=["plain", "explained"])
async def test_a_row_that_was_answered_504_is_not_in_the_log_and_no_score_of_it_is_counted(
    logged: Scorer, behind: ScriptedPredictor, registry: CollectorRegistry, inference_log: InferenceLog, tmp_path: Path, explain: bool,
) -> None:
    answers: dict[str, Result] = {}
    coalescer = Coalescer(logged, QueueLimit(256, 0.02), batches_max=1, rows_max=1000)
    behind.answers.clear()
    for name, ms in (("first", PATIENT_MS), ("hurried", HURRY_MS), ("patient", PATIENT_MS)):
        coalescer.submit(waiting(logged, name, ms, answers, explain=explain))
    async with asyncio.timeout(PATIENT_MS / 1000.0):
        while "hurried" not in answers:
            await asyncio.sleep(0.005)
    behind.answers.set()
    await coalescer.drain()
    assert behind.asked == 1
    assert isinstance(answers["hurried"], DeadlineError)
    alone: dict[str, Result] = {}
    for name in ("first", "patient"):
        coalescer.submit(waiting(logged, name, PATIENT_MS, alone, explain=explain))
        await coalescer.drain()
        assert not isinstance(alone[name], ScoringError)
        assert answers[name] == alone[name]
    assert registry.get_sample_value("model_score_count", {"model_name": "plain", "model_version": "1"}) == 4
    inference_log.close()
    table = read_files(log_files(tmp_path / "log"))
    assert table is not None
    assert [(line["request_id"], line["feature_a"]) for line in table.to_pylist()] == \
        [("first", 6.0), ("patient", 8.0), ("first", 6.0), ("patient", 8.0)]
    for line, answer in zip(table.to_pylist(), [answers["first"], answers["patient"]], strict=False):
        assert not isinstance(answer, ScoringError)
        assert line["score"] == answer["score"]


async def test_a_batch_whose_rows_were_all_answered_leaves_no_trace_in_the_log(
    logged: Scorer, behind: ScriptedPredictor, registry: CollectorRegistry, inference_log: InferenceLog, tmp_path: Path,
) -> None:
    answers: dict[str, Result] = {}
    coalescer = Coalescer(logged, QueueLimit(256, 0.02), batches_max=1, rows_max=1000)
    one = waiting(logged, "one", PATIENT_MS, answers)
    behind.answers.clear()
    coalescer.submit(one)
    async with asyncio.timeout(PATIENT_MS / 1000.0):
        while not behind.asked:
            await asyncio.sleep(0.001)
    one.answer(DeadlineError("over"))
    behind.answers.set()
    await coalescer.drain()
    assert isinstance(answers["one"], DeadlineError)
    assert not registry.get_sample_value("model_score_count", {"model_name": "plain", "model_version": "1"})
    inference_log.close()
    assert log_files(tmp_path / "log") == []
