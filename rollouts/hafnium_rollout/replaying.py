"""Recorded turns → the same decisions again, or those that other rules would have made. Pure.

Without other rules each turn is decided from the status that the turn before it left, and must end in the recorded status.

With other rules two lines are followed: the recorded one, and the other. As long as both want the same route, what was seen is what
the other rules would have seen, and their decisions are exact. From the first turn after which the routes differ, the recorded
world no longer applies: with another weight other requests would have met the candidate. The replay then goes on as a
*counterfactual*: the route is taken to be as the other rules want it, the counts stay those that were recorded (a gate compares
shares, which the weight does not change), the sample-ratio check is off, and every line is marked. It ends where the recorded
candidate got no requests any more: nothing is known about it from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from hafnium_rollout.actions import Decision
from hafnium_rollout.decide import decide
from hafnium_rollout.errors import RecordError
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Counts, GateLook, LiveRoute, Look, Observation, RouteSeen
from hafnium_rollout.record_lines import Gap, RecordedTurn, Start, status_digest
from hafnium_rollout.status import RolloutStatus
from hafnium_rollout.turn import normal

World = Literal["recorded", "counterfactual", "unknown"]


@dataclass(frozen=True, slots=True)
class ReplayedTurn:
    """One turn, decided again."""

    now: datetime
    rollout: ModelRollout
    recorded: Decision
    """By the recorded rules, from what was recorded."""
    equal: bool
    """It ends in the status that was recorded."""
    other: Decision | None
    """By the other rules; None without them, or when nothing can be said any more."""
    world: World


@dataclass(frozen=True, slots=True)
class Break:
    """Turns before this are missing, so the next ones start from a recorded status."""

    time: datetime | None
    message: str


def replay(
    entries: Iterable[Start | RecordedTurn | Gap], other: ModelRollout | None = None, until: datetime | None = None,
) -> Iterator[ReplayedTurn | Break]:
    """Decides each turn again, in order. `other`: its gates, strategy and approvals are taken, the models stay the recorded ones."""
    line = _Lines(other)
    for entry in entries:
        match entry:
            case Gap():
                yield Break(None, f"{entry.where}: {entry.message}")
            case Start():
                if line.start(entry):
                    yield Break(entry.time, _why_missing(entry))
            case RecordedTurn():
                if until is not None and entry.now > until:
                    return
                yield line.turn(entry)


def _why_missing(start: Start) -> str:
    if start.lost:
        return f"{start.lost} turns were decided and could not be written (a volume that was slow, full or gone)"
    return "the status was not what the turn before had left: turns are missing, or it was changed by hand"


class _Lines:
    """The recorded line of statuses, and the one under other rules."""

    def __init__(self, other: ModelRollout | None) -> None:
        self._rules = other
        self._status: RolloutStatus | None = None
        self._other: RolloutStatus | None = None
        self._world: World = "recorded"

    def start(self, entry: Start) -> bool:
        """Returns whether this is a break in what was known."""
        before, self._status = self._status, entry.status
        if before == entry.status:
            return entry.lost > 0
        if self._other is None or before is None or before.run_id != entry.status.run_id:
            self._fork(entry.status)
        return before is not None or entry.lost > 0

    def _fork(self, status: RolloutStatus) -> None:
        """The other line begins where the recorded one is."""
        self._other, self._world = status, "recorded"

    def turn(self, entry: RecordedTurn) -> ReplayedTurn:
        before = self._status
        assert before is not None  # noqa: S101 - the decoder gives no turn without a start
        recorded = _decide(entry.rollout, before, entry.seen, entry.now)
        after = recorded.status
        self._status = after
        equal = status_digest(after) == entry.after
        if self._rules is None:
            return ReplayedTurn(entry.now, entry.rollout, recorded, equal, None, "recorded")
        rules = with_rules(entry.rollout, self._rules)
        if after.run_id != before.run_id:
            self._fork(before)  # a new run: what other rules had made of the one before is told
        status = self._other
        assert status is not None  # noqa: S101 - forked at the start
        if self._world == "counterfactual" and status.step is not None and before.step is None:
            self._world = "unknown"
        world = self._world  # the one that this turn sees; its decision may be the one that leaves it
        if world == "unknown":
            return ReplayedTurn(entry.now, rules, recorded, equal, None, world)
        seen = _with_gates(entry.seen, entry.rollout, rules)
        other = _decide(rules, status, seen if world == "recorded" else _as_if(seen, status), entry.now)
        self._other = other.status
        if _route(other.status) != _route(after):
            self._world = "counterfactual"
        return ReplayedTurn(entry.now, rules, recorded, equal, other, world)


def _decide(rollout: ModelRollout, status: RolloutStatus, seen: Observation, now: datetime) -> Decision:
    try:
        return decide(rollout, status, seen, now)
    except (ValueError, ArithmeticError) as e:
        raise RecordError(f"the turn at {now.isoformat()} holds what no controller could have seen: {e}; the record was changed") from e


def _route(status: RolloutStatus) -> object:
    return None if status.route is None else normal(status.route)


def with_rules(recorded: ModelRollout, other: ModelRollout) -> ModelRollout:
    """The recorded rollout under the gates, strategy and approvals of another one."""
    spec = recorded.spec.model_copy(update={
        "gates": other.spec.gates, "strategy": other.spec.strategy, "approvals": other.spec.approvals,
    })
    return recorded.model_copy(update={"spec": spec})


def measures(gate: Gate) -> str:
    """What a gate counts, whatever it is called and however it judges."""
    part = getattr(gate, gate.kind)
    return f"{gate.kind}:{part.model_dump_json()}"


def _with_gates(seen: Observation, recorded: ModelRollout, rules: ModelRollout) -> Observation:
    """The look under the names of the other gates. What wasn't counted then is an error now, never nothing."""
    if seen.look is None:
        return seen
    by_measure: dict[str, GateLook] = {}
    for gate in recorded.spec.gates:
        if gate.name in seen.look.gates:
            by_measure.setdefault(measures(gate), seen.look.gates[gate.name])
    gates: dict[str, GateLook] = {}
    for gate in rules.spec.gates:
        found = by_measure.get(measures(gate))
        if found is None and gate.kind not in ("drift", "evidence"):
            found = GateLook(error=f"not in the record: no gate then counted {measures(gate)}")
        gates[gate.name] = found or GateLook()
    return replace(seen, look=replace(seen.look, gates=gates))


def _as_if(seen: Observation, status: RolloutStatus) -> Observation:
    """The observation, had the route been as the other rules wanted it."""
    if status.route is None:
        return seen
    wanted = normal(status.route)
    weights = {wanted.stable: 100 - wanted.weight} if wanted.weight < 100 else {}
    if wanted.candidate is not None and wanted.weight:
        weights[wanted.candidate] = wanted.weight
    mirrors = frozenset({wanted.candidate}) if wanted.candidate is not None and wanted.shadow else frozenset[str]()
    return replace(
        seen, route=RouteSeen(wanted.stable, wanted.candidate, wanted.weight, wanted.shadow), route_absent=False,
        live=LiveRoute(weights, mirrors), look=_look_as_if(seen.look, with_candidate=wanted.candidate is not None),
    )


def _look_as_if(look: Look | None, *, with_candidate: bool) -> Look | None:
    if look is None:
        return None
    gates: Mapping[str, GateLook] = look.gates
    if not with_candidate:
        gates = {
            name: replace(g, series=tuple(replace(s, candidate=Counts(0, 0)) for s in g.series), differences=())
            for name, g in look.gates.items()
        }
    none = {} if with_candidate else {"candidate_requests": 0.0}
    return replace(look, gates=gates, routed_stable=None, routed_candidate=None if with_candidate else 0.0, **none)
