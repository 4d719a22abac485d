"""Everything that one turn looks at, read at one time: one list per kind, however many rollouts there are.

Lists and no cache: what a turn decides on is what the API server says now. What can't be listed is None with the reason, never an
empty list. Evidence is listed as well, but understood once (evidence_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hafnium_rollout.evidence_retention import Retention
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import KubernetesError, NotFound
from hafnium_rollout.kubernetes.evidence_cache import EvidenceCache, Findings
from hafnium_rollout.kubernetes.kinds import (
    GATEWAY,
    GATEWAY_CLASS,
    HTTP_ROUTE,
    INFERENCE_SERVICE,
    MODEL_APPROVAL,
    MODEL_EVIDENCE,
    POD,
    REVISION,
    Json,
    Kind,
)
from hafnium_rollout.kubernetes.objects_seen import SERVICE_LABEL, PodSeen, meta_of, pod_seen

Key = tuple[str, str]
"""(namespace, name)."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Objects by namespace and name. A kind that couldn't be read is None, and `errors` says why, by the kind's name."""

    services: Mapping[Key, Json] | None = None
    pods: Mapping[Key, tuple[PodSeen, ...]] | None = None
    """By namespace and InferenceService."""
    routes: Mapping[Key, Json] | None = None
    gateways: Mapping[Key, Json] | None = None
    classes: Mapping[Key, Json] | None = None
    evidence: Mapping[str, Findings] | None = None
    """By namespace, about the models that its rollouts name."""
    approvals: Mapping[str, tuple[Json, ...]] | None = None
    revisions: Mapping[str, tuple[Json, ...]] | None = None
    """Knative's, by namespace; only read when a rollout needs them."""
    errors: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: frozenset[str] = frozenset()
    """Kinds that the API server doesn't know."""

    def services_of(self, namespace: str) -> dict[str, Json] | None:
        if self.services is None:
            return None
        return {name: item for (where, name), item in self.services.items() if where == namespace}

    def pods_of(self, namespace: str, service: str) -> tuple[PodSeen, ...]:
        return (self.pods or {}).get((namespace, service), ())


def take(
    client: KubernetesClient, namespace: str = "", gateways_of: Snapshot | None = None, *, knative: bool = False,
    evidence_cache: EvidenceCache | None = None, retention: Retention | None = None,
) -> Snapshot:
    """Reads all kinds. Never raises a KubernetesError: what failed is None and named in `errors`.

    `gateways_of`: take gateways and their classes from an earlier snapshot, for a turn about one namespace alone. `knative`: there
    is a rollout that needs revisions. `retention`: which evidence is looked at; None: all.
    """
    errors: dict[str, str] = {}
    missing: set[str] = set()

    def tried(kind: Kind, do: Callable[[], _T]) -> _T | None:
        try:
            return do()
        except NotFound:
            missing.add(kind.name)
            errors[kind.name] = f"the kind {kind.name} ({kind.api_version}) is not installed"
        except KubernetesError as e:
            errors[kind.name] = str(e)
        return None

    def read(kind: Kind, labels: str = "") -> tuple[Json, ...] | None:
        where = namespace if kind.namespaced and kind is not GATEWAY else ""
        return tried(kind, lambda: client.list(kind, where, labels=labels).items)

    services, pods, routes = read(INFERENCE_SERVICE), read(POD, SERVICE_LABEL), read(HTTP_ROUTE)
    if gateways_of is not None and gateways_of.gateways is not None and gateways_of.classes is not None:
        gateways, classes = gateways_of.gateways, gateways_of.classes
    else:
        gateways, classes = _by_key(read(GATEWAY)), _by_key(read(GATEWAY_CLASS))
    approvals = read(MODEL_APPROVAL)
    evidence = tried(MODEL_EVIDENCE, lambda: (evidence_cache or EvidenceCache()).read(client, namespace, retention))
    revisions = read(REVISION, SERVICE_LABEL) if knative else None
    return Snapshot(
        _by_key(services), _pods(pods), _by_key(routes), gateways, classes, evidence, _by_namespace(approvals),
        _by_namespace(revisions), errors, frozenset(missing),
    )


def _by_key(items: tuple[Json, ...] | None) -> dict[Key, Json] | None:
    if items is None:
        return None
    return {(m.namespace, m.name): i for i in items if (m := meta_of(i))}


def _by_namespace(items: tuple[Json, ...] | None) -> dict[str, tuple[Json, ...]] | None:
    if items is None:
        return None
    out: dict[str, list[Json]] = {}
    for item in items:
        out.setdefault(meta_of(item).namespace, []).append(item)
    return {k: tuple(v) for k, v in out.items()}


def _pods(items: tuple[Json, ...] | None) -> dict[Key, tuple[PodSeen, ...]] | None:
    if items is None:
        return None
    out: dict[Key, list[PodSeen]] = {}
    for item in items:
        pod = pod_seen(item)
        out.setdefault((meta_of(item).namespace, pod.service), []).append(pod)
    return {k: tuple(v) for k, v in out.items()}
