"""One turn for one ModelRollout: observe → decide → write the status (intent first) → act → tell. The same `decide` as on one machine.

After a crash between any two writes the next turn, of whichever leader, sees either the old route (the intent is done again) or the
new one. The status is written only if nobody wrote the object since it was read, so two leaders can't both count one look. Where it
doesn't change and something is to be done, the object is read once more: what was decided on an older one is a Conflict and not an action.

Telling comes last (the log, the record, events, receivers, retraining) and whatever becomes of it: a slow receiver or a full disk must
not stand between a verdict and the route.

A finalizer is on the object while a run is under way and no longer: then somebody has to take the candidate's traffic back before
the object goes. A ModelRollout at rest can be deleted while no operator runs; its stable service and route stay as they are.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from hafnium_contract.errors import HafniumError
from hafnium_rollout.actions import Decision, Promote, Rollback, SetShadow, SetWeight
from hafnium_rollout.companions import Companions
from hafnium_rollout.decide import decide
from hafnium_rollout.errors import NotLeading, RolloutFileError
from hafnium_rollout.kubernetes import conditions
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.canary_traffic import percent_of
from hafnium_rollout.kubernetes.capabilities import Finding, findings
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, KubernetesError, NotFound
from hafnium_rollout.kubernetes.events import EventWriter
from hafnium_rollout.kubernetes.kinds import MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.objects_seen import Meta, dig, meta_of, route_seen, status_of
from hafnium_rollout.kubernetes.paired_backend import NotYet, PairedBackend
from hafnium_rollout.kubernetes.prometheus_client import Prometheus, PrometheusError
from hafnium_rollout.kubernetes.prometheus_queries import query_problems
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Key, Snapshot
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.objects import ModelRollout, parse_rollout
from hafnium_rollout.status import RolloutStatus, stored

FINALIZER = "hafnium.dev/traffic"
Log = Callable[[dict[str, Any]], None]
_SOON_S = 1.0
_RETRY_S = 0.3


@dataclass(frozen=True, slots=True)
class Turned:
    """What a turn came to. `requeue_s`: look again this soon; None: at the regular time."""

    rollout: ModelRollout | None
    status: RolloutStatus | None
    requeue_s: float | None = None
    error: str = ""
    external_changes: int = 0
    rollback_s: float | None = None
    """A rollback was seen to be done in this turn: time since it was asked for."""


@dataclass(slots=True)
class _Acted:
    """What became of a decision's actions, for the telling that comes after them."""

    done: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(action, what was done)."""
    waits: tuple[str, str] | None = None
    """The action that has to be asked for again, and what it waits for."""


def under_way(status: RolloutStatus) -> bool:
    """A candidate may have traffic, or is about to."""
    return status.rollback is not None or (bool(status.run_id) and status.phase in ("Pending", "Progressing", "Paused"))


class Reconciler:
    """All rollouts, one at a time each. Safe between threads as long as one rollout is turned by one of them."""

    def __init__(
        self, client: KubernetesClient, paired: PairedBackend, canary: CanaryBackend, settings: Settings, log: Log, instance: str,
        prometheus: Prometheus | None, companions: Companions | None = None,
    ) -> None:
        self._client, self._paired, self._canary, self._settings = client, paired, canary, settings
        self._log, self._prometheus = log, prometheus
        self._companions = companions
        self._events = EventWriter(client, instance, lambda meta, now, why: self._once(
            (meta.namespace, meta.name), "events", now, "warning", "EventNotWritten", why))
        self._good: dict[Key, ModelRollout] = {}
        """Last object that could be understood: one that can't be must not leave a candidate unguarded."""
        self._looked: dict[Key, datetime] = {}
        self._queries: dict[Key, tuple[int, tuple[str, ...]]] = {}
        """Generation and problems of its queries, per object; they are checked once."""
        self._said: dict[tuple[Key, str], str] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        self._events.start()

    def stop(self) -> None:
        """While this process still leads: what it has to say is written."""
        self._events.stop()

    def turn(self, item: Json, snapshot: Snapshot, now: datetime) -> Turned:
        """One turn. Never raises but for NotLeading: an error is told, counted and tried again."""
        meta = meta_of(item)
        key = (meta.namespace, meta.name)
        try:
            turned = self._turn(item, meta, snapshot, now)
        except NotLeading:
            raise
        except Conflict as e:
            self._tell(key, now, "info", "Conflict", f"somebody wrote in between, so it is looked at anew: {e}")
            return Turned(self._good.get(key), None, _RETRY_S)
        except NotYet as e:
            self._once(key, "waits", now, "info", "Waiting", str(e))
            return Turned(self._good.get(key), None, _SOON_S)
        except (HafniumError, OSError) as e:
            self._once(key, "error", now, "error", "TurnFailed", str(e))
            after = e.retry_after_s if isinstance(e, KubernetesError) and e.retry_after_s is not None else _SOON_S
            return Turned(self._good.get(key), _known(item), after, error=type(e).__name__)
        except Exception as e:  # noqa: BLE001 - one rollout's trouble must not stop the guard over the others
            self._once(key, "error", now, "error", "TurnFailed", str(e), trace=traceback.format_exc())
            return Turned(self._good.get(key), _known(item), _SOON_S, error=type(e).__name__)
        self._forget(key, "error")
        return turned

    def forget(self, alive: set[Key]) -> None:
        """Drops what is remembered about objects that are gone."""
        if self._companions is not None:
            self._companions.keep({Subject(*key) for key in alive})
        with self._lock:
            for gone in set(self._good) - alive:
                self._good.pop(gone, None)
                self._looked.pop(gone, None)
            self._said = {k: v for k, v in self._said.items() if k[0] in alive}
            self._queries = {k: v for k, v in self._queries.items() if k in alive}

    def _backend(self, rollout: ModelRollout) -> PairedBackend | CanaryBackend:
        return self._canary if rollout.spec.routing.backend == "CanaryTrafficPercent" else self._paired

    # --- one object -----------------------------------------------------------------------------------------------------------

    def _turn(self, item: Json, meta: Meta, snapshot: Snapshot, now: datetime) -> Turned:
        before = status_of(item)
        rollout = self._parse(item, meta, before, now)
        if meta.deleting:
            backend = dig(item, "spec", "routing", "backend")
            return self._deleted(rollout, meta, before, snapshot, now, canary=backend == "CanaryTrafficPercent")
        if rollout is None:
            return Turned(None, before, error="SpecInvalid")
        found = findings(rollout, meta.namespace, snapshot, self._settings, self._query_problems(rollout, meta, now), before)
        refused = next((f for f in found if f.refuses), None)
        if refused is not None and before.step is None and before.rollback is None and before.phase == "Pending":
            return self._refused(rollout, meta, before, found, refused, now)
        seen = self._backend(rollout).observe(self._patient(rollout), meta, before, snapshot, now, look=self._look_due(meta, before, now))
        decision = decide(self._patient(rollout), before, seen, now)
        status = conditions.with_condition(decision.status, before, conditions.accepted(found, meta.generation, now))
        verified = conditions.verified(status, before, seen, meta.generation, now)
        if verified is not None:
            status = conditions.with_condition(status, before, verified)
        meta = self._write(meta, before, status, acts=bool(decision.actions))
        acted = _Acted()
        try:
            self._act(rollout, meta, decision, snapshot, acted)
        finally:
            self._told(meta, decision, seen.problems, acted, now)
            if self._companions is not None:
                self._companions.decided(self._patient(rollout), before, seen, now, decision)
                self._companions.turned(rollout, status, seen, now)
        waits = bool(acted.waits)
        requeue = _SOON_S if waits else decision.requeue_s
        done = before.rollback is not None and status.rollback is None
        return Turned(
            rollout, status, requeue, external_changes=sum(e.name == "ExternalChange" for e in decision.events),
            rollback_s=(now - before.rollback.requested_at).total_seconds() if done and before.rollback is not None else None)

    def _parse(self, item: Json, meta: Meta, before: RolloutStatus, now: datetime) -> ModelRollout | None:
        key = (meta.namespace, meta.name)
        try:
            rollout = parse_rollout(item, f"ModelRollout {meta.namespace}/{meta.name}")
        except RolloutFileError as e:
            kept = self._good.get(key)
            more = "; going on with the last good one" if kept is not None else ""
            self._once(key, "spec", now, "error", "SpecInvalid", f"{e}{more}")
            if kept is None and not meta.deleting:
                status = conditions.with_condition(before, before, conditions.invalid(str(e), meta.generation, now))
                self._write(meta, before, status)
            return kept
        self._forget(key, "spec")
        with self._lock:
            self._good[key] = rollout
        return rollout

    def _patient(self, rollout: ModelRollout) -> ModelRollout:
        """With Prometheus a look can say nothing about the moment itself: two scrapes must lie between a weight and what counts."""
        strategy = rollout.spec.strategy
        least = self._settings.scrape_interval_s * 2
        if strategy.scrape_lag.total_seconds() >= least:
            return rollout
        changed = strategy.model_copy(update={"scrape_lag": timedelta(seconds=least)})
        return rollout.model_copy(update={"spec": rollout.spec.model_copy(update={"strategy": changed})})

    def _look_due(self, meta: Meta, status: RolloutStatus, now: datetime) -> bool:
        """A look is due now and then while traffic is watched. Wake-ups in between see routes and services, not counters."""
        if status.step is None and status.rollback is None:
            return False
        key = (meta.namespace, meta.name)
        last = self._looked.get(key)
        # A rollback is over when counters say so: for that they are asked each time. A last look that is still to come was seen by a clock
        # that was wrong, and is none.
        if status.rollback is None and last is not None and 0 <= (now - last).total_seconds() < self._settings.look_s * 0.9:
            return False
        with self._lock:
            self._looked[key] = now
        return True

    def _query_problems(self, rollout: ModelRollout, meta: Meta, now: datetime) -> tuple[str, ...]:
        if self._prometheus is None or not any(g.prometheus for g in rollout.spec.gates):
            return ()
        key = (meta.namespace, meta.name)
        known = self._queries.get(key)
        if known is not None and known[0] == meta.generation:
            return known[1]
        try:
            problems = query_problems(self._prometheus, rollout, meta.namespace)
        except PrometheusError as e:
            self._once(key, "queries", now, "warning", "QueriesUnchecked", f"queries can't be checked now: {e}")
            return ()
        with self._lock:
            self._queries[key] = (meta.generation, problems)
        return problems

    def _refused(
        self, rollout: ModelRollout, meta: Meta, before: RolloutStatus, found: tuple[Finding, ...], refused: Finding, now: datetime,
    ) -> Turned:
        """Nothing begins here; the status says what is missing. One that is under way is never refused."""
        status = before.model_copy(update={
            "phase": "Pending", "reason": refused.reason, "message": refused.message[:500], "observed_generation": meta.generation,
            **({"started_at": now} if self._was_late(before, now) else {})})
        status = conditions.with_condition(status, before, conditions.accepted(found, meta.generation, now))
        self._write(meta, before, status, guard=before.run_id != "")
        self._once((meta.namespace, meta.name), "refused", now, "warning", refused.reason, refused.message)
        return Turned(rollout, status)

    @staticmethod
    def _was_late(before: RolloutStatus, now: datetime) -> bool:
        """The candidate's time to get ready must not run out while it isn't allowed to begin; moved on once a minute, not at each turn."""
        return before.started_at is not None and now - before.started_at > timedelta(minutes=1)

    # --- writing --------------------------------------------------------------------------------------------------------------

    def _write(
        self, meta: Meta, before: RolloutStatus, status: RolloutStatus, *, guard: bool | None = None, acts: bool = False,
    ) -> Meta:
        """Finalizer as needed, then the status if it changed. Returns the object's meta after it. Raises Conflict.

        `acts`: something is going to be done. Then a status that stays as it is must still be the one that was read.
        """
        needed = under_way(status) if guard is None else guard
        if needed != (FINALIZER in meta.finalizers) and not meta.deleting and needed:
            meta = self._finalizers(meta, (*meta.finalizers, FINALIZER))
        if status != before:
            written = self._client.apply_status(
                MODEL_ROLLOUT, meta.namespace, meta.name, stored(status), resource_version=meta.resource_version)
            meta = meta_of(written)
        elif acts and meta_of(self._client.get(MODEL_ROLLOUT, meta.namespace, meta.name)).resource_version != meta.resource_version:
            raise Conflict(f"ModelRollout {meta.namespace}/{meta.name} was written since it was read; nothing is done by what it said")
        if not needed and FINALIZER in meta.finalizers and not meta.deleting:
            meta = self._finalizers(meta, tuple(f for f in meta.finalizers if f != FINALIZER))
        return meta

    def _finalizers(self, meta: Meta, wanted: tuple[str, ...]) -> Meta:
        change = {"metadata": {"resourceVersion": meta.resource_version, "finalizers": list(wanted)}}
        return meta_of(self._client.merge(MODEL_ROLLOUT, meta.namespace, meta.name, change))

    def _act(self, rollout: ModelRollout, meta: Meta, decision: Decision, snapshot: Snapshot, acted: _Acted) -> None:
        """Does the actions in order, until one of them has to wait for something."""
        for action in decision.actions:
            try:
                done = self._backend(rollout).apply(rollout, meta, decision.status, action, snapshot)
            except NotYet as e:
                acted.waits = (type(action).__name__, str(e))
                return
            acted.done.append((type(action).__name__, done))
        if not any(isinstance(a, SetShadow | SetWeight | Promote | Rollback) for a in decision.actions):
            said = self._backend(rollout).readdress(rollout, meta.namespace, snapshot)
            if said:
                acted.done.append(("Readdress", said))

    def _deleted(
        self, rollout: ModelRollout | None, meta: Meta, before: RolloutStatus, snapshot: Snapshot, now: datetime, *, canary: bool,
    ) -> Turned:
        """Under way, the candidate's traffic goes back first: nobody watches it any more. What is stable stays and answers."""
        if FINALIZER not in meta.finalizers:
            return Turned(rollout, before)
        key = (meta.namespace, meta.name)
        stable = before.stable.service if before.stable is not None else ""
        if rollout is not None:
            self._backend(rollout).leave(rollout, meta, before, snapshot, now)
        else:
            item = (snapshot.routes or {}).get(key)
            if not canary and (snapshot.routes is None or (item is not None and stable and route_seen(item).candidate is not None)):
                raise NotYet("the deleted ModelRollout can't be understood, and its route still has two arms; set it by hand")
            service = (snapshot.services or {}).get(key)
            if canary and (snapshot.services is None or (service is not None and percent_of(service) not in (None, 100))):
                raise NotYet("the deleted ModelRollout can't be understood, and its InferenceService still has a canaryTrafficPercent; "
                             "set the stable model's storageUri there and take the percent away by hand")
        with contextlib.suppress(NotFound):
            self._finalizers(meta, tuple(f for f in meta.finalizers if f != FINALIZER))
        self._tell(key, now, "warning", "Deleted", f"the ModelRollout was deleted under way; {stable or 'nobody'} answers all requests")
        return Turned(rollout, before)

    # --- telling --------------------------------------------------------------------------------------------------------------

    def _told(self, meta: Meta, decision: Decision, problems: tuple[str, ...], acted: _Acted, now: datetime) -> None:
        key, status = (meta.namespace, meta.name), decision.status
        for event in decision.events:
            self._tell(key, now, "warning" if event.alert else "info", event.name, event.message, reason=event.reason, phase=status.phase,
                       weight=status.step.weight_desired if status.step else None, run=status.run_id, alert=event.alert)
            problem = self._events.tell(meta, event, now)
            if problem:
                self._once(key, "events", now, "warning", "EventNotWritten", problem)
        for action, done in acted.done:
            self._forget(key, "waits")
            self._tell(key, now, "info", "Action", done, action=action)
        if acted.waits:
            self._once(key, "waits", now, "info", "Waiting", acted.waits[1], action=acted.waits[0])
        text = "; ".join(problems)
        if text:
            self._once(key, "problems", now, "warning", "Unreadable", text)
        else:
            self._forget(key, "problems")

    def _tell(self, key: Key, now: datetime, level: str, event: str, message: str, **more: Any) -> None:
        self._log({"time": now, "level": level, "rollout": "/".join(key), "event": event, "message": message, **more})

    def _once(self, key: Key, about: str, now: datetime, level: str, event: str, message: str, **more: Any) -> None:
        """The same complaint is made once, not at every look."""
        with self._lock:
            if self._said.get((key, about)) == message:
                return
            self._said[(key, about)] = message
        self._tell(key, now, level, event, message, **more)

    def _forget(self, key: Key, about: str) -> None:
        with self._lock:
            self._said.pop((key, about), None)


def _known(item: Json) -> RolloutStatus | None:
    """The status as written, for a turn that failed: what is at rest needs nobody's guard. None when it can't be understood."""
    try:
        return status_of(item)
    except HafniumError:
        return None
