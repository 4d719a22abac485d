"""What each receiver was sent: written after it was sent, so that a crash repeats and never loses.

It is not in the ModelRollout's status: that is written by the loop before anything is sent, and a receiver that is slow would add a
write to the API server for each event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Protocol

from pydantic import AwareDatetime, Field, ValidationError

from hafnium_contract.model_contract import Strict
from hafnium_contract.whole_files import write_atomically
from hafnium_rollout.errors import StateError

ROLLOUTS_MAX = 5_000
"""Rollouts remembered for a receiver; the longest unheard of goes first."""


class Cursor(Strict):
    """One receiver's memory."""

    since: AwareDatetime
    """When the receiver was set up: events before are history, not news."""
    sent: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Rollout → ids of the events in its history that are done with."""


class Cursors(Protocol):
    """Where memories are kept."""

    def load(self, receiver: str) -> Cursor | None:
        """None: a receiver that was never set up. Raises StateError when there is one that can't be read."""
        ...

    def save(self, receiver: str, cursor: Cursor) -> None:
        """Raises OSError or HafniumError."""
        ...


class FileCursors:
    """One JSON file for each receiver: in the state folder, or on the operator's volume."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, receiver: str) -> Cursor | None:
        path = self._folder / f"{receiver}.json"
        try:
            return Cursor.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as e:
            raise StateError(f"{path}: can't be read, so it isn't known what {receiver} was sent; repair it or remove it: {e}") from e

    def save(self, receiver: str, cursor: Cursor) -> None:
        write_atomically(self._folder / f"{receiver}.json", cursor.model_dump_json())


def with_sent(cursor: Cursor, key: str, event_id: str, present: Mapping[str, object]) -> Cursor:
    """The cursor after an event. Ids that are no longer in the history (`present`) are forgotten: they can't come again."""
    ids = (*(i for i in cursor.sent.get(key, ()) if i in present), event_id)
    sent = {k: v for k, v in cursor.sent.items() if k != key}
    sent[key] = ids
    while len(sent) > ROLLOUTS_MAX:
        sent.pop(next(iter(sent)))
    return cursor.model_copy(update={"sent": sent})


def new_cursor(now: datetime) -> Cursor:
    """Of a receiver that is set up now."""
    return Cursor(since=now)
