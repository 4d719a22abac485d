"""What KServe's SDK says in its errors, without the caller's input that it repeats in some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import orjson


def sdk_detail(body: bytes) -> str:
    """What the SDK says in its error body."""
    try:
        parsed: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:200].decode("utf-8", "replace")
    if isinstance(parsed, dict):
        found: Callable[[str], Any] = cast(dict[str, Any], parsed).get
        detail: Any = found("error") or found("detail") or parsed
        if isinstance(detail, list):
            # FastAPI's list of what its models missed, which repeats the input: keep place and message only
            entries = [cast(dict[str, Any], d) for d in cast(list[Any], detail) if isinstance(d, dict)]
            return "; ".join(f"{'.'.join(str(x) for x in d.get('loc', ()))}: {d.get('msg', '')}" for d in entries[:5])
        return str(detail)[:500]
    return str(parsed)[:200]
