"""Every Prometheus metric of Hafnium, declared once. Servers register from here, rules and dashboards are tested against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Dense around the owners' thresholds (p95 50 ms, p99 100 ms): a share slower than 100 ms is read without interpolation."""
SCORE_BUCKETS = tuple(round(i / 20, 2) for i in range(1, 21))


@dataclass(frozen=True)
class Metric:
    """One family. `name` as scraped: counters end in _total, units are base units."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    across: Literal["max", "livemax", "mostrecent", "livesum"] = "max"
    """Of a gauge: what several workers' values are together. `live`: of those that live."""


_MODEL = ("component", "model_name", "model_version")

REQUESTS = Metric("inference_requests_total", "counter", "Requests answered, whatever the answer", _MODEL)
ERRORS = Metric(
    "inference_errors_total", "counter", "Requests answered with an error, or by a batch without any score, by type", (*_MODEL, "type"))
ROW_ERRORS = Metric("inference_row_errors_total", "counter", "Rows of batches that failed, by type of their error", (*_MODEL, "type"))
DURATION = Metric("inference_duration_seconds", "histogram", "Time from request to answer", _MODEL, LATENCY_BUCKETS_S)
PREDICTIONS = Metric("model_predictions_total", "counter", "Scores by outcome", ("model_name", "model_version", "outcome"))
PREDICTION_LATENCY = Metric(
    "model_prediction_latency_seconds", "histogram", "Time inside the model", ("model_name", "model_version"),
    (0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1),
)
SCORE = Metric("model_score", "histogram", "Scores given", ("model_name", "model_version"), SCORE_BUCKETS)
FEATURE_LOOKUP = Metric("feature_lookup_seconds", "histogram", "Time of a feature lookup", ("model_name",), LATENCY_BUCKETS_S)
FEATURE_LOOKUP_FAILURES = Metric(
    "feature_lookup_failures_total", "counter",
    "Lookups without an answer: unavailable, deadline, overloaded; not_asked: the store is left alone; hurry: the caller's own deadline",
    ("model_name", "type"))
FEATURE_STALENESS = Metric(
    "feature_staleness_seconds", "gauge", "Age of the values last read from a view, now", ("view",), across="mostrecent",
)
FEATURE_MISSING = Metric("feature_missing_total", "counter", "Values that were missing or too old", ("model_name", "feature_name"))
FEATURE_ROWS = Metric(
    "feature_rows_total", "counter", "Rows scored, or refused for want of a value: what feature_missing_total is a share of",
    ("model_name",))
CLIENTS = Metric("inference_clients", "gauge", "Clients that asked in the last whole minute", across="livesum")
ACTIVE = Metric(
    "inference_active", "gauge", "Processes of a transformer with a contract in force; 0: it waits for predictor or store since its start",
    across="livesum")
CLIENT_ROWS_MAX = Metric(
    "inference_client_rows_max", "gauge", "Rows that the busiest client asked for in the last whole minute", across="livemax")
LOG_DROPPED = Metric("inference_log_dropped_total", "counter", "Rows that the inference log had no room for", ("reason",))
LOG_WRITTEN = Metric("inference_log_rows_total", "counter", "Rows written to the inference log", ())
SPANS_DROPPED = Metric("trace_spans_dropped_total", "counter", "Spans that did not reach the collector", ("reason",))
MODEL_INFO = Metric(
    "model_info", "gauge", "1 for the model that is loaded", ("model_name", "model_version", "model_digest", "contract_digest")
)

_ROLLOUT = ("namespace", "rollout")

ROLLOUT_INFO = Metric(
    "modelrollout_info", "gauge", "1 for a ModelRollout, with the models that it is about",
    (*_ROLLOUT, "backend", "stable_service", "stable_version", "stable_digest", "candidate_version", "candidate_digest"))
ROLLOUT_PHASE = Metric("modelrollout_phase", "gauge", "1 for the phase that the rollout is in, 0 for the others", (*_ROLLOUT, "phase"))
ROLLOUT_WEIGHT = Metric(
    "modelrollout_weight", "gauge", "Percent of live answers for the candidate: desired, and observed at the gateway", (*_ROLLOUT, "kind"))
ROLLOUT_GATE_VERDICT = Metric(
    "modelrollout_gate_verdict", "gauge", "1 for the gate's verdict, 0 for the others", (*_ROLLOUT, "gate", "role", "verdict"))
ROLLOUT_GATE_SAMPLES = Metric(
    "modelrollout_gate_samples", "gauge", "Candidate requests, pairs or rows that the gate rests on", (*_ROLLOUT, "gate"))
ROLLOUT_GATE_STATISTIC = Metric("modelrollout_gate_statistic", "gauge", "ln of the gate's e-value", (*_ROLLOUT, "gate"))
ROLLOUT_GATE_BOUND = Metric(
    "modelrollout_gate_bound", "gauge", "Bounds of candidate − stable at the gate's alpha", (*_ROLLOUT, "gate", "bound"))
ROLLOUT_BLIND = Metric("modelrollout_blind_seconds", "gauge", "Since when a Safety gate has no data; 0 while it has", (*_ROLLOUT, "gate"))
ROLLBACK_LATENCY = Metric(
    "modelrollout_rollback_latency_seconds", "histogram", "Time from the verdict until counters show that no request reaches the candidate",
    _ROLLOUT, (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0))
ROLLBACK_UNCONFIRMED = Metric(
    "modelrollout_rollback_unconfirmed_seconds", "gauge", "Since when a rollback is asked for and not seen to be done; 0 while none is",
    _ROLLOUT)
EXTERNAL_CHANGES = Metric("modelrollout_external_change_total", "counter", "Times that somebody else changed the route", _ROLLOUT)
RECONCILE_ERRORS = Metric(
    "modelrollout_reconcile_errors_total", "counter", "Turns that ended in an error; of all rollouts, or of one", (*_ROLLOUT, "type"))
FAILING = Metric(
    "modelrollout_failing_seconds", "gauge",
    "Since when each turn has ended in an error: of all rollouts, or of one that is under way; 0: the last did not", _ROLLOUT)
RECORD_LOST = Metric(
    "modelrollout_record_lost_total", "counter", "Turns that are missing in the record: its volume was slow or full", _ROLLOUT)
EVIDENCES = Metric("modelrollout_evidences", "gauge", "ModelEvidence objects that were there at the last look", ("namespace",))
EVIDENCE_SURPLUS = Metric(
    "modelrollout_evidence_surplus", "gauge", "Those of them that nothing needs and that are still to be removed", ("namespace",))
EVIDENCE_REMOVED = Metric("modelrollout_evidence_removed_total", "counter", "ModelEvidence that the operator removed", ("namespace",))
EVIDENCE_REMOVAL_ERRORS = Metric(
    "modelrollout_evidence_removal_errors_total", "counter", "Times that removing ModelEvidence failed, by type", ("type",))
ROLLOUT_LEADER = Metric("modelrollout_leader", "gauge", "1 while this process leads and writes")

ALL = (
    REQUESTS, ERRORS, ROW_ERRORS, DURATION, PREDICTIONS, PREDICTION_LATENCY, SCORE, FEATURE_LOOKUP, FEATURE_LOOKUP_FAILURES,
    FEATURE_STALENESS, FEATURE_MISSING, FEATURE_ROWS, ACTIVE, CLIENTS, CLIENT_ROWS_MAX, LOG_DROPPED, LOG_WRITTEN, SPANS_DROPPED, MODEL_INFO,
    ROLLOUT_INFO, ROLLOUT_PHASE, ROLLOUT_WEIGHT, ROLLOUT_GATE_VERDICT, ROLLOUT_GATE_SAMPLES, ROLLOUT_GATE_STATISTIC, ROLLOUT_GATE_BOUND,
    ROLLOUT_BLIND, ROLLBACK_LATENCY, ROLLBACK_UNCONFIRMED, EXTERNAL_CHANGES, RECONCILE_ERRORS, FAILING, RECORD_LOST,
    ROLLOUT_LEADER,
    EVIDENCES, EVIDENCE_SURPLUS, EVIDENCE_REMOVED, EVIDENCE_REMOVAL_ERRORS,
)
