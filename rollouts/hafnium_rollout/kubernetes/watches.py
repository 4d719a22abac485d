"""Watches: wake-up calls and nothing more. What changed is read anew by the turn; a call that is lost costs at most a look's time.

A watch ends with its process and by nothing else: a thread that died would cost a look's time at every change from then on, in silence.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Gone, NotFound
from hafnium_rollout.kubernetes.kinds import HTTP_ROUTE, INFERENCE_SERVICE, MODEL_APPROVAL, MODEL_EVIDENCE, MODEL_ROLLOUT, Kind
from hafnium_rollout.kubernetes.objects_seen import Meta, meta_of
from hafnium_rollout.kubernetes.snapshot import Key
from hafnium_rollout.state_folder import ROLLOUT_LABEL

WATCHED: tuple[Kind, ...] = (MODEL_ROLLOUT, INFERENCE_SERVICE, HTTP_ROUTE, MODEL_EVIDENCE, MODEL_APPROVAL)
_WATCH_S = 240.0
_ABSENT_PAUSE_S = 30.0
_PAUSE_FIRST_S = 1.0
_PAUSE_MAX_S = 30.0
"""After an error, doubled from the first to the last, each drawn between half and all of it: replicas must not come back in step."""
_SAID_AT = 2
"""Failures in a row. A single one is a connection that somebody on the way cuts now and then."""
Say = Callable[[str, str, str], None]
"""Level, event, message."""
ALL_OF = "*"
"""Instead of a name: every rollout of the namespace."""


def touched(kind: Kind, meta: Meta) -> Key:
    """Which rollout a change is about."""
    if kind is MODEL_ROLLOUT or kind is HTTP_ROUTE:
        return meta.namespace, meta.name
    return meta.namespace, meta.labels.get(ROLLOUT_LABEL, ALL_OF)


class Watches:
    """One thread per kind. `call` is told which rollout something happened to."""

    def __init__(
        self, client: KubernetesClient, namespace: str, call: Callable[[Key], None], stop: threading.Event, say: Say,
    ) -> None:
        self._client, self._namespace, self._call, self._stop, self._say = client, namespace, call, stop, say
        self._threads = [
            threading.Thread(target=self._run, args=(k,), name=f"watch-{k.plural}", daemon=True) for k in WATCHED]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _run(self, kind: Kind) -> None:
        generations: dict[Key, tuple[int, bool]] = {}
        version, failures = "", 0
        while not self._stop.is_set():
            try:
                if not version:
                    version = self._client.version_of(kind, self._namespace)
                for event in self._client.watch(kind, self._namespace, version, _WATCH_S):
                    failures = self._answered(kind, failures)
                    meta = meta_of(event.object)
                    version = meta.resource_version or version
                    if self._stop.is_set():
                        return
                    if event.type != "BOOKMARK" and self._news(kind, meta, event.type, generations):
                        self._call(touched(kind, meta))
                failures = self._answered(kind, failures)
            except Gone:
                version = ""
                self._stop.wait(_PAUSE_FIRST_S)
            except NotFound:  # the kind isn't installed (yet)
                self._stop.wait(_ABSENT_PAUSE_S)
            except Exception as e:  # noqa: BLE001 - whatever it is, the next try may be better, and nobody starts this thread again
                version, failures = "", failures + 1
                if failures == _SAID_AT:
                    self._say("warning", "WatchFailed", f"changes of {kind.plural} wait for the next look until it is back: {e}")
                longest = min(_PAUSE_FIRST_S * 2.0 ** min(failures - 1, 10), _PAUSE_MAX_S)
                self._stop.wait(longest * random.uniform(0.5, 1.0))  # noqa: S311

    def _answered(self, kind: Kind, failures: int) -> int:
        """The watch works: failures in a row begin anew."""
        if failures >= _SAID_AT:
            self._say("info", "WatchBack", f"{kind.plural} are watched again")
        return 0

    @staticmethod
    def _news(kind: Kind, meta: Meta, what: str, generations: dict[Key, tuple[int, bool]]) -> bool:
        """A change of a ModelRollout's status is our own: only its spec, its deletion and its end are news. Nor is the end of evidence."""
        if kind is MODEL_EVIDENCE and what == "DELETED":
            return False  # by ourselves, mostly (evidence_keeper.py), and never urgent
        if kind is not MODEL_ROLLOUT:
            return True
        key, now = (meta.namespace, meta.name), (meta.generation, meta.deleting)
        if what == "DELETED":
            generations.pop(key, None)
            return True
        before, generations[key] = generations.get(key), now
        return before != now
