"""Webhooks and Alertmanager: at least once, in order, signed, whatever the receiver does, and the loop never waits for it."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hafnium_receiver import LIMIT_S, Receiver, receiver
from hafnium_rollout_gateway import free_port
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, START, World, rollout
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hafnium_rollout.companions import Companions
from hafnium_rollout.controller import Controller
from hafnium_rollout.controller_settings import load_settings
from hafnium_rollout.errors import RolloutFileError, StateError
from hafnium_rollout.notifications.alertmanager import RESOLVED_FOR, RUNBOOK, AlertmanagerCourier, after_round
from hafnium_rollout.notifications.cursors import FileCursors
from hafnium_rollout.notifications.delivery import post, wait_s
from hafnium_rollout.notifications.notices import Alert, Subject, alerts, notices
from hafnium_rollout.notifications.notifier import Notifier
from hafnium_rollout.notifications.settings import Alertmanager, Notifications, Webhook
from hafnium_rollout.notifications.webhook import WebhookCourier, signature
from hafnium_rollout.objects import UserAction
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.state_folder import StateFolder
from hafnium_rollout.status import HistoryPoint, RolloutStatus

SUBJECT = Subject("default", "risk")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "rollouts" / "hafnium_rollout" / "notifications"
Lines = list[dict[str, Any]]


def webhook(found: Receiver, **changes: Any) -> Webhook:
    quick = {"attemptTimeout": "5s", "backoffFirst": "10ms", "backoffMax": "40ms"}
    return Webhook.model_validate({"name": "hook", "url": found.url, **quick, **changes})


@contextmanager
def courier(
    settings: Webhook, folder: Path, log: Lines | None = None, since: datetime = START,
) -> Generator[WebhookCourier]:
    """Running. It was set up before the world's first event."""
    cursors = FileCursors(folder)
    made = WebhookCourier(settings, cursors, (log if log is not None else []).append, now=lambda: since)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def told(turns: int = 60, **changes: Any) -> RolloutStatus:
    """A status with a history."""
    world = World(**changes)
    for _ in range(turns):
        world.turn()
    return world.status


PROMOTED = ["Started", "Promoted"]


# --- which events -------------------------------------------------------------------------------------------------------------


def test_alerts_and_changes_of_phase_are_told_and_steps_if_asked_for() -> None:
    status = told(100, bad_stable=0.01, bad_candidate=0.3)
    assert [n.point.event for n in notices(SUBJECT, status, ("alerts", "phases"))] == ["Started", "Rollback", "RolledBack"]
    assert [n.point.event for n in notices(SUBJECT, status, ("alerts",))] == ["Rollback"]
    assert [n.point.event for n in notices(SUBJECT, status, ("steps",))] == ["StepEntered"]
    body = notices(SUBJECT, status, ("alerts",))[0].body()
    assert body["alert"] is True
    assert body["rollout"] == {"namespace": "default", "name": "risk", "runId": status.run_id}
    assert body["candidate"]["version"] == "2"
    assert body["phase"] == "Progressing"
    json.dumps(body)


def test_an_id_is_the_events_alone() -> None:
    status = told()
    ids = [n.id for n in notices(SUBJECT, status, ("phases", "steps"))]
    assert len(set(ids)) == len(ids)
    later = status.model_copy(update={"history": status.history[1:], "run_id": "other", "phase": "Paused"})
    assert [n.id for n in notices(SUBJECT, later, ("phases", "steps"))] == ids[1:]
    assert not {n.id for n in notices(Subject("other", "risk"), status, ("phases", "steps"))} & set(ids)
    twice = status.model_copy(update={"history": (status.history[0], status.history[0])})
    assert len({n.id for n in notices(SUBJECT, twice, ("phases",))}) == 2


def test_an_unsent_event_of_an_earlier_candidate_does_not_name_the_present_one() -> None:
    world = World()
    world.until("Promoted")
    world.spec = rollout(model={"digest": "sha256:" + "c" * 64, "version": "3"})
    for _ in range(3):
        world.turn()
    found = {n.point.event + n.run_id: n.model.get("version", "") for n in notices(SUBJECT, world.status, ("phases",))}
    assert found == {"Started": "", "Promoted": "", f"Started{world.status.run_id}": "3"}


def test_an_unsent_event_of_a_model_that_was_taken_back_never_names_the_stable_one() -> None:
    """The stable model is asked for again before a receiver was told what became of the other."""
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack") == "RolledBack"
    run = world.status.run_id
    world.spec = rollout(model={"digest": STABLE, "version": "1"})
    for _ in range(3):
        world.turn()
    found = [(n.point.event, n.run_id, n.model.get("digest", "")) for n in notices(SUBJECT, world.status, ("phases", "alerts"))]
    assert found == [(event, run, CANDIDATE) for event in ("Started", "Rollback", "RolledBack")]
    world.spec, world.candidate_digest = rollout(model={"digest": OTHER, "version": "3"}), OTHER
    world.turn()
    assert world.status.taken_back is None
    assert [n.model.get("version", "") for n in notices(SUBJECT, world.status, ("phases",))] == ["", "", "3"]


# --- webhooks -----------------------------------------------------------------------------------------------------------------


def test_events_come_signed_with_their_key_in_order(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    with receiver() as found, courier(webhook(found, secretFile=str(secret)), tmp_path) as sender:
        sender.offer(SUBJECT, told())
        first, second = found.wait_for(2)
        until(lambda: sender.waiting == 0, "still waiting")
        secret.write_text("another")
        sender.offer(Subject("b", "risk"), told(5))
        third = found.wait_for(3)[2]
    assert [r.data["event"] for r in (first, second, third)] == [*PROMOTED, "Started"]
    for request, key in ((first, b"hunter2"), (third, b"another")):
        stamp, mac = (x.split("=")[1] for x in request.headers["X-Hafnium-Signature"].split(","))
        assert hmac.new(key, f"{stamp}.".encode() + request.body, hashlib.sha256).hexdigest() == mac
        assert request.headers["Idempotency-Key"] == request.data["id"]
    assert signature(b"k", 1, b"{}") != signature(b"k", 2, b"{}")


@pytest.mark.parametrize("trouble", ["gone", 500, 503, 429, "hang", "drip", "cut"])
def test_a_receiver_that_comes_back_gets_every_event_once_and_in_order(tmp_path: Path, trouble: int | str) -> None:
    log: Lines = []
    with receiver(200 if trouble == "gone" else trouble, started=trouble != "gone") as found:
        timeout = "1s" if trouble in ("hang", "drip") else "5s"
        with courier(webhook(found, attemptTimeout=timeout), tmp_path, log) as sender:
            sender.offer(SUBJECT, told())
            if trouble == "gone":
                until(lambda: any(x["event"] == "NotificationLate" for x in log), "nobody noticed")
                found.start()
            else:
                found.wait_for(3)
                found.mode = 200
            good = found.wait_for(2, 200)
            until(lambda: sender.waiting == 0, "still waiting")
    assert [r.data["event"] for r in good] == PROMOTED
    assert len([r for r in found.requests if r.status == 200]) == 2
    assert [x["event"] for x in log] == ["NotificationLate", "NotificationDelivered"]


def test_the_loop_never_waits_for_a_receiver(tmp_path: Path) -> None:
    """The receiver answers nothing at all until the offers are through."""
    with receiver("hang") as found, courier(webhook(found, attemptTimeout="60s"), tmp_path) as sender:
        world = World()
        for _ in range(60):
            world.turn()
            sender.offer(SUBJECT, world.status)
        assert world.status.phase == "Promoted"
        assert sender.waiting == 2
        assert len(found.wait_for(1)) == 1
        found.stop()


def test_a_restart_repeats_what_was_not_confirmed_and_loses_nothing(tmp_path: Path) -> None:
    status = told()
    with receiver("hang") as found:
        with courier(webhook(found, attemptTimeout="100ms"), tmp_path) as sender:
            sender.offer(SUBJECT, status)
            first = found.wait_for(1)[0]
        found.mode = 200
        with courier(webhook(found), tmp_path) as sender:
            sender.offer(SUBJECT, status)
            good = found.wait_for(2, 200)
            until(lambda: sender.waiting == 0, "still waiting")
        assert good[0].data["id"] == first.data["id"], "the same key: a receiver that had taken it sees so"
        count = len(found.requests)
        with courier(webhook(found), tmp_path) as sender:
            sender.offer(SUBJECT, status)
            assert sender.waiting == 0
        assert len(found.requests) == count, "what was confirmed isn't sent again"


def test_a_new_term_knows_what_the_leader_before_has_sent(tmp_path: Path) -> None:
    status = told()
    with receiver() as found, courier(webhook(found), tmp_path) as standby:
        with courier(webhook(found), tmp_path) as leader:
            leader.offer(SUBJECT, status)
            found.wait_for(2)
            until(lambda: leader.waiting == 0, "still waiting")
        standby.lead()
        standby.offer(SUBJECT, status)
        until(lambda: standby.waiting == 0, "it doesn't know what was sent")
    assert len(found.requests) == 2


def test_nothing_is_remembered_in_memory_of_a_rollout_of_which_nothing_waits(tmp_path: Path) -> None:
    with receiver() as found, courier(webhook(found), tmp_path) as sender:
        sender.offer(SUBJECT, told())
        until(lambda: bool(found.requests) and not sender.waiting, "not all is sent")
        sender.gone(SUBJECT)
        until(lambda: not sender._present, "what was in its history is still remembered")
        sender.offer(SUBJECT, told())
        sender.gone(SUBJECT)
        assert not sender.waiting, "nothing was new"
        assert not sender._present


def test_what_happened_before_the_receiver_was_set_up_is_not_news(tmp_path: Path) -> None:
    status = told()
    with receiver() as found, courier(webhook(found), tmp_path, since=status.history[-1].time) as sender:
        sender.offer(SUBJECT, status)
        until(lambda: sender.waiting == 0, "still waiting")
    assert "Started" not in [r.data["event"] for r in found.requests]


def test_a_full_queue_loses_nothing(tmp_path: Path) -> None:
    status = told(100, bad_stable=0.01, bad_candidate=0.3)
    with receiver("hang") as found, courier(webhook(found, queueMax=1, attemptTimeout="1s"), tmp_path) as sender:
        sender.offer(SUBJECT, status)
        assert sender.waiting == 1
        found.mode = 200
        names: list[str] = []
        for n in range(1, 4):
            names.append(found.wait_for(n, 200)[n - 1].data["event"])
            until(lambda: sender.waiting == 0, "still waiting")
            sender.offer(SUBJECT, status)  # the next turn
        assert names == ["Started", "Rollback", "RolledBack"]


@pytest.mark.parametrize("mode", [400, 401, 404, 302])
def test_a_refusal_is_final_loud_and_holds_up_nothing_else(tmp_path: Path, mode: int) -> None:
    log: Lines = []
    with receiver(mode) as found:
        found.headers = {"Location": "/elsewhere"}
        with courier(webhook(found), tmp_path, log) as sender:
            sender.offer(SUBJECT, told())
            found.wait_for(2)
            until(lambda: sender.waiting == 0, "still waiting")
    assert [r.path for r in found.requests] == ["/hook", "/hook"]
    assert [(x["event"], x["level"]) for x in log] == [("NotificationLost", "error")] * 2
    assert f"HTTP {mode}" in log[0]["message"]


def test_an_event_is_given_up_at_its_deadline(tmp_path: Path) -> None:
    log: Lines = []
    with receiver(500) as found, courier(webhook(found, deadline="50ms"), tmp_path, log) as sender:
        sender.offer(SUBJECT, told())
        until(lambda: sender.waiting == 0, "still waiting")
    assert [x["event"] for x in log if x["event"] != "NotificationLate"] == ["NotificationLost"] * 2


def test_nothing_is_sent_unsigned_when_the_secret_is_missing(tmp_path: Path) -> None:
    log: Lines = []
    secret = tmp_path / "secret"
    with receiver() as found, courier(webhook(found, secretFile=str(secret)), tmp_path, log) as sender:
        sender.offer(SUBJECT, told())
        until(lambda: bool(log), "nobody noticed")
        assert not found.requests
        secret.write_text("now")
        found.wait_for(2)
    assert "nothing is sent unsigned" in log[0]["message"]


def test_a_damaged_memory_is_an_error_at_the_start_and_not_a_flood(tmp_path: Path) -> None:
    (tmp_path / "hook.json").write_text("{half")
    with receiver() as found, pytest.raises(StateError, match=r"hook\.json: can't be read"):
        WebhookCourier(webhook(found), FileCursors(tmp_path), print)


def test_a_cursor_that_cannot_be_written_is_told_and_delivery_goes_on(tmp_path: Path) -> None:
    log: Lines = []
    with receiver() as found, courier(webhook(found), tmp_path / "c", log) as sender:
        shutil.rmtree(tmp_path / "c")
        (tmp_path / "c").write_text("a file where the folder was")
        sender.offer(SUBJECT, told())
        found.wait_for(2)
        until(lambda: sender.waiting == 0, "still waiting")
    assert {x["event"] for x in log} == {"CursorNotWritten"}


@given(attempt=st.integers(1, 500), drawn=st.floats(0, 1, exclude_max=True), after=st.none() | st.floats(0, 1e6))
def test_waits_grow_to_their_maximum_and_never_beyond(attempt: int, drawn: float, after: float | None) -> None:
    found = wait_s(attempt, 1.0, 60.0, drawn, after)
    assert 0.5 <= found <= 60.0
    assert found >= min(min(2.0 ** (attempt - 1), 60.0) / 2, 60.0)
    assert after is None or found >= min(after, 60.0)


def test_a_post_says_what_became_of_it() -> None:
    with receiver(503) as found:
        found.headers = {"Retry-After": "7"}
        answer = post(found.url, b"{}", {}, timeout_s=5)
        assert (answer.result, answer.retry_after_s) == ("Again", 7.0)
        for secret in ("s3cr3t\nb", "s3cr3t\u2013"):
            answer = post(found.url, b"{}", {"Authorization": f"Bearer {secret}"}, timeout_s=5)
            assert answer.result == "Again"
            assert "header" in answer.message
            assert "s3cr3t" not in answer.message
        assert post(f"https://127.0.0.1:{found.port}/", b"{}", {}, timeout_s=5).result == "Again"
    assert "ConnectionRefused" in post(found.url, b"{}", {}, timeout_s=5).message


# --- settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "words"), [
    ("ftp://a", "expected http"), ("http://", "expected http"), ("http://u:p@a/", "holds no password"), ("http://a:99999/", "[Pp]ort"),
    ("http://a/#x", "#fragment")])
def test_an_address_that_cannot_work_is_refused_before_the_night(url: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Webhook(name="hook", url=url)


def test_the_pages_examples_are_settings_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "rayjob.yaml").write_text("apiVersion: ray.io/v1\nkind: RayJob\n")
    page = (DOCS / "rollout-commands.md").read_text(encoding="utf-8").replace("/etc/hafnium", str(tmp_path))
    (tmp_path / "webhook-secret").write_text("0123456789abcdef0123456789abcdef")
    found = [y for y in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if y.startswith(("notifications:", "retraining:"))]
    assert len(found) == 2
    for text in found:
        (tmp_path / "s.yaml").write_text(text)
        load_settings(tmp_path / "s.yaml")


def test_each_alert_of_the_operator_has_its_line_in_the_runbooks() -> None:
    said = (PACKAGE / "notices.py").read_text(encoding="utf-8")
    lines = [line for line in (DOCS / "runbooks.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `Hafnium")]
    written = {name for line in lines for name in re.findall(r"`(Hafnium\w+)`", line.split("|")[1])}
    own = {*re.findall(r'"(Hafnium\w+)"', said)}
    assert own >= {"HafniumRolloutRollingBack", "HafniumRetrainingUnknown"}
    assert own - written == {"HafniumRolloutRollbackUnconfirmed"}  # it has a section: Prometheus says it too
    assert written <= own
    heading = RUNBOOK.partition("#")[2].replace("-", " ")
    assert any(line.lower() == f"# {heading}" for line in (DOCS / "runbooks.md").read_text(encoding="utf-8").splitlines())


def test_settings_come_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("notifications:\n  webhooks:\n  - name: a\n    url: http://a/\n    events: [nonsense]\nretraining: {policy: start}\n")
    with pytest.raises(RolloutFileError) as e:
        load_settings(path)
    assert [p.line for p in e.value.problems] == [5, 6]
    path.write_text("notifications:\n  webhooks: [{name: a, url: 'http://a/'}]\n  alertmanagers: [{name: a, url: 'http://a/'}]\n")
    with pytest.raises(RolloutFileError, match="named twice: a"):
        load_settings(path)
    path.write_text("")
    assert load_settings(path).notifications == Notifications()


# --- alerts -------------------------------------------------------------------------------------------------------------------


def test_what_needs_somebody_is_an_alert_as_long_as_it_is_so() -> None:
    world = World(rollout(strategy={"steps": [{"shadow": True, "deadline": "5s", "minDwell": "4s"}, {"weight": 100}]}), rate=1)
    assert world.until("Paused") == "Paused"
    found = alerts(SUBJECT, world.status, world.now)
    assert [a.name for a in found] == ["HafniumRolloutPaused"]
    for _ in range(3):
        world.turn()
    assert [a.labels for a in alerts(SUBJECT, world.status, world.now)] == [a.labels for a in found], "its identity doesn't change"
    assert alerts(SUBJECT, world.status, world.now)[0].since == found[0].since
    assert alerts(SUBJECT, told(), START) == []
    bad = World(bad_candidate=0.5)
    names: list[str] = []
    for _ in range(60):
        bad.turn()
        names += [a.name for a in alerts(SUBJECT, bad.status, bad.now) if a.name not in names]
    assert names == ["HafniumRolloutRollingBack", "HafniumRolloutRolledBack"]


def test_an_alert_about_a_model_that_was_taken_back_never_tells_of_another_one() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack") == "RolledBack"
    before = alerts(SUBJECT, world.status, world.now)
    world.status = world.status.model_copy(update={"rejected_digests": (*world.status.rejected_digests, OTHER)})
    world.spec = rollout(model={"digest": OTHER, "version": "3"})
    world.turn()
    assert (world.status.reason, world.status.message) == (
        "DigestRejected", "sha256:cccccccccccc was rejected; only Retry clears that"), "nor is it put down to what another one did"
    after = alerts(SUBJECT, world.status, world.now)
    assert [(a.name, a.labels, a.message) for a in after] == [(a.name, a.labels, a.message) for a in before]
    assert after[0].digest == CANDIDATE[7:15]
    world.spec = rollout()
    world.turn()
    assert world.status.reason == "GateFailed", "the rollback's own words, now that its model is asked for again"
    assert "cccc" not in world.status.message


def test_a_notice_about_a_rejected_digest_names_no_other_model_as_its_candidate() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack") == "RolledBack"
    world.status = world.status.model_copy(update={"rejected_digests": (*world.status.rejected_digests, OTHER)})
    for digest in (OTHER, STABLE, OTHER, STABLE):
        world.spec = rollout(model={"digest": digest})
        world.turn()
        told_of = [(n.point.event, n.model.get("digest"), n.run_id) for n in notices(SUBJECT, world.status, ("phases", "alerts"))]
        assert [x for x in told_of if x[0] == "DigestRejected"] == [("DigestRejected", None, "")] * (
            sum(e == "DigestRejected" for e in world.events))
        assert ("RolledBack", CANDIDATE, world.status.run_id) in told_of
    assert world.events.count("DigestRejected") == 2


@pytest.mark.parametrize("end", ["Promoted", "RolledBack"])
def test_a_notice_about_a_next_model_that_is_refused_before_it_begins_names_no_other_one(end: str) -> None:
    world = World(bad_candidate=0.5 if end == "RolledBack" else 0.0)
    assert world.until(end) == end
    world.spec = rollout(model={"digest": OTHER})
    world.actions = (UserAction(type="Abort", id="1", candidate_digest=OTHER),)
    for _ in range(2):
        world.turn()
    told = {n.point.event: (n.model.get("digest"), n.run_id) for n in notices(SUBJECT, world.status, ("phases", "alerts"))}
    assert told["CandidateRejected"] == (None, "")
    assert told[end] == (CANDIDATE, world.status.run_id)


def test_a_notice_about_a_candidate_that_is_rejected_while_it_goes_back_names_it() -> None:
    world = World(uncounted=True)
    world.until_step(1)
    world.spec = rollout(model={"digest": OTHER})
    world.turn()
    world.actions = (UserAction(type="Abort", id="1", candidate_digest=CANDIDATE),)
    world.turn()
    told = {n.point.event: n.model.get("digest") for n in notices(SUBJECT, world.status, ("alerts",))}
    assert told["CandidateRejected"] == CANDIDATE


def test_an_alert_about_a_retraining_names_the_model_that_decays() -> None:
    world = World(bad_candidate=0.5)
    assert world.until("RolledBack") == "RolledBack"
    proposed = HistoryPoint(time=world.now, event="RetrainingProposed", weight=0, message="drift of the stable model", alert=True)
    status = world.status.model_copy(update={"history": (*world.status.history, proposed)})
    found = {a.name: a.digest for a in alerts(SUBJECT, status, world.now)}
    assert found == {"HafniumRolloutRolledBack": CANDIDATE[7:15], "HafniumRetrainingProposed": STABLE[7:15]}


def test_a_change_from_outside_is_an_alert_for_a_while() -> None:
    world = World()
    world.until_step(1)
    assert world.route is not None
    world.route = replace(world.route, weight=50, manager="mallory")
    world.turn()
    assert [a.name for a in alerts(SUBJECT, world.status, world.now)] == ["HafniumRolloutChangedOutside"]
    assert alerts(SUBJECT, world.status, world.now + timedelta(hours=1)) == []


def test_an_alert_that_is_over_is_told_for_a_while_until_it_comes_back() -> None:
    alert = Alert("A", "warning", START, "m", SUBJECT, "aa")
    active, over = after_round([alert], {}, {}, START)
    active, over = after_round([], active, over, START + timedelta(seconds=1))
    assert not active
    assert [o.at for o in over.values()] == [START + timedelta(seconds=1)]
    back = replace(alert, since=START + timedelta(seconds=5))
    again, none = after_round([back], active, over, START + timedelta(seconds=5))
    assert list(again.values()) == [back]
    assert none == {}, "the end of its predecessor, with the same labels, would end it"
    assert after_round([], active, over, START + 2 * RESOLVED_FOR) == ({}, {})


def test_an_alert_of_two_events_lasts_on_when_the_first_of_them_is_too_old() -> None:
    world = World()
    world.until_step(1)
    assert world.route is not None
    world.route = replace(world.route, weight=50, manager="mallory")
    world.turn()
    point = next(p for p in world.status.history if p.event == "ExternalChange")
    second = point.model_copy(update={"time": point.time + timedelta(minutes=10)})
    status = world.status.model_copy(update={"history": (*world.status.history, second)})
    active, over = after_round(alerts(SUBJECT, status, second.time), {}, {}, second.time)
    later = point.time + timedelta(minutes=16)
    active, over = after_round(alerts(SUBJECT, status, later), active, over, later)
    assert [a.name for a in active.values()] == ["HafniumRolloutChangedOutside"]
    assert over == {}, "its end would be told with its labels, which are the second event's too"


def paused() -> World:
    """For want of traffic at its first step, an hour ago."""
    world = World(rollout(strategy={"steps": [{"shadow": True, "deadline": "5s", "minDwell": "4s"}, {"weight": 100}]}),
                  rate=1, now=datetime.now(UTC) - timedelta(hours=1))
    world.until("Paused")
    return world


def retried(status: RolloutStatus) -> RolloutStatus:
    return status.model_copy(update={"phase": "Progressing", "reason": "Retry"})


def paused_again(status: RolloutStatus, at: datetime) -> RolloutStatus:
    """For the same reason, so that its alert has the same labels."""
    conditions = tuple(c.model_copy(update={"last_transition_time": at}) for c in status.conditions)
    return status.model_copy(update={"conditions": conditions})


def test_no_request_tells_that_an_alert_is_so_and_that_it_is_over() -> None:
    """Its labels are its identity, and an Alertmanager takes the last: the end of the first pause ended the second."""
    status = paused().status
    now = [datetime.now(UTC)]
    with receiver() as found:
        settings = Alertmanager.model_validate({"name": "am", "url": found.url, "backoffFirst": "10ms", "backoffMax": "40ms"})
        made = AlertmanagerCourier(settings, lambda _: None, now=lambda: now[0])
        made.start()
        try:
            made.offer(SUBJECT, status)
            found.wait_for(1)
            now[0] += timedelta(minutes=3)
            made.offer(SUBJECT, retried(status))
            assert [a["endsAt"] for a in found.wait_for(2)[1].data] == [now[0].isoformat()]
            now[0] += timedelta(minutes=3)
            made.offer(SUBJECT, paused_again(status, now[0]))
            last = found.wait_for(3)[2].data
        finally:
            made.stop()
    assert [(a["labels"]["alertname"], a["startsAt"]) for a in last] == [("HafniumRolloutPaused", now[0].isoformat())]
    assert last[0]["endsAt"] > now[0].isoformat()


@contextmanager
def alertmanager(folder: Path) -> Generator[str]:
    """The real one, as Debian packages it."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    if program is None:
        pytest.skip("NOT TESTED against a real Alertmanager: not installed (Debian: apt-get install prometheus-alertmanager)")
    folder.mkdir()
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump({"route": {"receiver": "none"}, "receivers": [{"name": "none"}]}))
    port = free_port()
    command = [program, f"--config.file={config}", f"--storage.path={folder}", f"--web.listen-address=127.0.0.1:{port}",
               "--cluster.listen-address="]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(f"{url}/-/ready"), "not ready")
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - loopback
            return bool(answer.status == 200)
    except OSError:
        return False


def _alerts(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/api/v2/alerts", timeout=5) as answer:  # noqa: S310 - loopback
        return json.load(answer)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_real_alertmanager_shows_an_alert_while_it_lasts_and_no_longer(tmp_path: Path) -> None:
    world = World(rollout(strategy={"steps": [{"shadow": True, "deadline": "5s", "minDwell": "4s"}, {"weight": 100}]}),
                  rate=1, now=datetime.now(UTC))
    world.until("Paused")
    log: Lines = []
    with alertmanager(tmp_path / "am") as url:
        settings = Alertmanager.model_validate({
            "name": "am", "url": url, "labels": {"cluster": "c1"}, "resend": "1s", "backoffFirst": "50ms", "backoffMax": "100ms"})
        made = AlertmanagerCourier(settings, log.append)
        made.start()
        try:
            made.offer(SUBJECT, world.status)
            until(lambda: bool(_alerts(url)), "no alert")
            found = _alerts(url)[0]
            assert found["labels"] == {
                "alertname": "HafniumRolloutPaused", "severity": "warning", "namespace": "default", "rollout": "risk",
                "model_digest": "aaaaaaaa", "cluster": "c1"}
            assert "deadline" in found["annotations"]["description"]
            assert found["status"]["state"] == "active"
            made.offer(SUBJECT, world.status.model_copy(update={"phase": "Progressing", "reason": "Retry"}))
            until(lambda: not _alerts(url), "not resolved")
        finally:
            made.stop()
    assert not [x for x in log if x["level"] == "error"]


@pytest.mark.slow
def test_the_real_alertmanager_shows_a_second_pause_while_the_end_of_the_first_is_new(tmp_path: Path) -> None:
    status = paused().status
    with alertmanager(tmp_path / "am") as url:
        settings = Alertmanager.model_validate({"name": "am", "url": url, "resend": "1s", "backoffFirst": "50ms", "backoffMax": "100ms"})
        made = AlertmanagerCourier(settings, lambda _: None)
        made.start()
        try:
            made.offer(SUBJECT, status)
            until(lambda: bool(_alerts(url)), "no alert")
            made.offer(SUBJECT, retried(status))
            until(lambda: not _alerts(url), "not resolved")
            again = datetime.now(UTC)
            made.offer(SUBJECT, paused_again(status, again))
            until(lambda: datetime.now(UTC) > again + timedelta(seconds=3), "the clock stands still")
            assert [a["status"]["state"] for a in _alerts(url)] == ["active"]
        finally:
            made.stop()


def test_an_alertmanager_that_was_gone_is_told_what_is_so_when_it_is_back(tmp_path: Path) -> None:
    world = World(bad_candidate=0.5)
    world.until("RolledBack")
    log: Lines = []
    token = tmp_path / "token"
    token.write_text("t0ken\n")
    with receiver(started=False) as found:
        settings = Alertmanager.model_validate({
            "name": "am", "url": f"http://127.0.0.1:{found.port}/prefix/", "tokenFile": str(token), "backoffFirst": "10ms",
            "backoffMax": "40ms"})
        made = AlertmanagerCourier(settings, log.append, now=lambda: START)
        made.start()
        try:
            made.offer(SUBJECT, world.status)
            until(lambda: bool(log), "nobody noticed")
            found.start()
            request = found.wait_for(1)[0]
            made.gone(SUBJECT)
            over = found.wait_for(2)[1]
        finally:
            made.stop()
    assert request.path == "/prefix/api/v2/alerts"
    assert request.headers["Authorization"] == "Bearer t0ken"
    assert [a["labels"]["alertname"] for a in request.data] == ["HafniumRolloutRolledBack"]
    assert request.data[0]["endsAt"] > START.isoformat()
    assert [a["endsAt"] for a in over.data] == [START.isoformat()]


@pytest.mark.parametrize("token", [b"s3cr3t-line1\nline2\n", b"s3cr3t two", b"s3cr3t\xff", "s3cr3t\u2013".encode(), b"s3cr3t\x00"],
                         ids=["two lines", "a space", "no text", "a dash from a word processor", "a NUL"])
def test_a_token_that_cannot_be_sent_is_never_shown(tmp_path: Path, token: bytes) -> None:
    log: Lines = []
    file = tmp_path / "token"
    file.write_bytes(token)
    with receiver() as found:
        settings = Alertmanager.model_validate({
            "name": "am", "url": found.url, "tokenFile": str(file), "backoffFirst": "10ms", "backoffMax": "40ms"})
        made = AlertmanagerCourier(settings, log.append)
        made.start()
        try:
            made.offer(SUBJECT, paused().status)
            until(lambda: bool(log), "nobody noticed")
            assert not found.requests
            file.write_bytes(b"now\n")
            assert found.wait_for(1)[0].headers["Authorization"] == "Bearer now"
        finally:
            made.stop()
    assert f"{file}: no bearer token" in log[0]["message"]
    assert "s3cr3t" not in str(log)


@contextmanager
def alert_courier(found: Receiver, leads: Callable[[], bool]) -> Generator[tuple[AlertmanagerCourier, Callable[[int], None]]]:
    """Running, and how to wait for so many further rounds."""
    rounds: list[None] = []

    def now() -> datetime:
        rounds.append(None)
        return START

    settings = Alertmanager.model_validate({"name": "am", "url": found.url, "resend": "1s", "backoffFirst": "10ms", "backoffMax": "40ms"})
    made = AlertmanagerCourier(settings, lambda _: None, now=now, leads=leads)

    def wait(number: int) -> None:
        for _ in range(number):
            before = len(rounds)
            made._thread.wake.set()
            until(lambda n=before: len(rounds) > n, "no round")

    made.start()
    try:
        yield made, wait
    finally:
        made.stop()


def _rolled_back() -> RolloutStatus:
    world = World(bad_candidate=0.5)
    world.until("RolledBack")
    return world.status


def test_a_former_leader_repeats_no_alert_and_ends_none() -> None:
    """To end it would be as wrong as to repeat it: the new leader knows whether it is so."""
    leads = [True]
    with receiver() as found, alert_courier(found, lambda: leads[0]) as (made, rounds):
        made.offer(SUBJECT, _rolled_back())
        found.wait_for(1)
        rounds(2)
        leads[0] = False
        made.rest()
        rounds(2)  # one may have been under way
        count = len(found.requests)
        rounds(5)
        assert len(found.requests) == count
        leads[0] = True
        made.lead()
        rounds(3)
        assert len(found.requests) == count, "nothing is known in the new term yet, and nothing is said to be over"
        made.offer(SUBJECT, _rolled_back())
        assert [a["labels"]["alertname"] for a in found.wait_for(count + 1)[count].data] == ["HafniumRolloutRolledBack"]
    assert all(a["endsAt"] > START.isoformat() for r in found.requests for a in r.data)


def test_a_process_that_was_stopped_for_a_while_sends_nothing_before_anybody_tells_it() -> None:
    """It wakes up past its lease: its clock knows, though no thread has said so yet."""
    leads = [True]
    with receiver() as found, alert_courier(found, lambda: leads[0]) as (made, rounds):
        made.offer(SUBJECT, _rolled_back())
        found.wait_for(1)
        leads[0] = False
        rounds(2)
        count = len(found.requests)
        rounds(5)
        assert len(found.requests) == count


def test_a_webhook_of_a_former_leader_rests_until_it_leads_again(tmp_path: Path) -> None:
    leads = [False]
    cursors = FileCursors(tmp_path)
    with receiver() as found:
        made = WebhookCourier(webhook(found), cursors, lambda _: None, now=lambda: START, leads=lambda: leads[0])
        made.start()
        try:
            made.offer(SUBJECT, told())
            waiting = made.waiting
            assert waiting > 0
            with courier(webhook(found), tmp_path) as leader:
                leader.offer(SUBJECT, told())
                until(lambda: leader.waiting == 0, "still waiting")
            count = len(found.requests)
            assert made.waiting == waiting
            leads[0] = True
            made.lead()
            made.offer(SUBJECT, told())
            until(lambda: made.waiting == 0, "the leader in between has sent them")
        finally:
            made.stop()
    assert len(found.requests) == count == waiting


# --- in the controller --------------------------------------------------------------------------------------------------------


def test_the_controller_tells_after_the_status_is_written(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    (tmp_path / "objects").mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(rollout_data(rollout())))
    (tmp_path / "services.json").write_text('{"services": []}')
    (tmp_path / "routes").mkdir()
    folder.route("risk").write_text(json.dumps({"name": "risk", "stable": "risk", "candidate": None, "weight": 0, "shadow": False}))
    with receiver() as found:
        notifier = Notifier(Notifications(webhooks=(webhook(found),)), FileCursors(folder.notifications), lambda _: None)
        notifier.start()
        try:
            Controller(folder, log=lambda _: None, companions=Companions(lambda _: None, notifier=notifier)).turn()
            assert found.wait_for(1)[0].data["event"] == "Started"
        finally:
            notifier.stop()
    assert folder.status("risk").is_file()
    until(lambda: found.requests[0].data["id"] in (folder.notifications / "hook.json").read_text(), "not remembered")
