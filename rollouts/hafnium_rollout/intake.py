"""Observation → facts in the status. Nothing is decided here: weights and readiness are followed, gates take their look in."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.objects import RolloutSpec
from hafnium_rollout.observation import FOREIGN, LiveRoute, Look
from hafnium_rollout.statistics import sample_ratio
from hafnium_rollout.status import GateStatus, ModelSeen, RouteWanted, StepStatus, UnreadyStatus
from hafnium_rollout.turn import Turn, as_listed, lacking_room, normal

_FRESH_MIN = timedelta(seconds=30)
_UNSEEN_COUNTS_MAX = timedelta(minutes=1)
CHANGES_WINDOW = timedelta(minutes=10)
"""Changes by someone else within this time are one fight."""
_UNREADY_SEEN_EVERY = timedelta(seconds=20)
"""Between two looks so much at most counts for readyDeadline (and never half of it): an hour in which the operator was down, or the list of
services couldn't be read, is no time that the candidate had. Four looks by default, and not every one of them writes a status."""


def take_in(turn: Turn) -> Turn:
    """The turn with everything that was seen written into its status."""
    turn = turn.update(cursor=dict(turn.seen.cursor), observed_generation=turn.rollout.metadata.generation)
    turn = _learn_stable(turn)
    turn = _forget_changes(_confirm_route(turn))
    turn = _follow_exposure(turn)
    turn = _follow_unready(turn)
    if turn.status.step is None or turn.status.candidate is None or turn.status.phase in ("Promoted", "RolledBack"):
        return turn
    turn, steady = _follow_gateway(turn)
    turn = _follow_candidate(turn)
    return _judge_gates(turn, steady)


def _learn_stable(turn: Turn) -> Turn:
    """At the very first the route says who is stable; afterwards only a promotion changes it.

    A route of another form, or one that names a second service, doesn't say it: who is taken for stable gets all requests.
    """
    status, route = turn.status, turn.seen.route
    if status.stable is None:
        if route is None or route.stable == FOREIGN or normal(route).candidate is not None:
            return turn
        stable = ModelSeen(service=route.stable)
        turn = turn.update(stable=stable, route=RouteWanted(stable=route.stable))
    stable = turn.status.stable
    found = turn.service(stable)
    if stable is None or found is None or not found.digest or found.digest == stable.digest:
        return turn
    return turn.update(stable=ModelSeen(
        service=stable.service, storage_uri=found.storage_uri or stable.storage_uri, digest=found.digest, version=found.version,
    ))


def _confirm_route(turn: Turn) -> Turn:
    status, route = turn.status, turn.seen.route
    if route is None or status.route is None or status.route_confirmed:
        return turn
    if normal(route) == normal(status.route):
        return turn.update(route_confirmed=True, route_before=())
    before = [normal(r) for r in status.route_before]
    oldest = before.index(normal(route)) if normal(route) in before else 0
    if oldest:
        # What stood there earlier is over: writes carry the resourceVersion that was read, so an older one can't come after this.
        return turn.update(route_before=status.route_before[oldest:])
    return turn


def recent_changes(turn: Turn) -> tuple[datetime, ...]:
    return tuple(t for t in turn.status.external_changes if turn.now - t <= CHANGES_WINDOW)


def _forget_changes(turn: Turn) -> Turn:
    """A fight is over when the route is as wanted and its time has passed. One that was left to a person stays one until then."""
    status, route, recent = turn.status, turn.seen.route, recent_changes(turn)
    if recent == status.external_changes or route is None or status.route is None or normal(route) != normal(status.route):
        return turn
    return turn.update(external_changes=recent)


def _follow_exposure(turn: Turn) -> Turn:
    """Whoever gave the candidate live requests, or may have: from then on a rollback needs counters."""
    status, route, live = turn.status, turn.seen.route, turn.seen.live
    if status.had_weight or status.stable is None or status.candidate is None:
        return turn
    stable = status.stable.service
    there = route is not None and (route.stable != stable or route.weight > 0 or bool(route.others))
    if there or (live is not None and any(w > 0 for n, w in live.weights.items() if n != stable)):
        return turn.update(had_weight=True)
    return turn


def _follow_unready(turn: Turn) -> Turn:
    """Since when the candidate is wanted and isn't ready, before its first step. A service that comes begins its time anew."""
    status, known = turn.status, turn.status.unready
    waits = status.phase == "Pending" and status.candidate is not None and status.rollback is None and not turn.rollout.spec.paused
    if not waits or turn.candidate_ready:
        return turn if known is None else turn.update(unready=None)
    if turn.seen.services is None:
        return turn
    absent, deadline = turn.service(status.candidate) is None, turn.rollout.spec.strategy.ready_deadline
    if known is None or known.absent != absent:
        return turn.update(unready=UnreadyStatus(since=turn.now, seen_at=turn.now, absent=absent))
    gap = turn.now - known.seen_at
    if gap < min(_UNREADY_SEEN_EVERY, deadline / 8):
        return turn
    unseen = max(timedelta(0), gap - min(_UNSEEN_COUNTS_MAX, deadline / 2))
    return turn.update(unready=known.model_copy(update={"since": known.since + unseen, "seen_at": turn.now}))


def live_weight(live: LiveRoute, service: str) -> int:
    return live.weights.get(service, 0)


def live_matches(live: LiveRoute, wanted: RouteWanted) -> bool:
    """The gateway does what the route should say."""
    wanted = normal(wanted)
    if wanted.candidate is None:
        return live.weights.get(wanted.stable, 0) == 100 and not live.mirrors
    mirrors = frozenset({wanted.candidate}) if wanted.shadow else frozenset[str]()
    return (live.weights.get(wanted.candidate, 0) == wanted.weight
            and live.weights.get(wanted.stable, 0) == 100 - wanted.weight and live.mirrors == mirrors)


def _follow_gateway(turn: Turn) -> tuple[Turn, bool]:
    """Weights as the gateway has them. Also: were they the same as at the last look?"""
    step, live, candidate = turn.status.step, turn.seen.live, turn.status.candidate
    assert step is not None  # noqa: S101 - take_in checked it
    assert candidate is not None  # noqa: S101 - take_in checked it
    if live is None or turn.status.route is None:
        # Unseen is not changed: the time at weight goes on, but no look counts for Pass until it is seen twice again.
        return turn.update(step=step.model_copy(update={"weight_observed": None})), False
    weight, shadow = live_weight(live, candidate.service), candidate.service in live.mirrors
    steady = step.weight_observed == weight and step.shadow_observed == shadow
    # `steady`: a change and a change back between two looks would also move it, so the start is the later of both.
    effective = step.weight_effective_since if live_matches(live, turn.status.route) else None
    if effective is None and live_matches(live, turn.status.route):
        effective = turn.now
    return turn.update(step=step.model_copy(update={
        "weight_observed": weight, "shadow_observed": shadow, "weight_effective_since": effective,
    })), steady


def _follow_candidate(turn: Turn) -> Turn:
    """Since when the candidate isn't ready, and from where its restarts are counted."""
    step = turn.status.step
    assert step is not None  # noqa: S101 - take_in checked it
    if turn.seen.services is None:
        return turn
    turn = lacking_room(turn)
    found = turn.service(turn.status.candidate)
    update: dict[str, object] = {"unready_since": None if found is not None and found.ready else step.unready_since or turn.now}
    if found is not None and (step.restarts_before is None or found.restarts < step.restarts_before):
        update["restarts_before"] = found.restarts  # the supervisor itself was restarted and counts anew
    if found is not None and step.restarts_before is None:
        update["pod_restarts_before"] = as_listed(found.pod_restarts)  # the step began while nobody could be counted
    elif found is not None and any(p.restarts > found.pod_restarts.get(p.pod, 0) for p in step.pod_restarts_before):
        # a pod of that name began anew, or is gone
        update["pod_restarts_before"] = as_listed({
            p.pod: min(p.restarts, found.pod_restarts[p.pod]) for p in step.pod_restarts_before if p.pod in found.pod_restarts})
    return turn.update(step=step.model_copy(update=update))


def _judge_gates(turn: Turn, steady: bool) -> Turn:
    status, spec, look = turn.status, turn.rollout.spec, turn.seen.look
    step, candidate = status.step, status.candidate
    assert step is not None  # noqa: S101 - take_in checked it
    assert candidate is not None  # noqa: S101 - take_in checked it
    lag = spec.strategy.scrape_lag
    step_since = step.weight_effective_since + lag if step.weight_effective_since is not None else None
    settled = look is not None and step_since is not None and look.started >= step_since
    counts = settled and steady
    # The gateway fell silent after it had shown this very weight, and the route still asks for it: nothing says that arms changed within a
    # look, and each look is its own comparison, so it may speak against the candidate. For it, the weight must be seen.
    unseen = turn.seen.live is None
    kept = unseen and settled and status.rollback is None and _route_kept(turn)
    weight = step.weight_desired if kept else step.weight_observed or 0
    turn = _sample_ratio(turn, look if counts else None)
    before = {g.name: g for g in status.gates}
    gates: list[GateStatus] = []
    parts = alpha_parts(spec)
    base = GateContext(
        now=turn.now, shadow=step.shadow_observed and not weight, weight=weight,
        digest=candidate.digest, step_since=step_since, run_since=status.started_at, counts_for_pass=counts,
        counts_for_fail=counts or kept or (steady and step_since is None), watched=not unseen or kept,
        alpha_fail=1.0, alpha_limit=1.0, fresh=_fresh(spec),
        void=turn.status.sample_ratio_message, gives_all=step.weight_desired == 100,
    )
    contexts: dict[tuple[float, float], GateContext] = {}  # most gates share their alphas
    for gate in spec.gates:
        alphas = alphas_of(gate, parts)
        context = contexts.get(alphas) or contexts.setdefault(alphas, replace(base, alpha_fail=alphas[0], alpha_limit=alphas[1]))
        old = before.get(gate.name) or GateStatus(name=gate.name, role=gate.role)
        gates.append(judge(gate, old, look, turn.seen.evidence, turn.seen.evidence_error, context, turn.seen.evidence_unread))
    turn = turn.update(gates=tuple(gates))
    return turn.update(step=_samples(turn, step, look if counts else None))


def _route_kept(turn: Turn) -> bool:
    """The route is read, and asks for what is wanted."""
    route, wanted = turn.seen.route, turn.status.route
    return route is not None and wanted is not None and normal(route) == normal(wanted)


_PART_LATENCY = 0.4
_PART_SCORES = 0.25
_PART_LIMIT = 0.1
"""Of the alpha that a comparison of failed requests gets. Slow requests, a crossed limit and a shifted score gather evidence so fast
that a smaller alpha costs them a look or two, while it makes the comparisons of failed ones, which are slow, quicker by 10 %."""


def alpha_parts(spec: RolloutSpec) -> float:
    """Into how many parts the rollout's alpha is split: ways to fail by chance, weighted. Findings of jobs have their own error rate."""
    return sum(_part(g) + (_PART_LIMIT if g.hard_limit is not None else 0.0) for g in spec.gates if g.blocking) or 1.0


def alphas_of(gate: Gate, parts: float) -> tuple[float, float]:
    """The gate's own alpha for its comparison and for its hard limit, out of `alpha_parts` of the rollout."""
    alpha = gate.compare.alpha
    if not gate.blocking:
        return alpha, alpha
    return alpha * _part(gate) / parts, alpha * _PART_LIMIT / parts


def _part(gate: Gate) -> float:
    if gate.kind == "latency":
        return _PART_LATENCY
    return 1.0 if gate.counted else _PART_SCORES if gate.kind == "scores" else 0.0


def _fresh(spec: RolloutSpec) -> timedelta:
    """A verdict stands this long without new data: a few looks, not longer than blindness is borne."""
    return max(min(_FRESH_MIN, spec.strategy.max_blind_duration), 3 * spec.strategy.scrape_lag)


def _sample_ratio(turn: Turn, look: Look | None) -> Turn:
    """Rule 8. Only where both arms get live traffic; copies in shadow are no split."""
    step = turn.status.step
    if step is None or look is None or look.routed_candidate is None or look.routed_stable is None:
        return turn
    weight, total = step.weight_observed or 0, look.routed_candidate + look.routed_stable
    if not 0 < weight < 100 or total <= 0:
        return turn
    ratio = sample_ratio.add(turn.status.sample_ratio, look.routed_candidate, total, weight / 100.0)
    message = turn.status.sample_ratio_message
    if sample_ratio.mismatch(ratio) and not message:
        message = (
            f"sample-ratio mismatch: the candidate got {ratio.candidate:g} of {ratio.requests:g} requests, at weight {weight} % "
            f"about {ratio.expected:.0f} were due; the arms don't see the same population, so they aren't compared"
        )
        turn = turn.say("SampleRatioMismatch", "SampleRatioMismatch", message, alert=True)
    return turn.update(sample_ratio=ratio, sample_ratio_message=message)


def _samples(turn: Turn, step: StepStatus, look: Look | None) -> StepStatus:
    """Candidate requests in this step that each gate which it waits for has seen, or pairs of scores where those are compared in shadow."""
    kinds, spec = {g.name: g for g in turn.rollout.spec.gates}, turn.step_spec
    pairs = [g.samples for g in turn.status.gates if kinds[g.name].kind == "scores" and kinds[g.name].blocking]
    if step.shadow_observed and not step.weight_observed and pairs:
        return step.model_copy(update={"samples": min(pairs)})
    counted = [g for g in turn.status.gates if kinds[g.name].counted]
    waited = [g.samples for g in counted if spec is not None and kinds[g.name].waits_in(spec)]
    blocking = [g.samples for g in counted if kinds[g.name].blocking]
    # A query that only shows something may count anything; our own counters are requests in any role.
    shown = [g.samples for g in counted if kinds[g.name].kind != "prometheus"]
    if found := waited or blocking or shown:
        return step.model_copy(update={"samples": min(found)})
    routed = look.routed_candidate if look is not None else None
    return step.model_copy(update={"samples": step.samples + int(routed or 0)})


def blind_since(turn: Turn, gate: GateStatus, entered_at: datetime) -> datetime:
    """Since when a Safety gate is blind. Jobs report seldom by nature, so their evidence has its own maximal age in addition."""
    spec = next(g for g in turn.rollout.spec.gates if g.name == gate.name)
    start = max(entered_at, gate.state.last_seen_at or entered_at)
    if spec.drift is not None:
        return start + spec.drift.max_age
    return start + spec.evidence.max_age if spec.evidence is not None else start
