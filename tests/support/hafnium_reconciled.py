"""The real reconciler, client and backends over HTTP, at an API server that keeps objects in memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from hafnium_rollout_world import CANDIDATE, STABLE, rollout
from hafnium_scripted_api import says
from hafnium_small_api import SmallApi, small_api

from hafnium_rollout.companions import Companions
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.kinds import GATEWAY, GATEWAY_CLASS, HTTP_ROUTE, INFERENCE_SERVICE, MODEL_ROLLOUT, POD, Json
from hafnium_rollout.kubernetes.objects_seen import DIGEST_ANNOTATION, route_seen, status_of
from hafnium_rollout.kubernetes.observer import Observer
from hafnium_rollout.kubernetes.paired_backend import PairedBackend
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.prometheus_queries import PrometheusLooks
from hafnium_rollout.kubernetes.reconciler import Reconciler, Turned
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import take
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.status import RolloutStatus

NAMESPACE, NAME, STABLE_SERVICE, SERVICE = "ns", "risk", "risk-bbbbbbbb", "risk-aaaaaaaa"
NOWHERE = "http://127.0.0.1:1"
STEPS = [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]
STRATEGY = {"steps": STEPS, "maxBlindDuration": "30m"}


def meta(name: str, **more: Any) -> Json:
    return {"name": name, "namespace": NAMESPACE, **more}


@dataclass
class Cluster:
    """A rollout whose stable model is live, and an operator's reconciler over it. Time is what the test says."""

    api: SmallApi
    client: KubernetesClient
    companions: Companions | None = None
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    now: datetime = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
    gateway_answers: bool = True

    def __post_init__(self) -> None:
        self.reconciler = self.operator()
        self.api.put(GATEWAY_CLASS, {"metadata": {"name": "class"}, "spec": {"controllerName": "x"}})
        gateway = {"name": "kserve-ingress-gateway", "namespace": "kserve"}
        self.api.put(GATEWAY, {"metadata": gateway, "spec": {"gatewayClassName": "class"}})
        self.serve(STABLE_SERVICE, STABLE)
        refs = [{"name": f"{STABLE_SERVICE}-predictor", "port": 80, "weight": 100}]
        self.api.put(HTTP_ROUTE, {"metadata": meta(NAME), "spec": {"rules": [{"backendRefs": refs}]}})
        self.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY))

    def operator(self) -> Reconciler:
        """One that knows nothing but what the API server has."""
        settings = Settings(prometheus_url=NOWHERE, namespace=NAMESPACE)
        prometheus = Prometheus(NOWHERE, 1.0)
        looks = PrometheusLooks(prometheus, scrape_interval_s=15.0, clock_skew_s_max=5.0)
        observer = Observer(looks, ScoreLog(""), ServedModels(None, 15.0))  # who can't be asked would be waited for
        return Reconciler(
            self.client, PairedBackend(self.client, settings, observer), CanaryBackend(self.client, observer), settings, self.log.append,
            "test", prometheus, self.companions)

    def ask(self, spec: Any) -> None:
        old = self.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {})
        item = {**old, "apiVersion": MODEL_ROLLOUT.api_version, "kind": MODEL_ROLLOUT.name,
                "metadata": {**old.get("metadata", {}), **meta(NAME)}, "spec": rollout_data(spec)["spec"]}
        self.api.put(MODEL_ROLLOUT, item)

    def serve(self, name: str, digest: str, pods: int = 1) -> None:
        """What KServe makes of an InferenceService: ready pods, and its word."""
        old = self.api.objects.get((INFERENCE_SERVICE.plural, NAMESPACE, name), {})
        item = {"metadata": meta(name, annotations={DIGEST_ANNOTATION: digest}), "spec": {"predictor": {"minReplicas": 1}}, **old}
        item["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
        self.api.put(INFERENCE_SERVICE, item)
        labels = {"serving.kserve.io/inferenceservice": name, "component": "predictor"}
        for i in range(pods):
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            self.api.put(POD, {"metadata": meta(f"{name}-{i}", labels=labels), "status": ready})

    def item(self) -> Json:
        return self.api.get(MODEL_ROLLOUT, NAMESPACE, NAME)

    @property
    def status(self) -> RolloutStatus:
        return status_of(self.item())

    @property
    def weight(self) -> int:
        return route_seen(self.api.get(HTTP_ROUTE, NAMESPACE, NAME)).weight

    def turn(self, item: Json | None = None) -> Turned:
        """A turn of an operator that has read the ModelRollout and then the rest; the gateway follows after it."""
        self.now += timedelta(seconds=20)
        read = item if item is not None else self.item()
        turned = self.reconciler.turn(read, take(self.client, NAMESPACE), self.now)
        if self.gateway_answers:
            self.gateway_follows()
        return turned

    def gateway_follows(self) -> None:
        """Each Gateway that the route names, and no other."""
        route = self.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        parents = route["spec"].get("parentRefs") or [{"namespace": "kserve", "name": "kserve-ingress-gateway"}]
        generation = route["metadata"]["generation"]
        done = [{"type": t, "status": "True", "observedGeneration": generation} for t in ("Accepted", "ResolvedRefs")]
        route["status"] = {"parents": [{"parentRef": p, "conditions": done} for p in parents]}
        self.api.put(HTTP_ROUTE, route)

    def climbed(self) -> None:
        """The candidate has its fifth."""
        for _ in range(12):
            self.turn()
            if (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) in self.api.objects:
                self.serve(SERVICE, CANDIDATE)
            step = self.status.step
            if step is not None and step.weight_effective_since is not None:
                return
        raise AssertionError(f"it did not climb: {self.status.message}; {self.log}")

    def at_an_intent_that_cannot_be_written(self) -> None:
        """A fifth for the candidate is in the status, and the API server takes no route. What is said about that has settled."""
        self.api.before = lambda asked: says(503, "later") if asked.method == "PATCH" and "/httproutes/" in asked.path else None
        for _ in range(12):
            self.turn()
            if (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) in self.api.objects:
                self.serve(SERVICE, CANDIDATE)
            if self.status.route is not None and self.status.route.weight == 20:
                break
        for _ in range(3):
            self.turn()

    def abort(self) -> None:
        """A person's word: the surest verdict."""
        action = {"type": "Abort", "id": "a-1", "candidateDigest": CANDIDATE, "reason": "CHG-1"}
        self.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY, action=action))


@contextmanager
def cluster(companions: Companions | None = None) -> Generator[Cluster]:
    with small_api() as (api, door):
        found = Cluster(api, door.client(sleep=lambda _: None), companions)
        found.reconciler.start()
        try:
            yield found
        finally:
            api.before = lambda _: None
            found.reconciler.stop()
