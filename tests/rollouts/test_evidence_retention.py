"""What is removed is never missed: by no gate, by no retraining, at no later time. And what is kept has a bound."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hafnium_rollout_world import START
from hypothesis import given, settings
from hypothesis import strategies as st

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.evidence_retention import MODEL_TESTS_KEPT, OF_TRAFFIC, SLACK, TRAFFIC_KEPT, Asked, Retention, Stored
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.kubernetes.evidence_cache import asked_of, stored
from hafnium_rollout.kubernetes.objects_seen import evidence_seen, finding_seen
from hafnium_rollout.observation import EvidenceUnread
from hafnium_rollout.retraining.policy import RetrainingPolicy, decide_retraining
from hafnium_rollout.status import GateState, GateStatus, ModelSeen, RolloutStatus

HOUR = timedelta(hours=1)
NOW = START + timedelta(days=30)
MODEL, SECOND, FORMER = ("sha256:" + c * 64 for c in "abc")
KINDS = ("drift", "performance", "smoke", "fairness")
VERDICTS = ("Pass", "Fail", "Inconclusive", "NoData", "Error")
Json = dict[str, Any]
Read = tuple[tuple[EvidenceSpec, ...], tuple[EvidenceUnread, ...]]


def item(
    end_h: float, *, digest: str = MODEL, kind: str = "drift", verdict: str = "Pass", length_h: float = 1.0, stored_h: float | None = None,
    ahead_h: float = 0.0, number: int = 0, namespace: str = "risk",
) -> Json:
    """A ModelEvidence whose window ended so many hours before NOW. `stored_h`: when the API server took it, in hours before NOW."""
    end = NOW - end_h * HOUR
    at = end if stored_h is None else NOW - stored_h * HOUR
    name = f"{kind}-{digest[7:15]}-{number}"
    return {"metadata": {"namespace": namespace, "name": name, "uid": f"u{number}-{name}", "resourceVersion": "1",
                         "creationTimestamp": at.isoformat()},
            "spec": {"modelDigest": digest, "kind": kind, "windowStart": (end - length_h * HOUR).isoformat(), "windowEnd": end.isoformat(),
                     "verdict": verdict, "samples": number, "message": f"no {number}", "createdAt": (at + ahead_h * HOUR).isoformat()}}


def rollout_item(digest: str, *gates: Json, run_h: float | None = None, stable: str = "") -> Json:
    running = {} if run_h is None else {"runId": "1", "phase": "Progressing", "startedAt": (NOW - run_h * HOUR).isoformat()}
    models = {"stable": {"digest": stable or digest}, "candidate": {"digest": digest}}
    return {"metadata": {"namespace": "risk", "name": digest[7:15]}, "spec": {"model": {"digest": digest}, "gates": list(gates)},
            "status": {"phase": "Promoted", **models, **running}}


def seen(found: Sequence[Json]) -> list[Stored]:
    return [stored(i, finding_seen(i), i["metadata"]["uid"]) for i in found]


def asked(*rollouts: Json) -> dict[str, list[Asked]]:
    found = [asked_of(r) for r in rollouts]
    return {"risk": [a for a in found if a is not None]}


def without(found: Sequence[Json], surplus: Sequence[Stored]) -> list[Json]:
    gone = {s.uid for s in surplus}
    return [i for i in found if i["metadata"]["uid"] not in gone]


def gate_of(kind: str, age_h: int) -> Gate:
    return Gate.model_validate({"role": "Quality", **raw(kind, age_h)})


def judged(gate: Gate, found: Read, digest: str, now: datetime, since: datetime | None) -> GateStatus:
    read, unread = found
    context = GateContext(
        now=now, shadow=False, weight=5, digest=digest, step_since=since, counts_for_pass=True, counts_for_fail=True, run_since=since,
        alpha_fail=0.01, alpha_limit=0.01, fresh=HOUR)
    before = GateStatus(name=gate.name, role=gate.role, state=GateState(config=gate.config))
    return judge(gate, before, None, read, "", context, unread)


@st.composite
def findings(draw: st.DrawFn, most: int = 30, overlap: bool = True) -> list[Json]:
    """Hourly, daily or any windows about three models, some stored late, some by a clock that is ahead."""
    # Mostly of one kind about one model, else there are seldom more of them than are kept anyway
    about = [draw(st.sampled_from([MODEL, MODEL, SECOND, FORMER]))] * 8 + [MODEL, SECOND, FORMER]
    kinds = [draw(st.sampled_from(["drift", "drift", *KINDS]))] * 8 + [*KINDS]
    verdicts = [draw(st.sampled_from(VERDICTS))] * draw(st.integers(0, 10)) + [*VERDICTS]
    found: list[Json] = []
    for number in range(draw(st.integers(0, most))):
        end = draw(st.integers(-2, 120)) * draw(st.sampled_from([1, 1, 1, 20]))
        length = draw(st.sampled_from([0.5, 1.0, 1.0, 5.0, 30.0])) if overlap else 1.0
        late = draw(st.sampled_from([0.0, 0.0, 0.0, 0.5, 40.0]))
        found.append(item(
            end, digest=draw(st.sampled_from(about)), kind=draw(st.sampled_from(kinds)), verdict=draw(st.sampled_from(verdicts)),
            length_h=length, stored_h=max(0.0, end - late) if draw(st.integers(0, 9)) else end + 3,
            ahead_h=draw(st.sampled_from([0.0, 0.0, 0.0, 30.0])), number=number))
    return found


AGES = st.sampled_from([1, 24, 100, 1000])
GATES = st.sampled_from(["drift", "drift", *KINDS])


def later(found: Sequence[Json], now: datetime) -> list[Json]:
    return [i for i in found if datetime.fromisoformat(i["metadata"]["creationTimestamp"]) <= now]


@settings(max_examples=150, deadline=None)
@given(found=findings(), ages=st.tuples(AGES, AGES), kinds=st.tuples(GATES, GATES),
       run_h=st.none() | st.integers(0, 1500), wait_h=st.sampled_from([0, 1, 30, 500]), newest=st.integers(1, 5))
def test_no_gate_ever_misses_what_was_removed(
    found: list[Json], ages: tuple[int, int], kinds: tuple[str, str], run_h: int | None, wait_h: int, newest: int,
) -> None:
    """Not now and not later, whatever step or run its rollout is in; word for word."""
    rollouts = [rollout_item(MODEL, raw(kinds[0], ages[0]), run_h=run_h), rollout_item(SECOND, raw(kinds[1], ages[1]))]
    kept = without(found, Retention(asked(*rollouts), NOW, newest).surplus(seen(later(found, NOW))))
    at = NOW + wait_h * HOUR
    everything, those_kept = evidence_seen(later(found, at)), evidence_seen(later(kept, at))
    for digest, kind, age in ((MODEL, kinds[0], ages[0]), (SECOND, kinds[1], ages[1])):
        for since in (None, NOW - 2000 * HOUR, NOW - 90 * HOUR, NOW - 3 * HOUR, NOW):
            gate = gate_of(kind, age)
            assert judged(gate, everything, digest, at, since) == judged(gate, those_kept, digest, at, since)


@settings(max_examples=100, deadline=None)
@given(found=findings(), kind=st.sampled_from(KINDS), wait_h=st.sampled_from([0, 1, 30]), age_h=AGES)
def test_nor_does_one_that_comes_later_with_a_model_that_nobody_named_before(
    found: list[Json], kind: str, wait_h: int, age_h: int,
) -> None:
    """Findings about traffic count for it only from its own run on; tests of the model itself are kept for its coming."""
    kept = without(found, Retention(asked(rollout_item(MODEL)), NOW, 1).surplus(seen(later(found, NOW))))
    at = NOW + wait_h * HOUR
    one, other = (judged(gate_of(kind, age_h), evidence_seen(later(x, at)), FORMER, at, NOW) for x in (found, kept))
    if kind in OF_TRAFFIC and (one.verdict, other.verdict) == ("Error", "NoData"):
        return  # one that can't be used and was stored before the run: it holds either way, and no window of the run is in it
    assert (one.verdict, one.samples, one.failures, one.state) == (other.verdict, other.samples, other.failures, other.state)


@settings(max_examples=150, deadline=None)
@given(found=findings(), fails=st.integers(1, 6), more=st.integers(0, 3), kinds=st.sampled_from([("drift",), ("drift", "performance")]),
       wait_h=st.sampled_from([0, 1, 30]), age_h=st.sampled_from([5, 48, 2000]))
def test_a_retraining_is_due_exactly_when_it_would_be_with_everything(
    found: list[Json], fails: int, more: int, kinds: tuple[str, ...], wait_h: int, age_h: int,
) -> None:
    """Neither is a row of Fails cut short, nor does one come about because what broke it is gone."""
    kept = without(found, Retention(asked(rollout_item(MODEL)), NOW, fails + more).surplus(seen(later(found, NOW))))
    at = NOW + wait_h * HOUR
    policy = RetrainingPolicy.model_validate({"policy": "propose", "findings": fails, "kinds": kinds, "maxAge": f"{age_h}h"})
    status = RolloutStatus(phase="Promoted", stable=ModelSeen(service="risk", digest=MODEL, version="1"))

    def due(given: list[Json]) -> Any:
        return decide_retraining(policy, "risk", status, evidence_seen(later(given, at))[0], (), at).attempt

    assert due(found) == due(kept)


@settings(max_examples=100, deadline=None)
@given(found=findings(), newest=st.integers(1, 5), age_h=AGES, parts=st.data())
def test_removing_some_and_then_the_rest_is_removing_all_and_nothing_more_goes(
    found: list[Json], newest: int, age_h: int, parts: st.DataObject,
) -> None:
    retention = Retention(asked(rollout_item(MODEL, raw("drift", age_h)), rollout_item(SECOND)), NOW, newest)
    surplus = retention.surplus(seen(found))
    first = surplus[:parts.draw(st.integers(0, len(surplus)))]
    left = without(found, first)
    assert {s.uid for s in retention.surplus(seen(left))} == {s.uid for s in surplus} - {s.uid for s in first}
    assert retention.surplus(seen(without(found, surplus))) == ()
    assert sorted(surplus, key=lambda s: s.newest_time or NOW) == list(surplus), "oldest first"


@settings(max_examples=100, deadline=None)
@given(found=findings(overlap=False), newest=st.integers(1, 5), age_h=AGES)
def test_what_is_kept_has_a_bound(found: list[Json], newest: int, age_h: int) -> None:
    """Of each kind and model in use the newest, twice at most (those that say something, and any), and what is young."""
    retention = Retention(asked(rollout_item(MODEL, raw("drift", age_h))), NOW, newest)
    kept = seen(without(found, retention.surplus(seen(found))))
    for kind in KINDS:
        for digest in (MODEL, SECOND, FORMER):
            horizon = (TRAFFIC_KEPT if kind in OF_TRAFFIC else MODEL_TESTS_KEPT) + SLACK
            if (kind, digest) == ("drift", MODEL):
                horizon = max(horizon, age_h * HOUR + SLACK)
            old = [s for s in kept if s.kind == kind and s.digest == digest and s.newest_time is not None and NOW - s.newest_time > horizon]
            windows = {s.window_end for s in old}
            unread = [s for s in old if s.window_end is None]
            assert len(windows - {None}) <= (2 * newest if digest == MODEL else 0)
            assert not unread or age_h > 24


def raw(kind: str, age_h: int) -> Json:
    given = {"drift": {"maxAge": f"{age_h}h"}} if kind == "drift" else {"evidence": {"kind": kind, "maxAge": f"{age_h}h"}}
    return {"name": kind, **given}


def hourly(hours: int, **more: Any) -> list[Json]:
    return [item(h, number=h, **more) for h in range(hours)]


def left(found: list[Json], *rollouts: Json, newest: int = 24) -> list[int]:
    return [i["spec"]["samples"] for i in without(found, Retention(asked(*rollouts), NOW, newest).surplus(seen(found)))]


def test_a_year_of_the_hourly_job_comes_down_to_a_day() -> None:
    assert left(hourly(8760), rollout_item(MODEL)) == list(range(26))
    assert left(hourly(8760, verdict="NoData"), rollout_item(MODEL)) == list(range(26))
    assert left(hourly(8760), rollout_item(MODEL), newest=48) == list(range(48))


def test_a_gate_that_allows_more_keeps_more_about_its_own_models_only() -> None:
    found = [*hourly(400), *hourly(400, digest=SECOND)]
    assert left(found, rollout_item(MODEL, raw("drift", 100)), rollout_item(SECOND)) == [*range(102), *range(26)]


def test_a_run_under_way_keeps_all_that_was_found_since_it_began() -> None:
    found = [*hourly(400), *hourly(400, digest=SECOND)]
    assert left(found, rollout_item(MODEL, run_h=200, stable=SECOND)) == [*range(226), *range(226)]


def test_findings_that_say_something_are_kept_behind_any_number_that_do_not() -> None:
    found = [item(h, number=h, verdict="Fail" if h > 100 else "NoData") for h in range(200)]
    assert left(found, rollout_item(MODEL), newest=3) == [*range(26), 101, 102, 103]


def test_windows_that_overlap_count_once() -> None:
    """As for a retraining: else ten looks at the same hours would push out the Fail before them."""
    found = [*(item(30 + h / 10, number=h, verdict="Fail", length_h=5) for h in range(10)), item(40, number=10, verdict="Fail"),
             item(50, number=11, verdict="Fail")]
    assert left(found, rollout_item(MODEL), newest=2) == list(range(11))


def test_of_a_model_that_nobody_names_any_more_only_what_is_young_is_kept() -> None:
    found = [*hourly(100), *hourly(100, kind="smoke"), item(24 * 100, kind="smoke", number=999)]
    assert left(found, rollout_item(SECOND)) == [*range(26), *range(100)]


def test_another_namespaces_rollouts_keep_nothing() -> None:
    assert left(hourly(100, namespace="elsewhere"), rollout_item(MODEL)) == list(range(26))


def test_a_finding_of_which_no_time_is_known_stays() -> None:
    unknown = item(9999)
    del unknown["metadata"]["creationTimestamp"]
    unknown["spec"] = {"kind": "drift", "modelDigest": MODEL}
    assert Retention(asked(rollout_item(MODEL)), NOW, 1).surplus(seen([unknown])) == ()


@pytest.mark.parametrize(("phase", "more", "runs"), [
    ("Progressing", {"runId": "1"}, True), ("Paused", {"runId": "1"}, True), ("Pending", {"runId": "1"}, True),
    ("Promoted", {"runId": "1"}, False), ("RolledBack", {"runId": "1"}, False), ("Pending", {}, False),
    ("RolledBack", {"runId": "1", "rollback": {"reason": "x"}}, True),
])
def test_a_run_is_under_way_until_it_is_promoted_or_back(phase: str, more: Json, runs: bool) -> None:
    rollout = rollout_item(MODEL)
    rollout["status"] |= {"phase": phase, "startedAt": NOW.isoformat(), **more}
    found = asked_of(rollout)
    assert found is not None
    assert (found.run_since is not None) is runs


def test_what_a_model_rollout_asks_for_is_read_also_where_the_rest_cannot_be() -> None:
    found = asked_of({"spec": {"model": {"digest": MODEL}, "gates": [raw("smoke", 48), {"name": "d", "drift": {}}, {"what": "ever"}]}})
    assert found == Asked(frozenset({MODEL}), (("smoke", 48 * HOUR), ("drift", 24 * HOUR)))
    assert asked_of({"spec": {"model": {"digest": MODEL}, "gates": [{"name": "d", "drift": {"maxAge": "soon"}}]}}) is None


def test_a_finding_is_understood_as_it_is() -> None:
    (one,) = seen([item(5, verdict="Fail", number=7)])
    read = finding_seen(item(5, verdict="Fail", number=7))
    assert isinstance(read, EvidenceSpec)
    assert (one.digest, one.kind, one.verdict, one.window_end, one.window_start) == (
        MODEL, "drift", "Fail", read.window_end, read.window_start)
