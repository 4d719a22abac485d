from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hafnium_servers import Server, free_port, predictor

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def contract() -> ModelContract:
    return load_contract(EXAMPLES / "unified-risk" / "contract.yaml")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, contract: ModelContract) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "b1", contract, version="7")


@pytest.fixture(scope="session")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, grpc_port: int) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("predictor")
    with predictor(bundle.path, folder, args=["--grpc_port", str(grpc_port), "--body_bytes_max", "200000"]) as running:
        running.wait()
        yield running
