"""The inference log in a bucket of a real S3."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hafnium_s3 import S3
from prometheus_client import CollectorRegistry, generate_latest
from pyarrow.fs import FileSelector, FileSystem

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_transformer.log_target import Bucket, Folder, log_target
from hafnium_transformer.log_writer import EntityHash, InferenceLog, LogBatch
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.plan import make_plan
from hafnium_transformer.settings import parse_settings

pytestmark = pytest.mark.slow


def batch(contract: ModelContract, number: int) -> LogBatch:
    return LogBatch(
        make_plan(contract), datetime(2026, 1, 5, tzinfo=UTC), "7", "sha256:x", [f"r{number}"], ["stable"], np.full(1, 0.5, np.float32),
        np.array([[0.4, 0.6]], np.float32), ["approve"], {}, [1.0], [{"customer_id": "c"}], np.zeros((1, len(contract.inputs)), np.float32),
    )


def objects(uri: str) -> list[str]:
    filesystem, path = FileSystem.from_uri(uri)
    return sorted(f.path for f in filesystem.get_file_info(FileSelector(path, recursive=True, allow_not_found=True)) if f.is_file)


def test_rows_arrive_in_the_bucket(
    contract: ModelContract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = CollectorRegistry()
    with S3(tmp_path) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        uri = s3.uri("logs/risk")
        filesystem: Any
        filesystem, _ = FileSystem.from_uri(uri)
        filesystem.create_dir("logs")
        log = InferenceLog(log_target(uri), TransformerMetrics(registry), flush_seconds=0.2, flush_rows=1000, queue_rows_max=10_000,
                           entity_hash=EntityHash("k"))
        log.append(batch(contract, 1))
        until = time.monotonic() + 30
        while time.monotonic() < until and not objects(uri):
            time.sleep(0.1)
        [first] = objects(uri)
        assert first.startswith("logs/risk/date=2026-01-05/model_version=7/part-")
        with filesystem.open_input_file(first) as f:
            assert pq.read_table(f)["request_id"].to_pylist() == ["r1"]
        log.append(batch(contract, 2))
        log.close()
        assert len(objects(uri)) == 2
    assert "inference_log_rows_total 2.0" in generate_latest(registry).decode()


def test_places_are_told_apart() -> None:
    assert isinstance(log_target("/var/log/x"), Folder)
    assert isinstance(log_target("x"), Folder)
    assert isinstance(log_target("s3://b/p"), Bucket)
    for place in ("gs://b/p", "s3:///p", "http://h/p"):
        with pytest.raises(InputError, match="s3://BUCKET/PREFIX"):
            parse_settings(["--predictor_host", "p:80", "--inference_log", place], {})


def test_rows_that_no_bucket_takes_are_dropped_and_counted(contract: ModelContract) -> None:
    class Refusing:
        """A bucket that is not there: what a deleted one and wrong credentials look like, without their minutes of retries."""

        def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
            raise OSError("AWS Error NO_SUCH_BUCKET")

    registry = CollectorRegistry()
    log = InferenceLog(Refusing(), TransformerMetrics(registry), flush_seconds=3600, flush_rows=10, queue_rows_max=100,
                       entity_hash=EntityHash("k"))
    log.append(batch(contract, 1))
    log.close()
    text = generate_latest(registry).decode()
    assert 'inference_log_dropped_total{reason="write_failed"} 1.0' in text
    assert "inference_log_rows_total 0.0" in text
