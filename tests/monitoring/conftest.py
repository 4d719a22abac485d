"""A small world for the monitoring tests: two real bundles over one contract, and an inference log in the transformer's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hafnium_inference_log import write_log as write_log_at

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
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
    matrix[:, contract.input_names.index("hour_of_day")] = START.hour  # all windows here are of this hour, as many rows of the references
    return np.random.default_rng(0).permutation(matrix)  # its rows are in the order of time


@pytest.fixture(scope="session")
def stable_bundle(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("stable") / "bundle", contract, version="1", seed=1, rows=5_000)


@pytest.fixture(scope="session")
def candidate_bundle(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("candidate") / "bundle", contract, version="2", seed=2, rows=5_000)


def write_log(folder: Path, bundle: Bundle, matrix: Matrix, arm: str, *, start: datetime = START, **more: Any) -> list[Path]:
    """`matrix` [rows, n] as log rows of the hour from START."""
    return write_log_at(folder, bundle, matrix, arm, start=start, **more)


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
