"""A transformer as one writes it with KServe's SDK and Feast: get_online_features in preprocess(), the SDK's client to the predictor.

`tuned`, by hand: per-request logs off, and the hop over one aiohttp session instead of the SDK's client.
"""

from __future__ import annotations

import json
import logging
import os

import aiohttp
from feast import FeatureStore
from kserve import Model, ModelServer
from kserve.predictor_config import PredictorConfig

SPEC = json.loads(os.environ["BENCH_SPEC"])
TUNED = os.environ.get("BENCH_TUNED") == "1"
PREDICTOR = os.environ["BENCH_PREDICTOR"]


class FeastTransformer(Model):
    def __init__(self) -> None:
        super().__init__("m")
        self._store = FeatureStore(repo_path=os.environ["BENCH_REPO"])
        self._session: aiohttp.ClientSession | None = None
        self.ready = True

    async def preprocess(self, payload, headers=None):
        instances = payload["instances"]
        entities = [{key: row[key] for key in SPEC["keys"]} for row in instances]
        found = self._store.get_online_features(SPEC["references"], entities, full_feature_names=True).to_dict()
        rows = []
        for i, row in enumerate(instances):
            values = []
            for source in SPEC["columns"]:
                if source["from"] == "request":
                    value = row[source["name"]]
                    value = source["codes"].get(value, -1) if source["codes"] else value
                elif source["from"] == "view":
                    value = found[source["name"]][i]
                else:
                    value = 0.0
                values.append(float("nan") if value is None else float(value))
            rows.append([None if v != v else v for v in values])
        return {"instances": rows}

    async def predict(self, payload, headers=None, response_headers=None):
        if not TUNED:
            return await super().predict(payload, headers, response_headers)
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64))
        async with self._session.post(f"http://{PREDICTOR}/v1/models/m:predict", json=payload) as answer:
            return await answer.json()


if __name__ == "__main__":
    if TUNED:
        logging.disable(logging.INFO)  # levels of single loggers are undone by the SDK when it starts
    config = PredictorConfig(predictor_host=PREDICTOR, predictor_protocol="v1")
    ModelServer(
        http_port=int(os.environ["BENCH_PORT"]), enable_grpc=False, enable_latency_logging=not TUNED, predictor_config=config
    ).start([FeastTransformer()])
