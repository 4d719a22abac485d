"""From one release to the next and back, with a rollout under way; and a further version of a type, from its coming to its end.

The types are cluster-wide: while these tests run, nobody else should test on the cluster. Afterwards this checkout's types are there again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hafnium_kubectl import JSON, Kubectl, eventually, kustomized, renamed
from hafnium_operator import (
    Load,
    OperatorProcess,
    apply,
    digest,
    first_model,
    model_rollout,
    phase,
    service,
    status,
    until,
    versions,
    weights,
)
from hafnium_releases import (
    SPOKEN,
    Release,
    as_before,
    crd_of,
    install,
    present,
    release_before,
    schema,
    store_anew,
    stored_versions,
    with_version,
)

pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("surroundings", "left_behind", "this_release")]
Start = Callable[..., OperatorProcess]
NEXT = "v1alpha2"
STEPS: list[dict[str, Any]] = [
    {"weight": 20, "minDwell": "1s", "minSamples": 1500, "deadline": "20m"},
    {"weight": 100, "minDwell": "1s", "deadline": "20m"},
]
"""A minute and more at a fifth of the load: time to change types and operators in the middle."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return release_before(tmp_path_factory.mktemp("before"))


@pytest.fixture(scope="module")
def this_release(types: Kubectl) -> Iterator[None]:
    """Whatever a test does to the types, they are this release's again."""
    yield
    as_before(types)


@contextmanager
def types_of(kubectl: Kubectl, crds: list[JSON]) -> Iterator[None]:
    """Those CRDs for as short as possible."""
    try:
        install(kubectl, crds)
        yield
    finally:
        as_before(kubectl)


# --- a rollout under way ----------------------------------------------------------------------------------------------------------


def half_way(kubectl: Kubectl, name: str, version: int) -> None:
    """A candidate is at its first step and has part of what it needs."""
    apply(kubectl, model_rollout(name, version, steps=STEPS))
    found = until(lambda: (s := status(kubectl, name)).get("candidate", {}).get("digest") == digest(version)
                  and (s.get("step") or {}).get("samples", 0) >= 200 and s, f"version {version} is half way")
    assert found["step"]["index"] == 0
    assert weights(kubectl, name) == {service(name, version - 1): 80, service(name, version): 20}


def handed_over(kubectl: Kubectl, name: str, old: OperatorProcess) -> JSON:
    """The old operator ends, as a Deployment ends it. What it left, which nobody changes until the next one comes."""
    old.stop()
    left = status(kubectl, name)
    assert (left["phase"], left["step"]["index"]) == ("Progressing", 0), "it was to be in the middle"
    assert left["step"]["samples"] < STEPS[0]["minSamples"]
    return left


def goes_on(kubectl: Kubectl, name: str, left: JSON) -> None:
    """Another operator looks, and everything is there: the same run and step since the same time, all evidence, all history."""
    def looked() -> JSON | None:
        s = status(kubectl, name)
        return s if s["step"]["samples"] > left["step"]["samples"] else None
    now = until(looked, "the next operator's first look")
    for field in ("runId", "startedAt", "stable", "candidate", "route", "handledActions", "previous"):
        assert now.get(field) == left.get(field), field
    for field in ("index", "enteredAt", "weightEffectiveSince"):
        assert now["step"][field] == left["step"][field], field
    assert now["history"][:len(left["history"])] == left["history"]
    for was, gate in zip(left["gates"], now["gates"], strict=True):
        for field in ("counts", "countsRun"):
            assert all(a >= b for a, b in zip(gate["state"][field], was["state"][field], strict=True)), "evidence only grows"
        assert was["state"]["counts"][1] > 0
        assert gate["windowStart"] == was["windowStart"]


def story(operator: OperatorProcess, name: str) -> list[str]:
    told = {"Started", "StepEntered", "Advanced", "Promoted", "Rollback", "RolledBack", "BlindStepDown", "ExternalChange"}
    return [e for e in operator.events(name) if e in told]


def promoted(kubectl: Kubectl, name: str, version: int) -> JSON:
    found = phase(kubectl, name, "Promoted")
    assert found["stable"]["digest"] == digest(version)
    until(lambda: weights(kubectl, name) == {service(name, version): 100}, "the candidate alone")
    return found


def test_a_rollout_under_way_goes_on_with_the_next_release_and_with_the_one_before(
    namespaced: Kubectl, types: Kubectl, start: Start, load: Callable[..., Load], before: Release,
) -> None:
    """The order of the docs: types, operator; back: the operator alone."""
    kubectl, name = namespaced, "upgraded"
    with types_of(types, before.crds):
        old = start("before", source=before.source)
        first_model(kubectl, name)
        traffic = load(name)
        until(lambda: (200, "1") in traffic.counts, "the first model answers at the gateway")
        traffic.next(50)
        met = traffic.counts
        half_way(kubectl, name, 2)
    samples = status(kubectl, name)["step"]["samples"]
    until(lambda: status(kubectl, name)["step"]["samples"] > samples, "the older operator looks on under the newer types")
    left = handed_over(kubectl, name, old)
    new = start("next")
    goes_on(kubectl, name, left)
    promoted(kubectl, name, 2)
    assert story(new, name) == ["Advanced", "StepEntered", "Promoted"], "no step is entered a second time"
    assert {s for s, _ in traffic.counts - met} == {200}, "no request was lost"

    half_way(kubectl, name, 3)
    left = handed_over(kubectl, name, new)
    back = start("before-again", source=before.source)

    def decided() -> str:
        held = [x["message"] for x in back.lines if x["event"] == "TurnFailed" and "nothing is moved until it can be read" in x["message"]]
        return held[0] if held else str(status(kubectl, name)["phase"] == "Promoted" and "promoted")

    until(lambda: decided() not in ("", "False"), "the operator of before finishes it, or says why it can't")
    if decided() != "promoted":  # what the next release wrote is more than this one can read: it holds, and the next one finishes
        assert "status." in decided()
        assert weights(kubectl, name) == {service(name, 2): 80, service(name, 3): 20}
        back.stop()
        assert status(kubectl, name) == left, "nothing was written"
        start("next-again")
    promoted(kubectl, name, 3)
    assert {s for s, _ in traffic.counts - met} == {200}, "no request was lost"


def test_an_operator_that_cannot_read_what_a_later_one_wrote_holds_says_so_and_goes_on_when_it_can(
    namespaced: Kubectl, types: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    """The way back from a release that has more in spec and status than this one knows."""
    kubectl, name = namespaced, "later"
    operator = start()
    first_model(kubectl, name)
    load(name)
    later = crd_of(present())
    for part in ("spec", "status"):
        schema(later["spec"]["versions"][0])[part]["properties"]["ofALaterRelease"] = {"type": "string"}
    with types_of(types, [*(d for d in present() if d["metadata"]["name"] != later["metadata"]["name"]), later]):
        half_way(kubectl, name, 2)
        item = model_rollout(name, 2, steps=STEPS)
        apply(kubectl, {**item, "spec": {**item["spec"], "ofALaterRelease": "x"}})
        line = operator.wait_for("SpecInvalid", name)
        assert "ofALaterRelease" in line["message"]
        assert "going on with the last good one" in line["message"]
        samples = status(kubectl, name)["step"]["samples"]
        until(lambda: status(kubectl, name)["step"]["samples"] > samples, "it guards on by what it could read")
        apply(kubectl, item)
        operator.stop()
        kubectl("patch", "modelrollout", name, "--subresource=status", "--type=merge", "-p", '{"status": {"ofALaterRelease": "x"}}')
        left = status(kubectl, name)
        assert left["ofALaterRelease"] == "x"
        assert (left["phase"], left["step"]["index"]) == ("Progressing", 0), "it was to be in the middle"
        operator = start("before")
        line = operator.wait_for("TurnFailed", name)
        assert "status.ofALaterRelease" in line["message"]
        assert "nothing is moved until it can be read" in line["message"]
        assert weights(kubectl, name) == {service(name, 1): 80, service(name, 2): 20}
        assert status(kubectl, name) == left, "nothing is written"
        kubectl("patch", "modelrollout", name, "--subresource=status", "--type=json", "-p",
                '[{"op": "remove", "path": "/status/ofALaterRelease"}]')
        goes_on(kubectl, name, left)
    assert set(story(operator, name)) <= {"Advanced", "StepEntered", "Promoted"}


# --- versions of a type -----------------------------------------------------------------------------------------------------------


def read(kubectl: Kubectl, name: str, version: str) -> JSON:
    return kubectl.read(f"modelrollouts.{version}.hafnium.dev", name)


def written(kubectl: Kubectl) -> dict[str, str]:
    """When each object was written last."""
    return {i["metadata"]["name"]: i["metadata"]["resourceVersion"] for i in kubectl.read("modelrollouts")["items"]}


def test_a_further_version_comes_becomes_the_stored_one_and_goes_again_under_a_rollout(
    namespaced: Kubectl, types: Kubectl, start: Start, load: Callable[..., Load],
) -> None:
    """v1alpha2: v1alpha1 with one field more, which both know. The operator speaks v1alpha1 all the while."""
    kubectl, name, resting = namespaced, "versions", "resting"
    others = [d for d in present() if d["metadata"]["name"] != crd_of(present())["metadata"]["name"]]
    grown = crd_of(present())
    schema(grown["spec"]["versions"][0])["spec"]["properties"]["note"] = {"type": "string"}
    policies = [d for d in renamed(kustomized("kustomize/base/access"), kubectl.namespace) if "accounts" in d["metadata"]["name"]]
    operator = start()
    first_model(kubectl, name)
    traffic = load(name)
    until(lambda: (200, "1") in traffic.counts, "the first model answers at the gateway")
    traffic.next(50)
    met = traffic.counts
    try:
        # 1: served. 2: stored. Both under a candidate that climbs
        apply(kubectl, model_rollout(resting, 1, paused=True))
        until(lambda: status(kubectl, resting).get("reason") == "PausedBySpec", "it rests")
        half_way(kubectl, name, 2)
        install(types, [*others, with_version(grown, NEXT, SPOKEN)])
        left = status(kubectl, name)
        install(types, [*others, with_version(grown, NEXT, NEXT)])
        assert stored_versions(types) == [SPOKEN, NEXT]
        goes_on(kubectl, name, left)
        promoted(kubectl, name, 2)
        assert story(operator, name) == ["Started", "Promoted", "Started", "StepEntered", "Advanced", "StepEntered", "Promoted"]
        old, new = read(kubectl, name, SPOKEN), read(kubectl, name, NEXT)
        assert (old["apiVersion"], new["apiVersion"]) == (f"hafnium.dev/{SPOKEN}", f"hafnium.dev/{NEXT}")
        assert (old["spec"], old["status"]) == (new["spec"], new["status"])

        # A model by the further version, and what admission refuses by one version it refuses by the other
        kubectl("apply", "-f", "-", given=policies)
        bad = model_rollout("refused", 1)
        bad["spec"]["service"]["predictor"]["serviceAccountName"] = "somebody-elses"
        for version in (SPOKEN, NEXT):
            bad["apiVersion"] = f"hafnium.dev/{version}"
            eventually(lambda: "models of namespace" in kubectl.run("apply", "--dry-run=server", "-f", "-", given=bad).stderr,
                       f"refused in {bad['apiVersion']}")
        item = model_rollout(name, 3)
        item["apiVersion"] = f"hafnium.dev/{NEXT}"
        apply(kubectl, item)
        promoted(kubectl, name, 3)

        # 3: all objects anew, by the commands of the docs. Whoever runs them again changes nothing
        operator.stop()
        at = written(kubectl)
        store_anew(NEXT)
        assert stored_versions(types) == [NEXT]
        since = written(kubectl)
        assert since[resting] != at[resting], "it was kept in the older version till now"
        store_anew(NEXT)
        assert written(kubectl) == since

        # Back: not by the older types as long as something is stored in the further version
        said = types.refused("apply", "--server-side", "--force-conflicts", "-f", "-", given=crd_of(present()))
        assert f"status.storedVersions[0]: Invalid value: \"{NEXT}\"" in said
        install(types, [*others, with_version(grown, NEXT, SPOKEN)])
        assert stored_versions(types) == [NEXT, SPOKEN]
        operator = start("again")
        half_way(kubectl, name, 4)
        store_anew(SPOKEN)
        assert stored_versions(types) == [SPOKEN]
        assert written(kubectl)[resting] != since[resting]
        install(types, present())
        left = status(kubectl, name)
        assert "the server doesn't have a resource type" in kubectl.refused("get", f"modelrollouts.{NEXT}.hafnium.dev")
        promoted(kubectl, name, 4)
        assert status(kubectl, name)["runId"] == left["runId"]
        assert {s for s, _ in traffic.counts - met} == {200}, "no request was lost"
        assert set(versions(traffic.next(100))) == {"4"}
    finally:
        kubectl.run("delete", "--ignore-not-found", "--wait=false", "-f", "-", given=policies)
        as_before(types)


def test_a_field_that_only_the_further_version_knows_does_not_outlive_a_write_in_the_other(namespaced: Kubectl, types: Kubectl) -> None:
    """Why a release adds a field to all versions that are served: operators write in theirs, a status too."""
    kubectl, name = namespaced, "lost"
    others = [d for d in present() if d["metadata"]["name"] != crd_of(present())["metadata"]["name"]]
    crd = with_version(crd_of(present()), NEXT, NEXT)
    schema(crd["spec"]["versions"][1])["spec"]["properties"]["note"] = {"type": "string"}
    with types_of(types, [*others, crd]):
        item = model_rollout(name, 1, paused=True)
        item["apiVersion"] = f"hafnium.dev/{NEXT}"
        item["spec"]["note"] = "only there"

        apply(kubectl, item)
        assert read(kubectl, name, NEXT)["spec"]["note"] == "only there"
        assert "note" not in read(kubectl, name, SPOKEN)["spec"]
        kubectl("patch", f"modelrollouts.{SPOKEN}.hafnium.dev", name, "--subresource=status", "--type=merge", "-p",
                json.dumps({"status": {"message": "written"}}))
        assert "note" not in read(kubectl, name, NEXT)["spec"]
        kubectl("delete", "modelrollout", name)
