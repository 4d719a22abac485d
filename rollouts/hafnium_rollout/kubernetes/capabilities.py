"""What this cluster can do for a rollout, found out before anything moves. Pure, over a snapshot.

A finding that `refuses` keeps a rollout from beginning; one under way is never stopped by it, since it must be able to go back.
A gateway says in its class which features it has. One that says nothing is believed only if its controller is known to mirror:
a route's status is no proof (Traefik accepts a RequestMirror and then answers 500 to everybody).

An operator of one namespace often may not read gateways and their classes. Who the gateway's controller is then stands in the status of the
rollout's own route, and no candidate gets as much as a copy before that is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hafnium_rollout.kubernetes import canary_traffic
from hafnium_rollout.kubernetes.kinds import (
    GATEWAY,
    GATEWAY_CLASS,
    HTTP_ROUTE,
    INFERENCE_SERVICE,
    MODEL_APPROVAL,
    MODEL_EVIDENCE,
    REVISION,
    Json,
    Kind,
)
from hafnium_rollout.kubernetes.objects_seen import condition, controllers_of, dig, meta_of, not_our_form, route_seen, rows
from hafnium_rollout.kubernetes.paired_services import MODE_ANNOTATION, PORT, owner_of_route, parent_of
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.status import RolloutStatus
from hafnium_rollout.turn import normal

MIRROR = "HTTPRouteRequestMirror"
ARM_HEADERS = "HTTPRouteBackendRequestHeaderModification"
_WHAT_FOR: Mapping[str, str] = {
    INFERENCE_SERVICE.name: "install KServe",
    REVISION.name: "install Knative Serving, or write routing.backend PairedServices",
    HTTP_ROUTE.name: "install the Gateway API (standard channel) and a gateway",
    GATEWAY.name: "install the Gateway API (standard channel) and a gateway",
    MODEL_EVIDENCE.name: "install Hafnium's CRDs; until then gates over jobs' evidence have no data",
    MODEL_APPROVAL.name: "install Hafnium's CRDs; until then nothing is approved",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that isn't there, what that means, and what to do."""

    reason: str
    message: str
    refuses: bool = True


@dataclass(frozen=True, slots=True)
class GatewayAbility:
    mirrors: Literal["yes", "no", "unknown"]
    marks_arms: bool
    controller: str = ""


def missing_kinds(snapshot: Snapshot, backend: str) -> tuple[Finding, ...]:
    """Kinds that the backend needs and the API server doesn't know."""
    routing: tuple[Kind, ...] = (REVISION,) if backend == "CanaryTrafficPercent" else (HTTP_ROUTE, GATEWAY)
    wanted: tuple[Kind, ...] = (INFERENCE_SERVICE, *routing, MODEL_EVIDENCE, MODEL_APPROVAL)
    return tuple(
        Finding("KindMissing", f"the API server doesn't know {k.name} ({k.api_version}): {_WHAT_FOR[k.name]}",
                refuses=k not in (MODEL_EVIDENCE, MODEL_APPROVAL))
        for k in wanted if k.name in snapshot.missing)


def ability(
    snapshot: Snapshot, gateway: tuple[str, str], mirroring: frozenset[str], route: Json | None = None,
) -> GatewayAbility | None:
    """What the gateway can do, by its class; where that can't be read, by the controller that the route's status names. None when neither
    is there."""
    item = (snapshot.gateways or {}).get(gateway)
    found = (snapshot.classes or {}).get(("", str(dig(item, "spec", "gatewayClassName")))) if item is not None else None
    if found is None:
        unread = snapshot.gateways is None or (item is not None and snapshot.classes is None)
        named = controllers_of(route, gateway) if unread and route is not None else frozenset[str]()
        known = named <= mirroring
        return GatewayAbility("yes" if known else "unknown", known, ", ".join(sorted(named))) if named else None
    controller = str(dig(found, "spec", "controllerName") or "")
    listed = dig(found, "status", "supportedFeatures")
    names = {str(f.get("name")) for f in rows(found, "status", "supportedFeatures")}
    if controller in mirroring or MIRROR in names:
        mirrors: Literal["yes", "no", "unknown"] = "yes"
    else:
        mirrors = "no" if isinstance(listed, list) and listed else "unknown"
    return GatewayAbility(mirrors, ARM_HEADERS in names or controller in mirroring, controller)


def findings(
    rollout: ModelRollout, namespace: str, snapshot: Snapshot, settings: Settings, query_problems: Sequence[str] = (),
    status: RolloutStatus = RolloutStatus(),
) -> tuple[Finding, ...]:
    """All that stands against this rollout on this cluster, the gravest first."""
    backend = rollout.spec.routing.backend or "PairedServices"
    out: list[Finding] = [*missing_kinds(snapshot, backend)]
    if backend == "Local":
        out.append(Finding("BackendNotHere", "routing.backend Local is Envoy on one machine; on a cluster write PairedServices"))
    if backend == "PairedServices":
        out += _gateway(rollout, namespace, snapshot, settings)
        out += _names(rollout, namespace, snapshot) or (_taken_over(rollout, namespace, snapshot) if status.stable is None else [])
    if backend == "CanaryTrafficPercent":
        out += _knative(rollout, namespace, snapshot, first_seen=status.stable is None and not status.run_id)
    if any(g.counted for g in rollout.spec.gates) and not settings.prometheus_url:
        out.append(Finding("NoPrometheus", "gates over counted requests need Prometheus: start the operator with --prometheus_url"))
    if any(g.kind == "scores" for g in rollout.spec.gates) and not settings.inference_log:
        out.append(Finding("NoInferenceLog", "a scores gate reads the inference log: start the operator with --inference_log"))
    if backend == "CanaryTrafficPercent" and any(g.scores for g in rollout.spec.gates) and "{service}" in settings.inference_log:
        out.append(Finding("LogPerService", "with CanaryTrafficPercent both models write one service's inference log, so none is had "
                           "per {service}: start the operator with an --inference_log without {service}, or remove the scores gate"))
    out += [Finding("QueryInvalid", p) for p in query_problems]
    return tuple(sorted(out, key=lambda f: not f.refuses))


def _knative(rollout: ModelRollout, namespace: str, snapshot: Snapshot, *, first_seen: bool) -> list[Finding]:
    """`first_seen`: this rollout has never changed the service that it finds."""
    out: list[Finding] = []
    if any(s.shadow for s in rollout.spec.strategy.steps):
        out.append(Finding("MirrorNotSupported", "CanaryTrafficPercent can't copy requests: remove the step with shadow: true, or write "
                           "routing.backend PairedServices and a gateway that mirrors"))
    item = (snapshot.services or {}).get((namespace, rollout.name))
    if item is None:
        return out
    mode = str(dig(item, "status", "deploymentMode") or meta_of(item).annotations.get(MODE_ANNOTATION, ""))
    if mode not in ("Knative", "Serverless"):
        out.append(Finding("NotKnative", f"InferenceService {namespace}/{rollout.name} is in {mode or 'its default'} mode, where "
                           "canaryTrafficPercent is accepted and does nothing: write routing.backend PairedServices"))
    busy = canary_traffic.under_way(item) if first_seen and not out else ""
    if busy:
        out.append(Finding("NotAtRest", f"InferenceService {namespace}/{rollout.name} is in the middle of another change: {busy}. Finish "
                           "it or take it back (no canaryTrafficPercent, one ready revision with all requests); then it is taken over"))
    return out


def _gateway(rollout: ModelRollout, namespace: str, snapshot: Snapshot, settings: Settings) -> list[Finding]:
    gateway = parent_of(rollout, namespace, settings.default_gateway)
    shown = "/".join(gateway)
    shadow = any(s.shadow for s in rollout.spec.strategy.steps)
    can = ability(snapshot, gateway, settings.mirroring, (snapshot.routes or {}).get((namespace, rollout.name)))
    if GATEWAY.name in snapshot.missing:
        return []  # missing kinds have a finding of their own
    if snapshot.gateways is None:
        return _unread(shown, can, snapshot) if shadow else []  # unread is not missing
    if gateway not in snapshot.gateways:
        return [Finding("GatewayMissing", f"there is no Gateway {shown}: make it, or name another in routing.gatewayRef")]
    out: list[Finding] = []
    if condition(snapshot.gateways[gateway], "Programmed") == "False":
        out.append(Finding("GatewayNotProgrammed", f"Gateway {shown} is not programmed; its controller says why", refuses=False))
    if not shadow:
        return out
    if snapshot.classes is None:
        return [*out, *_unread(shown, can, snapshot)]
    if can is None or can.mirrors == "unknown":
        which = f"its controller ({can.controller})" if can is not None else "its class"
        out.append(Finding("MirrorUnknown", f"the step with shadow: true needs a gateway that mirrors requests, and {which} doesn't say "
                           f"that Gateway {shown} does. Try it, then add the controller to --mirroring_controllers; or remove the step"))
    elif can.mirrors == "no":
        out.append(Finding("MirrorNotSupported", f"the step with shadow: true needs a gateway that mirrors requests, and Gateway {shown} "
                           f"({can.controller}) doesn't: name one that does (Envoy Gateway, Contour, Istio), or remove the step"))
    return out


def _unread(shown: str, can: GatewayAbility | None, snapshot: Snapshot) -> list[Finding]:
    """The gateway, or its class, can't be read. Its controller's name must be enough, and until that is known it is said."""
    why = snapshot.errors.get(GATEWAY.name) or snapshot.errors.get(GATEWAY_CLASS.name) or "no answer"
    if can is not None and can.mirrors == "yes":
        return []
    if can is None:
        return [Finding(
            "MirrorUnchecked", f"whether Gateway {shown} mirrors requests, as the step with shadow: true needs it, isn't checked yet: it "
            f"and its class can't be read ({why}), and no status of the route says yet who its controller is", refuses=False)]
    return [Finding(
        "MirrorUnknown", f"the step with shadow: true needs a gateway that mirrors requests. Gateway {shown} and its class can't be read "
        f"({why}), and its controller ({can.controller}, by the route's status) isn't known to mirror. Let the operator read gateways and "
        "gatewayclasses, or try it and add the controller to --mirroring_controllers; or remove the step")]


def _taken_over(rollout: ModelRollout, namespace: str, snapshot: Snapshot) -> list[Finding]:
    """The route that is live already must say who is stable, since all that our own writes keep of it is that service."""
    item = (snapshot.routes or {}).get((namespace, rollout.name))
    if item is None:
        return []
    seen, why = route_seen(item), not_our_form(item)
    if not why and normal(seen).candidate is not None:
        copies = "copies" if seen.shadow else f"{seen.weight} %"
        why = f"it names two services ({seen.stable} {100 - seen.weight} %, {seen.candidate} {copies}), so it isn't known which is stable"
    there = next((r for r in rows(item, "spec", "rules", 0, "backendRefs") if _elsewhere(r, namespace)), None)
    if not why and there is not None:
        where = f"{there.get('kind') or 'Service'} {there.get('namespace') or namespace}/{there.get('name')}, port {there.get('port')}"
        why = f"its backend is {where}, expected a Service in {namespace} at port {PORT}, as KServe makes it"
    if not why:
        return []
    return [Finding("RouteNotOurForm", f"HTTPRoute {namespace}/{rollout.name} is there already and can't be taken over as it is: {why}. "
                    "Give it one rule for all requests, without filters, whose only backend is the Service of the live InferenceService "
                    "(or give the ModelRollout another name); then it is taken over")]


def _elsewhere(ref: Json, namespace: str) -> bool:
    """A write of ours would address it at another place."""
    return (ref.get("kind") or "Service", ref.get("namespace") or namespace, ref.get("port") or PORT) != ("Service", namespace, PORT)


def _names(rollout: ModelRollout, namespace: str, snapshot: Snapshot) -> list[Finding]:
    route = (snapshot.routes or {}).get((namespace, rollout.name))
    owner = owner_of_route(route) if route is not None else ""
    if owner:
        return [Finding("NameTaken", f"HTTPRoute {namespace}/{rollout.name} is made by {owner}, which would undo every change: give the "
                        "ModelRollout another name")]
    if (snapshot.services or {}).get((namespace, rollout.name)) is not None:
        return [Finding("NameTaken", f"InferenceService {namespace}/{rollout.name} has the rollout's name, so KServe makes an HTTPRoute of "
                        "that name too: give the ModelRollout another name")]
    return []
