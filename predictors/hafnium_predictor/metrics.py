"""The predictor's Prometheus series. Children are bound once per model, since looking labels up costs more than counting."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from hafnium_contract import metric_names
from hafnium_contract.bundle import Manifest
from hafnium_contract.metric_names import Metric
from hafnium_contract.serving.bucket_histogram import BucketHistogram

COMPONENT = "predictor"


def _counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)


def _histogram(metric: Metric, registry: CollectorRegistry) -> BucketHistogram:
    return BucketHistogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)


class PredictorMetrics:
    """All series of one process. Until a model is loaded they carry the served name and the version `none`."""

    def __init__(self, served_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._requests = _counter(metric_names.REQUESTS, registry)
        self._errors = _counter(metric_names.ERRORS, registry)
        self._duration = _histogram(metric_names.DURATION, registry)
        self._latency = _histogram(metric_names.PREDICTION_LATENCY, registry)
        info = metric_names.MODEL_INFO
        self._info = Gauge(info.name, info.help, info.labels, registry=registry, multiprocess_mode=info.across)
        self._bind(served_name, "none")

    def _bind(self, model_name: str, model_version: str) -> None:
        self._labels = (COMPONENT, model_name, model_version)
        self.requests = self._requests.labels(*self._labels)
        self.duration = self._duration.labels(*self._labels)
        self.latency = self._latency.labels(model_name, model_version)

    def loaded(self, manifest: Manifest) -> None:
        """A model is loaded: series carry its name and version from now on."""
        self._bind(manifest.model_name, manifest.model_version)
        self._info.labels(manifest.model_name, manifest.model_version, manifest.digest, manifest.contract_digest).set(1)

    def answered(self, seconds: float, error: str | None) -> None:
        """One request was answered. `error`: kind of the error, None for success."""
        self.requests.inc()
        self.duration.observe(seconds)
        if error is not None:
            self._errors.labels(*self._labels, error).inc()
