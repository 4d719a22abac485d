"""KServe's own schema of an InferenceService, read from the SDK's generated models without importing the SDK.

`import kserve` takes about four seconds (fastapi, pandas, the kubernetes client); a command that only wants to check a file
should not. The generated model classes carry their tables (`openapi_types`, `attribute_map`) as literals, so the few files
that a document touches are parsed with `ast`, about a millisecond each. The same works for the kubernetes client, whose newer
releases are pydantic classes with the same two tables.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hafnium_contract.errors import InputError

ROOT_CLASS = "V1beta1InferenceService"
SERVICE_SPEC_CLASS = "V1beta1InferenceServiceSpec"
_MODULES = (("kserve", "models"), ("kubernetes", "client/models"))
_LIST = re.compile(r"[lL]ist\[(.+)\]")
_DICT = re.compile(r"[dD]ict[(\[]str, (.+)[)\]]")
_QUANTITIES = frozenset({"limits", "requests", "overhead", "sizeLimit", "divisor", "capacity"})
"""Fields that the models call str but that Kubernetes reads as quantities, where `cpu: 1` is as good as `cpu: "1"`."""


@dataclass(frozen=True)
class Table:
    """One class: field name in YAML → type in the generator's notation, and which fields are required."""

    types: dict[str, str]
    required: frozenset[str]


@lru_cache(maxsize=1)
def _class_files() -> dict[str, Path]:
    out: dict[str, Path] = {}
    for package, folder in reversed(_MODULES):  # kserve last: it wins for a name that both have
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"package {package!r} is not installed; install hafnium-serving[local]")
        models = Path(spec.submodule_search_locations[0]) / folder
        text = (models / "__init__.py").read_text(encoding="utf-8")
        for module, name in re.findall(r"from [\w.]+\.(\w+) import (\w+)", text):
            out[name] = models / f"{module}.py"
    return out


@lru_cache(maxsize=512)
def table(name: str) -> Table | None:
    """The class's table, or None for a name that the SDK has no model of (such as ResourceQuantity)."""
    # KServe names a few Kubernetes types by their Go package: K8sIoApiAppsV1DeploymentStrategy.
    file = _class_files().get(name) or _class_files().get(re.sub(r"^K8sIoApi[A-Z][a-z]+(?=V\d)", "", name))
    if file is None or not file.is_file():
        return None
    types: dict[str, str] = {}
    names: dict[str, str] = {}
    required: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if not isinstance(target, ast.Name):
                continue
            if target.id == "openapi_types" and node.value is not None:
                types = ast.literal_eval(node.value)
            elif target.id == "attribute_map" and node.value is not None:
                names = ast.literal_eval(node.value)
            elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith(("Optional", "ClassVar")):
                required.add(target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"Invalid value for `(\w+)`, must not be `None`", node.value)
            if found:
                required.add(found.group(1))
    return Table({names[k]: v for k, v in types.items() if k in names}, frozenset(names[k] for k in required if k in names))


class _Check:
    def __init__(self) -> None:
        self.problems: list[tuple[tuple[str | int, ...], str]] = []

    def add(self, path: tuple[str | int, ...], message: str) -> None:
        self.problems.append((path, message))

    def value(self, value: Any, kind: str, path: tuple[str | int, ...]) -> None:
        if kind == "object" or value is None:
            return
        if (of := _LIST.fullmatch(kind)) is not None:
            if not isinstance(value, list):
                self.add(path, f"expected a list, got {_shown(value)}")
                return
            for i, item in enumerate(value):
                self.value(item, of.group(1), (*path, i))
        elif (of := _DICT.fullmatch(kind)) is not None:
            if not isinstance(value, dict):
                self.add(path, f"expected a mapping, got {_shown(value)}")
                return
            for key, item in value.items():
                quantity = bool(path) and path[-1] in _QUANTITIES
                self.value(item, "ResourceQuantity" if quantity else of.group(1), (*path, str(key)))
        elif (known := table(kind)) is not None:
            self.mapping(value, known, path)
        else:
            self.scalar(value, kind, path)

    def mapping(self, value: Any, known: Table, path: tuple[str | int, ...]) -> None:
        if not isinstance(value, dict):
            self.add(path, f"expected a mapping, got {_shown(value)}")
            return
        for key, item in value.items():
            kind = known.types.get(key) if isinstance(key, str) else None
            if kind is None:
                self.add((*path, str(key)), f"unknown field{nearest(str(key), known.types)}")
            else:
                self.value(item, kind, (*path, key))
        for name in sorted(known.required):
            if value.get(name) is None:
                self.add((*path, name), f"required field is missing ({known.types[name]})")

    def scalar(self, value: Any, kind: str, path: tuple[str | int, ...]) -> None:
        if kind == "ResourceQuantity" or (path and path[-1] in _QUANTITIES):
            good, name = isinstance(value, str | int | float) and not isinstance(value, bool), "a quantity such as 500m or 1Gi"
        elif kind == "str":
            good, name = isinstance(value, str), "a string (put it in quotes)"
        elif kind == "bool":
            good, name = isinstance(value, bool), "true or false"
        elif kind == "int":
            good, name = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        elif kind == "float":
            good, name = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        elif kind == "datetime":
            good, name = isinstance(value, str), "a time (RFC 3339)"
        else:
            return  # a Go type without a model, such as metav1.FieldsV1: the SDK says nothing about its form
        if not good:
            self.add(path, f"expected {name}, got {_shown(value)}")


def problems_of(data: Any, kind: str = ROOT_CLASS) -> list[tuple[tuple[str | int, ...], str]]:
    """Everything in which `data` departs from KServe's schema of `kind`: (path, what was expected and what came)."""
    check = _Check()
    check.value(data, kind, ())
    return check.problems


def dotted(path: tuple[str | int, ...]) -> str:
    """('spec', 'containers', 0) → `spec.containers[0]`."""
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else (f".{step}" if out else step)
    return out


def nearest(name: str, known: dict[str, str]) -> str:
    """`; did you mean "storageUri"?`, or nothing when no known name is near."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f'; did you mean "{by_lower[found[0]]}"?' if found else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
