"""spec.gates: the questions that are asked about a candidate, and how sure each answer has to be."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from hafnium_contract.durations import PositiveDuration, parse_duration
from hafnium_contract.model_contract import Strict
from hafnium_rollout.field_types import each_once
from hafnium_rollout.steps import Step

QUERY_CHARACTERS_MAX = 2_000
GateName = Annotated[str, Field(pattern=r"^[a-zA-Z]([-_a-zA-Z0-9]{0,61}[a-zA-Z0-9])?$", max_length=63)]
Query = Annotated[str, Field(min_length=1, max_length=QUERY_CHARACTERS_MAX)]
Role = Literal["Safety", "Quality", "Advisory"]
GateKind = Literal["requests", "prometheus", "latency", "scores", "drift", "evidence"]


class Empty(Strict):
    """`requests: {}`: a kind that needs no settings."""


class Scores(Strict):
    """Scores of both models, compared as differences."""

    unpaired: bool = False
    """Also compare scores of different requests, one of each arm, in steps with live traffic. It needs many more of them than
    pairs in shadow do, and no shadow step."""


class PrometheusCounts(Strict):
    """Two queries that count bad and all requests of an arm. `$service` in them is its service, `$window` the time since the last look.

    Without `$window` a query is a running total, from which the last one is subtracted; with it, the increase over that time."""

    bad: Query
    """PromQL for bad requests of one arm: a running total, or with `$window` the increase over it."""
    total: Query
    """PromQL for all requests of one arm, in the same form."""


class Slower(Strict):
    """Latency as the share of requests that took longer than a bound."""

    slower_than: PositiveDuration
    """A request that took longer is bad. Fixed before the rollout."""


class Evidence(Strict):
    """The last ModelEvidence of one kind about the candidate's digest."""

    kind: Literal["drift", "performance", "smoke", "fairness"]
    """Which job's evidence."""
    max_age: PositiveDuration = parse_duration("24h")
    """Older evidence is no evidence. With a failureLimit above 1 that is so of the newest Fail; those before it count for the whole run."""


class DriftEvidence(Strict):
    """The last ModelEvidence of kind drift about the candidate's digest."""

    max_age: PositiveDuration = parse_duration("24h")
    """Older evidence is no evidence. With a failureLimit above 1 that is so of the newest Fail; those before it count for the whole run."""


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
    """Share of failed requests. On a cluster the pods count them (what never reached a pod is in no gate), on one machine Envoy does."""
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
        tuple[Literal["shadow", "weight"], ...], Field(max_length=2), AfterValidator(each_once)] = ("shadow", "weight")
    """Kinds of step that wait for this gate's Pass. A Quality gate may name none, a Safety gate must name one that strategy.steps has.
    Its Fail counts in all of them. Scores are compared in shadow only, unless they are unpaired."""
    failure_limit: int = Field(default=1, ge=1, le=1000)
    """Quality only: looks in a row with Fail before the rollout goes back; for evidence of jobs, windows that don't overlap, with no Pass
    about a later one. Safety always goes back at once."""

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
