"""spec.strategy: the steps that a candidate climbs, and how long each may take."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hafnium_contract.durations import Duration, PositiveDuration, parse_duration
from hafnium_contract.model_contract import Strict

STEPS_MAX = 20
NO_TIME = parse_duration("0s")


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
