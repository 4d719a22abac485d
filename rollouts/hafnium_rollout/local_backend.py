"""Observe and act on one machine: Envoy's admin endpoint, the inference log and the files of the state folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import yaml

from hafnium_contract.errors import HafniumError
from hafnium_contract.whole_files import write_atomically
from hafnium_contract.wire import DIGEST_LABEL, VERSION_LABEL
from hafnium_rollout import approvals
from hafnium_rollout.actions import Action, EnsureCandidate, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.approvals import candidate_of
from hafnium_rollout.arm_looks import Arms, gate_look
from hafnium_rollout.envoy_counters import ArmCounters, EnvoyAdmin, from_data, was_reset
from hafnium_rollout.errors import OnlyAhead, StateError
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.objects import ModelRollout, UserAction
from hafnium_rollout.observation import GateLook, LiveRoute, Look, Observation, RouteSeen, ServiceSeen
from hafnium_rollout.score_reading import ScoreReaders
from hafnium_rollout.state_folder import (
    MANAGED_BY_LABEL,
    MANAGER,
    ROLLOUT_LABEL,
    EvidenceReader,
    StateFolder,
    admin_port,
    read_actions,
    read_approvals,
    read_route,
    read_services,
)
from hafnium_rollout.status import ModelSeen, RolloutStatus

LOCAL_ANNOTATIONS = "local.hafnium.dev/"
"""Annotations of a ModelRollout with this prefix are for the local runtime and go on to the candidate's InferenceService."""

SERVICE_PLACEHOLDER = "${HAFNIUM_SERVICE}"


class LocalBackend:
    """Eyes and hands of the controller on one machine. Holds nothing that a restart would miss."""

    def __init__(self, state: StateFolder) -> None:
        self._state = state
        self._evidence = EvidenceReader(state.evidence)
        self._scores = ScoreReaders()
        self._labels: dict[Path, tuple[int, str]] = {}

    # --- seeing ---------------------------------------------------------------------------------------------------------------

    def observe(self, rollout: ModelRollout, status: RolloutStatus, now: datetime) -> Observation:
        """Everything that can be seen now. What can't is None and named in `problems`; nothing is raised for it."""
        problems: list[str] = []
        services: dict[str, ServiceSeen] | None = None
        route: RouteSeen | None = None
        absent = False
        live: LiveRoute | None = None
        counters: dict[str, ArmCounters] | None = None
        try:
            services = read_services(self._state)
        except StateError as e:
            problems.append(str(e))
        try:
            route = read_route(self._state, rollout.name)
            absent = route is None and self._state.root.is_dir()
        except StateError as e:
            problems.append(str(e))
        arms = _arms(status, route)
        try:
            admin = EnvoyAdmin(admin_port(self._state))
            live = admin.live_route(rollout.name)
            counters = admin.counters(arms) if arms else {}
        except StateError as e:
            problems.append(str(e))
        look, cursor = self._look(rollout, status, counters, live, now, problems)
        declared, managed = self._objects(rollout.name)
        evidence, unread, evidence_error = self._evidence.read()
        actions = [a for _, a in read_actions(self._state, rollout.name)]
        problems += [a for a in actions if isinstance(a, str)]
        digest, trained_by = candidate_of(rollout, status)
        approved = approvals.count(read_approvals(self._state), digest, trained_by)
        return Observation(
            services=services, declared=declared, managed=managed, route=route, route_absent=absent, live=live, look=look,
            evidence=evidence, evidence_error=evidence_error, evidence_unread=unread,
            approvals=approved.stages, approvals_refused=approved.refused,
            candidate_pods=None if services is None or status.candidate is None else int(status.candidate.service in services),
            actions=tuple(a for a in actions if isinstance(a, UserAction)), problems=tuple(problems), cursor=cursor,
        )

    def _look(
        self, rollout: ModelRollout, status: RolloutStatus, counters: dict[str, ArmCounters] | None, live: LiveRoute | None,
        now: datetime, problems: list[str],
    ) -> tuple[Look | None, dict[str, Any]]:
        """Increments since the cursor, and the cursor after them. No look when counters are unread, new, or began anew."""
        cursor = dict(status.cursor)
        stable, candidate = status.stable, status.candidate
        if counters is None or stable is None or candidate is None:
            return None, cursor
        names = (stable.service, candidate.service)
        old = {n: from_data(cursor.get("counters", {}).get(n)) for n in names}
        started = cursor.get("time")
        cursor["counters"] = {n: c.as_data() for n, c in counters.items() if n in names}
        cursor["time"] = now.isoformat()
        differences, scores_error = self._differences(rollout, status, live, cursor, now)
        stable_now, stable_before = counters.get(names[0]), old[names[0]]
        if stable_now is None or stable_before is None or not isinstance(started, str):
            return None, cursor
        # A candidate that the gateway doesn't know (before its start, after a rollback) has no requests: that is known, not unknown.
        none = ArmCounters("", 0, 0, 0, 0, {})
        candidate_now, candidate_before = counters.get(names[1]), old[names[1]]
        if candidate_now is None:
            candidate_now = candidate_before = none
        if candidate_before is None:
            return None, cursor
        if was_reset(stable_before, stable_now) or was_reset(candidate_before, candidate_now):
            problems.append("counters began anew at the gateway; this look is left out for both arms")
            return None, cursor
        arms = ((stable_before, stable_now), (candidate_before, candidate_now))
        gates = {g.name: _gate_look(g, arms, differences, scores_error) for g in rollout.spec.gates}
        look = Look(
            datetime.fromisoformat(started), now, gates, routed_stable=stable_now.completed - stable_before.completed,
            routed_candidate=candidate_now.completed - candidate_before.completed,
            # Attempts too: a request whose every attempt failed is one that reached it.
            candidate_requests=max(
                candidate_now.completed - candidate_before.completed,
                candidate_now.success + candidate_now.error - candidate_before.success - candidate_before.error),
        )
        return look, cursor

    def _differences(
        self, rollout: ModelRollout, status: RolloutStatus, live: LiveRoute | None, cursor: dict[str, Any], now: datetime,
    ) -> tuple[tuple[float, ...], str]:
        """New score differences: of pairs while the candidate gets copies, across the arms while it gets live traffic."""
        stable, candidate = status.stable, status.candidate
        reading = self._scores.choose(rollout.name, rollout, status, live)
        if stable is None or candidate is None or reading is None:
            cursor.pop("log", None)
            return (), ""
        try:
            differences, after = reading.reader.read(
                self._state.log(stable.service), self._state.log(candidate.service), candidate.digest, reading.cursor,
                now)
        except OnlyAhead as e:
            cursor["log"] = e.cursor
            return (), str(e)
        except StateError as e:
            return (), str(e)
        cursor["log"] = after
        return differences, ""

    def _objects(self, rollout: str) -> tuple[frozenset[str], frozenset[str]]:
        """Names of all wanted InferenceServices, and of those that this rollout made."""
        declared: set[str] = set()
        managed: set[str] = set()
        for path in self._state.objects.glob("InferenceService-*.yaml"):
            name = path.stem.removeprefix("InferenceService-")
            declared.add(name)
            if self._owner(path) == rollout:
                managed.add(name)
        return frozenset(declared), frozenset(managed)

    def _owner(self, path: Path) -> str:
        """The rollout that made the object; '' for a person's. Cached by the file's time, since objects seldom change."""
        try:
            stamp = path.stat().st_mtime_ns
            known = self._labels.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            labels = data["metadata"].get("labels") or {}
            owner = str(labels.get(ROLLOUT_LABEL, "")) if labels.get(MANAGED_BY_LABEL) == MANAGER else ""
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            return ""
        self._labels[path] = (stamp, owner)
        return owner

    # --- acting ---------------------------------------------------------------------------------------------------------------

    def apply(self, rollout: ModelRollout, action: Action) -> None:
        """Does one action. Raises OSError or HafniumError when it can't; it is then asked for again at the next look."""
        match action:
            case EnsureCandidate():
                text = yaml.safe_dump(inference_service(rollout, action.model, action.template), sort_keys=False)
                write_atomically(self._state.service(action.model.service), text)
            case SetShadow():
                self._route(rollout.name, action.stable, action.candidate, 0, shadow=True)
            case SetWeight():
                self._route(rollout.name, action.stable, action.candidate, action.weight, shadow=False)
            case Promote():
                self._route(rollout.name, action.service, None, 0, shadow=False)
            case Rollback():
                self._route(rollout.name, action.stable, None, 0, shadow=False)
            case RetireService():
                path = self._state.service(action.service)
                if self._owner(path) == rollout.name:
                    path.unlink(missing_ok=True)
            case LowerPods():
                pass  # a process each: nothing was raised

    def _route(self, name: str, stable: str, candidate: str | None, weight: int, *, shadow: bool) -> None:
        if candidate is not None and weight == 0 and not shadow:
            candidate = None
        data = {"name": name, "stable": stable, "candidate": candidate, "weight": weight, "shadow": shadow}
        write_atomically(self._state.route(name), json.dumps(data, indent=1))

    def stable_only(self, name: str, stable: str) -> None:
        """The route `name` goes to its stable service alone, for a rollout whose object is gone."""
        self._route(name, stable, None, 0, shadow=False)

    def managed(self, rollout: str) -> frozenset[str]:
        """InferenceServices that this rollout made."""
        return self._objects(rollout)[1]

    def forget_actions(self, rollout: str, handled: Sequence[str]) -> None:
        """Removes the files of actions that the status says are handled."""
        for path, action in read_actions(self._state, rollout):
            if isinstance(action, UserAction) and action.id in handled:
                path.unlink(missing_ok=True)


def _arms(status: RolloutStatus, route: RouteSeen | None) -> list[str]:
    names = {m.service for m in (status.stable, status.candidate) if m is not None}
    return sorted(names | ({route.stable} if route is not None else set[str]()))


def _gate_look(gate: Gate, arms: Arms, differences: tuple[float, ...], scores_error: str) -> GateLook:
    if gate.kind == "prometheus":
        return GateLook(error="a prometheus gate needs a cluster; on one machine use requests or latency")
    return gate_look(gate, arms, differences, scores_error)


def _named(value: Any, service: str) -> Any:
    """A copy with the service's name filled in."""
    if isinstance(value, str):
        return value.replace(SERVICE_PLACEHOLDER, service)
    if isinstance(value, dict):
        return {k: _named(v, service) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_named(v, service) for v in cast("list[Any]", value)]
    return value


def inference_service(rollout: ModelRollout, model: ModelSeen, template: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate's InferenceService: the template, the bundle's place, and labels that say whose it is.

    `${HAFNIUM_SERVICE}` in any text of the template is the service's name: what scales it by a query has to name its pods.
    """
    spec = cast("dict[str, Any]", _named(dict(template), model.service))
    predictor = spec.get("predictor")
    if not isinstance(predictor, dict):
        raise HafniumError("spec.service: expected an InferenceServiceSpec with `predictor`")
    served = cast("dict[str, Any]", predictor).get("model")
    if isinstance(served, dict):
        served["storageUri"] = model.storage_uri
    metadata: dict[str, Any] = {
        "name": model.service,
        "labels": {
            DIGEST_LABEL: model.digest.removeprefix("sha256:")[:8], VERSION_LABEL: model.version,
            MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: rollout.name,
        },
    }
    annotations = {k: v for k, v in rollout.metadata.annotations.items() if k.startswith(LOCAL_ANNOTATIONS)}
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": metadata, "spec": spec}
