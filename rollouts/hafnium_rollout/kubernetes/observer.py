"""What both backends see in the same way: evidence, approvals, counters and scores. A backend adds its services and its route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from hafnium_rollout import approvals
from hafnium_rollout.approvals import candidate_of
from hafnium_rollout.kubernetes.evidence_cache import Findings
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_EVIDENCE
from hafnium_rollout.kubernetes.objects_seen import Meta, PodSeen, approvals_seen
from hafnium_rollout.kubernetes.prometheus_queries import LookMade, PrometheusLooks, Scores
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels, held_against, wrong_model
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
    serving: Mapping[str, Sequence[PodSeen]] = field(default_factory=dict[str, Sequence[PodSeen]])
    """Per arm, those that a model is in."""
    problems: tuple[str, ...] = ()
    cursor: Mapping[str, object] = field(default_factory=dict[str, object])
    """What the backend wants to find in the status' cursor again; None: no longer."""


class Observer:
    """Completes what a backend saw. Holds nothing that a restart would miss."""

    def __init__(self, looks: PrometheusLooks, scores: ScoreLog, models: ServedModels) -> None:
        self._looks, self._scores, self._models = looks, scores, models

    def complete(
        self, rollout: ModelRollout, meta: Meta, status: RolloutStatus, snapshot: Snapshot, now: datetime, seen: Traffic, *, look: bool,
    ) -> Observation:
        """Everything that is known now; with `look` counters are read too. What can't be seen is None and a problem."""
        problems = list(seen.problems)
        made = LookMade(None, dict(status.cursor))
        if look and snapshot.pods is not None:
            made = self._look(rollout, meta.namespace, status, seen, now)
        problems += made.problems
        services = self._verified(meta.namespace, status, seen, now, problems)
        digest, trained_by = candidate_of(rollout, status)
        counted = approvals.count(approvals_seen((snapshot.approvals or {}).get(meta.namespace, ())), digest, trained_by)
        if MODEL_APPROVAL.name in snapshot.errors and rollout.spec.approvals.required:
            problems.append(snapshot.errors[MODEL_APPROVAL.name])
        found = (snapshot.evidence or {}).get(meta.namespace, Findings())
        models = {rollout.spec.model.digest, *(m.digest for m in (status.candidate, status.stable) if m is not None)}
        return Observation(
            services=services, declared=seen.declared, managed=seen.managed, route=seen.route, route_absent=seen.absent,
            live=seen.live, look=made.look, evidence=found.about(models),
            evidence_error=snapshot.errors.get(MODEL_EVIDENCE.name, ""), evidence_unread=found.unread, approvals=counted.stages,
            approvals_refused=counted.refused, candidate_pods=_pods_of_candidate(status, snapshot, seen), problems=tuple(problems),
            cursor={k: v for k, v in {**made.cursor, **seen.cursor}.items() if v is not None},
        )

    def _verified(
        self, namespace: str, status: RolloutStatus, seen: Traffic, now: datetime, problems: list[str],
    ) -> Mapping[str, ServiceSeen] | None:
        """The services with what speaks against their being the models that they are called, while a candidate is under way."""
        candidate, stable = status.candidate, status.stable
        if seen.services is None or candidate is None or not status.run_id or status.phase in ("Promoted", "RolledBack"):
            return seen.services
        said = self._models.said(namespace, candidate.service, seen.serving.get(candidate.service, ()), now.timestamp())
        if said.problem:
            problems.append(said.problem)
        if stable is not None and stable.service in seen.services and stable.service != candidate.service:
            of_stable = self._models.said(namespace, stable.service, seen.serving.get(stable.service, ()), now.timestamp())
            wrong = wrong_model(stable, seen.services[stable.service], of_stable)
            if wrong:
                problems.append(f"{stable.service}, which the candidate is compared with, is another model than it is called: {wrong}")
        return held_against(seen.services, candidate, said, before_traffic=status.step is None and status.rollback is None)

    def _look(self, rollout: ModelRollout, namespace: str, status: RolloutStatus, seen: Traffic, now: datetime) -> LookMade:
        differences, error, log_cursor = self._scores.read(rollout, namespace, status, seen.live, now)
        made = self._looks.look(rollout, namespace, status, seen.pods, now, Scores(differences, error))
        if made.look is None and differences:
            # Pairs are handed in together with a look; without one they wait for the next.
            self._scores.give_back(rollout, namespace, differences)
        cursor = {k: v for k, v in made.cursor.items() if k != "log"}
        return LookMade(made.look, cursor if log_cursor is None else {**cursor, "log": log_cursor}, made.problems)


def _pods_of_candidate(status: RolloutStatus, snapshot: Snapshot, seen: Traffic) -> int | None:
    """How many pods requests could come in at; None when the pods can't be read."""
    if status.candidate is None or snapshot.pods is None or status.candidate.service not in seen.pods:
        return None
    return len(seen.pods[status.candidate.service])
