"""An end to waiting: futures whose time is over fail with TimeoutError. One timer for all of them; `asyncio.timeout` makes one for each,
which costs a row as much as reading it does.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

_LOOK_S = 0.005
"""How late one may learn that its time is over."""
_SHORT_S = 0.02
"""Who gives less has a timer of its own: being late by a quarter of the time would take it from what comes after."""


class Expiry:
    """Used from the event loop only. Whoever adds a future takes it out again."""

    def __init__(self) -> None:
        self._until: dict[asyncio.Future[Any], float] = {}
        self._looking = False

    def add(self, future: asyncio.Future[Any], until: float) -> None:
        """`until`: on the monotonic clock."""
        self._until[future] = until
        left = until - time.monotonic()
        if left < _SHORT_S:
            asyncio.get_running_loop().call_later(max(left, 0.0), self._end, future)
        elif not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def remove(self, future: asyncio.Future[Any]) -> None:
        """It is not waited for any more."""
        del self._until[future]

    def _end(self, future: asyncio.Future[Any]) -> None:
        if future in self._until and not future.done():
            future.set_exception(TimeoutError())

    def _look(self) -> None:
        if not self._until:
            self._looking = False
            return
        asyncio.get_running_loop().call_later(_LOOK_S, self._look)
        now = time.monotonic()
        for future, until in self._until.items():
            if until <= now:
                self._end(future)
