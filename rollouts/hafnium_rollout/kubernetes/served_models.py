"""Which model the pods say that they serve: `model_info{model_digest}` of each pod, by Prometheus.

The digest at an InferenceService is what this operator wrote there itself. What proves something is the bundle's place in its spec, which
somebody may have changed since, and what a predictor read out of the bundle that it loaded.

Nothing said is not "the right one": it is not known. Before a candidate gets its first request its pods are given a few scrapes to say it.
Pods that don't say it by then never will (a model server of somebody else's), and that is shown, not held against them. Pods that
Prometheus doesn't know at all can't be told from those: one that lost its data, or finds pods late, holds nobody for longer than that.

Pods come and go, so the time that a service is given isn't begun anew while some of its pods stay: an autoscaler, or one readiness probe
that flaps, would begin it for ever. What was said counts for the same pods only.

What was said is remembered by this process alone. So whoever begins to lead asks anew, and as long as Prometheus can't be asked no weight
is raised: a wrong model that the leader before has seen is seen again before it can matter, if its pods are found within a few scrapes.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hafnium_contract.metric_names import MODEL_INFO, REQUESTS
from hafnium_rollout.kubernetes.objects_seen import PodSeen
from hafnium_rollout.kubernetes.pod_counters import ENTRY, own_component
from hafnium_rollout.kubernetes.prometheus_client import Prometheus, PrometheusError
from hafnium_rollout.observation import ServiceSeen
from hafnium_rollout.status import ModelSeen

PODS_MAX = 400
"""Pods in one query: their names are in it."""
SCRAPES_AWAITED = 3
"""A new pod is found by Prometheus, scraped, and asked for here: each may just have missed the other."""
_REMEMBERED_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Said:
    """What the pods of one service say."""

    digests: frozenset[str] = frozenset()
    awaited: bool = False
    """They weren't scraped yet, and may say it soon."""
    problem: str = ""
    """Why it can't be asked."""
    silent: bool = False
    """They were asked for long enough and don't say it: they count as some that never will."""

    @property
    def unasked(self) -> str:
        """Why nothing is known that may yet be said; empty when it is known, or won't be."""
        if self.digests or self.silent:
            return ""
        return self.problem or ("its pods weren't scraped yet, so it isn't known which model they serve" if self.awaited else "")


@dataclass(frozen=True, slots=True)
class _Asked:
    pods: tuple[str, ...]
    first_s: float
    last_s: float
    said: Said


class ServedModels:
    """Asks at most once in a scrape interval for each set of pods. Safe between threads. `prometheus` None: nothing is known."""

    def __init__(self, prometheus: Prometheus | None, scrape_interval_s: float) -> None:
        self._prometheus, self._scrape_s = prometheus, scrape_interval_s
        self._asked: OrderedDict[tuple[str, str], _Asked] = OrderedDict()
        self._lock = threading.Lock()

    def said(self, namespace: str, service: str, pods: Sequence[PodSeen], now_s: float) -> Said:
        """What the ready pods of a service say now, or said less than a scrape interval ago. Never raises."""
        names = tuple(sorted(p.name for p in pods if p.ready))[:PODS_MAX]
        if self._prometheus is None or not names:
            return Said()
        key = (namespace, service)
        with self._lock:
            last = self._asked.get(key)
        known = last if last is not None and last.pods == names else None
        # While some of its pods stay, a service that never said anything isn't given its time again. One that did is: it can say it.
        given = last if last is not None and not last.said.digests and not set(last.pods).isdisjoint(names) else known
        if known is not None and known.said.digests and 0 <= now_s - known.last_s < self._scrape_s:
            return known.said
        if known is not None and not known.said.digests and 0 <= now_s - known.last_s < min(1.0, self._scrape_s):
            return known.said
        first_s = given.first_s if given is not None else now_s
        early = now_s - first_s < SCRAPES_AWAITED * self._scrape_s
        # The same pods serve what they said before; what was wrong doesn't become unknown, neither with Prometheus nor with its memory.
        before = known.said.digests if known is not None else frozenset[str]()
        try:
            digests, scraped = self._ask(self._prometheus, namespace, names)
            digests = digests or before
            awaited = early and not scraped and not digests
            found = Said(digests, awaited, silent=not digests and not awaited)
        except PrometheusError as e:
            silent = given is not None and given.said.silent
            found = Said(before, early and not before and not silent, f"it can't be asked which model {service} serves: {e}", silent)
        with self._lock:
            self._asked[key] = _Asked(names, first_s, now_s, found)
            self._asked.move_to_end(key)
            while len(self._asked) > _REMEMBERED_MAX:
                self._asked.popitem(last=False)
        return found

    @staticmethod
    def _ask(prometheus: Prometheus, namespace: str, pods: Sequence[str]) -> tuple[frozenset[str], bool]:
        """(digests, the model's part of every pod was scraped). A transformer in the same pod doesn't know which model answers it."""
        which = "|".join(re.escape(n).replace("\\", "\\\\") for n in pods)
        query = f'{{__name__=~"{MODEL_INFO.name}|{REQUESTS.name}",namespace="{namespace}",pod=~"{which}"}}'
        samples = prometheus.query(query).samples
        digests = frozenset(
            s.labels.get("model_digest", "") for s in samples if s.labels.get("__name__") == MODEL_INFO.name and s.value == 1.0)
        told = {s.labels.get("pod", "") for s in samples if s.labels.get("__name__") == MODEL_INFO.name or own_component(s) != ENTRY}
        return digests - {""}, told >= set(pods)


def wrong_model(model: ModelSeen, service: ServiceSeen, said: Said) -> str:
    """Why the service isn't the model that it is called; empty when nothing says so. Pure."""
    if model.storage_uri and service.storage_uri and service.storage_uri != model.storage_uri:
        return f"its storageUri is {service.storage_uri}, expected {model.storage_uri}"
    others = sorted(said.digests - {model.digest})
    if model.digest and others:
        return f"its pods say that they serve {', '.join(d[:19] for d in others)}, expected {model.digest[:19]}"
    return ""


def held_against(
    services: Mapping[str, ServiceSeen], model: ModelSeen, said: Said, *, before_traffic: bool,
) -> dict[str, ServiceSeen]:
    """The services, the one of `model` with what is wrong about it. `before_traffic`: it has time to say what it serves. Pure."""
    found = services.get(model.service)
    if found is None:
        return dict(services)
    wrong = wrong_model(model, found, said)
    found = replace(found, wrong_model=wrong, serves=model.digest if set(said.digests) == {model.digest} else "", unasked=said.unasked)
    if before_traffic and not wrong and said.awaited:
        found = replace(found, ready=False, message=said.unasked)
    return {**services, model.service: found}
