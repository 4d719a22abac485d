"""What a row costs in ONNX Runtime: the exported network against a plain one, and against any other model of the same width.

    python benchmarks/graph.py                               an untrained network in each of its forms, the plain one, an empty graph
    python benchmarks/graph.py before=OLD_BUNDLE now=BUNDLE  bundles (or .onnx files) besides, for a comparison before and after

One process, one thread, the predictor's session options; all models in turn in each repetition, so that whatever else the machine
does hits all alike. The least of many repetitions is what the graph costs, the median what this machine made of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "serving"))
from figures import Figure, publish
from small_model import network

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.contract_file import load_contract
from hafnium_contract.encoding import Matrix
from hafnium_contract.model_contract import ModelContract
from hafnium_training.calibration import Fit
from hafnium_training.export import Scorer
from hafnium_training.graph import RiskModel
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_training.network import MonotoneNetwork, Preprocessing
from hafnium_training.onnx_graph import model_proto
from hafnium_training.robustness import random_rows

CONTRACT = Path(__file__).parents[1] / "examples" / "unified-risk" / "contract.yaml"
BATCHES = (1, 8, 64)
CALLS = 20
WARM_CALLS = 3
KNOTS = 10


def rows_of(contract: ModelContract, count: int) -> Matrix:
    """Heavy-tailed values, as amounts and counts are, so that the logarithmic columns are there."""
    rng = np.random.default_rng(0)
    rows = random_rows(contract, np.zeros((1, len(contract.inputs)), np.float32), count, rng)
    for j, f in enumerate(contract.inputs):
        if f.range is not None and f.range[1] > 1000.0:
            rows[:, j] = np.clip(rng.lognormal(4.0, 1.5, count), *f.range)
    return rows


def untrained(contract: ModelContract, rows: Matrix) -> RiskModel:
    """The default size; which weights it has doesn't change its cost."""
    preprocessing = Preprocessing(contract, rows)
    torch.manual_seed(0)
    knots = np.linspace(-6.0, 4.0, KNOTS)
    fit = Fit(-0.5, 1.0, knots, np.linspace(0.0, 0.8, KNOTS), np.linspace(0.1, 1.0, KNOTS))
    return RiskModel(preprocessing, MonotoneNetwork(preprocessing, Hyperparameters(), 0), fit)


def empty(width: int) -> bytes:
    """Two nodes that give a score and an interval: what `session.run` costs without a model."""
    nodes = [helper.make_node("ReduceMin", [INPUT_NAME, "one"], [SCORE_OUTPUT], keepdims=0),
             helper.make_node("Slice", [INPUT_NAME, "zero", "two", "one"], [INTERVAL_OUTPUT])]
    graph = helper.make_graph(
        nodes, "empty", [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(SCORE_OUTPUT, TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info(INTERVAL_OUTPUT, TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor(name, TensorProto.INT64, [1], [i]) for i, name in enumerate(("zero", "one", "two"))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def models_of(contract: ModelContract, rows: Matrix, given: list[str]) -> dict[str, bytes]:
    model, width = untrained(contract, rows), len(contract.inputs)
    models = {
        "exported": model_proto(model, width, exponent_max=np.inf).SerializeToString(),
        "exported_any_exponent": model_proto(model, width, exponent_max=0.0).SerializeToString(),
        "exported_lookup": model_proto(model, width, one_hot_columns_max=0).SerializeToString(),
        "n_64_64_1": network(width), "empty": empty(width),
    }
    for item in given:
        name, _, place = item.partition("=")
        path = Path(place)
        models[name] = (path / "model.onnx" if path.is_dir() else path).read_bytes()
    return models


def microseconds(scorers: dict[str, Scorer], rows: Matrix, repetitions: int) -> dict[str, list[float]]:
    """Per call, for each model and repetition."""
    taken: dict[str, list[float]] = {name: [] for name in scorers}
    for i in range(repetitions):
        order = list(scorers.items())
        for name, scorer in order if i % 2 == 0 else reversed(order):
            run = scorer.session.run
            outputs, given = [SCORE_OUTPUT, INTERVAL_OUTPUT], {INPUT_NAME: rows}
            for _ in range(WARM_CALLS):
                run(outputs, given)
            begin = time.perf_counter_ns()
            for _ in range(CALLS):
                run(outputs, given)
            taken[name].append((time.perf_counter_ns() - begin) / CALLS / 1e3)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=PATH", help="a bundle or an .onnx file that takes the example's columns")
    parser.add_argument("--repetitions", type=int, default=400)
    arguments = parser.parse_args()
    contract = load_contract(CONTRACT)
    rows = rows_of(contract, max(BATCHES))
    models = models_of(contract, rows, arguments.models)
    scorers = {name: Scorer(data) for name, data in models.items()}
    figures: dict[str, Figure] = {}
    for name, data in models.items():
        figures[f"{name}_nodes"] = Figure(len(onnx.load_from_string(data).graph.node), "", "lower")
    for batch in BATCHES:
        for name, taken in microseconds(scorers, np.ascontiguousarray(rows[:batch]), arguments.repetitions).items():
            figures[f"{name}_us_b{batch}_min"] = Figure(min(taken), "µs", "lower")
            figures[f"{name}_us_b{batch}_median"] = Figure(statistics.median(taken), "µs", "lower")
    publish("graph", figures)


if __name__ == "__main__":
    main()
