"""The whole model as it is defined: preprocessing, network, calibration and interval, in float64, in torch.

This is what `onnx_graph.py` folds into the served graph, and what the parity gate holds that graph against: a mistake in the
folding can't be in both.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hafnium_training.calibration import Fit
from hafnium_training.network import MonotoneNetwork, Preprocessing


class RiskModel(nn.Module):
    """features float32 [batch, n] → (score [batch], interval [batch, 2]), both float32, in [0, 1], finite for any input.

    score = sigmoid((logit + offset) / temperature). Interval: lines between the knots over that calibrated logit, constant
    outside of them, and widened to contain the score.
    """

    knots: Tensor
    bounds: Tensor

    def __init__(self, preprocessing: Preprocessing, network: MonotoneNetwork, fit: Fit) -> None:
        super().__init__()
        if not fit.temperature > 0:
            raise ValueError(f"temperature must be positive, got {fit.temperature}")
        self.preprocessing = copy.deepcopy(preprocessing)
        self.network = copy.deepcopy(network).double()
        self.fit = fit
        self.register_buffer("knots", torch.tensor(fit.knots, dtype=torch.float64))
        self.register_buffer("bounds", torch.stack([torch.tensor(v, dtype=torch.float64) for v in (fit.lower, fit.upper)], dim=1))
        if len(self.knots) < 2 or not bool((self.knots.diff() > 0).all()):
            raise ValueError("interval knots must be at least two and rise")
        if not bool((self.bounds.diff(dim=0) >= 0).all() and (self.bounds >= 0).all() and (self.bounds <= 1).all()):
            raise ValueError("interval bounds must lie in [0, 1] and must not fall")
        self.requires_grad_(False)
        self.eval()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        calibrated = self.calibrated_logit(features)
        score = torch.sigmoid(calibrated)
        piece = torch.clamp(torch.searchsorted(self.knots, calibrated) - 1, 0, len(self.knots) - 2)
        along = torch.clamp((calibrated - self.knots[piece]) / (self.knots[piece + 1] - self.knots[piece]), 0.0, 1.0).unsqueeze(1)
        bounds = self.bounds[piece] * (1.0 - along) + self.bounds[piece + 1] * along
        lower, upper = torch.minimum(bounds[:, 0], score), torch.maximum(bounds[:, 1], score)
        return score.to(torch.float32), torch.stack([lower, upper], dim=1).clamp(0.0, 1.0).to(torch.float32)

    def calibrated_logit(self, features: Tensor) -> Tensor:
        """float64 [batch]: the logit of the score."""
        logit = self.network(self.preprocessing(features)).mean(dim=1)
        return (logit + self.fit.offset) / self.fit.temperature
