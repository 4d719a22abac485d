"""The model → the few ONNX nodes that are served: every linear step next to another one is multiplied out, once, in float64.

ONNX Runtime pays half a microsecond for a node whatever its size, and for a row that is most of the time. So the arithmetic is
arranged for few nodes: written down as trained it takes 96, and torch's exporter made 59 of an earlier folding. By hand it is
34 (docs/performance.md). What makes the difference:

- Scale, mean, direction and weights of a column are one weight and one bias.
- sign(z)·log(1 + |z|) = log(max(1 + z, 1)) − log(max(1 − z, 1)): one product, one clip and one log for all heavy columns.
- A category is compared with each of its codes at once. Whatever is none of them (unknown, negative, a fraction, infinity) equals
  nothing, and "unknown" is then the bias; no index can leave its table. Only long lists of categories are looked up.
- Smooth maxima and minima are log(Σ 1 / Σ exp): four products and elementwise nodes for all members at once, with the sums as products
  with 0 and 1. That needs exp to stay finite, so the largest value that any input whatever can cause is computed first. Only where it
  is too large the graph takes ReduceLogSumExp, which subtracts the maximum and costs four times as much on 64 rows.
- The straight term is one more member with one unit: no slicing.
- The interval lies at t·rises + first, with t = how far along each piece, clipped to [0, 1]. Nothing is subtracted, so no bound can
  leave [0, 1] by rounding. The upper bound is carried with a minus sign: one minimum widens both to contain the score.

The graph computes in float64 and rounds once, at the end. In float32 the order of the sums inside exp and log can turn a rise of
the input into a fall of the score by one unit in the last place, and "never falls" would only be nearly true. It also makes a row's
score the same alone and in a batch, where float32 kernels differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_training.calibration import Fit
from hafnium_training.graph import RiskModel
from hafnium_training.network import Column, MonotoneNetwork, Preprocessing, SmoothMinMax

OPSET = 20
IR_VERSION = 10
ONE_HOT_COLUMNS_MAX = 64
"""Categories of all features together up to which each is compared with all of its codes. Beyond, the comparison's columns cost the
following products more than the eight nodes of a lookup."""
EXPONENT_MAX = 690.0
"""exp and 1/exp of it, and sums of a million of them, are finite and normal in float64 (which ends at exp(709))."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """Where things lie in u, the input of the first products: [centered | logs | was missing | categories]."""

    inputs: int
    heavy: tuple[Column, ...]
    one_hot: bool
    category_width: int
    """Columns of the categories: one per code, or the widths of the looked-up tables together."""

    @property
    def logs_at(self) -> int:
        return self.inputs

    @property
    def missing_at(self) -> int:
        return self.logs_at + 2 * len(self.heavy)

    @property
    def categories_at(self) -> int:
        return self.missing_at + self.inputs

    @property
    def width(self) -> int:
        return self.categories_at + self.category_width


class Weights:
    """Weights over u and a bias, for `count` outputs: filled with the weights over what the network reads."""

    def __init__(self, layout: Layout, count: int) -> None:
        self.layout = layout
        self.weight: Floats = np.zeros((layout.width, count))
        self.bias: Floats = np.zeros(count)

    def number(self, column: Column, w: Floats) -> None:
        """w [count] for a scaled column, turned towards more risk when it has a direction."""
        w = w * (column.direction or 1) / column.deviation
        if column.heavy:
            at = self.layout.logs_at + 2 * self.layout.heavy.index(column)
            self.weight[at] += w
            self.weight[at + 1] -= w
            self.bias -= w * column.mean
        else:
            self.weight[column.index] += w / column.scale
            self.bias -= w * column.mean

    def missing(self, column: Column, w: Floats) -> None:
        """w [count] for its "was missing" flag."""
        self.weight[self.layout.missing_at + column.index] += w

    def category(self, index: int, at: int, table: Floats, w: Floats) -> None:
        """w [table's width, count] for a category whose columns of u begin at `at`; the table's last rows: missing, unknown."""
        if not self.layout.one_hot:
            self.weight[self.layout.categories_at + at:][:len(w)] += w
            return
        known, missing, unknown = table[:-2] @ w, table[-2] @ w, table[-1] @ w
        self.weight[self.layout.categories_at + at:][:len(known)] += known - unknown
        self.weight[self.layout.missing_at + index] += missing - unknown
        self.bias += unknown


@dataclass(frozen=True)
class Folded:
    """linear = u·direct + hidden·out, hidden = relu(u·enter). Columns: units of all members, then `straight` equal ones that hold the
    straight term."""

    direct: Weights
    enter: Weights | None
    out: Floats
    scale: Floats
    """Of each member's smooth minimum; the last is the straight term's."""
    straight: int

    def largest(self, low: Floats, high: Floats) -> float:
        """No |linear| is above it while u lies between `low` and `high`."""
        least, most = _reach(self.direct.weight, self.direct.bias, low, high)
        if self.enter is not None:
            hidden = (np.maximum(h, 0.0) for h in _reach(self.enter.weight, self.enter.bias, low, high))
            more = _reach(self.out, np.zeros(len(least)), *hidden)
            least, most = least + more[0], most + more[1]
        return float(np.maximum(np.abs(least), np.abs(most)).max())


def _reach(weight: Floats, bias: Floats, low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value of x·weight + bias for x between `low` and `high`."""
    up, down = np.maximum(weight, 0.0), np.minimum(weight, 0.0)
    return low @ up + high @ down + bias, high @ up + low @ down + bias


def fold(p: Preprocessing, network: MonotoneNetwork, fit: Fit, layout: Layout, straight: int = 1) -> Folded:
    """Rows of `enter` that belong to monotone columns stay exactly zero, and those of `direct` are softplus(w) ≥ 0 times positive
    numbers and the column's direction: folding keeps the guarantee."""
    head = network.head
    members, units = head.members, head.groups * head.units
    sharpness = np.exp(_array(head.log_sharpness))
    share = 1.0 / (members * fit.temperature)
    count = members * units + straight
    softplus = nn.functional.softplus

    def spread(by_unit: Floats, term: Floats) -> Floats:
        """[.., members·units] and [..] → [.., count]: the straight term is the same in each of its columns."""
        return np.concatenate([by_unit, np.repeat(term[..., None], straight, axis=-1)], axis=-1)

    directed = spread(
        _array(softplus(head.weight.double())).T * np.repeat(sharpness, units), _array(softplus(head.straight.double())).sum(axis=0) * share
    )
    direct = Weights(layout, count)
    offset = _array(head.offset).sum() * share + fit.offset / fit.temperature
    if straight > 1:  # a member of equal units: their smooth maximum adds log(units), the smooth minimum takes log(groups) away
        offset += math.log(head.groups / head.units)
    direct.bias += spread(_array(head.bias) * np.repeat(sharpness, units), np.asarray(offset))
    for row, i in enumerate(p.monotone_at):
        direct.number(p.columns[i], directed[row])
    enter, out = None, np.zeros((0, count))
    if network.has_free:
        hidden = network.out_weight.shape[1]
        enter, out = Weights(layout, members * hidden), np.zeros((members * hidden, count))
        by_input: Floats = np.zeros((network.hidden_weight.shape[1], count))
        for m in range(members):
            to_units, to_straight = _array(head.free_weight[m]) * sharpness[m], _array(head.free_straight[m]) * share
            at, last, rows = slice(m * units, (m + 1) * units), slice(members * units, None), slice(m * hidden, (m + 1) * hidden)
            for target, w in ((by_input, _array(network.skip_weight[m])), (out[rows], _array(network.out_weight[m]))):
                target[:, at] += w @ to_units
                target[:, last] += w @ to_straight
        enter.bias += _array(network.hidden_bias)
        _free_inputs(p, network, direct, by_input)
        _free_inputs(p, network, enter, _array(network.hidden_weight).T)
    return Folded(direct, enter, out, np.append(-share / sharpness, -1.0), straight)


def _free_inputs(p: Preprocessing, network: MonotoneNetwork, weights: Weights, w: Floats) -> None:
    """w [inputs of the free path, count], in the order in which MonotoneNetwork joins them: free columns, flags, categories."""
    row = 0
    for i in p.free_at:
        weights.number(p.columns[i], w[row])
        row += 1
    for i in p.masked:
        weights.missing(p.columns[i], w[row])
        row += 1
    at = 0
    for index, size, table in zip(_array(p.category_index).astype(int).tolist(), p.category_sizes, network.tables, strict=True):
        width = table.shape[1]
        weights.category(index, at, _array(table), w[row:row + width])
        row += width
        at += size if weights.layout.one_hot else width


def _array(tensor: Any) -> Floats:
    return np.asarray(tensor.detach().double().numpy())


class Writer:
    """Nodes and constants in the order in which they are asked for, named by position: the same model gives the same bytes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: Any = np.float64) -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes))
        return name


def model_proto(
    model: RiskModel, inputs: int, *, one_hot_columns_max: int = ONE_HOT_COLUMNS_MAX, exponent_max: float = EXPONENT_MAX,
) -> onnx.ModelProto:
    """`features` float32 [batch, inputs] → `score` [batch], `interval` [batch, 2]; checked."""
    p, network = model.preprocessing, model.network
    one_hot = sum(p.category_sizes) <= one_hot_columns_max
    width = sum(p.category_sizes) if one_hot else sum(t.shape[1] for t in network.tables)
    layout = Layout(inputs, tuple(c for c in p.columns if c.heavy), one_hot, width)
    folded = fold(p, network, model.fit, layout)
    plain = folded.largest(*_range_of_u(p, network, layout)) <= exponent_max
    if not plain:
        folded = fold(p, network, model.fit, layout, straight=network.head.groups * network.head.units)
    w = Writer()
    u = _prepared(w, p, network, layout)
    linear = w("Gemm", u, w.constant(folded.direct.weight), w.constant(folded.direct.bias))
    if folded.enter is not None:
        hidden = w("Relu", w("Gemm", u, w.constant(folded.enter.weight), w.constant(folded.enter.bias)))
        linear = w("Gemm", hidden, w.constant(folded.out), linear)
    lowest = (_min_max if plain else _min_max_of_any_size)(w, linear, network.head)
    _outputs(w, w("MatMul", lowest, w.constant(folded.scale[:, None])), model.fit)
    graph = helper.make_graph(
        w.nodes, "hafnium", [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info(SCORE_OUTPUT, TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info(INTERVAL_OUTPUT, TensorProto.FLOAT, ["batch", 2])],
        w.constants,
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="hafnium",
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _range_of_u(p: Preprocessing, network: MonotoneNetwork, layout: Layout) -> tuple[Floats, Floats]:
    """Between which values u lies, whatever the input."""
    low, high = np.zeros(layout.width), np.ones(layout.width)  # flags and comparisons
    high[:layout.inputs] = 0.0
    for c in p.columns:
        low[c.index], high[c.index] = c.low - c.center, c.high - c.center
    for k, c in enumerate(layout.heavy):
        at = layout.logs_at + 2 * k
        high[at] = math.log1p(max((c.high - c.center) / c.scale, 0.0))
        high[at + 1] = math.log1p(max((c.center - c.low) / c.scale, 0.0))
    if not layout.one_hot:
        tables = [_array(t) for t in network.tables]
        low[layout.categories_at:] = np.concatenate([t.min(axis=0) for t in tables])
        high[layout.categories_at:] = np.concatenate([t.max(axis=0) for t in tables])
    return low, high


def _min_max(w: Writer, linear: str, head: SmoothMinMax) -> str:
    """log(Σ over groups of 1 / Σ over units of exp(linear)): [batch, members + 1], the straight term last."""
    groups = head.members * head.groups
    to_groups, to_members = np.zeros((groups * head.units + 1, groups + 1)), np.zeros((groups + 1, head.members + 1))
    to_groups[:-1, :-1] = np.repeat(np.eye(groups), head.units, axis=0)
    to_members[:-1, :-1] = np.repeat(np.eye(head.members), head.groups, axis=0)
    to_groups[-1, -1] = to_members[-1, -1] = 1.0
    by_group = w("Reciprocal", w("MatMul", w("Exp", linear), w.constant(to_groups)))
    return w("Log", w("MatMul", by_group, w.constant(to_members)))


def _min_max_of_any_size(w: Writer, linear: str, head: SmoothMinMax) -> str:
    """The same for values whose exp would not be finite."""
    by_unit = w("Reshape", linear, w.constant([-1, head.members + 1, head.groups, head.units], np.int64))
    highest = w("ReduceLogSumExp", by_unit, w.constant([3], np.int64), keepdims=0)
    return w("ReduceLogSumExp", w("Neg", highest), w.constant([2], np.int64), keepdims=0)


def _prepared(w: Writer, p: Preprocessing, network: MonotoneNetwork, layout: Layout) -> str:
    """u: every value finite, whatever the input."""
    low, high, fill, center = (np.zeros(layout.inputs) for _ in range(4))  # a category's column becomes 0 here
    for c in p.columns:
        low[c.index], high[c.index], fill[c.index], center[c.index] = c.low, c.high, c.fill, c.center
    absent = w("IsNaN", INPUT_NAME)
    filled = w("Where", absent, w.constant(fill), w("Cast", INPUT_NAME, to=TensorProto.DOUBLE))
    # The clamp is what makes infinities and 1e30 harmless.
    clamped = w("Min", w("Max", filled, w.constant(low)), w.constant(high))
    # Subtracted before anything is multiplied: x·a − b would lose the digits of a range far from zero.
    centered = w("Sub", clamped, w.constant(center))
    parts = [centered]
    if layout.heavy:
        turn, shift = np.zeros((layout.inputs, 2 * len(layout.heavy))), np.ones(2 * len(layout.heavy))
        for k, c in enumerate(layout.heavy):
            turn[c.index, 2 * k:2 * k + 2] = 1.0 / c.scale, -1.0 / c.scale
        sides = w("Gemm", centered, w.constant(turn), w.constant(shift))
        parts.append(w("Log", w("Clip", sides, w.constant(1.0))))
    parts.append(w("Cast", absent, to=TensorProto.DOUBLE))
    if p.category_sizes:
        parts.append(_compared(w, p) if layout.one_hot else _looked_up(w, p, network))
    return w("Concat", *parts, axis=1)


def _compared(w: Writer, p: Preprocessing) -> str:
    """[batch, codes of all categories]: 1 where the value is the code."""
    places = np.repeat(_array(p.category_index), p.category_sizes)
    codes = np.concatenate([np.arange(size) for size in p.category_sizes])
    given = w("Gather", INPUT_NAME, w.constant(places, np.int64), axis=1)
    return w("Cast", w("Equal", given, w.constant(codes, np.float32)), to=TensorProto.DOUBLE)


def _looked_up(w: Writer, p: Preprocessing, network: MonotoneNetwork) -> str:
    """[batch, widths of all tables]: one table for all categories, each in columns of its own.

    A negative index would wrap to the last row and one too large would stop the graph, so both, and fractions, become "unknown" before
    the cast. NaN compares false with everything.
    """
    sizes = np.array(p.category_sizes, np.float64)
    given = w("Cast", w("Gather", INPUT_NAME, w.constant(_array(p.category_index), np.int64), axis=1), to=TensorProto.DOUBLE)
    nearest = w("Min", w("Max", w("Floor", given), w.constant(0.0)), w.constant(sizes - 1.0))
    code = w("Where", w("Equal", nearest, given), given, w.constant(sizes + 1.0))
    code = w("Where", w("IsNaN", given), w.constant(sizes), code)
    starts = np.concatenate([[0.0], np.cumsum(sizes + 2.0)[:-1]])
    row = w("Cast", w("Add", code, w.constant(starts)), to=TensorProto.INT64)
    widths = [t.shape[1] for t in network.tables]
    table, at = np.zeros((int((sizes + 2.0).sum()), sum(widths))), 0
    for start, width, own in zip(starts.astype(int).tolist(), widths, network.tables, strict=True):
        table[start:start + len(own), at:at + width] = _array(own)
        at += width
    # each category's row is zero outside of its own columns
    return w("ReduceSum", w("Gather", w.constant(table), row, axis=0), w.constant([1], np.int64), keepdims=0)


def _outputs(w: Writer, logit: str, fit: Fit) -> None:
    """Calibrated logit float64 [batch, 1] → score and interval."""
    knots, lower, upper = (np.asarray(v, np.float64) for v in (fit.knots, fit.lower, fit.upper))
    score = w("Sigmoid", logit)
    w("Squeeze", w("Cast", score, to=TensorProto.FLOAT), w.constant([1], np.int64), output=SCORE_OUTPUT)
    widths = np.diff(knots)
    along = w("Gemm", logit, w.constant(1.0 / widths[None, :]), w.constant(-knots[:-1] / widths))
    along = w("Clip", along, w.constant(0.0), w.constant(1.0))
    rises = np.stack([np.diff(lower), -np.diff(upper)], axis=1)
    bounds = w("Gemm", along, w.constant(rises), w.constant([lower[0], -upper[0]]))
    # minimum of (lower, -upper) and (score, -score) = (min(lower, score), -max(upper, score))
    widened = w("Abs", w("Min", bounds, w("Mul", score, w.constant([1.0, -1.0]))))
    w("Cast", widened, to=TensorProto.FLOAT, output=INTERVAL_OUTPUT)
