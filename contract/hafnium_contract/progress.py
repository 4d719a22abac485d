"""How long work tells that it moves on, without knowing whether a terminal, a log or nobody is listening."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener. Work calls `stage` once per stage, `advance` as units are done, `event` for one line worth keeping."""

    def stage(self, name: str, total: int) -> None: ...
    def advance(self, count: int = 1) -> None: ...
    def event(self, text: str) -> None: ...


class Silent:
    """Nobody is listening."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self, count: int = 1) -> None:
        """Ignored."""

    def event(self, text: str) -> None:
        """Ignored."""
