"""An inference log as the transformer writes it, for tests of those who read it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.bundle import INPUT_NAME, SCORE_OUTPUT, Bundle
from hafnium_contract.inference_log import FEATURE_PREFIX, log_schema, logged_features, partition

Matrix = npt.NDArray[np.float32]


def write_log(
    folder: Path, bundle: Bundle, matrix: Matrix, arm: str, *, start: datetime, seconds: float = 3600.0,
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
