"""docs/contracts.md, taken literally: its pieces make contracts that are valid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.contract_file import load_contract

GUIDE = Path(__file__).parents[2] / "docs" / "contracts.md"


def pieces() -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("looked_up", [False, True], ids=["requests only", "with looked-up features"])
def test_the_pieces_of_the_guide_make_a_valid_contract(tmp_path: Path, looked_up: bool) -> None:
    whole: dict[str, Any] = {"features": []}
    for piece in pieces():
        if "views" in piece and not looked_up:
            continue
        whole = {**whole, **piece, "features": [*whole["features"], *piece.get("features", [])]}
    (tmp_path / "loan.yaml").write_text(yaml.safe_dump(whole))
    contract = load_contract(tmp_path / "loan.yaml")
    assert contract.name == "loan-default"
    assert len(contract.features) == (5 if looked_up else 4)
    assert bool(contract.views) == looked_up
