"""What people see in the terminal: progress bars on long work, one line per event; plain lines where nobody looks.

Answers go to standard output, everything else (bars, events, errors) to standard error, so that a pipe holds answers only.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hafnium_contract.shown_text import lines_of

ERROR_FILE = "HAFNIUM_ERROR_FILE"
OUT = Console(soft_wrap=True, highlight=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(data: Any) -> None:
    """One JSON document on standard output, for scripts."""
    print(json.dumps(data, indent=2, default=str, allow_nan=False))  # noqa: T201 - rich would wrap and colour it


def warn(text: str) -> None:
    ERR.print(f"[yellow]{escape(text)}[/yellow]")


def fail(text: str) -> None:
    """An error for people, and for whoever started this command and named a file for it in ERROR_FILE."""
    if place := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError), Path(place).open("a", encoding="utf-8") as f:
            f.write(text + "\n")
    ERR.print(f"[red]error:[/red] {escape(lines_of(text))}")


class Bars:
    """The Progress of a person at a terminal (see hafnium_contract.progress). Where there is no terminal, each stage and event
    is a line with the seconds since the start."""

    def __init__(self, console: Console = ERR) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("  {task.description:<34}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None and kind is None:
            self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._task].total
            self._progress.update(self._task, completed=total)

    def stage(self, name: str, total: int) -> None:
        """A new bar; the one before counts as done."""
        self._finish()
        self._task = self._progress.add_task(escape(name), total=max(total, 1))
        if not self._console.is_terminal:
            self._console.print(f"  {self._stamp()} {escape(name)}")

    def advance(self, count: int = 1) -> None:
        """`count` units more of the present stage."""
        if self._task is not None:
            self._progress.advance(self._task, count)

    def event(self, text: str) -> None:
        """A line that stays."""
        self._progress.console.print(f"  [dim]{self._stamp()}[/dim] {escape(text)}")

    def _stamp(self) -> str:
        return f"{time.monotonic() - self._started:6.1f}s"
