"""A small world for the monitoring tests: two real bundles over one contract, and an inference log in the transformer's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.bundle import INPUT_NAME, SCORE_OUTPUT, Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.inference_log import FEATURE_PREFIX, log_schema, logged_features, partition
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.drift import DriftOptions, DriftOutcome, run_drift
from hafnium_monitoring.settings import DriftRules
from hafnium_testing import make_bundle, synthetic_matrix

START = datetime(2026, 1, 15, 12, 0, tzinfo=UTC)
NOW = START + timedelta(hours=1)
Matrix = npt.NDArray[np.float32]
Change = Callable[[ModelContract, Matrix], None]

_EXAMPLE = Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml"


@pytest.fixture(scope="session")
def contract() -> ModelContract:
    return load_contract(_EXAMPLE)


@pytest.fixture(scope="session")
def population(contract: ModelContract) -> Matrix:
    """[20000, n] encoded rows that traffic is drawn from; `make_bundle`'s references come from the same generator."""
    matrix = synthetic_matrix(contract, 20_000, seed=77)
    return np.random.default_rng(0).permutation(matrix)  # its rows are in the order of time: blocks would differ in the hour


@pytest.fixture(scope="session")
def stable_bundle(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("stable") / "bundle", contract, version="1", seed=1, rows=5_000)


@pytest.fixture(scope="session")
def candidate_bundle(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("candidate") / "bundle", contract, version="2", seed=2, rows=5_000)


def write_log(
    folder: Path, bundle: Bundle, matrix: Matrix, arm: str, *, start: datetime = START, seconds: float = 3600.0,
    degraded: npt.NDArray[np.bool_] | None = None, digest: str | None = None, files: int = 3, ids: str = "r",
) -> list[Path]:
    """Writes `matrix` [rows, n] as log rows, spread evenly over [start, start + seconds), in `files` files."""
    contract = bundle.contract
    rows = len(matrix)
    session = ort.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    score = np.asarray(session.run([SCORE_OUTPUT], {INPUT_NAME: matrix})[0])
    times = [start + timedelta(seconds=seconds * i / max(rows, 1)) for i in range(rows)]
    data = {
        "request_id": [f"{ids}-{i}" for i in range(rows)], "time": times, "model_name": [contract.name] * rows,
        "model_version": [bundle.manifest.model_version] * rows, "model_digest": [digest or bundle.manifest.digest] * rows,
        "arm": [arm] * rows, "score": score, "confidence_lower": score, "confidence_upper": score,
        "decision": ["approve"] * rows,
        "degraded": [["velocity_24h"] if degraded is not None and degraded[i] else [] for i in range(rows)],
        "latency_ms": np.full(rows, 3.0, np.float32), "entity_hash": ["0"] * rows,
    }
    for f in logged_features(contract):
        data[FEATURE_PREFIX + f.name] = matrix[:, contract.input_names.index(f.name)]
    table = pa.table(data, schema=log_schema(contract))
    written: list[Path] = []
    for k, part in enumerate(np.array_split(np.arange(rows), files)):
        if len(part) == 0:
            continue
        place = partition(folder, times[part[0]], bundle.manifest.model_version)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"part-{times[part[0]]:%Y%m%dT%H%M%S%f}-{arm}{k}.parquet"
        pq.write_table(table.slice(int(part[0]), len(part)), path)
        written.append(path)
    return written


def change(name: str, do: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Change:
    """A fault in one column."""
    def apply(contract: ModelContract, matrix: Matrix) -> None:
        j = contract.input_names.index(name)
        matrix[:, j] = do(matrix[:, j])
    return apply


@dataclass
class World:
    """Traffic of one hour over both arms, and what the drift run says about it."""

    root: Path
    contract: ModelContract
    population: Matrix
    stable: Bundle
    candidate: Bundle
    rules: DriftRules = field(default_factory=lambda: DriftRules(looks=10))
    seed: int = 5

    @property
    def logs(self) -> tuple[Path, Path]:
        return self.root / "log" / "candidate", self.root / "log" / "stable"

    def matrix(self, rows: int, *changes: Change) -> Matrix:
        self.seed += 1
        drawn = self.population[np.random.default_rng(self.seed).integers(0, len(self.population), rows)].copy()
        for apply in changes:
            apply(self.contract, drawn)
        return drawn

    def log(self, arm: str, rows: int, *changes: Change, degraded: float = 0.0) -> None:
        is_stable = arm == "stable"
        mask = np.random.default_rng(self.seed).random(rows) < degraded
        bundle = self.stable if is_stable else self.candidate
        write_log(self.logs[is_stable], bundle, self.matrix(rows, *changes), arm, degraded=mask)

    def run(self, *, alone: bool = False, **options: object) -> DriftOutcome:
        return run_drift(DriftOptions(
            bundle=self.candidate.path, logs=self.logs, start=START, end=NOW,
            stable_bundle=None if alone else self.stable.path, rules=self.rules, **options,  # type: ignore[arg-type]
        ), NOW)


@pytest.fixture
def world(tmp_path: Path, contract: ModelContract, population: Matrix, stable_bundle: Bundle, candidate_bundle: Bundle) -> World:
    return World(tmp_path, contract, population, stable_bundle, candidate_bundle)
