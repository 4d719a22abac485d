"""What a search may choose, with the ranges that it chooses from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import Strict


class Hyperparameters(Strict):
    """The defaults are the middle of what searches found on the simulated and on the ULB data."""

    learning_rate: float = Field(default=0.03, gt=0, le=1)
    """Peak of a warm-up and cosine schedule of AdamW."""
    weight_decay: float = Field(default=0.03, ge=0, le=1)
    batch_rows: int = Field(default=1024, ge=16, le=65536)
    members: int = Field(default=4, ge=1, le=32)
    """Networks that are trained side by side and averaged."""
    groups: int = Field(default=4, ge=1, le=64)
    """Groups of the smooth minimum over smooth maxima."""
    units: int = Field(default=4, ge=1, le=64)
    """Linear units in each group."""
    hidden: int = Field(default=12, ge=1, le=512)
    """Width of the unconstrained layer that reads the free features."""
    embedding: int = Field(default=6, ge=1, le=256)
    """How many values of the free features enter the monotone part."""
    positive_power: float = Field(default=0.25, ge=0, le=1)
    """Positives weigh (negatives / positives) ** power in the loss; the logit is corrected for it afterwards."""
    monotonicity: float = Field(default=1.0, ge=0, le=1000)
    """Weight λ1 of the hint loss on what the construction does not cover (losses.py)."""
    smoothness: float = Field(default=0.03, ge=0, le=1000)
    """Weight λ2 of the squared slope of the logit per standard deviation of the inputs."""


def parse_hyperparameters(data: Any, source: str) -> Hyperparameters:
    """JSON data → Hyperparameters. Raises InputError that names the field."""
    try:
        return Hyperparameters.model_validate(data)
    except ValidationError as e:
        x = e.errors()[0]
        known = ", ".join(f.alias or n for n, f in Hyperparameters.model_fields.items())
        where = ".".join(str(s) for s in x["loc"])
        raise InputError(f"{source}: {where}: {x['msg']}; hyperparameters are {known}") from e


def read_hyperparameters(path: Path) -> Hyperparameters:
    """From a JSON file of hyperparameters, or from a bundle (a folder): the ones that its model was trained with.

    Raises InputError when the file can't be read or holds something else.
    """
    file = path / "environment.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{file}: can't be read: {e.strerror}; expected a JSON file of hyperparameters or a bundle") from e
    except ValueError as e:
        raise InputError(f"{file}: not JSON: {e}") from e
    if isinstance(data, dict) and "hyperparameters" in data:
        data = data["hyperparameters"]
    return parse_hyperparameters(data, str(file))
