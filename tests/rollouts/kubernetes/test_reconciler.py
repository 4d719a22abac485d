"""Turns of the real reconciler, client and backend over HTTP: in which order things are written, and what a slow listener can't delay."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, rollout
from hafnium_scripted_api import Answer, Asked, says
from hafnium_small_api import SmallApi, small_api

from hafnium_rollout.companions import Companions
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.kinds import GATEWAY, GATEWAY_CLASS, HTTP_ROUTE, INFERENCE_SERVICE, MODEL_ROLLOUT, POD, Json
from hafnium_rollout.kubernetes.objects_seen import DIGEST_ANNOTATION, route_seen, status_of
from hafnium_rollout.kubernetes.observer import Observer
from hafnium_rollout.kubernetes.paired_backend import PairedBackend
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.prometheus_queries import PrometheusLooks
from hafnium_rollout.kubernetes.reconciler import FINALIZER, Reconciler, Turned
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import take
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import read_record
from hafnium_rollout.record_lines import RecordedTurn, rollout_data
from hafnium_rollout.replaying import ReplayedTurn, replay
from hafnium_rollout.state_folder import MANAGED_BY_LABEL, MANAGER, ROLLOUT_LABEL
from hafnium_rollout.status import HistoryPoint, RolloutStatus

NAMESPACE, NAME, STABLE_SERVICE, SERVICE = "ns", "risk", "risk-bbbbbbbb", "risk-aaaaaaaa"
NOWHERE = "http://127.0.0.1:1"
STEPS = [{"weight": 20, "minDwell": "1h", "deadline": "2h"}, {"weight": 100, "deadline": "2h"}]
STRATEGY = {"steps": STEPS, "maxBlindDuration": "30m"}


def meta(name: str, **more: Any) -> Json:
    return {"name": name, "namespace": NAMESPACE, **more}


@dataclass
class Cluster:
    """A rollout whose stable model is live, and an operator's reconciler over it. Time is what the test says."""

    api: SmallApi
    client: KubernetesClient
    companions: Companions | None = None
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    now: datetime = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)

    def __post_init__(self) -> None:
        self.reconciler = self.operator()
        self.api.put(GATEWAY_CLASS, {"metadata": {"name": "class"}, "spec": {"controllerName": "x"}})
        gateway = {"name": "kserve-ingress-gateway", "namespace": "kserve"}
        self.api.put(GATEWAY, {"metadata": gateway, "spec": {"gatewayClassName": "class"}})
        self.serve(STABLE_SERVICE, STABLE)
        refs = [{"name": f"{STABLE_SERVICE}-predictor", "port": 80, "weight": 100}]
        self.api.put(HTTP_ROUTE, {"metadata": meta(NAME), "spec": {"rules": [{"backendRefs": refs}]}})
        self.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY))

    def operator(self) -> Reconciler:
        """One that knows nothing but what the API server has."""
        settings = Settings(prometheus_url=NOWHERE, namespace=NAMESPACE)
        prometheus = Prometheus(NOWHERE, 1.0)
        looks = PrometheusLooks(prometheus, scrape_interval_s=15.0, clock_skew_s_max=5.0)
        observer = Observer(looks, ScoreLog(""), ServedModels(None, 15.0))  # who can't be asked would be waited for
        return Reconciler(
            self.client, PairedBackend(self.client, settings, observer), CanaryBackend(self.client, observer), settings, self.log.append,
            "test", prometheus, self.companions)

    def ask(self, spec: Any) -> None:
        old = self.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {})
        item = {**old, "apiVersion": MODEL_ROLLOUT.api_version, "kind": MODEL_ROLLOUT.name,
                "metadata": {**old.get("metadata", {}), **meta(NAME)}, "spec": rollout_data(spec)["spec"]}
        self.api.put(MODEL_ROLLOUT, item)

    def serve(self, name: str, digest: str, pods: int = 1) -> None:
        """What KServe makes of an InferenceService: ready pods, and its word."""
        old = self.api.objects.get((INFERENCE_SERVICE.plural, NAMESPACE, name), {})
        item = {"metadata": meta(name, annotations={DIGEST_ANNOTATION: digest}), "spec": {"predictor": {"minReplicas": 1}}, **old}
        item["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
        self.api.put(INFERENCE_SERVICE, item)
        labels = {"serving.kserve.io/inferenceservice": name, "component": "predictor"}
        for i in range(pods):
            ready = {"conditions": [{"type": "Ready", "status": "True"}]}
            self.api.put(POD, {"metadata": meta(f"{name}-{i}", labels=labels), "status": ready})

    def item(self) -> Json:
        return self.api.get(MODEL_ROLLOUT, NAMESPACE, NAME)

    @property
    def status(self) -> RolloutStatus:
        return status_of(self.item())

    @property
    def weight(self) -> int:
        return route_seen(self.api.get(HTTP_ROUTE, NAMESPACE, NAME)).weight

    def turn(self, item: Json | None = None) -> Turned:
        """A turn of an operator that has read the ModelRollout and then the rest; the gateway follows after it."""
        self.now += timedelta(seconds=20)
        read = item if item is not None else self.item()
        turned = self.reconciler.turn(read, take(self.client, NAMESPACE), self.now)
        self.gateway_follows()
        return turned

    def gateway_follows(self) -> None:
        """Each Gateway that the route names, and no other."""
        route = self.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        parents = route["spec"].get("parentRefs") or [{"namespace": "kserve", "name": "kserve-ingress-gateway"}]
        generation = route["metadata"]["generation"]
        done = [{"type": t, "status": "True", "observedGeneration": generation} for t in ("Accepted", "ResolvedRefs")]
        route["status"] = {"parents": [{"parentRef": p, "conditions": done} for p in parents]}
        self.api.put(HTTP_ROUTE, route)

    def climbed(self) -> None:
        """The candidate has its fifth."""
        for _ in range(12):
            self.turn()
            if (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) in self.api.objects:
                self.serve(SERVICE, CANDIDATE)
            step = self.status.step
            if step is not None and step.weight_effective_since is not None:
                return
        raise AssertionError(f"it did not climb: {self.status.message}; {self.log}")

    def at_an_intent_that_cannot_be_written(self) -> None:
        """A fifth for the candidate is in the status, and the API server takes no route. What is said about that has settled."""
        self.api.before = lambda asked: says(503, "later") if asked.method == "PATCH" and "/httproutes/" in asked.path else None
        for _ in range(12):
            self.turn()
            if (INFERENCE_SERVICE.plural, NAMESPACE, SERVICE) in self.api.objects:
                self.serve(SERVICE, CANDIDATE)
            if self.status.route is not None and self.status.route.weight == 20:
                break
        for _ in range(3):
            self.turn()

    def abort(self) -> None:
        """A person's word: the surest verdict."""
        action = {"type": "Abort", "id": "a-1", "candidateDigest": CANDIDATE, "reason": "CHG-1"}
        self.ask(rollout(routing={"backend": "PairedServices"}, strategy=STRATEGY, action=action))


@contextmanager
def cluster(companions: Companions | None = None) -> Generator[Cluster]:
    with small_api() as (api, door):
        found = Cluster(api, door.client(sleep=lambda _: None), companions)
        found.reconciler.start()
        try:
            yield found
        finally:
            api.before = lambda _: None
            found.reconciler.stop()


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
        assert found.turn().error == "Invalid"
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


# --- where the route is ---------------------------------------------------------------------------------------------------------

MOVED = {"backend": "PairedServices", "gatewayRef": {"name": "new", "namespace": "edge"}, "hostnames": ["risk.example.org"]}


def address(found: Cluster) -> tuple[list[tuple[str, str]], list[str]]:
    spec = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["spec"]
    return [(p["namespace"], p["name"]) for p in spec["parentRefs"]], spec["hostnames"]


def move(found: Cluster) -> None:
    found.api.put(GATEWAY, {"metadata": {"name": "new", "namespace": "edge"}, "spec": {"gatewayClassName": "class"}})
    found.ask(rollout(routing=MOVED, strategy=STRATEGY))


def test_a_route_moves_to_another_gateway_and_name_with_its_weights() -> None:
    with cluster() as found:
        found.climbed()
        assert found.weight == 20
        move(found)
        found.turn()
        assert address(found) == ([("edge", "new")], ["risk.example.org"])
        assert found.weight == 20
        version = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["metadata"]["resourceVersion"]
        found.gateway_follows = lambda: None  # type: ignore[method-assign] - it writes the route's status
        found.turn()
        assert found.api.get(HTTP_ROUTE, NAMESPACE, NAME)["metadata"]["resourceVersion"] >= version
        assert sum(x["event"] == "Action" and x.get("action") == "Readdress" for x in found.log) == 1


def test_names_that_somebody_else_took_from_the_route_are_given_back() -> None:
    with cluster() as found:
        found.climbed()
        before = address(found)
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["spec"]["hostnames"] = ["stolen.example.org"]
        found.api.put(HTTP_ROUTE, route)
        found.turn()
        assert address(found) == before
        assert found.weight == 20


def test_a_candidate_climbs_behind_a_gateway_that_moved_while_nothing_was_under_way() -> None:
    with cluster() as found:
        route = found.api.get(HTTP_ROUTE, NAMESPACE, NAME)
        route["metadata"]["labels"] = {MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: NAME}
        route["spec"] |= {"parentRefs": [{"namespace": "kserve", "name": "kserve-ingress-gateway"}], "hostnames": ["risk-ns.example.com"]}
        found.api.put(HTTP_ROUTE, route)
        found.gateway_follows()
        move(found)
        found.climbed()
        assert found.weight == 20
        assert address(found) == ([("edge", "new")], ["risk.example.org"])


def test_a_rollout_whose_gateway_moved_can_be_deleted() -> None:
    with cluster() as found:
        found.climbed()
        move(found)
        found.gateway_follows = lambda: None  # type: ignore[method-assign]
        item = found.item()
        item["metadata"]["deletionTimestamp"] = "2026-03-01T12:30:00Z"
        found.api.put(MODEL_ROLLOUT, item)
        found.turn()
        Cluster.gateway_follows(found)
        for _ in range(8):
            if not (found.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {}).get("metadata", {}).get("finalizers")):
                break
            found.turn()
            Cluster.gateway_follows(found)
        assert not found.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {}).get("metadata", {}).get("finalizers")
        assert found.weight == 0
        assert address(found)[0] == [("edge", "new")]


def test_a_deleted_rollout_that_nobody_understands_holds_on_while_a_canary_has_its_percent() -> None:
    """The operator was started anew, so it knows no last good spec; no HTTPRoute tells of a canary by KServe."""
    with cluster() as found:
        item = found.item()
        item["metadata"] |= {"finalizers": [FINALIZER], "deletionTimestamp": "2026-03-01T12:30:00Z"}
        item["spec"] = {"routing": {"backend": "CanaryTrafficPercent"}, "ofALaterRelease": True}
        found.api.put(MODEL_ROLLOUT, item)
        found.api.put(INFERENCE_SERVICE, {"metadata": meta(NAME), "spec": {"predictor": {"canaryTrafficPercent": 20}}})
        found.turn()
        assert found.item()["metadata"]["finalizers"] == [FINALIZER]
        assert any("canaryTrafficPercent" in x["message"] for x in found.log)
        found.api.put(INFERENCE_SERVICE, {"metadata": meta(NAME), "spec": {"predictor": {}}})
        found.turn()
        assert not found.api.objects.get((MODEL_ROLLOUT.plural, NAMESPACE, NAME), {}).get("metadata", {}).get("finalizers")
