"""A small world for `decide`: traffic, a route, services and a clock, with everything that can go wrong as a switch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.actions import Action, Decision, EnsureCandidate, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.decide import decide
from hafnium_rollout.objects import ModelRollout, UserAction, parse_rollout
from hafnium_rollout.observation import (
    Counts,
    EvidenceUnread,
    GateLook,
    LiveRoute,
    Look,
    Observation,
    RouteSeen,
    Series,
    ServiceSeen,
)
from hafnium_rollout.status import RolloutStatus

CANDIDATE = "sha256:" + "a" * 64
STABLE = "sha256:" + "b" * 64
OTHER = "sha256:" + "c" * 64
START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SERVICE = "risk-aaaaaaaa"


def rollout(**changes: Any) -> ModelRollout:
    """A rollout with demo-sized times. `strategy` and `model` are merged, other keys of the spec replaced."""
    strategy = {
        "steps": [
            {"shadow": True, "minSamples": 200, "deadline": "10m"},
            {"weight": 5, "minDwell": "5s", "minSamples": 200, "deadline": "20m"},
            {"weight": 25, "minDwell": "5s", "minSamples": 200, "deadline": "20m"},
            {"weight": 100, "minDwell": "5s", "deadline": "20m"},
        ],
        "maxBlindDuration": "60s", **changes.pop("strategy", {}),
    }
    model = {"name": "risk", "version": "2", "storageUri": "file:///bundles/2", "digest": CANDIDATE, "trainedBy": "thea",
             **changes.pop("model", {})}
    spec = {
        "model": model, "service": {"predictor": {"model": {"modelFormat": {"name": "onnx"}}}}, "strategy": strategy,
        "gates": [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}}], **changes,
    }
    return parse_rollout(
        {"apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": {"name": "risk"}, "spec": spec}, "test")


@dataclass
class World:
    """Everything outside of `decide`. A turn is 2 s; at 200 requests/s a look is small and a test short."""

    spec: ModelRollout = field(default_factory=rollout)
    status: RolloutStatus = field(default_factory=RolloutStatus)
    now: datetime = START
    rate: float = 200.0
    bad_stable: float = 0.0
    bad_candidate: float = 0.0
    shift: float = 0.0
    route: RouteSeen | None = field(default_factory=lambda: RouteSeen("risk", None, 0, False))
    live_lag: int = 0
    """Turns until the gateway takes a route over."""
    blind: bool = False
    unlisted: bool = False
    """The list of services can't be read."""
    uncounted: bool = False
    """Nobody knows how many requests reach the candidate, though the gateway can be asked."""
    stray: int = 0
    """Requests per look that reach the candidate past the gateway."""
    pods: int | None = None
    """Pods of the candidate; None: as many as it has services."""
    room_for: int = 100
    """The largest weight that the candidate has pods for. A backend waits with a larger one for as long as it takes."""
    ready: bool = True
    restarts: int = 0
    pod_restarts: dict[str, int] = field(default_factory=dict[str, int])
    no_room: str = ""
    candidate_digest: str = CANDIDATE
    misrouted: float = 0.0
    """Share of the candidate's requests that goes to stable instead."""
    evidence: tuple[EvidenceSpec, ...] = ()
    unread: tuple[EvidenceUnread, ...] = ()
    approvals: frozenset[str] = frozenset()
    actions: tuple[UserAction, ...] = ()
    managed: set[str] = field(default_factory=set[str])
    raised: set[str] = field(default_factory=set[str])
    """Services that were given pods for a weight, as a backend does before it writes one, and that have them still."""
    random: random.Random = field(default_factory=lambda: random.Random(1))
    routes: list[RouteSeen | None] = field(default_factory=list[RouteSeen | None])
    events: list[str] = field(default_factory=list[str])
    seen: Observation = field(default_factory=Observation)
    """The last observation."""
    messages: list[str] = field(default_factory=list[str])

    def _bad(self, n: int, p: float) -> int:
        return sum(self.random.random() < p for _ in range(n)) if 0 < p < 1 else round(n * p)

    def live(self) -> LiveRoute:
        """What the gateway does: the route of `live_lag` turns ago."""
        old = self.routes[-1 - self.live_lag] if len(self.routes) > self.live_lag else self.routes[0]
        if old is None:
            return LiveRoute({})
        weights = {old.stable: 100 - old.weight} if old.weight < 100 else {}
        if old.candidate is not None and old.weight:
            weights[old.candidate] = old.weight
        return LiveRoute(weights, frozenset({old.candidate}) if old.shadow and old.candidate else frozenset())

    def observe(self, seconds: float) -> Observation:
        """Traffic of `seconds` under the live route, and all the rest as the switches say."""
        live = self.live()
        services = {"risk": ServiceSeen("risk", STABLE, True)}
        for name in self.managed:
            services[name] = ServiceSeen(
                name, self.candidate_digest if name == SERVICE else OTHER, self.ready and not self.no_room, self.restarts,
                pod_restarts=dict(self.pod_restarts), no_room=self.no_room, raised={"predictor": 1} if name in self.raised else {})
        base = Observation(
            services=services, declared=frozenset(self.managed | {"risk"}), managed=frozenset(self.managed), route=self.route,
            route_absent=self.route is None, evidence=self.evidence, approvals=self.approvals, actions=self.actions,
            evidence_unread=self.unread,
            candidate_pods=int(SERVICE in self.managed) if self.pods is None else self.pods,
        )
        if self.unlisted:
            base = replace(base, services=None, declared=frozenset(), managed=frozenset())
        self.seen = base
        if self.blind:
            return replace(base, problems=("the gateway can't be asked",))
        requests = int(self.rate * seconds)
        candidate = next(iter(live.mirrors), next((n for n in live.weights if n != "risk"), SERVICE))
        to_candidate = sum(self.random.random() * 100 < live.weights.get(candidate, 0) for _ in range(requests))
        to_candidate -= round(to_candidate * self.misrouted)
        to_stable = requests - to_candidate
        seen = to_stable if live.mirrors else to_candidate
        series = Series(Counts(self._bad(to_stable, self.bad_stable), to_stable), Counts(self._bad(seen, self.bad_candidate), seen))
        differences = tuple(
            max(-1.0, min(1.0, self.random.gauss(self.shift, 0.02))) for _ in range(seen)) if live.mirrors else ()
        gates = {
            g.name: GateLook((series,), differences if g.kind == "scores" else ()) for g in self.spec.spec.gates
        }
        reached = None if self.uncounted else float(seen + self.stray)
        look = Look(self.now - timedelta(seconds=seconds), self.now, gates, to_stable, to_candidate, reached)
        self.seen = replace(base, live=live, look=look)
        return self.seen

    def act(self, action: Action) -> None:
        """Does an action, as a backend would."""
        match action:
            case EnsureCandidate():
                self.managed.add(action.model.service)
            case SetShadow():
                self.route = RouteSeen(action.stable, action.candidate, 0, True)
            case SetWeight():
                self.raised.add(action.candidate)
                if action.weight > self.room_for:
                    return
                self.route = RouteSeen(action.stable, action.candidate, action.weight, False)
            case Promote():
                self.route = RouteSeen(action.service, None, 0, False)
            case Rollback():
                self.route = RouteSeen(action.stable, None, 0, False)
            case RetireService():
                self.managed.discard(action.service)
                self.raised.discard(action.service)
            case LowerPods():
                assert self.live() == LiveRoute({action.service: 100}), "pods are taken only from who answers alone"
                assert self.status.step is None
                self.raised.discard(action.service)

    def turn(self, *, seconds: float = 2.0, keep_status: bool = True, actions_done: int | None = None) -> Decision:
        """One turn. `keep_status` False: a crash before the status was written; `actions_done`: a crash after so many actions."""
        self.now += timedelta(seconds=seconds)
        self.routes.append(self.route)
        decision = decide(self.spec, self.status, self.observe(seconds), self.now)
        if not keep_status:
            return decision
        # A status that can't be written and read back unchanged is none.
        self.status = RolloutStatus.model_validate_json(decision.status.model_dump_json())
        assert self.status == decision.status
        for action in decision.actions[:actions_done]:
            self.act(action)
        self.events += [e.name for e in decision.events]
        self.messages += [e.message for e in decision.events]
        return decision

    def until(self, *phases: str, turns: int = 400) -> str:
        """Turns until one of the phases is reached; returns the phase that it ended in."""
        for _ in range(turns):
            self.turn()
            if self.status.phase in phases:
                break
        return self.status.phase

    def until_step(self, index: int, turns: int = 400) -> None:
        """Turns until the step's weight is effective."""
        for _ in range(turns):
            self.turn()
            step = self.status.step
            if step is not None and step.index == index and step.weight_effective_since is not None:
                return
        raise AssertionError(f"step {index} was not reached: {self.status.phase} {self.status.message}")

    @property
    def weight(self) -> int:
        """The candidate's weight in the route as written."""
        return self.route.weight if self.route is not None else 0
