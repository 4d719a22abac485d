"""CanaryTrafficPercent against KServe's own rules, as they were measured on a cluster, with a crash possible before any write.

The rules (table of facts in the module's docstring) are a model here, so that every order of events can be tried; the real KServe is in
tests/cluster/test_operator_knative.py.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from hafnium_rollout_world import rollout
from hypothesis import given, settings
from hypothesis import strategies as st

from hafnium_rollout.decide import decide
from hafnium_rollout.kubernetes import canary_traffic
from hafnium_rollout.kubernetes.canary_backend import CanaryBackend
from hafnium_rollout.kubernetes.capabilities import findings
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict
from hafnium_rollout.kubernetes.kinds import FIELD_MANAGER
from hafnium_rollout.kubernetes.objects_seen import Meta, PodSeen, meta_of
from hafnium_rollout.kubernetes.observer import Observer
from hafnium_rollout.kubernetes.paired_backend import NotYet
from hafnium_rollout.kubernetes.prometheus_queries import PrometheusLooks
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.status import ModelSeen, RolloutStatus, stored

T0 = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DIGESTS = {n: "sha256:" + n * 64 for n in "abcd"}
READY_TICKS = 2


@dataclass
class Kserve:
    """One InferenceService in Knative mode. `tick` is a reconcile; requests go where `traffic` says."""

    item: dict[str, Any] | None = None
    revisions: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """(name, digest), oldest first."""
    age: int = 0
    latest_ready: str = ""
    rolled_out: str = ""
    previous: str = ""
    traffic: dict[str, int] = field(default_factory=dict[str, int])
    version: int = 0
    template: str = ""
    percent_by: str = ""

    def by_hand(self, **predictor: Any) -> None:
        """Somebody else's write."""
        item = copy.deepcopy(self.item)
        assert item is not None
        item["spec"]["predictor"] = {**item["spec"]["predictor"], **predictor}
        self._written(item, "kubectl-edit")

    def _written(self, item: dict[str, Any], manager: str = FIELD_MANAGER) -> dict[str, Any]:
        self.version += 1
        if self.item is None or canary_traffic.percent_of(item) != canary_traffic.percent_of(self.item):
            self.percent_by = manager  # who writes what is there already owns nothing by that
        owners = [(self.percent_by, "f:canaryTrafficPercent"), (manager, "f:containers")]
        managed = [
            {"manager": m, "operation": "Update", "fieldsV1": {"f:spec": {"f:predictor": {field: {}}}}} for m, field in owners]
        item["metadata"] = {
            **item["metadata"], "uid": "u", "generation": self.version, "resourceVersion": str(self.version), "managedFields": managed}
        self.item = item
        template = json.dumps(canary_traffic.with_percent(item["spec"], None), sort_keys=True)
        if template != self.template:
            self.template = template
            self.revisions.append((f"r{len(self.revisions) + 1}", canary_traffic.template_digest(item)))
            self.age = 0
        return item

    def create(self, _kind: Any, item: dict[str, Any]) -> dict[str, Any]:
        if self.item is not None:
            raise Conflict("exists", status=409)
        return self._written(copy.deepcopy(item))

    def update(self, _kind: Any, item: dict[str, Any]) -> dict[str, Any]:
        if item["metadata"].get("resourceVersion") != str(self.version):
            raise Conflict("modified", status=409)
        return self._written(copy.deepcopy(item))

    def merge(self, _kind: Any, _namespace: str, _name: str, change: dict[str, Any]) -> dict[str, Any]:
        assert self.item is not None
        if change["metadata"]["resourceVersion"] != str(self.version):
            raise Conflict("modified", status=409)
        item = copy.deepcopy(self.item)
        for component, values in change["spec"].items():
            for key, value in values.items():
                if value is None:
                    item["spec"][component].pop(key, None)
                else:
                    item["spec"][component][key] = value
        return self._written(item)

    def tick(self) -> None:
        """What KServe and Knative make of the spec."""
        if self.item is None:
            return
        self.age += 1
        newest = self.revisions[-1][0]
        if self.age >= READY_TICKS:
            self.latest_ready = newest
        if not self.latest_ready:
            return
        percent = canary_traffic.percent_of(self.item)
        if percent is not None and self.rolled_out:
            if percent == 0 and self.latest_ready == newest == self.rolled_out and self.previous:
                # After a full rollout: the first reconcile still names the new one, the second the one before.
                self.traffic = {self.rolled_out: 100}
                self.rolled_out, self.previous = self.previous, self.previous
                return
            self.traffic = {self.rolled_out: 100 - percent}
            self.traffic[self.latest_ready] = self.traffic.get(self.latest_ready, 0) + percent
        else:
            self.traffic = {self.latest_ready: 100}
        self.traffic = {k: v for k, v in self.traffic.items() if v}
        if self.traffic.get(self.latest_ready) == 100 and self.rolled_out != self.latest_ready and percent != 0:
            self.previous, self.rolled_out = self.rolled_out, self.latest_ready

    def snapshot(self) -> Snapshot:
        services: dict[tuple[str, str], Any] = {}
        if self.item is not None:
            part = {"latestCreatedRevision": self.revisions[-1][0], "latestReadyRevision": self.latest_ready,
                    "latestRolledoutRevision": self.rolled_out,
                    "traffic": [{"revisionName": r, "percent": p} for r, p in self.traffic.items()]}
            item = {**copy.deepcopy(self.item), "status": {"components": {"predictor": part}}}
            services[("ns", "risk")] = item
        found = tuple(
            {"metadata": {"name": n, "namespace": "ns", "labels": {"serving.kserve.io/inferenceservice": "risk"},
                          "annotations": {"hafnium.dev/model-digest": d}}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            for n, d in self.revisions)
        # Knative keeps pods of revisions that get requests or are about to; those of others end.
        kept = {*self.traffic, self.latest_ready, self.revisions[-1][0] if self.revisions else ""}
        pods = tuple(PodSeen(f"p-{n}", "risk", "predictor", True, 0, revision=n) for n, _ in self.revisions if n in kept)
        return Snapshot(services=services, pods={("ns", "risk"): pods}, revisions={"ns": found}, evidence={}, approvals={})

    def share(self, digest: str) -> int:
        """Percent of the requests that a model answers."""
        digests = dict(self.revisions)
        return sum(p for r, p in self.traffic.items() if digests[r] == digest)


def spec_of(letter: str, **more: Any) -> ModelRollout:
    return rollout(
        model={"digest": DIGESTS[letter], "version": letter}, routing={"backend": "CanaryTrafficPercent"},
        strategy={"steps": [{"weight": 20, "deadline": "1h"}, {"weight": 100, "minDwell": "10m", "deadline": "1h"}]},
        gates=[{"name": "smoke", "role": "Safety", "evidence": {"kind": "smoke"}}],
        service={"predictor": {"containers": [{"name": "kserve-container", "env": [{"name": "V", "value": letter}]}]}}, **more)


@dataclass
class Cluster:
    kserve: Kserve = field(default_factory=Kserve)
    spec: ModelRollout = field(default_factory=lambda: spec_of("a"))
    status: RolloutStatus = field(default_factory=RolloutStatus)
    now: datetime = T0
    actions: int = 0

    def turn(self, *, crash: bool = False) -> None:
        """Observe, decide, write the status, act; with `crash` the last is cut off."""
        self.now += timedelta(seconds=15)
        self.kserve.tick()
        looks = PrometheusLooks(None, scrape_interval_s=15.0, clock_skew_s_max=5.0)
        backend = CanaryBackend(cast("KubernetesClient", self.kserve), Observer(looks, ScoreLog(""), ServedModels(None, 15.0)))
        snapshot = self.kserve.snapshot()
        meta: Meta = meta_of({"metadata": {"namespace": "ns", "name": "risk"}})
        seen = backend.observe(self.spec, meta, self.status, snapshot, self.now, look=True)
        decision = decide(self.spec, self.status, seen, self.now)
        self.status = RolloutStatus.model_validate(json.loads(json.dumps(stored(decision.status))))
        if crash:
            return
        for action in decision.actions:
            try:
                backend.apply(self.spec, meta, self.status, action, snapshot)
            except (NotYet, Conflict):
                return

    def until(self, phase: str, turns: int = 60) -> None:
        for _ in range(turns):
            self.turn()
            if self.status.phase == phase and self.status.run_id.startswith(self.spec.spec.model.digest[7:15]):
                return
        raise AssertionError(f"{phase}: it is {self.status.phase}: {self.status.message}")

    def ask(self, letter: str, kind: str) -> None:
        self.actions += 1
        self.spec = spec_of(letter, action={"type": kind, "id": f"a-{self.actions}", "candidateDigest": DIGESTS[letter]})

    def at_weight(self, weight: int, turns: int = 30) -> None:
        for _ in range(turns):
            self.turn()
            step = self.status.step
            if step is not None and step.weight_observed == weight and step.weight_effective_since is not None:
                return
        raise AssertionError(f"weight {weight}: {self.status.message}")


def live(letter: str) -> Cluster:
    """A cluster on which the model is stable and nothing is under way."""
    found = Cluster(spec=spec_of(letter))
    found.until("Promoted")
    for _ in range(5):
        found.turn()
    assert found.kserve.share(DIGESTS[letter]) == 100
    return found


def test_the_first_model_gets_everything_and_no_percent() -> None:
    found = live("a")
    assert found.kserve.item is not None
    assert canary_traffic.percent_of(found.kserve.item) is None
    assert found.status.stable is not None
    assert found.status.stable.digest == DIGESTS["a"]


def test_a_candidate_is_dark_until_it_is_ready_and_then_has_its_share() -> None:
    found = live("a")
    found.spec = spec_of("b")
    shares: list[int] = []
    for _ in range(12):
        found.turn()
        shares.append(found.kserve.share(DIGESTS["b"]))
    assert set(shares) == {0, 20}
    assert found.kserve.share(DIGESTS["a"]) == 80


def test_a_rollback_from_a_share_puts_the_template_back_and_never_brings_the_bad_one_up() -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    found.ask("b", "Abort")
    found.until("RolledBack")
    for _ in range(20):
        found.turn()
        assert found.kserve.share(DIGESTS["b"]) == 0
    assert found.kserve.item is not None
    assert canary_traffic.template_digest(found.kserve.item) == DIGESTS["a"]
    assert canary_traffic.percent_of(found.kserve.item) is None, "nothing is left behind"


def test_a_rollback_after_full_traffic_puts_the_template_back_too() -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    found.ask("b", "SkipStep")
    found.at_weight(100)
    assert found.kserve.share(DIGESTS["b"]) == 100
    found.ask("b", "Abort")
    found.until("RolledBack")
    for _ in range(20):
        found.turn()
        assert found.kserve.share(DIGESTS["b"]) == 0
    assert found.kserve.item is not None
    assert canary_traffic.template_digest(found.kserve.item) == DIGESTS["a"]
    assert canary_traffic.percent_of(found.kserve.item) is None


def test_a_promotion_leaves_no_percent_behind_and_the_next_one_starts_from_it() -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    found.ask("b", "SkipStep")
    found.at_weight(100)
    found.ask("b", "SkipStep")
    found.until("Promoted")
    for _ in range(5):
        found.turn()
    assert found.kserve.item is not None
    assert canary_traffic.percent_of(found.kserve.item) is None
    found.spec = spec_of("c")
    found.at_weight(20)
    assert (found.kserve.share(DIGESTS["b"]), found.kserve.share(DIGESTS["c"])) == (80, 20)
    found.ask("c", "Abort")
    found.until("RolledBack")
    assert found.kserve.share(DIGESTS["b"]) == 100


def test_a_new_candidate_at_a_share_comes_in_dark() -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    found.spec = spec_of("c")
    for _ in range(20):
        found.turn()
        assert found.kserve.share(DIGESTS["c"]) in (0, 20)
        assert found.kserve.share(DIGESTS["a"]) >= 80
    assert found.kserve.share(DIGESTS["b"]) == 0
    assert found.kserve.share(DIGESTS["c"]) == 20


@settings(max_examples=25, deadline=None)
@given(crashes=st.lists(st.booleans(), min_size=25, max_size=25), abort_after=st.integers(0, 20))
def test_whatever_write_is_cut_off_the_bad_model_never_gets_more_than_was_wanted(crashes: list[bool], abort_after: int) -> None:
    found = live("a")
    found.spec = spec_of("b")
    for i, crash in enumerate(crashes):
        if i == abort_after:
            found.ask("b", "Abort")
        found.turn(crash=crash)
        assert found.kserve.share(DIGESTS["b"]) in (0, 20)
        assert found.kserve.share(DIGESTS["a"]) + found.kserve.share(DIGESTS["b"]) == 100
    if DIGESTS["b"] not in found.status.rejected_digests:
        found.ask("b", "Abort")  # the first one came before there was anything to abort
        found.until("RolledBack")
    for _ in range(10):
        found.turn()
    assert found.kserve.share(DIGESTS["a"]) == 100
    assert found.kserve.item is not None
    assert canary_traffic.percent_of(found.kserve.item) is None


@pytest.mark.parametrize(("mine", "theirs"), [(20, 50), (20, 100)])
def test_a_strangers_percent_is_put_back(mine: int, theirs: int) -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(mine)
    found.kserve.by_hand(canaryTrafficPercent=theirs)
    found.turn()
    assert found.kserve.item is not None
    assert canary_traffic.percent_of(found.kserve.item) == mine
    assert any(p.event == "ExternalChange" for p in found.status.history)


def test_a_percent_that_a_stranger_takes_to_zero_is_an_abort() -> None:
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    found.kserve.by_hand(canaryTrafficPercent=0)
    found.until("RolledBack")
    assert found.status.reason == "AbortedOutside"
    assert found.status.message.startswith("kubectl-edit (Update) took the candidate's weight from 20 to 0")
    assert found.status.rejected_digests == (DIGESTS["b"],)


def anothers_template(found: Cluster) -> None:
    found.kserve.by_hand(
        annotations={"hafnium.dev/model-digest": DIGESTS["d"]},
        containers=[{"name": "kserve-container", "env": [{"name": "V", "value": "d"}]}])


@pytest.mark.parametrize("every", [1, 2, 4, 6], ids=lambda n: f"every {n} looks")
def test_who_writes_another_template_again_and_again_is_told_of_and_left_alone_after_three_times(every: int) -> None:
    """Sooner than the candidate is ready again (it is back at our own 0 % then), or later."""
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    for i in range(3 * every):
        if i % every == 0:
            anothers_template(found)
        found.turn()
    assert [p.event for p in found.status.history].count("ExternalChange") == 3
    assert (found.status.phase, found.status.reason) == ("Paused", "ExternalChange")
    assert found.status.message.startswith("kubectl-edit")
    assert "left as it is" in found.status.message
    before = len(found.kserve.revisions)
    for _ in range(20):
        found.turn()
    assert found.kserve.item is not None
    assert (canary_traffic.template_digest(found.kserve.item), len(found.kserve.revisions)) == (DIGESTS["d"], before)
    found.ask("b", "Retry")
    found.at_weight(20)
    assert (found.kserve.share(DIGESTS["a"]), found.kserve.share(DIGESTS["b"])) == (80, 20)


def test_a_candidate_that_is_brought_in_again_after_a_strangers_template_is_not_aborted() -> None:
    """It comes in at 0 %, which is our own write and no person's word."""
    found = live("a")
    found.spec = spec_of("b")
    found.at_weight(20)
    anothers_template(found)
    for _ in range(20):
        found.turn()
        assert found.status.phase == "Progressing", found.status.message
    found.at_weight(20)
    assert (found.kserve.share(DIGESTS["a"]), found.kserve.share(DIGESTS["b"])) == (80, 20)
    assert [p.event for p in found.status.history].count("ExternalChange") == 1


# --- taking over a service that is there already --------------------------------------------------------------------------------


def _taken_over(item: dict[str, Any], status: RolloutStatus = RolloutStatus()) -> list[str]:
    seen = Snapshot(services={("ns", "risk"): item}, revisions={}, pods={}, evidence={}, approvals={})
    spec = rollout(routing={"backend": "CanaryTrafficPercent"}, strategy={"steps": [{"weight": 20}, {"weight": 100}]})
    return [f.reason for f in findings(spec, "ns", seen, Settings(prometheus_url="http://prometheus"), status=status) if f.refuses]


def _item(*, percent: int | None = None, created: str = "r2", ready: str = "r2", traffic: dict[str, int] | None = None) -> dict[str, Any]:
    predictor: dict[str, Any] = {"model": {}} | ({"canaryTrafficPercent": percent} if percent is not None else {})
    shares = [{"revisionName": n, "percent": p} for n, p in (traffic if traffic is not None else {"r2": 100}).items()]
    return {"metadata": {"name": "risk", "namespace": "ns"}, "spec": {"predictor": predictor}, "status": {
        "deploymentMode": "Knative", "components": {"predictor": {
            "latestCreatedRevision": created, "latestReadyRevision": ready, "traffic": shares}}}}


def test_a_service_at_rest_is_taken_over() -> None:
    assert _taken_over(_item()) == []
    assert _taken_over(_item(traffic={"r2": 100, "r1": 0})) == [], "an old revision without requests is at rest"


@pytest.mark.parametrize("item", [
    _item(percent=20, traffic={"r1": 80, "r2": 20}), _item(percent=0, traffic={"r1": 100}), _item(percent=100),
    _item(created="r3"), _item(created="", ready=""), _item(traffic={"r1": 80, "r2": 20}), _item(traffic={"r1": 100}), _item(traffic={}),
], ids=["a canary", "taken back but still armed", "all of it, by a percent", "a revision that comes up", "no revision yet",
        "two answer", "an older one answers", "nobody answers"])
def test_a_service_in_the_middle_of_another_change_is_not_taken_over(item: dict[str, Any]) -> None:
    assert _taken_over(item) == ["NotAtRest"]


def test_what_this_rollout_does_itself_is_no_other_change() -> None:
    """Also when it is the first: its own service comes up, or was taken over and is at 0 %."""
    item = _item(percent=0, traffic={"r1": 100})
    assert _taken_over(item, RolloutStatus(run_id="aaaaaaaa-1")) == []
    assert _taken_over(item, RolloutStatus(stable=ModelSeen(service="risk"))) == []
