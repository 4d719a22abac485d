"""What a rollout remembers: the status of a ModelRollout. Everything that `decide` needs from before is in here.

So any controller may go on from it after a crash. Evidence is kept as sums in log space and never recomputed: a second pass
over other looks of the same time would be a second try at the same error rate.

On a cluster this is the status subresource, written as `stored` gives it. The API server keeps float64 exactly, but neither
infinity nor a null, and about 1.5 MB of one object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from hafnium_contract.evidence import Verdict
from hafnium_contract.model_contract import Strict
from hafnium_rollout.gate_spec import Role
from hafnium_rollout.statistics.betting import BettingState
from hafnium_rollout.statistics.sample_ratio import RatioState
from hafnium_rollout.statistics.tilt import FailState, LimitState, PassState

Phase = Literal["Pending", "Progressing", "Paused", "Promoted", "RolledBack"]
EVENTS_MAX = 500
LOOK_GATES_MAX = 2_000
"""Looks × gates kept in the history. Beyond it every second one of the older half goes, so that a plot still shows the whole
rollout, older times more coarsely. A status of four gates stays below 400 kB, as a Kubernetes object must."""
IDS_MAX = 64
"""Ids of people's actions that are remembered: an action stays in the spec, or in its file, until the next one."""
REJECTED_MAX = 1_000
"""Digests that are remembered as rejected: twenty years of one a week, in 75 kB. Beyond it the oldest is forgotten."""


class ModelSeen(Strict):
    """A model that serves or is to serve."""

    service: str
    """Its InferenceService."""
    storage_uri: str = ""
    """Where its bundle is."""
    digest: str = ""
    """Its bundle's digest."""
    version: str = ""
    """Its bundle's version."""
    trained_by: str = ""
    """Who trained it, as the ModelRollout said when it came."""


class RouteWanted(Strict):
    """What the route should say. The stable service gets 100 − weight: weights sum to 100 by construction."""

    stable: str
    """The stable service."""
    candidate: str | None = None
    """The candidate's service."""
    weight: int = Field(default=0, ge=0, le=100)
    """Percent for the candidate."""
    shadow: bool = False
    """The candidate gets copies."""


class PodRestarts(Strict):
    """How often a pod's model had been restarted."""

    pod: str
    """The pod's name."""
    restarts: int
    """Restarts of the model's own container."""


class StepStatus(Strict):
    """Where the climb stands."""

    index: int
    """Which of spec.strategy.steps, from 0."""
    entered_at: AwareDatetime
    """When it was decided."""
    weight_desired: int
    """Percent that the step asks for."""
    weight_entered: int | None = None
    """Percent that the step began with: weightDesired is 0 while that is withheld. Absent: an older release wrote this."""
    weight_observed: int | None = None
    """The candidate's percent at the gateway; absent when it can't be asked."""
    shadow_observed: bool = False
    """The gateway sends copies to the candidate."""
    weight_effective_since: AwareDatetime | None = None
    """Since when the gateway does what is wanted, without a break."""
    samples: int = 0
    """Candidate requests in looks that count for this step."""
    restarts_before: int | None = None
    """The candidate's restarts when the step began."""
    pod_restarts_before: tuple[PodRestarts, ...] = ()
    """The same per pod, of those that had any."""
    unready_since: AwareDatetime | None = None
    """Since when the candidate is not ready."""


class UnreadyStatus(Strict):
    """Before its first step the candidate isn't ready, without a break."""

    since: AwareDatetime
    """From when it counts. Time in which nobody looked moves it on."""
    seen_at: AwareDatetime
    """When it was last seen so, to some seconds."""
    absent: bool = False
    """Its service isn't there, though it is to be made at every look."""


class GateState(Strict):
    """Accumulated evidence of one gate."""

    config: str = ""
    """The gate's settings that this was gathered under; with others it begins anew."""
    fail: tuple[FailState, ...] = ()
    """Per latency threshold (one, or two around it); of the whole run."""
    passing: tuple[PassState, ...] = ()
    """The same, of this step."""
    limit: LimitState = LimitState()
    """Evidence that the candidate is above its hard limit."""
    stable_recent: tuple[float, float] = (0.0, 0.0)
    """(bad, total) of the stable arm, decayed by a fifth each look: is it above the hard limit too?"""
    betting: BettingState | None = None
    """Bets on score differences of the whole run."""
    betting_step: BettingState | None = None
    """Those of this step alone, where scores are compared across arms: Pass rests on them there."""
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
    """When this gate last had data."""
    last_verdict: Verdict = "NoData"
    """The verdict of the accumulated evidence alone."""


class GateStatus(Strict):
    """What a gate says now, and on what."""

    name: str
    """The gate's name."""
    role: Role
    """Its role."""
    verdict: Verdict = "NoData"
    """They never merge: NoData and Error are neither success nor failure."""
    statistic: float = 0.0
    """ln of the e-value that speaks for the verdict (Fail or, else, Pass)."""
    lower: float | None = None
    """Lower bound of candidate − stable at the gate's alpha."""
    upper: float | None = None
    """Upper bound of candidate − stable at the gate's alpha."""
    samples: int = 0
    """Candidate requests, pairs of scores or rows that it rests on."""
    window_start: AwareDatetime | None = None
    """Start of the time that it rests on."""
    window_end: AwareDatetime | None = None
    """End of the time that it rests on."""
    evidence: str = ""
    """Job or report that the verdict rests on."""
    message: str = ""
    """The verdict in a sentence."""
    failures: int = 0
    """Looks in a row with Fail; for evidence of jobs, windows of this run with Fail that don't overlap, since the last Pass if failureLimit
    is above 1."""
    missing: int | None = None
    """About how many more candidate requests Pass needs."""
    state: GateState = GateState()
    """Evidence so far, for the controller."""


class GatePoint(Strict):
    """A gate at one look."""

    name: str
    """The gate's name."""
    verdict: Verdict
    """What it said."""
    statistic: float
    """ln of its e-value."""
    lower: float | None = None
    """Lower bound of candidate − stable."""
    upper: float | None = None
    """Upper bound of candidate − stable."""
    samples: int = 0
    """What it rested on."""


class HistoryPoint(Strict):
    """One look (`event: Look`) or one thing that happened."""

    time: AwareDatetime
    """When."""
    event: str
    """What."""
    weight: int
    """Percent for the candidate at the gateway."""
    weight_desired: int | None = None
    """Percent that was wanted then."""
    shadow: bool = False
    """The candidate got copies."""
    reason: str = ""
    """Why, in one word."""
    message: str = ""
    """Why, in a sentence."""
    phase: str = ""
    """Of an event: the rollout's phase after it."""
    alert: bool = False
    """Someone should look. History is what notifications are sent from, so it has to know."""
    gates: tuple[GatePoint, ...] = ()
    """Of a look: what each gate said."""


class Condition(Strict):
    """One fact about the rollout, for `kubectl wait`."""

    type: str
    """Ready, Progressing, GatesPassing, DataAvailable, TrafficConverged, Paused, RolledBack or ExternalChange."""
    status: Literal["True", "False", "Unknown"]
    """Unknown is not False."""
    observed_generation: int = 0
    """Generation of the spec that this is about."""
    reason: str
    """Why, in one word."""
    message: str = ""
    """Why, in a sentence."""
    last_transition_time: AwareDatetime
    """When `status` changed last."""


class RollbackStatus(Strict):
    """A rollback under way. It is done when the gateway shows it and no request reaches the candidate any more."""

    reason: str
    """Why, in one word."""
    message: str
    """Why, in a sentence."""
    requested_at: AwareDatetime
    """When it was decided."""
    reject: bool
    """Remember the digest as rejected."""
    shown_since: AwareDatetime | None = None
    """Since when the gateway shows the route without the candidate."""
    counted_at: AwareDatetime | None = None
    """When it was known last how many requests reach the candidate."""
    overdue: Literal["", "NotShown", "NotCounted", "StillReached"] = ""
    """It takes longer than maxBlindDuration, and why: the gateway doesn't show the route, nobody knows how many requests reach the
    candidate, or some still do."""
    doubt: str = ""
    """What isn't known or isn't so yet, in a sentence."""


class RolloutStatus(Strict):
    """Where the rollout stands and why, and all the evidence that it stands on."""

    observed_generation: int = 0
    """Generation of the spec that this is about."""
    phase: Phase = "Pending"
    """Pending, Progressing, Paused, Promoted or RolledBack."""
    reason: str = ""
    """Why, in one word."""
    message: str = ""
    """Why, in a sentence."""
    weight: int = 0
    """Percent of live answers that come from the candidate, as the gateway showed it last; 100 once it is promoted."""
    gate: str = ""
    """The gate that speaks most against the candidate, and what it says: `errors:Inconclusive`."""
    run_id: str = ""
    """One try of one candidate."""
    started_at: AwareDatetime | None = None
    """When this run began."""
    unready: UnreadyStatus | None = None
    """Since when the candidate could be ready and isn't: readyDeadline counts from there. Only before the first step."""
    room_lacked_at: AwareDatetime | None = None
    """When the cluster was last seen to have no room for the candidate, to some seconds: waiting for it isn't the candidate's time."""
    step: StepStatus | None = None
    """Step of the climb, while there is one."""
    stable: ModelSeen | None = None
    """The model in production."""
    candidate: ModelSeen | None = None
    """The model that is to follow, or that came last."""
    taken_back: ModelSeen | None = None
    """The model of the last run, where that was taken back and the stable model is asked for again since. runId, startedAt and gates are
    that run's, and `candidate` is the stable model."""
    previous: tuple[ModelSeen, ...] = ()
    """Models that were stable before, newest first; as many as rollbackWindow."""
    gates: tuple[GateStatus, ...] = ()
    """What each gate says."""
    sample_ratio: RatioState = RatioState()
    """Is the split as the weights say?"""
    sample_ratio_message: str = ""
    """Empty while the split is as the weights say."""
    route: RouteWanted | None = None
    """What the route should say: intent, written before the route is."""
    route_confirmed: bool = False
    """The wanted route was seen in place since it was wanted."""
    route_before: tuple[RouteWanted, ...] = ()
    """Routes that may still stand there because a write of ours was cut off."""
    external_changes: tuple[AwareDatetime, ...] = ()
    """When somebody else changed the route."""
    external_revision: str = ""
    """The route's revision after the last of them: while it is there, our write has not arrived, and it is the same change."""
    rollback: RollbackStatus | None = None
    """A rollback under way."""
    had_weight: bool = True
    """The candidate may have answered live requests in this run. Without that, a rollback needs no counters."""
    paused_by_spec: bool = False
    """It is paused because spec.paused says so, whatever else was said since; it goes on when the spec says so."""
    force_promote: bool = False
    """A person asked to promote: no step and no gate is waited for; a Fail of Safety still takes the candidate back."""
    rejected_digests: tuple[str, ...] = ()
    """Models that were taken back; they come again only by Retry."""
    handled_actions: tuple[str, ...] = ()
    """Ids of people's actions that were acted on."""
    last_action_id: str = ""
    """The last of them."""
    history: tuple[HistoryPoint, ...] = ()
    """Looks and events, oldest first; older looks are thinned."""
    conditions: tuple[Condition, ...] = ()
    """Facts for `kubectl wait`."""
    cursor: dict[str, Any] = Field(default_factory=dict)
    """Where the observer goes on. Written together with what was made of the looks before, so no look counts twice."""


STORED_BYTES_MAX = 900_000
"""Of a status as JSON. etcd takes 1.5 MB of an object, and spec and managedFields need room."""
_LOOKS = ("at", "arms", "totals", "stable", "candidate", "unread", "split")
"""Keys of the cursor that looks go on from; what a backend has to put back is under others."""


def stored(status: RolloutStatus, bytes_max: int = STORED_BYTES_MAX) -> dict[str, Any]:
    """The status as the API server keeps it: no null, no infinity, small enough.

    A rollback must not fail because something else is long. Of a history that is too long every second look and then the older half of
    the events goes. What is too large without any history loses first what promotes nothing and convicts nobody (`_smaller`). Raises
    ValueError for a number that JSON can't hold, and when even that isn't enough.
    """
    data, size = _as_json(status)
    if size > bytes_max:
        bare = status.model_copy(update={"history": ()})
        for without in _smaller(bare):
            if _as_json(bare)[1] <= bytes_max:
                break
            bare = without
        status = bare.model_copy(update={"history": status.history})
        data, size = _as_json(status)
    while size > bytes_max:
        if not status.history:
            raise ValueError(f"status of run {status.run_id}: {size} bytes without any history, at most {bytes_max} can be stored; "
                             "give the ModelRollout fewer gates or shorter queries")
        status = status.model_copy(update={"history": _shorter(status.history)})
        data, size = _as_json(status)
    return data


def _as_json(status: RolloutStatus) -> tuple[dict[str, Any], int]:
    data = status.model_dump(mode="json", exclude_none=True)
    return data, len(json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode())


def _smaller(status: RolloutStatus) -> Iterator[RolloutStatus]:
    """The status with less and less of what may be lost: evidence of gates that are only shown, then which score files were read, then
    where looks go on. Who has nothing to go on from counts nothing, so at worst nobody knows anything, and Safety steps down.

    Never the evidence of other gates, which would be a second try at the same error rate, nor a rejected digest, which would run again.
    """
    gates = tuple(g if g.role != "Advisory" else g.model_copy(update={"state": GateState()}) for g in status.gates)
    status = status.model_copy(update={"gates": gates})
    yield status
    for keys in (("log",), _LOOKS):
        status = status.model_copy(update={"cursor": {k: v for k, v in status.cursor.items() if k not in keys}})
        yield status


def _shorter(history: tuple[HistoryPoint, ...]) -> tuple[HistoryPoint, ...]:
    looks = [i for i, p in enumerate(history) if p.event == "Look"]
    gone = set(looks[::2]) if looks else set(range((len(history) + 1) // 2))
    return tuple(p for i, p in enumerate(history) if i not in gone)
