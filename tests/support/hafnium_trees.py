"""scikit-learn's tree ensembles → ONNX of a contract: what a team that trains with something else brings along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

HALF_WIDTH = 0.5
"""Of the interval, in logits: made up, the ensembles know none."""


@dataclass(frozen=True)
class Node:
    feature: int
    threshold: float
    left: int
    right: int
    missing_left: bool
    leaf: float | None


def boosted_trees(model: HistGradientBoostingClassifier) -> list[list[Node]]:
    trees: list[list[Node]] = []
    for (predictor,) in model._predictors:
        trees.append([
            Node(int(n["feature_idx"]), float(n["num_threshold"]), int(n["left"]), int(n["right"]), bool(n["missing_go_to_left"]),
                 float(n["value"]) if n["is_leaf"] else None) for n in predictor.nodes
        ])
    return trees


def forest_trees(model: RandomForestClassifier) -> list[list[Node]]:
    trees: list[list[Node]] = []
    for estimator in model.estimators_:
        t = estimator.tree_
        trees.append([
            Node(int(t.feature[i]), float(t.threshold[i]), int(t.children_left[i]), int(t.children_right[i]), bool(t.missing_go_to_left[i]),
                 float(t.value[i, 0, 1]) / len(model.estimators_) if t.children_left[i] == -1 else None) for i in range(t.node_count)
        ])
    return trees


def _not_above(threshold: float) -> float:
    """The largest float32 that is not above it: x ≤ t then means the same for every float32 x."""
    rounded = np.float32(threshold)
    return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float32(-np.inf)))


def ensemble(trees: Iterable[list[Node]], base: float) -> onnx.NodeProto:
    """TreeEnsembleRegressor: features → sum of the leaves and `base`, [batch, 1]."""
    a: dict[str, list[Any]] = {k: [] for k in (
        "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_values", "nodes_modes", "nodes_truenodeids", "nodes_falsenodeids",
        "nodes_missing_value_tracks_true", "target_treeids", "target_nodeids", "target_ids", "target_weights",
    )}
    for t, nodes in enumerate(trees):
        for i, n in enumerate(nodes):
            inner = n.leaf is None
            values = (t, i, max(n.feature, 0), _not_above(n.threshold) if inner else 0.0, "BRANCH_LEQ" if inner else "LEAF",
                      n.left if inner else 0, n.right if inner else 0, int(n.missing_left) if inner else 0)
            for key, value in zip(list(a)[:8], values, strict=True):
                a[key].append(value)
            if n.leaf is not None:
                for key, value in zip(list(a)[8:], (t, i, 0, n.leaf), strict=True):
                    a[key].append(value)
    return helper.make_node(
        "TreeEnsembleRegressor", ["features"], ["sum"], domain="ai.onnx.ml", n_targets=1, base_values=[base], aggregate_function="SUM",
        post_transform="NONE", **a,
    )


def tree_model(model: HistGradientBoostingClassifier | RandomForestClassifier, width: int, *, interval: bool = True) -> bytes:
    """ONNX: features [batch, width] → score [batch] and, with `interval`, interval [batch, 2]."""
    constants = {"half": np.array([-HALF_WIDTH, HALF_WIDTH]), "axis": np.array([1], np.int64), "one": np.array(1.0),
                 "least": np.array(1e-6), "most": np.array(1.0 - 1e-6)}
    if isinstance(model, HistGradientBoostingClassifier):
        nodes = [ensemble(boosted_trees(model), float(np.ravel(model._baseline_prediction)[0])),
                 helper.make_node("Cast", ["sum"], ["logit"], to=TensorProto.DOUBLE),
                 helper.make_node("Sigmoid", ["logit"], ["probability"])]
    else:
        nodes = [ensemble(forest_trees(model), 0.0), helper.make_node("Cast", ["sum"], ["share"], to=TensorProto.DOUBLE),
                 helper.make_node("Clip", ["share", "least", "most"], ["probability"]),
                 helper.make_node("Sub", ["one", "probability"], ["rest"]), helper.make_node("Div", ["probability", "rest"], ["odds"]),
                 helper.make_node("Log", ["odds"], ["logit"])]
    nodes += [helper.make_node("Cast", ["probability"], ["column"], to=TensorProto.FLOAT),
              helper.make_node("Squeeze", ["column", "axis"], ["score"])]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])]
    if interval:
        nodes += [helper.make_node("Add", ["logit", "half"], ["bounds"]), helper.make_node("Sigmoid", ["bounds"], ["shares"]),
                  helper.make_node("Cast", ["shares"], ["interval"], to=TensorProto.FLOAT)]
        outputs.append(helper.make_tensor_value_info("interval", TensorProto.FLOAT, ["batch", 2]))
    used = {name for n in nodes for name in n.input}
    graph = helper.make_graph(
        nodes, "trees", [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width])], outputs,
        [numpy_helper.from_array(v, k) for k, v in constants.items() if k in used],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=10,
        producer_name="tests", producer_version="1",
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()
