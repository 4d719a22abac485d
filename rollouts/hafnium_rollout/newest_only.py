"""A thread for work that is asked for again at each turn: of each subject only the newest is done, so nothing piles up behind a slow one.
"""

from __future__ import annotations

import contextvars
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Subject = TypeVar("Subject")
LAST_S = 5.0
"""So long a clean end waits for the work under way. What waits behind it is asked for again after the next start."""


class NewestOnly(Generic[Subject]):
    """`put` never waits. `failed` hears what the work raised; it is called by the thread."""

    def __init__(self, name: str, failed: Callable[[Subject, Exception], None]) -> None:
        self._failed = failed
        self._due: OrderedDict[Subject, tuple[contextvars.Context, Callable[[], None]]] = OrderedDict()
        self._lock = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def put(self, subject: Subject, do: Callable[[], None]) -> None:
        """The work takes the place of what waits for the same subject, and its turn. It runs in the context of whoever puts it: the fence
        knows the term by that."""
        with self._lock:
            self._due[subject] = (contextvars.copy_context(), do)
            self._lock.notify_all()

    def forget(self) -> None:
        """What waits is not done any more."""
        with self._lock:
            self._due.clear()

    def stop(self, wait_s: float = LAST_S) -> None:
        if not self.started:
            return
        with self._lock:
            self._stopping = True
            self._due.clear()
            self._lock.notify_all()
        self._thread.join(wait_s)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._due and not self._stopping:
                    self._lock.wait()
                if self._stopping:
                    return
                subject, (context, do) = self._due.popitem(last=False)
            try:
                context.run(do)
            except Exception as e:  # noqa: BLE001 - a thread that ends unseen would do nothing more for anybody
                self._failed(subject, e)
