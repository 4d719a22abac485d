"""The CRDs in a real API server: what it accepts, what it refuses and in which words, what it shows, and what it keeps."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hafnium_kubectl import ROOT, Kubectl, sample
from hafnium_rollout_objects import MISTAKES, rollouts, with_mistake
from hafnium_rollout_world import START, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from hafnium_contract.evidence import MESSAGE_CHARACTERS_MAX, VALUES_MAX, parse_evidence
from hafnium_rollout.objects import parse_rollout
from hafnium_rollout.statistics.betting import BettingState
from hafnium_rollout.statistics.tilt import FailState
from hafnium_rollout.status import GateState, GateStatus, HistoryPoint, RolloutStatus, stored

pytestmark = pytest.mark.cluster
GROUP, VERSION = "hafnium.dev", "v1alpha1"
JSON = dict[str, Any]
Create = Callable[[JSON], str]


@pytest.fixture(scope="module")
def api(namespaced: Kubectl) -> client.CustomObjectsApi:
    del namespaced  # the cluster is there
    return client.CustomObjectsApi(config.new_client_from_config())


@pytest.fixture(scope="module")
def create(api: client.CustomObjectsApi, namespaced: Kubectl) -> Create:
    """Creates without keeping (dry run on the server); what was said against it, or nothing."""
    def attempt(data: JSON) -> str:
        plural = f"{data['kind'].lower()}s"
        try:
            api.create_namespaced_custom_object(
                GROUP, VERSION, namespaced.namespace, plural, data, dry_run="All", field_validation="Strict")
        except ApiException as e:
            if e.status not in (400, 422):
                raise
            return str(e.body)
        return ""
    return attempt


# --- what is accepted -----------------------------------------------------------------------------------------------------------------


@given(data=rollouts())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_what_the_types_accept_the_api_server_accepts(create: Create, data: JSON) -> None:
    parse_rollout(data, "test")
    assert create(data) == ""


@given(data=rollouts(), mistake=st.sampled_from(sorted(MISTAKES)))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_what_the_types_refuse_the_api_server_refuses(create: Create, data: JSON, mistake: str) -> None:
    assert create(with_mistake(data, mistake)) != ""


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_each_mistake_alone_is_refused(create: Create, mistake: str) -> None:
    data = sample("modelrollout")
    data["spec"]["gates"] = [g for g in data["spec"]["gates"] if "scores" not in g]  # which would object to other steps as well
    assert create(data) == ""
    assert create(with_mistake(data, mistake)) != ""


@pytest.mark.parametrize(("mistake", "words"), [
    ("falling weights", "spec.strategy.steps: Invalid value: weights rise strictly from step to step, and shadow comes first"),
    ("ends at 99", "the last step must have weight 100"),
    ("shadow with weight", "spec.strategy.steps[0]: Invalid value: give exactly one of `shadow: true` and `weight`"),
    ("deadline as long as minDwell", "spec.strategy.steps[3].deadline: Invalid value: deadline must be longer than minDwell"),
    ("no blindness allowed", "spec.strategy.maxBlindDuration: Invalid value: must be longer than 0s"),
    ("no Safety gate", "spec.gates: Invalid value: at least one must have role: Safety, else nothing takes a bad candidate back"),
    ("no kind", "spec.gates[0]: Invalid value: give exactly one of requests, prometheus, latency, scores, drift, evidence"),
    ("the same name twice", "spec.gates[1]: Duplicate value"),
    ("scores without shadow", "a scores gate compares answers to the same request and needs a step with shadow: true"),
    ("approvals of nobody's model", "model.trainedBy is required where approvals are"),
    ("Safety that nobody waits for", "silence promotes"),
], ids=lambda x: x.split(":")[0][:40])
def test_a_refusal_says_where_and_what(namespaced: Kubectl, mistake: str, words: str) -> None:
    said = namespaced.refused("create", "--dry-run=server", "-f", "-", given=with_mistake(sample("modelrollout"), mistake))
    assert words in said.replace('"object": ', "").replace('"array": ', "").replace('"string": ', "")


@pytest.mark.parametrize("name", ["n" * 43, "1-risk", "risk.v2"])
def test_a_name_that_leaves_no_room_for_its_services_is_refused(create: Create, name: str) -> None:
    assert "metadata.name" in create(sample("modelrollout") | {"metadata": {"name": name}})


def test_a_misspelt_key_is_refused_by_kubectl(namespaced: Kubectl) -> None:
    data = sample("modelrollout")
    data["spec"]["strategy"]["steps"][0]["minSample"] = 5
    said = namespaced.refused("apply", "--server-side", "--dry-run=server", "-f", "-", given=data)
    assert "minSample" in said


def test_samples_apply_and_apply_again_without_a_change(namespaced: Kubectl) -> None:
    kubectl = namespaced
    kubectl("apply", "--server-side", "-f", str(ROOT / "kustomize/samples/modelrollout.yaml"))
    before = kubectl.read("modelrollout", "unified-risk")["metadata"]["resourceVersion"]
    kubectl("apply", "--server-side", "-f", str(ROOT / "kustomize/samples/modelrollout.yaml"))
    found = kubectl.read("mro", "unified-risk")
    assert found["metadata"]["resourceVersion"] == before
    assert found["spec"]["strategy"]["steps"][3]["deadline"] == "7d", "defaults are shown"
    assert parse_rollout(found, "cluster").spec == parse_rollout(sample("modelrollout"), "file").spec


def test_an_explicit_null_is_as_good_as_absent(namespaced: Kubectl) -> None:
    data = sample("modelrollout") | {"metadata": {"name": "with-nulls"}}
    data["spec"] |= {"action": None, "routing": None}
    data["spec"]["gates"][0]["hardLimit"] = None
    namespaced("create", "-f", "-", given=data)
    spec = namespaced.read("mro", "with-nulls")["spec"]
    assert "action" not in spec
    assert "hardLimit" not in spec["gates"][0]


def test_two_managers_own_their_own_gates(namespaced: Kubectl) -> None:
    """Gates merge by name: a platform team's gate stays when the owner's file is applied again."""
    data = sample("modelrollout") | {"metadata": {"name": "shared"}}
    namespaced("apply", "--server-side", "--field-manager=owner", "-f", "-", given=data)
    extra = {**data, "spec": {"gates": [{"name": "platform", "role": "Advisory", "evidence": {"kind": "smoke"}}]}}
    namespaced("apply", "--server-side", "--field-manager=platform", "-f", "-", given=extra)
    namespaced("apply", "--server-side", "--field-manager=owner", "-f", "-", given=data)
    assert [g["name"] for g in namespaced.read("mro", "shared")["spec"]["gates"]] == [
        "errors", "latency", "scores", "drift", "fairness", "platform"]


def _largest() -> JSON:
    """As much of everything as the types allow, so that rules meet the longest values that they were admitted for."""
    long = "1ms" * 10
    gates: list[JSON] = [
        {"name": f"g{i:062d}", "role": "Safety", "prometheus": {"bad": "b" * 2000, "total": "t" * 2000},
         "compare": {"margin": 0.5, "alpha": 0.01, "harmless": 0.1, "dispersion": {"phi": 2, "weight": 0.5}}, "hardLimit": 0.5,
         "requiredIn": ["shadow", "weight"]} for i in range(49)
    ]
    data = sample("modelrollout") | {"metadata": {"name": "largest"}}
    weights = [{"weight": w, "minDwell": long, "deadline": f"{long}1s"[-32:]} for w in (*range(1, 19), 100)]
    data["spec"] |= {
        "strategy": {"steps": [{"shadow": True, "minDwell": long, "deadline": "11ms" * 8}, *weights]},
        "gates": [*gates, {"name": "scores", "scores": {}}],
        "approvals": {"required": [f"s{i:062d}" for i in range(10)]},
        "routing": {"hostnames": [f"h{i:02d}" + ".abcdefg" * 31 for i in range(16)]},
        "action": {"type": "Abort", "id": "i" * 100, "candidateDigest": "sha256:" + "a" * 64, "reason": "r" * 1000},
    }
    data["spec"]["model"] |= {"storageUri": "s" * 2048, "trainedBy": "t" * 512}
    return data


def test_the_largest_rollout_that_the_types_allow_is_taken_with_the_largest_status(
    api: client.CustomObjectsApi, namespaced: Kubectl,
) -> None:
    parse_rollout(_largest(), "test")
    namespaced("create", "-f", "-", given=_largest())
    namespaced("patch", "mro", "largest", "--type=merge", "-p", '{"spec": {"paused": true}}')
    history = tuple(HistoryPoint(time=START, event="Advanced", weight=5, message="€" * 500) for _ in range(3_000))
    kept = _keep(api, namespaced, RolloutStatus(phase="Progressing", history=history), "largest")
    assert len(kept.history) > 300


def test_the_largest_finding_that_the_types_allow_is_taken(namespaced: Kubectl) -> None:
    data = sample("modelevidence") | {"metadata": {"name": "largest"}}
    value = {"name": "n" * 100, "statistic": "s" * 20, "value": -1.2345678901234567e-300, "threshold": 0.1234567890123456,
             "pValue": 0.1234567890123456, "drifted": False, "comparedWith": "reference"}
    data["spec"] |= {"values": [value] * VALUES_MAX, "message": "m" * MESSAGE_CHARACTERS_MAX}
    namespaced("create", "-f", "-", given=data)
    assert len(parse_evidence(namespaced.read("mev", "largest"), "cluster").spec.values) == VALUES_MAX
    data["metadata"]["name"] = "larger"
    data["spec"]["values"].append(value)
    assert "spec.values: Too many" in namespaced.refused("create", "-f", "-", given=data)


# --- what never changes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    ({"model": {"name": "other"}}, "spec.model.name never changes"),
    ({"model": {"trainedBy": "vera@example.com"}}, "trainedBy stays as long as the digest does"),
    ({"model": {"trainedBy": None}}, "trainedBy"),
])
def test_whose_model_it_is_never_changes_under_way(namespaced: Kubectl, change: JSON, words: str) -> None:
    namespaced("apply", "--server-side", "-f", "-", given=sample("modelrollout"))
    patch = json.dumps({"spec": change})
    assert words in namespaced.refused("patch", "mro", "unified-risk", "--type=merge", "-p", patch)


def test_the_next_candidate_may_have_another_trainer(namespaced: Kubectl) -> None:
    namespaced("apply", "--server-side", "-f", "-", given=sample("modelrollout"))
    patch = {"spec": {"model": {"digest": "sha256:" + "b" * 64, "trainedBy": "otto@example.com"}}}
    namespaced("patch", "mro", "unified-risk", "--type=merge", "--dry-run=server", "-p", json.dumps(patch))


@pytest.mark.parametrize(("before", "after", "same"), [
    ("PairedServices", "CanaryTrafficPercent", False), (None, "CanaryTrafficPercent", False), ("CanaryTrafficPercent", None, False),
    ("CanaryTrafficPercent", "PairedServices", False), (None, "PairedServices", True), ("PairedServices", None, True),
])
def test_the_backend_never_changes_once_a_rollout_has_begun(
    api: client.CustomObjectsApi, namespaced: Kubectl, before: str | None, after: str | None, same: bool,
) -> None:
    """The other backend would not see what this one gave the candidate. Before the first run it may be corrected."""
    name = f"backend-{str(before)[:6]}-{str(after)[:6]}".lower()
    data = sample("modelrollout") | {"metadata": {"name": name}}
    data["spec"]["routing"] = {} if before is None else {"backend": before}
    namespaced("create", "-f", "-", given=data)
    change = ("patch", "mro", name, "--type=merge", "--dry-run=server", "-p", json.dumps({"spec": {"routing": {"backend": after}}}))
    namespaced(*change)
    _keep(api, namespaced, RolloutStatus(phase="Pending", reason="KindMissing"), name)
    namespaced(*change)
    _keep(api, namespaced, RolloutStatus(phase="Progressing", run_id="aaaaaaaa-20260301T120000"), name)
    if same:
        namespaced(*change)
    else:
        assert "spec.routing.backend never changes once a rollout has begun" in namespaced.refused(*change)
    namespaced("patch", "mro", name, "--type=merge", "-p", '{"spec": {"paused": true}}')


@pytest.mark.parametrize(("kind", "patch"), [
    ("modelevidence", {"spec": {"verdict": "Fail"}}), ("modelevidence", {"spec": {"samples": 1}}),
    ("modelapproval", {"spec": {"stage": "security"}}), ("modelapproval", {"spec": {"comment": "more"}}),
])
def test_evidence_and_approvals_never_change_even_without_policies(namespaced: Kubectl, kind: str, patch: JSON) -> None:
    """The rule is in the CRD, so it holds where nobody installed the admission policies."""
    data = sample(kind)
    namespaced.run("create", "-f", "-", given=data)
    said = namespaced.refused("patch", kind, data["metadata"]["name"], "--type=merge", "-p", json.dumps(patch))
    assert "never changes" in said


# --- what is kept ---------------------------------------------------------------------------------------------------------------------


def _keep(api: client.CustomObjectsApi, kubectl: Kubectl, status: RolloutStatus, name: str) -> RolloutStatus:
    """Through the status subresource and back, by server-side apply: the API server then reads the numbers as YAML."""
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "ModelRollout", "metadata": {"name": name}, "status": stored(status)}
    api.patch_namespaced_custom_object_status(
        GROUP, VERSION, kubectl.namespace, "modelrollouts", name, body, field_manager="hafnium-rollout", force=True,
        _content_type="application/apply-patch+yaml")
    found: Any = api.get_namespaced_custom_object(GROUP, VERSION, kubectl.namespace, "modelrollouts", name)
    return RolloutStatus.model_validate(found["status"])


@pytest.fixture(scope="module")
def kept(api: client.CustomObjectsApi, namespaced: Kubectl) -> Callable[[RolloutStatus], RolloutStatus]:
    """A status as the API server gives it back, in an object of its own each time."""
    count = iter(range(10**6))

    def keep(status: RolloutStatus) -> RolloutStatus:
        name = f"kept-{next(count)}"
        data = sample("modelrollout") | {"metadata": {"name": name}}
        api.create_namespaced_custom_object(GROUP, VERSION, namespaced.namespace, "modelrollouts", data)
        return _keep(api, namespaced, status, name)
    return keep


def test_a_rollouts_memory_survives_the_api_server_exactly(kept: Callable[[RolloutStatus], RolloutStatus]) -> None:
    gates = [
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02, "dispersion": {"phi": 1.5}}, "hardLimit": 0.3},
        {"name": "scores", "scores": {}, "compare": {"margin": 0.05}},
    ]
    world = World(rollout(gates=gates), random=random.Random(5), bad_stable=0.01, bad_candidate=0.01)
    seen = 0
    for turn in range(60):
        world.turn()
        if turn % 12 == 0:
            assert kept(world.status) == world.status
            seen += len(world.status.gates)
    assert seen >= 4


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(sums=st.lists(numbers, min_size=14, max_size=14), money=st.lists(numbers, min_size=3, max_size=3), count=st.integers(0, 2**53))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_float_survives_the_api_server_exactly(
    kept: Callable[[RolloutStatus], RolloutStatus], sums: list[float], money: list[float], count: int,
) -> None:
    """Sums in log space are never computed again, so a digit lost would be lost for good."""
    state = GateState(fail=(FailState(sums=tuple(sums)),), betting=BettingState((0.0,), tuple(money), tuple(money), count=count))
    status = RolloutStatus(gates=(GateStatus(name="errors", role="Safety", statistic=sums[0], lower=sums[1], state=state),))
    found = kept(status)
    assert found == status
    assert found.gates[0].state.fail[0].sums == tuple(sums)


def test_what_a_status_no_longer_says_is_gone(api: client.CustomObjectsApi, namespaced: Kubectl) -> None:
    """Absent is a value of its own: after a promotion there is no step, and the API server must not keep the old one."""
    namespaced("create", "-f", "-", given=sample("modelrollout") | {"metadata": {"name": "forgets"}})
    world = World(rollout())
    world.until_step(1)
    assert _keep(api, namespaced, world.status, "forgets") == world.status
    after = world.status.model_copy(update={"step": None, "gates": (), "conditions": world.status.conditions[:3], "cursor": {"a": 1}})
    assert _keep(api, namespaced, after, "forgets") == after


def test_the_longest_status_is_taken(kept: Callable[[RolloutStatus], RolloutStatus]) -> None:
    history = tuple(HistoryPoint(time=START, event="Look", weight=5, message="€" * 500) for _ in range(3_000))
    found = kept(RolloutStatus(phase="Progressing", history=history))
    assert found.phase == "Progressing"
    assert 300 < len(found.history) < 3_000


def test_status_is_a_subresource_and_spec_is_not_touched_through_it(api: client.CustomObjectsApi, namespaced: Kubectl) -> None:
    namespaced("apply", "--server-side", "-f", "-", given=sample("modelrollout"))
    patch = {"spec": {"paused": True}, "status": stored(RolloutStatus(phase="Paused", reason="Test"))}
    namespaced("patch", "mro", "unified-risk", "--subresource=status", "--type=merge", "-p", json.dumps(patch))
    found = namespaced.read("mro", "unified-risk")
    assert found["status"]["phase"] == "Paused"
    assert found["spec"]["paused"] is False
    patch = {"status": {"phase": "Promoted"}}
    namespaced("patch", "mro", "unified-risk", "--type=merge", "-p", json.dumps(patch))
    assert namespaced.read("mro", "unified-risk")["status"]["phase"] == "Paused"


# --- what is shown --------------------------------------------------------------------------------------------------------------------


def test_get_tells_the_story_in_a_line(api: client.CustomObjectsApi, namespaced: Kubectl) -> None:
    world = World(rollout())
    world.until_step(1)
    data = copy.deepcopy(sample("modelrollout")) | {"metadata": {"name": "story"}}
    namespaced("create", "-f", "-", given=data)
    _keep(api, namespaced, world.status, "story")
    header, line = namespaced("get", "modelrollouts", "story").splitlines()
    assert header.split() == ["NAME", "PHASE", "STEP", "WEIGHT", "GATE", "REASON", "AGE"]
    assert line.split()[:6] == ["story", "Progressing", "1", "5", world.status.gate, world.status.reason]
    wide = namespaced("get", "mro", "story", "-o", "wide")
    assert "CANDIDATE" in wide
    assert world.status.message in wide
    assert "modelrollout.hafnium.dev/story" in namespaced("get", "hafnium", "-o", "name")


def test_kubectl_waits_for_a_rollouts_end(api: client.CustomObjectsApi, namespaced: Kubectl) -> None:
    namespaced("create", "-f", "-", given=sample("modelrollout") | {"metadata": {"name": "waited-for"}})
    wanted = rollout()
    generation = namespaced.read("mro", "waited-for")["metadata"]["generation"]  # conditions about an older spec don't count
    world = World(wanted.model_copy(update={"metadata": wanted.metadata.model_copy(update={"generation": generation})}))
    world.until_step(1)
    _keep(api, namespaced, world.status, "waited-for")
    assert "timed out" in namespaced.refused("wait", "--for=condition=Ready", "mro/waited-for", "--timeout=1s")
    assert world.until("Promoted") == "Promoted"
    _keep(api, namespaced, world.status, "waited-for")
    namespaced("wait", "--for=condition=Ready", "mro/waited-for", "--timeout=20s")
    line = namespaced("get", "mro", "waited-for").splitlines()[1]
    assert line.split()[:4] == ["waited-for", "Promoted", "100", "Promoted"], "no step and no gate any more"


def test_evidence_is_found_by_model_and_verdict(namespaced: Kubectl) -> None:
    namespaced.run("create", "-f", "-", given=sample("modelevidence"))
    name = sample("modelevidence")["metadata"]["name"]
    digest = "sha256:" + "a" * 64
    assert name in namespaced("get", "mev", f"--field-selector=spec.modelDigest={digest},spec.verdict=Pass")
    assert name not in namespaced("get", "mev", "--field-selector=spec.verdict=Fail")
    header = namespaced("get", "mev").splitlines()[0]
    assert header.split() == ["NAME", "KIND", "VERDICT", "SAMPLES", "WINDOW", "END", "AGE"]


@pytest.mark.parametrize(("path", "words"), [
    ("modelrollout", "each step only on evidence"), ("modelrollout.spec.strategy.steps", "One step of the climb"),
    ("modelrollout.spec.strategy.steps.weight", "Percent of live requests that the candidate answers"),
    ("modelrollout.spec.gates.role", "goes back at its first Fail"), ("modelrollout.status.gates.verdict", "They never merge"),
    ("modelevidence.spec.bothArms", "the world changed, not the candidate"), ("modelapproval.spec.approver", "The user who makes this"),
])
def test_explain_reads_well(namespaced: Kubectl, path: str, words: str) -> None:
    said = " ".join(namespaced("explain", path).split())
    assert words in said
    assert "<no description>" not in said


def test_a_status_of_a_newer_operator_is_refused_in_the_words_that_the_operator_knows(namespaced: Kubectl) -> None:
    """CRDs go first. When they didn't, the operator says so: it goes by these words of the API server's (client.py)."""
    item = sample("modelrollout")
    item["metadata"]["name"] = "newer"
    namespaced("apply", "-f", "-", given=item)
    newer = {k: item[k] for k in ("apiVersion", "kind")} | {"metadata": {"name": "newer"}, "status": {"fieldOfTomorrow": 1}}
    said = namespaced.refused("apply", "--server-side", "--subresource=status", "--validate=false", "-f", "-", given=newer)
    assert "field not declared in schema" in said
    assert "fieldOfTomorrow" in said
