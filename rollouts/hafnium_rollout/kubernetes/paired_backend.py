"""Eyes and hands for PairedServices: a snapshot → what was seen, and actions → writes. Holds nothing that a restart would miss.

Every write says which state it is about: the route is applied with the resourceVersion that was seen, a service is created (never
overwritten) and deleted by its uid. So a write that was decided on something older than the cluster's present is a Conflict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from hafnium_contract.errors import HafniumError
from hafnium_rollout.actions import Action, EnsureCandidate, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes import paired_services
from hafnium_rollout.kubernetes.capabilities import ability
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, NotFound
from hafnium_rollout.kubernetes.kinds import (
    HTTP_ROUTE,
    INFERENCE_SERVICE,
    POD,
    Json,
)
from hafnium_rollout.kubernetes.objects_seen import (
    Meta,
    PodSeen,
    components,
    is_ours,
    live_route,
    meta_of,
    route_seen,
    service_seen,
    written_at,
)
from hafnium_rollout.kubernetes.observer import Observer, Traffic
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import FOREIGN, LiveRoute, Observation, RouteSeen, ServiceSeen
from hafnium_rollout.status import RolloutStatus


class NotYet(HafniumError):  # noqa: N818 - not a fault
    """The action waits for something; it is asked for again at the next turn."""


class PairedBackend:
    """`client` is fenced: it writes only while this process leads."""

    def __init__(self, client: KubernetesClient, settings: Settings, observer: Observer) -> None:
        self._client, self._settings, self._observer = client, settings, observer

    # --- seeing ---------------------------------------------------------------------------------------------------------------

    def observe(
        self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime, *, look: bool,
    ) -> Observation:
        """A service per model, and the route between them."""
        problems = [e for k, e in snapshot.errors.items() if k in (INFERENCE_SERVICE.name, HTTP_ROUTE.name, POD.name)]
        template = paired_services.template_pods(rollout, status, snapshot.services_of(meta.namespace))
        services, declared, managed = self._services(rollout, meta.namespace, snapshot, template)
        route, absent, live = self._route(rollout, meta.namespace, snapshot, problems)
        pods: dict[str, tuple[PodSeen, ...]] = {}
        serving: dict[str, tuple[PodSeen, ...]] = {}
        for model in (status.stable, status.candidate):
            if model is None:
                continue
            item = (snapshot.services or {}).get((meta.namespace, model.service))
            entry = components(item)[:1] if item is not None else ()
            of_service = snapshot.pods_of(meta.namespace, model.service)
            pods[model.service] = tuple(p for p in of_service if not entry or p.component in entry)
            serving[model.service] = tuple(p for p in of_service if p.component == "predictor")
        cursor = {paired_services.TEMPLATE_PODS: template or None}
        seen = Traffic(services, declared, managed, route, absent, live, pods, serving, tuple(problems), cursor)
        return self._observer.complete(rollout, meta, status, snapshot, now, seen, look=look)

    def _services(
        self, rollout: ModelRollout, namespace: str, snapshot: Snapshot, template: Mapping[str, Mapping[str, int]],
    ) -> tuple[Mapping[str, ServiceSeen] | None, frozenset[str], frozenset[str]]:
        items = snapshot.services_of(namespace)
        if items is None or snapshot.pods is None:
            return None, frozenset(), frozenset()
        seen = {name: service_seen(item, snapshot.pods_of(namespace, name)) for name, item in items.items()}
        for name in template.keys() & items.keys():
            seen[name] = replace(seen[name], raised=paired_services.raised(items[name], template[name]))
        managed = frozenset(n for n, i in items.items() if is_ours(i, rollout.name) and not meta_of(i).deleting)
        return seen, frozenset(items), managed

    def _route(
        self, rollout: ModelRollout, namespace: str, snapshot: Snapshot, problems: list[str],
    ) -> tuple[RouteSeen | None, bool, LiveRoute | None]:
        """(route, certainly absent, what the gateway does)."""
        if snapshot.routes is None:
            return None, False, None
        item = snapshot.routes.get((namespace, rollout.name))
        if item is None:
            return None, True, LiveRoute({})
        owner = paired_services.owner_of_route(item)
        if owner:
            problems.append(f"HTTPRoute {namespace}/{rollout.name} is made by {owner}")
            return None, False, None
        live, problem = live_route(item, paired_services.parent_of(rollout, namespace, self._settings.default_gateway))
        if problem:
            problems.append(problem)
        return route_seen(item), False, live

    # --- acting ---------------------------------------------------------------------------------------------------------------

    def apply(self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, action: Action, snapshot: Snapshot) -> str:
        """Does one action; says what was done. Raises NotYet, Conflict, another KubernetesError or StateError."""
        match action:
            case EnsureCandidate():
                return self._create(rollout, meta.namespace, action)
            case SetShadow():
                if not self._answers(rollout, meta.namespace, action.candidate, 0, snapshot):
                    self._prepare(meta.namespace, action.stable, action.candidate, 100, snapshot)
                return self._write_route(rollout, meta.namespace, snapshot, action.stable, action.candidate, 0, shadow=True)
            case SetWeight():
                if not self._answers(rollout, meta.namespace, action.candidate, action.weight, snapshot):
                    self._prepare(meta.namespace, action.stable, action.candidate, action.weight, snapshot)
                return self._write_route(rollout, meta.namespace, snapshot, action.stable, action.candidate, action.weight, shadow=False)
            case Promote():
                return self._write_route(rollout, meta.namespace, snapshot, action.service, None, 0, shadow=False)
            case Rollback():
                return self._write_route(rollout, meta.namespace, snapshot, action.stable, None, 0, shadow=False)
            case RetireService():
                return self._retire(rollout, meta.namespace, action.service, snapshot)
            case LowerPods():
                return self._lower(rollout, meta.namespace, action, snapshot)

    def _answers(self, rollout: ModelRollout, namespace: str, candidate: str, weight: int, snapshot: Snapshot) -> bool:
        """Whether the route gives the candidate more live requests than `weight` % by now. Less of them needs no further pods."""
        if snapshot.routes is None:
            return False
        item = snapshot.routes.get((namespace, rollout.name))
        if item is None:
            return True  # there was one when the climb began: without it nobody is answered, and stable must not wait for pods of another
        there = route_seen(item)
        if there.stable == FOREIGN:
            return True  # nobody knows what it does: what was known before is better at once
        share = 100 if there.stable == candidate else there.weight if there.candidate == candidate else 0
        return share > weight

    def _create(self, rollout: ModelRollout, namespace: str, action: EnsureCandidate) -> str:
        item = paired_services.candidate_service(rollout, namespace, action.model, action.template)
        name = item["metadata"]["name"]
        try:
            self._client.create(INFERENCE_SERVICE, item)
        except Conflict as e:
            found = self._client.find(INFERENCE_SERVICE, namespace, name)
            if found is not None and not is_ours(found, rollout.name):
                raise StateError(f"InferenceService {namespace}/{name} exists and is not this rollout's: rename or delete it") from e
            if found is None or meta_of(found).deleting:
                raise NotYet(f"InferenceService {namespace}/{name} is being deleted; waiting until it is gone") from e
            return f"{name} is there"
        return f"{name} is created"

    def _prepare(self, namespace: str, stable: str, candidate: str, percent: int, snapshot: Snapshot) -> None:
        """Enough ready pods for the share that comes, before it comes. Raises NotYet while there aren't."""
        item = (snapshot.services or {}).get((namespace, candidate))
        if item is None:
            raise NotYet(f"InferenceService {namespace}/{candidate} isn't there")
        change, waiting = paired_services.capacity_lacking(
            item, snapshot.pods_of(namespace, candidate), snapshot.pods_of(namespace, stable), percent)
        if change:
            meta = meta_of(item)
            self._client.merge(INFERENCE_SERVICE, namespace, candidate, {
                "metadata": {"resourceVersion": meta.resource_version}, "spec": change})
        if waiting:
            raise NotYet(f"{candidate} gets ready for {percent} % of the traffic: {waiting}")

    def _lower(self, rollout: ModelRollout, namespace: str, action: LowerPods, snapshot: Snapshot) -> str:
        """As `_prepare` raised it: of the service as it was seen, by its resourceVersion."""
        item = (snapshot.services or {}).get((namespace, action.service))
        if item is None or not is_ours(item, rollout.name):
            return f"{action.service} is left as it is"
        least = paired_services.raised(item, action.least)
        if least:
            self._client.merge(INFERENCE_SERVICE, namespace, action.service, {
                "metadata": {"resourceVersion": meta_of(item).resource_version},
                "spec": {component: {"minReplicas": n} for component, n in least.items()}})
        said = ", ".join(f"{n} {component} pod{'' if n == 1 else 's'}" for component, n in least.items())
        return f"{action.service} has at least {said or 'what its template says'} again"

    def _write_route(
        self, rollout: ModelRollout, namespace: str, snapshot: Snapshot, stable: str, candidate: str | None, weight: int, *, shadow: bool,
    ) -> str:
        if snapshot.routes is None:
            raise NotYet(f"HTTPRoutes can't be read: {snapshot.errors.get(HTTP_ROUTE.name, 'unknown')}")
        found = snapshot.routes.get((namespace, rollout.name))
        if found is not None and paired_services.owner_of_route(found):
            raise StateError(f"HTTPRoute {namespace}/{rollout.name} is made by {paired_services.owner_of_route(found)}; it is left alone")
        gateway = paired_services.parent_of(rollout, namespace, self._settings.default_gateway)
        can = ability(snapshot, gateway, self._settings.mirroring, found)

        def backend(service: str) -> str:
            return paired_services.backend_name(service, (snapshot.services or {}).get((namespace, service)), found, rollout)

        if candidate is not None and weight == 0 and not shadow:
            candidate = None
        arms = [(backend(stable), 100 - weight)]
        if candidate is not None and not shadow:
            arms.append((backend(candidate), weight))
        item = paired_services.http_route(
            rollout, namespace, gateway, self._settings.ingress_domain, arms, backend(candidate) if candidate and shadow else None,
            mark_arms=can is not None and can.marks_arms,
        )
        said = " + ".join(f"{w} % {n}" for n, w in arms) + (f", copies to {backend(candidate)}" if candidate and shadow else "")
        if found is None:
            self._client.create(HTTP_ROUTE, item)
        else:
            meta: Json = item["metadata"]
            self._client.apply(HTTP_ROUTE, {**item, "metadata": {**meta, "resourceVersion": meta_of(found).resource_version}})
        return f"route {namespace}/{rollout.name}: {said}"

    def readdress(self, rollout: ModelRollout, namespace: str, snapshot: Snapshot) -> str:
        """Gives the route the Gateway and names of the spec, with its weights as they are; says what was done, or nothing.

        For turns that write no route anyway: a way back is never held up by this. Of a form that isn't ours it is put right first.
        """
        item = (snapshot.routes or {}).get((namespace, rollout.name))
        if item is None or not is_ours(item, rollout.name) or paired_services.owner_of_route(item) or route_seen(item).stable == FOREIGN:
            return ""
        gateway = paired_services.parent_of(rollout, namespace, self._settings.default_gateway)
        wanted = paired_services.readdressed(item, rollout, gateway, self._settings.ingress_domain)
        if wanted is None:
            return ""
        self._client.apply(HTTP_ROUTE, wanted)
        names = ", ".join(wanted["spec"]["hostnames"])
        return f"route {namespace}/{rollout.name}: at gateway {'/'.join(gateway)} for {names}, weights as before"

    def _retire(self, rollout: ModelRollout, namespace: str, service: str, snapshot: Snapshot) -> str:
        item = (snapshot.services or {}).get((namespace, service))
        if item is None or not is_ours(item, rollout.name):
            return f"{service} is gone"
        try:
            self._client.delete(INFERENCE_SERVICE, namespace, service, uid=meta_of(item).uid)
        except NotFound:
            return f"{service} is gone"
        return f"{service} is deleted"

    # --- the end of a ModelRollout --------------------------------------------------------------------------------------------

    def leave(self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime) -> None:
        """The ModelRollout is being deleted under way: the stable service alone answers, and the candidate goes. Raises NotYet until then.

        With no stable service yet there is no route either, and only the candidate is removed.
        """
        stable = status.stable.service if status.stable is not None else ""
        item = (snapshot.routes or {}).get((meta.namespace, rollout.name))
        if snapshot.routes is None or snapshot.services is None:
            raise NotYet("routes and services can't be read")
        if stable and item is not None:
            seen = route_seen(item)
            if (seen.stable, seen.candidate) != (stable, None):
                self._write_route(rollout, meta.namespace, snapshot, stable, None, 0, shadow=False)
                raise NotYet(f"{stable} is made to answer all requests")
            if said := self.readdress(rollout, meta.namespace, snapshot):
                raise NotYet(said)
            gateway = paired_services.parent_of(rollout, meta.namespace, self._settings.default_gateway)
            live, problem = live_route(item, gateway)
            there = snapshot.gateways is None or gateway in snapshot.gateways
            if there and (live is None or live.weights.get(stable) != 100):
                raise NotYet(problem or "the gateway does not show the stable service alone yet")
            written = written_at(item)
            if written is not None and (now - written).total_seconds() < self._settings.drain_s:
                raise NotYet(f"the candidate's service is kept for {self._settings.drain_s:g} s: the gateway may still ask it")
        for name, service in (snapshot.services_of(meta.namespace) or {}).items():
            if is_ours(service, rollout.name) and name != stable:
                self._retire(rollout, meta.namespace, name, snapshot)
