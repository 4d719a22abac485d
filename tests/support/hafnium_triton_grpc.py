"""Asks over gRPC with tritonclient: `PORT IN.npy OUT.npz`. A process of its own: its messages have the names of KServe's."""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main(port: str, source: str, target: str) -> None:
    matrix = np.load(source)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live()
        assert client.is_model_ready("m")
        given = triton.InferInput("features", list(matrix.shape), "FP32")
        given.set_data_from_numpy(matrix)
        answer = client.infer("m", [given], request_id="g-1")
        wrong = triton.InferInput("other", [1, 3], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
        try:
            client.infer("m", [wrong])
            status = "answered"
        except InferenceServerException as e:
            status = str(e.status())
    np.savez(target, score=answer.as_numpy("score"), interval=answer.as_numpy("interval"), id=answer.get_response().id, wrong=status)


if __name__ == "__main__":
    main(*sys.argv[1:])
