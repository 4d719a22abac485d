"""LitServe as its documentation shows it."""

from __future__ import annotations

import os

import litserve as ls
from onnx_session import open_session, score


class Api(ls.LitAPI):
    def setup(self, device):
        self._session = open_session()

    def decode_request(self, request):
        return request["instances"]

    def predict(self, rows):
        return score(self._session, rows)

    def encode_response(self, scores):
        return {"predictions": scores}


if __name__ == "__main__":
    ls.LitServer(Api(), accelerator="cpu").run(
        host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), log_level="warning", generate_client_file=False
    )
