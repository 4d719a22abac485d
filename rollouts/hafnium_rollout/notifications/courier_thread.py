"""The thread of a courier: works until it is told to stop, and says what it failed over."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import Any

from hafnium_rollout.notifications.delivery import wait_s
from hafnium_rollout.notifications.settings import Receiver

Log = Callable[[dict[str, Any]], None]


class CourierThread:
    """`work` returns when `stopping` is set, and waits on `wake` for something to do.

    A courier that dies unseen would be a receiver that hears nothing more: whatever `work` raises is logged, and it begins anew.
    """

    def __init__(self, kind: str, settings: Receiver, work: Callable[[], None], log: Log, now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._work = work
        self._log = log
        self._now = now
        self.stopping = threading.Event()
        self.wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{kind}-{settings.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the attempt under way."""
        self.stopping.set()
        self.wake.set()
        self._thread.join(self._settings.attempt_timeout.total_seconds() + 1.0)

    def rest(self, attempt: int, drawn: float, retry_after_s: float | None) -> None:
        """Waits after failed attempt number `attempt`, as `wait_s` says; ends early when it is told to stop."""
        s = self._settings
        self.stopping.wait(wait_s(attempt, s.backoff_first.total_seconds(), s.backoff_max.total_seconds(), drawn, retry_after_s))

    def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                self._work()
            except Exception as e:  # noqa: BLE001 - see the class
                self._log({"time": self._now(), "level": "error", "event": "CourierFailed", "receiver": self._settings.name,
                           "message": str(e), "trace": traceback.format_exc()})
                self.stopping.wait(self._settings.backoff_max.total_seconds())
