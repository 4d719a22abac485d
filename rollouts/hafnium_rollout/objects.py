"""ModelRollout: what a user asks for. Parsed once, at the edge, into these frozen types.

The same types serve the cluster (the CRD is generated from them) and one machine (YAML in a folder). What a validator here refuses,
a rule of crd_rules.py refuses on the cluster, in the same words as far as CEL can say them. Everything has a size limit: the API
server allows a rule by the longest value that it might meet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from hafnium_contract.bundle import VERSION_PATTERN
from hafnium_contract.contract_file import dotted, line_of, read_yaml
from hafnium_contract.errors import ContractError, Problem
from hafnium_contract.model_contract import Strict
from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.field_types import TEXT_CHARACTERS_MAX, Digest, Hostname, Name, ObjectName, Stage, User, each_once
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.steps import Strategy

API_VERSION = "hafnium.dev/v1alpha1"
GATES_MAX = 50
APPROVALS_MAX = 10
HOSTNAMES_MAX = 16
"""As many as an HTTPRoute of the Gateway API takes."""


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
    hostnames: Annotated[tuple[Hostname, ...], Field(max_length=HOSTNAMES_MAX), AfterValidator(each_once)] = ()
    """Host names that clients ask for. None: NAME-NAMESPACE.DOMAIN, since a route for every name would take other rollouts' requests."""


class Approvals(Strict):
    """Who has to agree before the candidate gets live traffic. Shadow needs nobody."""

    required: Annotated[tuple[Stage, ...], Field(max_length=APPROVALS_MAX), AfterValidator(each_once)] = ()
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
