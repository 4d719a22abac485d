"""Contracts and tables for the tests of training: a made-up lender, whose names no code knows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.encoding import Matrix
from hafnium_contract.model_contract import ModelContract
from hafnium_training.calibration import Fit
from hafnium_training.graph import RiskModel
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_training.network import MonotoneNetwork, Preprocessing

START = datetime(2026, 1, 1, tzinfo=UTC)

LENDER: dict[str, Any] = {
    "schemaVersion": 1, "name": "lender", "version": "3", "owner": "credit-risk", "description": "Default within a year.",
    "data": {
        "requestId": "application", "eventTime": {"column": "day", "unit": "d", "origin": "2026-01-01T00:00:00Z"},
        "label": {"column": "bad"}, "labelTime": {"delay": "2d"},
    },
    "features": [
        {"name": "debt", "description": "open debt", "dtype": "float", "unit": "EUR", "range": [0, 1_000_000], "outOfRange": "clamp",
         "missing": "impute", "monotone": "increasing"},
        {"name": "income", "description": "yearly income", "dtype": "float", "unit": "EUR", "range": [0, 1_000_000],
         "missing": "reject", "monotone": "decreasing"},
        {"name": "age", "description": "age", "dtype": "int", "unit": "y", "range": [18, 110], "missing": "impute", "personal": True},
        {"name": "late_before", "description": "was late before", "dtype": "bool", "missing": "impute", "monotone": "increasing"},
        {"name": "purpose", "description": "what for", "dtype": "category", "categories": ["car", "house", "boat"], "missing": "impute"},
        {"name": "debt_ratio", "description": "debt over income", "dtype": "float", "range": [0, 1000], "outOfRange": "clamp",
         "missing": "impute", "monotone": "increasing", "source": {"derived": {"operation": "ratio", "inputs": ["debt", "income"]}}},
    ],
    "protected": [{"name": "sex"}],
    "decision": {"threshold": 0.3, "above": "refuse", "below": "grant"},
}


def lender(**changes: Any) -> ModelContract:
    """The lender's contract, with top-level keys replaced."""
    return parse_contract({**LENDER, **changes})


def lender_table(rows: int = 3000, seed: int = 0, skill: float = 1.0, days: float = 60.0) -> pd.DataFrame:
    """Applications over `days` days. `skill` 0: the label has nothing to do with the features."""
    rng = np.random.default_rng(seed)
    debt, income = rng.lognormal(9, 1, rows), rng.lognormal(10.5, 0.5, rows)
    late = (rng.random(rows) < 0.1).astype(float)
    purpose = rng.choice(np.array(["car", "house", "boat"]), rows)
    logit = -3.0 + skill * (1.3 * np.log(debt / income * 5) + 1.5 * late + 1.0 * (purpose == "boat"))
    frame = pd.DataFrame({
        "application": [f"a-{i}" for i in range(rows)], "day": np.sort(rng.uniform(0, days, rows)),
        "debt": debt, "income": income, "age": rng.integers(18, 90, rows).astype(float), "late_before": late, "purpose": purpose,
        "sex": rng.choice(np.array(["f", "m"]), rows), "bad": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
    })
    for column in ("debt", "age", "purpose"):
        frame.loc[rng.random(rows) < 0.03, column] = None
    return frame


def write_lender(folder: Path, **table: Any) -> tuple[Path, Path]:
    """(contract file, CSV file) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    contract, data = folder / "contract.yaml", folder / "lender.csv"
    contract.write_text(json.dumps(LENDER), encoding="utf-8")  # JSON is YAML
    lender_table(**table).to_csv(data, index=False)
    return contract, data


def days(count: float) -> datetime:
    return START + timedelta(days=count)


def random_inputs(contract: ModelContract, rows: int, seed: int) -> Matrix:
    """float32 [rows, n] over and a little beyond the ranges, 5 % missing, some unknown categories."""
    rng = np.random.default_rng(seed)
    X = np.zeros((rows, len(contract.inputs)), np.float32)
    for j, f in enumerate(contract.inputs):
        if f.dtype == "category":
            X[:, j] = rng.integers(-1, len(f.categories) + 1, rows)
        elif f.dtype == "bool":
            X[:, j] = rng.integers(0, 2, rows)
        else:
            low, high = f.range or (0.0, 1.0)
            X[:, j] = low + (high - low) * rng.beta(0.7, 3.0, rows) * 1.1
    X[rng.random(X.shape) < 0.05] = np.nan
    return X


def random_model(
    contract: ModelContract, seed: int = 0, spread: float = 2.0, rows: int = 500,
) -> tuple[RiskModel, MonotoneNetwork, Preprocessing]:
    """An untrained model with large random weights: less smooth than any training would leave it."""
    preprocessing = Preprocessing(contract, random_inputs(contract, rows, seed))
    network = MonotoneNetwork(preprocessing, Hyperparameters(members=2, groups=3, units=3, hidden=8, embedding=4), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        network.head.log_sharpness.copy_(torch.tensor([0.4, -0.2]))
    knots = np.linspace(-4.0, 4.0, 6)
    fit = Fit(-0.7, 3.0, knots, np.linspace(0.0, 0.8, 6), np.linspace(0.1, 1.0, 6))
    return RiskModel(preprocessing, network, fit), network, preprocessing
