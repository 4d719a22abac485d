"""Errors that all parts share.

HafniumError                 message says what, where, what was expected, what to do
├── ContractError            a contract file is not as it should be: carries every problem with its line
├── BundleError              a bundle is incomplete, changed or unknown
├── FeatureError             a row breaks the contract: carries every field's problem
└── InputError               any other file or argument that a command was given

The command line prints the message without a traceback and ends with `exit_status`. A command that was asked to check just
that thing (`contract check`, `bundle check`) ends with 1 instead: it was used rightly, and the answer is no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class HafniumError(Exception):
    """Base of every error that a user can act on. `exit_status`: 1 the thing checked is wrong, 2 the input is wrong, 3 the thing
    asked for is done, but not all that goes with it. Notes (`add_note`) are lines that belong to the message."""

    exit_status = 1


class InputError(HafniumError):
    """A file or an argument is missing, unreadable or of the wrong form."""

    exit_status = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (a path such as `features[2].range`), what was expected, what came."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class ContractError(HafniumError):
    """A contract breaks its schema. `problems` holds all of them, in the order of the file."""

    exit_status = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        lines = "\n".join(f"  {p}" for p in self.problems)
        count = len(self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}\n{lines}")


class BundleError(HafniumError):
    """A bundle cannot be trusted: a file is missing, changed or not understood. The message names it."""

    exit_status = 2


class FeatureError(HafniumError):
    """A row of features breaks the contract. `problems` names each field's path."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(p) for p in self.problems))
