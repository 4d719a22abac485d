"""The log's bounds and the hop's retry, each at its own seam."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hafnium_servers import wait_until
from prometheus_client import CollectorRegistry, generate_latest

from hafnium_contract.contract_file import load_contract
from hafnium_contract.errors import InputError
from hafnium_contract.inference_log import FEATURE_PREFIX, log_files, read_files
from hafnium_transformer.__main__ import main
from hafnium_transformer.errors import DeadlineError, UnavailableError
from hafnium_transformer.gate import arm_of
from hafnium_transformer.log_target import Folder
from hafnium_transformer.log_writer import EntityHash, InferenceLog, LogBatch
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.plan import Plan, make_plan
from hafnium_transformer.predictor_client import Deadline, HopLimits, PredictorClient
from hafnium_transformer.settings import Settings, parse_settings


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_contract(Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml"))


def log_row(plan: Plan, number: int, version: str = "1", day: int = 1, rows: int = 1) -> LogBatch:
    return LogBatch(
        plan, datetime(2026, 1, day, tzinfo=UTC), version, "sha256:x", [f"r{number + i}" for i in range(rows)], ["stable"] * rows,
        np.full(rows, 0.5, np.float32), np.full((rows, 2), [0.4, 0.6], np.float32), ["approve"] * rows, {}, [1.0] * rows,
        [{"customer_id": "c"}] * rows, np.full((rows, 15), number, np.float32),
    )


def open_log(folder: Path, registry: CollectorRegistry, queue: int, flush_rows: int = 1000) -> InferenceLog:
    return InferenceLog(Folder(folder), TransformerMetrics(registry), flush_seconds=3600.0, flush_rows=flush_rows,
                        queue_rows_max=queue, entity_hash=EntityHash("k"))


class SlowFolder(Folder):
    """Its first write waits until it is let go: meanwhile the queue fills."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.writing, self.let_go = threading.Event(), threading.Event()

    def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
        self.writing.set()
        assert self.let_go.wait(60.0)
        super().write(table, when, model_version, name)


@contextmanager
def busy_log(plan: Plan, folder: Path, registry: CollectorRegistry, queue: int) -> Iterator[InferenceLog]:
    """A log whose thread has half a queue in hand until the end."""
    target = SlowFolder(folder)
    log = InferenceLog(target, TransformerMetrics(registry), flush_seconds=3600.0, flush_rows=1000, queue_rows_max=queue,
                       entity_hash=EntityHash("k"))
    log.append(log_row(plan, 10_000, rows=max(queue // 2, 1)))
    assert target.writing.wait(60.0)
    yield log
    target.let_go.set()
    log.close()


def test_full_queue_drops_and_counts(plan: Plan, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with busy_log(plan, tmp_path, registry, queue=3) as log:
        for i in range(5):
            log.append(log_row(plan, i))
    log.append(log_row(plan, 9))
    table = read_files(log_files(tmp_path))
    assert table is not None
    assert sorted(table["request_id"].to_pylist()) == ["r0", "r1", "r10000", "r2"]
    text = generate_latest(registry).decode()
    assert 'inference_log_dropped_total{reason="queue_full"} 3.0' in text
    assert "inference_log_rows_total 4.0" in text


def test_a_queue_smaller_than_a_file_is_written_before_it_is_full(plan: Plan, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    log = open_log(tmp_path, registry, queue=1000, flush_rows=5000)
    for i in range(10):  # nothing else wakes the writer for an hour
        log.append(log_row(plan, 500 * i, rows=500))
        wait_until(lambda i=i: registry.get_sample_value("inference_log_rows_total") == 500 * (i + 1))
    log.close()
    assert not registry.get_sample_value("inference_log_dropped_total", {"reason": "queue_full"})


class HangingTarget:
    """A disk that takes a file and never says that it has it, until it is let go."""

    def __init__(self) -> None:
        self.writing, self.let_go = threading.Event(), threading.Event()

    def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
        self.writing.set()
        assert self.let_go.wait(60.0)


def test_rows_in_a_write_that_hangs_at_the_end_are_lost_ones(plan: Plan) -> None:
    registry, target = CollectorRegistry(), HangingTarget()
    log = InferenceLog(target, TransformerMetrics(registry), flush_seconds=3600.0, flush_rows=4000, queue_rows_max=10_000,
                       entity_hash=EntityHash("k"), close_s=0.2)
    log.append(log_row(plan, 0, rows=4000))
    assert target.writing.wait(60.0)
    log.append(log_row(plan, 4000, rows=10))
    log.close()
    target.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "inference-log":
            thread.join(60.0)
    assert registry.get_sample_value("inference_log_dropped_total", {"reason": "shutdown"}) == 4010
    assert not registry.get_sample_value("inference_log_dropped_total", {"reason": "write_failed"})
    assert registry.get_sample_value("inference_log_rows_total") == 0


def test_losses_are_counted_from_zero_on_so_that_the_first_one_is_an_increase(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    open_log(tmp_path, registry, queue=3).close()
    text = generate_latest(registry).decode()
    for reason in ("queue_full", "write_failed", "shutdown"):
        assert f'inference_log_dropped_total{{reason="{reason}"}} 0.0' in text


def test_a_batch_is_cut_where_the_room_ends(plan: Plan, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with busy_log(plan, tmp_path, registry, queue=1200) as log:
        log.append(log_row(plan, 0, rows=700))
        log.append(log_row(plan, 700, rows=700))
    table = read_files(log_files(tmp_path))
    assert table is not None
    assert sorted(table["request_id"].to_pylist()) == sorted(f"r{i}" for i in [*range(1200), *range(10_000, 10_600)])
    assert set(table["time"].to_pylist()) == {datetime(2026, 1, 1, tzinfo=UTC)}
    assert 'inference_log_dropped_total{reason="queue_full"} 200.0' in generate_latest(registry).decode()


def test_each_row_of_a_batch_keeps_what_is_its_own(plan: Plan, tmp_path: Path) -> None:
    batch = log_row(plan, 0, rows=5)._replace(
        arms=["stable", "candidate", "shadow", "stable", "stable"], scores=np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32),
        intervals=np.array([[0.1 * i, 0.2 * i] for i in range(5)], np.float32), decisions=list("abcde"),
        degraded={1: ["x", "y"], 4: ["z"]}, latencies_ms=[1.5, 2.5, 3.5, 4.5, 5.5], entities=[{"c": i} for i in range(4)] + [{}],
        inputs=np.arange(75, dtype=np.float32).reshape(5, 15),
    )
    for kept in (5, 2):
        folder = tmp_path / str(kept)
        log = open_log(folder, CollectorRegistry(), queue=kept)
        log.append(batch)
        log.close()
        table = read_files(log_files(folder))
        assert table is not None
        rows = table.to_pylist()
        assert len(rows) == kept
        for i, row in enumerate(rows):
            assert (row["request_id"], row["arm"], row["decision"]) == (f"r{i}", batch.arms[i], batch.decisions[i])
            assert (row["score"], row["confidence_lower"], row["confidence_upper"]) == (batch.scores[i], *batch.intervals[i])
            assert (row["degraded"], row["latency_ms"]) == ({1: ["x", "y"], 4: ["z"]}.get(i, []), 1.5 + i)
            assert row["entity_hash"] == EntityHash("k").of({"c": i} if i < 4 else {})
            logged = [row[FEATURE_PREFIX + plan.contract.inputs[j].name] for j in plan.logged_columns]
            assert logged == [15 * i + j for j in plan.logged_columns]


def test_files_are_parted_by_day_and_version_and_flushed_by_rows(plan: Plan, tmp_path: Path) -> None:
    log = open_log(tmp_path, CollectorRegistry(), queue=100, flush_rows=4)
    for i, (version, day) in enumerate([("1", 1), ("2", 1), ("1", 2), ("1", 1)]):
        log.append(log_row(plan, i, version, day))
    deadline = threading.Event()
    for _ in range(600):
        if len(log_files(tmp_path)) == 3:
            break
        deadline.wait(0.05)
    parents = sorted(str(p.parent.relative_to(tmp_path)) for p in log_files(tmp_path))
    assert parents == ["date=2026-01-01/model_version=1", "date=2026-01-01/model_version=2", "date=2026-01-02/model_version=1"]
    log.close()
    assert len(log_files(tmp_path)) == 3


def test_entity_hash_depends_on_key_and_entity_and_hides_both() -> None:
    one = EntityHash("key")
    assert one.of({"a": "1", "b": "2"}) == EntityHash("key").of({"b": "2", "a": "1"})
    assert one.of({"a": "1"}) != EntityHash("other").of({"a": "1"})
    assert one.of({"a": "1"}) != one.of({"a": 1})
    assert one.of({}) is None
    assert EntityHash(None).of({"a": "1"}) != EntityHash(None).of({"a": "1"})
    assert len(str(one.of({"a": "1"}))) == 32


async def broken_server(seen: list[bytes], answer: bytes) -> asyncio.Server:
    """A real TCP server that reads a request, answers with these bytes, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head)
        writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(("answer", "error", "tries"), [
    (b"", UnavailableError, 3),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf", UnavailableError, 3),
    (b"nonsense\r\n\r\n", UnavailableError, 1),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", UnavailableError, 1),
    (b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\n{}", UnavailableError, 1),
    (b"HTTP/1.1 504 X\r\ncontent-length: 2\r\n\r\n{}", DeadlineError, 1),
], ids=["closed", "half a body", "not HTTP", "not V2", "503", "504"])
async def test_only_a_broken_connection_is_tried_again(answer: bytes, error: type[Exception], tries: int) -> None:
    seen: list[bytes] = []
    server = await broken_server(seen, answer)
    port = server.sockets[0].getsockname()[1]
    client = PredictorClient(f"127.0.0.1:{port}", "m", tls=False, limits=HopLimits())
    try:
        with pytest.raises(error):
            await client.predict(np.zeros((1, 3), np.float32), "sha256:d", Deadline.after_ms(5000),
                                 b"x-request-id: q\r\ntraceparent: 00-aa-bb-01\r\n")
        assert len(seen) == tries
        head = seen[0].lower()
        for line in (b"x-request-id: q", b"traceparent: 00-aa-bb-01", b"x-hafnium-contract: sha256:d", b"x-hafnium-deadline-ms: "):
            assert line in head
        assert "reached" in await client.ready(2.0) or "not ready" in await client.ready(2.0) or answer.startswith(b"HTTP/1.1 200")
        with pytest.raises(UnavailableError, match="contract"):
            await client.fetch_contract(2.0)
    finally:
        client.close()
        server.close()
    with pytest.raises(DeadlineError):
        await client.predict(np.zeros((1, 3), np.float32), "d", Deadline.after_ms(-1), b"")


@pytest.mark.parametrize(("headers", "arm"), [
    ({}, "stable"), ({b"x-hafnium-arm": b"candidate"}, "candidate"), ({b"x-hafnium-arm": b"nonsense"}, "stable"),
    ({b"host": b"risk-shadow:8080", b"x-hafnium-arm": b"stable"}, "shadow"), ({b"host": b"risk-shadow"}, "shadow"),
    ({b"host": b"risk:8080-shadow"}, "shadow"), ({b"host": b"shadow:8080"}, "stable"),
])
def test_arm_comes_from_the_gateways_header_and_a_mirrored_host(headers: dict[bytes, bytes], arm: str) -> None:
    assert arm_of(headers) == arm


def test_settings_come_from_flags_then_environment() -> None:
    env = {"HAFNIUM_PREDICTOR_HOST": "p:80", "HAFNIUM_ENTITY_HASH_KEY": "secret", "HAFNIUM_LOG_FLUSH_SECONDS": "2"}
    settings = parse_settings(["--log_flush_seconds", "3", "--max_threads", "4"], env)
    assert (settings.predictor_host, settings.log_flush_seconds) == ("p:80", 3.0)
    assert settings.sdk_arguments == ("--max_threads", "4")
    assert "secret" not in repr(settings)
    assert [n for n, f in Settings.model_fields.items() if not f.description] == []
    for argv, said in (([], "predictor_host"), (["--predictor_host", "a b"], "predictor_host"), (["--deadline_ms", "0"], "deadline_ms")):
        with pytest.raises(InputError, match=said):
            parse_settings(argv, {})


def test_bad_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--predictor_host" in capsys.readouterr().err
