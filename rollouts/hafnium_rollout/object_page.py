"""The reference of the objects in Markdown, from the same schemas as `kubectl explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hafnium_rollout.crds import DEFINITIONS, GROUP, VERSION, Definition, schema

STATUS_DEPTH = 2
"""What lies deeper in a status is the controller's memory."""


def object_page() -> str:
    """One chapter for each kind."""
    intro = (f"Group `{GROUP}/{VERSION}`. The same text is in `kubectl explain modelrollout.spec`. Rules are checked by the API server,\n"
             "and in the same words by `hafnium rollout check FILE`.\n")
    return "# Objects\n\n" + intro + "".join(f"\n{_chapter(d)}" for d in DEFINITIONS)


def _chapter(d: Definition) -> str:
    found = schema(d)
    lines = [f"## {d.kind}", "", found["description"], "", f"Short name `{d.short}`. Columns of `kubectl get`: "
             + ", ".join(c.name + (" (wide)" if c.priority else "") for c in d.columns) + ".", ""]
    lines += ["| field of spec | type | default | what |", "|---|---|---|---|"]
    lines += [_row(path, s, required) for path, s, required in _fields(found["properties"]["spec"], "", 99)]
    rules = [(path, rule) for path, rule in _rules(found["properties"]["spec"], "spec")]
    if rules:
        lines += ["", "Rules:", "", *(f"- `{path}`: {rule}" for path, rule in rules)]
    if "status" in found["properties"]:
        lines += ["", "| field of status | type | what |", "|---|---|---|"]
        for path, s, _ in _fields(found["properties"]["status"], "", STATUS_DEPTH):
            lines.append(f"| `{path}` | {_type(s)} | {_text(s)} |")
    return "\n".join(lines) + "\n"


def _fields(node: dict[str, Any], path: str, depth: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for name, child in node.get("properties", {}).items():
        at = f"{path}.{name}" if path else name
        inner = child.get("items", child)
        at += "[]" if child.get("type") == "array" else ""
        yield at, child, name in node.get("required", [])
        if depth > 1:
            yield from _fields(inner, at, depth - 1)


def _rules(node: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    yield from ((path, r["message"]) for r in node.get("x-kubernetes-validations", []) if r["message"] != "must be longer than 0s")
    if "items" in node:
        yield from _rules(node["items"], f"{path}[]")
    for name, child in node.get("properties", {}).items():
        yield from _rules(child, f"{path}.{name}")


def _row(path: str, s: dict[str, Any], required: bool) -> str:
    default = s.get("default")
    if required:
        shown = "required"
    elif default in (None, "", {}, []):
        shown = "–"
    else:
        shown = f"`{', '.join(default) if isinstance(default, list) else str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{path}` | {_type(s)} | {shown} | {_text(s)} |"


def _type(s: dict[str, Any]) -> str:
    if s.get("type") == "array":
        inner = _type(s["items"])
        return f"list of {inner}"
    if "enum" in s:
        return " \\| ".join(f"`{v}`" for v in s["enum"])
    if s.get("format") == "date-time":
        return "time"
    if "(ms|s|m|h|d|w)" in s.get("pattern", ""):
        return "duration"
    bounds = [f"{sign}{' ' if s.get('exclusive' + key.capitalize()) else '= '}{s[key]:g}"
              for key, sign in (("minimum", ">"), ("maximum", "<")) if key in s]
    return str(s.get("type", "any")) + (f" {', '.join(bounds)}" if bounds else "")


def _text(s: dict[str, Any]) -> str:
    return str(s.get("description", "")).replace("|", "\\|")
