"""The predictor's spans, on both its paths; what a lost collector costs (nothing); and how tracing starts and ends."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hafnium_otlp import Collector
from hafnium_servers import Server, free_port, http, lines_of, predictor
from kserve import InferInput, InferRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from hafnium_contract.bundle import Bundle
from hafnium_contract.v2_binary import LENGTH_HEADER, request_header

V1, V2 = "/v1/models/m:predict", "/v2/models/m/infer"
COLUMNS = 15
ROW: list[Any] = [0.5] * COLUMNS
SERVER = 2


@dataclass(frozen=True)
class Traced:
    server: Server
    collector: Collector
    grpc_port: int


@pytest.fixture(scope="module", params=["hot path", "plain"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Traced]:
    folder, grpc_port = tmp_path_factory.mktemp("traced"), free_port()
    args = ["--hot_path", str(request.param == "hot path"), "--grpc_port", str(grpc_port)]
    with Collector() as collector, predictor(bundle.path, folder, args=args, env=collector.env) as running:
        running.wait()
        yield Traced(running, collector, grpc_port)


def v1(rows: int) -> tuple[str, bytes, dict[str, str]]:
    return V1, json.dumps({"instances": [ROW] * rows}).encode(), {}


def v2_json(rows: int) -> tuple[str, bytes, dict[str, str]]:
    one = {"name": "features", "shape": [rows, COLUMNS], "datatype": "FP32", "data": [ROW] * rows}
    return V2, json.dumps({"id": "a", "inputs": [one]}).encode(), {}


def v2_binary(rows: int) -> tuple[str, bytes, dict[str, str]]:
    header = request_header(rows, COLUMNS)
    return V2, header + np.full((rows, COLUMNS), 0.25, np.float32).tobytes(), {LENGTH_HEADER: str(len(header))}


def from_somebody() -> tuple[str, str, str]:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, f"00-{trace_id}-{span_id}-01"


@pytest.mark.parametrize("form", [v1, v2_json, v2_binary])
def test_every_protocol_leaves_one_span_below_the_callers(traced: Traced, form: Any) -> None:
    path, body, headers = form(3)
    trace_id, span_id, parent = from_somebody()
    answer = traced.server.post(path, body, {**headers, "traceparent": parent, "x-request-id": "one,two"})
    assert answer.status == 200
    [span] = traced.collector.trace(trace_id, 1)
    assert (span.service, span.name, span.kind, span.parent_id, span.status) == ("hafnium-predictor", f"POST {path}", SERVER, span_id, 0)
    known = http("GET", f"{traced.server.url}/v1/models/m/contract").json
    expected = {
        "http.request.method": "POST", "http.route": path, "url.path": path, "http.response.status_code": 200, "hafnium.rows": 3,
        "hafnium.request_id": "one,two", "hafnium.model.name": known["model_name"], "hafnium.model.version": "7",
        "hafnium.model.digest": known["model_digest"], "hafnium.contract.digest": known["contract_digest"],
    }
    assert {k: v for k, v in span.attributes.items() if k != "hafnium.run_rows"} == expected
    assert span.attributes.get("hafnium.run_rows", 3) >= 3


def test_grpc_leaves_one_too(traced: Traced) -> None:
    matrix = np.full((2, COLUMNS), 0.5, np.float32)
    given = InferInput("features", list(matrix.shape), "FP32")
    given.set_data_from_numpy(matrix)
    wrong = InferInput("other", list(matrix.shape), "FP32")
    wrong.set_data_from_numpy(matrix)
    trace_id, span_id, parent = from_somebody()
    bad_id, _, bad_parent = from_somebody()
    with grpc.insecure_channel(f"127.0.0.1:{traced.grpc_port}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        stub.ModelInfer(InferRequest("m", [given]).to_grpc(), timeout=20, metadata=(("traceparent", parent), ("x-request-id", "g-1")))
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(InferRequest("m", [wrong]).to_grpc(), timeout=20, metadata=(("traceparent", bad_parent),))
    [span] = traced.collector.trace(trace_id, 1)
    assert (span.name, span.parent_id, span.status) == ("inference.GRPCInferenceService/ModelInfer", span_id, 0)
    assert (span.attributes["hafnium.rows"], span.attributes["hafnium.request_id"]) == (2, "g-1")
    [refused] = traced.collector.trace(bad_id, 1)
    assert (refused.status, refused.attributes["error.type"]) == (2, "bad_request")


@pytest.mark.parametrize(("body", "headers", "status", "kind"), [
    (b"{", {}, 400, "bad_request"), (json.dumps({"instances": [["secret-value"] * COLUMNS]}).encode(), {}, 400, "bad_request"),
    (v1(1)[1], {"x-hafnium-contract": "sha256:other"}, 409, "contract_mismatch"),
    (v1(1)[1], {"x-hafnium-deadline-ms": "0"}, 504, "deadline"),
], ids=["no JSON", "a wrong row", "another contract", "no time"])
def test_an_error_is_a_span_with_its_kind_and_a_line_with_its_id(
    traced: Traced, body: bytes, headers: dict[str, str], status: int, kind: str,
) -> None:
    trace_id, _, parent = from_somebody()
    own = f"e-{secrets.token_hex(6)}"
    time.sleep(0.2)  # ten lines a second are let through: the case before has had its own
    answer = traced.server.post(V1, body, {**headers, "traceparent": parent, "x-request-id": own})
    assert (answer.status, answer.headers["x-request-id"]) == (status, own)
    [span] = traced.collector.trace(trace_id, 1)
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (status, kind)
    assert (span.status, span.status_message, span.events) == (2 if status >= 500 else 0, "", ())
    assert b"secret-value" not in b"".join(traced.collector.raw)
    lines = [x for x in lines_of(traced.server) if x.get("request_id") == own]
    assert [(x["status"], x["kind"], x["trace_id"]) for x in lines] == ([(status, kind, trace_id)] if status in (409, 504) else [])


@pytest.mark.parametrize("value", ["a" * 7000, "a\tb", "caf\u00e9"])
def test_an_id_that_is_malformed_is_in_no_answer_and_no_log(traced: Traced, value: str) -> None:
    trace_id, _, parent = from_somebody()
    sent = {"x-request-id": value.encode().decode("latin-1"), "traceparent": parent, "x-hafnium-deadline-ms": "0"}
    answer = traced.server.post(V1, v1(1)[1], sent)
    assert answer.status == 504
    assert "x-request-id" not in answer.headers
    [span] = traced.collector.trace(trace_id, 1)
    assert "hafnium.request_id" not in span.attributes
    assert value not in traced.server.log


def test_rows_of_many_connections_that_run_together_have_each_their_own_span(traced: Traced) -> None:
    callers = [from_somebody() for _ in range(24)]
    path, body, _ = v1(1)
    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(lambda c: traced.server.post(path, body, {"traceparent": c[2]}).status, callers)) == {200}
    spans = [traced.collector.trace(trace_id, 1)[0] for trace_id, _, _ in callers]
    assert [s.parent_id for s in spans] == [span_id for _, span_id, _ in callers]


def test_the_environment_says_who_we_are_and_what_is_sampled(bundle: Bundle, tmp_path: Path) -> None:
    """A parent that is sampled is followed though no trace begins here; what is left in the queue is sent on SIGTERM."""
    env = {
        "OTEL_SERVICE_NAME": "risk-scores", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.name=other",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0", "OTEL_BSP_SCHEDULE_DELAY": "600000",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    path, body, _ = v1(1)
    trace_id, _, parent = from_somebody()
    with Collector() as collector, predictor(bundle.path, tmp_path, env={**collector.env, **env}) as server:
        server.wait()
        for headers in ({}, {"traceparent": parent}, {"traceparent": parent[:-1] + "0"}):
            assert server.post(path, body, headers).status == 200
        assert collector.requests == 0
        assert server.stop() == 0
        [span] = collector.spans
        assert (span.trace_id, span.service) == (trace_id, "risk-scores")
        assert span.resource["deployment.environment.name"] == "test"


def dropped(server: Server) -> dict[str, float]:
    lines = [x for x in server.get("/metrics").body.decode().splitlines() if x.startswith("trace_spans_dropped_total{")]
    return {x.split('"')[1]: float(x.split()[-1]) for x in lines}


@pytest.mark.parametrize("fault", ["nobody listens", "silent", "refuses"])
def test_a_collector_that_is_no_help_costs_no_request_and_its_spans_are_counted(bundle: Bundle, tmp_path: Path, fault: str) -> None:
    """A silent one holds the sending thread up: the queue fills and the rest is dropped. SIGTERM does not wait for it either."""
    path, body, _ = v1(1)
    collector = Collector(delay_s=600.0 if fault == "silent" else 0.0, status=400 if fault == "refuses" else 200)
    with collector:
        env = {**collector.env, "OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8", "OTEL_EXPORTER_OTLP_TIMEOUT": "20"}
        if fault == "nobody listens":
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{free_port()}"
        with predictor(bundle.path, tmp_path, env=env) as server:
            server.wait()
            with ThreadPoolExecutor(4) as pool:
                assert set(pool.map(lambda _: server.post(path, body).status, range(120))) == {200}
            counted = dropped(server)
            assert set(counted) == {"queue_full", "export_failed", "stopped"}
            if fault == "refuses":
                assert server.post(path, body).status == 200
                collector.wait(lambda _: sum(dropped(server).values()) >= 100)
                assert dropped(server)["export_failed"] > 0
            else:
                assert counted["queue_full"] >= 120 - 16 - 2 * 8
            assert server.stop() == 0, "it was killed: it waited for the collector"


@pytest.mark.parametrize(("env", "said"), [
    ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER: expected one of"),
    ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, "OTEL_TRACES_SAMPLER_ARG: expected a share"),
    ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf, got 'grpc'"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT: expected http://HOST:PORT"),
    ({"OTEL_BSP_MAX_QUEUE_SIZE": "10"}, "OTEL_BSP_MAX_QUEUE_SIZE: 10 spans are fewer"),
    ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: expected otlp or none"),
    ({"HAFNIUM_TRACING": "perhaps"}, "--tracing (or HAFNIUM_TRACING)"),
], ids=["sampler", "share", "protocol", "endpoint", "queue", "exporter", "the setting"])
def test_a_variable_that_is_wrong_is_named_at_the_start(bundle: Bundle, tmp_path: Path, env: dict[str, str], said: str) -> None:
    server = predictor(bundle.path, tmp_path, env={"HAFNIUM_TRACING": "true", **env}).start()
    assert server.process is not None
    assert server.process.wait(60) == 2
    server.process = None
    assert said in server.log
    assert "Traceback" not in server.log


WITHOUT = textwrap.dedent("""
    import importlib.abc, sys
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):  # FastAPI brings the API
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Missing())
    from hafnium_PART.__main__ import main
    sys.exit(main(sys.argv[1:]))
""")


@pytest.mark.parametrize("part", ["predictor", "transformer"])
def test_without_the_extra_the_setting_is_an_error_that_names_it(part: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", WITHOUT.replace("PART", part), "--tracing", "true", "--http_port", str(free_port())]
    argv += ["--predictor_host", "127.0.0.1:1"] if part == "transformer" else ["--model_dir", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'hafnium-serving[telemetry]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("off", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}], ids=["SDK disabled", "no exporter"])
def test_opentelemetrys_own_switches_switch_it_off(bundle: Bundle, tmp_path: Path, off: dict[str, str]) -> None:
    path, body, _ = v1(1)
    with Collector() as collector, predictor(bundle.path, tmp_path, env={**collector.env, **off}) as server:
        server.wait()
        assert server.post(path, body, {"traceparent": from_somebody()[2]}).status == 200
        assert server.stop() == 0
        assert collector.requests == 0
        assert "tracing is switched off" in server.log
