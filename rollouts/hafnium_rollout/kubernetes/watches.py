"""Watches: wake-up calls and nothing more. What changed is read anew by the turn; a call that is lost costs at most a look's time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Gone, KubernetesError, NotFound
from hafnium_rollout.kubernetes.kinds import HTTP_ROUTE, INFERENCE_SERVICE, MODEL_APPROVAL, MODEL_EVIDENCE, MODEL_ROLLOUT, Kind
from hafnium_rollout.kubernetes.objects_seen import Meta, meta_of
from hafnium_rollout.kubernetes.snapshot import Key
from hafnium_rollout.state_folder import ROLLOUT_LABEL

WATCHED: tuple[Kind, ...] = (MODEL_ROLLOUT, INFERENCE_SERVICE, HTTP_ROUTE, MODEL_EVIDENCE, MODEL_APPROVAL)
_WATCH_S = 240.0
_PAUSE_S = 5.0
ALL_OF = "*"
"""Instead of a name: every rollout of the namespace."""


def touched(kind: Kind, meta: Meta) -> Key:
    """Which rollout a change is about."""
    if kind is MODEL_ROLLOUT or kind is HTTP_ROUTE:
        return meta.namespace, meta.name
    return meta.namespace, meta.labels.get(ROLLOUT_LABEL, ALL_OF)


class Watches:
    """One thread per kind. `call` is told which rollout something happened to."""

    def __init__(self, client: KubernetesClient, namespace: str, call: Callable[[Key], None], stop: threading.Event) -> None:
        self._client, self._namespace, self._call, self._stop = client, namespace, call, stop
        self._threads = [
            threading.Thread(target=self._run, args=(k,), name=f"watch-{k.plural}", daemon=True) for k in WATCHED]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _run(self, kind: Kind) -> None:
        generations: dict[Key, tuple[int, bool]] = {}
        version = ""
        while not self._stop.is_set():
            try:
                if not version:
                    version = self._client.version_of(kind, self._namespace)
                for event in self._client.watch(kind, self._namespace, version, _WATCH_S):
                    meta = meta_of(event.object)
                    version = meta.resource_version or version
                    if self._stop.is_set():
                        return
                    if event.type != "BOOKMARK" and self._news(kind, meta, event.type, generations):
                        self._call(touched(kind, meta))
            except Gone:
                version = ""
            except NotFound:  # the kind isn't installed (yet)
                self._stop.wait(_PAUSE_S * 6)
            except KubernetesError:
                version = ""
                self._stop.wait(_PAUSE_S)

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
