"""The client's own promises: what is retried and what isn't, limits, fences, and errors that say what happened."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hafnium_scripted_api import Answer, data, says, scripted_api

from hafnium_rollout.kubernetes.client import Limits, RetryBudget, retry_after_s
from hafnium_rollout.kubernetes.errors import (
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubernetesError,
    LeaseLost,
    NotFound,
    Unavailable,
    Unreadable,
)
from hafnium_rollout.kubernetes.kinds import LEASE, MODEL_ROLLOUT, NAMESPACE, POD

POD_X = {"metadata": {"name": "x", "namespace": "n"}}


class Waits:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def clock(self) -> float:
        return sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def test_paths_are_those_of_the_api_server() -> None:
    assert POD.path("n", "x") == "/api/v1/namespaces/n/pods/x"
    assert MODEL_ROLLOUT.path("n", "x", "status") == "/apis/hafnium.dev/v1alpha1/namespaces/n/modelrollouts/x/status"
    assert MODEL_ROLLOUT.path() == "/apis/hafnium.dev/v1alpha1/modelrollouts"
    assert NAMESPACE.path("", "n") == "/api/v1/namespaces/n"
    assert POD.path("n", "../../secrets") == "/api/v1/namespaces/n/pods/..%2F..%2Fsecrets"


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_fault_that_passes_is_tried_again(status: int) -> None:
    waits = Waits()
    with scripted_api(says(status, "busy"), data(POD_X)) as api:
        found = api.client(clock=waits.clock, sleep=waits.sleep).get(POD, "n", "x")
    assert found == POD_X
    assert len(api.asked) == 2
    assert len(waits.slept) == 1


def test_a_connection_that_breaks_is_tried_again() -> None:
    waits = Waits()
    with scripted_api(Answer(cut=True), data(POD_X)) as api:
        assert api.client(clock=waits.clock, sleep=waits.sleep).get(POD, "n", "x") == POD_X


def test_retry_after_is_kept_to() -> None:
    waits = Waits()
    with scripted_api(says(429, "slow down", Retry_After="7"), data(POD_X)) as api:
        api.client(clock=waits.clock, sleep=waits.sleep).get(POD, "n", "x")
    assert waits.slept == [7.0]


def test_a_wait_beyond_the_deadline_is_left_to_the_next_look() -> None:
    waits = Waits()
    with scripted_api(says(429, "slow down", Retry_After="60")) as api, pytest.raises(Unavailable, match="slow down") as e:
        api.client(clock=waits.clock, sleep=waits.sleep).get(POD, "n", "x")
    assert e.value.retry_after_s == 60
    assert len(api.asked) == 1
    assert waits.slept == []


def test_attempts_are_bounded() -> None:
    waits = Waits()
    with scripted_api(says(503, "down")) as api, pytest.raises(Unavailable, match=r"get Pod n/x: down \(503\)"):
        api.client(clock=waits.clock, sleep=waits.sleep, limits=Limits(attempts_max=3)).get(POD, "n", "x")
    assert len(api.asked) == 3


def test_the_retry_budget_is_for_all_calls_together() -> None:
    waits = Waits()
    with scripted_api(says(503, "down")) as api:
        client = api.client(clock=waits.clock, sleep=waits.sleep, budget=RetryBudget(share=0.0, spare=4.0))
        for _ in range(5):
            with pytest.raises(Unavailable):
                client.get(POD, "n", "x")
    assert len(api.asked) == 5 + 4


@pytest.mark.parametrize(("status", "error"), [
    (400, Invalid), (401, Forbidden), (403, Forbidden), (404, NotFound), (409, Conflict), (410, Gone), (422, Invalid),
])
def test_an_answer_that_repeating_would_not_change_is_given_at_once(status: int, error: type[KubernetesError]) -> None:
    with scripted_api(says(status, "no")) as api, pytest.raises(error, match=rf"patch Pod n/x: no \({status}\)"):
        api.client().merge(POD, "n", "x", {})
    assert len(api.asked) == 1


def test_a_crd_that_is_older_than_the_operator_is_named_and_not_asked_again() -> None:
    """The API server answers 500 to a field that the CRD doesn't declare."""
    told = "failed to create typed patch object (n/x; hafnium.dev/v1alpha1): .status.step.new: field not declared in schema"
    with scripted_api(says(500, told)) as api, pytest.raises(Invalid, match=r"older than this operator.*manifests/crds.yaml"):
        api.client().apply_status(MODEL_ROLLOUT, "n", "x", {"step": {"new": 1}}, resource_version="1")
    assert len(api.asked) == 1


def test_the_fence_is_asked_before_each_attempt_of_a_write() -> None:
    """The lease is lost while a retry waits: the second attempt must not leave the process."""
    waits, asked = Waits(), []

    def fence() -> None:
        asked.append(len(asked))
        if len(asked) > 1:
            raise LeaseLost("the lease is another's")

    with scripted_api(says(503, "down"), data(POD_X)) as api, pytest.raises(LeaseLost):
        api.client(clock=waits.clock, sleep=waits.sleep).fenced(fence).apply(POD, POD_X)
    assert len(api.asked) == 1


def test_reading_needs_no_lease() -> None:
    def fence() -> None:
        raise LeaseLost("never held")

    with scripted_api(data(POD_X)) as api:
        assert api.client().fenced(fence).get(POD, "n", "x") == POD_X


def test_every_verb_that_changes_something_is_fenced() -> None:
    def fence() -> None:
        raise LeaseLost("never held")

    with scripted_api(data(POD_X)) as api:
        client = api.client().fenced(fence)
        for write in (
            lambda: client.apply(POD, POD_X), lambda: client.apply_status(POD, "n", "x", {}, resource_version="1"),
            lambda: client.merge(POD, "n", "x", {}), lambda: client.create(POD, POD_X), lambda: client.update(POD, POD_X),
            lambda: client.delete(POD, "n", "x"),
        ):
            with pytest.raises(LeaseLost):
                write()
    assert api.asked == []


def test_an_apply_names_its_manager_and_its_precondition() -> None:
    with scripted_api(data(POD_X)) as api:
        api.client().apply_status(LEASE, "n", "x", {"phase": "Pending"}, resource_version="41")
    asked = api.asked[0]
    assert asked.path.startswith("/apis/coordination.k8s.io/v1/namespaces/n/leases/x/status?fieldManager=hafnium-rollout&force=true")
    assert asked.headers["content-type"] == "application/apply-patch+yaml"
    body = json.loads(asked.body)
    assert body["metadata"]["resourceVersion"] == "41"
    assert (body["apiVersion"], body["kind"]) == ("coordination.k8s.io/v1", "Lease")


def test_pages_are_put_together() -> None:
    first = {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [{"metadata": {"name": "a"}}]}
    last = {"metadata": {"resourceVersion": "9"}, "items": [{"metadata": {"name": "b"}}]}
    with scripted_api(data(first), data(last)) as api:
        found = api.client().list(POD, "n", labels="a=b")
    assert [i["metadata"]["name"] for i in found.items] == ["a", "b"]
    assert found.resource_version == "9"
    assert "continue=more" in api.asked[1].path
    assert "labelSelector=a%3Db" in api.asked[1].path


def test_too_many_objects_are_refused_and_not_cut() -> None:
    page = {"metadata": {"continue": "more"}, "items": [{}] * 3}
    with scripted_api(data(page)) as api, pytest.raises(Unreadable, match="more than 5 objects"):
        api.client(limits=Limits(list_objects_max=5)).list(POD)


def test_too_large_an_answer_is_an_error() -> None:
    with scripted_api(Answer(200, b"x" * 2000)) as api, pytest.raises(Unreadable, match="larger than 1000 bytes"):
        api.client(limits=Limits(answer_bytes_max=1000)).get(POD, "n", "x")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b""], ids=["a page", "a list", "nothing"])
def test_an_answer_of_another_form_is_an_error(body: bytes) -> None:
    with scripted_api(Answer(200, body)) as api, pytest.raises(Unreadable, match="get Pod n/x"):
        api.client().get(POD, "n", "x")


def test_a_kind_that_is_not_installed_is_none_and_a_server_that_is_down_is_an_error() -> None:
    with scripted_api(says(404)) as api:
        assert api.client().resources(LEASE) is None
    waits = Waits()
    with scripted_api(says(503)) as api, pytest.raises(Unavailable):
        api.client(clock=waits.clock, sleep=waits.sleep).resources(LEASE)


def test_a_watch_that_nobody_answers_is_an_error_of_ours() -> None:
    with scripted_api(Answer(cut=True)) as api, pytest.raises(Unavailable, match="watch pods in n: no answer"):
        list(api.client().watch(POD, "n", "1", 1))
    with pytest.raises(Unavailable, match="watch pods in n: no answer"):  # the port is closed now
        list(api.client().watch(POD, "n", "1", 1))


def test_a_watch_says_when_its_version_is_too_old() -> None:
    event = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
    with scripted_api(Answer(200, json.dumps(event).encode() + b"\n")) as api, pytest.raises(Gone, match="too old"):
        list(api.client().watch(POD, "n", "1", 1))


def test_a_number_that_json_does_not_know_is_refused_before_it_is_sent() -> None:
    with scripted_api(data({})) as api, pytest.raises(Unreadable, match="JSON"):
        api.client().apply(POD, {**POD_X, "status": {"value": float("nan")}})
    assert api.asked == []


@pytest.mark.parametrize(("value", "seconds"), [
    ("3", 3.0), ("0", 0.0), ("Sun, 01 Mar 2026 12:00:05 GMT", 5.0), ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0), ("soon", None), (None, None),
])
def test_retry_after_in_each_of_its_forms(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, datetime(2026, 3, 1, 12, tzinfo=UTC)) == seconds
