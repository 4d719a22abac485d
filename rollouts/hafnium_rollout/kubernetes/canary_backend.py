"""Eyes and hands for CanaryTrafficPercent (Knative mode); the rules of that field are in canary_traffic.py.

Every write of the InferenceService is an update with the resourceVersion that was seen. The stable template is kept in the status'
cursor, which is written before the candidate's template replaces it: a rollback has to put it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import cast

from hafnium_rollout.actions import Action, EnsureCandidate, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes import canary_traffic
from hafnium_rollout.kubernetes.canary_traffic import arm_of, percent_of, template_digest, with_percent
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.kinds import INFERENCE_SERVICE, POD, REVISION, Json
from hafnium_rollout.kubernetes.objects_seen import SERVICE_LABEL, Meta, components, dig, meta_of
from hafnium_rollout.kubernetes.observer import Observer, Traffic
from hafnium_rollout.kubernetes.paired_backend import NotYet
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.status import ModelSeen, RolloutStatus

TEMPLATE = "stableTemplate"
"""Key of the cursor: {"arm", "spec"}."""
_SETTLING = "settling"


class CanaryBackend:
    """`client` is fenced: it writes only while this process leads."""

    def __init__(self, client: KubernetesClient, observer: Observer) -> None:
        self._client, self._observer = client, observer

    # --- seeing ---------------------------------------------------------------------------------------------------------------

    def observe(
        self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime, *, look: bool,
    ) -> Observation:
        """Revisions as arms."""
        seen = self._traffic(rollout, meta.namespace, status, snapshot)
        return self._observer.complete(rollout, meta, status, snapshot, now, seen, look=look)

    def _traffic(self, rollout: ModelRollout, namespace: str, status: RolloutStatus, snapshot: Snapshot) -> Traffic:
        problems = tuple(e for k, e in snapshot.errors.items() if k in (INFERENCE_SERVICE.name, REVISION.name, POD.name))
        if snapshot.services is None or snapshot.revisions is None or snapshot.pods is None:
            return Traffic(problems=problems)
        item = snapshot.services.get((namespace, rollout.name))
        if item is None:
            return Traffic(services={}, absent=True, problems=problems)
        revisions = _revisions(snapshot, namespace, rollout.name)
        digests = canary_traffic.revision_digests(revisions)
        models = [m for m in (status.stable, status.candidate) if m is not None]
        pods = snapshot.pods_of(namespace, rollout.name)
        services = canary_traffic.services_of(rollout, item, revisions, pods, models)
        stable = status.stable.service if status.stable is not None else ""
        arm = arm_of(rollout, template_digest(item))
        entry = components(item)[:1]
        arms = {p.name: arm_of(rollout, digests[p.revision]) for p in pods if p.revision in digests}
        of_arm = {m.service: [p for p in pods if arms.get(p.name) == m.service] for m in models}
        by_arm = {arm: tuple(p for p in found if p.component in entry) for arm, found in of_arm.items()}
        serving = {arm: tuple(p for p in found if p.component == "predictor") for arm, found in of_arm.items()}
        if not stable and status.candidate is not None and arm == status.candidate.service:
            # Our own first one: nobody has decided yet that it is stable.
            return Traffic(
                services=services, managed=frozenset({arm}), absent=True, pods=by_arm, serving=serving, problems=problems)
        live, problem = canary_traffic.live_of(rollout, item, digests)
        cursor: dict[str, object] = {}
        if stable and arm == stable and status.run_id and status.phase == "Pending":
            cursor[TEMPLATE] = {"arm": arm, "spec": with_percent(cast("Json", item["spec"]), None)}
        managed = frozenset({arm}) if stable and arm != stable else frozenset[str]()
        if arm == stable and percent_of(item) not in (None, 100):
            managed = frozenset({f"{rollout.name}-{_SETTLING}"})
        route = canary_traffic.route_of(rollout, item, stable, status.route.candidate if status.route is not None else None)
        return Traffic(
            services=services, declared=managed, managed=managed, route=route, live=live, pods=by_arm, serving=serving,
            problems=(*problems, problem) if problem else problems, cursor=cursor)

    # --- acting ---------------------------------------------------------------------------------------------------------------

    def apply(self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, action: Action, snapshot: Snapshot) -> str:
        """Does one action; says what was done. Raises NotYet, Conflict, another KubernetesError or StateError."""
        item = (snapshot.services or {}).get((meta.namespace, rollout.name))
        if isinstance(action, EnsureCandidate):
            return self._ensure(rollout, meta.namespace, action, item)
        if snapshot.revisions is None or item is None:
            raise NotYet(f"InferenceService {meta.namespace}/{rollout.name} or its revisions can't be read")
        digests = canary_traffic.revision_digests(_revisions(snapshot, meta.namespace, rollout.name))
        match action:
            case SetShadow():
                raise StateError("CanaryTrafficPercent can't copy requests: remove the step with shadow: true")
            case SetWeight():
                return self._weight(rollout, status, item, digests, action)
            case Promote():
                if arm_of(rollout, template_digest(item)) != action.service:
                    return self._back(rollout, status, item, digests, action.service)
                if percent_of(item) is None:
                    return f"{action.service} has all requests"
                return self._percent(rollout, item, None)
            case Rollback():
                return self._back(rollout, status, item, digests, action.stable)
            case RetireService():
                return self._settle(rollout, status, item, digests)
            case LowerPods():
                return "no pods were raised: each change of minReplicas would be a new revision"

    def _ensure(self, rollout: ModelRollout, namespace: str, action: EnsureCandidate, item: Json | None) -> str:
        spec = canary_traffic.model_spec(rollout, action.model, action.template)
        if item is None:
            self._client.create(INFERENCE_SERVICE, canary_traffic.new_service(rollout, namespace, spec))
            return f"InferenceService {rollout.name} is created with {action.model.service}"
        if template_digest(item) == action.model.digest:
            return f"{action.model.service} is there"
        self._client.update(INFERENCE_SERVICE, canary_traffic.replaced(item, with_percent(spec, 0)))
        return f"{action.model.service} is brought in at 0 %"

    def _weight(
        self, rollout: ModelRollout, status: RolloutStatus, item: Json, digests: dict[str, str], action: SetWeight,
    ) -> str:
        candidate = status.candidate
        if candidate is None or candidate.service != action.candidate:
            raise StateError(f"{action.candidate} is not the candidate")
        if template_digest(item) != candidate.digest:
            spec = canary_traffic.model_spec(rollout, candidate, rollout.spec.service)
            self._client.update(INFERENCE_SERVICE, canary_traffic.replaced(item, with_percent(spec, 0)))
            raise NotYet(f"somebody changed the template; {candidate.service} is brought in again at 0 %")
        if not canary_traffic.latest_is_ready(item, digests, candidate.digest):
            raise NotYet(f"the newest revision is not a ready one of {candidate.service}: a percent would go to another")
        return self._percent(rollout, item, action.weight)

    def _back(self, rollout: ModelRollout, status: RolloutStatus, item: Json, digests: dict[str, str], stable: str) -> str:
        """All requests to the stable model: at once by 0, and its template as soon as that can't bring another one up."""
        if canary_traffic.rolled_out(rollout, item, digests) == frozenset({stable}):
            spec = self._stable_spec(rollout, status, stable)
            if spec is not None:
                self._client.update(INFERENCE_SERVICE, canary_traffic.replaced(item, with_percent(spec, 0)))
                return f"the template of {stable} is put back, the newest revision at 0 %"
        if percent_of(item) == 0:
            raise NotYet(f"waiting until Knative names {stable} for all requests")
        return self._percent(rollout, item, 0)

    def _settle(self, rollout: ModelRollout, status: RolloutStatus, item: Json, digests: dict[str, str]) -> str:
        """After a rollback: the stable template back, and when its revision is ready, the percent away."""
        if status.stable is None:
            return "nothing to settle"
        stable, arm = status.stable, arm_of(rollout, template_digest(item))
        if arm != stable.service:
            return self._back(rollout, status, item, digests, stable.service)
        if percent_of(item) is None:
            return f"{stable.service} is as it was"
        if not canary_traffic.latest_is_ready(item, digests, template_digest(item)):
            raise NotYet(f"the percent stays 0 until the new revision of {stable.service} is ready")
        return self._percent(rollout, item, None)

    def _percent(self, rollout: ModelRollout, item: Json, percent: int | None) -> str:
        meta = meta_of(item)
        change = {c: {canary_traffic.PERCENT: percent} for c in components(item)}
        self._client.merge(INFERENCE_SERVICE, meta.namespace, rollout.name, {
            "metadata": {"resourceVersion": meta.resource_version}, "spec": change})
        return f"{canary_traffic.PERCENT} of {', '.join(change)} is {'removed' if percent is None else percent}"

    @staticmethod
    def _stable_spec(rollout: ModelRollout, status: RolloutStatus, stable: str) -> Json | None:
        """The template to go back to: kept from before the candidate came, or the one in the ModelRollout if it is that model's."""
        kept = status.cursor.get(TEMPLATE)
        if dig(kept, "arm") == stable:
            return cast("Json | None", dig(kept, "spec"))
        model = rollout.spec.model
        if rollout.service_name(model.digest) == stable:
            seen = ModelSeen(service=stable, storage_uri=model.storage_uri, digest=model.digest, version=model.version)
            return canary_traffic.model_spec(rollout, seen, rollout.spec.service)
        return None

    def readdress(self, rollout: ModelRollout, namespace: str, snapshot: Snapshot) -> str:
        """Nothing: Knative makes the route."""
        del rollout, namespace, snapshot
        return ""

    def leave(self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime) -> None:
        """The ModelRollout is being deleted under way: back to the stable template, with no percent left. Raises NotYet until then."""
        del now  # nothing is deleted here that a gateway might still ask
        if snapshot.services is None or snapshot.revisions is None:
            raise NotYet("InferenceServices and revisions can't be read")
        item = snapshot.services.get((meta.namespace, rollout.name))
        if item is None or status.stable is None:
            return
        arm = arm_of(rollout, template_digest(item))
        if arm == status.stable.service and percent_of(item) in (None, 100):
            return
        digests = canary_traffic.revision_digests(_revisions(snapshot, meta.namespace, rollout.name))
        raise NotYet(self._settle(rollout, status, item, digests))


def _revisions(snapshot: Snapshot, namespace: str, service: str) -> Sequence[Json]:
    return [r for r in (snapshot.revisions or {}).get(namespace, ()) if meta_of(r).labels.get(SERVICE_LABEL) == service]
