"""Faults are inputs: a predictor that dies, hangs or changes its contract, a store that is locked, a log that can't be written."""

from __future__ import annotations

import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hafnium_servers import predictor, transformer, wait_until

from hafnium_contract.bundle import Bundle
from hafnium_contract.inference_log import log_files, log_schema, read_files
from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_testing import make_bundle, synthetic_rows

pytestmark = pytest.mark.slow
SCORE = "/v1/score"
PATIENT = ["--deadline_ms", "20000", "--lookup_timeout_ms", "10000"]


def test_killed_predictor_is_found_again_and_a_new_contract_is_taken_over(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    rows = synthetic_rows(contract, 3, seed=0)
    with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=repo, args=PATIENT) as front:
        behind.wait()
        front.wait()
        before = [front.post(SCORE, row).json for row in rows]
        behind.kill()
        gone = front.post(SCORE, rows[0])
        assert gone.status == 503
        assert "can't be reached" in gone.json["detail"]
        assert gone.headers["retry-after"] == "1"
        behind.start().wait()
        assert [front.post(SCORE, row).json for row in rows] == before
        behind.kill()
        # Another contract behind the same address: it needs no merchant_category and decides at another threshold
        data = contract.model_dump(mode="json")
        data["version"] = "2"
        data["features"] = [f for f in data["features"] if f["name"] != "merchant_category"]
        data["decision"]["threshold"] = 0.999
        newer = make_bundle(tmp_path / "b2", ModelContract.model_validate(data), version="8", bias=-1.5)
        with predictor(newer.path, tmp_path, port=behind.port) as changed:
            changed.wait()
            refused = front.post(SCORE, rows[0])
            assert refused.status == 422
            assert refused.json["errors"][0]["path"] == "features.merchant_category"
            for row in rows:
                row["features"].pop("merchant_category")
                answer = front.post(SCORE, row).json
                assert (answer["model_version"], answer["decision"]) == ("8", "approve")
            assert front.get("/v1/models/m/contract").json["contract_digest"] == newer.contract.digest


def test_hanging_predictor_ends_at_the_deadline_and_overload_is_said(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    args = ["--in_flight_max", "2", "--deadline_ms", "3000", "--lookup_timeout_ms", "2000"]
    with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=repo, args=args) as front:
        behind.wait()
        front.wait()
        assert front.post(SCORE, row).status == 200
        assert behind.process is not None
        os.kill(behind.process.pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(6) as pool:
                statuses = sorted(r.status for r in pool.map(lambda _: front.post(SCORE, row), range(6)))
            assert set(statuses) == {503, 504}
            assert statuses.count(504) >= 2
            assert front.get("/health/live").status == 200
            front.wait("/health/ready", 503)
        finally:
            os.kill(behind.process.pid, signal.SIGCONT)
        front.wait()
        assert front.post(SCORE, row).status == 200


def test_locked_store_degrades_and_does_not_hold_the_answer_up(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    args = ["--deadline_ms", "20000", "--lookup_timeout_ms", "300"]
    with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=repo, args=args) as front:
        behind.wait()
        front.wait()
        lock = sqlite3.connect(repo / "online.db", isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            answer = front.post(SCORE, row)
            assert answer.status == 200
            assert answer.json["degraded"] == [f.name for f in contract.features if isinstance(f.source, FromView)]
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        wait_until(lambda: front.post(SCORE, row).json["degraded"] == [])


def test_transformer_without_what_it_needs_lives_and_says_what_is_missing(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path) as front, \
            transformer(behind.port, tmp_path, repo=tmp_path / "empty") as other:
        reply = front.wait("/health/ready", 503)
        assert "fetched" in reply.json["detail"] or "feature store" in reply.json["detail"]
        behind.wait()
        wait_until(lambda: "--feature_repo" in front.get("/health/ready").json["detail"])
        reply = front.get("/health/ready")
        assert "customer_features, network_features" in reply.json["detail"]
        scored = front.post(SCORE, synthetic_rows(contract, 1, seed=0)[0])
        assert scored.status == 503
        assert "--feature_repo" in scored.json["detail"]
        assert front.get("/health/live").status == 200
        assert "feature_store.yaml: missing" in other.wait("/health/ready", 503).json["detail"] or "fetched" in \
            other.get("/health/ready").json["detail"]


def test_log_holds_what_was_answered_and_is_whole_after_sigterm(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    rows = synthetic_rows(contract, 20, seed=2)
    log_dir = tmp_path / "log"
    # neither time nor rows would flush before SIGTERM does
    args = [*PATIENT, "--log_flush_seconds", "3600"]
    env = {"HAFNIUM_ENTITY_HASH_KEY": "k" * 80}
    with predictor(bundle.path, tmp_path) as behind, \
            transformer(behind.port, tmp_path, repo=repo, log_dir=log_dir, args=args, env=env) as front:
        behind.wait()
        front.wait()
        answers = [front.post(SCORE, row).json for row in rows[:8]]
        answers += front.post("/v1/score/batch", {"requests": [*rows[8:17], {"bad": 1}]}).json["results"][:-1]
        answers.append(front.post(SCORE, rows[17], {"x-hafnium-arm": "candidate"}).json)
        answers.append(front.post(SCORE, rows[18], {"x-hafnium-arm": "candidate", "host": "risk-shadow:8080"}).json)
        answers.append(front.post(SCORE, rows[0]).json)
        assert log_files(log_dir) == []
        assert front.stop() == 0
    files = log_files(log_dir)
    table = read_files(files)
    assert table is not None
    assert table.schema.equals(log_schema(contract))
    assert f"model_version={bundle.manifest.model_version}" in str(files[0])
    logged = table.to_pylist()
    assert len(logged) == len(answers)
    for line, answer in zip(logged, answers, strict=True):
        for name in ("request_id", "model_name", "model_version", "decision", "degraded"):
            assert line[name] == answer[name]
        assert (line["score"], line["confidence_lower"]) == (answer["score"], answer["confidence_lower"])
        assert line["model_digest"] == bundle.manifest.digest
        assert line["latency_ms"] > 0
    assert [line["arm"] for line in logged] == ["stable"] * 17 + ["candidate", "shadow", "stable"]
    assert logged[0]["entity_hash"] == logged[-1]["entity_hash"]
    assert len({line["entity_hash"] for line in logged}) > 5
    assert [line["feature_transaction_amount"] for line in logged[:8]] == \
        pytest.approx([r["features"]["transaction_amount"] for r in rows[:8]])
    personal = [f.name for f in contract.features if f.personal]
    assert personal
    for path in files:
        assert not [c for c in pq.read_schema(path).names if any(p in c for p in personal)]
        content = path.read_bytes()
        assert b"customer_id" not in content
        assert not list(path.parent.glob(".*"))


def test_log_that_can_not_be_written_costs_no_answer(
    bundle: Bundle, contract: ModelContract, repo: Path, tmp_path: Path,
) -> None:
    blocked = tmp_path / "log"
    blocked.write_text("a file where the folder should be")
    args = [*PATIENT, "--log_flush_seconds", "0.1"]
    with predictor(bundle.path, tmp_path) as behind, \
            transformer(behind.port, tmp_path, repo=repo, log_dir=blocked, args=args) as front:
        behind.wait()
        front.wait()
        for row in synthetic_rows(contract, 5, seed=0):
            assert front.post(SCORE, row).status == 200
        wanted = 'inference_log_dropped_total{reason="write_failed"} 5.0'
        wait_until(lambda: wanted in front.get("/metrics").body.decode())
        assert front.stop() == 0
