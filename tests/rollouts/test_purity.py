"""decide and all that it stands on: no client, no clock, no randomness, no file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import hafnium_rollout

PACKAGE = Path(str(hafnium_rollout.__file__)).parent
PURE = ("decide", "approvals", "climbing", "endings", "outside", "people", "intake", "turn", "reporting", "gates", "failing_row", "actions",
        "observation", "status", "objects", "field_types", "steps", "gate_spec", "errors", "planning", "statistics.tilt",
        "statistics.betting", "statistics.dispersion", "statistics.sample_ratio", "statistics.across", "statistics.plan",
        "observation_codec", "record_lines", "replaying", "wrong_clock", "retraining.policy", "evidence_retention", "standing")
READS_FILES = {"objects"}  # parsing a YAML file is its job; decide only uses its types
FORBIDDEN = {"time", "random", "secrets", "os", "socket", "subprocess", "threading", "http", "urllib", "asyncio", "pathlib"}
OTHERS = {"numpy", "pydantic"}


def _imports(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names if node.module.startswith("hafnium_rollout")}
    return found


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_imports_only_pure_ones(name: str) -> None:
    for module in _imports(name):
        top = module.split(".")[0]
        if top == "hafnium_rollout":
            inner = module.removeprefix("hafnium_rollout.")
            known = any(inner == p or inner.startswith(p + ".") for p in (*PURE, "statistics"))
            assert known, f"{name} imports {module}, which isn't pure"
            continue
        assert top in {"hafnium_contract", *OTHERS} | set(sys.stdlib_module_names), f"{name} imports {module}"
        if name not in READS_FILES:
            assert top not in FORBIDDEN, f"{name} imports {module}"


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_asks_no_clock(name: str) -> None:
    text = (PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)}
    assert not {c for c in calls if c.endswith((".now", ".utcnow", ".today"))}
