"""Kubernetes events of a rollout: what happened, for `kubectl describe` and for people who are called.

The status is the truth and holds the history; an event that can't be written is no reason to stop. An event's name follows from
what it tells, so a turn that is repeated after a crash doesn't tell it twice.

They are written by a thread of its own, from a bounded queue: an API server that is slow about events must not keep the next
rollback waiting.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from hafnium_rollout.actions import Event
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, KubernetesError
from hafnium_rollout.kubernetes.kinds import EVENT, MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.objects_seen import Meta

NOTE_CHARACTERS_MAX = 1_000
"""The API server takes 1,024 bytes of a message."""
COMPONENT = "hafnium-rollout"
WAITING_MAX = 1_000
"""Events that wait to be written: two for each of 500 rollouts, after an API server that was away for a while. The rest is only in the
history of its ModelRollout."""
DEADLINE_S = 5.0
"""Of one event with its retries. Later ones wait for it."""
LAST_S = 5.0
"""So long a clean end waits for what is queued."""


def kubernetes_event(meta: Meta, event: Event, now: datetime, instance: str) -> Json:
    """The object for one event. Pure."""
    stamp = now.astimezone(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    key = f"{meta.uid}/{event.name}/{event.reason}/{event.message}/{stamp}"
    message = event.message.encode()[:NOTE_CHARACTERS_MAX].decode("utf-8", "ignore")
    return {
        "metadata": {"name": f"{meta.name[:200]}.{hashlib.sha256(key.encode()).hexdigest()[:16]}", "namespace": meta.namespace},
        "involvedObject": {"apiVersion": MODEL_ROLLOUT.api_version, "kind": MODEL_ROLLOUT.name, "namespace": meta.namespace,
                           "name": meta.name, "uid": meta.uid, "resourceVersion": meta.resource_version},
        "type": "Warning" if event.alert else "Normal", "reason": event.name, "message": message or event.name,
        "source": {"component": COMPONENT}, "reportingComponent": COMPONENT, "reportingInstance": instance[:128], "count": 1,
        "firstTimestamp": stamp, "lastTimestamp": stamp,
    }


def record(client: KubernetesClient, meta: Meta, event: Event, now: datetime, instance: str) -> str:
    """Writes one event. Returns why it couldn't be written, empty when it is there."""
    try:
        client.create(EVENT, kubernetes_event(meta, event, now, instance))
    except Conflict:
        return ""  # told before
    except KubernetesError as e:
        return str(e)
    return ""


@dataclass(frozen=True, slots=True)
class _Waiting:
    meta: Meta
    event: Event
    now: datetime


class EventWriter:
    """`tell` never waits and never raises. `problem` hears why an event wasn't written; it is called by the writing thread."""

    def __init__(
        self, client: KubernetesClient, instance: str, problem: Callable[[Meta, datetime, str], None], *, waiting_max: int = WAITING_MAX,
    ) -> None:
        self._client, self._instance, self._problem = client.hurried(DEADLINE_S), instance, problem
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(waiting_max)
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, meta: Meta, event: Event, now: datetime) -> str:
        """Queues one event. Returns why it will never be written, empty when it waits for its turn."""
        try:
            self._queue.put_nowait(_Waiting(meta, event, now))
        except queue.Full:
            return f"{self._queue.maxsize} events wait to be written already; {event.name} is in the status' history alone"
        return ""

    def stop(self, wait_s: float = LAST_S) -> None:
        """Writes what is queued, for at most `wait_s`."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put(None, timeout=wait_s)
        except queue.Full:
            return  # the thread is a daemon: it ends with the process
        self._thread.join(wait_s)

    def _run(self) -> None:
        while (waiting := self._queue.get()) is not None:
            why = record(self._client, waiting.meta, waiting.event, waiting.now, self._instance)
            if why:
                self._problem(waiting.meta, waiting.now, why)
