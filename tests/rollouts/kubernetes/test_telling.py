"""How the operator tells what it does: conditions, events, metrics, health, settings."""

from __future__ import annotations

import http.client
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hafnium_rollout_world import CANDIDATE, START, World, rollout
from hafnium_scripted_api import data, says, scripted_api
from prometheus_client.parser import text_string_to_metric_families

from hafnium_contract import metric_names
from hafnium_contract.errors import InputError
from hafnium_rollout.actions import Event
from hafnium_rollout.kubernetes.capabilities import Finding
from hafnium_rollout.kubernetes.conditions import accepted, invalid, with_condition
from hafnium_rollout.kubernetes.events import kubernetes_event, record
from hafnium_rollout.kubernetes.health import HealthServer
from hafnium_rollout.kubernetes.kinds import HTTP_ROUTE, INFERENCE_SERVICE, MODEL_ROLLOUT
from hafnium_rollout.kubernetes.metrics import Metrics
from hafnium_rollout.kubernetes.objects_seen import meta_of, status_of
from hafnium_rollout.kubernetes.settings import parse_settings
from hafnium_rollout.kubernetes.watches import ALL_OF, Watches, touched
from hafnium_rollout.objects import UserAction
from hafnium_rollout.status import RolloutStatus

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ITEM = json.loads((Path(__file__).parent / "fixtures/modelrollout_rolledback.json").read_text(encoding="utf-8"))


# --- conditions ---------------------------------------------------------------------------------------------------------------


def test_a_finding_that_refuses_makes_the_condition_false_and_says_everything() -> None:
    found = accepted([Finding("A", "no gateway"), Finding("B", "no CRD", refuses=False)], 7, NOW)
    assert (found.status, found.reason, found.observed_generation) == ("False", "A", 7)
    assert found.message == "no gateway; no CRD"


def test_a_finding_that_does_not_refuse_is_said_and_leaves_it_true() -> None:
    found = accepted([Finding("B", "no CRD", refuses=False)], 7, NOW)
    assert (found.status, found.reason) == ("True", "B")


def test_a_condition_that_stays_keeps_its_time_so_that_nothing_is_written() -> None:
    first = with_condition(RolloutStatus(), RolloutStatus(), accepted([], 1, NOW))
    second = with_condition(first, first, accepted([], 1, NOW + timedelta(hours=1)))
    assert second == first
    third = with_condition(second, second, invalid("what is this", 2, NOW + timedelta(hours=2)))
    assert third.conditions[0].last_transition_time == NOW + timedelta(hours=2)


# --- events -------------------------------------------------------------------------------------------------------------------


def test_the_same_event_has_the_same_name_so_a_repeated_turn_tells_it_once() -> None:
    meta = meta_of(ITEM)
    event = Event("Rollback", "GateFailed", "too many errors", alert=True)
    first, again = kubernetes_event(meta, event, NOW, "me"), kubernetes_event(meta, event, NOW, "another")
    assert first["metadata"]["name"] == again["metadata"]["name"]
    assert first["metadata"]["name"] != kubernetes_event(meta, event, NOW + timedelta(seconds=1), "me")["metadata"]["name"]
    assert (first["type"], first["reason"], first["involvedObject"]["uid"]) == ("Warning", "Rollback", meta.uid)


def test_a_long_message_is_cut_to_what_the_api_server_takes() -> None:
    text = kubernetes_event(meta_of(ITEM), Event("A", "B", "≥" * 2000), NOW, "me")["message"]
    assert len(text.encode()) <= 1024


def test_an_event_that_cannot_be_written_stops_nothing() -> None:
    with scripted_api(says(409, "already exists"), says(403, "no")) as api:
        assert record(api.client(), meta_of(ITEM), Event("A", "B", "c"), NOW, "me") == ""
        assert "no (403)" in record(api.client(), meta_of(ITEM), Event("A", "B", "c"), NOW, "me")


# --- metrics ------------------------------------------------------------------------------------------------------------------

ROLLOUT_METRICS = {m.name for m in metric_names.ALL if m.name.startswith("modelrollout_")}


def _families(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    out: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            out.setdefault(sample.name, {})[tuple(v for _, v in sorted(sample.labels.items()))] = sample.value
    return out


def _under_way() -> World:
    world = World(bad_candidate=0.0)
    world.until_step(1)
    for _ in range(5):
        world.turn()
    return world


def test_every_metric_is_one_that_is_declared_with_its_labels() -> None:
    world, metrics = _under_way(), Metrics(lambda: START)
    metrics.leads(True)
    metrics.turned(("ns", "risk"), world.spec, world.status, "Unavailable", 1, 3.0)
    found = {f.name + ("_total" if f.type == "counter" else ""): f for f in text_string_to_metric_families(metrics.exposition().decode())}
    assert set(found) == ROLLOUT_METRICS
    declared = {m.name: m for m in metric_names.ALL}
    for name, family in found.items():
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(declared[name].labels), name


def test_weights_gates_and_phase_as_the_status_has_them() -> None:
    world, metrics = _under_way(), Metrics(lambda: START)
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 0, None)
    found = _families(metrics)
    assert found["modelrollout_weight"] == {("desired", "ns", "risk"): 5.0, ("observed", "ns", "risk"): 5.0}
    assert found["modelrollout_phase"][("ns", "Progressing", "risk")] == 1.0
    assert sum(found["modelrollout_phase"].values()) == 1.0
    gate = world.status.gates[0]
    assert found["modelrollout_gate_verdict"][("errors", "ns", "Safety", "risk", gate.verdict)] == 1.0
    assert found["modelrollout_gate_samples"][("errors", "ns", "risk")] == gate.samples


def test_a_rollback_that_is_not_seen_to_be_done_wants_no_weight_and_says_for_how_long() -> None:
    """HafniumRolloutWeightStuck and HafniumRolloutRollbackUnconfirmed go by these."""
    world, metrics = _under_way(), Metrics(lambda: world.now)
    world.stray = 5
    world.actions = (UserAction(type="Abort", id="a", candidate_digest=CANDIDATE),)
    asked = world.now + timedelta(seconds=2)
    for _ in range(20):
        world.turn()
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 0, None)
    found = _families(metrics)
    assert found["modelrollout_weight"][("desired", "ns", "risk")] == 0.0
    assert found["modelrollout_rollback_unconfirmed_seconds"][("ns", "risk")] == (world.now - asked).total_seconds() > 0


def test_a_weight_that_is_not_seen_is_absent_and_not_zero() -> None:
    world, metrics = _under_way(), Metrics(lambda: START)
    assert world.status.step is not None
    status = world.status.model_copy(update={"step": world.status.step.model_copy(update={"weight_observed": None})})
    metrics.turned(("ns", "risk"), world.spec, status, "", 0, None)
    assert set(_families(metrics)["modelrollout_weight"]) == {("desired", "ns", "risk")}


def test_blindness_is_counted_from_the_last_data() -> None:
    world, metrics = _under_way(), Metrics(lambda: world.now)
    world.blind = True
    for _ in range(30):
        world.turn()
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 0, None)
    assert world.status.gates[0].verdict == "NoData"
    assert _families(metrics)["modelrollout_blind_seconds"][("errors", "ns", "risk")] > 20


def test_a_gate_that_waits_for_a_person_after_a_doubt_is_not_blind() -> None:
    world, metrics = _under_way(), Metrics(lambda: world.now + timedelta(days=1))
    step = world.status.step
    assert step is not None
    gates = tuple(g.model_copy(update={"verdict": "Error"}) for g in world.status.gates)
    status = world.status.model_copy(update={"gates": gates, "phase": "Paused", "sample_ratio_message": "in doubt"})
    metrics.turned(("ns", "risk"), world.spec, status, "", 0, None)
    assert _families(metrics)["modelrollout_blind_seconds"][("errors", "ns", "risk")] > 0, "it has traffic, and nobody can judge it"
    status = status.model_copy(update={"step": step.model_copy(update={"weight_desired": 0})})
    metrics.turned(("ns", "risk"), world.spec, status, "", 0, None)
    assert _families(metrics)["modelrollout_blind_seconds"][("errors", "ns", "risk")] == 0.0


def test_how_long_each_turn_has_ended_in_an_error_is_told_of_all_rollouts_and_of_those_under_way() -> None:
    """HafniumOperatorFailing goes by it."""
    now = [START]
    world, metrics = _under_way(), Metrics(lambda: now[0])
    metrics.leads(True)
    resting = world.status.model_copy(update={"step": None, "rollback": None, "phase": "Promoted"})
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 0, None)
    metrics.turned(("ns", "rests"), world.spec, resting, "", 0, None)
    for _ in range(3):  # since the first of them
        for name in ("risk", "rests", "never-read"):
            metrics.turned(("ns", name), None, None, "Forbidden", 0, None)
        metrics.failed("Unavailable")
        now[0] += timedelta(seconds=100)
    assert _families(metrics)["modelrollout_failing_seconds"] == {
        ("", ""): 300.0, ("ns", "risk"): 300.0, ("ns", "rests"): 0.0, ("ns", "never-read"): 300.0}
    metrics.listed()
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 0, None)
    metrics.keep({("ns", "risk")})
    assert _families(metrics)["modelrollout_failing_seconds"] == {("", ""): 0.0, ("ns", "risk"): 0.0}
    metrics.failed("Unavailable")
    metrics.leads(False)
    assert "modelrollout_failing_seconds" not in _families(metrics)


def test_a_rollout_that_is_gone_and_a_process_that_leads_no_more_leave_no_series() -> None:
    world, metrics = _under_way(), Metrics(lambda: START)
    metrics.leads(True)
    metrics.turned(("ns", "risk"), world.spec, world.status, "", 2, None)
    metrics.turned(("ns", "gone"), world.spec, world.status, "", 0, None)
    metrics.keep({("ns", "risk")})
    assert "gone" not in metrics.exposition().decode()
    assert _families(metrics)["modelrollout_external_change_total"] == {("ns", "risk"): 2.0}
    metrics.leads(False)
    assert "modelrollout_phase{" not in metrics.exposition().decode()
    assert _families(metrics)["modelrollout_leader"] == {(): 0.0}


# --- health -------------------------------------------------------------------------------------------------------------------


def test_health_says_why_not() -> None:
    why = {"live": "", "ready": "no CRD"}
    server = HealthServer("127.0.0.1", 0, lambda: why["live"], lambda: why["ready"], lambda: b"x 1\n")
    try:
        def get(path: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert get("/health/live") == (200, b"ok\n")
        assert get("/health/ready") == (503, b"no CRD\n")
        assert get("/metrics?x=1") == (200, b"x 1\n")
        assert get("/")[0] == 404
    finally:
        server.close()


# --- watches ------------------------------------------------------------------------------------------------------------------


def test_our_own_status_writes_wake_nobody() -> None:
    generations: dict[tuple[str, str], tuple[int, bool]] = {}
    meta = meta_of(ITEM)
    assert Watches._news(MODEL_ROLLOUT, meta, "ADDED", generations)
    assert not Watches._news(MODEL_ROLLOUT, meta, "MODIFIED", generations)
    changed = meta_of({**ITEM, "metadata": {**ITEM["metadata"], "generation": meta.generation + 1}})
    assert Watches._news(MODEL_ROLLOUT, changed, "MODIFIED", generations)
    going = meta_of({**ITEM, "metadata": {**ITEM["metadata"], "generation": meta.generation + 1, "deletionTimestamp": "now"}})
    assert Watches._news(MODEL_ROLLOUT, going, "MODIFIED", generations)


def test_a_change_wakes_the_rollout_that_it_is_about() -> None:
    def meta(labels: dict[str, str]) -> dict[str, object]:
        return {"metadata": {"namespace": "ns", "name": "x", "labels": labels}}

    assert touched(HTTP_ROUTE, meta_of(meta({}))) == ("ns", "x")
    assert touched(INFERENCE_SERVICE, meta_of(meta({"hafnium.dev/rollout": "risk"}))) == ("ns", "risk")
    assert touched(INFERENCE_SERVICE, meta_of(meta({}))) == ("ns", ALL_OF)


# --- settings -----------------------------------------------------------------------------------------------------------------


def test_the_command_line_comes_before_the_environment() -> None:
    env = {"HAFNIUM_OPERATOR_LOOK_S": "30", "HAFNIUM_OPERATOR_THREADS": "2"}
    found = parse_settings(["--look-s", "5", "--lease_duration_s=20"], env)
    assert (found.look_s, found.threads, found.lease_duration_s) == (5.0, 2, 20.0)


@pytest.mark.parametrize(("arguments", "says_what"), [
    (["--look_s=soon"], "--look_s .*HAFNIUM_OPERATOR_LOOK_S.*'soon'"),
    (["--gateway=mine"], "--gateway"),
    (["--prometheus_url=prometheus:9090"], "--prometheus_url"),
    (["--prometheus_url=http://user:word@prometheus:9090"], "--prometheus_url"),
    (["--inference_log=s3://key:word@bucket/log"], "--inference_log"),
    (["--lease_renew_deadline_s=15"], "lease_renew_deadline_s must be below lease_duration_s, else two may write at once"),
    (["--lease_retry_s=12"], "lease_retry_s must be below"),
])
def test_a_setting_that_cannot_work_is_said_at_the_start(arguments: list[str], says_what: str) -> None:
    with pytest.raises(InputError, match=says_what):
        parse_settings(arguments, {})


def test_the_fixture_is_a_status_that_this_version_reads() -> None:
    assert status_of(ITEM).phase == "RolledBack"
    assert rollout().name == "risk"
    with scripted_api(data(ITEM)) as api:
        assert api.client().get(MODEL_ROLLOUT, "op-try2", "live")["kind"] == "ModelRollout"
