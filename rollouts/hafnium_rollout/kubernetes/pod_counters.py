"""Counters of pods at two scrapes → what each arm's requests did in between. Pure.

A pod's counters of one scrape belong together (Prometheus stores a scrape at one time), so bad and total are of the same requests.
Increments are per pod and between two *scrapes*, whose times are known: a look begins where the oldest of them began.

What isn't known is left out for both arms, never counted as zero:
- a pod that wasn't there at the last look is only a baseline: its counters may hold requests from before;
- a pod that is gone takes its last requests along, bad and good alike;
- a counter that fell began anew: how much it held is lost, so this look is left out;
- a pod that wasn't scraped since: there is no look yet.
In the first two the arm's number of requests isn't whole, so the sample ratio isn't judged in that look.

A pod that two scrape jobs know has each series twice. Where it is plain that both are the same process (one instance, and nothing but the
job's own labels differs) one of them is taken; else the pod's counts are not known, and it is said why. A sum would double them.
Transformer and predictor in one pod are two processes that say which they are: requests come in at the transformer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hafnium_contract.metric_names import DURATION, ERRORS, REQUESTS
from hafnium_rollout.envoy_counters import ArmCounters
from hafnium_rollout.kubernetes.prometheus_client import Sample

FAMILIES = (REQUESTS.name, ERRORS.name, f"{DURATION.name}_bucket", f"{DURATION.name}_count")
_MS = 1000.0
_LABELS = frozenset(("le", *REQUESTS.labels, *ERRORS.labels, *DURATION.labels))
_OWN = _LABELS | {f"exported_{label}" for label in _LABELS} | {"__name__"}
"""Labels of the families themselves. All others say which target was scraped, and by whom."""
_OF_THE_JOB = frozenset({"job", "endpoint", "service", "prometheus", "prometheus_replica", "replica"})
"""Labels in which two scrapes of one process may differ."""
ENTRY, BEHIND = "transformer", "predictor"
"""What the parts call themselves in `component`."""
_Target = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PodCounters:
    """One pod's counters at one scrape."""

    scraped_at: float
    """Unix seconds, by Prometheus' clock."""
    requests: float = 0.0
    errors: float = 0.0
    timed: float = 0.0
    not_slower: Mapping[float, float] | None = None
    """Bucket bound in ms → requests that took at most that long."""
    target: str = ""
    """Which of Prometheus' targets: counts of two of them are never subtracted from each other."""

    def as_data(self) -> dict[str, Any]:
        """For the cursor in the status."""
        slow = {f"{k:.15g}": v for k, v in (self.not_slower or {}).items()}
        return {"at": self.scraped_at, "requests": self.requests, "errors": self.errors, "timed": self.timed, "notSlower": slow,
                "target": self.target}


def from_data(data: Any) -> PodCounters | None:
    """A cursor's counters; None when they have another form (the pod is then one that wasn't there)."""
    try:
        return PodCounters(float(data["at"]), float(data["requests"]), float(data["errors"]), float(data["timed"]),
                           {float(k): float(v) for k, v in data["notSlower"].items()}, str(data["target"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


@dataclass(frozen=True, slots=True)
class Pods:
    """What Prometheus has of pods."""

    counters: Mapping[str, PodCounters]
    doubled: Mapping[str, str]
    """Pod → why its counts aren't known though it is scraped."""


def by_pod(samples: Iterable[Sample], scraped: Iterable[Sample]) -> Pods:
    """Samples of FAMILIES, and of `timestamp(requests)`, per pod. A pod without a request counter isn't one of ours."""
    at: dict[str, dict[_Target, float]] = {}
    parts: dict[tuple[str, _Target], set[str]] = {}
    for s in scraped:
        pod, target = s.labels.get("pod", ""), _target(s)
        mine = at.setdefault(pod, {})
        mine[target] = min(s.value, mine.get(target, s.value))
        parts.setdefault((pod, target), set()).add(own_component(s))
    for pod, targets in at.items():
        if any(ENTRY in parts[pod, t] for t in targets):
            at[pod] = {t: time for t, time in targets.items() if parts[pod, t] != {BEHIND}}
    chosen: dict[str, _Target] = {}
    doubled: dict[str, str] = {}
    for pod, targets in at.items():
        differ = _differ(targets)
        if differ <= _OF_THE_JOB and (len(targets) == 1 or all(dict(t).get("instance") for t in targets)):
            chosen[pod] = min(targets)
        else:
            doubled[pod] = f"pod {pod} is scraped as {len(targets)} targets that differ in {', '.join(sorted(differ))}: " + " and ".join(
                "/".join(dict(t).get(n, "") or "none" for n in sorted(differ)) for t in sorted(targets)[:2])
    sums: dict[str, dict[str, float]] = {}
    buckets: dict[str, dict[float, float]] = {}
    for s in samples:
        pod, family = s.labels.get("pod", ""), s.labels.get("__name__", "")
        if pod not in chosen or _target(s) != chosen[pod]:
            continue
        if family == FAMILIES[2]:
            bound = s.labels.get("le", "+Inf")
            if bound != "+Inf":
                slow = buckets.setdefault(pod, {})
                # in ms and rounded: 0.025 s is 25 ms and not 25.000000000000004
                key = round(float(bound) * _MS, 6)
                slow[key] = slow.get(key, 0.0) + s.value
        elif family in FAMILIES:
            mine_sums = sums.setdefault(pod, {})
            mine_sums[family] = mine_sums.get(family, 0.0) + s.value
    counters = {
        pod: PodCounters(
            at[pod][chosen[pod]], found.get(FAMILIES[0], 0.0), found.get(FAMILIES[1], 0.0), found.get(FAMILIES[3], 0.0),
            buckets.get(pod, {}), _short(chosen[pod]))
        for pod, found in sums.items() if FAMILIES[0] in found
    }
    return Pods(counters, doubled)


def own_component(sample: Sample) -> str:
    """What the process itself says that it is: where the target has a label of that name, too, Prometheus calls it `exported_`."""
    return sample.labels.get("exported_component") or sample.labels.get("component", "")


def _target(sample: Sample) -> _Target:
    return tuple(sorted((n, v) for n, v in sample.labels.items() if n not in _OWN))


def _differ(targets: Iterable[_Target]) -> frozenset[str]:
    """Names of labels in which the targets aren't alike."""
    found = [dict(t) for t in targets]
    return frozenset(n for t in found for n in t if any(o.get(n) != t[n] for o in found))


def _short(target: _Target) -> str:
    """Enough of it to know it again: it is kept per pod in the status."""
    return hashlib.sha256(repr(target).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class ArmIncrease:
    """What one arm's requests did between two looks."""

    requests: float = 0.0
    errors: float = 0.0
    timed: float = 0.0
    not_slower: Mapping[float, float] | None = None
    whole: bool = True
    """Every pod of the arm was there at both looks."""
    started: float | None = None
    """When the oldest of its increments began; None without any pod."""
    reset: str = ""
    """The pod whose counters began anew."""
    waits: str = ""
    """The pod that wasn't scraped since the last look."""

    def counters(self) -> tuple[ArmCounters, ArmCounters]:
        """As (before, after), from zero: the form that looks are made of."""
        bad = min(self.errors, self.requests)
        after = ArmCounters(
            "", round(self.requests - bad), round(bad), round(self.requests), round(self.timed),
            {k: round(v) for k, v in (self.not_slower or {}).items()})
        return ArmCounters("", 0, 0, 0, 0, dict.fromkeys(after.not_slower, 0)), after


def increase(before: Mapping[str, PodCounters], after: Mapping[str, PodCounters], pods: Sequence[str]) -> ArmIncrease:
    """Increments of an arm's pods. `before` holds those of the last look, of the same arm alone."""
    both = [p for p in pods if p in before and p in after and before[p].target == after[p].target]
    whole = set(both) == {p for p in (*pods, *before) if p in before or p in after}
    requests = errors = timed = 0.0
    slow: list[Mapping[float, float]] = []
    for pod in both:
        old, new = before[pod], after[pod]
        if new.scraped_at <= old.scraped_at:
            return ArmIncrease(waits=pod)
        slower_fell = any(new_n < (old.not_slower or {}).get(b, 0.0) for b, new_n in (new.not_slower or {}).items())
        if new.requests < old.requests or new.errors < old.errors or new.timed < old.timed or slower_fell:
            return ArmIncrease(reset=pod)
        requests += new.requests - old.requests
        errors += new.errors - old.errors
        timed += new.timed - old.timed
        if new.timed > 0:
            known = old.not_slower or {}
            slow.append({b: n - known.get(b, 0.0) for b, n in (new.not_slower or {}).items() if b in known or not old.timed})
    # A bucket that one pod lacks (two images in one arm) is none of the arm: all of that pod's requests would seem slow.
    common = set(slow[0]).intersection(*slow) if slow else set[float]()
    not_slower = {b: sum(s[b] for s in slow) for b in sorted(common)}
    started = min((before[p].scraped_at for p in both), default=None)
    return ArmIncrease(requests, errors, timed, not_slower, whole, started)
