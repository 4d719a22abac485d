"""What the local backend makes of files, the inference log and evidence. Envoy's part is in test_envoy_counters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, START, World, rollout

from hafnium_contract.errors import InputError
from hafnium_contract.evidence import EvidenceSpec, write_evidence
from hafnium_contract.inference_log import FIXED, partition
from hafnium_rollout import commands
from hafnium_rollout.actions import EnsureCandidate, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.approvals import count
from hafnium_rollout.arm_looks import latency_look, thresholds
from hafnium_rollout.envoy_counters import ArmCounters
from hafnium_rollout.errors import OnlyAhead, StateError, UnknownRollout
from hafnium_rollout.local_backend import LocalBackend
from hafnium_rollout.objects import UserAction
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.replay_story import Summary, ending
from hafnium_rollout.score_pairs import ScorePairs
from hafnium_rollout.state_folder import EvidenceReader, StateFolder, read_actions, read_approvals, read_route, read_services
from hafnium_rollout.status import HistoryPoint, ModelSeen, RolloutStatus

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


# --- pairs of scores --------------------------------------------------------------------------------------------------------------


def write_log(
    folder: Path, rows: Sequence[tuple[str, str, float]], *, digest: str = CANDIDATE, at: datetime = NOW, name: str = "a",
) -> Path:
    """rows: (request id, arm, score)."""
    n = len(rows)
    columns: dict[str, Any] = {
        "request_id": [r[0] for r in rows], "time": [at] * n, "model_name": ["risk"] * n, "model_version": ["2"] * n,
        "model_digest": [digest] * n, "arm": [r[1] for r in rows], "score": [r[2] for r in rows],
    }
    arrays = [pa.array(columns.get(f.name, [None] * n), f.type) for f in FIXED]
    path = partition(folder, at, "2") / f"part-{at:%Y%m%dT%H%M%S%f}-{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=FIXED), path)
    return path


def test_the_same_request_is_paired_once_whichever_arm_flushes_first(tmp_path: Path) -> None:
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    write_log(stable, [("old", "stable", 0.5)])
    write_log(candidate, [("old", "shadow", 0.9)])
    none, cursor = pairs.read(stable, candidate, CANDIDATE, {})
    assert none == ()  # what was there before the shadow step doesn't count
    write_log(candidate, [("r1", "shadow", 0.7), ("r2", "shadow", 0.2)], at=NOW + timedelta(seconds=1))
    waiting, cursor = pairs.read(stable, candidate, CANDIDATE, cursor)
    assert waiting == ()
    write_log(stable, [("r1", "stable", 0.5), ("r3", "stable", 0.1)], at=NOW + timedelta(seconds=2))
    found, cursor = pairs.read(stable, candidate, CANDIDATE, cursor)
    assert found == pytest.approx((0.2,), abs=1e-6)
    again, cursor = pairs.read(stable, candidate, CANDIDATE, json.loads(json.dumps(cursor)))
    assert again == ()


def test_rows_of_another_model_or_arm_are_not_paired(tmp_path: Path) -> None:
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    _, cursor = pairs.read(stable, candidate, CANDIDATE, {})
    write_log(stable, [("r1", "stable", 0.5), ("r2", "stable", 0.5)])
    write_log(candidate, [("r1", "shadow", 0.7)], digest=OTHER)
    write_log(candidate, [("r2", "candidate", 0.7)], name="b")
    found, _ = pairs.read(stable, candidate, CANDIDATE, cursor)
    assert found == ()


def test_a_controller_that_was_killed_counts_no_pair_twice(tmp_path: Path) -> None:
    stable, candidate = tmp_path / "s", tmp_path / "c"
    _, cursor = ScorePairs().read(stable, candidate, CANDIDATE, {})
    write_log(stable, [("r1", "stable", 0.5)])
    write_log(candidate, [("r1", "shadow", 0.7)])
    first, after = ScorePairs().read(stable, candidate, CANDIDATE, cursor)
    repeated, _ = ScorePairs().read(stable, candidate, CANDIDATE, cursor)
    going_on, _ = ScorePairs().read(stable, candidate, CANDIDATE, after)
    assert (len(first), len(repeated), len(going_on)) == (1, 1, 0)


def test_a_damaged_log_file_is_an_error_and_not_silence(tmp_path: Path) -> None:
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    _, cursor = pairs.read(stable, candidate, CANDIDATE, {})
    write_log(stable, [("r1", "stable", 0.5)]).write_bytes(b"nonsense")
    with pytest.raises(StateError, match="can't be read"):
        pairs.read(stable, candidate, CANDIDATE, cursor)


def test_a_pod_whose_clock_is_ahead_does_not_make_the_others_unheard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.score_pairs.NAMES_MAX", 30)
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_MAX", 30)
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    _, cursor = pairs.read(stable, candidate, CANDIDATE, {}, NOW)
    found = 0
    for i in range(90):  # a quarter of an hour, in which the time of many of its files comes
        now = NOW + timedelta(seconds=10 * i)
        write_log(stable, [(f"good{i}", "stable", 0.5), (f"wrong{i}", "stable", 0.5)], at=now)
        write_log(candidate, [(f"good{i}", "shadow", 0.7)], at=now)
        write_log(candidate, [(f"wrong{i}", "shadow", 0.7)], at=now + timedelta(minutes=10), name="wrong")
        differences, cursor = pairs.read(stable, candidate, CANDIDATE, json.loads(json.dumps(cursor)), now)
        found += len(differences)
        assert found == i + 1, "each of the good pod's, and none twice"
        assert len(cursor["candidate"]) <= 30
        assert len(cursor["ahead"]["candidate"]) <= 30


def test_an_arm_that_writes_nothing_but_files_of_a_time_to_come_is_an_error_that_names_one(tmp_path: Path) -> None:
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    _, cursor = pairs.read(stable, candidate, CANDIDATE, {}, NOW)
    write_log(stable, [("r1", "stable", 0.5)])
    path = write_log(candidate, [("r1", "shadow", 0.7)], at=NOW + timedelta(hours=1))
    with pytest.raises(StateError, match=path.name):
        pairs.read(stable, candidate, CANDIDATE, cursor, NOW + timedelta(seconds=10))


def looked(pairs: ScorePairs, root: Path, cursor: dict[str, Any], now: datetime) -> tuple[str, int, dict[str, Any]]:
    """What a gate would say of it, the differences, and the cursor that the next look has."""
    try:
        found, after = pairs.read(root / "s", root / "c", CANDIDATE, json.loads(json.dumps(cursor)), now)
    except OnlyAhead as e:
        return "Error", 0, e.cursor
    return "", len(found), after


@pytest.mark.parametrize("ahead", [timedelta(minutes=10), timedelta(hours=9)], ids=["minutes", "hours"])
def test_an_arm_of_a_wrong_clock_is_an_error_as_long_as_it_writes_and_not_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: timedelta,
) -> None:
    monkeypatch.setattr("hafnium_rollout.score_pairs.NAMES_MAX", 40)
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_MAX", 40)
    pairs, now = ScorePairs(), NOW
    _, _, cursor = looked(pairs, tmp_path, {}, now)
    for i in range(100):  # more than may be remembered, and in one case until their time has come
        now = NOW + timedelta(seconds=10 * (i + 1))
        write_log(tmp_path / "s", [(f"r{i}", "stable", 0.5)], at=now)
        write_log(tmp_path / "c", [(f"r{i}", "shadow", 0.7)], at=now + ahead)
        if i % 3 == 0:
            said, _, cursor = looked(pairs, tmp_path, cursor, now)
            assert said == "Error", now
            assert len(cursor["ahead"]["candidate"]) <= 40
    heard = [looked(pairs, tmp_path, cursor, now + timedelta(seconds=60))[0]]
    for minutes in (3, 5, 9, 12, 30, 600):
        said, _, cursor = looked(pairs, tmp_path, cursor, now + timedelta(minutes=minutes))
        heard.append(said)
    assert heard == ["Error", "", "", "", "", "", ""], "between two flushes it is one still; then nobody asks it"


def test_one_file_of_a_time_to_come_makes_no_lull_an_error(tmp_path: Path) -> None:
    pairs, now = ScorePairs(), NOW
    _, _, cursor = looked(pairs, tmp_path, {}, now)
    wrong = write_log(tmp_path / "c", [("w", "shadow", 0.7)], at=NOW + timedelta(hours=9), name="wrong")
    for i in range(60):
        now += timedelta(seconds=10)
        write_log(tmp_path / "s", [(f"r{i}", "stable", 0.5)], at=now)
        write_log(tmp_path / "c", [(f"r{i}", "shadow", 0.7)], at=now)
        said, found, cursor = looked(pairs, tmp_path, cursor, now)
        assert (said, found) == ("", 1)
    for minutes in (1, 3, 5, 30):
        said, _, cursor = looked(pairs, tmp_path, cursor, now + timedelta(minutes=minutes))
        assert said == "", f"idle for {minutes} minutes"
        if minutes == 5:
            wrong.unlink()


def test_files_ahead_of_the_clock_are_not_read_when_their_time_comes_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their list has room for what comes to its time in two minutes, and no more: what is past must not stand in it."""
    pods, pairs, total = 6, ScorePairs(), 0
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_MAX", 12 * pods + 8)
    _, _, cursor = looked(pairs, tmp_path, {}, NOW)
    for i in range(60):
        now = NOW + timedelta(seconds=10 * i)
        write_log(tmp_path / "s", [(f"{i}-{pod}", "stable", 0.5) for pod in range(pods + 1)], at=now)
        write_log(tmp_path / "c", [(f"{i}-{pods}", "shadow", 0.7)], at=now, name="good")
        for pod in range(pods):
            write_log(tmp_path / "c", [(f"{i}-{pod}", "shadow", 0.7)], at=now + timedelta(seconds=180), name=f"wrong{pod}")
        said, found, cursor = looked(pairs, tmp_path, cursor, now)
        total += found
        assert (said, total) == ("", i + 1), "the good pod's, once each"


def test_an_arm_of_a_wrong_clock_is_an_error_also_behind_files_that_another_pod_left_further_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hafnium_rollout.score_pairs.AHEAD_MAX", 20)
    pairs, now = ScorePairs(), NOW
    _, _, cursor = looked(pairs, tmp_path, {}, now)
    for i in range(60):
        now = NOW + timedelta(seconds=20 * (i + 1))
        write_log(tmp_path / "c", [(f"r{i}", "shadow", 0.7)], at=now + timedelta(minutes=6))
        if i < 10:
            write_log(tmp_path / "c", [(f"q{i}", "shadow", 0.7)], at=now + timedelta(hours=5))
        said, _, cursor = looked(pairs, tmp_path, cursor, now)
        assert said == "Error", now
    for minutes in (3, 5, 30, 280, 400):
        said, _, cursor = looked(pairs, tmp_path, cursor, now + timedelta(minutes=minutes))
        assert said == "", "nobody asks it any more"


def test_what_the_other_arm_writes_meanwhile_meets_its_partners_when_the_clock_is_right_again(tmp_path: Path) -> None:
    pairs = ScorePairs()
    _, _, cursor = looked(pairs, tmp_path, {}, NOW)
    write_log(tmp_path / "c", [("r1", "shadow", 0.7)], at=NOW)
    said, _, cursor = looked(pairs, tmp_path, cursor, NOW)
    assert said == ""
    now = NOW + timedelta(minutes=4)
    write_log(tmp_path / "s", [("r1", "stable", 0.5), ("r2", "stable", 0.5)], at=now)
    write_log(tmp_path / "c", [("lost", "shadow", 0.7)], at=now + timedelta(hours=1))
    said, _, cursor = looked(pairs, tmp_path, cursor, now)
    assert said == "Error"
    now += timedelta(seconds=30)
    write_log(tmp_path / "c", [("r2", "shadow", 0.7)], at=now)
    said, found, cursor = looked(pairs, tmp_path, cursor, now)
    assert (said, found) == ("", 2), "that of the look before, and this one's"
    assert looked(pairs, tmp_path, cursor, now)[:2] == ("", 0)


@pytest.mark.parametrize("wrong", [256, 100, 6], ids=["nothing else was left", "some of the list", "a list with room"])
def test_a_list_that_the_release_before_filled_with_names_ahead_of_the_clock_hears_again(tmp_path: Path, wrong: int) -> None:
    pairs = ScorePairs()
    write_log(tmp_path / "s", [("old", "stable", 0.5)], at=NOW - timedelta(hours=1))
    counted = write_log(tmp_path / "c", [("old", "shadow", 0.7)], at=NOW - timedelta(hours=1)).name
    read = [counted, *(f"part-{NOW - timedelta(seconds=999 - i):%Y%m%dT%H%M%S%f}-a.parquet" for i in range(155 if wrong == 100 else 9))]
    later = [f"part-{NOW + timedelta(days=1, seconds=i):%Y%m%dT%H%M%S%f}-w.parquet" for i in range(wrong)]
    cursor: dict[str, Any] = {"stable": [], "candidate": sorted([*read, *later])[-256:]}
    total = 0
    for i in range(60):
        now = NOW + timedelta(seconds=10 * i)
        said, found, cursor = looked(pairs, tmp_path, cursor, now)
        assert said == ""
        total += found
        write_log(tmp_path / "s", [(f"r{i}", "stable", 0.5)], at=now)
        write_log(tmp_path / "c", [(f"r{i}", "shadow", 0.7)], at=now)
    assert total == 59, "all of them, and none that was counted before"
    assert cursor["ahead"]["candidate"] == later


def test_what_waits_for_its_partner_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hafnium_rollout.score_pairs.WAITING_MAX", 10)
    stable, candidate, pairs = tmp_path / "s", tmp_path / "c", ScorePairs()
    _, cursor = pairs.read(stable, candidate, CANDIDATE, {})
    write_log(candidate, [(f"r{i}", "shadow", 0.5) for i in range(100)])
    _, cursor = pairs.read(stable, candidate, CANDIDATE, cursor)
    write_log(stable, [(f"r{i}", "stable", 0.5) for i in range(100)])
    found, _ = pairs.read(stable, candidate, CANDIDATE, cursor)
    assert len(found) == 10


# --- latency ----------------------------------------------------------------------------------------------------------------------


def test_a_threshold_between_two_buckets_follows_both() -> None:
    bounds = (25.0, 50.0, 100.0, 250.0)
    assert thresholds(100.0, bounds) == (100.0,)
    assert thresholds(60.0, bounds) == (50.0, 100.0)
    assert thresholds(10.0, bounds) == (25.0,)
    assert thresholds(300.0, bounds) == ()


def test_slow_requests_are_those_above_the_bucket() -> None:
    before = ArmCounters("x", 0, 0, 0, 10, {50.0: 8, 100.0: 9})
    after = ArmCounters("x", 0, 0, 0, 30, {50.0: 20, 100.0: 27})
    look = latency_look(60.0, ((before, after), (before, before)))
    assert [(s.stable.bad, s.stable.total, s.candidate.total) for s in look.series] == [(8, 20, 0), (2, 20, 0)]
    assert "largest bucket" in latency_look(5000.0, ((before, after), (before, after))).error


# --- files ------------------------------------------------------------------------------------------------------------------------


def test_a_list_of_services_that_is_missing_or_broken_is_unknown_not_empty(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="missing"):
        read_services(StateFolder(tmp_path))
    (tmp_path / "services.json").write_text('{"services": 5}')
    with pytest.raises(StateError, match="not a list"):
        read_services(StateFolder(tmp_path))
    (tmp_path / "services.json").write_text('{"services"')
    with pytest.raises(StateError, match="can't be read"):
        read_services(StateFolder(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"stable": 5}', '{"stable": "a", "weight": 120}', '{"stable": "a", "weight": true}'])
def test_a_route_that_makes_no_sense_is_an_error(tmp_path: Path, text: str) -> None:
    folder = StateFolder(tmp_path)
    assert read_route(folder, "risk") is None
    (tmp_path / "routes").mkdir()
    folder.route("risk").write_text(text)
    with pytest.raises(StateError):
        read_route(folder, "risk")


def test_without_a_runtime_everything_is_unknown_and_named(tmp_path: Path) -> None:
    seen = LocalBackend(StateFolder(tmp_path)).observe(rollout(), RolloutStatus(stable=ModelSeen(service="risk")), NOW)
    assert seen.services is None
    assert seen.live is None
    assert seen.look is None
    assert any("hafnium up" in p for p in seen.problems)


def test_each_action_is_one_whole_write_and_may_be_done_twice(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    backend, spec = LocalBackend(folder), rollout()
    model = ModelSeen(service=SERVICE, storage_uri="file:///bundles/2", digest=CANDIDATE, version="2")
    for _ in range(2):
        backend.apply(spec, EnsureCandidate(model, spec.spec.service))
        backend.apply(spec, SetShadow("risk", SERVICE))
    assert json.loads(folder.route("risk").read_text()) == {
        "name": "risk", "stable": "risk", "candidate": SERVICE, "weight": 0, "shadow": True}
    backend.apply(spec, SetWeight("risk", SERVICE, 25))
    assert json.loads(folder.route("risk").read_text())["weight"] == 25
    backend.apply(spec, SetWeight("risk", SERVICE, 0))
    assert json.loads(folder.route("risk").read_text())["candidate"] is None
    backend.apply(spec, Rollback("risk", SERVICE, "x"))
    backend.apply(spec, Promote(SERVICE))
    assert json.loads(folder.route("risk").read_text())["stable"] == SERVICE
    assert "storageUri" not in spec.spec.service["predictor"]["model"]  # the template itself is left as it was
    assert backend.managed("risk") == {SERVICE}
    for _ in range(2):
        backend.apply(spec, RetireService(SERVICE))
    assert backend.managed("risk") == frozenset()


def test_a_service_that_a_person_made_is_never_removed(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    folder.service("risk").write_text("metadata: {name: risk}\n")
    folder.service("torn").write_text("metadata: [")
    backend = LocalBackend(folder)
    backend.apply(rollout(), RetireService("risk"))
    assert folder.service("risk").is_file()
    assert backend.managed("risk") == frozenset()


def test_evidence_is_read_and_a_bad_file_is_named(tmp_path: Path) -> None:
    reader = EvidenceReader(tmp_path)
    assert reader.read() == ((), (), "")
    spec = EvidenceSpec(model_digest=CANDIDATE, kind="drift", window_start=NOW, window_end=NOW + timedelta(hours=1), verdict="Pass",
                        samples=10, message="ok", created_at=NOW)
    write_evidence(tmp_path, spec)
    assert reader.read() == ((spec,), (), "")
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "newer.json").write_text(json.dumps({"spec": {**spec.model_dump(mode="json", by_alias=True), "verdict": "Perhaps"}}))
    found, unread, error = reader.read()
    assert (found, error) == ((spec,), "")
    assert [(u.model_digest, u.kind) for u in unread] == [(None, None), (CANDIDATE, "drift")]
    assert "half.json" in unread[0].error
    assert all(u.created_at is not None for u in unread)


# --- commands ---------------------------------------------------------------------------------------------------------------------


def test_approvals_count_for_their_own_digest_only(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    spec = rollout(approvals={"required": ["validation"]})
    folder.rollout("risk").write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True)))
    commands.approve(tmp_path, "risk", "validation", "ada")
    (folder.approvals / "broken.json").write_text("{")
    assert count(read_approvals(folder), CANDIDATE, "thea").stages == {"validation"}
    assert count(read_approvals(folder), OTHER, "thea").stages == frozenset()


def test_actions_are_files_that_name_the_candidate_and_vanish_when_handled(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    folder.rollout("risk").write_text(json.dumps(rollout().model_dump(mode="json", exclude_none=True)))
    for ask in (commands.promote, commands.skip, commands.abort, commands.retry):
        assert "status risk" in ask(tmp_path, "risk", "why not")
    (folder.actions / "ModelRollout-risk.zzz.json").write_text("{}")
    backend = LocalBackend(folder)
    seen = backend.observe(rollout(), RolloutStatus(), NOW)
    assert [a.type for a in seen.actions] == ["Promote", "SkipStep", "Abort", "Retry"]
    assert {a.candidate_digest for a in seen.actions} == {CANDIDATE}
    assert any("not an action" in p for p in seen.problems)
    backend.forget_actions("risk", [a.id for a in seen.actions[:3]])
    assert [a.type for a in backend.observe(rollout(), RolloutStatus(), NOW).actions] == ["Retry"]


def under_way(root: Path) -> StateFolder:
    """A state folder with a rollout at its first step, and what the controller keeps beside it."""
    folder, world = StateFolder(root), World()
    for _ in range(8):
        world.turn()
    assert world.status.phase == "Progressing"
    folder.objects.mkdir()
    (root / "status").mkdir()
    folder.rollout("risk").write_text(json.dumps(rollout_data(world.spec)))
    folder.last_good("risk").write_text(json.dumps(rollout_data(world.spec)))
    folder.status("risk").write_text(world.status.model_dump_json())
    return folder


def asked(folder: StateFolder) -> list[tuple[str, str]]:
    return [(a.type, a.candidate_digest) for _, a in read_actions(folder, "risk") if isinstance(a, UserAction)]


@pytest.mark.parametrize("text", ["spec: {gates: [", "not: {a: rollout}", "spec: {model: {digest: sha256:abc}}", "a\x00b"])
def test_abort_works_while_the_file_is_broken(tmp_path: Path, text: str) -> None:
    folder = under_way(tmp_path)
    folder.rollout("risk").write_text(text)
    commands.abort(tmp_path, "risk", "it's bad")
    assert asked(folder) == [("Abort", CANDIDATE)]


def test_abort_works_where_the_status_is_a_newer_controllers(tmp_path: Path) -> None:
    folder = under_way(tmp_path)
    status = json.loads(folder.status("risk").read_text())
    folder.status("risk").write_text(json.dumps(status | {"newerField": 1, "phase": "Unheard"}))
    commands.abort(tmp_path, "risk")
    assert asked(folder) == [("Abort", CANDIDATE)]
    with pytest.raises(StateError, match="phase"):
        commands.status(tmp_path)
    folder.status("risk").write_text(json.dumps(status | {"newerField": 1}))
    assert "status.newerField" in commands.status_table(tmp_path)


def test_abort_without_any_readable_status_is_about_what_the_file_asks_for_and_says_so(tmp_path: Path) -> None:
    folder = under_way(tmp_path)
    folder.status("risk").write_text("{half")
    assert "what the file asks for, since the status can't be read" in commands.abort(tmp_path, "risk")
    folder.rollout("risk").write_text("spec: {gates: [")
    commands.abort(tmp_path, "risk")  # the copy that the controller goes on with tells
    assert asked(folder) == [("Abort", CANDIDATE)] * 2
    folder.last_good("risk").unlink()
    with pytest.raises(StateError, match=r"(?s)1 problem.*By hand, .*: write .*ModelRollout-risk.by-hand.json with"):
        commands.abort(tmp_path, "risk")


def test_an_unknown_rollout_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    folder.rollout("risk").write_text(json.dumps(rollout().model_dump(mode="json", exclude_none=True)))
    with pytest.raises(UnknownRollout, match="there are: risk"):
        commands.read_status(tmp_path, "rsik")
    assert commands.status_table(tmp_path).splitlines()[1].split()[:2] == ["risk", "Pending"]


HOSTILE = "CHG-1\x1b[2J\r\nother  Promoted  -  100%\u202e\x9b\u2028"


def test_what_others_wrote_neither_moves_the_cursor_nor_adds_a_line(tmp_path: Path) -> None:
    """A reason, a requester, a trainer: anybody who may write a ModelRollout chooses them."""
    folder = under_way(tmp_path)
    status = json.loads(folder.status("risk").read_text())
    status |= {"message": HOSTILE, "reason": HOSTILE, "gate": HOSTILE}
    status["candidate"] |= {"version": HOSTILE, "trainedBy": HOSTILE}
    folder.status("risk").write_text(json.dumps(status))
    table = commands.status_table(tmp_path).split("\n")
    assert len(table) == 3 + len(status["gates"])
    point = HistoryPoint(time=START, event="Abort", weight=0, message=f"asked for by {HOSTILE}: {HOSTILE}")
    with pytest.raises(InputError) as refused:
        commands.approve(tmp_path, "risk", "security", "carol", "0" * 12)
    for line in (*table, commands.event_line(point), *str(refused.value).split("\n"), *ending(Summary(recorded=HOSTILE))):
        assert line.isprintable(), line
    assert r"CHG-1\x1b[2J\r\nother  Promoted" in table[2]
    assert commands.status(tmp_path)["rollouts"][0]["message"] == HOSTILE, "JSON escapes for itself"


def test_apply_says_what_it_did_and_refuses_another_target(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    data = rollout().model_dump(mode="json", exclude_none=True)
    file.write_text(json.dumps(data))
    state = tmp_path / "state"
    with pytest.raises(InputError, match="no such state folder"):
        commands.apply(state, file)
    state.mkdir()
    assert commands.apply(state, file) == "modelrollout risk created"
    assert commands.apply(state, file) == "modelrollout risk unchanged"
    data["spec"]["model"]["version"] = "3"
    file.write_text(json.dumps(data))
    assert commands.apply(state, file) == "modelrollout risk configured"
    data["spec"]["model"]["name"] = "another"
    file.write_text(json.dumps(data))
    with pytest.raises(StateError, match="can't change"):
        commands.apply(state, file)
