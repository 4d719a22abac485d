"""Beginning and end of a run: candidates that start, go back, are promoted, and what is kept up after that. Pure."""

from __future__ import annotations

from hafnium_rollout.actions import Promote, Rollback
from hafnium_rollout.intake import live_matches
from hafnium_rollout.outside import garbage, keep_route
from hafnium_rollout.people import handled, in_words, open_actions
from hafnium_rollout.statistics.sample_ratio import RatioState
from hafnium_rollout.status import IDS_MAX, ModelSeen, RouteWanted
from hafnium_rollout.turn import Outcome, Turn, hold, normal, start_rollback, want_route


def rolling_back(turn: Turn) -> Outcome | None:
    """Rule 9: a rollback is done when the gateway shows it and no request reaches the candidate any more."""
    status, seen = turn.status, turn.seen
    if status.rollback is None or status.candidate is None:
        return None
    if status.stable is None:
        return Outcome(_rolled_back(turn))
    wanted = RouteWanted(stable=status.stable.service)
    turn = want_route(turn, wanted)
    if seen.route_absent or (seen.route is not None and normal(seen.route) != wanted):
        action = Rollback(status.stable.service, status.candidate.service, status.rollback.reason)
        return Outcome(turn.update(reason="RollingBack", message=status.rollback.message), (action,))
    if seen.route is None or seen.live is None or not live_matches(seen.live, wanted):
        return hold(turn, "RollingBack", f"{status.rollback.message}; the gateway does not show it yet")
    if seen.look is None or _candidate_requests(turn) > 0:
        return hold(turn, "RollingBack", f"{status.rollback.message}; waiting until no request reaches the candidate")
    return Outcome(_rolled_back(turn))


def go_back(turn: Turn, reason: str, message: str, *, reject: bool) -> Outcome:
    """Begin a rollback: the intent, and the first write for it in the same turn."""
    started = start_rollback(turn, reason, message, reject=reject)
    return rolling_back(started) or Outcome(started)


def _candidate_requests(turn: Turn) -> float:
    """Requests that reached the candidate in this look, by whichever counter knows."""
    look = turn.seen.look
    if look is None:
        return 0.0
    counted = [s.candidate.total for g in look.gates.values() for s in g.series]
    return max([look.routed_candidate or 0.0, *counted])


def _rolled_back(turn: Turn) -> Turn:
    status = turn.status
    rollback, candidate = status.rollback, status.candidate
    assert rollback is not None  # noqa: S101 - the caller checked it
    assert candidate is not None  # noqa: S101 - the caller checked it
    rejected = status.rejected_digests
    if rollback.reject and candidate.digest not in rejected:
        rejected = (*rejected, candidate.digest)[-IDS_MAX:]
    turn = turn.update(
        phase="RolledBack", rollback=None, step=None, rejected_digests=rejected, force_promote=False, sample_ratio_message="",
    )
    return turn.say("RolledBack", rollback.reason, rollback.message)


def finished(turn: Turn) -> Outcome | None:
    """Promoted, rolled back, or never begun: keep the route as it is, clean up, and look whether there is a new candidate."""
    status, digest = turn.status, turn.rollout.spec.model.digest
    if status.run_id and status.phase not in ("Promoted", "RolledBack"):
        return None
    retry = next((a for a in open_actions(turn) if a.type == "Retry" and a.candidate_digest == digest), None)
    if retry is not None:
        turn = handled(turn, retry).update(rejected_digests=tuple(d for d in turn.status.rejected_digests if d != digest))
        if status.phase == "RolledBack":
            return Outcome(_begin(turn.say("Retry", "Retry", in_words(retry, "a person asked to try again"))))
    elif open_actions(turn):
        action = open_actions(turn)[0]
        return Outcome(handled(turn, action).say("ActionIgnored", "ActionIgnored", f"{action.type} has nothing to act on"))
    kept = keep_route(turn)
    if kept is not None:
        return kept
    stable = turn.status.stable
    if stable is not None and stable.digest == digest:
        known = status.phase == "Promoted" and status.candidate is not None and status.candidate.digest == digest
        turn = turn if known else turn.update(phase="Promoted", candidate=stable, run_id=status.run_id or digest[7:15])
        return Outcome(turn.update(reason="Promoted", message=f"{stable.service} answers all requests"), garbage(turn))
    if digest in turn.status.rejected_digests:
        if status.phase == "RolledBack" and status.candidate is not None and status.candidate.digest == digest:
            return Outcome(turn, garbage(turn))  # reason and message stay those of the rollback
        text = f"{digest[:19]} was rejected{_because(turn)}; only Retry clears that"
        return Outcome(turn.update(phase="RolledBack", reason="DigestRejected", message=text), garbage(turn))
    if status.phase == "Promoted" and status.candidate is not None and status.candidate.digest == digest:
        return Outcome(turn, garbage(turn))  # it was promoted, and the stable service was given another model since
    if turn.status.stable is None and not turn.seen.route_absent:
        return hold(turn, "Waiting", "the route can't be read, so it isn't known who is stable")
    return Outcome(_begin(turn), garbage(turn))


def _because(turn: Turn) -> str:
    status = turn.status
    return f" ({status.message})" if status.phase == "RolledBack" and status.reason not in ("", "DigestRejected") else ""


def _begin(turn: Turn) -> Turn:
    """A new run for the candidate in the spec. It starts without any weight."""
    model, status = turn.rollout.spec.model, turn.status
    candidate = ModelSeen(
        service=turn.rollout.service_name(model.digest), storage_uri=model.storage_uri, digest=model.digest, version=model.version,
        trained_by=model.trained_by or "",
    )
    turn = turn.update(
        phase="Pending", run_id=f"{model.digest[7:15]}-{turn.now:%Y%m%dT%H%M%S}", started_at=turn.now, candidate=candidate,
        step=None, gates=(), rollback=None, force_promote=False, sample_ratio=RatioState(), sample_ratio_message="",
        external_changes=(),
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
