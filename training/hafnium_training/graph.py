"""What is served: preprocessing, network, calibration and interval folded into one small graph.

Folding matters because ONNX Runtime pays about a microsecond per node whatever its size: written down as trained, the graph
has 96 nodes and the network's arithmetic is the smaller part of the latency. Every linear step next to another one is
multiplied out here, once, in float64. `tests/training` hold the folded graph against the unfolded modules.

The graph computes in float64 and rounds once, at the end. In float32 the order of the sums inside exp and log can turn a rise
of the input into a fall of the score by one unit in the last place, and "never falls" would only be nearly true. It also makes
a row's score the same alone and in a batch, where float32 kernels differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hafnium_training.calibration import Fit
from hafnium_training.network import MonotoneNetwork, Preprocessing


class RiskModel(nn.Module):
    """features float32 [batch, n] → (score [batch], interval [batch, 2]), both float32, in [0, 1], finite for any input.

    score = sigmoid((logit + offset) / temperature). Interval: lines between the knots over that calibrated logit, constant
    outside of them, and widened to contain the score.
    """

    numeric: Tensor
    fill: Tensor
    low: Tensor
    high: Tensor
    heavy: Tensor
    scale: Tensor
    center: Tensor
    mean: Tensor
    gain: Tensor
    category_index: Tensor
    size: Tensor
    largest: Tensor
    unknown: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    out_weight: Tensor
    direct: Tensor
    bias: Tensor
    lowest_scale: Tensor
    table: Tensor
    table_offset: Tensor
    start: Tensor
    end: Tensor
    first: Tensor
    slopes: Tensor
    is_lower: Tensor

    def __init__(self, preprocessing: Preprocessing, network: MonotoneNetwork, fit: Fit) -> None:
        super().__init__()
        if not fit.temperature > 0:
            raise ValueError(f"temperature must be positive, got {fit.temperature}")
        with torch.no_grad():
            self._fold_preprocessing(preprocessing)
            self._fold_network(preprocessing, network, fit)
        knots, lower, upper = (torch.tensor(v, dtype=torch.float64) for v in (fit.knots, fit.lower, fit.upper))
        if len(knots) < 2 or not bool((knots.diff() > 0).all()):
            raise ValueError("interval knots must be at least two and rise")
        self._keep(
            start=knots[:-1], end=knots[1:], first=torch.stack([lower[0], upper[0]]),
            slopes=torch.stack([lower.diff() / knots.diff(), upper.diff() / knots.diff()], dim=1),
            is_lower=torch.tensor([[True, False]]),
        )
        self.eval()

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())

    def _fold_preprocessing(self, p: Preprocessing) -> None:
        direction = torch.ones(len(p.columns), dtype=torch.float64)
        direction[p.monotone_index] = p.direction
        self.has_heavy = bool(p.heavy.any())
        self.has_numbers, self.has_categories = len(p.columns) > 0, len(p.category_sizes) > 0
        gain = direction / p.deviation
        self._keep(
            numeric=p.numeric, fill=p.fill, low=p.low, high=p.high, heavy=p.heavy,
            center=p.center, scale=1.0 / p.scale, mean=p.mean, gain=gain,
            category_index=p.category_index, size=p.category_size, largest=p.category_size - 1.0,
            unknown=p.category_size + 1.0,
        )

    def _fold_network(self, p: Preprocessing, network: MonotoneNetwork, fit: Fit) -> None:
        """u = [scaled columns | was-missing | category values]: hidden = relu(u·H + h), linear = u·A + hidden·B + b.

        The last column of A, B and b is the straight term. Rows of H that belong to monotone columns stay exactly zero, and
        rows of A there are softplus(w) ≥ 0: folding keeps the guarantee.
        """
        head = network.head
        columns, members, units = len(p.columns), head.members, head.groups * head.units
        widths = [t.shape[1] for t in network.tables]
        width = max(widths, default=0)
        total = 2 * columns + width * len(widths)

        # where the free path's inputs (free columns, flags, categories) lie in u
        place = [*p.free_at, *(columns + i for i in p.masked)]
        for k, w in enumerate(widths):
            place += [2 * columns + k * width + i for i in range(w)]
        # Unit weights take the member's sharpness, the straight term its share of the mean and the temperature: multiplications
        # that the graph does not have to do.
        sharpness = torch.exp(head.log_sharpness.double())
        unit_scale = sharpness.repeat_interleave(units)
        share = 1.0 / (members * fit.temperature)
        direct = torch.zeros(total, members * units + 1, dtype=torch.float64)
        softplus = nn.functional.softplus
        direct[list(p.monotone_at), :-1] = softplus(head.weight.double()).T * unit_scale
        direct[list(p.monotone_at), -1] = softplus(head.straight.double()).sum(dim=0) * share
        straight_bias = (head.offset.double().sum() * share + fit.offset / fit.temperature).reshape(1)
        self.has_free = network.has_free
        if network.has_free:
            hidden_count = network.out_weight.shape[1]
            out = torch.zeros(members * hidden_count, members * units + 1, dtype=torch.float64)
            for m in range(members):
                enter = head.free_weight[m].double() * sharpness[m]
                enter_straight = head.free_straight[m].double() * share
                at = slice(m * units, (m + 1) * units)
                rows = slice(m * hidden_count, (m + 1) * hidden_count)
                direct[place, at] = direct[place, at] + network.skip_weight[m].double() @ enter
                direct[place, -1] = direct[place, -1] + (network.skip_weight[m].double() @ enter_straight).squeeze(1)
                out[rows, at] = network.out_weight[m].double() @ enter
                out[rows, -1] = (network.out_weight[m].double() @ enter_straight).squeeze(1)
            hidden = torch.zeros(total, members * hidden_count, dtype=torch.float64)
            hidden[place] = network.hidden_weight.double().T
            self._keep(hidden_weight=hidden, hidden_bias=network.hidden_bias.double(), out_weight=out)
        self.members, self.groups, self.units = members, head.groups, head.units
        self._keep(
            direct=direct, bias=torch.cat([head.bias.double() * unit_scale, straight_bias]), lowest_scale=-share / sharpness,
        )
        if widths:
            # one table for all categories, padded to one width: one lookup instead of one per category
            offsets, count = [], 0
            padded: list[Tensor] = []
            for table in network.tables:
                offsets.append(float(count))
                count += len(table)
                padded.append(nn.functional.pad(table.double(), (0, width - table.shape[1])))
            self._keep(table=torch.cat(padded), table_offset=torch.tensor(offsets, dtype=torch.float64))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        calibrated = self.calibrated_logit(features)
        score = torch.sigmoid(calibrated).to(torch.float32)
        # How far the logit has come along each piece: a sum of clamps, because a lookup would need a search in the graph.
        column = calibrated.unsqueeze(1)
        along = torch.minimum(torch.maximum(column, self.start), self.end) - self.start
        bounds = torch.clamp(along @ self.slopes + self.first, 0.0, 1.0).to(torch.float32)
        at = score.unsqueeze(1)
        return score, torch.where(self.is_lower, torch.minimum(bounds, at), torch.maximum(bounds, at))

    def calibrated_logit(self, features: Tensor) -> Tensor:
        """float64 [batch]: the logit of the score."""
        x = features.to(torch.float64)
        parts: list[Tensor] = []
        if self.has_numbers:
            raw = x.index_select(1, self.numeric)
            absent = torch.isnan(raw)
            # The clamp is what makes infinities and 1e30 harmless.
            clamped = torch.minimum(torch.maximum(torch.where(absent, self.fill, raw), self.low), self.high)
            # subtract first: x·a − b would lose the digits of a range far from zero
            z = (clamped - self.center) * self.scale
            if self.has_heavy:
                z = torch.where(self.heavy, torch.sign(z) * torch.log(torch.abs(z) + 1.0), z)
            parts += [(z - self.mean) * self.gain, absent.to(torch.float64)]
        if self.has_categories:
            given = x.index_select(1, self.category_index)
            nearest = torch.minimum(torch.clamp(torch.floor(given), min=0.0), self.largest)
            code = torch.where(nearest == given, given, self.unknown)
            code = torch.where(torch.isnan(given), self.size, code) + self.table_offset
            parts.append(nn.functional.embedding(code.to(torch.int64), self.table).flatten(1))
        u = torch.cat(parts, dim=1)
        linear = u @ self.direct + self.bias
        if self.has_free:
            linear = linear + torch.relu(u @ self.hidden_weight + self.hidden_bias) @ self.out_weight
        count = self.members * self.groups * self.units
        highest = torch.logsumexp(linear[:, :count].reshape(-1, self.members, self.groups, self.units), dim=3)
        lowest = torch.logsumexp(-highest, dim=2)
        return lowest @ self.lowest_scale + linear[:, count]
