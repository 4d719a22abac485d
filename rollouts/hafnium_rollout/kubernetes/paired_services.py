"""The objects of the backend PairedServices: an InferenceService per model digest, and the HTTPRoute between them. Pure.

The route is named like the rollout. KServe makes HTTPRoutes of its own, named like each InferenceService, so a rollout can't share
its name with an InferenceService; `owner_of_route` finds that out before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hafnium_contract.wire import ARM_HEADER
from hafnium_rollout.kubernetes.kinds import Json
from hafnium_rollout.kubernetes.objects_seen import (
    COMPONENTS,
    DIGEST_ANNOTATION,
    PodSeen,
    components,
    dig,
    others_own,
    rows,
    service_of_backend,
)
from hafnium_rollout.local_backend import inference_service
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.state_folder import MANAGED_BY_LABEL, MANAGER, ROLLOUT_LABEL
from hafnium_rollout.status import ModelSeen, RolloutStatus

MIN_REPLICAS_DEFAULT = 1
"""KServe's, of a component that names none."""
PORT = 80
"""Of the Services that KServe makes."""
TEMPLATE_PODS = "templatePods"
"""Key of the cursor: {service: `pods_of_template`} of services whose minReplicas is raised, or may be before the run's end."""
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


def readdressed(item: Json, rollout: ModelRollout, gateway: tuple[str, str], domain: str) -> Json | None:
    """The route with the Gateway and the names that the rollout asks for, and everything else as it is; None where it has them.

    Weights are not touched: a Gateway that moves, or a name that is added, is no reason to send anybody elsewhere.
    """
    namespace = str(dig(item, "metadata", "namespace"))
    spec = http_route(rollout, namespace, gateway, domain, [("", 100)], None, mark_arms=False)["spec"]
    has = {(str(p.get("namespace") or namespace), str(p.get("name")), p.get("sectionName")) for p in rows(item, "spec", "parentRefs")}
    wants = {(str(p["namespace"]), str(p["name"]), p.get("sectionName")) for p in spec["parentRefs"]}
    if has == wants and list(dig(item, "spec", "hostnames") or ()) == spec["hostnames"]:
        return None
    meta = {"name": dig(item, "metadata", "name"), "namespace": namespace, "resourceVersion": dig(item, "metadata", "resourceVersion"),
            "labels": {MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: rollout.name}}
    return {"metadata": meta, "spec": {**spec, "rules": rows(item, "spec", "rules")}}


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
        if wanted > (least if isinstance(least, int) else MIN_REPLICAS_DEFAULT):
            change[component] = {"minReplicas": wanted}
        if ready.get(component, 0) < wanted:
            waiting.append(f"{ready.get(component, 0)} of {wanted} {component} pods are ready")
    return change, ", ".join(waiting)


def pods_of_template(template: Mapping[str, Any]) -> dict[str, int]:
    """minReplicas of each component; where it names none, KServe's default."""
    found = {c: dig(template, c, "minReplicas") for c in COMPONENTS if isinstance(template.get(c), dict)}
    return {c: least if isinstance(least, int) else MIN_REPLICAS_DEFAULT for c, least in found.items()}


def raised(item: Json, template: Mapping[str, int]) -> dict[str, int]:
    """Components that have more than their template says, with what that is. What somebody else wrote meanwhile stays."""
    return {
        c: template[c] for c in components(item)
        if c in template and isinstance(least := dig(item, "spec", c, "minReplicas"), int) and least > template[c]
        and not others_own(item, c, "minReplicas")
    }


def template_pods(
    rollout: ModelRollout, status: RolloutStatus, items: Mapping[str, Json] | None,
) -> dict[str, dict[str, int]]:
    """What `TEMPLATE_PODS` is after this look: of a candidate under way, so that it is in the status before any pod is asked for, and of a
    stable service that still has more than that. The rollout's template is a model's own only while it asks for that model.
    """
    before = status.cursor.get(TEMPLATE_PODS)
    known = {
        str(name): {str(c): n for c, n in cast("Json", pods).items() if isinstance(n, int)}
        for name, pods in (cast("Json", before).items() if isinstance(before, dict) else ()) if isinstance(pods, dict)}
    climbs = bool(status.run_id) and status.phase not in ("Promoted", "RolledBack")
    found: dict[str, dict[str, int]] = {}
    for model in (status.stable, status.candidate):
        if model is None:
            continue
        under_way = climbs and model == status.candidate
        pods = known.get(model.service)
        if model.digest == rollout.spec.model.digest and (under_way or pods is not None):
            pods = pods_of_template(rollout.spec.service)
        item = None if items is None else items.get(model.service)
        if pods and (under_way or items is None or (item is not None and raised(item, pods))):
            found[model.service] = pods
    return found
