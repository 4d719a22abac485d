"""What both backends see in the same way: evidence, approvals, counters and scores. A backend adds its services and its route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from hafnium_rollout import approvals
from hafnium_rollout.approvals import candidate_of
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_EVIDENCE
from hafnium_rollout.kubernetes.objects_seen import Meta, PodSeen, approvals_seen, evidence_seen
from hafnium_rollout.kubernetes.prometheus_queries import LookMade, PrometheusLooks, Scores
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import LiveRoute, Observation, RouteSeen, ServiceSeen
from hafnium_rollout.status import RolloutStatus


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a backend sees by itself."""

    services: Mapping[str, ServiceSeen] | None = None
    declared: frozenset[str] = frozenset()
    managed: frozenset[str] = frozenset()
    route: RouteSeen | None = None
    absent: bool = False
    """There is certainly no route."""
    live: LiveRoute | None = None
    pods: Mapping[str, Sequence[PodSeen]] = field(default_factory=dict[str, Sequence[PodSeen]])
    """Per arm, those that requests come in at."""
    problems: tuple[str, ...] = ()
    cursor: Mapping[str, object] = field(default_factory=dict[str, object])
    """What the backend wants to find in the status' cursor again."""


class Observer:
    """Completes what a backend saw. Holds nothing that a restart would miss."""

    def __init__(self, looks: PrometheusLooks, scores: ScoreLog) -> None:
        self._looks, self._scores = looks, scores

    def complete(
        self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime, seen: Traffic, *, look: bool,
    ) -> Observation:
        """Everything that is known now; with `look` counters are read too. What can't be seen is None and a problem."""
        problems = list(seen.problems)
        made = LookMade(None, dict(status.cursor))
        if look and snapshot.pods is not None:
            made = self._look(rollout, meta.namespace, status, seen, now)
        problems += made.problems
        digest, trained_by = candidate_of(rollout, status)
        counted = approvals.count(approvals_seen((snapshot.approvals or {}).get(meta.namespace, ())), digest, trained_by)
        if MODEL_APPROVAL.name in snapshot.errors and rollout.spec.approvals.required:
            problems.append(snapshot.errors[MODEL_APPROVAL.name])
        evidence, evidence_error = evidence_seen((snapshot.evidence or {}).get(meta.namespace, ()))
        return Observation(
            services=seen.services, declared=seen.declared, managed=seen.managed, route=seen.route, route_absent=seen.absent,
            live=seen.live, look=made.look, evidence=evidence,
            evidence_error=snapshot.errors.get(MODEL_EVIDENCE.name, evidence_error), approvals=counted.stages,
            approvals_refused=counted.refused, problems=tuple(problems), cursor={**made.cursor, **seen.cursor},
        )

    def _look(self, rollout: ModelRollout, namespace: str, status: RolloutStatus, seen: Traffic, now: datetime) -> LookMade:
        differences, error, log_cursor = self._scores.read(rollout, namespace, status, seen.live, now)
        made = self._looks.look(rollout, namespace, status, seen.pods, now, Scores(differences, error))
        if made.look is None and differences:
            # Pairs are handed in together with a look; without one they wait for the next.
            self._scores.give_back(rollout, namespace, differences)
        cursor = {k: v for k, v in made.cursor.items() if k != "log"}
        return LookMade(made.look, cursor if log_cursor is None else {**cursor, "log": log_cursor}, made.problems)
