"""Alerts to one Alertmanager, as its API wants it: what is so is repeated, what is over is said for a while, nothing is remembered.

It is level-triggered: each round sends everything that is so. A round that fails is followed by a whole one, so nothing waits in a
queue, and a restart needs no memory: an alert that was over in between ends by itself, since nobody repeats it.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from hafnium_rollout.notifications.courier_thread import CourierThread, Log
from hafnium_rollout.notifications.delivery import Answer, post
from hafnium_rollout.notifications.notices import Alert, Subject, alerts
from hafnium_rollout.notifications.settings import Alertmanager
from hafnium_rollout.notifications.webhook import read_token
from hafnium_rollout.status import RolloutStatus

PATH = "/api/v2/alerts"
RUNBOOK = "docs/runbooks.md#alerts-that-the-operator-sends-itself"
ENDS_AFTER = 4
"""Rounds without a repetition after which an alert ends by itself. Prometheus uses the same number."""
RESOLVED_FOR = timedelta(minutes=15)
"""So long the end of an alert is repeated, as Prometheus does: a replica of Alertmanager may have missed it."""
BATCH_MAX = 100
"""Alerts in one request."""
_Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Over:
    """An alert that ended."""

    alert: Alert
    at: datetime


def wire(alert: Alert, labels: dict[str, str], ends_at: datetime) -> dict[str, Any]:
    """An alert as POST /api/v2/alerts takes it."""
    return {
        "labels": {**labels, **alert.labels}, "startsAt": alert.since.isoformat(), "endsAt": ends_at.isoformat(),
        "annotations": {"summary": f"{alert.name.removeprefix('Hafnium')}: {alert.subject.key}", "description": alert.message[:1000],
                        "runbook": RUNBOOK},
    }


def after_round(
    active: Sequence[Alert], before: dict[_Key, Alert], over: dict[_Key, Over], now: datetime,
) -> tuple[dict[_Key, Alert], dict[_Key, Over]]:
    """Alerts that are so, and those that are over and still told. Pure."""
    present = {_key(a): a for a in active}
    ended = {k: Over(a, now) for k, a in before.items() if k not in present}
    kept = {k: o for k, o in over.items() if k not in present and now - o.at <= RESOLVED_FOR}
    return present, {**kept, **ended}


def _key(alert: Alert) -> _Key:
    """Its labels alone, as for Alertmanager: told beside its end, what came back a minute later would be over there too."""
    return tuple(sorted(alert.labels.items()))


class AlertmanagerCourier:
    """Tells one Alertmanager. `offer` only keeps the status; a thread does the rest."""

    def __init__(
        self, settings: Alertmanager, log: Log, *, now: Callable[[], datetime] = lambda: datetime.now(UTC),
        draw: Callable[[], float] = random.random, leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._settings = settings
        self._log = log
        self._leads = leads
        self._now = now
        self._draw = draw
        self._lock = threading.Lock()
        self._statuses: dict[Subject, RolloutStatus] = {}
        self._heads: dict[Subject, tuple[str, str, int]] = {}
        self._active: dict[_Key, Alert] = {}
        self._over: dict[_Key, Over] = {}
        self._thread = CourierThread("alertmanager", settings, self._tell, log, now)

    def start(self) -> None:
        self._thread.start()

    def lead(self) -> None:
        """What a former term left behind is no longer known to be so. Nor is it over: the leader in between may know."""
        with self._lock:
            self._statuses, self._heads, self._active, self._over = {}, {}, {}, {}

    def rest(self) -> None:
        """Repeats nothing until it leads again. What still is so, the next leader says; what nobody repeats ends by itself."""
        self.lead()

    def stop(self) -> None:
        """Ends after the request under way."""
        self._thread.stop()

    def offer(self, subject: Subject, status: RolloutStatus) -> None:
        """The status as it was written. A change of phase or a new alert is told at once."""
        head = (status.phase, status.reason, sum(p.alert for p in status.history))
        with self._lock:
            self._statuses[subject] = status
            changed = self._heads.get(subject) != head
            self._heads[subject] = head
        if changed:
            self._thread.wake.set()

    def gone(self, subject: Subject) -> None:
        """The rollout was deleted: its alerts are over."""
        with self._lock:
            self._statuses.pop(subject, None)
            self._heads.pop(subject, None)
        self._thread.wake.set()

    def _tell(self) -> None:
        failures = 0
        while not self._thread.stopping.is_set():
            self._thread.wake.clear()
            answer = self._round()
            if answer is not None and answer.result != "Delivered":
                failures += 1
                if failures == 1:
                    self._say("warning", "AlertsNotDelivered", f"{answer.message}; trying again")
                self._thread.rest(failures, self._draw(), answer.retry_after_s)
                continue
            if failures:
                self._say("info", "AlertsDelivered", f"again, after {failures} attempts")
            failures = 0
            self._thread.wake.wait(self._settings.resend.total_seconds())

    def _round(self) -> Answer | None:
        """Tells everything once. None: there is nothing to tell."""
        now = self._now()
        if not self._leads():
            return None
        with self._lock:
            found = [a for subject, status in self._statuses.items() for a in alerts(subject, status, now)]
            self._active, self._over = after_round(found, self._active, self._over, now)
            active, over = list(self._active.values()), list(self._over.values())
        ends_at = now + ENDS_AFTER * self._settings.resend
        told = [wire(a, self._settings.labels, ends_at) for a in active]
        told += [wire(o.alert, self._settings.labels, o.at) for o in over]
        for i in range(0, len(told), BATCH_MAX):
            if not self._leads():
                return None
            answer = self._send(told[i:i + BATCH_MAX])
            if answer.result != "Delivered":
                return answer
        return Answer("Delivered", "") if told else None

    def _send(self, batch: list[dict[str, Any]]) -> Answer:
        headers: dict[str, str] = {}
        if self._settings.token_file is not None:
            try:
                headers["Authorization"] = f"Bearer {read_token(self._settings.token_file)}"
            except OSError as e:
                return Answer("Again", f"{self._settings.token_file}: {e.strerror or e}")
        return post(self._settings.url.rstrip("/") + PATH, json.dumps(batch).encode(), headers,
                    timeout_s=self._settings.attempt_timeout.total_seconds(), ca_file=self._settings.ca_file)

    def _say(self, level: str, event: str, message: str) -> None:
        self._log({"time": self._now(), "level": level, "event": event, "receiver": self._settings.name, "message": message})
