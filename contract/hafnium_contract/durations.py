"""Durations as people write them in YAML: `90s`, `10m`, `24h`, `7d`, `1500ms`, and sums such as `1h30m`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

PATTERN = r"^([0-9]{1,8}(\.[0-9]{1,8})?(ms|s|m|h|d|w))+$"
CHARACTERS_MAX = 32
DURATION_MAX = timedelta(days=3650)
"""Ten years: nobody waits longer, and sums with dates stay dates."""
_TOKEN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(text: str) -> timedelta:
    """`1h30m` → timedelta. Raises ValueError that says the form."""
    if len(text) > CHARACTERS_MAX or not re.fullmatch(PATTERN, text):
        raise ValueError(f"{text[:40]!r} is not a duration; write for example 90s, 10m, 24h, 7d")
    seconds = sum(float(n) * _SECONDS[u] for n, u in _TOKEN.findall(text))
    if seconds > DURATION_MAX.total_seconds():
        raise ValueError(f"{text!r} is longer than ten years; write for example 90s, 10m, 24h, 7d")
    return timedelta(seconds=seconds)


def format_duration(value: timedelta) -> str:
    """timedelta → the shortest exact form with whole units (`1d12h`); zero is `0s`."""
    ms = round(value.total_seconds() * 1000)
    out: list[str] = []
    for unit in ("d", "h", "m", "s", "ms"):
        size = round(_SECONDS[unit] * 1000)
        count, ms = divmod(ms, size)
        if count:
            out.append(f"{count}{unit}")
    return "".join(out) or "0s"


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta():
        raise ValueError("must be longer than 0s")
    return value


def _before(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):  # a bare number has no unit, and the API server takes none
        raise ValueError(f"{value!r} is not a duration; write for example 90s, 10m, 24h, 7d")
    return parse_duration(value)


_SCHEMA = {"type": "string", "pattern": PATTERN, "maxLength": CHARACTERS_MAX, "description": "a duration: 90s, 10m, 24h, 7d"}
_SERIALIZER = PlainSerializer(format_duration, return_type=str)
Duration = Annotated[timedelta, BeforeValidator(_before), _SERIALIZER, WithJsonSchema(_SCHEMA)]
"""A pydantic field of this type reads `24h` and writes it back."""
PositiveDuration = Annotated[
    timedelta, BeforeValidator(_before), AfterValidator(_positive), _SERIALIZER, WithJsonSchema({**_SCHEMA, "x-positive": True})]
"""The same, and longer than 0s: a wait of nothing would decide at once."""
