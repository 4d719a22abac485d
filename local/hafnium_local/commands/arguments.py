"""Arguments that several commands share, with one meaning and one help text each."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.durations import parse_duration


def parse_time(text: str) -> datetime:
    """`2026-01-31`, `2026-01-31T12:00:00Z` → a time with zone; a date is its midnight UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError as e:
        raise typer.BadParameter(f"{text!r} is not a time; write 2026-01-31 or 2026-01-31T12:00:00Z") from e
    if when.tzinfo is None and len(text) > len("2026-01-31"):
        raise typer.BadParameter(f"{text!r} has no zone; write {text}Z for UTC")
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


def parse_seconds(text: str | float) -> float:
    """`10s`, `1h30m` → seconds. A number is a default that typer hands to its own parser."""
    if not isinstance(text, str):
        return text
    try:
        return parse_duration(text).total_seconds()
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e


Contract = Annotated[Path, typer.Option(help="The model contract (YAML).", show_default=False)]
Repo = Annotated[Path, typer.Option(help="Folder of the Feast repo.", show_default=False)]
State = Annotated[Path, typer.Option(help="State folder of `hafnium up`: everything that runs is a file in it.")]
Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
Seed = Annotated[int, typer.Option(help="Decides everything that is drawn; the same seed gives the same result.")]
Port = Annotated[int | None, typer.Option(help="The gateway's port; any free one without it.", show_default=False, min=1, max=65535)]
DEFAULT_STATE = Path(".hafnium/state")
