"""Beginning and end of a run: candidates that start, go back, are promoted, and what is kept up after that. Pure."""

from __future__ import annotations

from datetime import datetime

from hafnium_rollout.actions import Action, Promote, Rollback
from hafnium_rollout.intake import live_matches
from hafnium_rollout.outside import at_rest, fought_over, garbage, keep_route
from hafnium_rollout.people import handled, in_words, open_actions
from hafnium_rollout.statistics.sample_ratio import RatioState
from hafnium_rollout.status import REJECTED_MAX, ModelSeen, RollbackStatus, RouteWanted
from hafnium_rollout.turn import Outcome, Turn, hold, normal, since, start_rollback, want_route


def rolling_back(turn: Turn) -> Outcome | None:
    """Rule 9: a rollback is done when the gateway shows it and no request reaches the candidate any more."""
    status, seen = turn.status, turn.seen
    if status.rollback is None or status.candidate is None:
        return None
    if status.stable is None:
        return Outcome(_rolled_back(turn))
    wanted = RouteWanted(stable=status.stable.service)
    turn = want_route(turn, wanted)
    asked = seen.route is not None and normal(seen.route) == wanted
    shown = asked and seen.live is not None and live_matches(seen.live, wanted)
    rollback = status.rollback
    start = (rollback.shown_since or turn.now) if shown else None
    requests = None if start is None else _candidate_requests(turn, start)
    rollback = rollback.model_copy(update={
        # Unseen is not changed: one list that fails doesn't begin the time anew.
        "shown_since": rollback.shown_since if asked and seen.live is None else start,
        "counted_at": turn.now if requests is not None else rollback.counted_at,
    })
    turn = turn.update(rollback=rollback)
    if shown and not status.had_weight:
        return Outcome(_rolled_back(turn))
    if shown and requests == 0:
        return Outcome(_rolled_back(turn, _still_asked(turn)))
    if shown and _gone(turn):
        return Outcome(_rolled_back(turn, "the candidate's service and pods are gone, so no request can reach it"))
    action = Rollback(status.stable.service, status.candidate.service, rollback.reason)
    actions = (action,) if seen.route_absent or (seen.route is not None and not asked) else ()
    return _not_done(turn, rollback, requests, actions)


def _not_done(turn: Turn, rollback: RollbackStatus, requests: float | None, actions: tuple[Action, ...]) -> Outcome:
    """A rollback goes on. After maxBlindDuration it says what is lacking, and what can be done without knowing is done (ADR 15).

    Nothing but the end of the candidate's pods replaces the counters: an unknown count never becomes a zero by waiting.
    """
    limit = turn.rollout.spec.strategy.max_blind_duration
    if rollback.shown_since is None:
        kind, start, doubt = "NotShown", rollback.requested_at, "the gateway does not show it yet"
    elif requests is None:
        kind, start = "NotCounted", max(rollback.shown_since, rollback.counted_at or rollback.shown_since)
        problems = f" ({'; '.join(turn.seen.problems)})" if turn.seen.problems else ""
        doubt = f"it isn't known yet whether requests still reach the candidate{problems}"
    else:
        kind, start, doubt = "StillReached", rollback.shown_since, f"{requests:g} requests reached the candidate in the last look"
    late = turn.now - start > limit
    if late and kind == "NotCounted":
        doubt += "; its service is deleted, since requests can't reach what isn't there"
        if turn.seen.live is not None:
            actions = (*actions, *garbage(turn))
    if late and kind == "StillReached":
        doubt += ", though the gateway shows the route without it: who asks it past the gateway?"
    if late and rollback.overdue != kind:
        text = f"{rollback.message}; the rollback is not seen to be done since {since(turn, rollback.requested_at)}: {doubt}"
        turn = turn.say("RollbackUnconfirmed", kind, text, alert=True)
    turn = turn.update(
        rollback=rollback.model_copy(update={"overdue": kind if late else "", "doubt": doubt}),
        reason=kind if late else "RollingBack", message=f"{rollback.message}; {doubt}")
    return Outcome(turn, actions)


def _gone(turn: Turn) -> bool:
    """Nothing is there that a request could reach, and nothing would bring it back."""
    candidate, seen = turn.status.candidate, turn.seen
    return candidate is not None and seen.services is not None and candidate.service not in seen.managed and seen.candidate_pods == 0


def go_back(turn: Turn, reason: str, message: str, *, reject: bool) -> Outcome:
    """Begin a rollback: the intent, and the first write for it in the same turn."""
    started = start_rollback(turn, reason, message, reject=reject)
    return rolling_back(started) or Outcome(started)


def reject_too(turn: Turn, reason: str, why: str) -> Turn:
    """The rollback under way was no verdict on the candidate, and now there is one: its digest will be rejected."""
    status = turn.status
    assert status.rollback is not None  # noqa: S101 - callers are in a rollback
    assert status.candidate is not None  # noqa: S101 - which is the candidate's
    rollback = status.rollback.model_copy(update={"reject": True, "message": f"{status.rollback.message}; rejected while it went: {why}"})
    text = f"{status.candidate.digest[:19]} is rejected while it goes back: {why}"
    return turn.update(rollback=rollback).say("CandidateRejected", reason, text, alert=True)


def heed_aborts(turn: Turn) -> Turn:
    """An Abort while no run can be ended by it: of the candidate that goes back or is back, or of the model that would begin next.

    It would be spent otherwise, and the model that a person said no to begins. Of the stable model it is none: nothing is before it.
    """
    waiting = open_actions(turn)
    retried = {a.candidate_digest for a in waiting if a.type == "Retry" and turn.status.rollback is None}
    for action in waiting:
        if action.type != "Abort" or action.candidate_digest in retried:
            continue  # who is tried again can be aborted when it has begun
        status, digest, why = turn.status, action.candidate_digest, in_words(action, "a person asked for it")
        candidate = status.candidate.digest if status.candidate is not None and status.phase != "Promoted" else ""
        if digest == candidate and status.rollback is not None:
            turn = turn if status.rollback.reject else reject_too(handled(turn, action), "Aborted", why)
        elif _could_begin(turn, digest, candidate):
            turn = handled(turn, action).update(rejected_digests=(*status.rejected_digests, digest)[-REJECTED_MAX:])
            turn = turn.say("CandidateRejected", "Aborted", f"{digest[:19]} is rejected: {why}", alert=True)
    return turn


def _could_begin(turn: Turn, digest: str, candidate: str) -> bool:
    """This model is asked for or was there last, isn't in production, and nothing keeps it from beginning (again)."""
    status, wanted = turn.status, turn.rollout.spec.model.digest
    in_production = {m.digest for m in (status.stable, status.candidate if status.phase == "Promoted" else None) if m is not None}
    return digest in (wanted, candidate) and digest not in in_production and digest not in status.rejected_digests


def _candidate_requests(turn: Turn, start: datetime) -> float | None:
    """Requests that reached the candidate in a look that began after the gateway showed the route; the most that a counter of ours says.

    None: not known. A gate's error, a pod that isn't scraped, or a look from before the route say nothing about now. Queries of the user's
    own are left out: a total that has a kubelet's probes in it never falls silent, and a zero of one proves nothing either (ADR 15).
    """
    look = turn.seen.look
    if look is None or look.candidate_requests is None or look.started < start:
        return None
    own = {g.name for g in turn.rollout.spec.gates if g.prometheus is not None}
    counted = [s.candidate.total for name, g in look.gates.items() if name not in own for s in g.series]
    return max([look.candidate_requests, look.routed_candidate or 0.0, *counted])


def _still_asked(turn: Turn) -> str:
    """What the user's own queries go on counting: said, since nobody but them knows what it is."""
    look = turn.seen.look
    gates = [g.name for g in turn.rollout.spec.gates if g.prometheus is not None]
    totals = [(n, s.candidate.total) for n in gates if look is not None and n in look.gates for s in look.gates[n].series]
    found = [f"{name} {total:g}" for name, total in totals if total > 0]
    return f"no request of a caller reaches the candidate; queries of gates still count {', '.join(found)} (probes?)" if found else ""


def _rolled_back(turn: Turn, how: str = "") -> Turn:
    status = turn.status
    rollback, candidate = status.rollback, status.candidate
    assert rollback is not None  # noqa: S101 - the caller checked it
    assert candidate is not None  # noqa: S101 - the caller checked it
    rejected = status.rejected_digests
    if rollback.reject and candidate.digest not in rejected:
        rejected = (*rejected, candidate.digest)[-REJECTED_MAX:]
    turn = turn.update(
        phase="RolledBack", rollback=None, step=None, rejected_digests=rejected, force_promote=False, sample_ratio_message="",
    )
    return turn.say("RolledBack", rollback.reason, f"{rollback.message}{f'; {how}' if how else ''}")


def finished(turn: Turn) -> Outcome | None:
    """Promoted, rolled back, or never begun: keep the route as it is, clean up, and look whether there is a new candidate."""
    status, digest = turn.status, turn.rollout.spec.model.digest
    if status.run_id and status.phase not in ("Promoted", "RolledBack"):
        return None
    turn = heed_aborts(turn)
    retry = next((a for a in open_actions(turn) if a.type == "Retry" and a.candidate_digest == digest), None)
    if retry is not None:
        turn = handled(turn, retry).update(
            rejected_digests=tuple(d for d in turn.status.rejected_digests if d != digest), external_changes=())
        again = turn.say("Retry", "Retry", in_words(retry, "a person asked to try again"))
        if status.phase == "RolledBack":
            return Outcome(_begin(again))
        if status.stable is not None and status.stable.digest == digest and not fought_over(status):
            text = f"Retry: {status.stable.service} answers all requests, there is nothing to try again"
            return Outcome(turn.say("ActionIgnored", "ActionIgnored", text))
        turn = again
    elif open_actions(turn):
        action = open_actions(turn)[0]
        return Outcome(handled(turn, action).say("ActionIgnored", "ActionIgnored", f"{action.type} has nothing to act on"))
    kept = keep_route(turn)
    if kept is not None and not (fought_over(turn.status) and _asks_for_another(turn)):
        return kept  # but a fight that was left to a person holds up no later model: its run begins with a put back
    stable = turn.status.stable
    if stable is not None and stable.digest == digest:
        turn = _stable_again(turn, stable)
        last = turn.status.taken_back
        text = f"{stable.service} answers all requests{f'; the last run, of {last.service}, was taken back' if last is not None else ''}"
        return Outcome(turn.update(reason="Promoted", message=text), at_rest(turn))
    if digest in turn.status.rejected_digests:
        if status.phase == "RolledBack" and status.candidate is not None and status.candidate.digest == digest:
            return Outcome(_told_again(turn), at_rest(turn))
        return Outcome(_rejected_again(turn, digest), at_rest(turn))
    if status.phase == "Promoted" and status.candidate is not None and status.candidate.digest == digest:
        return Outcome(turn, at_rest(turn))  # it was promoted, and the stable service was given another model since
    if turn.status.stable is None and not turn.seen.route_absent:
        why = "the route can't be read" if turn.seen.route is None else "the route isn't of a form that names one service for all requests"
        return hold(turn, "Waiting", f"{why}, so it isn't known who is stable")
    return Outcome(_begin(turn), at_rest(turn))


def _stable_again(turn: Turn, stable: ModelSeen) -> Turn:
    """The stable model is asked for. A run that was taken back before stays the last one: its evidence is about its own model alone."""
    status = turn.status
    candidate = status.candidate
    back = status.phase == "RolledBack" and candidate is not None and candidate.digest != stable.digest
    if back or _last_turning_point(turn)[0] == "DigestRejected":
        turn = turn.update(phase="Promoted", candidate=stable, taken_back=candidate if back else status.taken_back)
        text = f"the stable model {stable.digest[:19]} is asked for again; {stable.service} answers all requests"
        return turn.say("StableAskedAgain", "StableAskedAgain", text)
    if status.phase == "Promoted" and candidate is not None and candidate.digest == stable.digest:
        return turn
    return turn.update(phase="Promoted", candidate=stable, run_id=status.run_id or stable.digest[7:15])


def _told_again(turn: Turn) -> Turn:
    """Reason and message are those of the rollback; another rejected model may have been asked for in between."""
    back = [p for p in turn.status.history if p.event == "RolledBack"]
    return turn.update(reason=back[-1].reason, message=back[-1].message) if turn.status.reason == "DigestRejected" and back else turn


def _asks_for_another(turn: Turn) -> bool:
    """A model that may begin: not the stable one, not one that was rejected or that this run has promoted."""
    status, digest = turn.status, turn.rollout.spec.model.digest
    known = {m.digest for m in (status.stable, status.candidate if status.phase == "Promoted" else None) if m is not None}
    return digest not in known and digest not in status.rejected_digests


def _rejected_again(turn: Turn, digest: str) -> Turn:
    """A rejected model is asked for: told once, and nothing else changes: the phase is that of the last run's model."""
    status = turn.status
    serves = status.stable is not None and status.candidate is not None and status.candidate.service == status.stable.service
    turn = turn.update(phase="Promoted" if serves else "RolledBack")
    text = f"{digest[:19]} was rejected; only Retry clears that"
    event, message = _last_turning_point(turn)
    if event in ("DigestRejected", "CandidateRejected") and message.startswith(digest[:19]):
        return turn.update(reason="DigestRejected", message=text)
    return turn.say("DigestRejected", "DigestRejected", text, alert=True)


_TURNING_POINTS = frozenset({"Started", "Promoted", "RolledBack", "StableAskedAgain", "CandidateRejected", "DigestRejected"})


def _last_turning_point(turn: Turn) -> tuple[str, str]:
    """Event and message. From history: other things that happened since have taken the place of the status' reason."""
    told = [*((p.event, p.message) for p in turn.status.history), *((e.name, e.message) for e in turn.events)]
    return next((t for t in reversed(told) if t[0] in _TURNING_POINTS), ("", ""))


def _begin(turn: Turn) -> Turn:
    """A new run for the candidate in the spec. It starts without any weight."""
    model, status = turn.rollout.spec.model, turn.status
    candidate = ModelSeen(
        service=turn.rollout.service_name(model.digest), storage_uri=model.storage_uri, digest=model.digest, version=model.version,
        trained_by=model.trained_by or "",
    )
    turn = turn.update(
        phase="Pending", run_id=f"{model.digest[7:15]}-{turn.now:%Y%m%dT%H%M%S}", started_at=turn.now, candidate=candidate,
        taken_back=None, step=None, gates=(), rollback=None, force_promote=False, sample_ratio=RatioState(), sample_ratio_message="",
        external_changes=(), had_weight=False, unready=None,
    )
    if status.stable is not None:
        turn = want_route(turn, RouteWanted(stable=status.stable.service))
    return turn.say("Started", "Started", f"{model.name} {model.version} ({model.digest[:19]}) begins")


def promote(turn: Turn) -> Outcome:
    """The last step has passed: the candidate is the stable model from now on."""
    candidate = turn.status.candidate
    assert candidate is not None  # noqa: S101 - a step has a candidate
    window = turn.rollout.spec.strategy.rollback_window
    old = (turn.status.stable,) if turn.status.stable is not None else ()
    turn = turn.update(previous=(*old, *turn.status.previous)[:window], stable=candidate)
    return promoted(turn, "Promoted", f"{candidate.service} is the stable model now")


def promoted(turn: Turn, reason: str, message: str) -> Outcome:
    stable = turn.status.stable
    assert stable is not None  # noqa: S101 - both callers set it
    turn = turn.update(phase="Promoted", step=None, force_promote=False, sample_ratio_message="")
    turn = want_route(turn.say("Promoted", reason, message), RouteWanted(stable=stable.service))
    return Outcome(turn, (Promote(stable.service),))
