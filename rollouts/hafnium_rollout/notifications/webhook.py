"""Events to one webhook: in order, at least once, from a bounded queue, by a thread of its own.

The status' history is the outbox: it was written before the loop offers it. The queue here is only a window on it, so a full queue
or a dead process loses nothing that history still holds (its last 500 events).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hafnium_contract.errors import HafniumError
from hafnium_rollout.notifications.courier_thread import CourierThread, Log
from hafnium_rollout.notifications.cursors import Cursor, Cursors, new_cursor, with_sent
from hafnium_rollout.notifications.delivery import Answer, post
from hafnium_rollout.notifications.notices import Notice, Subject, notices
from hafnium_rollout.notifications.settings import Webhook
from hafnium_rollout.status import HistoryPoint, RolloutStatus

SECRET_BYTES_MAX = 4096
_RESTING_S = 0.5
"""A process that was told nothing yet looks so often whether it leads again."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    notice: Notice
    since_s: float
    """Monotonic: its deadline counts from here."""


def signature(secret: bytes, timestamp: int, body: bytes) -> str:
    """`t=<unix seconds>,v1=<hex of HMAC-SHA256 over "<t>.<body>">`. With the time in it an old request can't be sent again later."""
    mac = hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={mac}"


class WebhookCourier:
    """Delivers to one receiver. `offer` never blocks on the receiver; `start` and `stop` frame its thread."""

    def __init__(
        self, settings: Webhook, cursors: Cursors, log: Log, *, now: Callable[[], datetime] = lambda: datetime.now(UTC),
        draw: Callable[[], float] = random.random, leads: Callable[[], bool] = lambda: True,
    ) -> None:
        self._settings = settings
        self._cursors = cursors
        self._log = log
        self._leads = leads
        self._now = now
        self._draw = draw
        self._lock = threading.Lock()
        self._queue: OrderedDict[str, _Waiting] = OrderedDict()
        self._events: dict[Subject, tuple[HistoryPoint, ...]] = {}
        self._present: dict[str, dict[str, None]] = {}
        """Rollout → ids in its history, as last offered; of those that are gone as long as something waits."""
        self._gone: set[str] = set()
        """Rollouts that are gone and of which something waits."""
        cursor = cursors.load(settings.name)
        if cursor is None:
            cursor = new_cursor(now())
            cursors.save(settings.name, cursor)
        self._cursor: Cursor = cursor
        self._new_term = threading.Event()
        """What was sent must be read anew before anything else is."""
        self._thread = CourierThread("webhook", settings, self._deliver, log, now)

    def start(self) -> None:
        self._thread.start()

    def lead(self) -> None:
        """A new term: the leader before may have sent since this process last looked. The courier's thread finds out, before it sends
        anything: the file is on a volume, and one that hangs must hold up no rollout."""
        with self._lock:
            self._events = {}
        self._new_term.set()
        self._thread.wake.set()

    def rest(self) -> None:
        """Nothing is sent until it leads again; then `lead` finds out what of the queue another leader has sent."""

    def stop(self) -> None:
        """Ends after the attempt under way. What is not sent is sent after the next start."""
        self._thread.stop()

    @property
    def waiting(self) -> int:
        """Events that are neither sent nor given up."""
        with self._lock:
            return len(self._queue)

    def offer(self, subject: Subject, status: RolloutStatus) -> None:
        """The status as it was written: what is new in its history is queued, as far as there is room."""
        events = tuple(p for p in status.history if p.event != "Look")
        if self._events.get(subject) == events:
            return
        found = notices(subject, status, self._settings.events)
        with self._lock:
            self._present[subject.key] = dict.fromkeys(n.id for n in found)
            self._gone.discard(subject.key)
            done = set(self._cursor.sent.get(subject.key, ()))
            for notice in found:
                if notice.id in done or notice.id in self._queue or notice.point.time < self._cursor.since:
                    continue
                if len(self._queue) >= self._settings.queue_max:
                    break  # not remembered as seen: it is offered again at the next turn
                self._queue[notice.id] = _Waiting(notice, time.monotonic())
            else:
                self._events[subject] = events
        self._thread.wake.set()

    def gone(self, subject: Subject) -> None:
        """The rollout was deleted. What is queued is still sent."""
        with self._lock:
            self._events.pop(subject, None)
            self._gone.add(subject.key)
            self._forget_gone()

    def _forget_gone(self) -> None:
        """Of a rollout that is gone, once nothing of it waits. The lock is held."""
        if not self._gone:
            return
        waiting = {w.notice.subject.key for w in self._queue.values()}
        for key in self._gone - waiting:
            self._present.pop(key, None)
        self._gone &= waiting

    def _read_anew(self) -> None:
        """What can't be read now is sent again at worst."""
        try:
            found = self._cursors.load(self._settings.name)
        except HafniumError as e:
            self._log({"time": self._now(), "level": "error", "event": "CursorNotRead", "receiver": self._settings.name, "message": str(e)})
            return
        with self._lock:
            self._cursor = found or self._cursor
            done = {i for ids in self._cursor.sent.values() for i in ids}
            self._queue = OrderedDict((k, w) for k, w in self._queue.items() if k not in done)
            self._forget_gone()

    def _deliver(self) -> None:
        attempt = 0
        while not self._thread.stopping.is_set():
            if self._new_term.is_set():
                self._new_term.clear()
                self._read_anew()
            with self._lock:
                waiting = next(iter(self._queue.values()), None)
            if waiting is None or not self._leads():
                self._thread.wake.wait(_RESTING_S if waiting is not None else None)
                self._thread.wake.clear()
                attempt = 0
                continue
            attempt += 1
            answer = self._send(waiting.notice)
            if answer.result == "Delivered":
                self._done(waiting.notice)
                if attempt > 1:
                    self._say("info", "NotificationDelivered", waiting.notice, f"after {attempt} attempts")
                attempt = 0
            elif answer.result == "Refused" or time.monotonic() - waiting.since_s > self._settings.deadline.total_seconds():
                self._say("error", "NotificationLost", waiting.notice, f"given up after {attempt} attempts: {answer.message}")
                self._done(waiting.notice)
                attempt = 0
            else:
                if attempt == 1:
                    self._say("warning", "NotificationLate", waiting.notice, f"{answer.message}; trying again until "
                              f"{self._settings.deadline.total_seconds():g} s have passed")
                self._thread.rest(attempt, self._draw(), answer.retry_after_s)

    def _send(self, notice: Notice) -> Answer:
        body = json.dumps(notice.body(), ensure_ascii=False, separators=(",", ":")).encode()
        headers = {"Idempotency-Key": notice.id, "X-Hafnium-Event": notice.point.event}
        if self._settings.secret_file is not None:
            try:
                secret = read_secret(self._settings.secret_file)
            except OSError as e:
                return Answer("Again", f"{self._settings.secret_file}: {e.strerror or e}; nothing is sent unsigned")
            headers["X-Hafnium-Signature"] = signature(secret, int(self._now().timestamp()), body)
        return post(self._settings.url, body, headers, timeout_s=self._settings.attempt_timeout.total_seconds(),
                    ca_file=self._settings.ca_file)

    def _done(self, notice: Notice) -> None:
        key = notice.subject.key
        with self._lock:
            self._queue.pop(notice.id, None)
            self._cursor = with_sent(self._cursor, key, notice.id, self._present.get(key, {}))
            self._forget_gone()
            cursor = self._cursor
        if not self._leads():
            return  # the file is another's by now; what was sent here last comes once more
        try:
            self._cursors.save(self._settings.name, cursor)
        except (OSError, HafniumError) as e:
            self._say("error", "CursorNotWritten", notice, f"it is sent again after a restart: {e}")

    def _say(self, level: str, event: str, notice: Notice, message: str) -> None:
        self._log({"time": self._now(), "level": level, "event": event, "rollout": notice.subject.name, "receiver": self._settings.name,
                   "about": notice.point.event, "id": notice.id, "message": message})


def read_secret(path: Path) -> bytes:
    """A secret's bytes without the newline that editors add. Raises OSError, also when it is empty."""
    with path.open("rb") as f:
        found = f.read(SECRET_BYTES_MAX).strip()
    if not found:
        raise OSError("the file is empty")
    return found


def read_token(path: Path) -> str:
    """A bearer token. Raises OSError, which never shows any of it, also when it can't be sent in a header."""
    found = read_secret(path)
    if not all(0x21 <= byte <= 0x7E for byte in found):
        raise OSError("no bearer token: expected one line of ASCII without blanks; write the token alone into the file")
    return found.decode("ascii")
