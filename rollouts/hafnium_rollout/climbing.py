"""The climb: readiness, steps, dwell, samples, blindness and deadlines. `enter` is the only place where weight is gained. Pure."""

from __future__ import annotations

from datetime import timedelta

from hafnium_rollout.actions import Action, EnsureCandidate
from hafnium_rollout.endings import go_back, promote, promoted
from hafnium_rollout.gates import new_step
from hafnium_rollout.intake import blind_since
from hafnium_rollout.outside import route_action
from hafnium_rollout.statistics.sample_ratio import RatioState
from hafnium_rollout.status import RouteWanted
from hafnium_rollout.turn import Outcome, Turn, begin_step, hold, normal, since, want_route


def pending(turn: Turn) -> Outcome | None:
    """A candidate must be there, be the right model and be ready before it gets as much as a copy of a request."""
    status, spec = turn.status, turn.rollout.spec
    candidate, started = status.candidate, status.started_at
    if status.phase != "Pending" or candidate is None or started is None:
        return None
    if turn.seen.services is None:
        return hold(turn, "Pending", "the list of services can't be read")
    if not turn.candidate_ready:
        why = _why_not_ready(turn)
        if turn.now - started > spec.strategy.ready_deadline:
            text = f"{candidate.service} was not ready within {since(turn, started)}: {why}"
            return go_back(turn, "CandidateNotReady", text, reject=True)
        return Outcome(turn.update(reason="Pending", message=f"waiting for {candidate.service}: {why}"), _ensure(turn))
    if status.stable is None:
        return _first_model(turn)
    if spec.strategy.steps[0].weight is not None and turn.missing_approvals:
        return hold(turn, "ApprovalMissing", turn.missing_approvals)
    if turn.seen.route is None or turn.seen.live is None:
        return hold(turn, "Pending", "the gateway or its route can't be read")
    return enter(turn, 0)


def _why_not_ready(turn: Turn) -> str:
    found = turn.service(turn.status.candidate)
    if found is None:
        return "not there yet"
    if found.message or not found.ready:
        return found.message or "not ready"
    return f"it serves {found.digest[:19] or 'a model without a digest'}"


def _ensure(turn: Turn) -> tuple[Action, ...]:
    candidate = turn.status.candidate
    if candidate is None or candidate.service in turn.seen.managed:
        return ()
    return (EnsureCandidate(candidate, turn.rollout.spec.service),)


def _first_model(turn: Turn) -> Outcome:
    """No route and nobody stable: there is no traffic to protect and nothing to compare with."""
    candidate = turn.status.candidate
    assert candidate is not None  # noqa: S101 - pending checked it
    others = turn.seen.declared - turn.seen.managed
    if turn.rollout.name in others:
        return hold(turn, "Pending", f"InferenceService {turn.rollout.name} exists, but has no route yet")
    if turn.missing_approvals:
        return hold(turn, "ApprovalMissing", turn.missing_approvals)
    return promoted(turn.update(stable=candidate), "FirstModel", "the first model of this route: nothing to compare with")


def missing_service(turn: Turn) -> Outcome | None:
    """Someone deleted the candidate's service under way: make it again. If it doesn't come back, `_broken_service` ends it."""
    if turn.status.step is None or turn.seen.services is None or not _ensure(turn):
        return None
    return Outcome(turn.say("ServiceMissing", "ServiceMissing", "the candidate's service is gone; making it again"), _ensure(turn))


def blind(turn: Turn) -> Outcome | None:
    """Rule 4: a Safety gate without data for too long → one weight down, and call someone."""
    status, spec = turn.status, turn.rollout.spec
    step = status.step
    if step is None or not (step.weight_desired or step.weight_observed):
        return None  # in shadow nobody depends on the candidate
    for gate in status.gates:
        if gate.role != "Safety" or gate.verdict not in ("NoData", "Error"):
            continue
        if next(g for g in spec.gates if g.name == gate.name).kind == "scores":
            continue
        start = blind_since(turn, gate, step.entered_at)
        if turn.now - start > spec.strategy.max_blind_duration:
            text = f"Safety gate {gate.name} is blind since {since(turn, start)}: {gate.message}"
            return _step_down(turn, text)
    return None


def _step_down(turn: Turn, text: str) -> Outcome:
    status = turn.status
    assert status.step is not None  # noqa: S101 - the caller checked it
    if status.step.index > 0:
        down = enter(turn.say("BlindStepDown", "Blind", text, alert=True).update(force_promote=False), status.step.index - 1)
        if status.phase != "Paused":
            return down
        kept = {"phase": "Paused", "paused_by_spec": status.paused_by_spec, "reason": status.reason, "message": status.message}
        return Outcome(down.turn.update(**kept), down.actions)
    assert status.stable is not None  # noqa: S101 - no step without a stable service
    turn = turn.update(phase="Paused", step=status.step.model_copy(update={"weight_desired": 0, "weight_effective_since": None}))
    turn = want_route(turn.say("BlindStepDown", "Blind", f"{text}; no live traffic until Retry", alert=True),
                      RouteWanted(stable=status.stable.service))
    return Outcome(turn, (route_action(turn),))


def overdue(turn: Turn) -> Outcome | None:
    """Rule 5: no verdict by the deadline → pause, and say what was missing."""
    status, spec = turn.status, turn.step_spec
    if status.phase != "Progressing" or status.step is None or spec is None:
        return None
    if turn.now - status.step.entered_at <= spec.deadline:
        return None
    missing = "; ".join(_unmet(turn)) or "nothing but time"
    text = f"step {status.step.index} reached its deadline ({since(turn, status.step.entered_at)}): {missing}"
    return Outcome(turn.update(phase="Paused").say("Paused", "DeadlineExceeded", text, alert=True))


def _unmet(turn: Turn) -> list[str]:
    """Rule 2: everything that still stands between this step and the next, in words."""
    status, spec, step = turn.status, turn.step_spec, turn.status.step
    if step is None or spec is None:
        return ["no step"]
    out: list[str] = []
    if step.weight_effective_since is None:
        shown = "shadow" if spec.shadow else f"weight {spec.live_weight}"
        out.append(f"{shown} is not seen at the gateway (it shows {step.weight_observed})")
    elif turn.now - step.weight_effective_since < spec.min_dwell:
        out.append(f"minDwell: {since(turn, step.weight_effective_since)} of {_text(spec.min_dwell)}")
    if not turn.candidate_ready:
        out.append("the candidate is not ready")
    if status.force_promote:
        return out
    if step.samples < spec.min_samples:
        out.append(f"{spec.min_samples - step.samples} of {spec.min_samples} samples are missing")
    kinds = {g.name: g for g in turn.rollout.spec.gates}
    out += [f"{g.name} {g.verdict}: {g.message}" for g in status.gates if kinds[g.name].waits_in(spec) and g.verdict != "Pass"]
    return out


def _text(value: timedelta) -> str:
    return f"{value.total_seconds():g}s"


def advance(turn: Turn) -> Outcome | None:
    """Rule 2: up only when every blocking gate passes on this step's own evidence, with dwell, samples and approvals."""
    status, steps = turn.status, turn.rollout.spec.strategy.steps
    if status.step is None or status.phase not in ("Progressing", "Paused"):
        return None
    if status.phase == "Paused":
        return Outcome(turn)  # reason and message stay those of the pause
    unmet = _unmet(turn)
    if unmet:
        return hold(turn, "Waiting", unmet[0] if len(unmet) == 1 else f"{unmet[0]} (+{len(unmet) - 1} more)")
    if turn.seen.look is None and not status.force_promote:
        return hold(turn, "Waiting", "this look has no data")
    if status.step.index >= len(steps) - 1:
        return promote(turn)
    following = status.step.index + 1
    if steps[following].weight is not None and turn.missing_approvals:
        return hold(turn, "ApprovalMissing", turn.missing_approvals)
    turn = turn.say("Advanced", "Advanced", f"step {status.step.index} passed after {since(turn, status.step.entered_at)}")
    return enter(turn, following)


def enter(turn: Turn, index: int) -> Outcome:
    """Begin a step: intent into the status, then the write. The only place where a candidate gains weight."""
    status, spec = turn.status, turn.rollout.spec.strategy.steps[index]
    assert status.stable is not None  # noqa: S101 - no step without a stable service
    assert status.candidate is not None  # noqa: S101 - nor without a candidate
    turn = turn.update(
        phase="Progressing", paused_by_spec=False, step=begin_step(turn, index), gates=tuple(new_step(g) for g in status.gates),
        sample_ratio=RatioState(), sample_ratio_message="",
    )
    route = RouteWanted(
        stable=status.stable.service, candidate=status.candidate.service, weight=spec.live_weight, shadow=spec.shadow,
    )
    turn = want_route(turn, route)
    text = "the candidate gets copies of requests" if spec.shadow else f"the candidate gets {spec.live_weight} % of requests"
    turn = turn.say("StepEntered", "Progressing", f"step {index}: {text}")
    seen = turn.seen.route
    return Outcome(turn, () if seen is not None and normal(seen) == normal(route) else (route_action(turn),))
