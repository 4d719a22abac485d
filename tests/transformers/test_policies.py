"""What is done about a value that is missing, stale or unusable, by the contract's policy. Real Feast, real predictor."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import numpy as np
import pytest
from hafnium_servers import Server, make_feature_repo, predictor
from prometheus_client import CollectorRegistry

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.serving.json_log import Sampled
from hafnium_testing import make_bundle
from hafnium_transformer.admission import Admission
from hafnium_transformer.errors import LookedUpError, OverloadedError, RowInvalidError, ScoringError, StoreSilentError, UnavailableError
from hafnium_transformer.gate import Gate
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.online_store.feast import FeastReader, SdkStore
from hafnium_transformer.plan import ENTITY_TEXT, make_plan
from hafnium_transformer.predictor_client import Deadline, HopLimits, PredictorClient
from hafnium_transformer.row_encoding import check_derived
from hafnium_transformer.rows import NOTHING
from hafnium_transformer.scoring import Context, Scorer
from hafnium_transformer.settings import Settings

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


def number(name: str, missing: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": name, "dtype": "float", "range": [0, 100], "missing": missing, **more}


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return parse_contract({
        "schemaVersion": 1, "name": "policies", "version": "1", "owner": "o", "description": "d",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "1d"}},
        "entities": [{"name": "card", "joinKey": "card_id"}],
        "views": [{"name": "usage", "entity": "card", "maxAge": "2h"}],
        "features": [
            number("amount", "reject"), number("risk", "degrade"), number("age", "impute"),
            number("must", "reject", source={"view": "usage", "field": "must"}),
            number("may", "impute", source={"view": "usage", "field": "may"}),
            number("said", "degrade", source={"view": "usage", "field": "said"}, maxAge="10h"),
            number("share", "reject", outOfRange="clamp", source={"derived": {"operation": "ratio", "inputs": ["amount", "must"]}}),
            number("own", "degrade", outOfRange="clamp", source={"derived": {"operation": "ratio", "inputs": ["amount", "age"]}}),
        ],
        "decision": {"threshold": 0.5},
    })


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, contract: ModelContract) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("policies")
    bundle = make_bundle(folder / "b", contract)
    fresh, old, older = NOW - HOUR, NOW - 3 * HOUR, NOW - 11 * HOUR

    def row(card: str, when: datetime, must: Any = 1.0, may: Any = 2.0, said: Any = 3.0) -> dict[str, Any]:
        return {"card_id": card, "event_timestamp": when, "must": must, "may": may, "said": said}

    make_feature_repo(folder / "repo", contract, {"usage": [
        row("fresh", fresh), row("old", old), row("older", older), row("no-must", fresh, must=None),
        row("no-may", fresh, may=None), row("no-said", fresh, said=None), row("bad-may", fresh, may=101.0),
        row("bad-must", fresh, must=-1.0), row("zero", fresh, must=0.0),
        row("zero-no-said", fresh, must=0.0, said=None),
    ]})
    with predictor(bundle.path, folder) as running:
        running.wait()
        yield running


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> TransformerMetrics:
    return TransformerMetrics(registry)


@pytest.fixture(params=["direct", "sdk"])
async def scorer(server: Server, metrics: TransformerMetrics, request: pytest.FixtureRequest) -> AsyncIterator[Scorer]:
    settings = Settings(model_name="m", predictor_host=f"127.0.0.1:{server.port}", lookup_timeout_ms=10_000)
    client = PredictorClient(settings.predictor_host, "m", tls=False, limits=HopLimits())
    made = Scorer(settings, client, metrics, None, clock=lambda: NOW)
    with pytest.raises(UnavailableError, match="--feature_repo"):
        await made.refresh(None)
    reader = FeastReader(server.log_path.parent / "repo")
    store = reader.direct_store(rows_max=100) if request.param == "direct" else None
    made.use_store(reader, store or SdkStore(reader, threads=1, rows_max=100, queue_rows_max=1000))
    await made.refresh(None)
    yield made
    made.close()
    client.close()


def context() -> Context:
    return Context("id", "stable", Deadline.after_ms(20_000), time.perf_counter(), b"")


def asked(card: str = "fresh", **features: Any) -> dict[str, Any]:
    return {"entity": {"card_id": card}, "features": {"amount": 10, "risk": 1, "age": 2, **features}}


@pytest.mark.parametrize(("row", "degraded"), [
    (asked(), []),
    (asked(risk=None), ["risk"]),
    (asked(age=None), ["own"]),
    (asked("no-may"), []),
    (asked("no-said"), ["said"]),
    (asked("bad-may"), ["may"]),
    ({**asked("old"), "event_time": (NOW - 2 * HOUR).isoformat()}, []),
], ids=["all there", "request field degrades", "derived input degrades", "missing is imputed in silence",
        "missing degrades", "unusable is said whatever the policy", "age counts at the event's time"])
async def test_row_is_scored_and_says_what_was_degraded(scorer: Scorer, row: dict[str, Any], degraded: list[str]) -> None:
    result = (await scorer.score([row], context()))[0]
    assert not isinstance(result, ScoringError), result
    assert result["degraded"] == degraded


@pytest.mark.parametrize(("card", "path", "said"), [
    ("no-must", "usage.must", "has no value for card_id 'no-must'"),
    ("nobody", "usage.must", "has no value for card_id 'nobody'"),
    ("old", "usage.must", "is 10800 s old at the event's time, the contract allows 7200 s"),
    ("bad-must", "usage.must", "is not usable: expected a value from 0 to 100"),
    ("zero", "share", "can't be computed"),
])
async def test_looked_up_value_that_is_demanded_ends_as_503_and_names_the_view(
    scorer: Scorer, card: str, path: str, said: str,
) -> None:
    result = (await scorer.score([asked(card)], context()))[0]
    assert isinstance(result, LookedUpError)
    assert result.status == 503
    assert "view usage" in result.detail
    assert result.problems[0].path == path
    assert said in result.problems[0].message


class _SilentStore:
    async def read(self, *_: Any) -> Any:
        raise UnavailableError("gone")

    read_columns = read

    def close(self) -> None:
        """There is nothing."""


@pytest.mark.parametrize("rows", [1, 100], ids=["one row", "columns"])
async def test_rows_that_a_silent_store_refuses_have_a_title_of_their_own_since_that_may_pass(
    scorer: Scorer, metrics: TransformerMetrics, rows: int,
) -> None:
    async def titles(card: str) -> set[str]:
        _, answer = await answered(scorer, metrics, "/v1/score/batch", {"requests": [asked(card)] * rows})
        return {r["title"] for r in answer["results"]}

    assert await titles("no-must") == await titles("old") == await titles("zero") == {"Feature not available"}
    scorer.use_store(cast(Any, None), cast(Any, _SilentStore()))
    assert await titles("fresh") == {"Feature store does not answer"}
    columns = [float("nan") if f.name == "share" else 1.0 for f in scorer.plan.contract.inputs]
    with pytest.raises(StoreSilentError, match="share can't be computed"):
        check_derived(scorer.plan, NOTHING, np.array(columns, np.float32), silent=True)


@pytest.mark.parametrize("rows", [1, 100], ids=["one row", "columns"])
@pytest.mark.parametrize(("card", "missing"), [
    ("no-must", {"must", "risk"}), ("zero-no-said", {"share", "said", "risk"}),
], ids=["looked-up input", "derived input"])
async def test_a_refused_rows_missing_values_are_counted_all(
    scorer: Scorer, registry: CollectorRegistry, card: str, missing: set[str], rows: int,
) -> None:
    results = await scorer.score([asked(card, risk=None)] * rows, context(), [""] * rows)
    assert all(isinstance(r, LookedUpError) for r in results)
    counted = {s.labels["feature_name"]: s.value for m in registry.collect() for s in m.samples if s.name == "feature_missing_total"}
    assert counted == dict.fromkeys(missing, float(rows))


async def test_a_value_from_after_the_event_is_as_good_as_missing(scorer: Scorer) -> None:
    before = {**asked(), "event_time": (NOW - 2 * HOUR).isoformat()}  # its values are an hour old now, so an hour too young then
    result = (await scorer.score([before], context()))[0]
    assert isinstance(result, LookedUpError)
    assert "from 3600 s after the event" in result.problems[0].message


@pytest.mark.parametrize("rows", [1, 100], ids=["one row", "columns"])
async def test_how_old_a_views_values_are_is_told_by_the_servers_clock_whatever_time_a_caller_gives(
    scorer: Scorer, registry: CollectorRegistry, rows: int,
) -> None:
    for event_time in (NOW + timedelta(days=36500), NOW - timedelta(minutes=30), NOW):
        await scorer.score([{**asked(), "event_time": event_time.isoformat()}] * rows, context(), [""] * rows)
        assert registry.get_sample_value("feature_staleness_seconds", {"view": "usage"}) == 3600.0


async def test_missing_values_and_the_rows_that_they_are_a_share_of_are_counted_by_model(
    scorer: Scorer, registry: CollectorRegistry,
) -> None:
    rows = [asked("fresh"), asked("no-must"), asked("fresh", amount=None), asked("no-may"), asked(risk=None)]
    await scorer.score(rows, context(), [f"r[{i}]" for i in range(5)])
    model = {"model_name": scorer.plan.contract.name}
    assert registry.get_sample_value("feature_rows_total", model) == 4  # the caller's mistake never got as far
    for feature, count in (("must", 1), ("risk", 1)):
        assert registry.get_sample_value("feature_missing_total", {**model, "feature_name": feature}) == count


async def test_bad_rows_of_a_batch_leave_the_others_their_own_values(scorer: Scorer) -> None:
    rows = [asked("fresh"), asked("no-must"), asked("fresh", amount=None), asked("zero"), asked("no-may", amount=90)]
    results = await scorer.score(rows, context(), [f"r[{i}]" for i in range(5)])
    assert [type(r) for r in results] == [dict, LookedUpError, RowInvalidError, LookedUpError, dict]
    alone = [(await scorer.score([rows[k]], context()))[0] for k in (0, 4)]
    assert isinstance(alone[0], dict)
    assert isinstance(alone[1], dict)
    assert [{**r, "request_id": ""} for r in results if isinstance(r, dict)] == \
        [{**r, "request_id": ""} for r in alone if isinstance(r, dict)]


async def answered(scorer: Scorer, metrics: TransformerMetrics, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of the gate's answer."""

    async def inner(*_: Any) -> None:
        raise AssertionError("not the SDK's")

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    settings = Settings(model_name="m", predictor_host="127.0.0.1:1", deadline_ms=20_000)
    gate = Gate(inner, scorer, Admission(settings, metrics), metrics, settings)
    await gate({"type": "http", "path": path, "method": "POST", "headers": [], "client": ("a", 1)}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


GOOD, NOT_THERE, BAD = asked(), asked("nobody"), asked(amount=None)


@pytest.mark.parametrize(("rows", "of_rows", "of_requests"), [
    ([NOT_THERE] * 20, {"feature_unavailable": 20}, {"feature_unavailable": 1}),
    ([BAD] * 3, {"invalid_row": 3}, {"invalid_row": 1}),
    ([BAD, BAD, NOT_THERE], {"invalid_row": 2, "feature_unavailable": 1}, {"feature_unavailable": 1}),
    ([NOT_THERE, GOOD, BAD], {"invalid_row": 1, "feature_unavailable": 1}, {}),
    ([GOOD, GOOD], {}, {}),
], ids=["all 503", "all 422", "no score, and one 503", "one has a score", "all have one"])
async def test_a_batch_without_a_score_counts_as_an_error_and_each_failed_row_by_itself(
    scorer: Scorer, metrics: TransformerMetrics, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], of_rows: dict[str, int], of_requests: dict[str, int],
) -> None:
    monkeypatch.setattr("hafnium_transformer.gate.FAILURES", Sampled(logging.getLogger("hafnium.transformer"), 1000.0))
    status, body = await answered(scorer, metrics, "/v1/score/batch", {"requests": rows})
    assert (status, len(body["results"])) == (200, len(rows))

    def by_type(name: str) -> dict[str, float]:
        return {s.labels["type"]: s.value for family in registry.collect() for s in family.samples if s.name == name}

    assert by_type("inference_row_errors_total") == of_rows
    assert by_type("inference_errors_total") == of_requests
    ours = of_rows.get("feature_unavailable", 0)
    lines = [r.message for r in caplog.records if "5xx" in r.message]
    assert lines == ([f"answered 200, but 5xx for {ours} of {len(rows)} rows"] if ours else [])


DERIVED = asked("zero")


@pytest.mark.parametrize("bad", [BAD, NOT_THERE, DERIVED], ids=["of the caller", "of the store", "of what is derived"])
@pytest.mark.parametrize("rows", [3, 30], ids=["one by one", "columns"])
async def test_a_request_that_one_row_spoils_is_refused_before_any_of_its_rows_is_scored(
    scorer: Scorer, metrics: TransformerMetrics, registry: CollectorRegistry, bad: dict[str, Any], rows: int,
) -> None:
    """V1 and V2 have no errors of rows. A score that nobody got is in no log and in no count that gates look at."""
    asked_rows = [GOOD] * (rows - 2) + [bad, GOOD]
    with pytest.raises(ScoringError) as spoiled:
        await scorer.score_all(asked_rows, context(), [f"rows[{i}]" for i in range(rows)])
    assert type(spoiled.value) is (RowInvalidError if bad is BAD else LookedUpError)
    status, _ = await answered(scorer, metrics, "/v1/models/m:predict", {"instances": asked_rows})
    assert status == spoiled.value.status
    assert predicted(registry) == 0
    seen = registry.get_sample_value("feature_rows_total", {"model_name": scorer.plan.contract.name}) or 0
    assert seen == (0 if bad is BAD else 2 * rows), "all rows of the two requests, or one row of many were 100 %"
    assert len(await scorer.score_all([GOOD] * rows, context(), [""] * rows)) == rows
    assert predicted(registry) == rows


def predicted(registry: CollectorRegistry) -> float:
    return sum(s.value for f in registry.collect() for s in f.samples if s.name == "model_predictions_total")


async def test_each_feature_keeps_its_own_age_limit(scorer: Scorer, server: Server) -> None:
    reader = FeastReader(server.log_path.parent / "repo")
    plan = scorer.plan
    assert plan.entity_types == {"card_id": ENTITY_TEXT}
    found = reader.read(plan, [{"card_id": "older"}, {"card_id": "nobody"}])
    assert found[1] == {}
    assert {k: v[0] for k, v in found[0].items()} == {"usage__must": 1.0, "usage__may": 2.0, "usage__said": 3.0}
    limits = {f.feature.name: f.max_age_s for f in plan.views[0].features}
    assert limits == {"must": 7200.0, "may": 7200.0, "said": 36000.0}


class _Counting:
    """A reader that answers with the entity itself and remembers the sizes of its batches."""

    def __init__(self, fail: bool = False) -> None:
        self.batches: list[int] = []
        self.fail = fail

    def entity_types(self, plan: Any) -> dict[str, str]:
        return {}

    def read(self, plan: Any, entities: Any) -> list[dict[str, Any]]:
        self.batches.append(len(entities))
        if self.fail:
            raise OSError("gone")
        return [{"x": (e["card_id"], 1.0)} for e in entities]

    def refresh(self) -> None: ...


async def test_rows_that_wait_are_read_together_and_come_back_to_their_own_caller(contract: ModelContract) -> None:
    import asyncio

    reader = _Counting()
    lookup = SdkStore(reader, threads=1, rows_max=8, queue_rows_max=30)
    plan = make_plan(contract)
    answers = await asyncio.gather(*(lookup.read(plan, [{"card_id": f"c{i}"}], 10.0) for i in range(30)))
    assert [a[0]["x"][0] for a in answers] == [f"c{i}" for i in range(30)]
    assert max(reader.batches) == 8
    assert len(reader.batches) <= 6
    with pytest.raises(OverloadedError):
        await lookup.read(plan, [{"card_id": "c"}] * 31, 10.0)
    reader.fail = True
    with pytest.raises(UnavailableError, match="OSError"):
        await lookup.read(plan, [{"card_id": "c"}, {"card_id": "d"}], 10.0)
    reader.fail = False
    assert await lookup.read(plan, [{"card_id": "c"}], 10.0) == [{"x": ("c", 1.0)}]
    lookup.close()
