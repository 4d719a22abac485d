"""decide_retraining(policy, status, evidence, history, now): is a new training due? Pure.

What it never does: act on anything but findings that say Fail about the model that is stable now; act on NoData or Error, or past
them; act twice within a cool-down, or more often than allowed for one model; act while a candidate is under way, which may be the
answer already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from hafnium_contract.durations import Duration, format_duration
from hafnium_contract.evidence import EvidenceSpec, evidence_name
from hafnium_contract.model_contract import Strict
from hafnium_rollout.gates import CLOCK_SKEW_MAX
from hafnium_rollout.status import RolloutStatus

Kind = Literal["drift", "performance"]
_NAME_CHARACTERS_MAX = 24
HISTORY_MAX = 200
"""Attempts remembered per rollout, the newest. At one a day more than half a year."""


class RetrainingPolicy(Strict):
    """What may be done without a person."""

    policy: Literal["never", "propose", "start"] = "never"
    """propose: a record and a notification. start: the training, too; its model comes in by a rollout like any other."""
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("drift", "performance")
    findings: int = Field(default=2, ge=1, le=20)
    """Fails in a row over windows that don't overlap. One of a hundred windows fails by chance; two in a row say that it lasts."""
    max_age: Duration = timedelta(hours=48)
    """The newest of them must have been found so lately, however old its window is (labels come late). Daily jobs that were late once
    still count."""
    cool_down: Duration = timedelta(days=7)
    """Between two attempts for a rollout, whatever model. A training and its rollout should have ended by then."""
    attempts_max: int = Field(default=3, ge=1, le=100)
    """For one stable model: if three trainings didn't replace it, a fourth won't, and a person has to look."""
    start_within: Duration = timedelta(hours=24)
    """A training that couldn't be started for so long never is: what it was to learn from is of yesterday. New findings bring a new one."""

    @model_validator(mode="after")
    def _times(self) -> Self:
        if self.cool_down < timedelta(minutes=1):
            raise ValueError("coolDown must be at least 1m")
        if self.max_age <= timedelta(0):
            raise ValueError("maxAge must be longer than 0s")
        if self.start_within <= timedelta(0):
            raise ValueError("startWithin must be longer than 0s")
        return self


class Attempt(Strict):
    """One proposal or start. Written before anything is started."""

    id: str
    """Of this attempt for ever: whoever starts it twice gets the same name. At most 47 characters, as KubeRay wants a RayJob's."""
    time: AwareDatetime
    digest: str
    """The stable model that decays."""
    kind: Kind
    findings: tuple[str, ...]
    """Names of the evidence that it rests on."""
    message: str
    state: Literal["Proposed", "Intended", "Starting", "Started", "Succeeded", "Failed", "Unknown"]
    """Intended: to be started, and it wasn't. Starting: written right before it is asked for, so who finds it was cut off there.
    Unknown: it may have been started, and nothing is left of it to tell."""
    detail: str = ""
    """What was started, or why it wasn't."""
    started_at: AwareDatetime | None = None
    """When it was seen to have started; None: it didn't, or the release before wrote this."""
    ended_at: AwareDatetime | None = None
    """When it was seen to have succeeded or failed, or to be unknown."""


@dataclass(frozen=True, slots=True)
class RetrainingDecision:
    """`attempt` None: nothing is due, and `reason` says why."""

    reason: str
    attempt: Attempt | None = None


def attempt_id(name: str, digest8: str, number: int) -> str:
    """Of one attempt for ever. At most 47 characters and a DNS label that begins with a letter, as KubeRay wants a RayJob's name.

    A name that can't stand in it as it is gets a part of its hash, so that rollouts whose names begin alike never share a training.
    """
    if len(name) > _NAME_CHARACTERS_MAX or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        readable = re.sub(r"[^a-z0-9]+", "-", f"r-{name}" if not name[:1].isalpha() else name)
        name = f"{readable[:_NAME_CHARACTERS_MAX - 7].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"{name}-retrain-{digest8}-{number}"


def decide_retraining(
    policy: RetrainingPolicy, name: str, status: RolloutStatus, evidence: Sequence[EvidenceSpec], history: Sequence[Attempt],
    now: datetime,
) -> RetrainingDecision:
    """Whether a training is due for the rollout `name`. `history`: all of its attempts so far."""
    stable = status.stable
    if policy.policy == "never":
        return RetrainingDecision("the policy is never")
    if stable is None or not stable.digest:
        return RetrainingDecision("it isn't known which model is stable")
    if status.phase in ("Pending", "Progressing", "Paused") and status.candidate is not None:
        return RetrainingDecision("a candidate is under way")
    last = max((a.time for a in history), default=None)
    if last is not None and now - last < policy.cool_down:
        return RetrainingDecision(f"cooling down until {last + policy.cool_down:%Y-%m-%d %H:%M} UTC")
    tried = [a for a in history if a.digest == stable.digest]
    if len(tried) >= policy.attempts_max:
        return RetrainingDecision(f"{len(tried)} attempts were made for {stable.digest[:19]}; a person has to look")
    since = max((a.time for a in tried), default=None)
    best: tuple[Kind, list[EvidenceSpec]] | None = None
    reasons: list[str] = []
    for kind in policy.kinds:
        found, why = _failing(policy, kind, stable.digest, evidence, since, now)
        if len(found) >= policy.findings and (best is None or found[0].window_end > best[1][0].window_end):
            best = (kind, found)
        reasons.append(f"{kind}: {why}")
    if best is None:
        return RetrainingDecision("; ".join(reasons))
    kind, found = best
    digest8 = stable.digest.removeprefix("sha256:")[:8]
    text = (f"{kind} of the stable model {stable.version or digest8} failed in {len(found)} windows in a row, since "
            f"{found[-1].window_start:%Y-%m-%d %H:%M} UTC: {found[0].message}")
    attempt = Attempt(
        id=attempt_id(name, digest8, len(tried) + 1), time=now, digest=stable.digest, kind=kind,
        findings=tuple(evidence_name(e) for e in found), message=text, state="Intended" if policy.policy == "start" else "Proposed",
    )
    return RetrainingDecision(text, attempt)


def _failing(
    policy: RetrainingPolicy, kind: Kind, digest: str, evidence: Sequence[EvidenceSpec], since: datetime | None, now: datetime,
) -> tuple[list[EvidenceSpec], str]:
    """The newest Fails in a row, newest first, over windows that don't overlap; and in words what there is."""
    mine = sorted((e for e in evidence if e.kind == kind and e.model_digest == digest and e.window_start <= e.window_end
                   and max(e.window_end, e.created_at) <= now + CLOCK_SKEW_MAX and (since is None or e.window_start >= since)),
                  key=lambda e: (e.window_end, e.created_at), reverse=True)
    if not mine:
        return [], "no finding about the stable model" + (" since the last attempt" if since is not None else "")
    newest = mine[0]
    if newest.verdict != "Fail":
        return [], f"the newest finding says {newest.verdict}"
    # By when it was found: labels come a month late, and a window that waits for them is old before anybody can judge it
    age = now - max(newest.window_end, newest.created_at)
    if age > policy.max_age:
        return [], f"the newest finding was made {format_duration(timedelta(seconds=round(age.total_seconds())))} ago"
    row: list[EvidenceSpec] = []
    for e in mine:
        if row and e.window_end > row[-1].window_start:
            if e.verdict in ("Pass", "Inconclusive"):
                break  # about the same time another job saw no failure
            continue
        if e.verdict in ("NoData", "Error"):
            continue  # neither success nor failure
        if e.verdict != "Fail":
            break
        row.append(e)
        if len(row) == policy.findings:
            break
    return row, f"{len(row)} of {policy.findings} failing windows in a row"
