"""When a new training is due, whatever comes in any order; and that it is started once, however often the controller dies."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, START, rollout
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.errors import NotLeading, StateError
from hafnium_rollout.notifications.notices import Subject, alerts
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import Attempt, RetrainingPolicy, attempt_id, decide_retraining
from hafnium_rollout.retraining.trigger import CommandStarter, FileAttempts, Retraining, RetrainingTrigger
from hafnium_rollout.status import ModelSeen, RolloutStatus

HOUR = timedelta(hours=1)
STEADY = RolloutStatus(phase="Promoted", stable=ModelSeen(service="risk", digest=STABLE, version="1"))


def policy(**changes: Any) -> RetrainingPolicy:
    return RetrainingPolicy.model_validate({"policy": "propose", **changes})


def finding(hour: int, verdict: Any = "Fail", *, digest: str = STABLE, kind: Any = "drift", length: int = 1) -> EvidenceSpec:
    """A window that ends `hour` hours after START."""
    end = START + hour * HOUR
    return EvidenceSpec(model_digest=digest, kind=kind, window_start=end - length * HOUR, window_end=end, verdict=verdict, samples=5000,
                        message="geo moved", created_at=end)


def ask(evidence: list[EvidenceSpec], hour: float = 5, *, history: tuple[Attempt, ...] = (), status: RolloutStatus = STEADY,
        rules: RetrainingPolicy | None = None) -> Attempt | None:
    return decide_retraining(rules or policy(), "risk", status, evidence, history, START + hour * HOUR).attempt


def test_two_failing_windows_in_a_row_about_the_stable_model_are_a_reason() -> None:
    found = ask([finding(3), finding(4)])
    assert found is not None
    assert (found.state, found.kind, found.digest) == ("Proposed", "drift", STABLE)
    assert found.id == "risk-retrain-bbbbbbbb-1"
    assert len(found.findings) == 2
    assert "the stable model 1 failed in 2 windows in a row" in found.message
    started = ask([finding(3), finding(4)], rules=policy(policy="start"))
    assert started is not None
    assert started.state == "Intended"


@pytest.mark.parametrize("evidence", [
    [], [finding(4)], [finding(3), finding(4, "Pass")], [finding(3), finding(4, "NoData")], [finding(3), finding(4, "Error")],
    [finding(3), finding(4, "Inconclusive")], [finding(2), finding(3, "Pass"), finding(4)], [finding(3), finding(4, length=3)],
    [finding(3, digest=CANDIDATE), finding(4, digest=CANDIDATE)], [finding(3, digest=OTHER), finding(4)],
    [finding(3, kind="smoke"), finding(4, kind="smoke")], [finding(3), finding(4, kind="performance")], [finding(8), finding(9)],
], ids=["nothing", "one", "the newest passes", "the newest is NoData", "the newest is an error", "the newest is unclear", "not in a row",
        "windows overlap", "about the candidate", "one about an older model", "another kind", "two kinds, one each", "from the future"])
def test_no_reason(evidence: list[EvidenceSpec]) -> None:
    assert ask(evidence) is None


def test_no_data_in_between_neither_counts_nor_breaks_the_row() -> None:
    found = ask([finding(2), finding(3, "NoData"), finding(4)])
    assert found is not None
    assert len(found.findings) == 2


@pytest.mark.parametrize("phase", ["Pending", "Progressing", "Paused"])
def test_a_candidate_under_way_may_be_the_answer_already(phase: Any) -> None:
    status = STEADY.model_copy(update={"phase": phase, "candidate": ModelSeen(service="c", digest=CANDIDATE)})
    assert ask([finding(3), finding(4)], status=status) is None


def test_old_evidence_and_an_unknown_stable_model_are_no_reason() -> None:
    assert ask([finding(3), finding(4)], hour=4 + 49) is None
    assert ask([finding(3), finding(4)], status=RolloutStatus()) is None
    assert ask([finding(3), finding(4)], rules=policy(policy="never")) is None


def test_weekly_findings_of_labels_that_come_a_month_late_are_a_reason_soon_after_they_are_found() -> None:
    """As cronjob-performance.yaml writes them: a week that ended 30 days ago. The model decays now as much as when that week was judged."""
    found_at = (30 * 24, 37 * 24)
    weeks = [finding(hour - 30 * 24, kind="performance", length=7 * 24).model_copy(update={"created_at": START + hour * HOUR})
             for hour in found_at]
    found = ask(weeks, hour=found_at[1] + 6)
    assert found is not None
    assert (found.kind, len(found.findings)) == ("performance", 2)
    assert ask(weeks[:1], hour=found_at[0] + 6) is None
    assert ask(weeks, hour=found_at[1] + 49) is None, "nobody found that lately"
    why = decide_retraining(policy(), "risk", STEADY, weeks, (), START + (found_at[1] + 49) * HOUR).reason
    assert "performance: the newest finding was made 2d1h ago" in why


def test_the_same_findings_are_no_second_reason_and_attempts_end() -> None:
    rules = policy(coolDown="1h", attemptsMax=2, maxAge="100d")
    first = ask([finding(3), finding(4)], rules=rules)
    assert first is not None
    assert ask([finding(3), finding(4)], hour=30, history=(first,), rules=rules) is None
    evidence = [finding(h) for h in (3, 4, 28, 29)]
    second = ask(evidence, hour=30, history=(first,), rules=rules)
    assert second is not None
    assert second.id.endswith("-2")
    evidence += [finding(58), finding(59)]
    assert ask(evidence, hour=60, history=(first, second), rules=rules) is None
    why = decide_retraining(rules, "risk", STEADY, evidence, (first, second), START + 60 * HOUR).reason
    assert "2 attempts were made" in why
    new = STEADY.model_copy(update={"stable": ModelSeen(service="c", digest=CANDIDATE)})
    assert ask([finding(h, digest=CANDIDATE) for h in (58, 59)], hour=60, history=(first, second), rules=rules, status=new) is not None


FINDINGS = st.lists(st.builds(
    lambda hour, verdict, digest, kind, length: finding(hour, verdict, digest=digest, kind=kind, length=length),
    st.integers(0, 300), st.sampled_from(["Pass", "Fail", "Fail", "Fail", "Inconclusive", "NoData", "Error"]),
    st.sampled_from([STABLE, STABLE, CANDIDATE]), st.sampled_from(["drift", "performance", "smoke"]), st.integers(1, 4)), max_size=60)


@settings(deadline=None)
@given(
    findings=FINDINGS, cool_down=st.integers(1, 100), attempts_max=st.integers(1, 4), needed=st.integers(1, 3),
    looks=st.lists(st.integers(0, 320), max_size=60), promoted_at=st.integers(0, 320))
def test_whatever_comes_in_any_order(
    findings: list[EvidenceSpec], cool_down: int, attempts_max: int, needed: int, looks: list[int], promoted_at: int,
) -> None:
    """Never two within a cool-down, never more than allowed for a model, never on anything but Fails of the model that is stable then."""
    rules = policy(coolDown=f"{cool_down}h", attemptsMax=attempts_max, findings=needed)
    history: tuple[Attempt, ...] = ()
    for hour in looks:  # clocks may go backwards, too
        now = START + hour * HOUR
        stable = CANDIDATE if hour >= promoted_at else STABLE
        status = STEADY.model_copy(update={"stable": ModelSeen(service="s", digest=stable)})
        known = [e for e in findings if e.created_at <= now]
        found = decide_retraining(rules, "risk", status, known, history, now).attempt
        if found is None:
            continue
        assert found.digest == stable
        assert all(now - a.time >= cool_down * HOUR for a in history)
        assert len([a for a in history if a.digest == stable]) < attempts_max
        assert len(found.findings) == needed
        mine = [e for e in known if e.model_digest == stable and e.kind == found.kind]
        newest = max(e.window_end for e in mine)
        assert "Fail" in {e.verdict for e in mine if e.window_end == newest}
        assert len([e for e in mine if e.verdict == "Fail"]) >= needed
        assert found.id not in {a.id for a in history}
        history = (*history, found)


# --- the shell ----------------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


WRITE = ("import os,sys; e=os.environ; "
         "open(sys.argv[1],'a').write(e['HAFNIUM_RETRAINING_ID']+' '+e['HAFNIUM_RETRAINING_PROPOSAL']+'\\n')")


def trigger(folder: Path, code: str, *arguments: str, **changes: Any) -> RetrainingTrigger:
    rules = Retraining.model_validate({"policy": "start", "command": [sys.executable, "-c", code, *arguments], **changes})
    return RetrainingTrigger(rules, FileAttempts(folder), CommandStarter(rules.command, rules.command_deadline, folder), lambda _: None)


EVIDENCE = (finding(3), finding(4))
NOW = START + 5 * HOUR


def test_the_command_is_run_once_with_what_it_needs_to_know(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = tmp_path / "retraining"
    made = trigger(folder, WRITE, str(out))
    points = made.turn(rollout(), STEADY, EVIDENCE, NOW)
    assert [(p.event, p.alert) for p in points] == [("RetrainingStarted", True)]

    def state() -> str:
        made.turn(rollout(), STEADY, EVIDENCE, NOW)
        return FileAttempts(folder).load("default/risk")[0].state

    until(lambda: state() == "Succeeded", "not ended")
    name, file = out.read_text().split()
    assert name == "risk-retrain-bbbbbbbb-1"
    told = json.loads(Path(file).read_text())
    assert told["stable"]["digest"] == STABLE
    assert len(told["because"]["findings"]) == 2
    assert made.turn(rollout(), STEADY, EVIDENCE, NOW) == points, "the same event, with the same id"
    assert out.read_text().count("\n") == 1


def test_a_crash_after_the_intent_starts_it_and_one_after_the_start_does_not_start_it_again(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "retraining"
    decided = decide_retraining(policy(policy="start"), "risk", STEADY, EVIDENCE, (), NOW).attempt
    assert decided is not None
    FileAttempts(folder).save("default/risk", (decided,))  # killed here
    trigger(folder, WRITE, str(out)).turn(rollout(), STEADY, EVIDENCE, NOW)
    until(out.is_file, "not started")
    FileAttempts(folder).save("default/risk", (decided,))  # started, and killed before that was written
    trigger(folder, WRITE, str(out)).turn(rollout(), STEADY, EVIDENCE, NOW)
    found = FileAttempts(folder).load("default/risk")
    assert [a.state for a in found] == ["Unknown"]
    assert out.read_text().count("\n") == 1


def test_an_intent_for_a_model_that_was_replaced_is_not_started(tmp_path: Path) -> None:
    decided = decide_retraining(policy(policy="start"), "risk", STEADY, EVIDENCE, (), NOW).attempt
    assert decided is not None
    FileAttempts(tmp_path).save("default/risk", (decided,))
    new = STEADY.model_copy(update={"stable": ModelSeen(service="c", digest=CANDIDATE)})
    trigger(tmp_path, WRITE, str(tmp_path / "out")).turn(rollout(), new, EVIDENCE, NOW)
    assert FileAttempts(tmp_path).load("default/risk")[0].state == "Failed"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "deadline", "detail"), [
    ("raise SystemExit(3)", "1h", "exit status 3"), ("import time; time.sleep(600)", "200ms", "ended after its deadline")])
def test_a_command_that_fails_or_hangs_is_told(tmp_path: Path, code: str, deadline: str, detail: str) -> None:
    made = trigger(tmp_path, code, commandDeadline=deadline)

    def state() -> str:
        made.turn(rollout(), STEADY, EVIDENCE, NOW)
        return FileAttempts(tmp_path).load("default/risk")[0].state

    until(lambda: state() == "Failed", "not told")
    assert detail in FileAttempts(tmp_path).load("default/risk")[0].detail
    points = made.turn(rollout(), STEADY, EVIDENCE, NOW)
    assert [(p.event, p.alert) for p in points] == [("RetrainingStarted", True), ("RetrainingFailed", True)]


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    rules = Retraining(policy="start", command=("/nowhere/train",))
    made = RetrainingTrigger(rules, FileAttempts(tmp_path), CommandStarter(rules.command, HOUR, tmp_path), lambda _: None)
    points = made.turn(rollout(), STEADY, EVIDENCE, NOW)
    found = FileAttempts(tmp_path).load("default/risk")[0]
    assert (found.state, found.detail) == ("Failed", "/nowhere/train: No such file or directory")
    assert [(p.event, p.alert, p.time) for p in points] == [("RetrainingFailed", True, NOW)]
    assert points[0].message.startswith("/nowhere/train: No such file or directory; ")
    assert made.turn(rollout(), STEADY, EVIDENCE, NOW + HOUR) == points, "the same event, with the same id"
    told = STEADY.model_copy(update={"history": points})
    assert [a.name for a in alerts(Subject("default", "risk"), told, NOW)] == ["HafniumRetrainingFailed"]


def test_a_proposal_starts_nothing(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = []
    made = RetrainingTrigger(Retraining(policy="propose"), FileAttempts(tmp_path), None, log.append)
    points = made.turn(rollout(), STEADY, EVIDENCE, NOW)
    made.turn(rollout(), STEADY, EVIDENCE, NOW + HOUR)
    assert [p.event for p in points] == ["RetrainingProposed"]
    assert [x["event"] for x in log] == ["RetrainingProposed"]
    assert FileAttempts(tmp_path).load("default/risk")[0].state == "Proposed"


def test_a_history_that_cannot_be_read_stops_proposals(tmp_path: Path) -> None:
    path = tmp_path / "default" / "risk.json"
    path.parent.mkdir()
    path.write_text("[{]")
    made = RetrainingTrigger(Retraining(policy="propose"), FileAttempts(tmp_path), None, lambda _: None)
    with pytest.raises(StateError, match="no training is proposed"):
        made.turn(rollout(), STEADY, EVIDENCE, NOW)
    assert path.read_text() == "[{]"


@pytest.mark.parametrize(("given", "words"), [
    ({"policy": "start"}, "needs `command`"), ({"coolDown": "1s"}, "at least 1m"), ({"kinds": []}, "at least 1"),
    ({"command": ["a"], "rayJobTemplate": "b"}, "one of"), ({"findings": 0}, "greater than or equal to 1")])
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Retraining.model_validate(given)


@dataclass
class Cluster:
    """What starts trainings, as a cluster does: by name, until a TTL takes them away."""

    there: set[str] = field(default_factory=set[str])
    started: list[str] = field(default_factory=list[str])
    error: Exception | None = None
    dies: bool = False

    def start(self, attempt: Attempt, rollout: ModelRollout, stable: ModelSeen, proposal: str) -> Attempt:
        del rollout, stable, proposal
        if self.error is not None:
            raise self.error
        self.there.add(attempt.id)
        self.started.append(attempt.id)
        if self.dies:
            raise KeyboardInterrupt
        return attempt.model_copy(update={"state": "Started", "detail": "there"})

    def find(self, attempt: Attempt, rollout: ModelRollout) -> Attempt:
        del rollout
        found = attempt.id in self.there
        return attempt.model_copy(update={"state": "Started" if found else "Unknown", "detail": "found" if found else "gone"})

    def look(self, attempt: Attempt) -> Attempt:
        return attempt


def on_cluster(folder: Path, starter: Cluster, **changes: Any) -> RetrainingTrigger:
    rules = Retraining.model_validate({"policy": "start", "rayJobTemplate": "/not/read/here", **changes})
    return RetrainingTrigger(rules, FileAttempts(folder), starter, lambda _: None)


def states(folder: Path) -> list[str]:
    return [a.state for a in FileAttempts(folder).load("default/risk")]


@pytest.mark.parametrize(("cleaned_up", "state"), [(False, "Started"), (True, "Unknown")], ids=["still there", "its TTL is over"])
def test_a_training_that_ran_while_nobody_wrote_that_down_is_not_started_again(tmp_path: Path, cleaned_up: bool, state: str) -> None:
    starter = Cluster(dies=True)
    with pytest.raises(KeyboardInterrupt):
        on_cluster(tmp_path, starter).turn(rollout(), STEADY, EVIDENCE, NOW)
    assert states(tmp_path) == ["Starting"]
    if cleaned_up:
        starter.there.clear()
    starter.dies = False
    for _ in range(3):
        on_cluster(tmp_path, starter).turn(rollout(), STEADY, EVIDENCE, NOW)
    assert states(tmp_path) == [state]
    assert len(starter.started) == 1
    points = on_cluster(tmp_path, starter).turn(rollout(), STEADY, EVIDENCE, NOW)
    assert [(p.event, p.alert) for p in points] == [(f"Retraining{state}", True)]


def test_a_start_that_is_refused_is_tried_again_until_its_time_is_over(tmp_path: Path) -> None:
    starter = Cluster(error=StateError("KubeRay is not installed"))
    made = on_cluster(tmp_path, starter, startWithin="2h")
    for hour in (0.0, 1.0, 2.0):
        assert made.turn(rollout(), STEADY, EVIDENCE, NOW + hour * HOUR) == (), "nothing has started"
        assert states(tmp_path) == ["Intended"]
    starter.error = None
    points = made.turn(rollout(), STEADY, EVIDENCE, NOW + 3 * HOUR)
    assert states(tmp_path) == ["Failed"]
    assert [(p.event, p.alert, p.time) for p in points] == [("RetrainingFailed", True, NOW + 3 * HOUR)]
    assert starter.started == [], "what it was to learn from is of yesterday"
    detail = FileAttempts(tmp_path).load("default/risk")[0].detail
    assert "within 2h (can't be started yet: KubeRay is not installed)" in detail


def test_a_start_that_worked_at_last_is_started_once(tmp_path: Path) -> None:
    starter = Cluster(error=StateError("busy"))
    made = on_cluster(tmp_path, starter)
    made.turn(rollout(), STEADY, EVIDENCE, NOW)
    starter.error = None
    for minutes in (30, 40, 50):
        points = made.turn(rollout(), STEADY, EVIDENCE, NOW + timedelta(minutes=minutes))
        assert [(p.event, p.time) for p in points] == [("RetrainingStarted", NOW + timedelta(minutes=30))], "when it started"
    assert states(tmp_path) == ["Started"]
    assert len(starter.started) == 1


def test_attempts_of_the_release_before_are_told_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    """It wrote no times. Who was told that a training started isn't told again, and nobody hears of a failure of last year."""
    known = [Attempt(id=state, time=NOW, digest=STABLE, kind="drift", findings=(), message="geo moved", state=state)
             for state in ("Proposed", "Started", "Succeeded", "Failed", "Unknown")]
    FileAttempts(tmp_path).save("default/risk", known)
    points = on_cluster(tmp_path, Cluster()).turn(rollout(), STEADY, (), NOW + HOUR)
    assert [(p.event, p.time, p.message) for p in points] == [
        ("RetrainingProposed", NOW, "geo moved (Proposed)"), ("RetrainingStarted", NOW, "geo moved (Started)"),
        ("RetrainingStarted", NOW, "geo moved (Succeeded)")]


def test_an_attempt_without_times_is_written_as_the_release_before_reads_it(tmp_path: Path) -> None:
    """It takes no field that it doesn't know, also not as null, and a file that it can't read stops all proposals."""
    made = Attempt(id="a", time=NOW, digest=STABLE, kind="drift", findings=("f",), message="geo moved", state="Proposed")
    FileAttempts(tmp_path).save("default/risk", [made, made.model_copy(update={"started_at": NOW, "ended_at": NOW + HOUR})])
    before, after = json.loads((tmp_path / "default/risk.json").read_bytes())
    assert set(before) == {"id", "time", "digest", "kind", "findings", "message", "state", "detail"}
    assert set(after) - set(before) == {"startedAt", "endedAt"}
    assert [a.ended_at for a in FileAttempts(tmp_path).load("default/risk")] == [None, NOW + HOUR]


def test_who_lost_the_lease_writes_no_attempt_any_more(tmp_path: Path) -> None:
    """The file is the next leader's: nothing is said about a start that wasn't tried."""
    starter = Cluster(error=NotLeading("another process leads"))
    with pytest.raises(NotLeading):
        on_cluster(tmp_path, starter).turn(rollout(), STEADY, EVIDENCE, NOW)
    found = FileAttempts(tmp_path).load("default/risk")
    assert [(a.state, a.detail) for a in found] == [("Starting", "")]


NAMES = st.from_regex(r"[a-z0-9]([-.a-z0-9]{0,60}[a-z0-9])?", fullmatch=True)


@given(names=st.lists(NAMES, min_size=2, max_size=6, unique=True), number=st.integers(1, 100))
def test_no_two_rollouts_share_a_training_and_each_name_is_one_that_kuberay_takes(names: list[str], number: int) -> None:
    ids = [attempt_id(name, "bbbbbbbb", number) for name in names]
    assert len(set(ids)) == len(names)
    for found in ids:
        assert len(found) <= 47
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", found)


def test_names_that_begin_alike_are_told_apart() -> None:
    long = "credit-risk-retail-unsecured"
    assert attempt_id(f"{long}-de", "b" * 8, 1) != attempt_id(f"{long}-fr", "b" * 8, 1)
    assert attempt_id("risk.eu", "b" * 8, 1) != attempt_id("risk-eu", "b" * 8, 1)
