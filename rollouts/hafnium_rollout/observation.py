"""What was seen at one look, as plain values: the only thing that `decide` knows about the world.

Each routing backend fills this in from its own sources (Envoy and files here, the API server and Prometheus on a cluster).
What could not be read is None or an error text, never zero: "no data" must not look like "no harm".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.objects import UserAction


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests between two scrapes: how many, and how many of them were bad."""

    bad: float
    total: float


@dataclass(frozen=True, slots=True)
class Series:
    """Both arms over the same look. A latency threshold between two histogram buckets gives two series."""

    stable: Counts
    candidate: Counts
    label: str = ""


@dataclass(frozen=True, slots=True)
class GateLook:
    """What one gate saw in this look. `error`: why it saw nothing."""

    series: tuple[Series, ...] = ()
    differences: tuple[float, ...] = ()
    """Candidate's score − stable's, per request that both answered."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """The time between two readings of the counters."""

    started: datetime
    ended: datetime
    gates: Mapping[str, GateLook]
    routed_stable: float | None = None
    """Client requests that the gateway sent to the arm (retries not counted twice). None: not known."""
    routed_candidate: float | None = None
    candidate_requests: float | None = None
    """Requests that reached the candidate in this time, copies too, by counters of all of its pods. None: not known, which is not zero."""


@dataclass(frozen=True, slots=True)
class ServiceSeen:
    """A running InferenceService."""

    name: str
    digest: str
    ready: bool
    restarts: int = 0
    """Of the pod that was restarted most often."""
    version: str = ""
    message: str = ""
    storage_uri: str = ""
    pod_restarts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Restarts of the model's own container, per pod that had any. One machine has no pods: there `restarts` says it all."""
    no_room: str = ""
    """It isn't ready, and only because the cluster has no room for its pods: what the scheduler says."""
    wrong_model: str = ""
    """Why it is another model than its name says, by its spec or its pods; empty when nothing says so."""
    serves: str = ""
    """Its digest, when its pods say that they serve that and none says another; empty when that isn't known."""
    unasked: str = ""
    """Why its pods could not be asked yet which model they serve, though they may say it: until then it gains no weight. Pods that were
    asked and don't say it are no reason."""
    raised: Mapping[str, int] = field(default_factory=dict[str, int])
    """Components whose `minReplicas` was raised for the climb and still is, with what the template says."""


FOREIGN = "(not of our form)"
"""Stable service of a route whose form doesn't say who is stable. It is no service's name, and equals no route that is wanted."""


@dataclass(frozen=True, slots=True)
class RouteSeen:
    """The route's intent, as last written by anyone. `manager` names who, as far as that is known."""

    stable: str
    candidate: str | None
    weight: int
    shadow: bool
    manager: str = ""
    others: tuple[str, ...] = ()
    """Services that a route of a foreign form names, sorted: what it does with them isn't known, only that it may."""
    revision: str = ""
    """Another one after each write, by whomever; empty where none is known."""
    weightless: tuple[str, ...] = ()
    """Services of a route that is of our form, but that none of them has a weight."""
    dark: bool = False
    """The candidate is in, and that it has no share yet was written by ourselves: nobody took it away."""


@dataclass(frozen=True, slots=True)
class LiveRoute:
    """What the gateway does right now: percent per service, and which services get copies."""

    weights: Mapping[str, int]
    mirrors: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class EvidenceUnread:
    """A finding that can't be understood, or not used. It may be the Fail that matters, so what can be told of it is kept."""

    error: str
    """Which one, and why."""
    model_digest: str | None = None
    """None: that can't be read either, so it may be about any model."""
    kind: str | None = None
    """None: it may be of any kind."""
    created_at: datetime | None = None
    """When it was stored, by the API server's or the file's time."""
    misdated: bool = False
    """It can be read and is no Fail; only which time it is about isn't known. It holds until a later one can be used."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything seen at one moment."""

    services: Mapping[str, ServiceSeen] | None = None
    """None: the list can't be read."""
    declared: frozenset[str] = frozenset()
    """Names of all InferenceServices that are wanted, whoever wrote them."""
    managed: frozenset[str] = frozenset()
    """Those of them that this rollout made."""
    route: RouteSeen | None = None
    route_absent: bool = False
    """There is certainly no route (not: it can't be read)."""
    live: LiveRoute | None = None
    """None: the gateway can't be asked."""
    look: Look | None = None
    """None: counters can't be read, or this is the first reading, or one was reset."""
    evidence: tuple[EvidenceSpec, ...] = ()
    evidence_error: str = ""
    """Why not all of it could be looked at."""
    evidence_unread: tuple[EvidenceUnread, ...] = ()
    """Findings that are there and can't be understood."""
    approvals: frozenset[str] = frozenset()
    """Stages approved for the candidate's digest, as approvals.py counts them."""
    approvals_refused: tuple[str, ...] = ()
    """Approvals of the candidate that don't count, and why."""
    candidate_pods: int | None = None
    """Pods of the candidate that requests could come in at, ready or not. None: not known."""
    actions: tuple[UserAction, ...] = ()
    problems: tuple[str, ...] = ()
    """What couldn't be read, for people."""
    cursor: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Where the next look goes on: kept in the status together with what was made of this one."""
