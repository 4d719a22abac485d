"""The monotone network, as it is trained: raw features → logit. `graph.py` adds the calibration,
`onnx_graph.py` folds all of it into what is served.

    features float32 [batch, n]
      └ Preprocessing     missing → median, clamp to the contract's range, scale, tame heavy tails, category → row of a table
          ├ monotone inputs, turned so that all of them push the score up ───────────────┐
          └ free inputs, "was missing" flags, categories → small unconstrained network ──┤
                                                                      SmoothMinMax ◄─────┘
                                                                      logit → calibration → score, interval

Why the score is monotone at the raw inputs: filling, clamping and scaling never decrease; the weights from a monotone input
are softplus(w) > 0; smooth maximum, smooth minimum, the positive temperature and the sigmoid never decrease; and the free
path does not see the monotone inputs' values. It does see whether one was missing: that is a comparison between a known and
an unknown value, which the contract's direction says nothing about. See docs/adr/0002-monotone-network.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hafnium_contract.encoding import Matrix
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_training.hyperparameters import Hyperparameters

HEAVY_TAIL = 8.0
"""A feature whose 0.1 % and 99.9 % quantiles reach beyond this many quartile distances gets the logarithmic scale: a normal
distribution reaches 2.3, an exponential 5.7, a log-normal of σ = 1 about 15."""
QUANTILES = (0.001, 0.25, 0.5, 0.75, 0.999)
EMBEDDING_COLUMNS_MAX = 4


@dataclass(frozen=True)
class Column:
    """How one numeric input is brought to scale. `heavy`: sign(z)·log1p(|z|) after centring."""

    index: int
    low: float
    """Smallest and largest value that reach the network: the contract's range, or twice the same one when it was constant."""
    high: float
    fill: float
    """Median of the training rows; the middle of the range when none has a value."""
    center: float
    scale: float
    heavy: bool
    mean: float
    """Mean of the scaled values, and their standard deviation: after both, a column has mean 0 and deviation 1."""
    deviation: float
    direction: int
    """1 increasing, -1 decreasing, 0 free."""


def column_of(feature: Feature, index: int, values: Matrix) -> Column:
    """Scaling of one numeric or bool input, from its training values (float32 [rows], NaN = missing).

    A column that was constant is clamped to that value from both sides: what training never saw varying keeps the random weights that
    it began with, and would decide scores by them as soon as it varies.
    """
    low, high = feature.range if feature.range is not None else (0.0, 1.0)
    direction = {"increasing": 1, "decreasing": -1, "none": 0}[feature.monotone]
    present = np.clip(values[~np.isnan(values)].astype(np.float64), low, high)
    if len(present) == 0:
        return _constant(index, (low + high) / 2, direction)
    ordered = np.sort(present)  # np.quantile would partition once per quantile: 150 ms instead of 10 for 200,000 rows
    first, last = float(ordered[0]), float(ordered[-1])
    if first == last:
        return _constant(index, first, direction)
    edge_low, lower, median, upper, edge_high = (float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES)
    if feature.dtype == "bool":
        return Column(index, low, high, float(round(median)), 0.0, 1.0, False, *_moments(present), direction)
    scale = float(upper - lower) / 1.349
    if scale <= 1e-9 * (last - first):  # by the values alone: a contract may allow a thousand times what occurs
        scale = float(present.std())
    heavy = bool(max(edge_high - median, median - edge_low) / scale > HEAVY_TAIL)
    z = (present - median) / scale
    if heavy:
        z = np.sign(z) * np.log1p(np.abs(z))
    return Column(index, low, high, float(median), float(median), scale, heavy, *_moments(z), direction)


def _constant(index: int, value: float, direction: int) -> Column:
    return Column(index, value, value, value, value, 1.0, False, 0.0, 1.0, direction)


def _moments(z: npt.NDArray[np.float64]) -> tuple[float, float]:
    deviation = float(z.std())
    return float(z.mean()), deviation if deviation > 1e-6 else 1.0


@dataclass(frozen=True)
class Prepared:
    """Rows after preprocessing: what the network reads. All have one row per input row."""

    monotone: Tensor
    """[rows, m], turned so that larger means more risk."""
    free: Tensor
    """[rows, f]"""
    missing: Tensor
    """[rows, k]: 1 where a feature that may be missing was missing."""
    codes: Tensor
    """int64 [rows, c]: row of each category's table; the last two rows mean missing and unknown."""

    def take(self, index: Tensor) -> Prepared:
        return Prepared(self.monotone[index], self.free[index], self.missing[index], self.codes[index])

    def part(self, start: int, end: int) -> Prepared:
        return Prepared(self.monotone[start:end], self.free[start:end], self.missing[start:end], self.codes[start:end])

    def to(self, dtype: torch.dtype) -> Prepared:
        return Prepared(self.monotone.to(dtype), self.free.to(dtype), self.missing.to(dtype), self.codes)


def joined(parts: list[Prepared]) -> Prepared:
    """The rows of all parts below each other."""
    return Prepared(
        torch.cat([p.monotone for p in parts]), torch.cat([p.free for p in parts]), torch.cat([p.missing for p in parts]),
        torch.cat([p.codes for p in parts]),
    )


class Preprocessing(nn.Module):
    """Raw features (any float, NaN = missing, any garbage) → Prepared, finite for every input. Nothing here is trained."""

    low: Tensor
    high: Tensor
    fill: Tensor
    center: Tensor
    scale: Tensor
    mean: Tensor
    deviation: Tensor
    heavy: Tensor
    numeric: Tensor
    monotone_index: Tensor
    free_index: Tensor
    masked_index: Tensor
    direction: Tensor
    category_index: Tensor
    category_size: Tensor

    def __init__(self, contract: ModelContract, X: Matrix) -> None:
        super().__init__()
        self.columns = tuple(column_of(f, j, X[:, j]) for j, f in enumerate(contract.inputs) if f.dtype != "category")
        self.category_sizes = tuple(len(f.categories) for f in contract.inputs if f.dtype == "category")
        optional = [c for c in self.columns if contract.inputs[c.index].missing != "reject"]
        self.masked = tuple(self.columns.index(c) for c in optional)
        """Which columns have a "was missing" flag: those that a request may leave out."""

        def buffer(name: str, values: list[float] | list[int] | list[bool], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=True)

        for name in ("low", "high", "fill", "center", "scale", "mean", "deviation"):
            buffer(name, [getattr(c, name) for c in self.columns], torch.float64)
        buffer("heavy", [c.heavy for c in self.columns], torch.bool)
        buffer("numeric", [c.index for c in self.columns], torch.int64)
        self.monotone_at = tuple(i for i, c in enumerate(self.columns) if c.direction != 0)
        self.free_at = tuple(i for i, c in enumerate(self.columns) if c.direction == 0)
        buffer("monotone_index", list(self.monotone_at), torch.int64)
        buffer("free_index", list(self.free_at), torch.int64)
        buffer("masked_index", list(self.masked), torch.int64)
        buffer("direction", [float(self.columns[i].direction) for i in self.monotone_at], torch.float64)
        buffer("category_index", [j for j, f in enumerate(contract.inputs) if f.dtype == "category"], torch.int64)
        buffer("category_size", [float(s) for s in self.category_sizes], torch.float64)

    def forward(self, features: Tensor) -> Prepared:
        x = features.to(torch.float64)
        raw = x.index_select(1, self.numeric)
        absent = torch.isnan(raw)
        known = torch.where(absent, self.fill, raw)
        # The clamp is what makes infinities and 1e30 harmless.
        clamped = torch.minimum(torch.maximum(known, self.low), self.high)
        z = (clamped - self.center) / self.scale
        z = torch.where(self.heavy, torch.sign(z) * torch.log1p(torch.abs(z)), z)
        z = (z - self.mean) / self.deviation

        given = x.index_select(1, self.category_index)
        # A negative index would wrap to the last row and one too large would stop the graph, so both, and fractions, become
        # "unknown" before the cast. NaN compares false with everything.
        nearest = torch.minimum(torch.clamp(torch.floor(given), min=0.0), self.category_size - 1.0)
        codes = torch.where(nearest == given, given, self.category_size + 1.0)
        codes = torch.where(torch.isnan(given), self.category_size, codes)
        return Prepared(
            z.index_select(1, self.monotone_index) * self.direction,
            z.index_select(1, self.free_index),
            absent.index_select(1, self.masked_index).to(torch.float64),
            codes.to(torch.int64),
        )


class SmoothMinMax(nn.Module):
    """min over groups of max over units of linear functions, both smooth (Igel, "Smooth Min-Max Monotonic Networks", ICML 2024).

    Weights of the monotone inputs are softplus(w) > 0; those of the embedding are free. A straight monotone term is added:
    it carries the gradient while the groups are still alike. Each of the members has weights of its own.
    Input [b, m] and [b, members, e] → logits [b, members].
    """

    def __init__(self, monotone: int, embedding: int, hyper: Hyperparameters, generator: torch.Generator) -> None:
        super().__init__()
        self.members, self.groups, self.units = hyper.members, hyper.groups, hyper.units
        count = hyper.groups * hyper.units
        members = hyper.members

        def normal(*shape: int, deviation: float, mean: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * deviation + mean)

        start = _inverse_softplus(1.0 / math.sqrt(max(monotone, 1)))
        self.weight = normal(members * count, monotone, deviation=0.5, mean=start)
        self.free_weight = normal(members, embedding, count, deviation=1.0 / math.sqrt(max(embedding, 1)))
        self.bias = normal(members * count, deviation=1.0)
        self.straight = normal(members, monotone, deviation=0.1, mean=_inverse_softplus(0.1))
        self.free_straight = normal(members, embedding, 1, deviation=0.1)
        self.offset = nn.Parameter(torch.zeros(members))
        self.log_sharpness = nn.Parameter(torch.zeros(members))

    def forward(self, monotone: Tensor, embedding: Tensor) -> Tensor:
        # A product with an inner width of 0 is zero by definition, but not in every version of every runtime: leave it out.
        linear, straight = self.bias.reshape(1, self.members, -1), self.offset
        if monotone.shape[1]:
            directed = monotone @ nn.functional.softplus(self.weight).T
            linear = linear + directed.reshape(len(monotone), self.members, -1)
            straight = straight + monotone @ nn.functional.softplus(self.straight).T
        if embedding.shape[2]:
            by_member = embedding.transpose(0, 1)
            linear = linear + torch.bmm(by_member, self.free_weight).transpose(0, 1)
            straight = straight + torch.bmm(by_member, self.free_straight).squeeze(2).T
        sharpness = torch.exp(self.log_sharpness)
        scaled = (linear * sharpness.unsqueeze(1)).unflatten(2, (self.groups, self.units))
        highest = torch.logsumexp(scaled, dim=3)
        return straight - torch.logsumexp(-highest, dim=2) / sharpness


def _inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


class MonotoneNetwork(nn.Module):
    """Prepared rows → one logit per member [rows, members]; the model's logit is their mean. The only trained part.

    Members differ in their random start only and are trained side by side in the same matrices. Alone, two of them differ by 3 %
    of PR-AUC on a few hundred frauds; their mean by 1 %. A mean of monotone functions is monotone.
    """

    def __init__(self, preprocessing: Preprocessing, hyper: Hyperparameters, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        widths = [min(EMBEDDING_COLUMNS_MAX, max(1, math.ceil(math.sqrt(s)))) for s in preprocessing.category_sizes]
        # two rows more than there are categories: missing, unknown
        self.tables = nn.ParameterList(
            nn.Parameter(torch.randn(s + 2, w, generator=g) * 0.3)
            for s, w in zip(preprocessing.category_sizes, widths, strict=True)
        )
        inputs = len(preprocessing.free_at) + len(preprocessing.masked) + sum(widths)
        self.has_free = inputs > 0
        width = hyper.embedding if self.has_free else 0
        members, hidden = hyper.members, hyper.hidden
        if self.has_free:
            self.hidden_weight = nn.Parameter(torch.randn(members * hidden, inputs, generator=g) / math.sqrt(inputs))
            self.hidden_bias = nn.Parameter(torch.randn(members * hidden, generator=g) * 0.3)
            self.out_weight = nn.Parameter(torch.randn(members, hidden, width, generator=g) * math.sqrt(2.0 / hidden))
            self.skip_weight = nn.Parameter(torch.randn(members, inputs, width, generator=g) * (0.5 / math.sqrt(inputs)))
        self.head = SmoothMinMax(len(preprocessing.monotone_at), width, hyper, g)

    def forward(self, rows: Prepared) -> Tensor:
        count, members = len(rows.codes), self.head.members
        if not self.has_free:
            return self.head(rows.monotone, rows.monotone.new_zeros(count, members, 0))
        parts = [part for part in (rows.free, rows.missing) if part.shape[1]]
        parts += [nn.functional.embedding(rows.codes[:, i], table) for i, table in enumerate(self.tables)]
        free = torch.cat(parts, dim=1)
        hidden = nn.functional.relu(free @ self.hidden_weight.T + self.hidden_bias).reshape(count, members, -1)
        embedding = torch.bmm(hidden.transpose(0, 1), self.out_weight) + free @ self.skip_weight
        return self.head(rows.monotone, embedding.transpose(0, 1))
