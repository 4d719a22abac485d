"""decide(rollout, status, observation, now) → Decision. Pure: no client, no clock, no randomness.

Order of safety, written here once: the status with the new intent is stored before any action is done, and each action is
complete in itself. So after a crash at any point the next turn sees either the old route (intent not done yet: do it again)
or the new one (done). A candidate gains weight only in `climbing.enter`, which is reached only past every rule that could take
weight away: a rollback under way, a failed gate, a crash loop, a new candidate, a person's word, a stranger's change, blindness.

RULES are asked in this order, and the first that has an answer decides. Numbers refer to the rules of decision in the design.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from hafnium_rollout.actions import Decision
from hafnium_rollout.climbing import (
    advance,
    blind,
    doubted,
    enter,
    missing_service,
    model_unasked,
    no_room,
    overdue,
    pending,
    waits_in_doubt,
)
from hafnium_rollout.endings import finished, go_back, heed_aborts, promote, reject_too, rolling_back
from hafnium_rollout.intake import take_in
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.outside import outside_change, write_again
from hafnium_rollout.people import handled, in_words, open_actions
from hafnium_rollout.reporting import finish
from hafnium_rollout.status import REJECTED_MAX, GateStatus, RolloutStatus
from hafnium_rollout.turn import Outcome, Turn, hold, own_time_since, reached, restarts_in_step, since
from hafnium_rollout.wrong_clock import set_right


def decide(rollout: ModelRollout, status: RolloutStatus, seen: Observation, now: datetime) -> Decision:
    """What to do next. Write the decision's status, then do its actions in order."""
    before = status
    turn = take_in(Turn(rollout, set_right(status, now), seen, now))
    for rule in RULES:
        outcome = rule(turn)
        if outcome is not None:
            return finish(before, outcome)
    return finish(before, hold(turn, "Waiting", "nothing to do"))


def _going_back(turn: Turn) -> Outcome | None:
    """Rule 9. A rollback for another model's sake doesn't acquit this one: what is said or proven of it meanwhile is remembered with it."""
    if turn.status.rollback is None:
        return None
    turn = heed_aborts(turn)
    failed = _failed_gate(turn)
    if failed is not None and _held_against(turn, failed):
        turn = reject_too(turn, "GateFailed", f"{failed.role} gate {failed.name}: {failed.message}")
    return rolling_back(turn)


def _held_against(turn: Turn, failed: GateStatus) -> bool:
    """Of requests only those count that the gateway gives it: who still asks it past the route is no caller of the rollout's."""
    step, rollback = turn.status.step, turn.status.rollback
    if step is None or rollback is None or rollback.reject or waits_in_doubt(turn, failed) or doubted(turn, failed) is not None:
        return False
    by_job = any(g.name == failed.name and g.kind in ("drift", "evidence") for g in turn.rollout.spec.gates)
    return by_job or bool(step.weight_observed) or step.shadow_observed


def _unsafe(turn: Turn) -> Outcome | None:
    """Rule 3: Safety Fail or hard limit → back at once. Quality → after its failureLimit. A crash loop is a Safety failure."""
    if broken := _broken_service(turn):
        return go_back(turn, broken[0], broken[1], reject=True)
    failed = _failed_gate(turn)
    if failed is None or waits_in_doubt(turn, failed):
        return None
    return doubted(turn, failed) or go_back(turn, "GateFailed", f"{failed.role} gate {failed.name}: {failed.message}", reject=True)


def _failed_gate(turn: Turn) -> GateStatus | None:
    specs = {g.name: g for g in turn.rollout.spec.gates}
    if turn.status.step is None:
        return None
    for status in turn.status.gates:
        gate = specs[status.name]
        if gate.blocking and status.verdict == "Fail" and (gate.role == "Safety" or status.failures >= gate.failure_limit):
            return status
    return None


def _broken_service(turn: Turn) -> tuple[str, str] | None:
    """A candidate that restarts again and again, serves another model, or isn't ready for long while stable is."""
    strategy, step, candidate = turn.rollout.spec.strategy, turn.status.step, turn.status.candidate
    found = turn.service(candidate)
    if step is None or candidate is None or turn.seen.services is None:
        return None
    if found is not None and (count := restarts_in_step(step, found)) >= strategy.restart_limit:
        return "CrashLoop", f"{candidate.service} was restarted {count} times in this step: {found.message or 'no message'}"
    if found is not None and found.digest and found.digest != candidate.digest:
        return "WrongModel", f"{candidate.service} serves {found.digest[:19]}, expected {candidate.digest[:19]}"
    if found is not None and found.wrong_model:
        return "WrongModel", f"{candidate.service}: {found.wrong_model}"
    stable = turn.service(turn.status.stable)
    too_long = step.unready_since is not None and turn.now - own_time_since(turn, step.unready_since) > strategy.max_blind_duration
    if found is not None and found.no_room:
        return None  # not the candidate's fault: `no_room` takes its traffic away and waits for a person
    if too_long and stable is not None and stable.ready and step.unready_since is not None:
        why = found.message if found is not None and found.message else "no message"
        return "CandidateUnavailable", f"{candidate.service} is not ready since {since(turn, step.unready_since)}: {why}"
    return None


def _superseded(turn: Turn) -> Outcome | None:
    """Another digest is asked for while this one is under way."""
    status, spec = turn.status, turn.rollout.spec
    digest, candidate = spec.model.digest, status.candidate
    if candidate is None or digest == candidate.digest or digest in status.rejected_digests:
        return None
    if status.stable is not None and digest == status.stable.digest:
        text = f"the stable model {digest[:19]} is asked for again"
        return go_back(turn, "Reverted", text, reject=False)
    if spec.strategy.on_new_candidate == "Restart":
        text = f"a new candidate {spec.model.version} ({digest[:19]}) came; the old one goes back first"
        return go_back(turn, "Superseded", text, reject=False)
    if spec.strategy.on_new_candidate == "Reject":
        turn = turn.update(rejected_digests=(*status.rejected_digests, digest)[-REJECTED_MAX:])
        return Outcome(turn.say("CandidateRejected", "CandidateRejected", f"{digest[:19]} came during another rollout"))
    return None  # Queue: it begins when this run has ended


def persons_word(turn: Turn) -> Outcome | None:
    """A user's action, once, and only for the candidate that it names."""
    waiting = open_actions(turn)
    status, candidate = turn.status, turn.status.candidate
    if not waiting or candidate is None:
        return None
    action = waiting[0]
    turn = handled(turn, action)
    why = in_words(action, "a person asked for it")

    def ignored(text: str) -> Outcome:
        return Outcome(turn.say("ActionIgnored", "ActionIgnored", f"{action.type}: {text}"))

    if action.candidate_digest != candidate.digest:
        return ignored(f"it names {action.candidate_digest[:19]}, the candidate is {candidate.digest[:19]}")
    if action.type == "Abort":
        return go_back(turn, "Aborted", why, reject=True)
    step = status.step
    if step is None and action.type == "Retry" and status.phase == "Paused":  # older releases paused before the first step, too
        return Outcome(turn.update(phase="Pending", paused_by_spec=False, external_changes=()).say("Retry", "Retry", why))
    if step is None:
        return ignored("the candidate is not ready yet")
    last = len(turn.rollout.spec.strategy.steps) - 1
    target = {"Promote": last, "SkipStep": turn.step_above(reached(step)), "Retry": turn.step_at_most(reached(step)) or 0}[action.type]
    if action.type == "Retry" and status.phase != "Paused":
        return ignored("the rollout is neither paused nor ended")
    if turn.rollout.spec.strategy.steps[target].weight is not None and turn.missing_approvals:
        return ignored(turn.missing_approvals)
    if not turn.candidate_ready:
        return ignored("the candidate is not ready")
    if unasked := model_unasked(turn):
        return ignored(unasked)
    if action.type == "Retry":
        return enter(turn.update(external_changes=()).say("Retry", "Retry", why), target)
    if step.weight_desired == 100 and step.weight_observed != 100:
        return ignored("the gateway does not show weight 100; ask again when it does")
    turn = turn.say(action.type, action.type, why).update(force_promote=action.type == "Promote" or status.force_promote)
    if step.weight_desired == 100:
        return promote(turn)
    return enter(turn, target)


def stopped(turn: Turn) -> Outcome | None:
    """spec.paused: hold where it is. Safety rules were asked before."""
    status = turn.status
    if turn.rollout.spec.paused and status.phase in ("Pending", "Progressing"):
        if status.step is None:
            return hold(turn, "PausedBySpec", "spec.paused is true")
        return Outcome(turn.update(phase="Paused", paused_by_spec=True).say("Paused", "PausedBySpec", "spec.paused is true"))
    if not turn.rollout.spec.paused and status.phase == "Paused" and status.paused_by_spec and status.step is not None:
        step = status.step.model_copy(update={"entered_at": turn.now})  # the deadline's clock stood still
        turn = turn.update(phase="Progressing", paused_by_spec=False, step=step)
        return Outcome(turn.say("Resumed", "Resumed", "spec.paused is false"))
    return None


RULES: tuple[Callable[[Turn], Outcome | None], ...] = (
    _going_back, finished, _unsafe, _superseded, persons_word, outside_change, no_room, blind, overdue, missing_service, write_again,
    stopped, pending, advance,
)
"""`write_again` answers for as long as the route can't be written (too few pods for the weight, say), so what has to be said or done
meanwhile is asked before it."""
