"""What is recorded is decided again exactly; under other rules it says where the recorded world ends."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, STABLE, START, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafnium_contract.evidence import EvidenceSpec, EvidenceValue
from hafnium_rollout import commands
from hafnium_rollout.decide import decide
from hafnium_rollout.errors import RecordError
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import (
    Counts,
    EvidenceUnread,
    GateLook,
    LiveRoute,
    Look,
    Observation,
    RouteSeen,
    Series,
    ServiceSeen,
)
from hafnium_rollout.observation_codec import decode, encode
from hafnium_rollout.record import RecordLimits, RecordWriter, read_files, read_record, record_files
from hafnium_rollout.record_lines import Gap, RecordedTurn, Start, status_digest
from hafnium_rollout.replay_story import Summary, ending
from hafnium_rollout.replaying import Break, ReplayedTurn, replay
from hafnium_rollout.status import Condition, RolloutStatus

# --- the codec ----------------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
def finding(*fields: Any) -> EvidenceSpec:
    names = ("model_digest", "kind", "window_start", "window_end", "verdict", "samples", "values", "message", "both_arms", "report", "job",
             "created_at")
    return EvidenceSpec(**dict(zip(names, fields, strict=True)))


def value(name: str, number: float, threshold: float | None) -> EvidenceValue:
    return EvidenceValue(name=name, statistic="psi", value=number, threshold=threshold)


def asked(kind: Any, id_: str, digest: str, reason: str, by: str) -> UserAction:
    return UserAction(type=kind, id=id_, candidate_digest=digest, reason=reason, requested_by=by)


NUMBER = st.floats(allow_nan=False) | st.integers(0, 2**40).map(float)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
"""Evidence refuses other numbers."""
TIME = st.datetimes(timezones=st.just(UTC))
NAMES = st.frozensets(TEXT, max_size=3)
COUNTS = st.builds(Counts, NUMBER, NUMBER)
SERIES = st.builds(Series, COUNTS, COUNTS, TEXT)
GATES = st.dictionaries(TEXT, st.builds(
    GateLook, st.lists(SERIES, max_size=2).map(tuple), st.lists(NUMBER, max_size=4).map(tuple), TEXT), max_size=3)
DIGEST = st.sampled_from([CANDIDATE, STABLE, OTHER])
FINDING = st.builds(
    finding, DIGEST, st.sampled_from(["drift", "performance", "smoke", "fairness"]), TIME, TIME,
    st.sampled_from(["Pass", "Fail", "Inconclusive", "NoData", "Error"]), st.integers(0, 10**9),
    st.lists(st.builds(value, TEXT, FINITE, st.none() | FINITE), max_size=2).map(tuple), TEXT, st.booleans(), TEXT, TEXT, TIME)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**50, 2**50) | NUMBER | TEXT,
                    lambda c: st.lists(c, max_size=3) | st.dictionaries(TEXT, c, max_size=3), max_leaves=6)
OBSERVATION = st.builds(
    Observation,
    services=st.none() | st.dictionaries(TEXT, st.builds(ServiceSeen, TEXT, TEXT, st.booleans(), st.integers(0, 99), TEXT, TEXT, TEXT)),
    declared=NAMES, managed=NAMES, route=st.none() | st.builds(RouteSeen, TEXT, st.none() | TEXT, st.integers(0, 100), st.booleans(), TEXT),
    route_absent=st.booleans(), live=st.none() | st.builds(LiveRoute, st.dictionaries(TEXT, st.integers(0, 100)), NAMES),
    look=st.none() | st.builds(Look, TIME, TIME, GATES, st.none() | NUMBER, st.none() | NUMBER, st.none() | NUMBER),
    evidence=st.lists(FINDING, max_size=2).map(tuple), evidence_error=TEXT, approvals=NAMES,
    evidence_unread=st.lists(
        st.builds(EvidenceUnread, TEXT, st.none() | DIGEST, st.none() | TEXT, st.none() | TIME, st.booleans()), max_size=2).map(tuple),
    candidate_pods=st.none() | st.integers(0, 99),
    approvals_refused=st.lists(TEXT, max_size=2).map(tuple),
    actions=st.lists(st.builds(asked, st.sampled_from(["Promote", "Abort"]), st.text("ab", min_size=1, max_size=9), DIGEST, TEXT, TEXT),
                     max_size=2).map(tuple),
    problems=st.lists(TEXT, max_size=2).map(tuple), cursor=st.dictionaries(TEXT, JSON, max_size=3))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seen=OBSERVATION)
def test_an_observation_survives_json(seen: Observation) -> None:
    data = encode(seen)
    found = decode(json.loads(json.dumps(data)))
    assert found == seen
    assert encode(found) == data
    assert type(found.declared) is frozenset


def test_bad_numbers_stay_bad_numbers() -> None:
    look = Look(START, START, {"g": GateLook((Series(Counts(math.nan, math.inf), Counts(-math.inf, 0)),))})
    found = decode(json.loads(json.dumps(encode(Observation(look=look)))))
    assert found.look is not None
    series = found.look.gates["g"].series[0]
    assert math.isnan(series.stable.bad)
    assert (series.stable.total, series.candidate.bad) == (math.inf, -math.inf)


def test_data_that_is_no_observation_is_named() -> None:
    with pytest.raises(RecordError, match=r"look\.started"):
        decode({**encode(Observation()), "look": {"started": "yesterday", "ended": START.isoformat(), "gates": {}}})


# --- recording a world --------------------------------------------------------------------------------------------------------


@dataclass
class Recorded:
    """A world whose turns are written as the controller does it, with the statuses that the record should lead to."""

    world: World
    writer: RecordWriter
    statuses: list[RolloutStatus]

    def turn(self, *, lost: bool = False) -> None:
        """`lost`: the controller dies after the status was written and before the record was."""
        w, before = self.world, self.world.status
        seen: list[Observation] = []
        observe = w.observe

        def watched(seconds: float) -> Observation:
            seen.append(observe(seconds))
            return seen[-1]

        w.observe = watched  # type: ignore[method-assign]
        decision = w.turn()
        del w.observe  # type: ignore[attr-defined]
        if not lost and self.writer.write(w.spec, before, seen[0], w.now, decision):
            self.statuses.append(decision.status)


def recorded(folder: Path, world: World, turns: int, limits: RecordLimits | None = None) -> Recorded:
    run = Recorded(world, RecordWriter(folder, limits), [])
    for _ in range(turns):
        run.turn()
    return run


def turns_of(found: Iterator[ReplayedTurn | Break]) -> list[ReplayedTurn]:
    out = list(found)
    assert not [b for b in out if isinstance(b, Break)]
    return [t for t in out if isinstance(t, ReplayedTurn)]


def outcome(turns: list[ReplayedTurn]) -> str:
    last = next(t.other for t in reversed(turns) if t.other is not None)
    return last.status.phase


@pytest.mark.parametrize(("bad", "rejected"), [(0.0, False), (0.5, True)], ids=["promoted", "rolled back"])
def test_a_replay_decides_exactly_what_was_decided(tmp_path: Path, bad: float, rejected: bool) -> None:
    spec = rollout(gates=[
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}},
        {"name": "scores", "scores": {}}, {"name": "drift", "role": "Advisory", "drift": {}}])
    run = recorded(tmp_path, World(spec, bad_stable=0.01, bad_candidate=bad), 150)
    turns = turns_of(replay(read_record(tmp_path)))
    assert run.world.status.phase == ("RolledBack" if rejected else "Promoted")
    assert len(turns) < 130, "turns after the end in which nothing happened are left out"
    assert [t.recorded.status for t in turns] == run.statuses
    assert all(t.equal for t in turns)
    assert turns[-1].recorded.status.phase == run.world.status.phase


TROUBLE = st.sampled_from(["fine", "fine", "fine", "blind", "slow", "unready", "restart", "lost", "new process",
                           "evidence", "abort", "other"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(troubles=st.lists(TROUBLE, min_size=20, max_size=60), seed=st.integers(0, 9))
def test_a_replay_is_exact_through_any_trouble(tmp_path_factory: pytest.TempPathFactory, troubles: list[str], seed: int) -> None:
    folder = tmp_path_factory.mktemp("record")
    world = World(rollout(gates=[
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}}, {"name": "drift", "drift": {}}]),
        random=random.Random(seed), bad_stable=0.02, bad_candidate=0.02)
    run = Recorded(world, RecordWriter(folder, RecordLimits(file_bytes_max=20_000)), [])
    for i, trouble in enumerate(troubles):
        world.blind, world.live_lag, world.ready = trouble == "blind", 2 if trouble == "slow" else 0, trouble != "unready"
        world.restarts += trouble == "restart"
        if trouble == "evidence":
            world.evidence += (_finding(world.now, f"drift {i}"),)
        if trouble == "abort":
            world.actions = (UserAction(type="Abort", id=f"a{i}", candidate_digest=CANDIDATE, reason="enough"),)
        if trouble == "other":
            world.spec = rollout(model={"digest": OTHER if i % 2 else CANDIDATE})
        if trouble == "new process":
            run.writer = RecordWriter(folder, RecordLimits(file_bytes_max=20_000))
        run.turn(lost=trouble == "lost")
    found = [t for t in replay(read_record(folder)) if isinstance(t, ReplayedTurn)]
    assert all(t.equal for t in found)
    replayed = [t.recorded.status for t in found]
    assert replayed == run.statuses


def _finding(now: datetime, message: str, verdict: Any = "Pass") -> EvidenceSpec:
    return EvidenceSpec(model_digest=CANDIDATE, kind="drift", window_start=now - timedelta(seconds=2), window_end=now, verdict=verdict,
                        samples=5000, message=message, created_at=now)


def test_a_lost_turn_is_a_break_and_what_follows_is_exact(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(), 5)
    run.turn(lost=True)
    run.writer = RecordWriter(tmp_path)
    for _ in range(5):
        run.turn()
    found = list(replay(read_record(tmp_path)))
    assert [type(x).__name__ for x in found] == ["ReplayedTurn"] * 5 + ["Break"] + ["ReplayedTurn"] * 5
    assert [t.recorded.status for t in found if isinstance(t, ReplayedTurn)] == run.statuses


def test_a_line_cut_off_by_a_crash_costs_what_follows_until_the_next_start_and_no_more(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(), 6)
    path = record_files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-40])
    run.writer = RecordWriter(tmp_path)
    for _ in range(6):
        run.turn()
    entries = list(read_record(tmp_path))
    assert [type(e).__name__ for e in entries] == ["Start"] + ["RecordedTurn"] * 5 + ["Gap", "Start"] + ["RecordedTurn"] * 6
    gap = next(e for e in entries if isinstance(e, Gap))
    assert "00000001.jsonl:7" in gap.where
    assert [t.equal for t in replay(entries) if isinstance(t, ReplayedTurn)] == [True] * 11
    assert [t.recorded.status for t in replay(entries) if isinstance(t, ReplayedTurn)] == run.statuses[:5] + run.statuses[6:]


def test_the_record_stays_within_its_limits_and_every_file_can_be_read_alone(tmp_path: Path) -> None:
    limits = RecordLimits(file_bytes_max=20_000, total_bytes_max=15_000)
    spec = rollout(strategy={"steps": [{"shadow": True, "minDwell": "6d"}, {"weight": 100}]})
    run = recorded(tmp_path, World(spec, rate=20), 250, limits)
    files = record_files(tmp_path)
    assert files[-1].name.endswith(".jsonl")
    assert all(f.name.endswith(".jsonl.gz") for f in files[:-1])
    assert int(files[0].name[:8]) > 1, "the oldest are gone"
    plain = files[-1].stat().st_size
    assert sum(f.stat().st_size for f in files[:-1]) <= limits.total_bytes_max
    assert plain < limits.file_bytes_max + 100_000, "a start, and the limit"
    for file in files:
        assert all(t.equal for t in turns_of(replay(read_record(file))))
    whole = turns_of(replay(read_record(tmp_path)))
    assert [t.recorded.status for t in whole] == run.statuses[-len(whole):]


def test_a_damaged_packed_file_is_a_gap_wherever_it_is_damaged(tmp_path: Path) -> None:
    """A bit of each 50th byte, by a bad disk. Replay and report go on with what is whole."""
    recorded(tmp_path, World(), 60, RecordLimits(file_bytes_max=8_000))
    packed, *others = record_files(tmp_path)
    assert packed.name.endswith(".jsonl.gz")
    whole = packed.read_bytes()
    for at in range(0, len(whole), 50):
        packed.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1:])
        entries = list(read_record(packed))
        assert isinstance(entries[-1], Gap), f"byte {at}"
    assert str(packed) in entries[-1].where
    assert any(isinstance(found, Break) and "can't be read" in found.message for found in replay(read_files([packed, *others])))


def test_conditions_that_a_loop_adds_break_no_chain(tmp_path: Path) -> None:
    """On a cluster the operator writes `Accepted` into each status after `decide`."""
    extra = Condition(type="Accepted", status="True", reason="Accepted", last_transition_time=START)
    run = Recorded(World(), RecordWriter(tmp_path), [])
    for _ in range(30):
        run.turn()
        run.world.status = run.world.status.model_copy(update={"conditions": (*run.world.status.conditions, extra)})
    entries = list(read_record(tmp_path))
    assert [type(e).__name__ for e in entries] == ["Start"] + ["RecordedTurn"] * 30
    assert all(t.equal for t in turns_of(replay(entries)))


def test_a_digest_is_of_what_a_status_says() -> None:
    """An API server sorts keys, and gives 1.0 back as 1."""
    status = RolloutStatus(cursor={"b": [1.0, {"y": 2}], "a": 3})
    assert status_digest(status) == status_digest(status.model_copy(update={"cursor": {"a": 3.0, "b": [1, {"y": 2.0}]}}))
    assert status_digest(status) != status_digest(status.model_copy(update={"cursor": {"a": 4, "b": [1, {"y": 2.0}]}}))
    assert status_digest(status) != status_digest(status.model_copy(update={"phase": "Paused"}))


def test_a_finding_is_written_once_and_only_if_it_is_about_these_models(tmp_path: Path) -> None:
    world = World(rollout(gates=[
        {"name": "errors", "role": "Safety", "requests": {}}, {"name": "drift", "drift": {}, "role": "Advisory"}]))
    foreign = _finding(START, "of another model").model_copy(update={"model_digest": OTHER})
    world.evidence = (foreign, _finding(START, "the first finding"))
    run = recorded(tmp_path, world, 5)
    world.evidence += (_finding(world.now, "the second finding"),)
    for _ in range(5):
        run.turn()
    text = record_files(tmp_path)[0].read_text()
    assert text.count('"message":"the first finding"') >= 1
    lines = [json.loads(x) for x in text.splitlines()]
    assert [len(x["findings"]) for x in lines if "findings" in x] == [1, 1]
    assert "of another model" not in text
    turns = [e for e in read_record(tmp_path) if isinstance(e, RecordedTurn)]
    assert [len(t.seen.evidence) for t in turns] == [1] * 5 + [2] * 5
    assert all(t.equal for t in turns_of(replay(read_record(tmp_path))))


def test_a_crash_between_packing_and_removing_leaves_each_turn_once(tmp_path: Path) -> None:
    recorded(tmp_path, World(), 5)
    plain = record_files(tmp_path)[0]
    with gzip.open(tmp_path / (plain.name + ".gz"), "wb") as f:
        f.write(plain.read_bytes())
    assert len([e for e in read_record(tmp_path) if isinstance(e, RecordedTurn)]) == 5
    run = Recorded(World(), RecordWriter(tmp_path), [])
    run.turn()
    assert [f.name for f in record_files(tmp_path)] == ["00000001.jsonl.gz", "00000002.jsonl"]


def test_a_record_of_another_schema_or_none_at_all_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no record of a rollout"):
        list(read_record(tmp_path))
    recorded(tmp_path, World(), 2)
    path = record_files(tmp_path)[0]
    path.write_text(path.read_text().replace('"schema":1', '"schema":9'))
    with pytest.raises(RecordError, match=r"00000001\.jsonl: written by .* in schema 9; this one reads 1"):
        list(read_record(tmp_path))
    path.write_text('{"kind": "start"}\n')
    with pytest.raises(RecordError, match="not a line of a record: KeyError"):
        list(read_record(tmp_path))


@pytest.mark.parametrize(("bad", "error"), [("10.0", ""), ("30000.0", "holds what no controller could have seen")])
def test_a_changed_record_is_found_out(tmp_path: Path, bad: str, error: str) -> None:
    recorded(tmp_path, World(bad_stable=0.0), 40)
    path = record_files(tmp_path)[0]
    path.write_text(path.read_text().replace('"candidate":{"bad":0.0', '"candidate":{"bad":' + bad))
    if error:
        with pytest.raises(RecordError, match=error):
            list(replay(read_record(tmp_path)))
    else:
        assert not all(t.equal for t in turns_of(replay(read_record(tmp_path))))


# --- other rules --------------------------------------------------------------------------------------------------------------


def test_the_same_rules_as_other_rules_are_the_recorded_world_to_its_end(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(bad_stable=0.01, bad_candidate=0.01), 120)
    turns = turns_of(replay(read_record(tmp_path), run.world.spec))
    assert {t.world for t in turns} == {"recorded"}
    assert [t.other.status for t in turns if t.other] == [t.recorded.status for t in turns]


def test_a_wider_margin_would_have_gone_on_and_the_replay_says_from_where_it_is_counterfactual(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(bad_stable=0.01, bad_candidate=0.025, rate=100), 400)
    assert run.world.status.phase == "RolledBack"
    wide = rollout(gates=[{"name": "failed", "role": "Safety", "requests": {}, "compare": {"margin": 0.2, "harmless": 0.1}}])
    turns = turns_of(replay(read_record(tmp_path), wide))
    worlds = [t.world for t in turns]
    assert worlds == sorted(worlds, reverse=True), "recorded, then counterfactual"
    first = next(t for t in turns if t.world == "counterfactual")
    assert first.other is not None
    assert first.other.status.route != first.recorded.status.route
    assert all(t.equal for t in turns), "the recorded line is exact all the same"
    assert outcome(turns) == "Promoted"
    assert not any(e.name in ("ExternalChange", "Rollback") for t in turns if t.other for e in t.other.events)


def test_nothing_is_said_about_a_candidate_that_was_taken_back_in_the_recorded_world(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(bad_stable=0.01, bad_candidate=0.025, rate=100), 400)
    assert run.world.status.phase == "RolledBack"
    patient = rollout(
        gates=[{"name": "failed", "role": "Safety", "requests": {}, "compare": {"margin": 0.2, "harmless": 0.1}}],
        strategy={"steps": [{"shadow": True}, {"weight": 5, "minDwell": "2h"}, {"weight": 100}]})
    turns = turns_of(replay(read_record(tmp_path), patient))
    assert [w for w in ("recorded", "counterfactual", "unknown") if any(t.world == w for t in turns)] == [
        "recorded", "counterfactual", "unknown"]
    assert outcome(turns) == "Progressing"
    assert all(t.other is None for t in turns if t.world == "unknown")


def test_stricter_rules_would_have_gone_back(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(bad_stable=0.0, bad_candidate=0.012, rate=100), 300)
    assert run.world.status.phase in ("Promoted", "RolledBack")
    strict = rollout(gates=[
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02, "alpha": 0.2}, "hardLimit": 0.002}])
    turns = turns_of(replay(read_record(tmp_path), strict))
    assert outcome(turns) == "RolledBack"
    back = next(t.now for t in turns if t.other and any(e.name == "Rollback" for e in t.other.events))
    really = [t.now for t in turns if any(e.name in ("Rollback", "Promoted") for e in t.recorded.events)]
    assert back < really[0]


def test_what_nobody_counted_is_an_error_and_never_passes(tmp_path: Path) -> None:
    recorded(tmp_path, World(), 60)
    gates = [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}},
             {"name": "slow", "role": "Quality", "latency": {"slowerThan": "100ms"}}]
    turns = turns_of(replay(read_record(tmp_path), rollout(gates=gates)))
    others = [t.other.status for t in turns if t.other is not None]
    verdicts = {g.verdict for s in others for g in s.gates if g.name == "slow"}
    assert verdicts <= {"Error", "NoData"}
    assert not any(s.phase == "Promoted" for s in others)
    assert any("not in the record" in g.message for s in others for g in s.gates)


def test_until_ends_the_replay(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(), 20)
    turns = turns_of(replay(read_record(tmp_path), until=START + timedelta(seconds=10)))
    assert [t.recorded.status for t in turns] == run.statuses[:5]


def test_a_start_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = recorded(tmp_path, World(), 3)
    start = next(iter(read_record(tmp_path)))
    assert isinstance(start, Start)
    assert start.rollout == run.world.spec
    assert start.status == RolloutStatus()
    assert decide(start.rollout, start.status, replace(Observation(), route=RouteSeen("risk", None, 0, False)), START).status.candidate
    assert SERVICE  # the world's candidate


# --- the command --------------------------------------------------------------------------------------------------------------


def test_the_story_marks_whose_decision_each_line_is_and_where_the_world_ends(tmp_path: Path) -> None:
    recorded(tmp_path, World(bad_stable=0.01, bad_candidate=0.025, rate=100), 400)
    plain = Summary()
    lines = list(commands.replay(tmp_path, None, None, plain))
    assert lines[0].startswith("2026-03-01 12:00:02Z  Started ")
    assert plain.exact
    assert "every decision is the one that was made" in ending(plain)[0]
    assert plain.recorded.startswith("RolledBack: Safety gate errors")
    wide = rollout(gates=[{"name": "failed", "role": "Safety", "requests": {}, "compare": {"margin": 0.2, "harmless": 0.1}}])
    told = Summary()
    lines = list(commands.replay(tmp_path, wide, None, told, keep=True))
    marks = [x[22:31].strip() for x in lines]
    assert marks[:4] == ["both", "both", "other", "other"], "the decision that parts them is still exact"
    assert set(marks[4:]) == {"other ~", "recorded"}
    assert told.other.startswith("Promoted")
    assert "the recorded world no longer applies" in " ".join(ending(told, "wide.yaml"))
    assert [x["whose"] for x in told.lines] == [{"other ~": "counterfactual"}.get(m, m) for m in marks]


def test_a_record_that_ends_otherwise_says_so(tmp_path: Path) -> None:
    recorded(tmp_path, World(), 30)
    path = record_files(tmp_path)[0]
    path.write_text(path.read_text().replace('"candidate":{"bad":0.0', '"candidate":{"bad":10.0'))
    summary = Summary()
    list(commands.replay(tmp_path, None, None, summary))
    assert not summary.exact
    assert "don't end as they were recorded, the first at 2026-03-01 12:00:" in ending(summary)[0]
    with pytest.raises(RecordError, match="no turn in this time"):
        list(commands.replay(tmp_path, None, START, Summary()))
