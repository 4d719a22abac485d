"""Looks from Prometheus: what each gate of a rollout saw between two evaluations.

All of a look is evaluated at one time, by Prometheus' clock: counters of both arms' pods (pod_counters.py) and the queries of
`prometheus` gates. Such a query gives one number and may use `$service`, `$namespace` and `$window`: with `$window` it is an increase
over the time since the last look, without it is a running total and the operator takes the difference (`sum(x{service="$service"})`),
which is exact as long as no series goes or begins anew: one number can't tell (docs/rollouts.md has a query for pods that come and go).
What can't be read is the gate's error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

from hafnium_contract.metric_names import REQUESTS
from hafnium_rollout.arm_looks import Arms, gate_look
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.kubernetes import traffic_split
from hafnium_rollout.kubernetes.objects_seen import PodSeen
from hafnium_rollout.kubernetes.pod_counters import FAMILIES, ArmIncrease, PodCounters, Pods, by_pod, from_data, increase
from hafnium_rollout.kubernetes.prometheus_client import Prometheus, PrometheusError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Counts, GateLook, Look, Series
from hafnium_rollout.status import RolloutStatus

PODS_MAX = 400
"""Pods of both arms: their names are in the query."""
_STALE_SCRAPES = 4


@dataclass(frozen=True, slots=True)
class LookMade:
    """`look` None: nothing new, or nothing that could be judged; `problems` says what isn't as it should be."""

    look: Look | None
    cursor: dict[str, Any]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """New score differences of this look."""

    differences: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Reading:
    """Both arms at one evaluation."""

    at: float
    pods: Mapping[str, PodCounters]
    doubled: Mapping[str, str] = field(default_factory=dict[str, str])
    """Pods whose counts aren't known though they are scraped, and why."""
    totals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Per `prometheus` gate: {"stable": [bad, total], "candidate": …} or {"error": text}."""


class PrometheusLooks:
    """Makes looks for any rollout. Holds nothing: where to go on is in the cursor. `prometheus` None: there is none."""

    def __init__(self, prometheus: Prometheus | None, *, scrape_interval_s: float, clock_skew_s_max: float) -> None:
        self._prometheus = prometheus
        self._scrape_s, self._skew_s_max = scrape_interval_s, clock_skew_s_max

    def look(
        self, rollout: ModelRollout, namespace: str, status: RolloutStatus, pods: Mapping[str, Sequence[PodSeen]], now: datetime,
        scores: Scores = Scores(),
    ) -> LookMade:
        """What happened since the cursor of the status. `pods`: those that requests come in at, per service."""
        stable, candidate = status.stable, status.candidate
        if stable is None or candidate is None:
            return LookMade(None, dict(status.cursor))
        arms = (stable.service, candidate.service)
        if self._prometheus is None:
            return self._without(rollout, status, now)
        try:
            reading = self._read(self._prometheus, rollout, namespace, arms, pods, status, now)
        except PrometheusError as e:
            return LookMade(None, dict(status.cursor), (str(e),))
        before = dict(status.cursor)
        unread = _unread_since(before, [p for service in arms for p in pods.get(service, ())], reading)
        cursor = {**before, **_as_cursor(reading, arms, pods), "unread": unread}
        if before.get("arms") != list(arms) or not isinstance(before.get("at"), int | float):
            return LookMade(None, cursor)
        increases = tuple(
            increase(_pods_before(before, arm), reading.pods, [p.name for p in pods.get(service, ())])
            for arm, service in zip(("stable", "candidate"), arms, strict=True))
        waits = next((i.waits for i in increases if i.waits), "")
        if waits:
            return LookMade(None, before, self._stale(reading, waits))
        reset = next((i.reset for i in increases if i.reset), "")
        if reset:
            return LookMade(None, cursor, (f"counters of pod {reset} began anew; this look is left out for both arms",))
        overdue = {name for name, since in unread.items() if reading.at - since > _STALE_SCRAPES * self._scrape_s}
        unseen = [_unseen(service, pods.get(service, ()), reading, overdue) for service in arms]
        if status.rollback is not None and unseen[1]:
            return LookMade(None, cursor, (f"it isn't known whether requests still reach the candidate: {unseen[1]}",))
        look = self._made(rollout, before, reading, increases, unseen, scores)
        wholes = [
            not unseen[i] and increases[i].whole and all(p.name in reading.pods for p in pods.get(service, ()) if p.ready)
            for i, service in enumerate(arms)]
        if wholes[1] and arms[1] in pods:  # a service that wasn't looked for has no count either
            look = replace(look, candidate_requests=increases[1].requests)
        portion, routed = self._split(status, before, look, increases if all(wholes) else None)
        if portion is not None:
            cursor["split"] = portion.as_data()
        else:
            cursor.pop("split", None)
        if routed is not None:
            look = replace(look, routed_stable=routed[0], routed_candidate=routed[1])
        return LookMade(look, cursor)

    def _split(
        self, status: RolloutStatus, before: Mapping[str, Any], look: Look, increases: tuple[ArmIncrease, ...] | None,
    ) -> tuple[traffic_split.Portion | None, tuple[float, float] | None]:
        """Requests per arm for the sample-ratio check, once there are enough of them at one weight."""
        step = status.step
        effective = step.weight_effective_since if step is not None else None
        if step is None or effective is None or look.started < effective:
            return None, None
        counts = (increases[0].requests, increases[1].requests) if increases is not None else None
        return traffic_split.add(
            traffic_split.from_data(before.get("split")), f"{step.index}@{effective.isoformat()}", look.started.timestamp(),
            look.ended.timestamp(), counts, (step.weight_observed or 0) / 100.0, self._scrape_s)

    def _made(
        self, rollout: ModelRollout, before: Mapping[str, Any], reading: _Reading, increases: tuple[ArmIncrease, ...],
        unseen: Sequence[str], scores: Scores,
    ) -> Look:
        counters: Arms = (increases[0].counters(), increases[1].counters())
        error = next((u for u in unseen if u), "")
        gates: dict[str, GateLook] = {}
        for gate in rollout.spec.gates:
            if gate.kind == "prometheus":
                gates[gate.name] = _query_look(gate, before, reading)
            elif gate.counted or gate.kind == "scores":
                gates[gate.name] = GateLook(error=error) if error else gate_look(gate, counters, scores.differences, scores.error)
            else:
                gates[gate.name] = GateLook()
        starts = [i.started for i in increases if i.started is not None]
        begun = min([float(before["at"]), *starts])
        return Look(datetime.fromtimestamp(begun, UTC), datetime.fromtimestamp(reading.at, UTC), gates)

    def _without(self, rollout: ModelRollout, status: RolloutStatus, now: datetime) -> LookMade:
        """No Prometheus: looks exist, so that evidence of jobs can decide, but nothing was counted in them."""
        started = status.cursor.get("at")
        cursor = {**status.cursor, "at": now.timestamp()}
        if not isinstance(started, int | float):
            return LookMade(None, cursor)
        none = GateLook(error="the operator has no Prometheus to ask (--prometheus_url)")
        gates = {g.name: none if g.counted or g.kind == "scores" else GateLook() for g in rollout.spec.gates}
        return LookMade(Look(datetime.fromtimestamp(started, UTC), now, gates), cursor)

    def _read(
        self, prometheus: Prometheus, rollout: ModelRollout, namespace: str, arms: tuple[str, str],
        pods: Mapping[str, Sequence[PodSeen]], status: RolloutStatus, now: datetime,
    ) -> _Reading:
        names = sorted({p.name for service in arms for p in pods.get(service, ())})
        if len(names) > PODS_MAX:
            raise PrometheusError(f"{len(names)} pods in both arms; counters of at most {PODS_MAX} can be asked for")
        clock = prometheus.query("time()")
        if abs(clock.at - now.timestamp()) > self._skew_s_max + 1.0:
            raise PrometheusError(
                f"Prometheus' clock is {clock.at - now.timestamp():+.0f} s off ours (at most {self._skew_s_max:g} s): it can't be said "
                "whether its counts are from before or after a weight")
        found = Pods({}, {})
        if names:
            where = f'namespace="{namespace}",pod=~"{"|".join(re.escape(n).replace(chr(92), chr(92) * 2) for n in names)}"'
            # Times first: a scrape that is stored in between then only makes a look seem to begin earlier than it did.
            scraped = prometheus.query(f"timestamp({REQUESTS.name}{{{where}}})", clock.at)
            values = prometheus.query(f'{{__name__=~"{"|".join(FAMILIES)}",{where}}}', clock.at)
            found = by_pod(values.samples, scraped.samples)
        totals = {g.name: self._totals(prometheus, g, namespace, arms, status, clock.at) for g in rollout.spec.gates if g.prometheus}
        return _Reading(clock.at, found.counters, found.doubled, totals)

    def _totals(
        self, prometheus: Prometheus, gate: Gate, namespace: str, arms: tuple[str, str], status: RolloutStatus, at: float,
    ) -> Mapping[str, Any]:
        assert gate.prometheus is not None  # noqa: S101 - the caller chose it
        last = status.cursor.get("at")
        window_s = at - last if isinstance(last, int | float) and last < at else self._scrape_s * _STALE_SCRAPES
        out: dict[str, Any] = {}
        try:
            for arm, service in zip(("stable", "candidate"), arms, strict=True):
                texts = (gate.prometheus.bad, gate.prometheus.total)
                out[arm] = [_one(prometheus, filled(text, namespace, service, window_s), at) for text in texts]
        except PrometheusError as e:
            return {"error": str(e)}
        return out

    def _stale(self, reading: _Reading, pod: str) -> tuple[str, ...]:
        age = reading.at - reading.pods[pod].scraped_at
        if age <= _STALE_SCRAPES * self._scrape_s:
            return ()
        return (f"the last scrape of pod {pod} is {age:.0f} s old; is Prometheus still scraping it?",)


def filled(query: str, namespace: str, service: str, window_s: float) -> str:
    """A gate's query for one arm."""
    return query.replace("$service", service).replace("$namespace", namespace).replace("$window", f"{max(1, round(window_s))}s")


def _one(prometheus: Prometheus, expression: str, at: float) -> float:
    samples = prometheus.query(expression, at).samples
    if len(samples) != 1:
        hint = "nothing; write `or vector(0)` where nothing means zero" if not samples else f"{len(samples)} series; sum them"
        raise PrometheusError(f"query {expression!r} gives {hint}")
    if samples[0].value < 0:
        raise PrometheusError(f"query {expression!r} gives {samples[0].value:g}, which is no count")
    return samples[0].value


def _query_look(gate: Gate, before: Mapping[str, Any], reading: _Reading) -> GateLook:
    """Increase of a gate's own queries."""
    assert gate.prometheus is not None  # noqa: S101 - the caller chose it
    now = reading.totals.get(gate.name, {})
    if "error" in now:
        return GateLook(error=str(now["error"]))
    then = cast("Mapping[str, Any]", before.get("totals") or {}).get(gate.name)
    counts: list[Counts] = []
    for arm in ("stable", "candidate"):
        values: list[float] = []
        for i, text in enumerate((gate.prometheus.bad, gate.prometheus.total)):
            value = float(now[arm][i])
            if "$window" not in text:
                try:
                    old = float(cast("Any", then)[arm][i])
                except (KeyError, IndexError, TypeError, ValueError):
                    return GateLook(error="the first reading; the next look has a difference")
                if value < old:
                    return GateLook(error=f"the running total of {arm} fell from {old:g} to {value:g}: counters began anew")
                value -= old
            values.append(value)
        counts.append(Counts(min(values), values[1]))
    return GateLook((Series(counts[0], counts[1]),))


def _unread_since(before: Mapping[str, Any], pods: Sequence[PodSeen], reading: _Reading) -> dict[str, float]:
    """Ready pods that Prometheus doesn't know, and since when: a new one gets its time, one that is never scraped hides behind none."""
    known = before.get("unread")
    kept = cast("Mapping[str, Any]", known) if isinstance(known, dict) else {}
    return {
        p.name: float(since) if isinstance(since := kept.get(p.name), int | float) else reading.at
        for p in pods if p.ready and p.name not in reading.pods and p.name not in reading.doubled}


def _unseen(service: str, pods: Sequence[PodSeen], reading: _Reading, overdue: Set[str]) -> str:
    """Why not enough is known about a service that has ready pods; empty when it is. `overdue`: who should have been scraped by now."""
    twice = next((reading.doubled[p.name] for p in pods if p.name in reading.doubled), "")
    if twice:
        return f"{twice}; its requests would be counted twice: let one scrape job have it"
    ready = [p.name for p in pods if p.ready]
    lost = [n for n in ready if n in overdue]
    if not ready or (any(p.name in reading.pods for p in pods) and not lost):
        return ""
    named = ", ".join((lost or ready)[:3])
    return f"Prometheus has no {REQUESTS.name} of {service} (pods {named}); are they scraped (prometheus.io/scrape)?"


def _as_cursor(reading: _Reading, arms: tuple[str, str], pods: Mapping[str, Sequence[PodSeen]]) -> dict[str, Any]:
    out: dict[str, Any] = {"at": reading.at, "arms": list(arms), "totals": {k: dict(v) for k, v in reading.totals.items()}}
    for arm, service in zip(("stable", "candidate"), arms, strict=True):
        out[arm] = {p.name: reading.pods[p.name].as_data() for p in pods.get(service, ()) if p.name in reading.pods}
    return out


def _pods_before(cursor: Mapping[str, Any], arm: str) -> dict[str, PodCounters]:
    found = cursor.get(arm)
    if not isinstance(found, dict):
        return {}
    parsed = {str(k): from_data(v) for k, v in cast("dict[str, Any]", found).items()}
    return {k: v for k, v in parsed.items() if v is not None}


def query_problems(prometheus: Prometheus, rollout: ModelRollout, namespace: str) -> tuple[str, ...]:
    """What is wrong with the queries of a rollout's gates, found before they are needed. Raises PrometheusError."""
    out: list[str] = []
    for gate in rollout.spec.gates:
        if gate.prometheus is None:
            continue
        for name, text in (("bad", gate.prometheus.bad), ("total", gate.prometheus.total)):
            if "$service" not in text:
                out.append(f"gate {gate.name}: prometheus.{name} lacks $service, so it can't tell the arms apart")
            problem = prometheus.problem_of(filled(text, namespace, "some-service", 60.0))
            if problem:
                out.append(f"gate {gate.name}: prometheus.{name}: {problem}")
    return tuple(out)
