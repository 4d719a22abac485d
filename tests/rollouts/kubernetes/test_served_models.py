"""Is the candidate the model that it is called? By its spec, and by what its pods say in Prometheus."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, SERVICE, STABLE, START, World, rollout
from hafnium_scripted_api import Answer, Asked, data, says, scripted_api

from hafnium_rollout.kubernetes import conditions
from hafnium_rollout.kubernetes.objects_seen import PodSeen
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.served_models import Said, ServedModels, held_against, wrong_model
from hafnium_rollout.notifications.notices import Subject, alerts
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import Observation, ServiceSeen
from hafnium_rollout.status import ModelSeen, RolloutStatus

PODS = tuple(PodSeen(f"{SERVICE}-{i}", SERVICE, "predictor", ready=True, restarts=0) for i in range(2))
MODEL = ModelSeen(service=SERVICE, storage_uri="s3://bundles/2", digest=CANDIDATE)
SEEN = ServiceSeen(SERVICE, CANDIDATE, True, storage_uri="s3://bundles/2")
SCRAPE_S = 15.0


def info(pod: str, digest: str) -> dict[str, Any]:
    return {"metric": {"__name__": "model_info", "pod": pod, "model_digest": digest}, "value": [1.0, "1"]}


def counted(pod: str, **labels: str) -> dict[str, Any]:
    return {"metric": {"__name__": "inference_requests_total", "pod": pod, **labels}, "value": [1.0, "7"]}


@contextmanager
def prometheus(answers: Callable[[], Answer | list[dict[str, Any]]]) -> Generator[tuple[ServedModels, list[str]]]:
    asked: list[str] = []

    def answer(call: Asked) -> Answer:
        asked.append(parse_qs(call.body.decode())["query"][0])
        found = answers()
        return found if isinstance(found, Answer) else data({"status": "success", "data": {"resultType": "vector", "result": found}})

    with scripted_api(answer) as api:
        yield ServedModels(Prometheus(api.url), SCRAPE_S), asked


def test_pods_that_say_the_candidates_digest_are_believed() -> None:
    with prometheus(lambda: [info(p.name, CANDIDATE) for p in PODS]) as (models, asked):
        said = models.said("ns", SERVICE, PODS, 0.0)
        assert said == Said(frozenset({CANDIDATE}))
        assert models.said("ns", SERVICE, PODS, SCRAPE_S - 1) == said
        assert len(asked) == 1, "once in a scrape interval"
        assert 'namespace="ns"' in asked[0]
    assert wrong_model(MODEL, SEEN, said) == ""
    assert held_against({SERVICE: SEEN}, MODEL, said, before_traffic=True)[SERVICE] == replace(SEEN, serves=CANDIDATE)


def test_one_pod_that_says_another_is_enough() -> None:
    with prometheus(lambda: [info(PODS[0].name, CANDIDATE), info(PODS[1].name, OTHER)]) as (models, _):
        said = models.said("ns", SERVICE, PODS, 0.0)
    assert "its pods say that they serve sha256:cccccccccccc" in wrong_model(MODEL, SEEN, said)


def test_another_place_in_the_spec_is_another_model_whatever_our_annotation_says() -> None:
    moved = replace(SEEN, storage_uri="s3://bundles/1")
    assert wrong_model(MODEL, moved, Said()) == "its storageUri is s3://bundles/1, expected s3://bundles/2"
    own_server = replace(SEEN, storage_uri="")
    assert wrong_model(MODEL, own_server, Said()) == "", "a container of one's own has no storageUri: nothing is known by it"


def test_new_pods_are_given_a_few_scrapes_to_say_it_before_they_get_a_request() -> None:
    found: list[dict[str, Any]] = []
    with prometheus(lambda: list(found)) as (models, _):
        said = models.said("ns", SERVICE, PODS, 0.0)
        assert said.awaited
        held = held_against({SERVICE: SEEN}, MODEL, said, before_traffic=True)[SERVICE]
        assert not held.ready
        assert "weren't scraped yet" in held.message
        assert held_against({SERVICE: SEEN}, MODEL, said, before_traffic=False)[SERVICE].ready, "under way it is no outage"
        found += [counted(PODS[0].name)]
        assert models.said("ns", SERVICE, PODS, 10.0).awaited, "the other one was not scraped"
        found += [counted(PODS[1].name)]
        assert not models.said("ns", SERVICE, PODS, 20.0).awaited, "they are scraped and say nothing: they never will"


@pytest.mark.parametrize("labels", [
    {"component": "transformer"}, {"component": "predictor", "exported_component": "transformer"}], ids=["its own", "beside the pod's"])
def test_a_transformer_in_the_same_pod_that_is_scraped_first_says_nothing_for_the_model(labels: dict[str, str]) -> None:
    found = [counted(p.name, **labels) for p in PODS]
    with prometheus(lambda: list(found)) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).awaited, "the predictor's own endpoint is scraped a little later"
        found += [info(p.name, OTHER) for p in PODS]
        assert models.said("ns", SERVICE, PODS, 10.0).digests == {OTHER}


def test_pods_that_nobody_scrapes_are_not_waited_for_for_ever() -> None:
    with prometheus(list) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).awaited
        assert models.said("ns", SERVICE, PODS, 3 * SCRAPE_S - 1).awaited
        assert not models.said("ns", SERVICE, PODS, 3 * SCRAPE_S).awaited


def test_what_was_wrong_does_not_become_unknown_when_prometheus_goes() -> None:
    answers: list[Any] = [[info(p.name, OTHER) for p in PODS], says(503, "down")]
    with prometheus(lambda: answers.pop(0) if len(answers) > 1 else answers[0]) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).digests == {OTHER}
        later = models.said("ns", SERVICE, PODS, 2 * SCRAPE_S)
        assert later.digests == {OTHER}
        assert "can't be asked which model" in later.problem
        assert models.said("ns", SERVICE, PODS[:1], 3 * SCRAPE_S).digests == frozenset(), "other pods are other pods"


def test_what_was_wrong_does_not_become_unknown_when_prometheus_forgets() -> None:
    """It was restarted without its data: it answers, and knows nobody."""
    answers: list[Any] = [[info(p.name, OTHER) for p in PODS], []]
    with prometheus(lambda: answers.pop(0) if len(answers) > 1 else answers[0]) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).digests == {OTHER}
        assert models.said("ns", SERVICE, PODS, 10 * SCRAPE_S).digests == {OTHER}


@pytest.mark.parametrize("every_s", [2 * SCRAPE_S, 4 * SCRAPE_S])
def test_an_autoscaler_does_not_hold_a_model_server_of_somebody_elses_for_ever(every_s: float) -> None:
    """It exports nothing that is known here, so it is never seen scraped: only its time tells that it won't say it."""
    three = (*PODS, replace(PODS[0], name=f"{SERVICE}-2"))
    with prometheus(list) as (models, _):
        for look in range(240):
            at = look * SCRAPE_S / 3
            pods = three[:2] if int(at / every_s) % 2 else three[1:]
            said = models.said("ns", SERVICE, pods, at)
            assert bool(said.unasked) == (at < 3 * SCRAPE_S), at


def test_a_pod_that_comes_while_prometheus_is_down_makes_no_silent_server_unknown() -> None:
    answers: list[Any] = [[counted(p.name) for p in PODS]]
    with prometheus(lambda: answers[0]) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).silent
        answers[0] = says(503, "down")
        assert models.said("ns", SERVICE, PODS[:1], SCRAPE_S).unasked == ""
        assert models.said("ns", SERVICE, PODS, 2 * SCRAPE_S).unasked == ""
        others = [replace(p, name=f"other-{i}") for i, p in enumerate(PODS)]
        assert "can't be asked" in models.said("ns", SERVICE, others, 3 * SCRAPE_S).unasked, "none of those that were asked is left"


def test_pods_of_a_service_that_said_it_are_given_their_time_again_when_they_change() -> None:
    answers: list[Any] = [[info(p.name, CANDIDATE) for p in PODS]]
    with prometheus(lambda: answers[0]) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).digests
        answers[0] = []
        at = 10 * SCRAPE_S
        assert "weren't scraped yet" in models.said("ns", SERVICE, PODS[:1], at).unasked
        assert "weren't scraped yet" in models.said("ns", SERVICE, PODS, at + 3 * SCRAPE_S - 1).unasked
        assert models.said("ns", SERVICE, PODS, at + 3 * SCRAPE_S).unasked == "", "a Prometheus that forgot holds nobody for longer"


def test_a_wrong_model_that_a_new_pod_of_a_silent_server_says_is_seen() -> None:
    answers: list[Any] = [[counted(p.name) for p in PODS]]
    with prometheus(lambda: answers[0]) as (models, _):
        assert models.said("ns", SERVICE, PODS, 0.0).silent
        answers[0] = [counted(PODS[0].name), info("new", OTHER)]
        said = models.said("ns", SERVICE, [PODS[0], replace(PODS[1], name="new")], 0.5)
        assert said.digests == {OTHER}, "asked at once: silence is remembered, and still no answer"


def test_who_cannot_be_asked_is_told_from_who_says_nothing() -> None:
    down, silent = says(503, "down"), [counted(p.name) for p in PODS]
    answers: list[Any] = [down]
    with prometheus(lambda: answers[0]) as (models, _):
        for at in (0.0, 100 * SCRAPE_S):
            said = models.said("ns", SERVICE, PODS, at)
            found = held_against({SERVICE: SEEN}, MODEL, said, before_traffic=False)[SERVICE]
            assert "it can't be asked which model" in found.unasked, "however long it lasts"
            assert found.ready, "under way it is no outage"
        answers[0] = silent
        said = models.said("ns", SERVICE, PODS, 101 * SCRAPE_S)
        assert held_against({SERVICE: SEEN}, MODEL, said, before_traffic=False)[SERVICE].unasked == "", "a server of somebody else's"
        answers[0] = down
        assert models.said("ns", SERVICE, PODS, 101.5 * SCRAPE_S).unasked == "", "it would not say it either if Prometheus were there"
        answers[0] = [info(p.name, CANDIDATE) for p in PODS]
        assert models.said("ns", SERVICE, PODS, 102 * SCRAPE_S).unasked == ""


def test_without_prometheus_or_ready_pods_nothing_is_known_and_nothing_is_asked() -> None:
    assert ServedModels(None, SCRAPE_S).said("ns", SERVICE, PODS, 0.0) == Said()
    with prometheus(list) as (models, asked):
        assert models.said("ns", SERVICE, [replace(p, ready=False) for p in PODS], 0.0) == Said()
        assert asked == []


# --- what is decided by it ----------------------------------------------------------------------------------------------------


class Deceived(World):
    """The candidate's own annotation is right, and something else says that it isn't the model."""

    wrong = ""
    unasked = ""

    def observe(self, seconds: float) -> Observation:
        seen = super().observe(seconds)
        services = dict(seen.services or {})
        for name in self.managed:
            services[name] = replace(services[name], wrong_model=self.wrong, unasked=self.unasked)
        return replace(seen, services=services)


def test_a_wrong_model_gets_no_request_and_not_even_a_copy() -> None:
    world = Deceived(rollout(strategy={"readyDeadline": "5m"}))
    world.wrong = "its storageUri is s3://bundles/1, expected s3://bundles/2"
    for _ in range(100):
        world.turn()
        assert world.route is not None
        assert world.route.candidate is None
    assert world.status.phase == "Pending"
    assert "its storageUri is s3://bundles/1" in world.status.message
    assert world.until("RolledBack") == "RolledBack", "at readyDeadline"
    assert world.status.rejected_digests == (CANDIDATE,)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_model_that_turns_out_wrong_at_any_step_goes_back_and_is_never_promoted(step: int) -> None:
    world = Deceived()
    world.until_step(step)
    world.wrong = "its pods say that they serve sha256:cccc, expected sha256:aaaa"
    weight = world.weight
    while world.status.phase != "RolledBack":
        world.turn()
        assert world.weight <= weight
        assert world.status.phase != "Promoted"
    assert world.status.reason == "WrongModel"
    assert world.weight == 0


def test_the_first_model_must_be_the_right_one_too() -> None:
    world = Deceived(route=None)
    world.wrong = "its storageUri is s3://bundles/1, expected s3://bundles/2"
    for _ in range(50):
        world.turn()
    assert world.status.phase == "Pending"
    assert world.route is None


def test_a_persons_promote_does_not_promote_another_model() -> None:
    world = Deceived()
    world.until_step(3)
    world.wrong = "its pods say otherwise"
    assert world.until("RolledBack", "Promoted") == "RolledBack"


# --- another leader, who has not seen what this one saw -------------------------------------------------------------------------


def test_a_candidate_that_nobody_could_ask_gets_no_request_is_not_rejected_for_it_and_begins_when_it_was_asked() -> None:
    world = Deceived(rollout(strategy={"readyDeadline": "1m"}))
    world.unasked = "Prometheus is down"
    for _ in range(100):
        world.turn()
        assert world.route is not None
        assert world.route.candidate is None
    assert (world.status.phase, world.status.reason) == ("Pending", "ModelUnknown")
    assert "Prometheus is down" in world.status.message
    world.unasked = ""
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_someone_is_called_once_in_a_run_when_nobody_could_ask_the_candidate_by_its_ready_deadline() -> None:
    """Its Prometheus may be a mistyped address: no rule of Prometheus tells of that."""
    subject = Subject("ns", "risk")
    world = Deceived(rollout(strategy={"readyDeadline": "1m"}))
    world.unasked = "Prometheus is down"
    for _ in range(25):
        world.turn()
    assert world.status.reason == "ModelUnknown"
    assert "ModelUnknown" not in world.events, "it is asked for as long as a candidate may take to get ready"
    assert alerts(subject, world.status, world.now) == []
    for _ in range(100):
        world.turn()
    assert world.events.count("ModelUnknown") == 1
    (point,) = (p for p in world.status.history if p.event == "ModelUnknown")
    assert point.alert
    assert "Prometheus is down" in point.message
    assert [a.name for a in alerts(subject, world.status, world.now)] == ["HafniumRolloutModelUnknown"]
    world.unasked = ""
    world.until_step(0)
    assert alerts(subject, world.status, world.now) == [], "over with its cause"


def test_a_run_after_one_in_which_someone_was_called_calls_again() -> None:
    world = Deceived(rollout(strategy={"readyDeadline": "1m"}))
    world.unasked = "Prometheus is down"
    for _ in range(60):
        world.turn()
    world.spec = rollout(strategy={"readyDeadline": "1m"}, model={"version": "3", "digest": OTHER})
    for _ in range(100):
        world.turn()
    assert world.status.candidate is not None
    assert (world.status.candidate.digest, world.events.count("ModelUnknown")) == (OTHER, 2)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("forced", [False, True], ids=["on evidence", "by a person's promote"])
def test_no_weight_is_gained_and_nothing_promoted_while_nobody_could_ask(step: int, forced: bool) -> None:
    world = Deceived()
    world.until_step(step)
    world.unasked = "Prometheus is down"
    weight = world.weight
    if forced:
        world.actions = (UserAction(type="Promote", id="p", candidate_digest=CANDIDATE),)
    for _ in range(100):
        world.turn()
        assert world.weight <= weight
        assert world.status.phase == "Progressing"
    assert "no weight until its pods can be asked" in " ".join((world.status.message, *world.messages))
    world.unasked = ""
    world.actions = ()
    assert world.until("Promoted", "RolledBack") == "Promoted"


def test_a_candidate_that_goes_back_does_not_wait_for_who_cannot_be_asked() -> None:
    world = Deceived()
    world.until_step(2)
    world.unasked, world.bad_candidate = "Prometheus is down", 0.5
    assert world.until("RolledBack", turns=30) == "RolledBack"


class Watched(World):
    """Its pods are asked by a process that may be replaced by one that has seen nothing."""

    models: ServedModels

    def observe(self, seconds: float) -> Observation:
        seen = super().observe(seconds)
        said = self.models.said("ns", SERVICE, PODS, self.now.timestamp())
        return replace(seen, services=held_against(
            seen.services or {}, MODEL, said, before_traffic=self.status.step is None and self.status.rollback is None))


@pytest.mark.parametrize("step", [None, 1], ids=["before its first request", "under way"])
def test_a_wrong_model_that_only_the_leader_before_has_seen_gains_nothing_under_the_next(step: int | None) -> None:
    """The first leader sees it and dies in that turn. The next one meets a Prometheus that is down, then one that is back."""
    answers: list[Any] = [[info(p.name, CANDIDATE if step is not None else OTHER) for p in PODS]]
    with prometheus(lambda: answers[0]) as (first, _), prometheus(lambda: answers[0]) as (second, _):
        world = Watched(rollout(strategy={"readyDeadline": "2h"}))
        world.models = first
        if step is not None:
            world.until_step(step)
            answers[0] = [info(p.name, OTHER) for p in PODS]
            world.now += timedelta(seconds=SCRAPE_S)
            assert world.turn(keep_status=False).status.rollback is not None, "its last word, which reached nobody"
        else:
            for _ in range(5):
                world.turn()
            assert "its pods say that they serve" in world.status.message
        weight = world.weight
        answers[0], world.models = says(503, "down"), second
        for _ in range(100):
            world.turn()
            assert world.weight <= weight
        assert "can't be asked" in world.status.message
        answers[0] = [info(p.name, OTHER) for p in PODS]
        if step is not None:
            assert world.until("RolledBack") == "RolledBack"
            assert world.status.reason == "WrongModel"
        else:
            world.turn()
            assert "its pods say that they serve" in world.status.message
        assert world.weight == 0


# --- the condition ------------------------------------------------------------------------------------------------------------


def test_the_condition_says_what_is_known_and_stays_after_the_end() -> None:
    world = Deceived()
    world.until_step(1)

    def condition(status: RolloutStatus, before: RolloutStatus, **changes: Any) -> Any:
        seen = world.observe(2.0)
        services = {k: replace(v, **(changes if k == SERVICE else {})) for k, v in (seen.services or {}).items()}
        return conditions.verified(status, before, replace(seen, services=services), 1, START + timedelta(hours=1))

    unknown = condition(world.status, world.status)
    assert (unknown.status, unknown.reason) == ("Unknown", "NotSaid")
    not_asked = condition(world.status, world.status, unasked="Prometheus is down")
    assert (not_asked.status, not_asked.reason) == ("Unknown", "NotAsked")
    good = condition(world.status, world.status, serves=CANDIDATE)
    assert (good.type, good.status, good.reason) == ("ModelVerified", "True", "PodsSaySo")
    bad = condition(world.status, world.status, wrong_model="its pods serve another")
    assert (bad.status, bad.reason, bad.message) == ("False", "WrongModel", f"{SERVICE}: its pods serve another")
    before = world.status.model_copy(update={"conditions": (bad,)})
    ended = world.status.model_copy(update={"step": None, "phase": "RolledBack"})
    assert condition(ended, before) == bad
    assert condition(ended, ended) is None
    assert json.loads(bad.model_dump_json())["status"] == "False"
    assert STABLE not in bad.message
