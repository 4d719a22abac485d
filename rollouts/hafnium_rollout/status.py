"""What a rollout remembers: the status of a ModelRollout. Everything that `decide` needs from before is in here.

So any controller may go on from it after a crash. Evidence is kept as sums in log space and never recomputed: a second pass
over other looks of the same time would be a second try at the same error rate.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from hafnium_contract.evidence import Verdict
from hafnium_contract.model_contract import Strict
from hafnium_rollout.objects import Role
from hafnium_rollout.statistics.betting import BettingState
from hafnium_rollout.statistics.sample_ratio import RatioState
from hafnium_rollout.statistics.tilt import FailState, LimitState, PassState

Phase = Literal["Pending", "Progressing", "Paused", "Promoted", "RolledBack"]
EVENTS_MAX = 500
LOOK_GATES_MAX = 2_000
"""Looks × gates kept in the history. Beyond it every second one of the older half goes, so that a plot still shows the whole
rollout, older times more coarsely. A status of four gates stays below 400 kB, as a Kubernetes object must."""
IDS_MAX = 64


class ModelSeen(Strict):
    """A model that serves or is to serve."""

    service: str
    storage_uri: str = ""
    digest: str = ""
    version: str = ""


class RouteWanted(Strict):
    """What the route should say. The stable service gets 100 − weight: weights sum to 100 by construction."""

    stable: str
    candidate: str | None = None
    weight: int = Field(default=0, ge=0, le=100)
    shadow: bool = False


class StepStatus(Strict):
    index: int
    entered_at: AwareDatetime
    weight_desired: int
    weight_observed: int | None = None
    """The candidate's percent at the gateway; None when it can't be asked."""
    shadow_observed: bool = False
    weight_effective_since: AwareDatetime | None = None
    """Since when the gateway does what is wanted, without a break."""
    samples: int = 0
    """Candidate requests in looks that count for this step."""
    restarts_before: int | None = None
    """The candidate's restarts when the step began."""
    unready_since: AwareDatetime | None = None


class GateState(Strict):
    """Accumulated evidence of one gate."""

    config: str = ""
    """The gate's settings that this was gathered under; with others it begins anew."""
    fail: tuple[FailState, ...] = ()
    """Per latency threshold (one, or two around it); of the whole run."""
    passing: tuple[PassState, ...] = ()
    """The same, of this step."""
    limit: LimitState = LimitState()
    stable_recent: tuple[float, float] = (0.0, 0.0)
    """(bad, total) of the stable arm, decayed by a fifth each look: is it above the hard limit too?"""
    betting: BettingState | None = None
    counts: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """(bad, total) of the candidate and of the stable arm in this step, for people."""
    counts_run: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The same for all looks that Fail rests on."""
    counts_limit: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The same for all looks, which the hard limit judges."""
    expected: float = 0.0
    """Candidate requests that the stable arm's traffic let expect since the candidate's last one."""
    last_seen_at: AwareDatetime | None = None
    """When this gate last had data, or could see that there was nothing to have."""
    last_data_at: AwareDatetime | None = None
    last_verdict: Verdict = "NoData"
    """The verdict of the accumulated evidence alone."""


class GateStatus(Strict):
    name: str
    role: Role
    verdict: Verdict = "NoData"
    statistic: float = 0.0
    """ln of the e-value that speaks for the verdict (Fail or, else, Pass)."""
    lower: float | None = None
    upper: float | None = None
    """Bounds of candidate − stable at the gate's alpha."""
    samples: int = 0
    window_start: AwareDatetime | None = None
    window_end: AwareDatetime | None = None
    evidence: str = ""
    """Job or report that the verdict rests on."""
    message: str = ""
    failures: int = 0
    """Looks in a row with Fail; for evidence of jobs, findings with Fail in this step."""
    missing: int | None = None
    """About how many more candidate requests Pass needs."""
    state: GateState = GateState()


class GatePoint(Strict):
    name: str
    verdict: Verdict
    statistic: float
    lower: float | None = None
    upper: float | None = None
    samples: int = 0


class HistoryPoint(Strict):
    """One look (`event: Look`) or one thing that happened."""

    time: AwareDatetime
    event: str
    weight: int
    shadow: bool = False
    reason: str = ""
    message: str = ""
    gates: tuple[GatePoint, ...] = ()


class Condition(Strict):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: AwareDatetime


class RollbackStatus(Strict):
    """A rollback under way. It is done when the gateway shows it and no request reaches the candidate any more."""

    reason: str
    message: str
    requested_at: AwareDatetime
    reject: bool
    """Remember the digest as rejected."""


class RolloutStatus(Strict):
    observed_generation: int = 0
    phase: Phase = "Pending"
    reason: str = ""
    message: str = ""
    run_id: str = ""
    started_at: AwareDatetime | None = None
    step: StepStatus | None = None
    stable: ModelSeen | None = None
    candidate: ModelSeen | None = None
    previous: tuple[ModelSeen, ...] = ()
    """Models that were stable before, newest first; as many as rollbackWindow."""
    gates: tuple[GateStatus, ...] = ()
    sample_ratio: RatioState = RatioState()
    sample_ratio_message: str = ""
    """Empty while the split is as the weights say."""
    route: RouteWanted | None = None
    route_confirmed: bool = False
    """The wanted route was seen in place since it was wanted."""
    route_before: tuple[RouteWanted, ...] = ()
    """Routes that may still stand there because a write of ours was cut off."""
    external_changes: tuple[AwareDatetime, ...] = ()
    rollback: RollbackStatus | None = None
    force_promote: bool = False
    """A person asked to promote: steps are not waited for, Safety still is."""
    rejected_digests: tuple[str, ...] = ()
    handled_actions: tuple[str, ...] = ()
    last_action_id: str = ""
    history: tuple[HistoryPoint, ...] = ()
    conditions: tuple[Condition, ...] = ()
    cursor: dict[str, Any] = Field(default_factory=dict)
    """Where the observer goes on. Written together with what was made of the looks before, so no look counts twice."""
