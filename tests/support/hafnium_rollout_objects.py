"""Hypothesis strategies for the objects as people write them: valid ones, and ones with something wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import datetime
from typing import Any

from hypothesis import strategies as st

JSON = dict[str, Any]
DIGEST = "sha256:" + "a" * 64
API = "hafnium.dev/v1alpha1"

digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda h: f"sha256:{h}")
durations = st.one_of(
    st.sampled_from(["90s", "10m", "1h30m", "1.5h", "7d", "2w", "1500ms"]),
    st.tuples(st.integers(1, 5000), st.sampled_from(["ms", "s", "m", "h"])).map(lambda x: f"{x[0]}{x[1]}"),
)
shares = st.floats(1e-6, 0.99, allow_nan=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=60)
names = st.from_regex(r"[a-zA-Z]([-_a-zA-Z0-9]{0,20}[a-zA-Z0-9])?", fullmatch=True)
stages = st.from_regex(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
users = st.from_regex(r"[a-z]{1,12}(@example\.com)?", fullmatch=True)
times = st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)).map(lambda t: t.isoformat() + "Z")  # noqa: DTZ001 - the Z is the zone


@st.composite
def steps(draw: st.DrawFn, shadow: bool) -> list[JSON]:
    """A climb: perhaps a mirror, rising weights, 100."""
    weights = [*sorted(draw(st.sets(st.integers(1, 99), max_size=6))), 100]
    out: list[JSON] = [{"shadow": True}] if shadow else []
    out += [{"weight": w} for w in weights]
    for step in out:
        if draw(st.booleans()):
            step["minSamples"] = draw(st.integers(0, 10**6))
        if draw(st.booleans()):
            step["minDwell"], step["deadline"] = draw(st.sampled_from([("10m", "1h"), ("24h", "3d"), ("0s", "1ms"), ("90m", "1.6h")]))
    return out


@st.composite
def gate(draw: st.DrawFn, name: str, role: str, kinds: list[str]) -> JSON:
    """One gate of a kind that may stand in this rollout."""
    kind = draw(st.sampled_from(kinds))
    age = draw(st.one_of(st.just({}), durations.map(lambda d: {"maxAge": d})))
    settings: dict[str, JSON] = {
        "requests": {}, "scores": {}, "prometheus": {"bad": "sum(bad)", "total": "sum(all)"}, "latency": {"slowerThan": draw(durations)},
        "drift": age, "evidence": {"kind": draw(st.sampled_from(["drift", "performance", "smoke", "fairness"])), **age},
    }
    out: JSON = {"name": name, "role": role, kind: settings[kind]}
    if draw(st.booleans()):
        margin = draw(shares)
        out["compare"] = {"margin": margin, "alpha": draw(st.floats(1e-6, 0.2)), "harmless": margin * draw(st.floats(0, 0.9))}
        if draw(st.booleans()):
            out["compare"]["dispersion"] = {"phi": draw(st.floats(1, 1000)), "weight": draw(shares)}
    if kind in ("requests", "prometheus", "latency") and draw(st.booleans()):
        out["hardLimit"] = draw(shares)
    if role == "Quality" and draw(st.booleans()):
        out["failureLimit"] = draw(st.integers(1, 1000))
    if draw(st.booleans()):
        # A Safety gate is waited for in a step that there is: in `weight` always, and in `shadow` where scores may stand.
        shadow = [["shadow"]] if role != "Safety" or "scores" in kinds else []
        live = [["weight"]] if role != "Safety" or kind != "scores" else []
        out["requiredIn"] = draw(st.sampled_from([*shadow, *live, ["shadow", "weight"]]))
    return out


@st.composite
def rollouts(draw: st.DrawFn) -> JSON:
    """A ModelRollout that is as it should be, with whatever may be left out left out now and then."""
    shadow = draw(st.booleans())
    kinds = ["requests", "prometheus", "latency", "drift", "evidence"] + (["scores"] if shadow else [])
    gate_names = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    roles = ["Safety", *(draw(st.sampled_from(["Safety", "Quality", "Advisory"])) for _ in gate_names[1:])]
    spec: JSON = {
        "model": {"name": draw(stages), "version": draw(st.from_regex(r"[a-zA-Z0-9]([-a-z0-9_.]{0,18}[a-z0-9])?", fullmatch=True)),
                  "storageUri": "s3://b/2", "digest": draw(digests)},
        "service": {"predictor": {"minReplicas": 2, "model": {"modelFormat": {"name": "onnx"}}}},
        "strategy": {"steps": draw(steps(shadow))},
        "gates": [draw(gate(n, r, kinds)) for n, r in zip(gate_names, roles, strict=True)],
    }
    if draw(st.booleans()):
        spec["approvals"] = {"required": draw(st.lists(stages, max_size=4, unique=True))}
        spec["model"]["trainedBy"] = draw(users)
    if draw(st.booleans()):
        spec["routing"] = {"backend": "PairedServices", "gatewayRef": {"name": "g", "namespace": "kserve"}, "hostnames": ["*.example.com"]}
    if draw(st.booleans()):
        spec["strategy"] |= {"onNewCandidate": "Queue", "maxBlindDuration": draw(durations), "rollbackWindow": draw(st.integers(0, 20)),
                             "scrapeLag": "30s", "readyDeadline": draw(durations), "restartLimit": draw(st.integers(1, 100))}
    if draw(st.booleans()):
        spec["action"] = {"type": "Abort", "id": "1", "candidateDigest": DIGEST, "reason": draw(text)}
    if draw(st.booleans()):
        spec["paused"] = draw(st.booleans())
    return {"apiVersion": API, "kind": "ModelRollout", "metadata": {"name": "risk"}, "spec": spec}


@st.composite
def evidence(draw: st.DrawFn) -> JSON:
    """A ModelEvidence that is as it should be."""
    values = [
        {"name": draw(names), "statistic": "psi", "value": draw(st.floats(allow_nan=False, allow_infinity=False)), "pValue": draw(shares)}
        for _ in range(draw(st.integers(0, 3)))
    ]
    spec = {
        "modelDigest": draw(digests), "kind": draw(st.sampled_from(["drift", "performance", "smoke", "fairness"])),
        "windowStart": draw(times), "windowEnd": draw(times), "createdAt": draw(times), "samples": draw(st.integers(0, 10**9)),
        "verdict": draw(st.sampled_from(["Pass", "Fail", "Inconclusive", "NoData", "Error"])), "message": draw(text), "values": values,
    }
    return {"apiVersion": API, "kind": "ModelEvidence", "metadata": {"name": "e"}, "spec": spec}


def _set(*path: str | int, to: Any) -> Callable[[JSON], None]:
    def change(spec: JSON) -> None:
        at: Any = spec
        for key in path[:-1]:
            at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
        at[path[-1]] = to
    return change


def _drop(*path: str | int) -> Callable[[JSON], None]:
    def change(spec: JSON) -> None:
        at: Any = spec
        for key in path[:-1]:
            at = at[key]
        at.pop(path[-1], None)
    return change


MISTAKES: dict[str, Callable[[JSON], None]] = {
    "no model": _drop("model"),
    "no gates": _set("gates", to=[]),
    "no steps": _set("strategy", "steps", to=[]),
    "no predictor": _set("service", to={"transformer": {}}),
    "digest of another kind": _set("model", "digest", to="sha1:aa"),
    "name that is no DNS label": _set("model", "name", to="Risk_1"),
    "empty trainer": _set("model", "trainedBy", to=""),
    "weight 0": _set("strategy", "steps", 0, to={"weight": 0}),
    "weight 101": _set("strategy", "steps", -1, to={"weight": 101}),
    "falling weights": _set("strategy", "steps", to=[{"weight": 50}, {"weight": 20}, {"weight": 100}]),
    "version that is no label": _set("model", "version", to="1.4.0+build.7"),
    "the same weight twice": _set("strategy", "steps", to=[{"weight": 50}, {"weight": 50}, {"weight": 100}]),
    "shadow twice": _set("strategy", "steps", to=[{"shadow": True}, {"shadow": True}, {"weight": 100}]),
    "shadow last": _set("strategy", "steps", to=[{"weight": 100}, {"shadow": True}]),
    "ends at 99": _set("strategy", "steps", to=[{"weight": 99}]),
    "shadow with weight": _set("strategy", "steps", 0, to={"shadow": True, "weight": 5}),
    "neither shadow nor weight": _set("strategy", "steps", 0, to={"minSamples": 5}),
    "deadline as long as minDwell": _set("strategy", "steps", -1, to={"weight": 100, "minDwell": "24h", "deadline": "1d"}),
    "minDwell beyond the default deadline": _set("strategy", "steps", -1, to={"weight": 100, "minDwell": "2w"}),
    "no blindness allowed": _set("strategy", "maxBlindDuration", to="0s"),
    "no time to be ready": _set("strategy", "readyDeadline", to="0h0m"),
    "duration without unit": _set("strategy", "maxBlindDuration", to="10"),
    "duration as number": _set("strategy", "maxBlindDuration", to=600.5),
    "no Safety gate": _set("gates", to=[{"name": "a", "role": "Quality", "requests": {}}]),
    "two kinds in one gate": _set("gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "drift": {}}),
    "no kind": _set("gates", 0, to={"name": "a", "role": "Safety"}),
    "the same name twice": _set("gates", to=[{"name": "a", "role": "Safety", "requests": {}}] * 2),
    "hardLimit of drift": _set("gates", 0, to={"name": "a", "role": "Safety", "drift": {}, "hardLimit": 0.5}),
    "hardLimit of 1": _set("gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "hardLimit": 1}),
    "Safety that nobody waits for": _set("gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "requiredIn": []}),
    "Safety in shadow without shadow": lambda s: s.update(
        strategy={"steps": [{"weight": 100}]}, gates=[{"name": "a", "role": "Safety", "requests": {}, "requiredIn": ["shadow"]}]),
    "Safety of pairs in live traffic": lambda s: s.update(
        strategy={"steps": [{"shadow": True}, {"weight": 100}]},
        gates=[{"name": "a", "role": "Safety", "requests": {}}, {"name": "b", "role": "Safety", "scores": {}, "requiredIn": ["weight"]}]),
    "Safety that may fail twice": _set("gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "failureLimit": 2}),
    "harmless beyond the default margin": _set(
        "gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "compare": {"harmless": 0.005}}),
    "harmless as large as margin": _set(
        "gates", 0, to={"name": "a", "role": "Safety", "latency": {"slowerThan": "1s"}, "compare": {"margin": 0.1, "harmless": 0.1}}),
    "harmless of drift above margin": _set("gates", 0, to={"name": "a", "role": "Safety", "drift": {}, "compare": {"harmless": 0.021}}),
    "margin of 0": _set("gates", 0, to={"name": "a", "role": "Safety", "requests": {}, "compare": {"margin": 0}}),
    "scores without shadow": lambda s: s.update(
        strategy={"steps": [{"weight": 100}]},
        gates=[{"name": "a", "role": "Safety", "requests": {}}, {"name": "b", "role": "Quality", "scores": {}}]),
    "approvals of nobody's model": lambda s: (s.update(approvals={"required": ["security"]}), s["model"].pop("trainedBy", None)),
    "the same stage twice": lambda s: (s.update(approvals={"required": ["a", "a"]}), s["model"].update(trainedBy="t")),
    "stage that RBAC can't name": lambda s: (s.update(approvals={"required": ["Model Risk"]}), s["model"].update(trainedBy="t")),
    "host that is none": _set("routing", "hostnames", to=["http://x"]),
    "action without digest": _set("action", to={"type": "Abort", "id": "1"}),
    "action of another kind": _set("action", to={"type": "Explode", "id": "1", "candidateDigest": DIGEST}),
    "too many steps": _set("strategy", "steps", to=[{"weight": w} for w in range(1, 21)] + [{"weight": 100}]),
    "restarts without limit": _set("strategy", "restartLimit", to=0),
}


def with_mistake(valid: JSON, name: str) -> JSON:
    """A copy with that mistake."""
    out = copy.deepcopy(valid)
    MISTAKES[name](out["spec"])
    return out
