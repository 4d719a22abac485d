"""What the API server checks besides types: CEL rules, one for each validator of objects.py, steps.py and gate_spec.py, and the
kinds of lists.

A rule's cost is estimated from the longest value that the schema allows, which is why everything there is limited. The messages
are those of the validators, because the same person reads both. Rules stand on defaults: the API server fills them in before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hafnium_rollout.crd_schema import Extras

_KINDS = ("requests", "prometheus", "latency", "scores", "drift", "evidence")
_GIVEN = ", ".join(f"has(self.{k})" for k in _KINDS)
_COUNTED = "(has(self.requests) || has(self.prometheus) || has(self.latency))"
_MARGIN = ("(has(self.compare.margin) ? self.compare.margin : has(self.latency) ? 0.01 : "
           "has(self.requests) || has(self.prometheus) ? 0.005 : 0.02)")
_WEIGHT = "has({0}.weight) ? {0}.weight : 0"


def seconds(text: str) -> str:
    """CEL for the length of a duration in seconds. CEL's own `duration()` knows neither days nor weeks, nor sums of them."""
    unit = ("t.endsWith('ms') ? 0.001 : t.endsWith('s') ? 1.0 : t.endsWith('m') ? 60.0 : t.endsWith('h') ? 3600.0 : "
            "t.endsWith('d') ? 86400.0 : 604800.0")
    return f"{text}.findAll('[0-9.]+(ms|[smhdw])').map(t, double(t.find('[0-9.]+')) * ({unit})).sum()"


def _rule(rule: str, message: str, path: str = "", *, said: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {"rule": rule, "message": message}
    if said:
        out["messageExpression"] = said
    if path:
        out["fieldPath"] = path
    return out


def _rules(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"x-kubernetes-validations": list(rules)}


_NEVER_CHANGES = "self == oldSelf"
_BACKEND = "(has({0}.spec.routing) && has({0}.spec.routing.backend) ? {0}.spec.routing.backend : 'PairedServices')"

OBJECTS: Mapping[str, Mapping[str, Any]] = {
    "ModelRef": _rules(
        _rule("self.name == oldSelf.name", "spec.model.name never changes: make another ModelRollout", ".name"),
        _rule("self.digest != oldSelf.digest || !has(oldSelf.trainedBy) || (has(self.trainedBy) && self.trainedBy == oldSelf.trainedBy)",
              "who trained a model never changes: trainedBy stays as long as the digest does", ".trainedBy"),
    ),
    "Step": _rules(
        _rule("self.shadow != has(self.weight)", "give exactly one of `shadow: true` and `weight`"),
        _rule(f"{seconds('self.deadline')} > {seconds('self.minDwell')}",
              "deadline must be longer than minDwell, else the step always pauses", ".deadline"),
    ),
    "Gate": _rules(
        _rule(f"[{_GIVEN}].filter(x, x).size() == 1", f"give exactly one of {', '.join(_KINDS)}"),
        _rule(f"!has(self.hardLimit) || {_COUNTED}", "hardLimit is for counted requests: requests, prometheus or latency", ".hardLimit"),
        _rule("self.role != 'Safety' || self.requiredIn.size() > 0",
              "requiredIn is empty: a Safety gate's Pass must be waited for somewhere, else silence promotes", ".requiredIn"),
        _rule("self.role != 'Safety' || self.failureLimit == 1",
              "failureLimit is for Quality gates: a Safety gate goes back at its first Fail", ".failureLimit"),
        _rule(f"!has(self.compare.harmless) || !{_COUNTED} || self.compare.harmless < {_MARGIN}",
              "compare.harmless must be below compare.margin (by default .005, for latency .01)", ".compare"),
        _rule(f"!has(self.compare.harmless) || {_COUNTED} || self.compare.harmless <= {_MARGIN}",
              "compare.harmless must not exceed compare.margin (by default .02)", ".compare"),
    ),
    "RolloutSpec": _rules(
        _rule("!self.gates.exists(g, has(g.scores) && !(has(g.scores.unpaired) && g.scores.unpaired)) || "
              "self.strategy.steps.exists(s, s.shadow)",
              "a scores gate compares answers to the same request and needs a step with shadow: true, unless it is unpaired", ".gates"),
        _rule("self.gates.all(g, g.role != 'Safety' || self.strategy.steps.exists(s, s.shadow ? 'shadow' in g.requiredIn : "
              "'weight' in g.requiredIn && (!has(g.scores) || (has(g.scores.unpaired) && g.scores.unpaired))))",
              "requiredIn names no kind of step that strategy.steps has (or that the gate can see): no step waits for that Safety gate's "
              "Pass, and silence promotes", ".gates"),
        _rule("self.approvals.required.size() == 0 || has(self.model.trainedBy)",
              "model.trainedBy is required where approvals are: nobody approves their own model, so it must be known whose it is",
              ".model"),
    ),
    "ApprovalSpec": _rules(_rule(_NEVER_CHANGES, "an approval never changes: make another ModelApproval")),
    "EvidenceSpec": _rules(_rule(_NEVER_CHANGES, "evidence never changes: a later finding is another ModelEvidence")),
}

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "Strategy.steps": {"x-kubernetes-list-type": "atomic"} | _rules(
        _rule(f"self.map(s, {_WEIGHT.format('s')}).isSorted() && "
              f"self.all(s, self.exists_one(t, ({_WEIGHT.format('t')}) == ({_WEIGHT.format('s')})))",
              "weights rise strictly from step to step, and shadow comes first"),
        _rule("has(self[self.size() - 1].weight) && self[self.size() - 1].weight == 100", "the last step must have weight 100"),
    ),
    "RolloutSpec.gates": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]} | _rules(
        _rule("self.exists(g, g.role == 'Safety')", "at least one must have role: Safety, else nothing takes a bad candidate back")),
    "Gate.requiredIn": {"x-kubernetes-list-type": "set"},
    "Approvals.required": {"x-kubernetes-list-type": "set"},
    "Routing.hostnames": {"x-kubernetes-list-type": "set"},
    "Strategy.scrapeLag": {"default": None},  # 2 s is for one machine; with Prometheus it is two scrapes, and the operator knows them
    "EvidenceSpec.values": {"x-kubernetes-list-type": "atomic"},
}
SPEC = Extras(OBJECTS, FIELDS)

WHOLE: Mapping[str, Mapping[str, Any]] = {
    "ModelRollout": _rules(
        # Each backend has services and a route of its own: the other one would not see what this one gave the candidate, and guard nothing.
        # Before the first run nothing is there yet, and the operator may just have said which backend this cluster can have.
        _rule(f"{_BACKEND.format('self')} == {_BACKEND.format('oldSelf')} || "
              "!has(oldSelf.status) || !has(oldSelf.status.runId) || oldSelf.status.runId == ''",
              "spec.routing.backend never changes once a rollout has begun (absent: PairedServices): make another ModelRollout",
              ".spec.routing.backend"),
    ),
}
"""Rules over spec and status together: by kind, at the root of its schema."""

STATUS = Extras(fields={
    "RolloutStatus.conditions": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    "RolloutStatus.cursor": {"x-kubernetes-map-type": "atomic"},  # else managedFields lists every counter in it
})
