"""What a running transformer, with a real predictor and a real Feast store, answers to good and to bad requests."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from hafnium_servers import http
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_testing import synthetic_rows, synthetic_views
from hafnium_transformer.explanation import Explainer

sys.path.insert(0, str(Path(__file__).parent))
from conftest import VIEW_SEED, Chain
from hafnium_contract.encoding import assemble, encode_value
from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_contract.v2_binary import LENGTH_HEADER

SCORE = "/v1/score"
BATCH = "/v1/score/batch"
V1 = "/v1/models/m:predict"
V2 = "/v2/models/m/infer"
Matrix = np.ndarray[Any, np.dtype[np.float32]]


def expected_matrix(contract: ModelContract, rows: list[dict[str, Any]]) -> Matrix:
    """The inputs that a trainer would compute for the rows: no code of the transformer."""
    views = synthetic_views(contract, VIEW_SEED)
    columns: dict[str, list[float]] = {}
    for row in rows:
        for f in contract.features:
            if f.request_field is not None:
                value = row["features"].get(f.request_field)
            elif isinstance(f.source, FromView):
                key = contract.entity(contract.view(f.source.view).entity).join_key
                found = [v for v in views[f.source.view] if v[key] == row["entity"][key]]
                value = found[0][f.source.field] if found else None
            else:
                continue
            columns.setdefault(f.name, []).append(encode_value(f, value, f.name))
    event_time = np.array([datetime.fromisoformat(r["event_time"]).timestamp() for r in rows])
    return assemble(contract, {k: np.array(v) for k, v in columns.items()}, event_time)


def direct(chain: Chain, matrix: Matrix) -> tuple[Matrix, Matrix]:
    """ONNX Runtime on the bundle's graph, without any server."""
    session = ort.InferenceSession(str(chain.bundle.model_path))
    score, interval = session.run(["score", "interval"], {"features": matrix})
    return np.asarray(score), np.asarray(interval)


def test_scores_are_those_of_the_model_on_what_training_would_compute(chain: Chain) -> None:
    rows = synthetic_rows(chain.contract, 40, seed=3)
    score, interval = direct(chain, expected_matrix(chain.contract, rows))
    rule = chain.contract.decision
    for k, row in enumerate(rows):
        reply = chain.transformer.post(SCORE, row)
        assert reply.status == 200, reply.body
        answer = reply.json
        assert np.float32(answer["score"]) == score[k]
        assert (np.float32(answer["confidence_lower"]), np.float32(answer["confidence_upper"])) == tuple(interval[k])
        assert answer["decision"] == (rule.above if answer["score"] >= rule.threshold else rule.below)
        assert answer["request_id"] == row["request_id"]
        assert (answer["model_name"], answer["model_version"], answer["degraded"]) == ("unified-risk", "7", [])
        assert "explanation" not in answer
    assert len({rule.above if s >= rule.threshold else rule.below for s in score}) == 2


def test_batch_gives_the_same_as_single_requests(chain: Chain) -> None:
    rows = synthetic_rows(chain.contract, 30, seed=4)
    reply = chain.transformer.post(BATCH, {"requests": rows})
    assert reply.status == 200
    assert reply.json["results"] == [chain.transformer.post(SCORE, row).json for row in rows]


def test_thousand_rows_fit_in_a_batch_and_one_more_does_not(chain: Chain) -> None:
    rows = synthetic_rows(chain.contract, 1000, seed=5)
    small = [{"entity": r["entity"], "event_time": r["event_time"], "features": {"transaction_amount": 1}} for r in rows]
    reply = chain.transformer.post(BATCH, {"requests": small})
    assert reply.status == 200, reply.body[:300]
    assert all("score" in r for r in reply.json["results"])
    assert chain.transformer.post(BATCH, {"requests": [*small, small[0]]}).status == 400
    assert chain.transformer.post(BATCH, {"requests": []}).status == 400


def test_one_bad_row_is_its_own_error_and_not_the_batchs(chain: Chain) -> None:
    good, bad, worse = synthetic_rows(chain.contract, 3, seed=6)
    bad["features"]["transaction_amount"] = -1
    reply = chain.transformer.post(BATCH, {"requests": [good, bad, 3, worse]})
    assert reply.status == 200
    first, second, third, fourth = reply.json["results"]
    assert first == chain.transformer.post(SCORE, good).json
    assert fourth == chain.transformer.post(SCORE, worse).json
    assert second["status"] == 422
    assert second["errors"] == [{"path": "requests[1].features.transaction_amount",
                                 "message": "expected a value from 0 to 100000 EUR, got -1"}]
    assert third["errors"][0]["path"] == "requests[2]"


def test_explanation_is_what_knowing_each_input_adds(chain: Chain) -> None:
    row = synthetic_rows(chain.contract, 1, seed=8)[0]
    matrix = expected_matrix(chain.contract, [row])
    explainer = Explainer.of(matrix.shape[1], "shapley", 4)
    assert explainer is not None
    score = float(direct(chain, matrix)[0][0])
    found, base = explainer.shares(score, direct(chain, explainer.asked(matrix[0]))[0])
    assert found.sum() == pytest.approx(score - float(direct(chain, np.full_like(matrix, np.nan))[0][0]), abs=1e-12)
    shares = dict(zip(chain.contract.input_names, found.tolist(), strict=True))
    answer = chain.transformer.post(SCORE, {**row, "explain": True}).json
    explanation = answer["explanation"]
    assert answer["explanation_base"] == base
    assert chain.transformer.post(SCORE, {**row, "request_id": "another", "explain": True}).json["explanation"] == explanation
    assert len(explanation) == 5
    largest = sorted(shares, key=lambda n: -abs(shares[n]))[:5]
    assert [e["feature"] for e in explanation] == largest
    for e in explanation:
        assert e["contribution"] == pytest.approx(shares[e["feature"]], abs=1e-6)
        if chain.contract.by_name[e["feature"]].personal:
            assert e["value"] is None
    plain = {k: v for k, v in answer.items() if not k.startswith("explanation")}
    assert plain == chain.transformer.post(SCORE, row).json


def test_v1_and_v2_give_the_same_scores_as_score(chain: Chain) -> None:
    rows = synthetic_rows(chain.contract, 3, seed=9)
    expected = chain.transformer.post(BATCH, {"requests": rows}).json["results"]
    assert chain.transformer.post(V1, {"instances": rows}).json == {"predictions": expected}
    kinds = {"category": "BYTES", "bool": "BOOL", "int": "INT64", "float": "FP64"}
    inputs = [{"name": n, "datatype": kinds[f.dtype], "shape": [3], "data": [r["features"][n] for r in rows]}
              for n, f in chain.contract.request_fields.items()]
    inputs += [{"name": n, "datatype": "BYTES", "shape": [3, 1], "data": [r["entity"][n] for r in rows]}
               for n in ("customer_id", "terminal_id")]
    inputs += [{"name": n, "datatype": "BYTES", "shape": [3], "data": [r[n] for r in rows]}
               for n in ("event_time", "request_id")]
    reply = chain.transformer.post(V2, {"inputs": inputs})
    assert reply.status == 200, reply.body
    outputs = {o["name"]: o["data"] for o in reply.json["outputs"]}
    assert np.array_equal(np.float32(outputs["score"]), np.float32([e["score"] for e in expected]))
    assert outputs["decision"] == [e["decision"] for e in expected]


def test_grpc_gives_the_same_score_and_names_what_is_wrong(chain: Chain) -> None:
    row = synthetic_rows(chain.contract, 1, seed=9)[0]
    expected = chain.transformer.post(SCORE, row).json

    def tensors(amount: float) -> list[InferInput]:
        texts = {**row["entity"], "event_time": row["event_time"], "channel": row["features"]["channel"],
                 "merchant_category": row["features"]["merchant_category"]}
        given: dict[str, np.ndarray[Any, Any]] = {n: np.array([v.encode()], np.object_) for n, v in texts.items()}
        given["transaction_amount"] = np.array([amount])
        given["geo_risk_score"] = np.array([row["features"]["geo_risk_score"]])
        given["device_is_new"] = np.array([row["features"]["device_is_new"]])
        out: list[InferInput] = []
        for name, values in given.items():
            kind = {"O": "BYTES", "f": "FP64", "b": "BOOL"}[values.dtype.kind]
            out.append(InferInput(name, [1], kind))
            out[-1].set_data_from_numpy(values)
        return out

    with grpc.insecure_channel(f"127.0.0.1:{chain.grpc_port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(InferRequest("m", tensors(row["features"]["transaction_amount"])).to_grpc(), timeout=20)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32)[0] == np.float32(expected["score"])
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(InferRequest("m", tensors(-1.0)).to_grpc(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert "rows[0].features.transaction_amount" in refused.value.details()  # type: ignore[attr-defined]


@pytest.mark.parametrize("known", [True, False], ids=["nothing degraded", "features of nobody"])
def test_every_protocol_names_the_features_that_a_row_did_without(chain: Chain, known: bool) -> None:
    row = synthetic_rows(chain.contract, 1, seed=9)[0]
    if not known:
        row["entity"] = {"customer_id": "nobody", "terminal_id": "nobody"}
    expected = chain.transformer.post(SCORE, row).json["degraded"]
    assert bool(expected) is not known
    kinds = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}
    fields = {**row["entity"], **row["features"], "event_time": row["event_time"]}
    inputs = [{"name": n, "shape": [1], "datatype": kinds[type(v)], "data": [v]} for n, v in fields.items() if v is not None]
    outputs = chain.transformer.post(V2, {"inputs": inputs}).json["outputs"]
    v2 = next(o for o in outputs if o["name"] == "degraded")["data"]
    with grpc.insecure_channel(f"127.0.0.1:{chain.grpc_port}") as channel:
        message = InferRequest("m", [InferInput(**one) for one in inputs]).to_grpc()
        answer = GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=20)
    by_grpc = next(o for o in answer.outputs if o.name == "degraded").contents.bytes_contents
    told = [
        chain.transformer.post(BATCH, {"requests": [row]}).json["results"][0]["degraded"],
        chain.transformer.post(V1, {"instances": [row]}).json["predictions"][0]["degraded"],
        *[[name for name in text.split(",") if name] for text in (*v2, *(b.decode() for b in by_grpc))],
    ]
    assert told == [expected] * 4
    metadata = chain.transformer.get("/v2/models/m").json["outputs"]
    assert [o["name"] for o in metadata] == [o["name"] for o in outputs]


def test_v1_keeps_the_status_and_paths_of_a_bad_row(chain: Chain) -> None:
    rows = synthetic_rows(chain.contract, 2, seed=9)
    del rows[1]["features"]["transaction_amount"]
    reply = chain.transformer.post(V1, {"instances": rows})
    assert reply.status == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json["errors"][0]["path"] == "instances[1].features.transaction_amount"


def test_a_bad_row_of_v1_or_v2_leaves_no_other_of_its_request_logged_or_counted(chain: Chain) -> None:
    def scored() -> list[str]:
        lines = chain.transformer.get("/metrics").body.decode().splitlines()
        return [x for x in lines if x.startswith(("model_predictions_total{", "model_score_count{"))]

    rows = synthetic_rows(chain.contract, 3, seed=9)
    rows[1]["features"]["transaction_amount"] = -5.0
    assert chain.transformer.post(V1, {"instances": [rows[0]]}).status == 200
    before = scored()
    assert before
    kinds = {"category": "BYTES", "bool": "BOOL", "int": "INT64", "float": "FP64"}
    inputs = [{"name": n, "datatype": kinds[f.dtype], "shape": [3], "data": [r["features"][n] for r in rows]}
              for n, f in chain.contract.request_fields.items()]
    inputs += [{"name": n, "datatype": "BYTES", "shape": [3], "data": [r["entity"][n] for r in rows]} for n in rows[0]["entity"]]
    for path, body in ((V1, {"instances": rows}), (V1, {"instances": rows, "also": 1}), (V2, {"inputs": inputs})):
        refused = chain.transformer.post(path, body)
        assert (refused.status, refused.json["errors"][0]["path"].partition("[")[2]) == (422, "1].features.transaction_amount")
    assert scored() == before


def changed(row: dict[str, Any], **features: Any) -> dict[str, Any]:
    return {**row, "features": {**row["features"], **features}}


@pytest.mark.parametrize(("change", "path", "said"), [
    (lambda r: changed(r, transaction_amount=None), "features.transaction_amount", "missing; expected a number from 0 to 100000 EUR"),
    (lambda r: changed(r, transaction_amount="5"), "features.transaction_amount", "expected a number, got '5'"),
    (lambda r: changed(r, transaction_amount=100001), "features.transaction_amount", "expected a value from 0 to 100000 EUR"),
    (lambda r: changed(r, channel=3), "features.channel", "expected a string"),
    (lambda r: changed(r, device_is_new="yes"), "features.device_is_new", "expected true or false"),
    (lambda r: changed(r, velocity_24h=3), "features.velocity_24h", "not sent by the caller"),
    (lambda r: changed(r, age_band="65+"), "features.age_band", "protected attribute"),
    (lambda r: changed(r, nonsense=1), "features.nonsense", "unknown feature"),
    (lambda r: {**r, "extra": 1}, "extra", "unknown field"),
    (lambda r: {**r, "explain": 1}, "explain", "true or false"),
    (lambda r: {**r, "request_id": ""}, "request_id", "1 to 256 characters"),
    (lambda r: {**r, "event_time": "yesterday"}, "event_time", "RFC 3339"),
    (lambda r: {**r, "event_time": "2026-01-01T00:00:00"}, "event_time", "with an offset"),
    (lambda r: {**r, "entity": {"customer_id": "c"}}, "entity.terminal_id", "missing"),
    (lambda r: {**r, "entity": {**r["entity"], "customer_id": 5}}, "entity.customer_id", "expected a string"),
    (lambda r: {**r, "entity": {**r["entity"], "card": "x"}}, "entity.card", "unknown entity key"),
    (lambda r: {**r, "entity": 3}, "entity", "expected an object"),
    (lambda r: {**r, "features": [1]}, "features", "expected an object"),
    (lambda r: 5, "", "expected an object"),
])
def test_each_problem_is_named_with_its_path(chain: Chain, change: Any, path: str, said: str) -> None:
    reply = chain.transformer.post(SCORE, change(synthetic_rows(chain.contract, 1, seed=0)[0]))
    assert reply.status == 422
    assert reply.headers["content-type"] == "application/problem+json"
    problems = {p["path"]: p["message"] for p in reply.json["errors"]}
    assert said in problems[path]


def test_all_problems_of_a_row_are_named_at_once(chain: Chain) -> None:
    reply = chain.transformer.post(SCORE, {"features": {"channel": 1, "x": 2}, "y": 3})
    assert [p["path"] for p in reply.json["errors"]] == [
        "y", "entity.customer_id", "entity.terminal_id", "features.x", "features.transaction_amount", "features.channel",
    ]


@pytest.mark.parametrize("text", ['{"features": {"transaction_amount": NaN}}', '{"features": {"transaction_amount": Infinity}}', "{", ""])
def test_what_is_not_json_gets_400(chain: Chain, text: str) -> None:
    reply = chain.transformer.post(SCORE, text.encode())
    assert reply.status == 400
    assert "not JSON" in reply.json["detail"]


def test_number_beyond_a_double_is_not_scored(chain: Chain) -> None:
    row = json.dumps(synthetic_rows(chain.contract, 1, seed=0)[0]).replace('"geo_risk_score": ', '"geo_risk_score": 1e999, "_": ')
    assert chain.transformer.post(SCORE, row.encode()).status in (400, 422)


def test_unknown_entity_is_scored_and_says_what_was_degraded(chain: Chain) -> None:
    row = synthetic_rows(chain.contract, 1, seed=0)[0]
    row["entity"] = {"customer_id": "nobody", "terminal_id": "nowhere"}
    row["features"].pop("geo_risk_score")
    answer = chain.transformer.post(SCORE, row).json
    from_views = [f.name for f in chain.contract.features if isinstance(f.source, FromView)]
    assert answer["degraded"] == ["geo_risk_score", *from_views]
    assert np.float32(answer["score"]) == direct(chain, expected_matrix(chain.contract, [row]))[0][0]


def test_request_id_comes_back_and_is_made_when_there_is_none(chain: Chain) -> None:
    row = synthetic_rows(chain.contract, 1, seed=0)[0]
    del row["request_id"]
    reply = chain.transformer.post(SCORE, row, {"x-request-id": "abc-1"})
    assert (reply.headers["x-request-id"], reply.json["request_id"]) == ("abc-1", "abc-1")
    batch = chain.transformer.post(BATCH, {"requests": [row, row]}, {"x-request-id": "abc-2"}).json
    assert [r["request_id"] for r in batch["results"]] == ["abc-2-0", "abc-2-1"]
    made = chain.transformer.post(SCORE, row)
    assert made.headers["x-request-id"] == made.json["request_id"]
    assert len(made.json["request_id"]) == 32


def test_limits_have_their_own_statuses(chain: Chain) -> None:
    row = synthetic_rows(chain.contract, 1, seed=0)[0]
    assert chain.transformer.post(SCORE, b" " * 300_001).status == 413
    assert chain.transformer.post(SCORE, row, {"x-hafnium-deadline-ms": "0"}).status == 504
    assert chain.transformer.post(SCORE, row, {"x-hafnium-deadline-ms": "soon"}).status == 400
    assert chain.transformer.get(SCORE).status == 405
    many = chain.transformer.post(BATCH, {"requests": [{**row, "explain": True}] * 21}).json["results"]
    assert [("score" in r) for r in many] == [True] * 20 + [False]


def test_explanations_that_need_more_rows_than_a_prediction_takes_are_those_of_single_requests(chain: Chain) -> None:
    """20 rows with 57 each are more than the predictor's 1,000, and so are 1,000 rows with one."""
    rows = synthetic_rows(chain.contract, 20, seed=12)
    alone = [chain.transformer.post(SCORE, {**r, "explain": True}).json for r in rows]
    assert chain.transformer.post(BATCH, {"requests": [{**r, "explain": True} for r in rows]}).json["results"] == alone
    full = chain.transformer.post(BATCH, {"requests": [{**rows[0], "explain": True}] + rows[1:2] * 999})
    assert full.status == 200
    assert full.json["results"][0] == alone[0]
    assert sum("score" in r for r in full.json["results"]) == 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["features", "entity", "requests", "instances", "inputs", "event_time", "customer_id", "name", "shape",
                         "datatype", "data", "transaction_amount"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=100) | json_values.map(lambda v: json.dumps(v).encode()),
    path=st.sampled_from([SCORE, BATCH, V1, V2]),
    extra=st.sampled_from([{}, {LENGTH_HEADER: "7"}, {LENGTH_HEADER: "x"}, {"ce-id": "1", "ce-specversion": "1.0"},
                           {"content-type": "text/plain"}, {"traceparent": "x"}]),
)
@example(body=b"[Infinity]", path=V2, extra={})
@example(body=b'{"instances": [NaN]}', path=V1, extra={})
@example(body=b'{"inputs": [{"data": [1e999]}]}', path=V2, extra={})
def test_garbage_is_never_our_fault(chain: Chain, body: bytes, path: str, extra: dict[str, str]) -> None:
    reply = http("POST", chain.transformer.url + path, body, {"content-type": "application/json", **extra})
    if path == BATCH and reply.status == 200:
        assert all(r["status"] == 422 for r in reply.json["results"])
        return
    assert reply.status in (400, 422), (reply.status, reply.body)
    assert reply.headers["content-type"] == "application/problem+json"


def test_operational_paths(chain: Chain) -> None:
    chain.transformer.post(SCORE, synthetic_rows(chain.contract, 1, seed=0)[0])
    chain.transformer.post(SCORE, {})
    for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/v1/models/m", "/v2/models/m/ready"):
        assert chain.transformer.get(path).status == 200, path
    assert chain.transformer.get("/v1/models/m/contract").json["contract_digest"] == chain.contract.digest
    assert chain.transformer.post("/v2/repository/models/m/unload", {}).status == 501
    inputs = {i["name"] for i in chain.transformer.get("/v2/models/m").json["inputs"]}
    assert {"transaction_amount", "customer_id", "event_time"} <= inputs
    text = chain.transformer.get("/metrics").body.decode()
    labels = 'component="transformer",model_name="unified-risk",model_version="7"'
    for series in (
        f"inference_requests_total{{{labels}}}", f'inference_errors_total{{{labels},type="invalid_row"}}',
        f"inference_duration_seconds_count{{{labels}}}", 'model_predictions_total{model_name="unified-risk"',
        "model_score_bucket", "feature_lookup_seconds_count", 'feature_staleness_seconds{view="customer_features"}',
        "feature_missing_total",
    ):
        assert series in text, series
