"""The operator's metrics, drawn from the last statuses at each scrape: a rollout that is gone leaves no series behind.

While this process doesn't lead it knows nothing, and says nothing but that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hafnium_contract import metric_names as names
from hafnium_rollout.kubernetes.snapshot import Key
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.status import GateStatus, RolloutStatus

PHASES = ("Pending", "Progressing", "Paused", "Promoted", "RolledBack")
VERDICTS = ("Pass", "Fail", "Inconclusive", "NoData", "Error")


class Metrics(Collector):
    """Statuses in, exposition out. Safe between threads."""

    def __init__(self, now: Callable[[], datetime], record_lost: Callable[[], Mapping[Key, int]] = dict[Key, int]) -> None:
        """`record_lost`: turns that are missing in the record, per rollout that has one."""
        self._now, self._record_lost = now, record_lost
        self._lock = threading.Lock()
        self._seen: dict[Key, tuple[ModelRollout, RolloutStatus]] = {}
        self._leads = False
        self._errors: dict[tuple[str, str, str], int] = {}
        self._failing: dict[Key, datetime] = {}
        """Since when each turn has ended in an error. ("", ""): the list of all."""
        self._external: dict[Key, int] = {}
        self._evidences: Mapping[str, int] = {}
        self._surplus: Mapping[str, int] = {}
        self._removed: dict[tuple[str, ...], int] = {}
        self._removal_errors: dict[tuple[str, ...], int] = {}
        self._rollbacks: dict[Key, list[float]] = {}
        """Per rollout: how many within each bucket, then how many in all, then their sum."""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def leads(self, value: bool) -> None:
        with self._lock:
            self._leads = value
            if not value:
                self._seen.clear()
                self._failing.clear()
                self._evidences = self._surplus = {}

    def turned(self, key: Key, rollout: ModelRollout | None, status: RolloutStatus | None, error: str, external: int,
               rollback_s: float | None) -> None:
        """What one turn came to."""
        with self._lock:
            if rollout is not None and status is not None:
                self._seen[key] = (rollout, status)
                self._external[key] = self._external.get(key, 0) + external  # with 0 too: the series begins before its first event
            if error:
                self._errors[(*key, error)] = self._errors.get((*key, error), 0) + 1
                known = status or (self._seen[key][1] if key in self._seen else None)
                if known is None or known.step is not None or known.rollback is not None:  # at rest nobody needs to be guarded
                    self._failing.setdefault(key, self._now())
            else:
                self._failing.pop(key, None)
            if rollback_s is not None:
                bounds = names.ROLLBACK_LATENCY.buckets
                counts = self._rollbacks.setdefault(key, [0.0] * (len(bounds) + 2))
                for i, bound in enumerate(bounds):
                    counts[i] += rollback_s <= bound
                counts[-2] += 1
                counts[-1] += rollback_s

    def failed(self, error: str) -> None:
        """An error of the whole turn, of no rollout in particular."""
        with self._lock:
            self._errors[("", "", error)] = self._errors.get(("", "", error), 0) + 1
            self._failing.setdefault(("", ""), self._now())

    def listed(self) -> None:
        """All rollouts were there to be looked at: what had failed of the whole turn is over."""
        with self._lock:
            self._failing.pop(("", ""), None)

    def evidence(self, there: Mapping[str, int], surplus: Mapping[str, int]) -> None:
        """ModelEvidence by namespace, as the last look found them."""
        with self._lock:
            self._evidences, self._surplus = there, surplus

    def evidence_removed(self, namespace: str) -> None:
        with self._lock:
            self._removed[(namespace,)] = self._removed.get((namespace,), 0) + 1

    def evidence_not_removed(self, error: str) -> None:
        with self._lock:
            self._removal_errors[(error,)] = self._removal_errors.get((error,), 0) + 1

    def keep(self, alive: set[Key]) -> None:
        """Forgets rollouts that are gone."""
        with self._lock:
            self._seen = {k: v for k, v in self._seen.items() if k in alive}
            self._external = {k: v for k, v in self._external.items() if k in alive}
            self._rollbacks = {k: v for k, v in self._rollbacks.items() if k in alive}
            self._failing = {k: v for k, v in self._failing.items() if k in alive or k == ("", "")}
            self._errors = {k: v for k, v in self._errors.items() if k[:2] in alive or k[:2] == ("", "")}

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            seen, leads = dict(self._seen), self._leads
            errors, external, failing = dict(self._errors), dict(self._external), dict(self._failing)
            rollbacks = {k: list(v) for k, v in self._rollbacks.items()}
            evidences, surplus = self._evidences, self._surplus
            removed, removal_errors = dict(self._removed), dict(self._removal_errors)
        now = self._now()
        families = {m.name: GaugeMetricFamily(m.name, m.help, labels=m.labels) for m in (
            names.ROLLOUT_INFO, names.ROLLOUT_PHASE, names.ROLLOUT_WEIGHT, names.ROLLOUT_GATE_VERDICT, names.ROLLOUT_GATE_SAMPLES,
            names.ROLLOUT_GATE_STATISTIC, names.ROLLOUT_GATE_BOUND, names.ROLLOUT_BLIND, names.ROLLOUT_LEADER,
            names.ROLLBACK_UNCONFIRMED, names.FAILING, names.EVIDENCES, names.EVIDENCE_SURPLUS)}
        families[names.ROLLOUT_LEADER.name].add_metric([], 1.0 if leads else 0.0)
        for key, (rollout, status) in sorted(seen.items()):
            _add(families, key, rollout, status, now)
        for key in sorted({("", ""), *seen, *failing} if leads else failing):
            families[names.FAILING.name].add_metric(key, max(0.0, (now - failing.get(key, now)).total_seconds()))
        for namespace, count in sorted(evidences.items()):
            families[names.EVIDENCES.name].add_metric([namespace], count)
            families[names.EVIDENCE_SURPLUS.name].add_metric([namespace], surplus.get(namespace, 0))
        yield from families.values()
        yield _counter(names.EXTERNAL_CHANGES, external)
        yield _counter(names.RECONCILE_ERRORS, errors)
        yield _counter(names.RECORD_LOST, self._record_lost())
        yield _counter(names.EVIDENCE_REMOVED, removed)
        yield _counter(names.EVIDENCE_REMOVAL_ERRORS, removal_errors)
        latency = HistogramMetricFamily(names.ROLLBACK_LATENCY.name, names.ROLLBACK_LATENCY.help, labels=names.ROLLBACK_LATENCY.labels)
        for key, counts in sorted(rollbacks.items()):
            buckets = [(f"{b:g}", n) for b, n in zip(names.ROLLBACK_LATENCY.buckets, counts, strict=False)]
            latency.add_metric(key, [*buckets, ("+Inf", counts[-2])], counts[-1])
        yield latency


def _counter(metric: names.Metric, values: Mapping[tuple[str, ...], int]) -> CounterMetricFamily:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family


def _add(families: dict[str, GaugeMetricFamily], key: Key, rollout: ModelRollout, status: RolloutStatus, now: datetime) -> None:
    def put(metric: names.Metric, value: float, *labels: str) -> None:
        families[metric.name].add_metric([*key, *labels], value)

    stable, candidate = status.stable, status.candidate
    backend = rollout.spec.routing.backend or "PairedServices"
    # With KServe's canary all models are revisions of one InferenceService, and `stable.service` names an arm
    service = "" if stable is None else rollout.name if backend == "CanaryTrafficPercent" else stable.service
    put(names.ROLLOUT_INFO, 1.0, backend, service,
        *((stable.version, stable.digest) if stable else ("", "")), *((candidate.version, candidate.digest) if candidate else ("", "")))
    for phase in PHASES:
        put(names.ROLLOUT_PHASE, float(phase == status.phase), phase)
    step = status.step
    wanted = step.weight_desired if step is not None and status.rollback is None else 0
    put(names.ROLLOUT_WEIGHT, float(wanted), "desired")
    if step is None or step.weight_observed is not None:  # what isn't seen is absent, not zero
        put(names.ROLLOUT_WEIGHT, float(step.weight_observed or 0) if step is not None else 0.0, "observed")
    asked = status.rollback.requested_at if status.rollback is not None else now
    put(names.ROLLBACK_UNCONFIRMED, max(0.0, (now - asked).total_seconds()))
    for gate in status.gates:
        for verdict in VERDICTS:
            put(names.ROLLOUT_GATE_VERDICT, float(verdict == gate.verdict), gate.name, gate.role, verdict)
        put(names.ROLLOUT_GATE_SAMPLES, float(gate.samples), gate.name)
        put(names.ROLLOUT_GATE_STATISTIC, gate.statistic, gate.name)
        for bound, value in (("lower", gate.lower), ("upper", gate.upper)):
            if value is not None:
                put(names.ROLLOUT_GATE_BOUND, value, gate.name, bound)
        if gate.role == "Safety" and step is not None:
            waits = bool(status.sample_ratio_message) and step.weight_desired == 0  # for a person, not for data
            put(names.ROLLOUT_BLIND, 0.0 if waits else blind_seconds(gate, step.entered_at, now), gate.name)


def blind_seconds(gate: GateStatus, entered_at: datetime, now: datetime) -> float:
    """For how long a gate has had no data; 0 while it has."""
    if gate.verdict not in ("NoData", "Error"):
        return 0.0
    return max(0.0, (now - max(entered_at, gate.state.last_seen_at or entered_at)).total_seconds())
