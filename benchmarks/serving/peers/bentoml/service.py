"""BentoML as its documentation shows it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))
from onnx_session import open_session, score


@bentoml.service(workers=1)
class Scorer:
    def __init__(self) -> None:
        self._session = open_session()

    @bentoml.api
    def predict(self, instances: list[list[float]]) -> dict[str, list[float]]:
        return {"predictions": score(self._session, instances)}
