"""API objects → what was seen. Pure: JSON in, frozen values out. Nobody beyond this module reads raw fields of a status.

A field that is missing is read as "not known", which never counts as good: a service without a Ready condition isn't ready, a
route whose status speaks about an older generation isn't live.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from pydantic import ValidationError

from hafnium_contract.evidence import EvidenceError, EvidenceSpec, parse_evidence
from hafnium_contract.wire import VERSION_LABEL
from hafnium_rollout.errors import StateError
from hafnium_rollout.gates import CLOCK_SKEW_MAX
from hafnium_rollout.kubernetes.kinds import FIELD_MANAGER, Json
from hafnium_rollout.objects import ApprovalSpec, ModelApproval
from hafnium_rollout.observation import FOREIGN, EvidenceUnread, LiveRoute, RouteSeen, ServiceSeen
from hafnium_rollout.state_folder import MANAGED_BY_LABEL, MANAGER, ROLLOUT_LABEL, evidence_unread
from hafnium_rollout.status import RolloutStatus

DIGEST_ANNOTATION = "hafnium.dev/model-digest"
"""The whole digest; the label of this name holds eight digits, since a label's value is too short for it."""
SERVICE_LABEL = "serving.kserve.io/inferenceservice"
COMPONENT_LABEL = "component"
COMPONENTS = ("transformer", "predictor")
"""Requests come in at the first that an InferenceService has."""
MAIN_CONTAINERS = frozenset({"kserve-container", "transformer-container"})
"""KServe's names for the container of the model, or of the transformer; and for the transformer's where both are in one pod."""
_NO_ROOM_AT_ITS_NODE = frozenset({"OutOfcpu", "OutOfmemory", "OutOfpods", "OutOfephemeral-storage"})


def dig(data: Any, *path: str | int) -> Any:
    """The value at a path of keys and indices; None when any of it isn't there."""
    for key in path:
        if isinstance(key, int) and isinstance(data, list):
            items = cast("list[Any]", data)
            data = items[key] if -len(items) <= key < len(items) else None
        elif isinstance(key, str) and isinstance(data, dict):
            data = cast("Json", data).get(key)
        else:
            return None
    return data


def rows(data: Any, *path: str | int) -> list[Json]:
    """The objects of a list at a path; empty when there is none."""
    found = dig(data, *path)
    return [cast("Json", x) for x in cast("list[Any]", found) if isinstance(x, dict)] if isinstance(found, list) else []


def texts(data: Any, *path: str | int) -> dict[str, str]:
    """Labels or annotations at a path."""
    found = dig(data, *path)
    return {str(k): str(v) for k, v in cast("Json", found).items()} if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Meta:
    """What every object has."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    generation: int
    deleting: bool
    finalizers: tuple[str, ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def meta_of(item: Json) -> Meta:
    m = cast("Json", item.get("metadata") or {})
    return Meta(
        str(m.get("namespace") or ""), str(m.get("name") or ""), str(m.get("uid") or ""), str(m.get("resourceVersion") or ""),
        int(m.get("generation") or 0), bool(m.get("deletionTimestamp")), tuple(m.get("finalizers") or ()),
        texts(m, "labels"), texts(m, "annotations"),
    )


def status_of(item: Json) -> RolloutStatus:
    """The status as written. Raises StateError when it can't be understood: then nothing may be moved."""
    found = item.get("status")
    if not found:
        return RolloutStatus()
    try:
        return RolloutStatus.model_validate(found)
    except ValidationError as e:
        meta, first = meta_of(item), e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise StateError(
            f"ModelRollout {meta.namespace}/{meta.name}: status.{where}: {first['msg']}; nothing is moved until it can be read") from e


@dataclass(frozen=True, slots=True)
class PodSeen:
    """One pod of an InferenceService."""

    name: str
    service: str
    component: str
    ready: bool
    restarts: int
    message: str = ""
    """Why a container of it isn't running."""
    revision: str = ""
    """Knative's revision; empty in Standard mode."""
    no_room: str = ""
    """The cluster has no room for it: what the scheduler says."""
    over: bool = False
    """It is being deleted, or has ended: it keeps nobody waiting, another one stands for it."""


def pod_seen(item: Json) -> PodSeen:
    meta = meta_of(item)
    started = rows(item, "status", "containerStatuses")
    containers = started + rows(item, "status", "initContainerStatuses")
    # A sidecar or an initializer that is restarted is not the model's fault, and what it keeps from being ready is seen as that.
    own = [c for c in started if c.get("name") in MAIN_CONTAINERS] or started
    waiting = [
        f"{c.get('name')}: {dig(c, 'state', 'waiting', 'reason')}" + (
            f" ({dig(c, 'state', 'waiting', 'message')})" if dig(c, "state", "waiting", "message") else "")
        for c in containers if dig(c, "state", "waiting", "reason") not in (None, "PodInitializing", "ContainerCreating")
    ]
    return PodSeen(
        meta.name, meta.labels.get(SERVICE_LABEL, ""), meta.labels.get(COMPONENT_LABEL, ""),
        ready=condition(item, "Ready") == "True" and not meta.deleting,
        restarts=max((int(c.get("restartCount") or 0) for c in own), default=0), message="; ".join(waiting)[:300],
        revision=meta.labels.get("serving.knative.dev/revision", ""), no_room=_no_room(item),
        over=meta.deleting or dig(item, "status", "phase") in ("Failed", "Succeeded"),
    )


def _no_room(item: Json) -> str:
    """Why the pod has no node; empty when it has one."""
    for c in rows(item, "status", "conditions"):
        if c.get("type") == "PodScheduled" and c.get("status") == "False" and c.get("reason") == "Unschedulable":
            return str(c.get("message") or "unschedulable")[:300]
    reason = str(dig(item, "status", "reason") or "")
    return f"{reason}: {dig(item, 'status', 'message') or 'no message'}"[:300] if reason in _NO_ROOM_AT_ITS_NODE else ""


def want_of_room(ready: bool, components: Sequence[str], pods: Sequence[PodSeen]) -> str:
    """What the scheduler says when a service isn't ready for want of room and for no other reason; else empty."""
    waiting = [p for p in pods if not p.ready and (p.no_room or not p.over)]
    known = all(any(p.component == c for p in pods) for c in components)
    return waiting[0].no_room if not ready and known and waiting and all(p.no_room for p in waiting) else ""


def condition(item: Json, kind: str) -> str:
    """Status of a condition: True, False, Unknown; empty when there is none."""
    return next((str(c.get("status")) for c in rows(item, "status", "conditions") if c.get("type") == kind), "")


def components(item: Json) -> tuple[str, ...]:
    """Components that the InferenceService's spec has, the one that takes requests first."""
    return tuple(c for c in COMPONENTS if isinstance(dig(item, "spec", c), dict))


def service_seen(item: Json, pods: Sequence[PodSeen]) -> ServiceSeen:
    """An InferenceService with its pods. Ready: KServe says so, and each component has a pod that is."""
    meta = meta_of(item)
    ready = condition(item, "Ready") == "True" and not meta.deleting
    lacking = [c for c in components(item) if not any(p.component == c and p.ready for p in pods)]
    return ServiceSeen(
        meta.name, meta.annotations.get(DIGEST_ANNOTATION, ""), ready and not lacking, max((p.restarts for p in pods), default=0),
        version=meta.labels.get(VERSION_LABEL, ""), message="" if ready and not lacking else _why_not_ready(item, pods, lacking),
        storage_uri=str(dig(item, "spec", "predictor", "model", "storageUri") or ""),
        pod_restarts={p.name: p.restarts for p in pods if p.restarts}, no_room=want_of_room(ready and not lacking, components(item), pods),
    )


def _why_not_ready(item: Json, pods: Sequence[PodSeen], lacking: Sequence[str]) -> str:
    said = [f"{p.name}: {p.message}" for p in pods if p.message][:2]
    said += [
        f"{c.get('type')}: {c.get('reason') or ''} {c.get('message') or ''}".strip()
        for c in rows(item, "status", "conditions")
        if c.get("status") != "True" and c.get("severity") != "Info" and (c.get("message") or c.get("reason"))
    ][:2]
    if not said and lacking:
        said = [f"no ready pod of {' and '.join(lacking)}"]
    return "; ".join(said)[:500] or "KServe does not say that it is ready"


def is_ours(item: Json, rollout: str) -> bool:
    """Made by this rollout."""
    labels = meta_of(item).labels
    return labels.get(MANAGED_BY_LABEL) == MANAGER and labels.get(ROLLOUT_LABEL) == rollout


# --- routes -------------------------------------------------------------------------------------------------------------------


def service_of_backend(name: str) -> str:
    """InferenceService behind a Service that KServe made (`<name>-transformer`, `<name>-predictor`)."""
    for end in COMPONENTS:
        if name.endswith(f"-{end}"):
            return name.removesuffix(f"-{end}")
    return name


def _named(rules: Sequence[Json]) -> tuple[str, ...]:
    """Services that rules send requests or copies to."""
    refs = [r for rule in rules for r in rows(rule, "backendRefs") if r.get("weight") != 0]
    filters = [f for rule in rules for f in (*rows(rule, "filters"), *(x for r in rows(rule, "backendRefs") for x in rows(r, "filters")))]
    copies = [str(dig(f, "requestMirror", "backendRef", "name")) for f in filters if f.get("type") == "RequestMirror"]
    return tuple(sorted({service_of_backend(n) for n in (*(str(r.get("name")) for r in refs), *copies)}))


def revision_of(item: Json) -> str:
    """Another text after each write of an object's spec, and after it was made anew."""
    meta = dig(item, "metadata")
    return f"{dig(meta, 'uid')}/{dig(meta, 'generation')}" if dig(meta, "generation") else ""


def route_seen(item: Json) -> RouteSeen:
    """Weights and copies of an HTTPRoute. One of another form than ours comes back as FOREIGN, so that it is put right."""
    manager, revision = other_manager(item), revision_of(item)
    rules = rows(item, "spec", "rules")
    if why := not_our_form(item):
        weightless = tuple(name for name, _ in _refs(rules[0])) if why == _NO_WEIGHT else ()
        return RouteSeen(FOREIGN, None, 0, False, manager, _named(rules), revision, weightless)
    refs, mirrors = _refs(rules[0]), _mirrors(rules[0])
    total = sum(w for _, w in refs)
    if len(refs) == 1:
        return RouteSeen(refs[0][0], service_of_backend(mirrors[0]) if mirrors else None, 0, bool(mirrors), manager, revision=revision)
    # The first is the stable one by our order; a stranger's order is another route, and is put back like any other change.
    (stable, _), (candidate, weight) = refs
    return RouteSeen(stable, candidate, _percent(weight, total), False, manager, revision=revision)


_NO_WEIGHT = "no backend of its rule has a weight"


def not_our_form(item: Json) -> str:
    """What an HTTPRoute has that ours never have, in words; empty when it is of our form."""
    rules = rows(item, "spec", "rules")
    if len(rules) != 1:
        return f"it has {len(rules)} rules, expected one"
    rule = rules[0]
    narrow = [m for m in rows(rule, "matches") if dig(m, "path", "value") not in (None, "/") or not set(m) <= {"path"}]
    if narrow:
        return f"its rule takes only requests that match {json.dumps(narrow[0])}, expected all of them (PathPrefix /)"
    refs, mirrors, filters = _refs(rule), _mirrors(rule), rows(rule, "filters")
    if others := sorted({str(f.get("type")) for f in filters} - {"RequestMirror"}):
        return f"its rule has filters ({', '.join(others)}), expected none"
    if len(refs) not in (1, 2) or len(mirrors) > 1 or (mirrors and len(refs) == 2):
        return f"its rule names {len(refs)} backends and {len(mirrors)} mirrors, expected one backend"
    return "" if sum(w for _, w in refs) > 0 else _NO_WEIGHT


def _refs(rule: Json) -> list[tuple[str, int]]:
    """Services of a rule's backends with their weights; one that isn't written is 1."""
    return [(service_of_backend(str(r.get("name"))), int(1 if r.get("weight") is None else r["weight"])) for r in rows(rule, "backendRefs")]


def _mirrors(rule: Json) -> list[str]:
    return [str(dig(f, "requestMirror", "backendRef", "name")) for f in rows(rule, "filters") if f.get("type") == "RequestMirror"]


def _percent(weight: int, total: int) -> int:
    """In whole percents. A stranger's share of a thousandth is not none, and not all either."""
    return min(max(round(100 * weight / total), 1), 99) if 0 < weight < total else 100 * weight // total


def other_manager(item: Json, own: str = FIELD_MANAGER) -> str:
    """Who wrote the spec last besides us, by managedFields: `kubectl-edit (Update, 12:00:01 UTC)`; empty when nobody did."""
    found = [
        m for m in rows(item, "metadata", "managedFields")
        if m.get("manager") != own and m.get("subresource") != "status" and dig(m, "fieldsV1", "f:spec") is not None
    ]
    if not found:
        return ""
    last = max(found, key=lambda m: str(m.get("time") or ""))
    when = _clock_time(str(last.get("time") or ""))
    return f"{last.get('manager')} ({last.get('operation')}{when})"


def _owners(item: Json, path: tuple[str, ...]) -> set[str]:
    """Field managers that wrote a field of the spec last, or the same as that."""
    fields = [f"f:{p}" for p in path]
    return {str(m.get("manager")) for m in rows(item, "metadata", "managedFields") if dig(m, "fieldsV1", "f:spec", *fields) is not None}


def others_own(item: Json, *path: str, own: str = FIELD_MANAGER) -> bool:
    """Whether somebody else wrote this field of the spec last, or wrote the same as we did."""
    return bool(_owners(item, path) - {own})


def ours_alone(item: Json, *path: str, own: str = FIELD_MANAGER) -> bool:
    """Whether we wrote this field of the spec last and nobody has written the same since. Where that isn't known it is False."""
    return _owners(item, path) == {own}


def written_at(item: Json, own: str = FIELD_MANAGER) -> datetime | None:
    """When we wrote the spec last, by the API server's clock."""
    times = [str(m.get("time") or "") for m in rows(item, "metadata", "managedFields")
             if m.get("manager") == own and dig(m, "fieldsV1", "f:spec") is not None]
    try:
        return datetime.fromisoformat(max(times)) if times else None
    except ValueError:
        return None


def _clock_time(text: str) -> str:
    try:
        return f", {datetime.fromisoformat(text):%H:%M:%S} UTC"
    except ValueError:
        return ""


def live_route(item: Json, gateway: tuple[str, str]) -> tuple[LiveRoute | None, str]:
    """What the gateway says that it does with this route, and why that isn't known.

    The gateway's controller writes `status.parents`. Only a status about the present generation counts. Accepted with references
    that resolve: it does what the spec says. Not accepted: it does nothing. Whether requests then really go there, counters tell.
    """
    meta = meta_of(item)
    parents = _parents(item, gateway)
    if not parents:
        return None, f"gateway {'/'.join(gateway)} has not taken up HTTPRoute {meta.namespace}/{meta.name} yet"
    for wanted in ("Accepted", "ResolvedRefs"):
        for parent in parents:
            found = next((c for c in rows(parent, "conditions") if c.get("type") == wanted), None)
            if found is None or int(found.get("observedGeneration") or 0) < meta.generation:
                return None, f"gateway {'/'.join(gateway)} has not taken up the last change of HTTPRoute {meta.namespace}/{meta.name} yet"
            if found.get("status") != "True":
                why = f"{wanted} is {found.get('status')}: {found.get('reason')}: {found.get('message') or 'no message'}"
                return LiveRoute({}), f"HTTPRoute {meta.namespace}/{meta.name} does not work: {why}"
    seen = route_seen(item)
    if seen.stable == FOREIGN:
        return LiveRoute({FOREIGN: 100}), ""
    weights = {seen.stable: 100 - seen.weight} if seen.weight < 100 else {}
    if seen.candidate is not None and seen.weight:
        weights[seen.candidate] = seen.weight
    return LiveRoute(weights, frozenset({seen.candidate}) if seen.shadow and seen.candidate else frozenset()), ""


def _parents(item: Json, gateway: tuple[str, str]) -> list[Json]:
    """What this gateway's controllers say about the route."""
    return [
        p for p in rows(item, "status", "parents")
        if (dig(p, "parentRef", "namespace") or meta_of(item).namespace, dig(p, "parentRef", "name")) == gateway
    ]


def controllers_of(item: Json, gateway: tuple[str, str]) -> frozenset[str]:
    """The gateway's controller, as it names itself in the route's status; usually one."""
    return frozenset(str(p["controllerName"]) for p in _parents(item, gateway) if p.get("controllerName"))


# --- evidence and approvals ---------------------------------------------------------------------------------------------------


def evidence_seen(items: Iterable[Json]) -> tuple[tuple[EvidenceSpec, ...], tuple[EvidenceUnread, ...]]:
    """All evidence that can be read, and what can be told of the rest: one that can't be read may be the Fail that matters."""
    seen = [finding_seen(item) for item in items]
    return tuple(s for s in seen if isinstance(s, EvidenceSpec)), tuple(s for s in seen if isinstance(s, EvidenceUnread))


def finding_seen(item: Json) -> EvidenceSpec | EvidenceUnread:
    """One ModelEvidence.

    A job whose clock is ahead names a window later than it was: traffic from before a step would seem to be of the step once its time has
    come. The API server's time gives it away, and its finding isn't known to be about what it says. A Fail stands, whenever it was.
    """
    meta, stored = meta_of(item), stored_at(item)
    try:
        plain = {"apiVersion": item.get("apiVersion") or "hafnium.dev/v1alpha1", "kind": "ModelEvidence",
                 "metadata": {"name": meta.name}, "spec": item.get("spec")}
        spec = parse_evidence(plain, f"ModelEvidence {meta.namespace}/{meta.name}").spec
    except EvidenceError as e:
        return evidence_unread(f"{e}; delete it, or let its job write a new one", item.get("spec"), stored)
    if stored is not None and max(spec.created_at, spec.window_end) - stored > CLOCK_SKEW_MAX and spec.verdict != "Fail":
        ahead_s = (max(spec.created_at, spec.window_end) - stored).total_seconds()
        return EvidenceUnread(
            f"ModelEvidence {meta.namespace}/{meta.name}: its job's clock is {ahead_s:.0f} s ahead of the API server's, so it "
            "isn't known which time it is about; set the clock, and let the job write a new one",
            spec.model_digest, spec.kind, stored, misdated=True)
    return spec


def stored_at(item: Json) -> datetime | None:
    """When the API server took the object."""
    return time_of(dig(item, "metadata", "creationTimestamp"))


def time_of(text: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def approvals_seen(items: Iterable[Json]) -> list[ApprovalSpec]:
    """All approvals. An object that can't be read approves nothing, nor does one that is being deleted."""
    out: list[ApprovalSpec] = []
    for item in items:
        meta = meta_of(item)
        try:
            found = ModelApproval.model_validate({"metadata": {"name": meta.name}, "kind": "ModelApproval", "spec": item.get("spec")})
        except ValidationError:
            continue
        if not meta.deleting:
            out.append(found.spec)
    return out
