"""The route and strangers: our own unfinished writes, other people's changes, and services nobody names any more. Pure."""

from __future__ import annotations

from datetime import timedelta

from hafnium_contract.durations import format_duration
from hafnium_rollout.actions import Action, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.intake import live_matches, recent_changes
from hafnium_rollout.observation import RouteSeen
from hafnium_rollout.status import RolloutStatus, RouteWanted
from hafnium_rollout.turn import Outcome, Turn, hold, normal, start_rollback

PATIENCE = timedelta(minutes=2)
"""A put back that has no effect for so long counts as one more change: other rules have their turn only when this one gives up."""
_PATIENCE_TEXT = format_duration(PATIENCE)
CHANGES_MAX = 3
"""So many changes by someone else in ten minutes (`intake.CHANGES_WINDOW`) are a fight; the rollout leaves it."""


def _who(turn: Turn) -> str:
    return (turn.seen.route.manager if turn.seen.route is not None else "") or "someone else"


def fought_over(status: RolloutStatus) -> bool:
    """Someone else insists. The reason doesn't tell: other words come after it. Retry, a new run, or peace of ten minutes end it."""
    return len(status.external_changes) >= CHANGES_MAX


def left_to_a_person(turn: Turn) -> bool:
    """The rollout is paused for a fight, and the route is still as the stranger wants it."""
    status, route = turn.status, turn.seen.route
    changed = route is not None and status.route is not None and normal(route) != normal(status.route)
    return status.phase == "Paused" and fought_over(status) and changed


def put_back(turn: Turn, *, always: bool) -> Outcome | None:
    """Restores the wanted route, unless that was needed too often lately. `always`: a model that is due nothing must not serve.

    It is told at most three times in ten minutes, however often it is done, and once for each change: a write that the API server refuses
    leaves the same change there at the next look (for PATIENCE). One that waits for pods is done by `write_again`, as any rise: it may wait
    as long as it takes, and hides no other trouble meanwhile.
    """
    status, recent, revision = turn.status, recent_changes(turn), turn.seen.route.revision if turn.seen.route is not None else ""
    same = revision != "" and revision == status.external_revision and bool(status.external_changes)
    if same and not fought_over(status) and _rises(turn.seen.route, _writable(status)):
        return None
    waits = same and turn.now - status.external_changes[-1] < PATIENCE
    told = waits or (len(recent) >= CHANGES_MAX if always else fought_over(status))
    if not told:
        turn = turn.update(external_changes=(*recent, turn.now)[-CHANGES_MAX:], external_revision=revision)
    text, in_vain = f"{_who(turn)} changed the route to {_route_text(turn.seen.route)}", f"its put back had no effect for {_PATIENCE_TEXT}"
    if not always and fought_over(turn.status):
        why = in_vain if same else f"{CHANGES_MAX} times in ten minutes"
        if same and told and status.reason == "ExternalChange":
            return _left(turn, status.message, told=True)  # which of the two it was is known when it is told first
        return _left(turn, f"{text}; {why}: left as it is, a person must settle it and Retry", told=told)
    if told:
        how = "" if waits else " each time, until whoever writes it stops"
        turn = turn.update(reason="ExternalChange", message=f"{text}; put back{how}")
    else:
        turn = turn.say("ExternalChange", "ExternalChange", f"{text}; {f'{in_vain}: tried again' if same else 'put back'}", alert=True)
    return Outcome(turn, (route_action(turn, _writable(status)),))


def _rises(there: RouteSeen | None, wanted: RouteWanted | None) -> bool:
    """Whether the put back only gives the candidate more of a route that is ours: such a write waits until there are pods for it.

    A route that names another service is no such one: while its put back waits, that service answers requests, and somebody must hear it.
    """
    if there is None or wanted is None or wanted.candidate is None:
        return False
    if there.stable != wanted.stable or there.candidate not in (None, wanted.candidate):
        return False
    return there.weight <= wanted.weight


def _left(turn: Turn, text: str, *, told: bool) -> Outcome | None:
    """The route stays as the stranger wants it, and under way the rollout pauses. None: it has, and other rules may have more to say."""
    phase = turn.status.phase
    if phase == "Progressing":
        return Outcome(turn.update(phase="Paused", paused_by_spec=False).say("ExternalChange", "ExternalChange", text, alert=True))
    if not told:
        return Outcome(turn.say("ExternalChange", "ExternalChange", text, alert=True))
    return None if phase == "Paused" else hold(turn, "ExternalChange", text)


def _writable(status: RolloutStatus) -> RouteWanted | None:
    """What a stranger's change is put back to: what is wanted, or what stood there while a higher weight still waits to be written.

    That one may wait for pods as long as it takes. Meanwhile the stranger's share would stay, and be taken for a new change at each look.
    """
    if status.route is None or status.route_confirmed or not status.route_before:
        return status.route
    return min(status.route, status.route_before[0], key=lambda r: normal(r).weight)


def _route_text(route: RouteSeen | None) -> str:
    if route is None:
        return "nothing"
    found = normal(route)
    return f"{found.stable} {100 - found.weight} %" + (
        f", {found.candidate} {found.weight} %{' + copies' if found.shadow else ''}" if found.candidate else "")


def route_action(turn: Turn, route: RouteWanted | None = None) -> Action:
    """The write that makes the route what is given, or else what is wanted."""
    status, route = turn.status, route or turn.status.route
    assert route is not None  # noqa: S101 - callers have an intent
    if route.candidate is not None and route.shadow:
        return SetShadow(route.stable, route.candidate)
    if route.candidate is not None:
        return SetWeight(route.stable, route.candidate, route.weight)
    if status.phase == "Promoted":
        return Promote(route.stable)
    return Rollback(route.stable, status.candidate.service if status.candidate is not None else "", status.reason)


def write_again(turn: Turn) -> Outcome | None:
    """The intent is in the status but not in the route: a crash came between, or the route file is gone. Do it (again)."""
    status, seen = turn.status, turn.seen
    if status.route is None or (seen.route is None and not seen.route_absent):
        return None
    if seen.route is not None and normal(seen.route) == normal(status.route):
        return None
    if left_to_a_person(turn) and normal(status.route).candidate is not None:
        return None
    return Outcome(turn, (route_action(turn),))


def outside_change(turn: Turn) -> Outcome | None:
    """Rule 10: someone else changed the route."""
    status, seen = turn.status, turn.seen
    if status.route is None or seen.route is None or status.candidate is None:
        return None
    there, wanted = normal(seen.route), normal(status.route)
    if there == wanted:
        return None
    before = () if status.route_confirmed else tuple(normal(r) for r in status.route_before)
    if there in before:
        return None  # our own write was cut off; `write_again` repeats it
    if seen.route.dark:
        return None  # brought in again by ourselves, after a stranger's template: `write_again` gives it its share when it is ready
    # Also while a weight is intended and not written yet: it would be a rise against a person's word.
    weights = [r.weight for r in (*before, wanted) if r.weight]
    # At 100 % stable has 0: who only takes the candidate's away, or the candidate itself, leaves nobody any, and means the same
    ours = {wanted.stable, *(r.candidate for r in (*before, wanted) if r.candidate is not None)}
    emptied = 100 in weights and bool(seen.route.weightless) and set(seen.route.weightless) <= ours
    if weights and (emptied or there == RouteWanted(stable=wanted.stable)):
        text = f"{_who(turn)} took the candidate's weight from {weights[0]} to 0"
        text += f"; then nobody had any weight, so {wanted.stable} gets all requests" if emptied else ""
        turn = start_rollback(turn, "AbortedOutside", text, reject=True)
        return Outcome(turn, (route_action(turn),) if emptied else ())
    # A share that it has not begun with yet, or that was taken from it because nobody could say how it does, is in no stranger's gift
    return put_back(turn, always=wanted.candidate is None or _rejected_serves(turn, seen.route))


def _rejected_serves(turn: Turn, route: RouteSeen) -> bool:
    """Whether the route names a service of a rejected model: such a one is taken out each time."""
    return bool({route.stable, route.candidate, *route.others} & {turn.rollout.service_name(d) for d in turn.status.rejected_digests})


def keep_route(turn: Turn) -> Outcome | None:
    """After the end the route stays as it was left, unless strangers insist; but a rejected model never serves again."""
    status, seen = turn.status, turn.seen
    if status.route is None or seen.route is None or normal(seen.route) == normal(status.route):
        return write_again(turn) if seen.route_absent and status.route is not None else None
    if normal(seen.route) in [normal(r) for r in status.route_before] and not status.route_confirmed:
        return write_again(turn)
    return put_back(turn, always=_rejected_serves(turn, seen.route))


def garbage(turn: Turn) -> tuple[Action, ...]:
    """Services that this rollout made and nobody names any more: not stable, not a candidate, not at the gateway."""
    status, live = turn.status, turn.seen.live
    if live is None or turn.seen.route is None or status.stable is None:
        return ()
    route = turn.seen.route
    used = {status.stable.service, route.stable, route.candidate, *route.others, *live.weights, *live.mirrors}
    return tuple(RetireService(name) for name in sorted(turn.seen.managed - used))


def lowered(turn: Turn) -> tuple[Action, ...]:
    """The pods that stable was given for its climb are its autoscaler's again, once it alone answers and nothing moves.

    Without that each release would keep at least the pods of its hour, and the next candidate be measured against them. Whatever isn't
    seen yet waits: the need for pods is an autoscaler's own affair only when no weight can change it.
    """
    status, seen, found = turn.status, turn.seen, turn.service(turn.status.stable)
    if found is None or not found.raised or status.route is None or seen.route is None or seen.live is None:
        return ()
    alone = RouteWanted(stable=found.name)
    if normal(status.route) != alone or normal(seen.route) != alone or not live_matches(seen.live, alone):
        return ()
    return (LowerPods(found.name, found.raised),)


def at_rest(turn: Turn) -> tuple[Action, ...]:
    """What is cleaned up while no run is under way."""
    return (*garbage(turn), *lowered(turn))
