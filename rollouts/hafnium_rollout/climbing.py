"""The climb: readiness, steps, dwell, samples, blindness and deadlines. `enter` is the only place where weight is gained. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from hafnium_rollout.actions import Action, EnsureCandidate
from hafnium_rollout.endings import go_back, promote, promoted
from hafnium_rollout.gates import new_step
from hafnium_rollout.intake import blind_since
from hafnium_rollout.outside import left_to_a_person, route_action
from hafnium_rollout.statistics.sample_ratio import RatioState, in_doubt
from hafnium_rollout.status import GateState, GateStatus, RouteWanted
from hafnium_rollout.turn import Outcome, Turn, begin_step, hold, lacking_room, normal, own_time_since, reached, since, want_route, withheld


def pending(turn: Turn) -> Outcome | None:
    """A candidate must be there, be the right model and be ready before it gets as much as a copy of a request."""
    status, spec = turn.status, turn.rollout.spec
    candidate, started = status.candidate, status.started_at
    if status.phase != "Pending" or candidate is None or started is None:
        return None
    if turn.seen.services is None:
        return hold(turn, "Pending", "the list of services can't be read")
    if not turn.candidate_ready:
        turn = lacking_room(turn)
        why, start = _why_not_ready(turn), status.unready.since if status.unready is not None else turn.now
        text = f"{candidate.service} was not ready within {since(turn, start)}: {why}"
        found = turn.service(candidate)
        if found is not None and found.no_room:
            if turn.now - start > spec.strategy.ready_deadline:
                return _wait_for_room(turn, f"{text}; it waits until there is room: {found.no_room}")
        elif turn.now - own_time_since(turn, start) > spec.strategy.ready_deadline:
            return go_back(turn, "CandidateNotReady", text, reject=True)
        return Outcome(turn.update(reason="Pending", message=f"waiting for {candidate.service}: {why}"), _ensure(turn))
    if status.stable is None:
        return _first_model(turn)
    if spec.strategy.steps[0].weight is not None and turn.missing_approvals:
        return hold(turn, "ApprovalMissing", turn.missing_approvals)
    if turn.seen.route is None or turn.seen.live is None:
        return hold(turn, "Pending", "the gateway or its route can't be read")
    if unasked := model_unasked(turn):
        return _wait_to_be_asked(turn, started, unasked)
    return enter(turn.update(external_changes=()), 0)  # what was put back while it was due nothing is no fight over its share


def model_unasked(turn: Turn) -> str:
    """Why it isn't known yet which model the candidate serves: with that it gains no weight. It isn't the candidate's fault."""
    found = turn.service(turn.status.candidate)
    return f"no weight until its pods can be asked which model they serve: {found.unasked}" if found is not None and found.unasked else ""


def _wait_to_be_asked(turn: Turn, started: datetime, unasked: str) -> Outcome:
    """It may wait as long as it takes, but not unnoticed: who can't be asked is often Prometheus, and then its alert rules are silent too.

    Someone is called once in a run; the history knows whether they were.
    """
    called = any(p.event == "ModelUnknown" and p.time >= started for p in turn.status.history)
    if called or turn.now - own_time_since(turn, started) <= turn.rollout.spec.strategy.ready_deadline:
        return hold(turn, "ModelUnknown", unasked)
    text = f"{since(turn, started)} after this run began nobody could ask the candidate's pods yet: {unasked}"
    return Outcome(turn.say("ModelUnknown", "ModelUnknown", text, alert=True))


def _wait_for_room(turn: Turn, text: str) -> Outcome:
    """A model that the cluster has no room for isn't a bad one. It has no traffic, so it may wait; someone is called once."""
    if turn.status.reason != "NoRoom":
        return Outcome(turn.say("NoRoom", "NoRoom", text, alert=True), _ensure(turn))
    return Outcome(turn.update(reason="NoRoom", message=text), _ensure(turn))


def no_room(turn: Turn) -> Outcome | None:
    """Under way the candidate's pods don't fit into the cluster any more: its traffic goes back, and a person decides. Not rejected."""
    status, step, found = turn.status, turn.status.step, turn.service(turn.status.candidate)
    if step is None or step.unready_since is None or found is None or not found.no_room or status.stable is None:
        return None
    if turn.now - step.unready_since <= turn.rollout.spec.strategy.max_blind_duration:
        return None
    wanted = RouteWanted(stable=status.stable.service)
    if status.phase == "Paused" and status.route == wanted:
        return None
    text = f"{found.name} is not ready since {since(turn, step.unready_since)}, for want of room: {found.no_room}; no traffic until Retry"
    turn = turn.update(phase="Paused", paused_by_spec=False, force_promote=False, step=withheld(step))
    turn = want_route(turn.say("NoRoom", "NoRoom", text, alert=True), wanted)
    return Outcome(turn, (route_action(turn),))


def doubted(turn: Turn, failed: GateStatus) -> Outcome | None:
    """A gate failed while the split is in doubt: the traffic goes back at once, and a person says whose fault it was. Not rejected.

    What was counted speaks against nobody then, so gates that rest on it begin anew in `enter`: else Retry would fail of it, whatever was
    mended.
    """
    status, ratio = turn.status, turn.status.sample_ratio
    if failed.name not in _on_the_split(turn) or status.step is None or status.stable is None or not in_doubt(ratio):
        return None
    text = (f"{failed.role} gate {failed.name}: {failed.message}; but the candidate got {ratio.candidate:g} of {ratio.requests:g} requests "
            f"where about {ratio.expected:.0f} were due, so it may be the fault of who asks it (a sticky client, a cache, a second route): "
            "not rejected; no live traffic until Retry")
    turn = turn.update(phase="Paused", paused_by_spec=False, force_promote=False, step=withheld(status.step), sample_ratio_message=text)
    turn = turn.say("SampleRatioMismatch", "SampleRatioMismatch", text, alert=True).say("Paused", "SampleRatioMismatch", text)
    turn = want_route(turn, RouteWanted(stable=status.stable.service))
    return Outcome(turn, (route_action(turn),))


def waits_in_doubt(turn: Turn, failed: GateStatus) -> bool:
    """It lost its traffic by `doubted` and waits for a person. A hard limit may be crossed again by whoever asks it past the route."""
    status, step = turn.status, turn.status.step
    if not status.sample_ratio_message or status.phase != "Paused" or step is None or failed.name not in _on_the_split(turn):
        return False
    return step.weight_desired == 0 and reached(step) > 0


def _on_the_split(turn: Turn) -> frozenset[str]:
    """Gates that say of the candidate what they see of the requests that came to it."""
    return frozenset(g.name for g in turn.rollout.spec.gates if g.counted or (g.scores is not None and g.scores.unpaired))


def _why_not_ready(turn: Turn) -> str:
    found = turn.service(turn.status.candidate)
    if found is None:
        return "not there yet"
    if found.message or not found.ready:
        return found.message or "not ready"
    if found.wrong_model:
        return found.wrong_model
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
    if not turn.seen.route_absent:
        return hold(turn, "Pending", "there may be a route, and it isn't known who is stable: no first model takes its requests")
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
    if left_to_a_person(turn):
        return None  # with CanaryTrafficPercent the template is what they fight for
    if turn.status.phase == "Paused":
        return Outcome(turn, _ensure(turn))  # reason and message stay those of the pause
    return Outcome(turn.say("ServiceMissing", "ServiceMissing", "the candidate's service is gone; making it again"), _ensure(turn))


def blind(turn: Turn) -> Outcome | None:
    """Rule 4: a Safety gate without data for too long → one weight down, and call someone."""
    status, spec = turn.status, turn.rollout.spec
    step = status.step
    if step is None or not step.weight_desired:
        return None  # in shadow nobody depends on the candidate; and what is to go to 0 anyway must not get a lower step's share
    for gate in status.gates:
        if gate.role != "Safety" or gate.verdict not in ("NoData", "Error"):
            continue
        scores = next(g for g in spec.gates if g.name == gate.name).scores
        if scores is not None and (not scores.unpaired or step.weight_observed == 100):
            continue  # pairs are had in shadow only, and at 100 % there is nobody to compare with: nothing is missing
        start = blind_since(turn, gate, step.entered_at)
        if turn.now - start > spec.strategy.max_blind_duration:
            text = f"Safety gate {gate.name} is blind since {since(turn, start)}: {gate.message}"
            return _step_down(turn, text)
    return None


def _step_down(turn: Turn, text: str) -> Outcome:
    """To the next lower step of the spec as it is now. One that would give more than there is now is no step down.

    A split that was proven wrong explains itself at no lower weight: what was found there anew would only lead up and down for ever, with a
    new chance of a false Pass each time. So comparisons stay void, and a person says by Retry that it is mended.
    """
    status = turn.status
    assert status.step is not None  # noqa: S101 - the caller checked it
    lower = turn.step_at_most(min(status.step.weight_desired - 1, _weight_now(turn)))
    if lower is not None:
        down = enter(turn.say("BlindStepDown", "Blind", text, alert=True).update(force_promote=False), lower)
        unexplained = status.sample_ratio_message
        down = Outcome(down.turn.update(sample_ratio_message=unexplained), down.actions)
        if unexplained and (status.phase != "Paused" or status.paused_by_spec):
            paused, text = down.turn.update(phase="Paused", paused_by_spec=False), f"{unexplained}; mend the split, then Retry"
            return Outcome(paused.say("Paused", "SampleRatioMismatch", text, alert=True), down.actions)
        if status.phase != "Paused":
            return down
        kept = {"phase": "Paused", "paused_by_spec": status.paused_by_spec, "reason": status.reason, "message": status.message}
        return Outcome(down.turn.update(**kept), down.actions)
    assert status.stable is not None  # noqa: S101 - no step without a stable service
    turn = turn.update(phase="Paused", paused_by_spec=False, step=withheld(status.step))
    turn = want_route(turn.say("BlindStepDown", "Blind", f"{text}; no live traffic until Retry", alert=True),
                      RouteWanted(stable=status.stable.service))
    return Outcome(turn, (route_action(turn),))


def _weight_now(turn: Turn) -> int:
    """The least that the route may give the candidate now: a weight that waits for pods isn't there yet."""
    status, route = turn.status, turn.seen.route
    if route is not None:
        return normal(route).weight
    possible = () if status.route_confirmed else status.route_before
    return min((normal(r).weight for r in possible), default=100)


def overdue(turn: Turn) -> Outcome | None:
    """Rule 5: no verdict by the deadline → pause, and say what was missing."""
    status, spec = turn.status, turn.step_spec
    if status.phase != "Progressing" or status.step is None or spec is None:
        return None
    if turn.now - status.step.entered_at <= spec.deadline:
        return None
    missing = "; ".join([*_unmet(turn), *_unapproved(turn)]) or "nothing but time"
    text = f"step {status.step.index} reached its deadline ({since(turn, status.step.entered_at)}): {missing}"
    return Outcome(turn.update(phase="Paused").say("Paused", "DeadlineExceeded", text, alert=True))


def _unapproved(turn: Turn) -> tuple[str, ...]:
    """Approvals that the next step waits for."""
    step = turn.status.step
    if step is None or step.weight_desired == 100 or not turn.missing_approvals:
        return ()
    return () if turn.rollout.spec.strategy.steps[turn.step_above(step.weight_desired)].weight is None else (turn.missing_approvals,)


def _unmet(turn: Turn) -> list[str]:
    """Rule 2: everything that still stands between this step and the next, in words."""
    status, spec, step = turn.status, turn.step_spec, turn.status.step
    if step is None or spec is None:
        return ["no step"]
    out: list[str] = []
    if step.weight_effective_since is None:
        shown = f"weight {step.weight_desired}" if step.weight_desired else "shadow"
        out.append(f"{shown} is not seen at the gateway (it shows {step.weight_observed})")
    elif step.weight_observed is None:
        out.append("the gateway can't be asked now, and no weight is raised unseen")
    elif turn.now - step.weight_effective_since < spec.min_dwell:
        out.append(f"minDwell: {since(turn, step.weight_effective_since)} of {_text(spec.min_dwell)}")
    if not turn.candidate_ready:
        out.append("the candidate is not ready")
    if unasked := model_unasked(turn):
        out.append(unasked)
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
    """Rule 2: up only when every blocking gate passes on this step's own evidence, with dwell, samples and approvals.

    The next step is the lowest of the spec, as it is now, that gives more than this one: steps may be edited under way, and then an index
    would jump over some of them. Promoted is only who was seen to answer everything.
    """
    status = turn.status
    if status.phase == "Paused":
        return Outcome(turn)  # reason and message stay those of the pause
    if status.step is None or status.phase != "Progressing":
        return None
    unmet = _unmet(turn)
    if unmet:
        return hold(turn, "Waiting", unmet[0] if len(unmet) == 1 else f"{unmet[0]} (+{len(unmet) - 1} more)")
    if turn.seen.look is None and not status.force_promote:
        return hold(turn, "Waiting", "this look has no data")
    if status.step.weight_desired == 100:
        return promote(turn) if status.step.weight_observed == 100 else hold(turn, "Waiting", "weight 100 is not seen at the gateway now")
    following = turn.step_above(status.step.weight_desired)
    if _unapproved(turn):
        return hold(turn, "ApprovalMissing", turn.missing_approvals)
    turn = turn.say("Advanced", "Advanced", f"step {status.step.index} passed after {since(turn, status.step.entered_at)}")
    return enter(turn, following)


def enter(turn: Turn, index: int) -> Outcome:
    """Begin a step: intent into the status, then the write. The only place where a candidate gains weight."""
    status, spec = turn.status, turn.rollout.spec.strategy.steps[index]
    assert status.stable is not None  # noqa: S101 - no step without a stable service
    assert status.candidate is not None  # noqa: S101 - nor without a candidate
    void = _on_the_split(turn) if status.sample_ratio_message else frozenset[str]()
    turn = turn.update(
        phase="Progressing", paused_by_spec=False, step=begin_step(turn, index), sample_ratio=RatioState(), sample_ratio_message="",
        gates=tuple(
            GateStatus(name=g.name, role=g.role, state=GateState(config=g.state.config)) if g.name in void else new_step(g)
            for g in status.gates),
    )
    route = RouteWanted(
        stable=status.stable.service, candidate=status.candidate.service, weight=spec.live_weight, shadow=spec.shadow,
    )
    turn = want_route(turn, route)
    if spec.live_weight:
        turn = turn.update(had_weight=True)
    text = "the candidate gets copies of requests" if spec.shadow else f"the candidate gets {spec.live_weight} % of requests"
    turn = turn.say("StepEntered", "Progressing", f"step {index}: {text}")
    seen = turn.seen.route
    return Outcome(turn, () if seen is not None and normal(seen) == normal(route) else (route_action(turn),))
