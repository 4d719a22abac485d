"""A small network of the form that servers are usually measured with: n-64-64-1, ReLU, random weights. 11 nodes.

What is compared is servers. The trained network (34 nodes, twice the time) makes all of them alike slow; `--model trained`
measures with it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT, Bundle, write_bundle

WIDTH = 64


def network(inputs: int, seed: int = 0) -> bytes:
    """ONNX: missing becomes 0, two hidden layers, a sigmoid; the interval is ±0.5 around the logit."""
    rng = np.random.default_rng(seed)
    sizes = [inputs, WIDTH, WIDTH, 1]
    constants = {"zero": np.zeros(1, np.float32), "half": np.array([-0.5, 0.5], np.float32), "axis": np.array([1], np.int64)}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        constants[f"w{i}"] = (rng.normal(size=(a, b)) / np.sqrt(a) / (50.0 if i == 0 else 1.0)).astype(np.float32)
        constants[f"b{i}"] = np.zeros(b, np.float32)
    nodes = [
        helper.make_node("IsNaN", [INPUT_NAME], ["missing"]), helper.make_node("Where", ["missing", "zero", INPUT_NAME], ["filled"]),
        helper.make_node("Gemm", ["filled", "w0", "b0"], ["h0"]), helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Gemm", ["r0", "w1", "b1"], ["h1"]), helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("Gemm", ["r1", "w2", "b2"], ["logit"]), helper.make_node("Sigmoid", ["logit"], ["column"]),
        helper.make_node("Squeeze", ["column", "axis"], [SCORE_OUTPUT]), helper.make_node("Add", ["logit", "half"], ["bounds"]),
        helper.make_node("Sigmoid", ["bounds"], [INTERVAL_OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info(SCORE_OUTPUT, TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info(INTERVAL_OUTPUT, TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def small_bundle(trained: Bundle, path: Path) -> Bundle:
    """A bundle like `trained`, with the small network in it."""
    manifest = trained.manifest
    files = {p.name: p.read_bytes() for p in trained.path.iterdir() if p.name != "manifest.json"}
    files["model.onnx"] = network(len(trained.contract.inputs))
    return write_bundle(
        path, files, contract=trained.contract, model_version="small", data_digest=manifest.data_digest, git_commit=manifest.git_commit,
        seed=0, opset=20,
    )
