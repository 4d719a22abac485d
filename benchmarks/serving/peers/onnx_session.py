"""What all peers have in common: the bundle's model in ONNX Runtime, set as for Hafnium. No import of Hafnium's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def open_session() -> ort.InferenceSession:
    """The model that BENCH_MODEL names, with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(Path(os.environ["BENCH_MODEL"])), options, providers=["CPUExecutionProvider"])


def score(session: ort.InferenceSession, rows: Any) -> list[float]:
    """Rows of numbers → scores."""
    matrix = np.asarray(rows, np.float32)
    return session.run(["score"], {"features": matrix})[0].tolist()
