"""Turns of the real reconciler, client and backend over HTTP: in which order things are written, and what a slow listener can't delay."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_reconciled import NAME, NAMESPACE, SERVICE, STABLE_SERVICE, STRATEGY, Cluster, cluster
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, rollout
from hafnium_scripted_api import Answer, Asked, says, scripted_api

from hafnium_rollout.companions import Companions
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.kubernetes.kinds import HTTP_ROUTE, INFERENCE_SERVICE, Json
from hafnium_rollout.kubernetes.objects_seen import meta_of
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.reconciler import Turned
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import read_record
from hafnium_rollout.record_lines import RecordedTurn
from hafnium_rollout.replaying import ReplayedTurn, replay
from hafnium_rollout.status import HistoryPoint, RolloutStatus


def test_a_rollback_is_in_the_route_while_nobody_takes_its_events() -> None:
    """The API server answers no write of an event at all. The verdict, the route and the turn's end don't wait for that."""
    taken = threading.Event()

    def before(asked: Asked) -> Answer | None:
        if asked.path.startswith(f"/api/v1/namespaces/{NAMESPACE}/events"):
            taken.wait(60)
        return None

    with cluster() as found:
        found.climbed()
        assert found.weight == 20
        found.api.before = before
        found.abort()
        found.api.writes.clear()
        found.turn()
        assert found.weight == 0
        assert found.status.rollback is not None
        assert found.api.writes[:2] == ["PATCH modelrollouts/status", "PATCH httproutes"], "intent, then the route"
        assert "POST events" not in found.api.writes
        taken.set()
        found.reconciler.stop()
        assert "POST events" in found.api.writes, "and they are told after all"


@pytest.mark.parametrize("status", [500, 403])
def test_events_that_are_refused_are_said_once_and_stop_nothing(status: int) -> None:
    with cluster() as found:
        found.climbed()
        found.api.before = lambda asked: says(status, "no") if "/events" in asked.path else None
        found.abort()
        found.turn()
        assert found.weight == 0
        found.reconciler.stop()
        assert [x["event"] for x in found.log].count("EventNotWritten") == 1


def test_a_record_on_a_full_disk_delays_no_rollback_and_says_so(tmp_path: Path) -> None:
    """The folder of the record is a file: no line can be written."""
    log: list[dict[str, Any]] = []
    with cluster(Companions(log.append, lambda _: tmp_path / "record")) as found:
        found.climbed()
        for file in (tmp_path / "record").iterdir():
            file.unlink()
        (tmp_path / "record").rmdir()
        (tmp_path / "record").write_text("in the way")
        found.abort()
        found.turn()
        assert found.weight == 0
        assert [x["event"] for x in log] == ["RecordFailed"]


def test_a_rollback_is_in_the_route_while_the_records_volume_hangs(tmp_path: Path) -> None:
    """The volume takes nothing. The verdict, the route and all further turns don't wait for that, and in the end all is recorded."""
    answers = threading.Event()

    def fence() -> None:
        if threading.current_thread().name == "record":
            answers.wait(60)

    companions = Companions(lambda _: None, lambda s: tmp_path / s.name, fence=fence)
    companions.start()
    with cluster(companions) as found:
        found.climbed()
        found.abort()
        found.turn()
        assert found.weight == 0
        assert not (tmp_path / NAME).exists()
        answers.set()
        companions.stop()
        turns = [t for t in replay(read_record(tmp_path / NAME)) if isinstance(t, ReplayedTurn)]
        assert turns[-1].now == found.now
        assert turns[-1].recorded.status.rollback is not None
        assert all(t.equal for t in turns)


def test_what_an_action_that_failed_rests_on_is_recorded_all_the_same(tmp_path: Path) -> None:
    with cluster(Companions(lambda _: None, lambda s: tmp_path / s.name)) as found:
        found.climbed()
        found.api.before = lambda asked: says(422, "no") if asked.method == "PATCH" and "/httproutes/" in asked.path else None
        found.abort()
        read = found.status
        failed = found.turn()
        assert failed.error == "Invalid"
        assert failed.status == read, "what is under way is known of a turn that fails, also to an operator that has just begun"
        assert found.weight == 20
        last = [e for e in read_record(tmp_path / NAME) if isinstance(e, RecordedTurn)][-1]
        assert last.now == found.now
        found.api.before = lambda _: None
        found.turn()
        assert found.weight == 0


def test_the_story_is_told_in_its_order_though_it_is_told_after_the_deed() -> None:
    with cluster() as found:
        found.climbed()
        found.abort()
        found.log.clear()
        found.turn()
        assert [x["event"] for x in found.log] == ["Rollback", "Action"]


def test_an_action_decided_on_an_older_object_is_a_conflict_though_no_status_changed() -> None:
    """The route write failed before, so this turn only repeats it. Meanwhile a person aborts: the old turn must not raise the weight."""
    with cluster() as found:
        found.at_an_intent_that_cannot_be_written()
        assert found.weight == 0
        old = found.item()
        found.api.before = lambda _: None
        found.abort()
        found.api.writes.clear()
        found.turn(old)
        assert found.api.writes == [], "neither status nor route"
        assert found.weight == 0
        assert [x["event"] for x in found.log][-1] == "Conflict"
        found.turn()
        assert found.status.rollback is not None or found.status.phase == "RolledBack"


def test_a_weight_that_is_taken_to_zero_by_hand_while_a_higher_one_can_not_be_written_stays_at_zero() -> None:
    """The API server refuses the route, the operator dies there, and a person takes the candidate out as the runbook says."""
    with cluster() as found:
        found.climbed()
        found.api.before = lambda asked: says(503, "later") if asked.method == "PATCH" and "/httproutes/" in asked.path else None
        skip = {"type": "SkipStep", "id": "s-1", "candidateDigest": CANDIDATE}
        found.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY, action=skip))
        found.turn()
        assert found.status.route is not None
        assert (found.status.route.weight, found.weight) == (100, 20)
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["spec"]["rules"][0]["backendRefs"][1]["weight"] = 0
        found.api.put(HTTP_ROUTE, route)
        found.api.before = lambda _: None
        found.reconciler = found.operator()
        for _ in range(3):
            found.turn()
            assert found.weight == 0
        assert found.status.rollback is not None
        assert found.status.rollback.reason == "AbortedOutside"


@pytest.mark.parametrize(("stable", "entry"), [(100, True), (0, True), (0, False)], ids=[
    "both weights", "the candidate's alone, so that nobody has any", "its whole entry"])
def test_a_candidate_that_has_all_requests_and_is_taken_out_by_hand_while_the_operator_is_down_is_aborted(
    stable: int, entry: bool,
) -> None:
    with cluster() as found:
        found.climbed()
        found.serve(SERVICE, CANDIDATE, pods=2)
        skip = {"type": "SkipStep", "id": "s-1", "candidateDigest": CANDIDATE}
        found.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY, action=skip))
        for _ in range(3):
            found.turn()
        assert (found.status.phase, found.weight, found.status.route_confirmed) == ("Progressing", 100, True)
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        for ref, weight in zip(route["spec"]["rules"][0]["backendRefs"], (stable, 0), strict=True):
            ref["weight"] = weight
        if not entry:
            del route["spec"]["rules"][0]["backendRefs"][1]
        found.api.put(HTTP_ROUTE, route)
        found.reconciler = found.operator()
        found.turn()
        refs = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"]["rules"][0]["backendRefs"]
        assert {r["name"]: r["weight"] for r in refs if r["weight"]} == {f"{STABLE_SERVICE}-predictor": 100}
        for _ in range(2):
            found.turn()
            assert found.weight == 0
        assert found.status.rollback is not None
        assert (found.status.rollback.reason, found.status.rollback.reject) == ("AbortedOutside", True)
        assert "took the candidate's weight from 100 to 0" in found.status.rollback.message
        assert ("nobody had any weight" in found.status.rollback.message) == (stable == 0)


def test_a_repeated_action_stores_no_status_again() -> None:
    with cluster() as found:
        found.at_an_intent_that_cannot_be_written()
        found.api.writes.clear()
        found.turn()
        assert found.api.writes == [], "it was asked whether the decision still stands, and the route was refused again"
        found.api.before = lambda _: None
        found.turn()
        assert found.api.writes[0] == "PATCH httproutes", "one write: an API server that takes only every second one is enough"
        assert found.weight == 20


def test_a_leader_that_lost_the_lease_in_a_turn_leaves_the_shared_files_to_the_next(tmp_path: Path) -> None:
    """The lease goes between the status and the record. The new leader writes there, on the same volume."""
    lost = threading.Event()

    def fence() -> None:
        if lost.is_set():
            raise NotLeading("another process leads")

    with cluster(Companions(lambda _: None, lambda s: tmp_path / s.name, fence=fence)) as found:
        found.climbed()
        count = len(list(read_record(tmp_path / NAME)))
        found.abort()
        lost.set()
        with pytest.raises(NotLeading):
            found.turn()
        assert len(list(read_record(tmp_path / NAME))) == count
        assert found.weight == 0


def test_a_volume_that_hangs_under_retraining_holds_up_no_turn_and_the_newest_is_done_when_it_is_back() -> None:
    answers, asked, done = threading.Event(), threading.Event(), threading.Event()
    seen: list[datetime] = []

    class Hanging:
        def turn(self, _rollout: Any, status: RolloutStatus, _evidence: Any, now: datetime) -> tuple[Any, ...]:
            asked.set()
            answers.wait(60)
            seen.append(now)
            if status.rollback is not None:
                done.set()
            return ()

    companions = Companions(lambda _: None, retraining=Hanging())  # type: ignore[arg-type] - its one method that is called
    companions.start()
    with cluster(companions) as found:
        found.climbed()
        assert asked.wait(60)
        found.abort()
        found.turn()
        assert found.weight == 0
        assert seen == []
        answers.set()
        assert done.wait(60)
        assert seen[-1] == found.now
        assert len(seen) <= 2, "what was under way, and the newest"
        companions.stop()


@pytest.mark.parametrize("again", [False, True], ids=["after it", "before the attempt is read"])
def test_what_is_learned_of_retraining_after_a_rollout_was_deleted_is_not_told_of_the_next_of_its_name(again: bool) -> None:
    begun, late, held, others = threading.Event(), threading.Event(), threading.Event(), threading.Event()
    old = HistoryPoint(time=datetime(2026, 3, 1, tzinfo=UTC), event="RetrainingStarted", weight=0)
    offered: list[RolloutStatus] = []

    class Slow:
        turns = 0

        def turn(self, *_: Any) -> tuple[HistoryPoint, ...]:
            self.turns += 1
            if self.turns == 1:
                begun.set()
                late.wait(60)
                return (old,)
            others.set()  # the first is over by now: one thread does them all
            held.wait(60)
            return ()

    class Receivers:
        def start(self) -> None: ...
        def stop(self) -> None: ...
        def gone(self, _subject: Subject) -> None: ...

        def offer(self, _subject: Subject, status: RolloutStatus) -> None:
            offered.append(status)

    companions = Companions(lambda _: None, notifier=Receivers(), retraining=Slow())  # type: ignore[arg-type] - the methods that are called
    companions.start()
    spec, now = rollout(), datetime(2026, 3, 1, tzinfo=UTC)
    other = spec.model_copy(update={"metadata": spec.metadata.model_copy(update={"name": "other"})})
    try:
        companions.turned(spec, RolloutStatus(), Observation(), now)
        assert begun.wait(60)
        companions.gone(Subject(spec.metadata.namespace, spec.name))
        companions.turned(spec if again else other, RolloutStatus(), Observation(), now)
        late.set()
        assert others.wait(60)
        companions.turned(spec, RolloutStatus(), Observation(), now)
        assert offered[-1].history == ()
    finally:
        late.set()
        held.set()
        companions.stop()


def test_companions_let_only_the_loss_of_the_lease_through() -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def turn(self, *_: Any) -> tuple[Any, ...]:
            raise self.error

    def turned(error: Exception) -> list[dict[str, Any]]:
        log: list[dict[str, Any]] = []
        with cluster() as found:
            companions = Companions(log.append, retraining=Broken(error))  # type: ignore[arg-type] - its one method that is called
            found.climbed()
            companions.turned(rollout(), found.status, Observation(), found.now)
            companions.gone(Subject(NAMESPACE, NAME))
        return log

    assert [x["event"] for x in turned(OSError("disk full"))] == ["RetrainingFailed"]
    with pytest.raises(NotLeading):
        turned(NotLeading("lost"))


# --- pods of a climb ------------------------------------------------------------------------------------------------------------


class Release:
    """A promotion at peak load: stable has eight pods, and the template asks for two at least."""

    def __init__(self, found: Cluster) -> None:
        self.found = found
        found.serve(STABLE_SERVICE, STABLE, pods=8)
        self.ask()

    def ask(self, **more: Any) -> None:
        template = {"predictor": {"minReplicas": 2, "maxReplicas": 10, "model": {"modelFormat": {"name": "onnx"}}}}
        self.found.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY, service=template, **more))

    @property
    def service(self) -> Json:
        return self.found.api.get(INFERENCE_SERVICE, NAMESPACE, SERVICE)

    @property
    def least(self) -> int:
        return self.service["spec"]["predictor"]["minReplicas"]

    def turn(self) -> Turned:
        """KServe follows after it."""
        turned = self.found.turn()
        if (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) in self.found.api.objects:
            self.found.serve(SERVICE, CANDIDATE, pods=self.least)
        return turned

    def promoted(self) -> None:
        """A person's word, since nobody counts requests here."""
        promote = {"type": "Promote", "id": "p-1", "candidateDigest": CANDIDATE, "reason": "CHG-1"}
        while self.found.status.step is None:
            self.turn()
        self.ask(action=promote)
        for _ in range(20):
            if self.found.status.phase == "Promoted":
                return
            self.turn()
        raise AssertionError(f"{self.found.status.message}; {self.found.log}")

    def written_by_hand(self, least: int) -> None:
        item = self.service
        item["spec"]["predictor"]["minReplicas"] = least
        owned = {"f:spec": {"f:predictor": {"f:minReplicas": {}}}}
        item["metadata"]["managedFields"] = [{"manager": "kubectl-edit", "operation": "Update", "fieldsV1": owned}]
        self.found.api.put(INFERENCE_SERVICE, item)


def test_pods_that_a_climb_needed_are_the_autoscalers_again_after_promotion_and_once() -> None:
    with cluster() as found:
        release = Release(found)
        release.promoted()
        assert release.least == 8, "it carries all requests by then"
        found.api.writes.clear()
        release.turn()
        assert release.least == 2
        assert found.api.writes.count("PATCH inferenceservices") == 1
        release.turn()
        assert "templatePods" not in found.status.cursor
        item = release.service
        item["spec"]["predictor"]["minReplicas"] = 5
        found.api.put(INFERENCE_SERVICE, item)
        found.api.writes.clear()
        for _ in range(3):
            release.turn()
        assert (release.least, found.api.writes) == (5, []), "it is over: the rest is its owner's"


def test_an_operator_that_was_killed_before_the_write_is_followed_by_one_that_makes_it() -> None:
    with cluster() as found:
        release = Release(found)
        release.promoted()
        found.api.before = lambda asked: says(500, "later") if asked.method == "PATCH" and "/inferenceservices/" in asked.path else None
        for _ in range(3):
            release.turn()
        assert release.least == 8
        found.api.before = lambda _: None
        found.reconciler.stop()
        found.reconciler = found.operator()
        found.reconciler.start()
        release.turn()
        assert release.least == 2


def test_a_service_that_was_written_since_it_was_seen_is_looked_at_anew() -> None:
    """Between the look and the write somebody sets ten by hand. They know why."""
    with cluster() as found:
        release = Release(found)
        release.promoted()

        def before(asked: Asked) -> Answer | None:
            if asked.method == "PATCH" and "/inferenceservices/" in asked.path:
                found.api.before = lambda _: None
                release.written_by_hand(10)
            return None

        found.api.before = before
        release.turn()
        assert [x["event"] for x in found.log][-1] == "Conflict"
        for _ in range(3):
            release.turn()
        assert release.least == 10


def test_a_persons_own_number_from_during_the_climb_stays() -> None:
    with cluster() as found:
        release = Release(found)
        while found.status.step is None:
            release.turn()
        release.written_by_hand(9)
        release.promoted()
        for _ in range(3):
            release.turn()
        assert release.least == 9
        assert "templatePods" not in found.status.cursor


def test_another_models_template_says_nothing_about_the_promoted_one() -> None:
    """The next model is asked for before the promotion is over, with a template that asks for one pod."""
    with cluster() as found:
        release = Release(found)
        strategy = {**STRATEGY, "onNewCandidate": "Queue"}
        release.promoted()
        template = {"predictor": {"minReplicas": 1, "model": {"modelFormat": {"name": "onnx"}}}}
        found.ask(rollout(routing={"backend": "PairedServices"}, strategy=strategy, service=template, model={"digest": OTHER}))
        release.turn()
        assert release.least == 2


def test_a_rollback_writes_nothing_to_stables_service() -> None:
    with cluster() as found:
        release = Release(found)
        while found.weight != 20:
            release.turn()
        before = found.api.get(INFERENCE_SERVICE, NAMESPACE, STABLE_SERVICE)["spec"]
        release.ask(action={"type": "Abort", "id": "a-1", "candidateDigest": CANDIDATE, "reason": "CHG-1"})
        for _ in range(4):
            release.turn()
        assert found.weight == 0
        assert found.api.get(INFERENCE_SERVICE, NAMESPACE, STABLE_SERVICE)["spec"] == before


def test_checked_queries_are_remembered_for_the_newest_generation_alone() -> None:
    spec = rollout(gates=[{"name": "own", "role": "Safety", "prometheus": {"bad": 'b{s="$service"}', "total": 't{s="$service"}'}}])
    asked: list[Asked] = []

    def parse(one: Asked) -> Answer:
        asked.append(one)
        return Answer(200, b'{"status":"success","data":{}}')

    with cluster() as found, scripted_api(parse) as api:
        operator = found.operator()
        operator._prometheus = Prometheus(api.url)
        meta = meta_of(found.item())
        for generation in range(1, 20):
            for _ in range(2):
                assert operator._query_problems(spec, replace(meta, generation=generation), found.now) == ()
        assert len(asked) == 2 * 19, "each is checked once"
        assert len(operator._queries) == 1


def test_nothing_is_remembered_of_a_retraining_that_failed_for_a_rollout_that_is_gone() -> None:
    class Broken:
        def turn(self, *_: Any) -> tuple[Any, ...]:
            raise OSError("no volume")

    companions = Companions(lambda _: None, retraining=Broken())  # type: ignore[arg-type] - its one method that is called
    spec = rollout()
    companions.turned(spec, RolloutStatus(), Observation(), datetime(2026, 3, 1, tzinfo=UTC))
    assert companions._said
    companions.gone(Subject(spec.metadata.namespace, spec.name))
    assert not companions._said


# --- taking over a route that is live -----------------------------------------------------------------------------------------


def _live(change: Json) -> Json:
    """The route of the live service, made by a person."""
    refs = [{"name": f"{STABLE_SERVICE}-predictor", "port": 80, "weight": 100}]
    return {"metadata": {"name": NAME, "namespace": NAMESPACE}, "spec": {"rules": [{"backendRefs": refs, **change}]}}


OLD_FIRST = [{"name": "risk-old-predictor", "port": 80, "weight": 1}, {"name": f"{STABLE_SERVICE}-predictor", "port": 80, "weight": 99}]


@pytest.mark.parametrize("change", [
    {"matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}]},
    {"filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "b"}]}}]},
    {"backendRefs": OLD_FIRST},
], ids=["a path", "a header filter", "two services"])
def test_a_live_route_that_does_not_say_who_is_stable_is_left_alone_until_it_does(change: Json) -> None:
    with cluster() as at:
        at.api.put(HTTP_ROUTE, _live(change))
        before = at.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"]
        for _ in range(8):
            at.turn()
        assert at.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"] == before
        assert (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) not in at.api.objects
        assert (at.status.phase, at.status.reason, at.status.stable) == ("Pending", "RouteNotOurForm", None)
        at.api.put(HTTP_ROUTE, _live({}))
        at.climbed()
        refs = at.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"]["rules"][0]["backendRefs"]
        assert [(r["name"], r["weight"]) for r in refs] == [(f"{STABLE_SERVICE}-predictor", 80), (f"{SERVICE}-predictor", 20)]


def test_a_route_of_another_form_that_comes_under_way_is_put_back_and_tells_nobody_who_is_stable() -> None:
    with cluster() as at:
        at.climbed()
        route = at.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["spec"]["rules"][0]["matches"] = [{"path": {"type": "PathPrefix", "value": "/v1"}}]
        at.api.put(HTTP_ROUTE, route)
        for _ in range(2):
            at.turn()
        assert at.weight == 20
        assert at.status.stable is not None
        assert at.status.stable.service == STABLE_SERVICE
def test_a_clock_that_is_set_back_stops_no_looks() -> None:
    with cluster() as found:
        found.climbed()
        meta, status = meta_of(found.item()), found.status
        late = found.now + timedelta(hours=1)
        assert found.reconciler._look_due(meta, status, late)
        assert not found.reconciler._look_due(meta, status, late + timedelta(seconds=1)), "a wake-up is no look"
        assert found.reconciler._look_due(meta, status, found.now), "the clock was corrected"
        assert not found.reconciler._look_due(meta, status, found.now + timedelta(seconds=1))
