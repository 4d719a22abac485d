"""Command lines of manifests, read as their programs would read them, and nothing is run."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import click
import typer

USAGE_ERRORS: tuple[type[Exception], ...] = (click.UsageError, *typer.BadParameter.__mro__[1:2])  # type: ignore[assignment]
"""Of click, and of the click that typer brings."""

def parsed(command: Any, name: str, words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words call, and its parameters. What it doesn't take raises one of USAGE_ERRORS.

    A group's own parser leaves a subcommand's words alone, so it is followed down. Any: typer brings a click of its own.
    """
    with command.make_context(name, list(words)) as context:
        if not hasattr(command, "resolve_command"):
            return name, dict(context.params)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        called, inner, rest = command.resolve_command(context, rest)
        return parsed(inner, called or "", rest)


def shell_words(line: str, environment: Mapping[str, str]) -> list[str]:
    """What a shell makes of a line. dash knows least; a variable that isn't there is an error."""
    done = subprocess.run(["sh", "-uc", f"printf '%s\\n' {line}"], env=dict(environment), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
