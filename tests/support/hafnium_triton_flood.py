"""Asks over gRPC with tritonclient, many calls at once: `PORT IN.json OUT.json`. A process of its own, as hafnium_triton_grpc.py is.

IN: {"inputs": [{"name", "shape", "datatype", "data"}], "calls": n, "timeout_s": s}. OUT: for each call its status and what was said, or ''
and its scores.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import triton_to_np_dtype


def main(port: str, source: str, target: str) -> None:
    wanted: dict[str, Any] = json.loads(Path(source).read_text())
    inputs: list[Any] = []
    for one in wanted["inputs"]:
        tensor = triton.InferInput(one["name"], one["shape"], one["datatype"])
        data = [v.encode() for v in one["data"]] if one["datatype"] == "BYTES" else one["data"]
        tensor.set_data_from_numpy(np.array(data, triton_to_np_dtype(one["datatype"])).reshape(one["shape"]))
        inputs.append(tensor)
    found: list[dict[str, Any]] = []
    all_here = threading.Semaphore(0)

    def done(result: Any, error: Any) -> None:
        if error is None:
            found.append({"status": "", "score": result.as_numpy("score").reshape(-1).tolist()})
        else:
            found.append({"status": str(error.status()), "said": error.message()})
        all_here.release()

    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        for _ in range(wanted["calls"]):
            client.async_infer("m", inputs, done, client_timeout=wanted["timeout_s"])
        for _ in range(wanted["calls"]):
            assert all_here.acquire(timeout=wanted["timeout_s"] + 30)
    Path(target).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
