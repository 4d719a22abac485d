"""How deep a caller's JSON may be nested, and how much it may hold.

Parsers and writers give up at depths of their own, one of them with a 500; and what is converted before it is counted takes seconds.
"""

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


def holds_more_than(value: Any, most: int) -> bool:
    """Whether lists and objects hold more than `most` values, their own inner ones included. Looks at no more than that many."""
    pending, held = [value], 0
    while pending:
        inside = pending.pop()
        held += len(cast(list[Any] | dict[str, Any], inside)) if isinstance(inside, list | dict) else 0
        if held > most:
            return True
        pending.extend(inner for inner in _inside(inside) if isinstance(inner, list | dict))
    return False


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return cast(dict[str, Any], value).values()
    return cast(list[Any], value) if isinstance(value, list) else ()
