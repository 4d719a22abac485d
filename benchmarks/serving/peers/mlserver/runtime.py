"""A custom runtime of MLServer, in process (parallel_workers 0, its fastest for a small model)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
from onnx_session import open_session, score


class OnnxRuntime(MLModel):
    async def load(self) -> bool:
        self._session = open_session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        one = payload.inputs[0]
        scores = score(self._session, np.array(one.data, np.float32).reshape(one.shape))
        output = ResponseOutput(name="score", shape=[len(scores)], datatype="FP32", data=scores)
        return InferenceResponse(model_name=self.name, outputs=[output])
