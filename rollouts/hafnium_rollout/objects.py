"""ModelRollout: what a user asks for. Parsed once, at the edge, into these frozen types.

The same types serve the cluster (the CRD is generated from them) and one machine (YAML in a folder). What a validator here refuses,
a rule of crd_rules.py refuses on the cluster, in the same words as far as CEL can say them. Everything has a size limit: the API
server allows a rule by the longest value that it might meet.
"""

from __future__ import annotations

import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from hafnium_contract.bundle import VERSION_PATTERN
from hafnium_contract.contract_file import dotted, line_of, read_yaml
from hafnium_contract.durations import Duration, PositiveDuration, parse_duration
from hafnium_contract.errors import ContractError, Problem
from hafnium_contract.model_contract import MODEL_NAME_PATTERN, Strict
from hafnium_rollout.errors import RolloutFileError

API_VERSION = "hafnium.dev/v1alpha1"
STEPS_MAX = 20
GATES_MAX = 50
APPROVALS_MAX = 10
HOSTNAMES_MAX = 16
"""As many as an HTTPRoute of the Gateway API takes."""
QUERY_CHARACTERS_MAX = 2_000
TEXT_CHARACTERS_MAX = 1_000
USER_CHARACTERS_MAX = 512
"""Kubernetes sets no limit for user names; those of OIDC (issuer and subject) stay below this."""
NO_TIME = parse_duration("0s")


def _each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"named twice: {', '.join(sorted({v for v in values if values.count(v) > 1}))}")
    return values


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
Name = Annotated[str, Field(pattern=MODEL_NAME_PATTERN, max_length=42)]
GateName = Annotated[str, Field(pattern=r"^[a-zA-Z]([-_a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$", max_length=63)]
Stage = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", max_length=63)]
"""A kind of approval, such as validation or security. RBAC names it, so it is a DNS label."""
User = Annotated[str, Field(min_length=1, max_length=USER_CHARACTERS_MAX)]
Hostname = Annotated[str, Field(
    pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
Query = Annotated[str, Field(min_length=1, max_length=QUERY_CHARACTERS_MAX)]
Role = Literal["Safety", "Quality", "Advisory"]
GateKind = Literal["requests", "prometheus", "latency", "scores", "drift", "evidence"]


class ModelRef(Strict):
    """The candidate: a bundle. The name is the target's and never changes; version, storageUri and digest name the model."""

    name: Name
    """The model's name, as in its contract. Never changes: another model is another ModelRollout."""
    version: Annotated[str, Field(pattern=VERSION_PATTERN, max_length=63)]
    """The bundle's version, for people; what is served is named by the digest. Also a label of its services."""
    storage_uri: str = Field(min_length=1, max_length=2048)
    """Where the bundle is: s3://…, pvc://…, file://…, as KServe's storageUri."""
    digest: Digest
    """The bundle's own digest, sha256:…; a service that holds another model gets no traffic."""
    trained_by: User | None = None
    """Who trained it, by the user name that the cluster knows them by. They can't approve it. Required where approvals are, and it
    stays what it is as long as the digest does."""


class GatewayRef(Strict):
    """The Gateway that routes are attached to."""

    name: ObjectName
    """The Gateway's name."""
    namespace: ObjectName | None = None
    """The Gateway's namespace; without it, the rollout's own."""
    section_name: Annotated[str, Field(max_length=253)] | None = None
    """One listener of the Gateway; without it, all."""


class Routing(Strict):
    """Who splits the traffic, and for which host names."""

    backend: Literal["PairedServices", "CanaryTrafficPercent", "Local"] | None = None
    """PairedServices (the default on a cluster): an InferenceService per model and an HTTPRoute between them. CanaryTrafficPercent:
    KServe's own field, in Knative mode. Local (the default on one machine): Envoy. It never changes once a rollout has begun."""
    gateway_ref: GatewayRef | None = None
    """The Gateway that clients come through."""
    hostnames: Annotated[tuple[Hostname, ...], Field(max_length=HOSTNAMES_MAX), AfterValidator(_each_once)] = ()
    """Host names that clients ask for. None: NAME-NAMESPACE.DOMAIN, since a route for every name would take other rollouts' requests."""


class Step(Strict):
    """One step of the climb: a mirror (`shadow: true`) or a share of live traffic (`weight`)."""

    shadow: bool = False
    """The candidate gets copies of requests, and nobody gets its answers. Only as the first step."""
    weight: int | None = Field(default=None, ge=1, le=100)
    """Percent of live requests that the candidate answers. Weights rise from step to step, and the last one is 100."""
    min_dwell: Duration = NO_TIME
    """Time that the step lasts at least, counted from the moment that its weight was seen at the gateway."""
    min_samples: int = Field(default=0, ge=0, le=1_000_000_000)
    """Candidate requests (pairs of scores, for a scores gate) that the step needs at least, by the least count of the gates that it waits
    for."""
    deadline: PositiveDuration = parse_duration("7d")
    """Without a verdict by then the rollout pauses and says what was missing."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.shadow == (self.weight is not None):
            raise ValueError("give exactly one of `shadow: true` and `weight`")
        if self.deadline <= self.min_dwell:
            raise ValueError("deadline must be longer than minDwell, else the step always pauses")
        return self

    @property
    def live_weight(self) -> int:
        """Percent of live answers that come from the candidate: 0 in shadow."""
        return self.weight or 0


class Strategy(Strict):
    """How traffic moves, and what happens when something comes in between."""

    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=STEPS_MAX)]
    """The climb, in order: a mirror first (if any), then rising weights up to 100. Edited under way, the next step is the lowest that gives
    more than the candidate has."""
    on_new_candidate: Literal["Restart", "Queue", "Reject"] = "Restart"
    """When another digest is asked for during a rollout: Restart takes the old candidate back and begins with the new one, Queue waits
    for the end, Reject refuses it."""
    max_blind_duration: PositiveDuration = parse_duration("10m")
    """A Safety gate without data for longer than this takes the rollout one weight down."""
    rollback_window: int = Field(default=3, ge=0, le=20)
    """So many models that were live before are kept at hand."""
    scrape_lag: Duration = parse_duration("2s")
    """A look counts for Pass only when it began this long after the weight was seen. One machine: 2 s; Prometheus: 2 scrapes."""
    ready_deadline: PositiveDuration = parse_duration("15m")
    """A candidate that isn't ready for so long without a break is rejected. It counts from when its service is there (or can't be made),
    not while the rollout is paused, nobody looks, or the cluster has no room."""
    restart_limit: int = Field(default=3, ge=1, le=100)
    """So many restarts of one pod of the candidate within one step are a crash loop. One restart may be a node's fault."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        weights = [s.live_weight for s in self.steps]
        for i, (below, above) in enumerate(pairwise(weights), start=1):
            if above <= below:
                raise ValueError(
                    f"steps: step {i} ({_step_text(self.steps[i])}) does not rise above the one before it "
                    f"({_step_text(self.steps[i - 1])}); weights rise strictly, and shadow comes first"
                )
        if weights[-1] != 100:
            raise ValueError(f"steps: the last step must have weight 100, it has {_step_text(self.steps[-1])}")
        return self


def _step_text(step: Step) -> str:
    return "shadow" if step.shadow else f"weight {step.weight}"


class Empty(Strict):
    """`requests: {}`: a kind that needs no settings."""


class Scores(Strict):
    """Scores of both models, compared as differences."""

    unpaired: bool = False
    """Also compare scores of different requests, one of each arm, in steps with live traffic. It needs many more of them than
    pairs in shadow do, and no shadow step."""


class PrometheusCounts(Strict):
    """Two queries that return the increase of bad and of all requests, per arm; the operator fills in the arm's service."""

    bad: Query
    """PromQL for the increase of bad requests of one arm."""
    total: Query
    """PromQL for the increase of all requests of one arm."""


class Slower(Strict):
    """Latency as the share of requests that took longer than a bound."""

    slower_than: PositiveDuration
    """A request that took longer is bad. Fixed before the rollout."""


class Evidence(Strict):
    """The last ModelEvidence of one kind about the candidate's digest."""

    kind: Literal["drift", "performance", "smoke", "fairness"]
    """Which job's evidence."""
    max_age: PositiveDuration = parse_duration("24h")
    """Older evidence is no evidence."""


class DriftEvidence(Strict):
    """The last ModelEvidence of kind drift about the candidate's digest."""

    max_age: PositiveDuration = parse_duration("24h")
    """Older evidence is no evidence."""


class Dispersion(Strict):
    """φ of bad requests, measured on the stable arm's history (statistics/dispersion.py), and the share it was measured at."""

    phi: float = Field(ge=1, le=1000)
    """1: every request is a coin of its own; 2: bad requests come in bursts that halve what they tell."""
    weight: float = Field(default=0.5, gt=0, lt=1)
    """The candidate's share of requests when φ was measured."""
    clump: float | None = Field(default=None, ge=1, le=1000)
    """The part of φ that is the same at every weight: retries, keep-alive. Measured at a second, smaller share. Not given: all of φ."""


class Compare(Strict):
    """How candidate and stable are compared."""

    margin: float | None = Field(default=None, gt=0, lt=1)
    """Largest tolerated difference: of the share of bad requests, or of the mean score. Default by kind: .005, .01, .02."""
    alpha: float = Field(default=0.01, gt=0, le=0.2)
    """Chance of a false verdict in the whole rollout, over all its gates and all looks."""
    harmless: float | None = Field(default=None, ge=0, lt=1)
    """A difference up to this never fails. Default 0 for requests and latency; the margin for scores, which always differ a bit."""
    dispersion: Dispersion | None = None
    """Frozen before the rollout. Given, Fail also restarts every ten minutes to find late harm; without, it runs plain."""


_KINDS: tuple[GateKind, ...] = ("requests", "prometheus", "latency", "scores", "drift", "evidence")
_MARGINS = {"requests": 0.005, "prometheus": 0.005, "latency": 0.01, "scores": 0.02}


class Gate(Strict):
    """One question about the candidate. Exactly one kind is given."""

    name: GateName
    """Its name in the status, in metrics and in messages; each once."""
    role: Role = "Quality"
    """Safety goes back at its first Fail and steps down when blind; Quality goes back after failureLimit; Advisory is only shown."""
    requests: Empty | None = None
    """Share of failed requests, counted at the gateway."""
    prometheus: PrometheusCounts | None = None
    """Share of bad requests, counted by two Prometheus queries."""
    latency: Slower | None = None
    """Share of requests that were slower than a bound."""
    scores: Scores | None = None
    """Scores of the same request by both models, in shadow; unpaired, also of different requests."""
    drift: DriftEvidence | None = None
    """What the drift job found about the candidate's inputs and scores."""
    evidence: Evidence | None = None
    """What another job found: performance with labels, smoke test, fairness."""
    compare: Compare = Compare()
    """How much worse is too much, and how sure the verdict has to be."""
    hard_limit: float | None = Field(default=None, gt=0, lt=1)
    """The candidate's own share of bad requests above this is a failure whatever the stable one does, unless it is above it too."""
    required_in: Annotated[
        tuple[Literal["shadow", "weight"], ...], Field(max_length=2), AfterValidator(_each_once)] = ("shadow", "weight")
    """Kinds of step that wait for this gate's Pass. A Quality gate may name none, a Safety gate must name one that strategy.steps has.
    Its Fail counts in all of them. Scores are compared in shadow only, unless they are unpaired."""
    failure_limit: int = Field(default=1, ge=1, le=1000)
    """Quality only: looks in a row with Fail before the rollout goes back. Safety always goes back at once."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        given = [k for k in _KINDS if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; given: {', '.join(given) or 'none'}")
        if self.hard_limit is not None and given[0] not in ("requests", "prometheus", "latency"):
            raise ValueError(f"hardLimit is for counted requests, not for {given[0]}")
        if self.role == "Safety" and not self.required_in:
            raise ValueError("requiredIn is empty: a Safety gate's Pass must be waited for somewhere, else silence promotes")
        if self.role == "Safety" and self.failure_limit != 1:
            raise ValueError("failureLimit is for Quality gates: a Safety gate goes back at its first Fail")
        if self.counted and self.harmless >= self.margin:
            raise ValueError(f"compare.harmless ({self.harmless:g}) must be below compare.margin ({self.margin:g})")
        if self.harmless > self.margin and not self.counted:
            raise ValueError(f"compare.harmless ({self.harmless:g}) must not exceed compare.margin ({self.margin:g})")
        return self

    def waits_in(self, step: Step) -> bool:
        """The step may not be left without this gate's Pass."""
        here = "shadow" if step.shadow else "weight"
        return self.blocking and here in self.required_in and (step.shadow or self.scores is None or self.scores.unpaired)

    @cached_property
    def kind(self) -> GateKind:
        return next(k for k in _KINDS if getattr(self, k) is not None)

    @cached_property
    def config(self) -> str:
        """All settings as one text: evidence that was gathered under others doesn't count."""
        return self.model_dump_json()

    def same_settings(self, config: str) -> bool:
        """Whether evidence with this `config` was gathered under these settings.

        What a later release adds to a gate isn't in the text that the one before wrote: it counts as its default, so that an upgrade
        costs a rollout under way no evidence.
        """
        if config == self.config:
            return True
        try:
            return Gate.model_validate_json(config).config == self.config
        except ValidationError:
            return False

    def __copy__(self) -> Self:
        """A copy may be given other settings (model_copy), so what was derived from these doesn't go with it."""
        copied = super().__copy__()
        fields = type(self).model_fields
        object.__setattr__(copied, "__dict__", {k: v for k, v in vars(copied).items() if k in fields})
        return copied

    @cached_property
    def counted(self) -> bool:
        """Bad and total requests of both arms."""
        return self.requests is not None or self.prometheus is not None or self.latency is not None

    @cached_property
    def blocking(self) -> bool:
        return self.role != "Advisory"

    @cached_property
    def margin(self) -> float:
        return self.compare.margin if self.compare.margin is not None else _MARGINS.get(self.kind, 0.02)

    @cached_property
    def harmless(self) -> float:
        if self.compare.harmless is not None:
            return self.compare.harmless
        return 0.0 if self.counted or self.kind in ("drift", "evidence") else self.margin


class Approvals(Strict):
    """Who has to agree before the candidate gets live traffic. Shadow needs nobody."""

    required: Annotated[tuple[Stage, ...], Field(max_length=APPROVALS_MAX), AfterValidator(_each_once)] = ()
    """Stages that a ModelApproval of this digest must name, each by somebody who did not train it: validation, security, …"""


class UserAction(Strict):
    """What a person decided. `candidateDigest` says about which model, so that a late command can't hit the next one."""

    type: Literal["Promote", "SkipStep", "Abort", "Retry"]
    """Promote: to 100 % now. SkipStep: to the next step. Abort: back, and remember the digest. Retry: go on, or try again."""
    id: str = Field(min_length=1, max_length=100)
    """Any text that was not used before: each action is done once."""
    candidate_digest: Digest
    """The candidate that it is about; for another one it is ignored."""
    reason: str = Field(default="", max_length=TEXT_CHARACTERS_MAX)
    """Why; kept in the history."""
    requested_by: str = Field(default="", max_length=200)
    """Who asked, as their command line knew them. On a cluster the proof is the object's managedFields and the audit log."""


_TEMPLATE: dict[str, Any] = {"type": "object", "additionalProperties": True}
ServiceTemplate = Annotated[dict[str, Any], WithJsonSchema({
    "type": "object", "required": ["predictor"], "additionalProperties": True,
    "properties": {
        "predictor": {**_TEMPLATE, "description": "KServe's PredictorSpec; storageUri is filled in."},
        "transformer": {**_TEMPLATE, "description": "KServe's TransformerSpec, if there is a transformer."},
    },
})]


class RolloutSpec(Strict):
    """What is wanted: which model, how traffic moves to it, and on which evidence."""

    model: ModelRef
    """The candidate. Another digest here is what begins a rollout."""
    service: ServiceTemplate
    """InferenceServiceSpec template, kept as data: storageUri and labels are filled in, and the service's name for `${HAFNIUM_SERVICE}` in
    any of its texts."""
    routing: Routing = Routing()
    """Who splits the traffic."""
    strategy: Strategy
    """Steps of the climb, and what happens when something comes in between."""
    gates: Annotated[tuple[Gate, ...], Field(min_length=1, max_length=GATES_MAX)]
    """Questions that are asked at every look. One Safety gate at least."""
    approvals: Approvals = Approvals()
    """Who has to agree before live traffic."""
    paused: bool = False
    """Hold where it is. Safety gates still take the candidate back."""
    action: UserAction | None = None
    """A person's decision, acted on once."""

    @model_validator(mode="after")
    def _gates(self) -> Self:
        names = [g.name for g in self.gates]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"gates: named twice: {', '.join(repeated)}")
        if not any(g.role == "Safety" for g in self.gates):
            raise ValueError("gates: at least one must have role: Safety, else nothing takes a bad candidate back")
        if self.approvals.required and self.model.trained_by is None:
            raise ValueError("model.trainedBy is required where approvals are: nobody approves their own model, so it must be known whose "
                             "it is")
        paired = [g.name for g in self.gates if g.scores is not None and not g.scores.unpaired]
        if paired and not any(s.shadow for s in self.strategy.steps):
            raise ValueError(
                f"gates: {', '.join(paired)}: a scores gate compares answers to the same request and needs a step with shadow: true; "
                "without one, `scores: {unpaired: true}` compares those to different requests"
            )
        unasked = [g.name for g in self.gates if g.role == "Safety" and not any(g.waits_in(s) for s in self.strategy.steps)]
        if unasked:
            raise ValueError(
                f"gates: {', '.join(unasked)}: requiredIn names no kind of step that strategy.steps has (or that it can see): no step "
                "waits for that Safety gate's Pass, and silence promotes; add `weight`, or a step with shadow: true"
            )
        if not isinstance(self.service.get("predictor"), dict):
            raise ValueError("service: expected an InferenceServiceSpec with `predictor`")
        return self


class ObjectMeta(Strict):
    """The part of Kubernetes metadata that is used here; the rest is the API server's."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    namespace: str = "default"
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    generation: int = 0


class ModelRollout(Strict):
    """How one model replaces another: step by step, each step only on evidence, and back as soon as the evidence says so."""

    api_version: Literal["hafnium.dev/v1alpha1"]
    kind: Literal["ModelRollout"]
    metadata: ObjectMeta
    spec: RolloutSpec
    status: Any = None
    """On a cluster the API server sends it along. It is never read from here."""

    @property
    def name(self) -> str:
        return self.metadata.name

    def service_name(self, digest: str) -> str:
        """`<name>-<digest8>`: each model has a service of its own, so features and model move together."""
        return f"{self.name}-{digest.removeprefix('sha256:')[:8]}"


def parse_rollout(data: Any, source: str, node: Any = None) -> ModelRollout:
    """YAML or JSON data → ModelRollout. Raises RolloutFileError with every problem, its path and (with `node`) its line."""
    if not isinstance(data, dict):
        raise RolloutFileError(source, [Problem("", "expected a mapping with apiVersion, kind, metadata, spec", 1)])
    try:
        return ModelRollout.model_validate(data)
    except ValidationError as e:
        problems = [
            Problem(dotted(x["loc"]), _message(x["msg"], x["type"], x["input"]), line_of(node, x["loc"])) for x in e.errors()
        ]
        raise RolloutFileError(source, sorted(problems, key=lambda p: p.line or 0)) from e


def _message(text: str, kind: str, value: Any) -> str:
    text = text.removeprefix("Value error, ")
    text = text[0].lower() + text[1:]
    if kind == "extra_forbidden":
        return "unknown key; see the reference of ModelRollout for those that exist"
    if kind in ("value_error", "missing"):
        return text
    shown = json.dumps(value, default=str)
    return f"{text}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def load_rollout(path: Path) -> ModelRollout:
    """Reads and checks a ModelRollout file. Raises InputError or RolloutFileError."""
    try:
        data, node = read_yaml(path)
    except ContractError as e:
        raise RolloutFileError(e.source, e.problems) from e
    return parse_rollout(data, str(path), node)


class ApprovalSpec(Strict):
    """Who approves which model for what. Never changes."""

    model_digest: Digest
    """The model that is approved, by the digest of its bundle."""
    stage: Stage
    """What is approved: one of spec.approvals.required of the ModelRollout."""
    approver: User
    """The user who makes this object, by the name that the cluster knows them by (`kubectl auth whoami`)."""
    comment: str = Field(default="", max_length=TEXT_CHARACTERS_MAX)
    """Why, or a reference to where it was decided."""


class ModelApproval(Strict):
    """A person's approval of one model for one stage. On a cluster the approver is the authenticated user who made it."""

    api_version: Literal["hafnium.dev/v1alpha1"] = API_VERSION
    kind: Literal["ModelApproval"] = "ModelApproval"
    metadata: ObjectMeta
    spec: ApprovalSpec
