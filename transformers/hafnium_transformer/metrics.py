"""The transformer's Prometheus series. Children are kept once bound: looking labels up costs more than counting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from hafnium_contract import metric_names
from hafnium_contract.metric_names import Metric
from hafnium_contract.serving.bucket_histogram import BucketHistogram

COMPONENT = "transformer"
LOG_LOSSES = ("queue_full", "write_failed", "shutdown")


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=metric.across)


def _histogram(metric: Metric, registry: CollectorRegistry) -> BucketHistogram:
    return BucketHistogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)


class ModelSeries:
    """Series of one model version."""

    def __init__(self, metrics: TransformerMetrics, model_name: str, model_version: str) -> None:
        self._metrics = metrics
        self._model = (model_name, model_version)
        labels = (COMPONENT, *self._model)
        self.requests = metrics.requests.labels(*labels)
        self.duration = metrics.duration.labels(*labels)
        self._errors: dict[str, Counter] = {}
        self._predictions: dict[str, Counter] = {}

    @cached_property
    def score(self) -> BucketHistogram:
        """Only a model that scored something has this series."""
        return self._metrics.score.labels(*self._model)

    def error(self, kind: str, count: int = 1) -> None:
        """Requests ended with an error of this kind."""
        child = self._errors.get(kind)
        if child is None:
            child = self._errors[kind] = self._metrics.errors.labels(COMPONENT, *self._model, kind)
        child.inc(count)

    def row_errors(self, kind: str, count: int) -> None:
        """Rows of a batch ended with an error of this kind."""
        self._metrics.row_errors.labels(COMPONENT, *self._model, kind).inc(count)

    def predicted(self, scores: Sequence[float], decided: Mapping[str, int]) -> None:
        """Rows were scored: their scores, and how many got which decision."""
        for decision, count in decided.items():
            if count:
                child = self._predictions.get(decision)
                if child is None:
                    child = self._predictions[decision] = self._metrics.predictions.labels(*self._model, decision)
                child.inc(count)
        self.score.observe_all(scores)


class TransformerMetrics:
    """All series of one process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = _counter(metric_names.REQUESTS, registry)
        self.errors = _counter(metric_names.ERRORS, registry)
        self.row_errors = _counter(metric_names.ROW_ERRORS, registry)
        self.duration = _histogram(metric_names.DURATION, registry)
        self.predictions = _counter(metric_names.PREDICTIONS, registry)
        self.score = _histogram(metric_names.SCORE, registry)
        self._lookup = _histogram(metric_names.FEATURE_LOOKUP, registry)
        self._lookup_failures = _counter(metric_names.FEATURE_LOOKUP_FAILURES, registry)
        self._staleness = _gauge(metric_names.FEATURE_STALENESS, registry)
        self._missing = _counter(metric_names.FEATURE_MISSING, registry)
        self._rows = _counter(metric_names.FEATURE_ROWS, registry)
        self._active = _gauge(metric_names.ACTIVE, registry)
        self._clients = _gauge(metric_names.CLIENTS, registry)
        self._client_rows_max = _gauge(metric_names.CLIENT_ROWS_MAX, registry)
        self._dropped = _counter(metric_names.LOG_DROPPED, registry)
        for reason in LOG_LOSSES:
            self._dropped.labels(reason)  # an increase needs the zero before the first loss
        self.log_written = _counter(metric_names.LOG_WRITTEN, registry)
        self._models: dict[tuple[str, str], ModelSeries] = {}
        self._lookups: dict[str, BucketHistogram] = {}
        self._ages: dict[str, Gauge] = {}
        self._missed: dict[tuple[str, str], Counter] = {}
        self._rows_of: dict[str, Counter] = {}
        self._lookup_failed: dict[tuple[str, str], Counter] = {}

    def model(self, model_name: str, model_version: str) -> ModelSeries:
        """Series of a model version, kept. Versions come from bundles, so they are few."""
        found = self._models.get((model_name, model_version))
        if found is None:
            found = self._models[(model_name, model_version)] = ModelSeries(self, model_name, model_version)
        return found

    def looked_up(self, model_name: str, seconds: float) -> None:
        """One lookup took this long."""
        child = self._lookups.get(model_name)
        if child is None:
            child = self._lookups[model_name] = self._lookup.labels(model_name)
        child.observe(seconds)

    def lookup_failed(self, model_name: str, kind: str) -> None:
        """One lookup got no answer: its rows go on without looked-up features."""
        child = self._lookup_failed.get((model_name, kind))
        if child is None:
            child = self._lookup_failed[(model_name, kind)] = self._lookup_failures.labels(model_name, kind)
        child.inc()

    def staleness(self, view: str, seconds: float) -> None:
        """Age of the values just read from a view."""
        child = self._ages.get(view)
        if child is None:
            child = self._ages[view] = self._staleness.labels(view)
        child.set(seconds)

    def missing(self, model_name: str, feature: str) -> None:
        """A row's value was missing, too old or unusable."""
        child = self._missed.get((model_name, feature))
        if child is None:
            child = self._missed[(model_name, feature)] = self._missing.labels(model_name, feature)
        child.inc()

    def rows(self, model_name: str, count: int) -> None:
        """Rows whose missing values are counted, whether or not they had any: a batch of a thousand is a thousand."""
        child = self._rows_of.get(model_name)
        if child is None:
            child = self._rows_of[model_name] = self._rows.labels(model_name)
        child.inc(count)

    def active(self) -> None:
        """There is a contract, and so an answer to requests."""
        self._active.set(1.0)

    def query_volume(self, clients: int, busiest_rows: int) -> None:
        """How many asked in the last minute, and how much the busiest did."""
        self._clients.set(clients)
        self._client_rows_max.set(busiest_rows)

    def log_dropped(self, reason: str, rows: int = 1) -> None:
        """Rows that the inference log lost. `reason`: one of LOG_LOSSES."""
        self._dropped.labels(reason).inc(rows)
