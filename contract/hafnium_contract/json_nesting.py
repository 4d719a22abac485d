"""How deep a caller's JSON may be nested. Parsers and writers give up at depths of their own, one of them with a 500."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

NESTING_MAX = 32
"""No protocol here needs more than six."""


def nested_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than NESTING_MAX. No recursion, or it would fail where it has to tell."""
    level: list[Any] = [value]
    for _ in range(NESTING_MAX):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, list | dict)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast(dict[str, Any], value).values()
    return cast(list[Any], value) if isinstance(value, list) else ()
