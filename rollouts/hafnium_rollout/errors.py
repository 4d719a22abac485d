"""Errors of the rollout operator.

HafniumError (contract)
├── RolloutFileError   a ModelRollout file is not as it should be: carries every problem with its line
├── SchemaError        a type of ours has no structural schema: a mistake in this code, found when CRDs are generated
├── StateError         the state folder holds something that can't be used, or another controller holds it
│   └── OnlyAhead      an arm writes its inference log by a clock that is ahead: the rest was read, and has a cursor
├── RecordError        the record of a rollout can't be read, or was written by another Hafnium
├── NotLeading         another process guards the rollouts by now: whoever meets this stops, and changes nothing more
└── UnknownRollout     a command names a rollout that isn't there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hafnium_contract.errors import HafniumError, Problem


class RolloutFileError(HafniumError):
    """A ModelRollout breaks its schema. `problems` holds all of them, in the order of the file."""

    exit_status = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "\n".join(f"  {p}" for p in self.problems)
        super().__init__(f"{source}: {count} problem{'s' if count != 1 else ''}\n{lines}")


class SchemaError(HafniumError):
    """A type can't be written as a CustomResourceDefinition, or a rule names what isn't there."""


class StateError(HafniumError):
    """The state folder can't be used as it is. The message names the file and what to do."""


class OnlyAhead(StateError):  # noqa: N818 - the name says what is so
    """All that an arm wrote of late is of a time that hasn't come. `cursor`: after what was read all the same."""

    def __init__(self, message: str, cursor: Mapping[str, Any]) -> None:
        self.cursor = dict(cursor)
        super().__init__(message)


class RecordError(HafniumError):
    """A record is missing, damaged or of another schema. The message names the file and the line."""

    exit_status = 2


class NotLeading(HafniumError):  # noqa: N818 - the name says what is so
    """This process may not act any more. Never caught to go on: it isn't a failure of what was tried."""


class UnknownRollout(HafniumError):  # noqa: N818 - the name says what is wrong, as a user would
    """No rollout of this name in the state folder."""

    exit_status = 2
