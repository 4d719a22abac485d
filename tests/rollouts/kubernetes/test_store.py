"""The commands' store on a cluster, over HTTP: what a report says without a record, and wishes that nobody may lose."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, START, World, rollout
from hafnium_scripted_api import Answer, Asked
from hafnium_small_api import SmallApi, small_api

from hafnium_contract.errors import InputError
from hafnium_rollout import commands
from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.store import MANAGER, KubernetesStore
from hafnium_rollout.objects import UserAction
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.status import stored

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


class Place:
    """A namespace with one ModelRollout and its status as the operator left it."""

    def __init__(self, api: SmallApi, client: KubernetesClient) -> None:
        self.api, self.client = api, client
        self.store = KubernetesStore(client, "risk-ns")
        self.world = World(rollout(approvals={"required": ["security"]}))

    def put(self, **spec: Any) -> None:
        item: Json = rollout_data(self.world.spec)
        item["metadata"] = {"name": "risk", "namespace": "risk-ns"}
        item["spec"] |= spec
        self.api.put(MODEL_ROLLOUT, item | {"status": stored(self.world.status)})

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.world.turn()

    def approval(self, approver: str, stage: str = "security", digest: str = CANDIDATE) -> None:
        self.api.put(MODEL_APPROVAL, {
            "metadata": {"name": f"{approver}-{stage}-{digest[7:11]}", "namespace": "risk-ns", "creationTimestamp": "2026-05-04T11:00:00Z"},
            "spec": {"modelDigest": digest, "stage": stage, "approver": approver}})

    def item(self) -> Json:
        return self.api.get(MODEL_ROLLOUT, "risk-ns", "risk")

    def report(self) -> str:
        return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", commands.report(self.store, "risk", now=START + timedelta(days=1))))


@pytest.fixture
def place() -> Generator[Place]:
    with small_api() as (api, door):
        yield Place(api, door.client())


def wish(kind: str, name: str, by: str, reason: str = "") -> UserAction:
    return UserAction(type=kind, id=name, candidate_digest=CANDIDATE, reason=reason, requested_by=by)  # type: ignore[arg-type]


# --- the report, where no record can be read ----------------------------------------------------------------------------------


def test_a_report_without_a_record_tells_the_wishes_of_the_history_and_the_one_that_waits(place: Place) -> None:
    place.world.approvals = frozenset({"security"})
    place.turn(8)
    place.world.actions = (wish("SkipStep", "s-1", "carol", "CHG-7"),)
    place.turn(2)
    waiting = wish("Abort", "a-1", "dan", "wrong data").model_dump(mode="json", by_alias=True)
    place.put(action=waiting)
    text = place.report()
    assert "SkipStep CHG-7 (by carol)" in text
    assert "The last wish, as the ModelRollout still has it" in text
    assert re.search(r"Abort dan wrong data .* a-1 \(not acted on\)", text)
    assert "others may be missing here" in text
    assert "No person asked for anything" not in text


def test_a_report_without_a_record_says_of_an_abort_that_it_was_one(place: Place) -> None:
    place.world.approvals = frozenset({"security"})
    place.turn(8)
    place.world.actions = (wish("Abort", "a-1", "carol", "CHG-8"),)
    place.turn(8)
    assert place.world.status.phase == "RolledBack"
    place.put()
    assert len(re.findall(r" Abort CHG-8 \(by carol\)", place.report())) == 1


def test_a_report_without_a_record_or_a_trace_of_a_wish_says_that_it_is_not_known(place: Place) -> None:
    place.turn(3)
    place.put()
    text = place.report()
    assert "it is not known whether any person asked for anything" in text
    assert "No person asked for anything" not in text


def test_an_approval_by_the_trainer_is_missing_in_the_report_with_the_reason(place: Place) -> None:
    place.turn(3)
    place.put()
    place.approval("thea")
    text = place.report()
    assert "Missing: security." in text
    assert "Not counted : security by thea, who trained this model." in text
    assert "All are given" not in text
    place.approval("vera")
    text = place.report()
    assert "All are given." in text
    assert re.search(r"security vera sha256:a+ yes", text)
    assert re.search(r"security thea sha256:a+ no ", text)


def test_approvals_of_a_queued_model_are_none_of_the_one_under_way(place: Place) -> None:
    place.turn(3)
    model = rollout_data(place.world.spec)["spec"]["model"] | {"digest": OTHER, "version": "3"}
    place.put(model=model)
    place.approval("vera", digest=OTHER)
    text = place.report()
    assert f"Approvals are of {CANDIDATE} , trained by thea. Required: security. Missing: security." in text
    assert f"The ModelRollout asks for {OTHER} next" in text
    assert "Rollout of risk 2" in text
    assert "Rollout of risk 3" not in text
    assert "no, of another model" in text
    place.approval("vera")
    assert "All are given." in place.report()


# --- wishes about what can't be read ------------------------------------------------------------------------------------------


def newer(place: Place) -> None:
    """The ModelRollout as a newer operator and CRD have it."""
    place.turn(8)
    place.put(newerPart={"on": True})
    item = place.item()
    item["status"] |= {"newerField": 1}
    item["status"]["step"] |= {"newerCount": 2}
    place.api.put(MODEL_ROLLOUT, item)


@pytest.mark.parametrize("verb", ["abort", "skip", "promote", "retry"])
def test_a_command_that_is_older_than_operator_and_crd_still_asks(place: Place, verb: str) -> None:
    place.world.approvals = frozenset({"security"})
    newer(place)
    assert getattr(commands, verb)(place.store, "risk", "CHG-9", by="carol").startswith("asked for ")
    action = place.item()["spec"]["action"]
    assert (action["candidateDigest"], action["reason"], action["requestedBy"]) == (CANDIDATE, "CHG-9", "carol")


def test_a_status_of_a_newer_operator_is_shown_with_what_is_left_out(place: Place) -> None:
    place.world.approvals = frozenset({"security"})
    newer(place)
    table = commands.status_table(place.store)
    assert table.splitlines()[1].split()[:2] == ["risk", "Progressing"]
    assert "not shown, because what wrote it is newer than this command: status.step.newerCount, status.newerField" in table
    assert commands.status(place.store)["rollouts"][0]["unknown"] == ["status.step.newerCount", "status.newerField"]
    assert commands.wanted_digest(place.store, "risk") == CANDIDATE


def test_a_report_of_a_newer_operators_status_names_what_it_leaves_out(place: Place) -> None:
    place.turn(3)
    place.put()
    assert "Not on this page" not in place.report()
    place.api.put(MODEL_ROLLOUT, (item := place.item()) | {"status": item["status"] | {"newerField": 1}})
    assert re.search(r"Not on this page , nor in its sums, .*: status.newerField\.", place.report())


def test_an_abort_of_a_candidate_without_a_readable_digest_says_what_to_do_by_hand(place: Place) -> None:
    place.turn(3)
    place.put()
    item = place.item()
    item["status"]["candidate"]["digest"] = {"of": "another form"}
    place.api.put(MODEL_ROLLOUT, item)
    with pytest.raises(StateError) as e:
        commands.abort(place.store, "risk", "it's bad", by="carol", now=NOW)
    line = str(e.value)[str(e.value).index("kubectl"):]
    words = shlex.split(line)
    assert words[:-1] == ["kubectl", "patch", "modelrollout", "risk", "-n", "risk-ns", "--type", "merge", "-p"]
    by_hand = json.loads(words[-1])["spec"]["action"]
    assert (by_hand["type"], by_hand["reason"], by_hand["candidateDigest"]) == ("Abort", "it's bad", "sha256:DIGEST")
    UserAction.model_validate(by_hand | {"candidateDigest": CANDIDATE})
    assert "action" not in place.item()["spec"]


# --- one wish at a time -------------------------------------------------------------------------------------------------------


def waits(place: Place, kind: str, by: str) -> None:
    """A wish that no operator has acted on."""
    place.turn(3)
    place.put()
    ask = commands.abort if kind == "Abort" else commands.skip
    ask(place.store, "risk", "CHG-1", by=by)
    item = place.item()
    item["metadata"]["managedFields"] = [
        {"manager": "ci", "time": "2026-05-04T09:00:00Z", "fieldsV1": {"f:spec": {"f:model": {}}}},
        {"manager": MANAGER, "time": "2026-05-04T11:59:00Z", "fieldsV1": {"f:spec": {"f:action": {"f:id": {}}}}}]
    place.api.put(MODEL_ROLLOUT, item)


@pytest.mark.parametrize("verb", ["skip", "promote", "retry"])
def test_a_waiting_abort_is_not_overwritten_and_who_asked_for_it_is_told(place: Place, verb: str) -> None:
    waits(place, "Abort", "carol")
    before = place.item()
    with pytest.raises(StateError) as e:
        getattr(commands, verb)(place.store, "risk", by="bob")
    assert f"carol asked for Abort of {CANDIDATE[:19]} at 2026-05-04T11:59:00Z (CHG-1), and the operator hasn't acted on it" in str(e.value)
    assert """kubectl patch modelrollout risk -n risk-ns --type merge -p '{"spec": {"action": null}}'""" in str(e.value)
    assert place.item() == before


@pytest.mark.parametrize("kind", ["Abort", "SkipStep"])
def test_an_abort_takes_the_place_of_any_wish_and_says_of_which(place: Place, kind: str) -> None:
    waits(place, kind, "carol")
    assert f"it takes the place of an earlier wish: carol asked for {kind}" in commands.abort(place.store, "risk", by="bob")
    assert place.item()["spec"]["action"]["requestedBy"] == "bob"


def test_after_it_was_acted_on_the_next_wish_is_taken(place: Place) -> None:
    waits(place, "SkipStep", "carol")
    item = place.item()
    item["status"]["handledActions"] = [item["spec"]["action"]["id"]]
    place.api.put(MODEL_ROLLOUT, item)
    assert "earlier" not in commands.promote(place.store, "risk", by="bob")
    assert place.item()["spec"]["action"]["type"] == "Promote"


def in_between(place: Place, write: Callable[[Json], None]) -> list[int]:
    """Somebody writes the object right before the command's patch comes in. Returns the count of patches that came."""
    patches = [0]

    def before(asked: Asked) -> Answer | None:
        if asked.method == "PATCH":
            patches[0] += 1
            if patches[0] == 1:
                item = place.item()
                write(item)
                place.api.put(MODEL_ROLLOUT, item)
        return None

    place.api.before = before
    return patches


def test_who_is_overtaken_by_another_wish_is_told_and_overwrites_nothing(place: Place) -> None:
    place.turn(3)
    place.put()
    theirs = wish("Abort", "a-1", "carol").model_dump(mode="json", by_alias=True)
    patches = in_between(place, lambda item: item["spec"].update(action=theirs))
    with pytest.raises(StateError, match=r"was written in between \(carol asked for Abort of .*\): nothing was asked"):
        commands.skip(place.store, "risk", by="bob")
    assert place.item()["spec"]["action"] == theirs
    assert patches == [1]


def test_an_abort_is_held_up_by_no_other_write(place: Place) -> None:
    place.turn(3)
    place.put()
    in_between(place, lambda item: item["status"].update(message="looked"))
    commands.abort(place.store, "risk", by="bob")
    assert place.item()["spec"]["action"]["type"] == "Abort"


def test_a_wish_whose_answer_was_lost_is_not_taken_for_somebody_elses(place: Place) -> None:
    place.turn(3)
    place.put()
    cut: list[Asked] = []

    def before(asked: Asked) -> Answer | None:
        if asked.method != "PATCH" or cut:
            return None
        cut.append(asked)
        assert place.api(asked).status == 200  # it is written, and nobody hears of it
        return Answer(cut=True)

    place.api.before = before
    assert commands.skip(place.store, "risk", by="bob").startswith("asked for SkipStep")
    assert place.item()["spec"]["action"]["requestedBy"] == "bob"


# --- approvals ----------------------------------------------------------------------------------------------------------------


def approved(place: Place) -> list[str]:
    return [i["spec"]["modelDigest"] for k, i in place.api.objects.items() if k[0] == MODEL_APPROVAL.plural]


def queued(place: Place) -> None:
    """Another model was asked for while one is under way: by CI, say, between report and approval."""
    place.turn(3)
    place.put(model=rollout_data(place.world.spec)["spec"]["model"] | {"digest": OTHER, "version": "3", "trainedBy": "otto"})


def test_an_approval_on_a_cluster_names_what_was_reviewed_or_is_refused_with_what_there_is(place: Place) -> None:
    place.turn(3)
    place.put()
    with pytest.raises(InputError) as e:
        commands.approve(place.store, "risk", "security", "vera", again="kubectl hafnium approve risk --stage security -n risk-ns")
    assert f"version 2, {CANDIDATE}, trained by thea, the one that the ModelRollout asks for:" in str(e.value)
    assert f"    kubectl hafnium approve risk --stage security -n risk-ns --digest {'a' * 64}" in str(e.value).splitlines()
    assert approved(place) == []
    for digest in ("a" * 12, f"sha256:{'a' * 12}", "A" * 64):
        assert "approved version 2, sha256:aaaaaaaaaaaa, for security" in commands.approve(place.store, "risk", "security", "vera", digest)
    assert approved(place) == [CANDIDATE] * 3


def test_a_model_that_came_after_the_review_is_not_approved_in_its_place(place: Place) -> None:
    place.put(model=rollout_data(place.world.spec)["spec"]["model"] | {"digest": OTHER, "version": "3", "trainedBy": "otto"})
    with pytest.raises(InputError, match="no model of risk; nothing was approved") as e:
        commands.approve(place.store, "risk", "security", "vera", "a" * 64)
    assert f"version 3, {OTHER}, trained by otto" in str(e.value)
    assert approved(place) == []


def test_the_model_under_way_can_be_approved_beside_a_queued_one(place: Place) -> None:
    queued(place)
    with pytest.raises(InputError) as e:
        commands.approve(place.store, "risk", "security", "vera")
    assert f"version 2, {CANDIDATE}, trained by thea, the one under way" in str(e.value)
    assert f"version 3, {OTHER}, trained by otto, the one that the ModelRollout asks for next" in str(e.value)
    commands.approve(place.store, "risk", "security", "otto", "a" * 12)
    with pytest.raises(InputError, match="thea trained risk 2"):
        commands.approve(place.store, "risk", "security", "thea", "a" * 12)
    with pytest.raises(InputError, match="otto trained risk 3"):
        commands.approve(place.store, "risk", "security", "otto", "c" * 12)
    assert approved(place) == [CANDIDATE]


@pytest.mark.parametrize("digest", ["", "a" * 11, "a" * 65, "g" * 12, "sha256:", "md5:" + "a" * 12, "*"])
def test_too_little_of_a_digest_or_something_else_approves_nothing(place: Place, digest: str) -> None:
    place.put()
    with pytest.raises(InputError, match="expected 12 to 64 hex digits"):
        commands.approve(place.store, "risk", "security", "vera", digest)
    assert approved(place) == []
