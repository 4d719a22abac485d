"""The objects of the backend PairedServices: an InferenceService per model digest, and the HTTPRoute between them. Pure.

The route is named like the rollout. KServe makes HTTPRoutes of its own, named like each InferenceService, so a rollout can't share
its name with an InferenceService; `owner_of_route` finds that out before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hafnium_contract.wire import ARM_HEADER
from hafnium_rollout.kubernetes.kinds import Json
from hafnium_rollout.kubernetes.objects_seen import (
    COMPONENTS,
    DIGEST_ANNOTATION,
    PodSeen,
    components,
    dig,
    rows,
    service_of_backend,
)
from hafnium_rollout.local_backend import inference_service
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.state_folder import MANAGED_BY_LABEL, MANAGER, ROLLOUT_LABEL
from hafnium_rollout.status import ModelSeen

PORT = 80
"""Of the Services that KServe makes."""
MODE_ANNOTATION = "serving.kserve.io/deploymentMode"


def candidate_service(rollout: ModelRollout, namespace: str, model: ModelSeen, template: Mapping[str, Any]) -> Json:
    """The candidate's InferenceService, in Standard mode: in Knative mode Services have other names."""
    item = inference_service(rollout, model, template)
    meta = item["metadata"]
    meta["namespace"] = namespace
    meta["annotations"] = {**meta.get("annotations", {}), DIGEST_ANNOTATION: model.digest, MODE_ANNOTATION: "Standard"}
    return {"metadata": meta, "spec": item["spec"]}


def backend_name(service: str, item: Json | None, route: Json | None, rollout: ModelRollout) -> str:
    """The Service that takes the requests of an InferenceService: its transformer's, else its predictor's.

    The InferenceService itself says which it is; is it gone, then the route that names it; else the rollout's template.
    """
    if item is not None:
        found = components(item)
        if found:
            return f"{service}-{found[0]}"
    for ref in rows(route, "spec", "rules", 0, "backendRefs") if route is not None else []:
        if service_of_backend(str(ref.get("name"))) == service:
            return str(ref.get("name"))
    entry = next((c for c in COMPONENTS if isinstance(rollout.spec.service.get(c), dict)), COMPONENTS[-1])
    return f"{service}-{entry}"


def parent_of(rollout: ModelRollout, namespace: str, default: tuple[str, str]) -> tuple[str, str]:
    """(namespace, name) of the Gateway."""
    ref = rollout.spec.routing.gateway_ref
    return (ref.namespace or namespace, ref.name) if ref is not None else default


def http_route(
    rollout: ModelRollout, namespace: str, gateway: tuple[str, str], domain: str, arms: Sequence[tuple[str, int]], mirror: str | None,
    *, mark_arms: bool,
) -> Json:
    """The route. `arms`: the stable Service and, while there is one, the candidate's, with percents; `mirror`: who gets copies.

    `mark_arms`: the gateway can set a header per backend, so each arm is told which it is (the inference log keeps it).
    """
    if sum(w for _, w in arms) != 100:
        raise ValueError(f"weights {arms} don't sum to 100")
    refs: list[Json] = []
    for (name, weight), arm in zip(arms, ("stable", "candidate"), strict=False):
        ref: Json = {"name": name, "port": PORT, "weight": weight}
        if mark_arms:
            header = {"set": [{"name": ARM_HEADER, "value": arm}]}
            ref["filters"] = [{"type": "RequestHeaderModifier", "requestHeaderModifier": header}]
        refs.append(ref)
    rule: Json = {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}], "backendRefs": refs}
    if mirror is not None:
        rule["filters"] = [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": mirror, "port": PORT}}}]
    parent: Json = {"name": gateway[1], "namespace": gateway[0]}
    section = rollout.spec.routing.gateway_ref.section_name if rollout.spec.routing.gateway_ref is not None else None
    if section:
        parent["sectionName"] = section
    return {
        "metadata": {"name": rollout.name, "namespace": namespace,
                     "labels": {MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: rollout.name}},
        "spec": {"parentRefs": [parent], "hostnames": hostnames(rollout, namespace, domain), "rules": [rule]},
    }


def hostnames(rollout: ModelRollout, namespace: str, domain: str) -> list[str]:
    """Given ones, else one of the rollout's own: a route for every name would take other rollouts' requests."""
    return list(rollout.spec.routing.hostnames) or [f"{rollout.name}-{namespace}.{domain}"]


def owner_of_route(route: Json) -> str:
    """Another controller that makes this route and would fight for it: `InferenceService risk`; empty when there is none."""
    for owner in rows(route, "metadata", "ownerReferences"):
        if owner.get("controller"):
            return f"{owner.get('kind')} {owner.get('name')}"
    return ""


def replicas_wanted(stable_ready: int, percent: int) -> int:
    """Ready pods that the candidate needs for its share of what the stable one's ready pods carry now; one at least."""
    return max(1, math.ceil(stable_ready * percent / 100))


def ready_by_component(pods: Sequence[PodSeen]) -> dict[str, int]:
    found: dict[str, int] = {}
    for pod in pods:
        found[pod.component] = found.get(pod.component, 0) + pod.ready
    return found


def capacity_lacking(
    candidate: Json, candidate_pods: Sequence[PodSeen], stable_pods: Sequence[PodSeen], percent: int,
) -> tuple[Json, str]:
    """What must change in the candidate's spec for its next weight, and what is being waited for; ({}, '') when it is enough.

    A component that the stable service hasn't got is measured by the stable one's largest. maxReplicas of the template is a limit
    that its author set on purpose: up to there and no further.
    """
    stable, ready = ready_by_component(stable_pods), ready_by_component(candidate_pods)
    change: Json = {}
    waiting: list[str] = []
    for component in components(candidate):
        wanted = replicas_wanted(stable.get(component, max(stable.values(), default=0)), percent)
        most = dig(candidate, "spec", component, "maxReplicas")
        if isinstance(most, int) and most > 0:
            wanted = min(wanted, most)
        least = dig(candidate, "spec", component, "minReplicas")
        if wanted > (least if isinstance(least, int) else 1):
            change[component] = {"minReplicas": wanted}
        if ready.get(component, 0) < wanted:
            waiting.append(f"{ready.get(component, 0)} of {wanted} {component} pods are ready")
    return change, ", ".join(waiting)
