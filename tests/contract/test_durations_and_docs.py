"""Durations as people write them; the documentation names every feature."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from hafnium_contract.contract_file import load_contract
from hafnium_contract.documentation import contract_markdown
from hafnium_contract.durations import Duration, PositiveDuration, format_duration, parse_duration


@given(st.integers(0, 10**10))
def test_a_duration_survives_being_written(ms: int) -> None:
    value = timedelta(milliseconds=ms)
    assert parse_duration(format_duration(value)) == value


@pytest.mark.parametrize("text", ["", "5", "h", "-5s", "5 s", "1.s", "1e3s", "5min"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("name", ["unified-risk", "creditcard"])
def test_the_documentation_names_every_feature_with_what_it_is(name: str) -> None:
    contract = load_contract(Path(__file__).parents[2] / "examples" / name / "contract.yaml")
    text = contract_markdown(contract)
    rows = {line.split("|")[1].split()[0]: line for line in text.splitlines() if line.startswith("| ")}
    for f in contract.features:
        assert f.description in rows[f.name]
        assert f" {f.dtype} " in rows[f.name]
        assert ("yes" if f.personal else "no") in rows[f.name]
    assert contract.digest in text


class Waits(BaseModel):
    some: Duration = timedelta()
    more: PositiveDuration = timedelta(seconds=1)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("some", 90, "90 is not a duration"), ("some", "99999999w", "longer than ten years"), ("some", "1" * 30 + "s", "not a duration"),
    ("some", "1s" * 17, "not a duration"), ("more", "0s", "longer than 0s"), ("more", "0h0m", "longer than 0s"),
])
def test_a_duration_has_a_unit_and_a_limit(field: str, value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Waits.model_validate({field: value})
