"""The operator on a cluster: leads or stands by, turns over all ModelRollouts, and serves health and metrics.

Level-triggered: every `look_s` all objects are listed anew and every rollout gets its turn. Between that, rollouts that a watch has
named or that asked to be looked at soon get one of their own, over their namespace alone.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from hafnium_rollout.controller import print_json
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.client import KubernetesClient, connect
from hafnium_rollout.kubernetes.companions import companions_of
from hafnium_rollout.kubernetes.errors import KubernetesError, NotFound
from hafnium_rollout.kubernetes.evidence_keeper import EvidenceKeeper
from hafnium_rollout.kubernetes.health import HealthServer
from hafnium_rollout.kubernetes.kinds import MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.leader import Leader, LeaseTimes, in_term
from hafnium_rollout.kubernetes.metrics import Metrics
from hafnium_rollout.kubernetes.objects_seen import dig, meta_of
from hafnium_rollout.kubernetes.observer import Observer
from hafnium_rollout.kubernetes.paired_backend import PairedBackend
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.prometheus_queries import PrometheusLooks
from hafnium_rollout.kubernetes.reconciler import Log, Reconciler
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Key, Snapshot, take
from hafnium_rollout.kubernetes.watches import ALL_OF, Watches

_HUNG_LOOKS = 8
_HUNG_S = 180.0
"""So long (or so many looks, if that is longer) without any rollout's turn at an end, and the process says that it isn't alive. One turn
asks Prometheus for `_PROMETHEUS_S_MAX` at most and the API server a few times for 20 s: slow servers never come near to this."""
_AGAIN_S = 1.0
"""Until what the API server didn't answer is asked again."""
_PROMETHEUS_S_MAX = 30.0
"""Of one turn over all rollouts; less with a smaller look_s. The rollouts that were left out come first in the next."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Operator:
    """One process. `run` until `stop` is set."""

    def __init__(
        self, settings: Settings, client: KubernetesClient, *, log: Log = print_json, now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._client, self._log, self._now, self._clock = settings, client, log, now, clock
        identity = settings.identity or f"{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"
        self.leader = Leader(
            client, settings.lease_namespace, settings.lease_name, identity,
            LeaseTimes(settings.lease_duration_s, settings.lease_renew_deadline_s, settings.lease_retry_s))
        self.metrics = Metrics(now, lambda: {(s.namespace, s.name): n for s, n in self._companions.record_lost().items()})
        self._prometheus: Prometheus | None = None
        if settings.prometheus_url:
            self._prometheus = Prometheus(settings.prometheus_url, settings.prometheus_timeout_s, settings.threads * 2, clock=clock)
        fenced = client.fenced(self.leader.check)
        looks = PrometheusLooks(self._prometheus, scrape_interval_s=settings.scrape_interval_s, clock_skew_s_max=settings.clock_skew_s_max)
        observer = Observer(looks, ScoreLog(settings.inference_log), ServedModels(self._prometheus, settings.scrape_interval_s))
        self._companions = companions_of(settings, fenced, log, self.leader)
        self._reconciler = Reconciler(
            fenced, PairedBackend(fenced, settings, observer), CanaryBackend(fenced, observer), settings, log, identity, self._prometheus,
            self._companions)
        self._evidence = EvidenceKeeper(fenced, settings, log, self.metrics, now)
        self._wake = threading.Event()
        self._new_term = threading.Event()
        self._lock = threading.Lock()
        self._dirty: set[Key] = set()
        self._soon: dict[Key, float] = {}
        self._moved_at = clock()
        """When something came to an end last: a turn of any rollout, or a wait."""
        self._problem = "no turn yet"
        self._snapshot: Snapshot | None = None
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="rollout")

    # --- running --------------------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Leads when it may, until `stop` is set."""
        settings = self._settings
        health = HealthServer(settings.http_host, settings.http_port, self.live, self.ready, self.metrics.exposition)
        ended = threading.Event()
        election = threading.Thread(target=self.leader.run, args=(ended, self._leads), name="election", daemon=True)
        self._say("info", "Started", f"{self.leader.identity}: health and metrics at port {health.port}", port=health.port,
                  identity=self.leader.identity)
        if settings.watch:
            Watches(self._client, settings.namespace, self.call, stop, self._say).start()
        election.start()
        self._companions.start()
        self._reconciler.start()
        self._evidence.start()
        try:
            full_at = 0.0
            while not stop.is_set():
                if not self.leader.leading:
                    full_at = 0.0
                    self._moved_at = self._clock()  # nothing to do is not hanging
                    stop.wait(min(0.2, settings.turn_min_s))
                    continue
                if self._new_term.is_set():
                    # Not on the election's thread: between two turns, so that no turn is of two terms
                    self._new_term.clear()
                    self._companions.lead()
                    self._evidence.lead()
                if time.monotonic() >= full_at:
                    full_at = time.monotonic() + (settings.look_s if self.full_turn() else _AGAIN_S)
                else:
                    self.small_turn(self._due())
                self._wait(stop, full_at)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._evidence.stop()
            self._reconciler.stop()
            self._companions.stop()
            ended.set()  # the lease is given up after the last write, so the next leader needn't wait for it
            election.join()
            health.close()
            self._say("info", "Stopped", "asked to end")

    def _wait(self, stop: threading.Event, full_at: float) -> None:
        """Until the next turn: the regular one, one that was asked for, or a watch's call."""
        began = time.monotonic()
        while not stop.is_set() and self.leader.leading:
            now = time.monotonic()
            with self._lock:
                until = min([full_at, *self._soon.values()])
                called = bool(self._dirty)
            if now >= until or (called and now - began >= self._settings.turn_min_s):
                return
            self._wake.wait(min(0.1 if called else 0.5, max(0.01, until - now)))
            self._wake.clear()

    def call(self, key: Key) -> None:
        """A watch's wake-up call."""
        with self._lock:
            self._dirty.add(key)
        self._wake.set()

    def _due(self) -> set[Key]:
        now = time.monotonic()
        with self._lock:
            due = {k for k, at in self._soon.items() if at <= now} | self._dirty
            self._dirty = set()
            for key in due:
                self._soon.pop(key, None)
        return due

    # --- turns ----------------------------------------------------------------------------------------------------------------

    def full_turn(self) -> bool:
        """Lists everything and turns over all rollouts. False: they couldn't be listed, and a rollback must not wait long for that."""
        term = self.leader.term  # before anything is read: what another leader does after that ends this turn
        with self._lock:
            self._dirty, self._soon = set(), {}
        try:
            items = self._client.list(MODEL_ROLLOUT, self._settings.namespace).items
        except NotFound:
            self._failed("KindMissing", "the API server doesn't know ModelRollout: install Hafnium's CRDs (kustomize/crds)")
            return True
        except KubernetesError as e:
            self._failed(type(e).__name__, str(e))
            return False
        retention = self._evidence.asked(items)
        if len(items) > self._settings.rollouts_max:
            self._failed("TooMany", f"{len(items)} ModelRollouts, at most {self._settings.rollouts_max} are guarded (--rollouts_max)")
            items = tuple(sorted(items, key=lambda i: (meta_of(i).namespace, meta_of(i).name)))[:self._settings.rollouts_max]
        snapshot = take(
            self._client, self._settings.namespace, knative=_knative(items), evidence_cache=self._evidence.cache, retention=retention,
        ) if items else Snapshot()
        self._snapshot = snapshot
        alive = {(m.namespace, m.name) for i in items if (m := meta_of(i))}
        self._reconciler.forget(alive)
        self.metrics.keep(alive)
        self._turn(items, snapshot, term)
        if items:
            with in_term(term):
                self._evidence.tidy(retention)  # last: nobody waits for it
        else:
            self.metrics.evidence({}, {})
        if len(items) <= self._settings.rollouts_max:
            self._problem = ""
            self.metrics.listed()
        return True

    def small_turn(self, keys: set[Key]) -> None:
        """Turns over some rollouts, each with what its namespace holds now."""
        term = self.leader.term
        for namespace in sorted({k[0] for k in keys}):
            names = {k[1] for k in keys if k[0] == namespace}
            try:
                items = self._client.list(MODEL_ROLLOUT, namespace).items if ALL_OF in names or len(names) > 3 else tuple(
                    i for n in sorted(names) if (i := self._client.find(MODEL_ROLLOUT, namespace, n)) is not None)
            except KubernetesError as e:
                self._failed(type(e).__name__, str(e))
                with self._lock:
                    self._soon |= {k: time.monotonic() + _AGAIN_S for k in keys if k[0] == namespace}
                continue
            chosen = [i for i in items if ALL_OF in names or meta_of(i).name in names]
            if chosen:
                self._turn(chosen, take(
                    self._client, namespace, self._snapshot, knative=_knative(chosen), evidence_cache=self._evidence.cache,
                    retention=self._evidence.also_asked(namespace, chosen)), term)

    def _turn(self, items: Iterable[Json], snapshot: Snapshot, term: str) -> None:
        self._moved_at = self._clock()
        if self._prometheus is not None:
            least = self._settings.prometheus_timeout_s + 1.0
            self._prometheus.begin_turn(max(least, min(self._settings.look_s, _PROMETHEUS_S_MAX)))
        lost: NotLeading | None = None
        for done in [self._pool.submit(self._one, item, snapshot, term) for item in in_order(items)]:
            try:
                done.result()  # of each, also after the lease is lost: the next turn must not begin beside one of this
            except NotLeading as e:
                lost = e
        if lost is not None:
            self._say("warning", "LeaseLost", str(lost))
        self._moved_at = self._clock()

    def _one(self, item: Json, snapshot: Snapshot, term: str) -> None:
        meta = meta_of(item)
        key = (meta.namespace, meta.name)
        try:
            with in_term(term):
                turned = self._reconciler.turn(item, snapshot, self._now())
        finally:
            self._moved_at = self._clock()
        self.metrics.turned(key, turned.rollout, turned.status, turned.error, turned.external_changes, turned.rollback_s)
        if turned.requeue_s is not None:
            with self._lock:
                self._soon[key] = time.monotonic() + turned.requeue_s

    # --- saying ---------------------------------------------------------------------------------------------------------------

    def _leads(self, leads: bool) -> None:
        self.metrics.leads(leads)
        if leads:
            self._new_term.set()
            self._say("info", "Leading", f"looking every {self._settings.look_s:g} s", identity=self.leader.identity)
        else:
            self._companions.rest()
            self._say("warning", "NotLeading", self.leader.problem or f"{self.leader.holder} holds the lease")

    def _failed(self, kind: str, message: str) -> None:
        self.metrics.failed(kind)
        if self._problem != message:
            self._say("error", kind, message)
        self._problem = message
        self._moved_at = self._clock()

    def _say(self, level: str, event: str, message: str, **more: Any) -> None:
        self._log({"time": self._now(), "level": level, "event": event, "message": message, **more})

    def live(self) -> str:
        """Why this process should be started anew: it is stuck. Empty while anything moves, however slowly servers answer it."""
        idle_s = self._clock() - self._moved_at
        limit_s = max(_HUNG_S, self._settings.look_s * _HUNG_LOOKS)
        return f"no turn of any rollout was finished for {idle_s:.0f} s (at most {limit_s:.0f})" if idle_s > limit_s else ""

    def ready(self) -> str:
        """Why this process can't do its work; empty when it can. A standby that sees the lease is ready."""
        if self.leader.leading:
            return self._problem
        return self.leader.problem or ("" if self.leader.holder else "the lease was not seen yet")


def in_order(items: Iterable[Json]) -> list[Json]:
    """Rollbacks first, then those whose counters were read longest ago: a turn's time for Prometheus may not be enough for all."""
    def key(item: Json) -> tuple[bool, float]:
        at = dig(item, "status", "cursor", "at")
        return not dig(item, "status", "rollback"), float(at) if isinstance(at, int | float) else 0.0
    return sorted(items, key=key)


def _knative(items: Iterable[Json]) -> bool:
    return any(dig(i, "spec", "routing", "backend") == "CanaryTrafficPercent" for i in items)


def run(settings: Settings, stop: threading.Event, *, log: Log = print_json) -> None:
    """The operator with credentials from its surroundings. Raises InputError without any."""
    client = connect(kubeconfig=settings.kubeconfig, connections_max=settings.threads * 2 + 8)
    Operator(settings, client, log=log).run(stop)
