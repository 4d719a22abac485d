"""YAML file → ModelContract, with the line of each problem.

pydantic knows paths (`features.2.range`), people look for lines: the YAML is parsed twice, once into data and once into
nodes that remember where they stood, and each error's path is walked down the nodes as far as it goes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hafnium_contract.errors import ContractError, InputError, Problem
from hafnium_contract.model_contract import SCHEMA_VERSION, ModelContract

BYTES_MAX = 4 * 1024 * 1024
"""A contract of 2,000 features is below 1 MB; more is a wrong file."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice: YAML keeps the last one silently, so a rule could vanish."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def line_of(node: yaml.Node | None, path: tuple[str | int, ...]) -> int | None:
    """Line (from 1) of the deepest part of `path` that exists below `node`."""
    if node is None:
        return None
    line = node.start_mark.line + 1
    here = node
    for step in path:
        child: yaml.Node | None = None
        if isinstance(here, yaml.MappingNode):
            for key, value in here.value:
                if key.value == str(step):
                    line, child = key.start_mark.line + 1, value
        elif isinstance(here, yaml.SequenceNode) and isinstance(step, int) and step < len(here.value):
            item: yaml.Node = here.value[step]
            line, child = item.start_mark.line + 1, item
        # pydantic puts names of union members in the path, which the file doesn't have: those are passed over.
        here = child if child is not None else here
    return line


def dotted(path: tuple[str | int, ...]) -> str:
    """('features', 2, 'range') → `features[2].range`."""
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else (f".{step}" if out else step)
    return out


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """Data and nodes of a YAML file. Raises InputError or ContractError (with the line) when it can't be read."""
    return _parsed(_bytes(path), path)


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > BYTES_MAX:
            raise InputError(f"{path}: larger than {BYTES_MAX} bytes; a contract is a small YAML file")
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: can't be read: {e.strerror}") from e


def _parsed(raw: bytes, path: Path) -> tuple[Any, yaml.Node | None]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte {e.start})") from e
    try:
        return yaml.load(text, _Loader), yaml.compose(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        problem = Problem("", e.problem or str(e), mark.line + 1 if mark else None)
        raise ContractError(str(path), [problem]) from e


def parse_contract(data: Any, source: str = "contract", node: yaml.Node | None = None) -> ModelContract:
    """Data (from YAML or JSON) → ModelContract. Raises ContractError with all problems and their lines."""
    if not isinstance(data, dict):
        raise ContractError(source, [Problem("", "expected a mapping with schemaVersion, name, features, …", 1)])
    version = data.get("schemaVersion")
    if version != SCHEMA_VERSION:
        message = f"expected {SCHEMA_VERSION}, got {version!r}; this Hafnium knows version {SCHEMA_VERSION} only"
        raise ContractError(source, [Problem("schemaVersion", message, line_of(node, ("schemaVersion",)))])
    try:
        return ModelContract.model_validate(data)
    except ValidationError as e:
        problems = [
            Problem(dotted(x["loc"]), _message(x["msg"], x["type"], x["input"]), line_of(node, x["loc"]))
            for x in e.errors()
        ]
        raise ContractError(source, sorted(problems, key=lambda p: p.line or 0)) from e


def _message(text: str, kind: str, value: Any) -> str:
    text = text.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return "unknown key; `hafnium contract schema` lists those that exist"
    if kind in ("value_error", "missing"):
        return text[0].lower() + text[1:]
    shown = json.dumps(value, default=str)
    return f"{text[0].lower() + text[1:]}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def load_contract(path: Path) -> ModelContract:
    """Reads and checks a contract file."""
    return read_contract(path)[0]


def read_contract(path: Path) -> tuple[ModelContract, bytes]:
    """A checked contract and the bytes that it was read from: who copies the file later may copy another one."""
    raw = _bytes(path)
    data, node = _parsed(raw, path)
    return parse_contract(data, str(path), node), raw
