"""The hot routes of the predictor: V1 rows and V2 tensors, answered below ASGI; rows of one turn of the event loop run together.

`session.run` costs 10 to 20 µs hot and twice that after a wake-up, whatever the rows, so requests whose bytes arrived in the
same turn share one run (`call_soon`, no timer: nobody waits for company). Only answers of 200 leave here. Whatever is unusual,
a wrong row or a graph that failed, goes back to the gate, one request at a time, which says what is wrong.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import orjson

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.serving.hot_protocol import HotRequest, HotRoutes
from hafnium_contract.v2_binary import LENGTH_HEADER, BinaryRequest, TensorError, decode_request, encode_answer
from hafnium_contract.wire import CONTRACT_HEADER, DEADLINE_HEADER, MODEL_DIGEST_HEADER, MODEL_VERSION_HEADER
from hafnium_predictor.engine import Engine
from hafnium_predictor.errors import AnswerError
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_predictor.model import RiskModel
from hafnium_predictor.request_spans import model_facts, request_facts
from hafnium_predictor.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

log = logging.getLogger("hafnium.predictor")
Matrix = npt.NDArray[np.float32]
_CONTRACT, _DEADLINE, _LENGTH = CONTRACT_HEADER.encode(), DEADLINE_HEADER.encode(), LENGTH_HEADER.encode()
_NUMBERS = frozenset({int, float, bool, type(None)})
_V1_KEYS = ["instances"]
_V2_KEYS = frozenset({"id", "inputs"})
_V2_INPUT_KEYS = frozenset({"name", "shape", "datatype", "data"})
_DATATYPES = frozenset({"FP32", "FP64"})
SHARED_ROWS_MAX = 16
"""A request of more rows runs alone, behind the small ones of its turn: a call of the model costs what ten rows cost
(docs/performance.md), so it gains little by sharing, and whoever asked for one row would wait for all of its."""


class _Rows:
    """A request whose rows wait for the next run."""

    __slots__ = ("binary", "matrix", "request", "request_id", "route")

    def __init__(self, request: HotRequest, route: int, matrix: Matrix) -> None:
        self.request = request
        self.route = route
        self.matrix = matrix
        self.binary: BinaryRequest | None = None
        self.request_id = ""


_V1, _V2_JSON, _V2_BINARY = range(3)


class HotPath:
    """Handlers of the hot routes over one model."""

    def __init__(self, model: RiskModel, metrics: PredictorMetrics, settings: Settings, tracing: Tracing | None = None) -> None:
        self._model = model
        self._metrics = metrics
        self._tracing = tracing
        self._bytes_max = settings.body_bytes_max
        self._waiting: list[_Rows] = []
        self._engine: Engine | None = None
        self._digest = b""
        self._heads: tuple[bytes, bytes] = (b"", b"")
        self.routes = HotRoutes()
        self._v1_path, self._v2_path = f"/v1/models/{settings.model_name}:predict", f"/v2/models/{settings.model_name}/infer"
        self.routes.add(self._v1_path, self._v1)
        self.routes.add(self._v2_path, self._v2)

    def _usual(self, request: HotRequest) -> Engine | None:
        """The engine, when nothing about the request but its body has to be looked at."""
        engine = self._model.engine_or_none
        if engine is None or len(request.body) > self._bytes_max:
            return None
        if engine is not self._engine:
            self._use(engine)
        headers = request.headers
        digest = headers.get(_CONTRACT)
        if digest is not None and digest != self._digest:
            return None
        deadline = headers.get(_DEADLINE)
        if deadline is not None and not (len(deadline) < 10 and deadline.isdigit() and deadline.strip(b"0")):
            return None
        return engine

    def _use(self, engine: Engine) -> None:
        manifest = engine.bundle.manifest
        self._engine, self._digest = engine, manifest.contract_digest.encode()
        facts = ((CONTRACT_HEADER, manifest.contract_digest), (MODEL_VERSION_HEADER, manifest.model_version),
                 (MODEL_DIGEST_HEADER, manifest.digest))
        identity = "".join(f"{name}: {value}\r\n" for name, value in facts).encode()
        self._heads = (b"content-type: application/json\r\n" + identity, b"content-type: application/octet-stream\r\n" + identity)

    def _v1(self, request: HotRequest) -> bool:
        engine = self._usual(request)
        if engine is None:
            return False
        try:
            parsed: Any = orjson.loads(request.body)
        except orjson.JSONDecodeError:
            return False
        if type(parsed) is not dict or list(cast(dict[str, Any], parsed)) != _V1_KEYS:
            return False
        matrix = _matrix(cast(dict[str, Any], parsed)["instances"], engine.columns, engine.rows_max)
        if matrix is None:
            return False
        self._wait(_Rows(request, _V1, matrix))
        return True

    def _v2(self, request: HotRequest) -> bool:
        engine = self._usual(request)
        if engine is None:
            return False
        length = request.headers.get(_LENGTH)
        if length is None:
            return self._v2_json(request, engine)
        try:
            binary = decode_request(request.body, length, engine.columns, engine.rows_max)
        except TensorError:
            return False
        rows = _Rows(request, _V2_BINARY, binary.matrix)
        rows.binary = binary
        self._wait(rows)
        return True

    def _v2_json(self, request: HotRequest, engine: Engine) -> bool:
        """One input of plain numbers in the form that clients write; every other form is the SDK's business."""
        try:
            parsed: Any = orjson.loads(request.body)
        except orjson.JSONDecodeError:
            return False
        if type(parsed) is not dict or not _V2_KEYS.issuperset(cast(dict[str, Any], parsed)):
            return False
        top = cast(dict[str, Any], parsed)
        request_id, inputs = top.get("id"), top.get("inputs")
        if type(request_id) is not str or not request_id or type(inputs) is not list or len(cast(list[Any], inputs)) != 1:
            return False  # without an id the SDK draws one
        one: Any = inputs[0]
        if type(one) is not dict or cast(dict[str, Any], one).keys() != _V2_INPUT_KEYS:
            return False
        shape, data = one["shape"], one["data"]
        if one["name"] != INPUT_NAME or one["datatype"] not in _DATATYPES or type(shape) is not list or type(data) is not list:
            return False
        flat = cast(list[Any], data)
        if flat and type(flat[0]) is list:
            matrix = _matrix(flat, engine.columns, engine.rows_max)
        elif len(flat) % engine.columns == 0 and {float}.issuperset(map(type, flat)):
            matrix = _float32(flat)
            matrix = None if matrix is None else matrix.reshape(-1, engine.columns)
        else:
            return False
        if matrix is None or cast(list[Any], shape) != [len(matrix), engine.columns] or not 1 <= len(matrix) <= engine.rows_max:
            return False
        rows = _Rows(request, _V2_JSON, matrix)
        rows.request_id = request_id
        self._wait(rows)
        return True

    def _wait(self, rows: _Rows) -> None:
        self._waiting.append(rows)
        if rows.request.alone:
            self._run_all()
        elif len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._run_all)

    def _run_all(self) -> None:
        """All rows that wait, in as few runs as their number allows."""
        waiting, self._waiting = self._waiting, []
        if not waiting:  # the others' connections closed, and one that was left alone took all with it
            return
        engine = self._model.engine_or_none
        if engine is None or engine is not self._engine:
            for rows in waiting:
                rows.request.to_plain()
            return
        if len(waiting) == 1:
            self._run(engine, waiting)
            return
        group: list[_Rows] = []
        size = 0
        for rows in [rows for rows in waiting if len(rows.matrix) <= SHARED_ROWS_MAX]:
            if group and size + len(rows.matrix) > engine.rows_max:
                self._run(engine, group)
                group, size = [], 0
            group.append(rows)
            size += len(rows.matrix)
        if group:
            self._run(engine, group)
        for rows in waiting:
            if len(rows.matrix) > SHARED_ROWS_MAX:
                self._run(engine, [rows])

    def _run(self, engine: Engine, group: list[_Rows]) -> None:
        matrix = group[0].matrix if len(group) == 1 else np.concatenate([rows.matrix for rows in group])
        try:
            score, interval = engine.run(matrix)
        except AnswerError:  # whose row it was shows when each goes its own way
            for rows in group:
                rows.request.to_plain()
            return
        at = 0
        answered = self._metrics.answered
        for rows in group:
            end = at + len(rows.matrix)
            try:
                self._answer(engine, rows, score[at:end], interval[at:end])
            except Exception:  # one answer that can't be written must not cost the others theirs
                log.exception("an answer could not be written")
                rows.request.abort()
            at = end
            answered(time.perf_counter() - rows.request.arrived, None)
        if self._tracing is not None:
            try:
                self._record(self._tracing, engine, group)
            except Exception:  # these are answered; a span that can't be written must not cost the next group its run
                log.exception("a span could not be written")

    def _record(self, tracing: Tracing, engine: Engine, group: list[_Rows]) -> None:
        """Spans of requests that were answered. Made behind their answers, since nothing below them has to know of them."""
        for rows in group:
            headers = rows.request.headers
            path = self._v1_path if rows.route == _V1 else self._v2_path
            span = tracing.request(headers, f"POST {path}", rows.request.arrived)
            if span is not None:
                span.add({
                    **request_facts(path, headers), **model_facts(engine), "hafnium.rows": len(rows.matrix),
                    "hafnium.run_rows": sum(len(r.matrix) for r in group),
                })
                span.answered(200, None)

    def _answer(self, engine: Engine, rows: _Rows, score: Matrix, interval: Matrix) -> None:
        json_head, binary_head = self._heads
        if rows.route == _V1:
            body = orjson.dumps({"predictions": score.tolist(), "intervals": interval.tolist()})
            rows.request.respond(json_head, body)
            return
        manifest = engine.bundle.manifest
        if rows.binary is None:
            count = len(score)
            body = orjson.dumps({
                "model_name": manifest.model_name, "model_version": manifest.model_version, "id": rows.request_id,
                "parameters": None, "outputs": [
                    {"name": SCORE_OUTPUT, "shape": [count], "datatype": "FP32", "parameters": None, "data": score.tolist()},
                    {"name": INTERVAL_OUTPUT, "shape": [count, 2], "datatype": "FP32", "parameters": None,
                     "data": interval.reshape(-1).tolist()},
                ],
            })
            rows.request.respond(json_head, body)
            return
        header_length, body = encode_answer(score, interval, manifest.model_name, manifest.model_version, rows.binary)
        if header_length is None:
            rows.request.respond(json_head, body)
        else:
            rows.request.respond(b"%s%s: %d\r\n" % (binary_head, _LENGTH, header_length), body)


def _matrix(instances: Any, columns: int, rows_max: int) -> Matrix | None:
    """Rows of numbers → [rows, columns]; None: they are not plainly so."""
    if type(instances) is not list or not 1 <= len(cast(list[Any], instances)) <= rows_max:
        return None
    rows = cast(list[list[Any]], instances)
    if {list} != set(map(type, rows)) or {columns} != set(map(len, rows)):
        return None
    flat = list(chain.from_iterable(rows))
    try:  # struct takes numbers only: what numpy would make one, such as "1", it refuses, so nobody has to look at each type
        packed = struct.pack(f"<{len(flat)}d", *flat)
    except (struct.error, OverflowError):
        return _float32(rows) if _NUMBERS.issuperset(map(type, flat)) else None
    return np.frombuffer(packed, "<f8").astype(np.float32).reshape(len(rows), columns)  # too large becomes inf, which run() refuses


def _float32(numbers: list[Any]) -> Matrix | None:
    try:
        return np.array(numbers, np.float32)  # too large becomes inf, which run() refuses
    except (ValueError, TypeError, OverflowError):
        return None
