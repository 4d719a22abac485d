"""KServe's SDK as its documentation shows it: a Model with predict(), V1 and V2. `tuned`: its per-request logs off."""

from __future__ import annotations

import logging
import os

import numpy as np
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from onnx_session import open_session, score


class OnnxModel(Model):
    def load(self) -> bool:
        self._session = open_session()
        self.ready = True
        return True

    async def predict(self, payload, headers=None, response_headers=None):
        if isinstance(payload, InferRequest):
            output = InferOutput("score", [payload.inputs[0].shape[0]], "FP32")
            output.set_data_from_numpy(np.asarray(score(self._session, payload.inputs[0].as_numpy()), np.float32), binary_data=False)
            return InferResponse(payload.id, self.name, [output])
        return {"predictions": score(self._session, payload["instances"])}


if __name__ == "__main__":
    port, tuned = int(os.environ["BENCH_PORT"]), os.environ.get("BENCH_TUNED") == "1"
    model = OnnxModel("m")
    model.load()
    if tuned:
        logging.disable(logging.INFO)  # levels of single loggers are undone by the SDK when it starts
        ModelServer(http_port=port, enable_grpc=False, enable_latency_logging=False).start([model])
    else:
        ModelServer(http_port=port, enable_grpc=False).start([model])
