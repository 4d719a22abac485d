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
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.client import KubernetesClient, connect
from hafnium_rollout.kubernetes.companions import companions_of
from hafnium_rollout.kubernetes.errors import KubernetesError, LeaseLost, NotFound
from hafnium_rollout.kubernetes.health import HealthServer
from hafnium_rollout.kubernetes.kinds import MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.leader import Leader, LeaseTimes
from hafnium_rollout.kubernetes.metrics import Metrics
from hafnium_rollout.kubernetes.objects_seen import dig, meta_of
from hafnium_rollout.kubernetes.observer import Observer
from hafnium_rollout.kubernetes.paired_backend import PairedBackend
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.prometheus_queries import PrometheusLooks
from hafnium_rollout.kubernetes.reconciler import Log, Reconciler
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Key, Snapshot, take
from hafnium_rollout.kubernetes.watches import ALL_OF, Watches

_HUNG_LOOKS = 8
"""So many looks without a finished turn, and the process says that it isn't alive."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Operator:
    """One process. `run` until `stop` is set."""

    def __init__(
        self, settings: Settings, client: KubernetesClient, *, log: Log = print_json, now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._settings, self._client, self._log, self._now = settings, client, log, now
        identity = settings.identity or f"{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"
        self.leader = Leader(
            client, settings.lease_namespace, settings.lease_name, identity,
            LeaseTimes(settings.lease_duration_s, settings.lease_renew_deadline_s, settings.lease_retry_s))
        self.metrics = Metrics(now)
        prometheus: Prometheus | None = None
        if settings.prometheus_url:
            prometheus = Prometheus(settings.prometheus_url, settings.prometheus_timeout_s, settings.threads * 2)
        fenced = client.fenced(self.leader.check)
        looks = PrometheusLooks(prometheus, scrape_interval_s=settings.scrape_interval_s, clock_skew_s_max=settings.clock_skew_s_max)
        observer = Observer(looks, ScoreLog(settings.inference_log))
        self._companions = companions_of(settings, fenced, log)
        self._reconciler = Reconciler(
            fenced, PairedBackend(fenced, settings, observer), CanaryBackend(fenced, observer), settings, log, identity, prometheus,
            self._companions)
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._dirty: set[Key] = set()
        self._soon: dict[Key, float] = {}
        self._turned_at = time.monotonic()
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
            Watches(self._client, settings.namespace, self.call, stop).start()
        election.start()
        self._companions.start()
        try:
            full_at = 0.0
            while not stop.is_set():
                if not self.leader.leading:
                    full_at = 0.0
                    self._turned_at = time.monotonic()  # nothing to do is not hanging
                    stop.wait(min(0.2, settings.turn_min_s))
                    continue
                if time.monotonic() >= full_at:
                    self.full_turn()
                    full_at = time.monotonic() + settings.look_s
                else:
                    self.small_turn(self._due())
                self._wait(stop, full_at)
        finally:
            ended.set()  # the lease is given up after the last write, so the next leader needn't wait for it
            election.join()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._companions.stop()
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

    def full_turn(self) -> None:
        """Lists everything and turns over all rollouts."""
        with self._lock:
            self._dirty, self._soon = set(), {}
        try:
            items = self._client.list(MODEL_ROLLOUT, self._settings.namespace).items
        except NotFound:
            self._failed("KindMissing", "the API server doesn't know ModelRollout: install Hafnium's CRDs (kustomize/crds)")
            return
        except KubernetesError as e:
            self._failed(type(e).__name__, str(e))
            return
        if len(items) > self._settings.rollouts_max:
            self._failed("TooMany", f"{len(items)} ModelRollouts, at most {self._settings.rollouts_max} are guarded (--rollouts_max)")
            items = tuple(sorted(items, key=lambda i: (meta_of(i).namespace, meta_of(i).name)))[:self._settings.rollouts_max]
        snapshot = take(self._client, self._settings.namespace, knative=_knative(items)) if items else Snapshot()
        self._snapshot = snapshot
        alive = {(m.namespace, m.name) for i in items if (m := meta_of(i))}
        self._reconciler.forget(alive)
        self.metrics.keep(alive)
        self._turn(items, snapshot)
        if len(items) <= self._settings.rollouts_max:
            self._problem = ""

    def small_turn(self, keys: set[Key]) -> None:
        """Turns over some rollouts, each with what its namespace holds now."""
        for namespace in sorted({k[0] for k in keys}):
            names = {k[1] for k in keys if k[0] == namespace}
            try:
                items = self._client.list(MODEL_ROLLOUT, namespace).items if ALL_OF in names or len(names) > 3 else tuple(
                    i for n in sorted(names) if (i := self._client.find(MODEL_ROLLOUT, namespace, n)) is not None)
            except KubernetesError as e:
                self._failed(type(e).__name__, str(e))
                return
            chosen = [i for i in items if ALL_OF in names or meta_of(i).name in names]
            if chosen:
                self._turn(chosen, take(self._client, namespace, self._snapshot, knative=_knative(chosen)))

    def _turn(self, items: Iterable[Json], snapshot: Snapshot) -> None:
        try:
            for done in [self._pool.submit(self._one, item, snapshot) for item in items]:
                done.result()
        except LeaseLost as e:
            self._say("warning", "LeaseLost", str(e))
        self._turned_at = time.monotonic()

    def _one(self, item: Json, snapshot: Snapshot) -> None:
        meta = meta_of(item)
        key = (meta.namespace, meta.name)
        turned = self._reconciler.turn(item, snapshot, self._now())
        self.metrics.turned(key, turned.rollout, turned.status, turned.error, turned.external_changes, turned.rollback_s)
        if turned.requeue_s is not None:
            with self._lock:
                self._soon[key] = time.monotonic() + turned.requeue_s

    # --- saying ---------------------------------------------------------------------------------------------------------------

    def _leads(self, leads: bool) -> None:
        self.metrics.leads(leads)
        if leads:
            self._companions.lead()
            self._say("info", "Leading", f"looking every {self._settings.look_s:g} s", identity=self.leader.identity)
        else:
            self._say("warning", "NotLeading", self.leader.problem or f"{self.leader.holder} holds the lease")

    def _failed(self, kind: str, message: str) -> None:
        self.metrics.failed(kind)
        if self._problem != message:
            self._say("error", kind, message)
        self._problem = message
        self._turned_at = time.monotonic()

    def _say(self, level: str, event: str, message: str, **more: Any) -> None:
        self._log({"time": self._now(), "level": level, "event": event, "message": message, **more})

    def live(self) -> str:
        """Why this process should be started anew; empty while it turns."""
        idle_s = time.monotonic() - self._turned_at
        limit_s = max(60.0, self._settings.look_s * _HUNG_LOOKS)
        return f"no turn was finished for {idle_s:.0f} s (at most {limit_s:.0f})" if idle_s > limit_s else ""

    def ready(self) -> str:
        """Why this process can't do its work; empty when it can. A standby that sees the lease is ready."""
        if self.leader.leading:
            return self._problem
        return self.leader.problem or ("" if self.leader.holder else "the lease was not seen yet")


def _knative(items: Iterable[Json]) -> bool:
    return any(dig(i, "spec", "routing", "backend") == "CanaryTrafficPercent" for i in items)


def run(settings: Settings, stop: threading.Event, *, log: Log = print_json) -> None:
    """The operator with credentials from its surroundings. Raises InputError without any."""
    client = connect(kubeconfig=settings.kubeconfig, connections_max=settings.threads * 2 + 8)
    Operator(settings, client, log=log).run(stop)
