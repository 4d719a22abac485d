from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hafnium_servers import Server, free_port, make_feature_repo, predictor, transformer

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle, synthetic_views

EXAMPLES = Path(__file__).parents[2] / "examples"
VIEW_SEED = 1


@dataclass(frozen=True)
class Chain:
    """A running predictor and the transformer before it."""

    predictor: Server
    transformer: Server
    bundle: Bundle
    contract: ModelContract
    log_dir: Path
    repo: Path
    grpc_port: int


@pytest.fixture(scope="session")
def contract() -> ModelContract:
    return load_contract(EXAMPLES / "unified-risk" / "contract.yaml")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, contract: ModelContract) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b1", contract, version="7", bias=-1.5)


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory, contract: ModelContract) -> Path:
    path = tmp_path_factory.mktemp("feast") / "repo"
    make_feature_repo(path, contract, synthetic_views(contract, VIEW_SEED))
    return path


@pytest.fixture(scope="session")
def chain(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, repo: Path, contract: ModelContract,
) -> Iterator[Chain]:
    """Predictor and transformer for tests that don't break them."""
    folder = tmp_path_factory.mktemp("chain")
    log_dir = folder / "log"
    grpc_port = free_port()
    with predictor(bundle.path, folder) as behind, transformer(
        behind.port, folder, repo=repo, log_dir=log_dir,
        # tests ask for answers, not for speed, and share two cores with others
        args=["--body_bytes_max", "300000", "--deadline_ms", "20000", "--lookup_timeout_ms", "10000",
              "--enable_grpc", "true", "--grpc_port", str(grpc_port)],
    ) as front:
        behind.wait()
        front.wait()
        yield Chain(behind, front, bundle, contract, log_dir, repo, grpc_port)
