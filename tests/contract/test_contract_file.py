"""A contract file: what is accepted, and what a person is told when it is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.contract_file import load_contract, parse_contract
from hafnium_contract.errors import ContractError, InputError

EXAMPLES = Path(__file__).parents[2] / "examples"


def small() -> dict[str, Any]:
    return {
        "schemaVersion": 1, "name": "small", "version": "1", "owner": "o", "description": "d",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "7d"}},
        "entities": [{"name": "who", "joinKey": "who_id"}],
        "views": [{"name": "v", "entity": "who", "maxAge": "1d"}],
        "features": [
            {"name": "a", "description": "a", "dtype": "float", "range": [0, 10]},
            {"name": "b", "description": "b", "dtype": "int", "range": [0, 10], "source": {"view": "v", "field": "b"}},
            {"name": "c", "description": "c", "dtype": "category", "categories": ["x", "y"]},
            {"name": "r", "description": "r", "dtype": "float", "range": [0, 99],
             "source": {"derived": {"operation": "ratio", "inputs": ["a", "b"]}}},
        ],
        "protected": [{"name": "age"}],
        "decision": {"threshold": 0.5},
    }


@pytest.mark.parametrize("name", ["unified-risk", "creditcard"])
def test_the_examples_are_valid(name: str) -> None:
    contract = load_contract(EXAMPLES / name / "contract.yaml")
    assert contract.name == name
    assert contract.digest == load_contract(EXAMPLES / name / "contract.yaml").digest


def test_the_digest_follows_meaning_and_not_layout(tmp_path: Path) -> None:
    one, two, three = tmp_path / "1.yaml", tmp_path / "2.yaml", tmp_path / "3.yaml"
    one.write_text(yaml.safe_dump(small()))
    two.write_text("# a comment\n" + yaml.safe_dump(small(), sort_keys=False, default_flow_style=True))
    changed = small()
    changed["features"][0]["range"] = [0, 11]
    three.write_text(yaml.safe_dump(changed))
    assert load_contract(one).digest == load_contract(two).digest != load_contract(three).digest


def test_every_problem_is_named_with_its_line(tmp_path: Path) -> None:
    text = (EXAMPLES / "unified-risk" / "contract.yaml").read_text()
    text = text.replace("dtype: bool", "dtype: boolean").replace("unit: EUR\n    range: [0, 100000]\n    missing: reject",
                                                                   "unit: EUR\n    rnage: [0, 100000]\n    missing: reject")
    path = tmp_path / "contract.yaml"
    path.write_text(text)
    with pytest.raises(ContractError) as e:
        load_contract(path)
    by_path = {p.path: p for p in e.value.problems}
    lines = text.splitlines()
    assert lines[(by_path["features[0].rnage"].line or 0) - 1].strip().startswith("rnage:")
    assert lines[(by_path["features[3].dtype"].line or 0) - 1].strip() == "dtype: boolean"
    assert "got \"boolean\"" in by_path["features[3].dtype"].message
    assert "unknown key" in by_path["features[0].rnage"].message


def _set(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(small())
    here: Any = data
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for step in way:
        here = here[step]
    here[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("schemaVersion", 2, "knows version 1 only"),
        ("name", "Has Capitals", "pattern"),
        ("features.0.range", [10, 0], "range must rise"),
        ("features.0.range", None, "needs a range"),
        ("features.0.range", [0, float("inf")], "finite numbers"),
        ("features.0.range", [float("-inf"), 0], "finite numbers"),
        ("features.0.range", [float("nan"), 1], "finite numbers"),
        ("features.0.range", [0, 1e39], "float32's largest"),
        ("features.2.categories", [], "lists its categories"),
        ("features.2.categories", ["x", "x"], "repeat"),
        ("features.2.monotone", "increasing", "no order"),
        ("features.1.source", {"view": "nope", "field": "b"}, "'nope' is not declared"),
        ("features.1.name", "a", "named twice: a"),
        ("features.3.source", {"derived": {"operation": "ratio", "inputs": ["a", "later"]}}, "declared above"),
        ("features.3.source", {"derived": {"operation": "ratio", "inputs": ["a", "c"]}}, "is a category"),
        ("features.3.source", {"derived": {"operation": "ratio", "inputs": ["a"]}}, "takes 2 input"),
        ("features.3.source", {"derived": {"operation": "log1p", "inputs": ["event_time"]}}, "event_time"),
        ("views.0.entity", "ghost", "'ghost' is not declared"),
        ("views.0.maxAge", "soon", "not a duration"),
        ("protected.0.name", "a", "evaluation only"),
        ("data.labelTime", {}, "exactly one of"),
        ("data.label.column", "a", "also a feature"),
        ("decision.threshold", 1.5, "less than 1"),
        ("unheard_of", 1, "unknown key"),
    ],
)
def test_what_is_wrong_is_said(path: str, value: Any, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        parse_contract(_set(path, value))


@pytest.mark.parametrize("source", [{"request": "NAME"}, {"view": "v", "field": "NAME"}], ids=["request", "view"])
@pytest.mark.parametrize(
    ("column", "says"),
    [("y", "is the label"), ("known", "label's time"), ("t", "event time"), ("id", "request's id"), ("age", "evaluation only"),
     ("who_id", "join key")],
)
def test_what_is_no_feature_can_not_be_one_under_another_name(source: dict[str, str], column: str, says: str) -> None:
    data = small()
    data["data"] |= {"labelTime": {"column": "known"}, "requestId": "id"}
    parse_contract(data)
    leak = {"name": "leak", "description": "l", "dtype": "float", "range": [0, 1]}
    data["features"].append({**leak, "source": {k: v.replace("NAME", column) for k, v in source.items()}})
    with pytest.raises(ContractError, match=f"feature leak: is read from '{column}', which .*{says}"):
        parse_contract(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [1", "line"), ("name: x\nname: y\n", "written twice"), ("- 1\n", "expected a mapping"), ("", "expected a mapping")],
    ids=["not-yaml", "key-twice", "a-list", "empty"],
)
def test_a_file_that_is_no_contract_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(text)
    with pytest.raises(ContractError, match=says):
        load_contract(path)


def test_unreadable_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        load_contract(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_contract(tmp_path / "binary.yaml")
