"""One gate, one look: evidence so far + what was seen → verdict, bounds, and a sentence for the person on call.

Verdicts never merge. Fail is read off evidence of the whole run, Pass off evidence of this step alone, and only looks that lie
wholly after the weight was seen at the gateway count for Pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from hafnium_contract.durations import format_duration
from hafnium_contract.evidence import EvidenceSpec, Verdict
from hafnium_rollout.failing_row import age_in_row, in_a_row, standing
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.observation import Counts, EvidenceUnread, GateLook, Look, Series
from hafnium_rollout.statistics import betting, dispersion, tilt
from hafnium_rollout.status import GateState, GateStatus

CLOCK_SKEW_MAX = timedelta(minutes=2)
"""Evidence from further in the future than this comes from a wrong clock and counts for nothing."""
_EXPECTED_MAX = 10.0
"""A candidate without requests is only silent, not lost, while the stable arm's traffic lets expect fewer than these (e⁻¹⁰)."""
_RECENT = 0.8
_RECENT_MIN = 20
"""Stable requests below which nothing is said about the stable arm's own share."""
_NOTHING_COMPARED = tilt.FailState()


@dataclass(frozen=True, slots=True)
class GateContext:
    """What a gate must know besides its own numbers."""

    now: datetime
    shadow: bool
    weight: int
    """Candidate's share of live answers in percent at the gateway; as the gateway has it."""
    digest: str
    step_since: datetime | None
    """Start of the time that counts for this step; None while the weight isn't effective."""
    counts_for_pass: bool
    """The look lies wholly after step_since."""
    counts_for_fail: bool
    """The weight was steady, and the first moments at a new weight are over: a cold start is not the model's fault. Also while the gateway
    is silent, as long as nothing says that it does otherwise than it last said."""
    run_since: datetime | None
    """Start of the run: a job's Fail about the candidate counts from then on, whatever the step."""
    alpha_fail: float
    """The gate's share of alpha for Fail: the claim holds for all gates of the rollout together."""
    alpha_limit: float
    """The same for its hard limit."""
    fresh: timedelta
    """For how long a verdict stands without new data."""
    void: str = ""
    """Why arms can't be compared right now (sample-ratio mismatch)."""
    watched: bool = True
    """The gateway's word is known, or it was and the look counts for Fail all the same. Counters without it are no sight: what they count
    is judged by nobody."""
    gives_all: bool = False
    """The step gives the candidate everything, whether or not the gateway has it so already."""


def judge(gate: Gate, before: GateStatus, look: Look | None, evidence: Sequence[EvidenceSpec], evidence_error: str,
          context: GateContext, unread: Sequence[EvidenceUnread] = ()) -> GateStatus:
    """The gate after this look. Pure: the same arguments give the same status."""
    if before.state.config != gate.config:
        if gate.same_settings(before.state.config):
            before = before.model_copy(update={"state": before.state.model_copy(update={"config": gate.config})})
        else:
            before = GateStatus(name=gate.name, role=gate.role, state=GateState(config=gate.config))
    seen = look.gates.get(gate.name) if look is not None else None
    if gate.counted:
        after = _counted(gate, before, seen, context)
    elif gate.kind == "scores":
        after = _scores(gate, before, seen, context)
    else:
        after = _evidence(gate, before, evidence, evidence_error, unread, context)
    failures = 0
    if after.verdict == "Fail":
        # A job's window counts once, however many looks it is seen in; the other gates count looks.
        failures = after.failures if gate.kind in ("drift", "evidence") else before.failures + (look is not None)
    if (after.role, after.failures) == (gate.role, failures):
        return after
    return after.model_copy(update={"role": gate.role, "failures": failures})


def new_step(status: GateStatus) -> GateStatus:
    """The gate at the start of a step: evidence for Pass begins anew, evidence for Fail goes on."""
    state = status.state.model_copy(update={
        "passing": (), "counts": (0.0, 0.0, 0.0, 0.0), "last_seen_at": None, "last_data_at": None,
        "last_verdict": "NoData", "expected": 0.0, "betting_step": None,
    })
    keep_scores = status.state.betting is not None
    return status.model_copy(update={
        "state": state, "window_start": None, "window_end": None, "failures": 0,
        "samples": status.samples if keep_scores else 0, "verdict": status.verdict if keep_scores else "NoData",
        "missing": None,
    })


# --- counted requests: errors and latency -----------------------------------------------------------------------------------


def _counted(gate: Gate, before: GateStatus, seen: GateLook | None, context: GateContext) -> GateStatus:
    state = before.state
    error = "" if seen is None else seen.error
    series = () if seen is None or seen.error else seen.series
    if series and state.fail and len(series) != len(state.fail):
        if not _begun(state):
            state = state.model_copy(update={"fail": (), "passing": ()})
        elif _both_arms(series):
            now, before_it = _thresholds(len(series)), _thresholds(len(state.fail))
            error = (f"{now} around slowerThan can be followed now, {before_it} until now: the models' buckets changed in this run; "
                     "choose a slowerThan that is a bucket of both, and the gate begins anew")
            series = ()
    if series:
        # a copy of a status costs more than the statistics in it: one for all that the look changes
        changes = _take_counts(gate, state, series, context)
        changes |= _take_presence(state, series[0], context)
        state = state.model_copy(update=changes)
    return _read_counted(gate, before, state, error, seen is None, context)


def _take_presence(state: GateState, s: Series, context: GateContext) -> dict[str, object]:
    """Is there data, or is it plain that there can be none? Silence of a candidate that should have had requests is blindness, and so are
    requests that nothing may be made of."""
    if context.void or not context.watched:
        return {}
    if s.candidate.total > 0 and (s.stable.total > 0 or _alone(context)):
        return {"last_seen_at": context.now, "last_data_at": context.now, "expected": 0.0}
    share = 1.0 if context.shadow else context.weight / max(100.0 - context.weight, 1.0)
    expected = state.expected + (s.stable.total * share if s.candidate.total == 0 else 0.0)
    return {"expected": expected, **({"last_seen_at": context.now} if expected < _EXPECTED_MAX else {})}


def _alone(context: GateContext) -> bool:
    """All live traffic is the candidate's: there is nobody to compare with."""
    return context.weight >= 100 and not context.shadow


def _begun(state: GateState) -> bool:
    """Something was compared. Only that settles how many thresholds are followed: an arm without requests may show no bucket yet."""
    return any(f != _NOTHING_COMPARED for f in state.fail)


def _both_arms(series: Sequence[Series]) -> bool:
    return any(s.stable.total > 0 and s.candidate.total > 0 for s in series)


def _thresholds(n: int) -> str:
    return f"{n} threshold{'s' if n != 1 else ''}"


def _take_counts(gate: Gate, state: GateState, series: Sequence[Series], context: GateContext) -> dict[str, object]:
    """The look's increments into every process that they may feed."""
    failing = state.fail or (_NOTHING_COMPARED,) * len(series)
    followed = len(failing) == len(series)  # else there is nothing to compare in this look
    update: dict[str, object] = {"fail": failing}
    phis = [_phi(gate, s) for s in series]
    if context.counts_for_fail and not context.void:
        look_s = 0.0 if state.last_seen_at is None else (context.now - state.last_seen_at).total_seconds()
        restarts = gate.compare.dispersion is not None
        update["fail"] = failing if not followed else tuple([
            tilt.add_fail(f, s.candidate.bad, s.candidate.total, s.stable.bad, s.stable.total, phi=phi,
                          harmless=gate.harmless, look_s=max(look_s, 0.0), restarts=restarts)
            for f, s, phi in zip(failing, series, phis, strict=True)
        ])
        if context.counts_for_pass and followed:
            passing = state.passing or tuple(tilt.PassState() for _ in series)
            update["passing"] = tuple([
                tilt.add_pass(p, s.candidate.bad, s.candidate.total, s.stable.bad, s.stable.total, phi=phi)
                for p, s, phi in zip(passing, series, phis, strict=True)
            ])
        update["counts_run"] = _plus(state.counts_run, series[0])
    first = series[0]
    if context.counts_for_pass:
        update["counts"] = _plus(state.counts, first)
    if gate.hard_limit is not None:
        bad, total = state.stable_recent
        recent = (bad * _RECENT + first.stable.bad, total * _RECENT + first.stable.total)
        update["stable_recent"] = recent
        update["counts_limit"] = _plus(state.counts_limit, first)
        limit = tilt.add_limit(state.limit, first.candidate.bad, first.candidate.total, gate.hard_limit, phi=phis[0])
        if _stable_above(gate.hard_limit, recent, first.stable) and _over(limit, context):
            limit = tilt.forget_limit(limit)  # both arms are: not the candidate's doing, and it must not be held against it later
        update["limit"] = limit
    return update


def _plus(counts: tuple[float, float, float, float], s: Series) -> tuple[float, float, float, float]:
    kc, nc, ks, ns = counts
    return kc + s.candidate.bad, nc + s.candidate.total, ks + s.stable.bad, ns + s.stable.total


def _phi(gate: Gate, s: Series) -> float:
    d = gate.compare.dispersion
    if d is None:
        return 1.0
    total = s.candidate.total + s.stable.total
    return dispersion.at_weight(d.phi, d.weight, s.candidate.total / total if total else 0.0, d.clump)


def _over(limit: tilt.LimitState, context: GateContext) -> bool:
    return tilt.log_e_limit(limit) >= math.log(1.0 / context.alpha_limit)


def _stable_above(hard_limit: float, recent: tuple[float, float], look: Counts) -> bool:
    """The stable arm is above the limit too, in this look or over the last few."""
    return any(total >= _RECENT_MIN and bad / total > hard_limit for bad, total in (recent, (look.bad, look.total)))


def _read_counted(gate: Gate, before: GateStatus, state: GateState, error: str, blind: bool, context: GateContext) -> GateStatus:
    """State → verdict and sentence."""
    alpha = context.alpha_fail
    kc, nc, ks, ns = state.counts
    e_fail = tilt.log_e_fail(state.fail, gate.harmless) if state.fail else 0.0
    e_pass = min([tilt.log_e_pass(p, gate.margin) for p in state.passing], default=0.0)
    lower = tilt.lower_bound(state.fail, alpha) if state.fail else None
    upper = tilt.upper_bound_of_all(state.passing, gate.compare.alpha) if state.passing else None
    missing = None if not state.passing else tilt.missing_for_pass(
        state.passing[-1], gate.margin, gate.compare.alpha, kc, nc, ks, ns)
    over = gate.hard_limit is not None and _over(state.limit, context)

    def found(verdict: Verdict, message: str, statistic: float | None = None, kept: GateState = state) -> GateStatus:
        return before.model_copy(update={
            "lower": lower, "upper": upper, "samples": int(nc), "missing": missing, "state": kept,
            "statistic": max(e_fail, e_pass) if statistic is None else statistic, "window_start": context.step_since,
            "window_end": kept.last_data_at, "verdict": verdict, "message": message,
        })

    rates = f"candidate {_share(kc, nc)}, stable {_share(ks, ns)}"
    if over:
        # of all looks: the hard limit also judges those that are too fresh to be compared
        rk, rn, sk, sn = state.counts_limit
        rates = f"candidate {_share(rk, rn)}, stable {_share(sk, sn)} in this run"
        text = f"the candidate's share of bad requests is above the hard limit {_percent(gate.hard_limit or 0)} ({rates})"
        return found("Fail", text, tilt.log_e_limit(state.limit))
    if e_fail >= math.log(1.0 / alpha) and not context.void:
        more = f" by more than {_percent(gate.harmless)}" if gate.harmless else ""
        rk, rn, sk, sn = state.counts_run
        text = (f"the candidate is worse than stable{more}: candidate {_share(rk, rn)}, stable {_share(sk, sn)}; "
                f"at least {_percent(max(lower or 0.0, gate.harmless))} more")
        return found("Fail", text, e_fail)
    if context.void:
        return found("Error", context.void)
    if error:
        return found("Error", f"can't be measured: {error}")
    if state.last_data_at is None or context.now - state.last_data_at > context.fresh:
        why = "the counters can't be read" if blind else "no requests" + (" reach the candidate" if ns else "")
        if not blind and not context.watched:
            why = "the gateway can't be asked, so it isn't known which weight the requests belong to"
        return found("NoData", f"{why}; {rates} in this step")
    if _alone(context):
        armed = f"; hard limit {_percent(gate.hard_limit)} armed" if gate.hard_limit is not None else ""
        verdict = "Pass" if context.counts_for_pass or state.last_verdict == "Pass" else "Inconclusive"
        text = f"nobody to compare with at weight 100{armed}; candidate {_share(kc, nc)}"
        return found(verdict, text, kept=state.model_copy(update={"last_verdict": verdict}))
    if state.passing and e_pass >= math.log(1.0 / gate.compare.alpha):
        text = f"worse by less than {_percent(gate.margin)}, proven: {rates}; at most {_percent(upper or 0.0)} more"
        return found("Pass", text, e_pass)
    need = "" if missing is None or not nc else f"; about {missing} more candidate requests are needed"
    if missing is None and nc:
        need = "; at these rates it won't pass"
    return found("Inconclusive", f"{rates}{need}")


def _share(bad: float, total: float) -> str:
    return f"{bad:g}/{total:g} ({_percent(bad / total)})" if total else "no requests"


def _percent(x: float) -> str:
    return f"{100.0 * x:.3g} %"


# --- scores -------------------------------------------------------------------------------------------------------------------


def _scores(gate: Gate, before: GateStatus, seen: GateLook | None, context: GateContext) -> GateStatus:
    """Score differences: of the same requests in shadow, and where wanted across the arms of live traffic (statistics/across.py).

    Fail rests on all bets of the run, Pass on those of this step. Without `unpaired`, later steps keep what shadow found; with it, the
    step that leaves nobody to compare with keeps what the one before found, from its beginning.
    """
    across = gate.scores is not None and gate.scores.unpaired and not context.shadow
    if not context.shadow and (not across or context.gives_all or _alone(context)):
        return before
    state = before.state
    run = state.betting or betting.begin(gate.margin, gate.harmless)
    step = (state.betting_step or betting.begin(gate.margin, gate.harmless)) if across else run
    differences = () if seen is None or seen.error or (across and context.void) else seen.differences
    update: dict[str, object] = {}
    if differences and context.counts_for_pass:
        run = betting.add(run, differences)
        step = betting.add(step, differences) if across else run
        update = {"last_seen_at": context.now, "last_data_at": context.now}
    elif seen is not None and not seen.error and seen.series and all(s.candidate.total == 0 for s in seen.series):
        update["last_seen_at"] = context.now
    state = state.model_copy(update={**update, "betting": run, "betting_step": step if across else None})
    goal_pass, goal_fail = math.log(1.0 / gate.compare.alpha), math.log(2.0 / context.alpha_fail)
    e_pass = min(betting.log_e_below(step, gate.margin), betting.log_e_above(step, -gate.margin))
    e_fail = max(betting.log_e_above(run, gate.harmless), betting.log_e_below(run, -gate.harmless))
    missing = betting.missing_for_pass(step, gate.margin, gate.compare.alpha)
    noun = "differences across arms" if across else "pairs"

    def found(verdict: Verdict, text: str, statistic: float | None = None) -> GateStatus:
        return before.model_copy(update={
            "state": state, "lower": betting.lower_bound(step, gate.compare.alpha), "samples": step.count, "missing": missing,
            "upper": betting.upper_bound(step, gate.compare.alpha), "window_start": context.step_since, "window_end": state.last_data_at,
            "statistic": max(e_pass, e_fail) if statistic is None else statistic, "verdict": verdict, "message": text,
        })

    def shown(bets: betting.BettingState) -> str:
        return f"scores move by {bets.total / bets.count if bets.count else 0.0:+.4f} on average over {bets.count} {noun}"

    if e_fail >= goal_fail and not (across and context.void):
        return found("Fail", f"{shown(run)}: more than {gate.harmless:g}, proven", e_fail)
    if across and context.void:
        return found("Error", context.void)
    if seen is not None and seen.error:
        return found("Error", f"can't be measured: {seen.error}")
    if state.last_data_at is None or context.now - state.last_data_at > context.fresh:
        return found("NoData", f"no new {noun}; {shown(step)}")
    if e_pass >= goal_pass:
        return found("Pass", f"{shown(step)}: less than {gate.margin:g}, proven", e_pass)
    need = f"; about {missing} more are needed" if missing is not None else "; at this mean it won't pass"
    return found("Inconclusive", shown(step) + need)


# --- evidence of jobs -------------------------------------------------------------------------------------------------------


def _evidence(gate: Gate, before: GateStatus, evidence: Sequence[EvidenceSpec], error: str, unread: Sequence[EvidenceUnread],
              context: GateContext) -> GateStatus:
    """The last finding of a job about this digest. Late, foreign, overlapping, future or old findings never pass.

    Nor does any while another about the same can't be read: it may be the Fail. A Fail that can be read stands whatever else is there;
    below a failureLimit, until a Pass about a later window (failing_row.py).
    One from a wrong clock is known to be none: it holds until a later one can be used, or its own Pass would outweigh each after it.
    """
    kind, max_age = _wanted(gate)
    state = before.state
    mine = sorted((e for e in evidence if e.kind == kind and e.model_digest == context.digest), key=lambda e: e.window_end)
    usable = [e for e in mine if _why_not(e, kind, max_age, context) == ""]
    borne = gate.failure_limit > 1
    ages = [age_in_row(e, max_age, context.run_since) if borne else max_age for e in mine]
    of_run = [e for e, age in zip(mine, ages, strict=True) if _why_not(e, kind, age, context, fail=True) == ""]
    failing = [e for e in of_run if e.verdict == "Fail" and not e.both_arms]
    if borne:  # a later window decides; without a limit the first Fail is the last word
        failing = standing(failing, [e for e in of_run if e.verdict == "Pass"])
        if failing and context.now - failing[-1].window_end > max_age:
            failing = []
    failed = failing[-1] if failing else None
    # Overlapping windows are no second opinion: one counts, unless it says Fail.
    until: datetime | None = None
    chosen: EvidenceSpec | None = None
    for e in usable:
        if until is None or e.window_start >= until:
            until, chosen = e.window_end, e
    found = failed or chosen
    if failed is None:
        about = [u for u in unread if _may_be_about(u, kind, max_age, context)]
        error = error or next((u.error for u in about if not u.misdated), "")
        misdated = next((u.error for u in about if u.misdated and not any(_is_after(e, u) for e in usable)), "")
        if error or misdated:
            text = f"evidence can't be read, and it may be a Fail: {error}" if error else f"evidence can't be used: {misdated}"
            return before.model_copy(update={"verdict": "Error", "message": text, "failures": 0})
    if found is None:
        why = _why_not(mine[-1], kind, max_age, context) if mine else f"no {kind} evidence for this digest"
        return before.model_copy(update={"verdict": "NoData", "message": why, "state": state})
    values = [v for v in found.values if v.compared_with == "stable"] or list(found.values)
    worst = max((v.value for v in values), default=0.0)
    verdict, text = found.verdict, found.message
    if found.both_arms and found.verdict == "Fail":
        verdict, text = "Inconclusive", f"stable drifts too: the world changed, not the candidate; holding. {found.message}"
    state = state.model_copy(update={"last_seen_at": context.now, "last_data_at": context.now})
    return before.model_copy(update={
        "state": state, "statistic": worst, "samples": found.samples, "window_start": found.window_start,
        "window_end": found.window_end, "evidence": found.report or found.job, "lower": None, "upper": None,
        "failures": in_a_row(failing), "verdict": verdict, "message": text,
    })


def _may_be_about(u: EvidenceUnread, kind: str, max_age: timedelta, context: GateContext) -> bool:
    """It could be a finding that counts here. One that was stored longer ago than findings are good for could not."""
    if u.kind not in (None, kind) or u.model_digest not in (None, context.digest):
        return False
    return u.created_at is None or context.now - u.created_at <= max_age + CLOCK_SKEW_MAX


def _is_after(e: EvidenceSpec, u: EvidenceUnread) -> bool:
    """It was written after the other was stored. Not by windows: where the other's window lies is what nobody knows."""
    return u.created_at is not None and e.created_at > u.created_at


def _wanted(gate: Gate) -> tuple[str, timedelta]:
    if gate.evidence is not None:
        return gate.evidence.kind, gate.evidence.max_age
    return "drift", gate.drift.max_age if gate.drift is not None else timedelta(hours=24)


def _why_not(e: EvidenceSpec, kind: str, max_age: timedelta, context: GateContext, *, fail: bool = False) -> str:
    """Why this evidence doesn't count (`fail`: as a failure of the run, not for this step); empty when it does."""
    if e.window_end < e.window_start:
        return f"{kind} evidence ends before it starts"
    if max(e.window_end, e.created_at) > context.now + CLOCK_SKEW_MAX:
        return f"{kind} evidence is from the future ({max(e.window_end, e.created_at):%H:%M:%S}); a clock is wrong"
    if context.now - e.window_end > max_age:
        age = format_duration(_whole(context.now - e.window_end))
        return f"the last {kind} evidence is {age} old, at most {format_duration(max_age)}"
    if kind in ("drift", "performance"):
        # These watch traffic, so their window must show the traffic of this step. Smoke and fairness test the model itself.
        start = context.run_since if fail else context.step_since
        if start is None:
            return "the step's weight is not effective yet"
        if e.window_start < start:
            return f"the last {kind} window began before this step's weight was effective; waiting for the next"
    return ""


def _whole(age: timedelta) -> timedelta:
    return timedelta(seconds=round(age.total_seconds()))
