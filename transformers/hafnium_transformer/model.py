"""KServe's Model over the scorer: V1 with rows as objects, V2 with a tensor per field."""

from __future__ import annotations

import math
import struct
from typing import Any, cast

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InvalidInput

from hafnium_contract.bundle import INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_transformer.errors import MalformedError, ScoringError
from hafnium_transformer.gate import EXCHANGE, Exchange, batch_items
from hafnium_transformer.plan import Plan
from hafnium_transformer.request_spans import batch_facts
from hafnium_transformer.scoring import Scorer
from hafnium_transformer.settings import Settings

_TOP = ("event_time", "request_id")
_FAMILIES: dict[str, tuple[tuple[type, ...], str]] = {
    "INT": ((int,), "whole numbers"), "UINT": ((int,), "whole numbers"), "FP": ((int, float, type(None)), "numbers or null"),
    "BOOL": ((bool,), "true or false"), "BYTES": ((str, bytes), "texts"),
}


class RiskTransformer(Model):
    """V1 `{"instances": [row, …]}` → `{"predictions": [answer, …]}`; V2: one tensor per field, [rows] or [rows, 1].

    Neither protocol has errors per row: one bad row is the whole request's error, with its path.
    """

    def __init__(self, settings: Settings, scorer: Scorer) -> None:
        super().__init__(settings.model_name)
        self._settings = settings
        self._scorer = scorer
        self.ready = True

    def start(self) -> None:
        """Nothing to start: the server does."""

    async def healthy(self) -> bool:
        """Ready once a contract is in force."""
        return self._scorer.active

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2's metadata: one tensor per field of a request."""
        if not self._scorer.active:
            return []
        plan = self._scorer.plan
        keys = [{"name": key, "datatype": "BYTES", "shape": [-1]} for key in (*plan.join_keys, *_TOP)]
        kinds = {"category": "BYTES", "bool": "BOOL", "int": "INT64", "float": "FP64"}
        return keys + [{"name": n, "datatype": kinds[f.dtype], "shape": [-1]} for n, f in plan.request_features]

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2's metadata."""
        return [{"name": SCORE_OUTPUT, "datatype": "FP32", "shape": [-1]},
                {"name": INTERVAL_OUTPUT, "datatype": "FP32", "shape": [-1, 2]},
                {"name": "decision", "datatype": "BYTES", "shape": [-1]},
                {"name": "degraded", "datatype": "BYTES", "shape": [-1]}]

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | InferResponse:
        """Scores all rows. Raises InvalidInput; the gates put the real error in its place."""
        return await self._predict(payload, EXCHANGE.get())

    async def _predict(self, payload: Any, exchange: Exchange) -> dict[str, Any] | InferResponse:
        try:
            if isinstance(payload, InferRequest):
                items = rows_of_v2(payload, self._scorer.plan, self._settings.batch_rows_max)
                return _to_v2(payload, await self._all(items, "rows", exchange))
            items = batch_items(payload, "instances", self._settings.batch_rows_max)
            return {"predictions": await self._all(items, "instances", exchange)}
        except ScoringError as e:
            exchange.error = e.with_traceback(None)
            raise InvalidInput(f"{e.status} {e.title}: {e.detail}") from e

    async def _all(self, items: list[Any], name: str, exchange: Exchange) -> list[dict[str, Any]]:
        context = exchange.context
        if exchange.charge is not None and len(items) > 1:
            exchange.charge(len(items))
        answers = await self._scorer.score_all(items, context, [f"{name}[{i}]" for i in range(len(items))])
        if context.span is not None:
            context.span.add(batch_facts(answers))
        return answers


def rows_of_v2(request: InferRequest, plan: Plan, rows_max: int) -> list[dict[str, Any]]:
    """A V2 request with a tensor per field → the same rows as JSON gives. NaN is missing. Raises MalformedError."""
    rows: list[dict[str, Any]] = []
    inputs: list[InferInput] = list(request.inputs)
    seen: set[str] = set()
    for k, one in enumerate(inputs):
        shape = [int(s) for s in one.shape]
        if len(shape) not in (1, 2) or shape[1:] not in ([], [1]) or not 1 <= shape[0] <= rows_max:
            raise MalformedError(f"inputs[{k}].shape: expected [rows] or [rows, 1] with 1 to {rows_max} rows, got {shape[:8]}")
        if k == 0:
            rows = [{"entity": {}, "features": {}} for _ in range(shape[0])]
        elif len(rows) != shape[0]:
            raise MalformedError(f"inputs[{k}].shape: {shape[0]} rows, the first input has {len(rows)}")
        _check_data(one, k)
        try:
            values: list[Any] = np.asarray(one.as_numpy()).reshape(-1).tolist()
        except (InvalidInput, ValueError, TypeError, OverflowError, AttributeError, struct.error) as e:
            raise MalformedError(f"inputs[{k}].data: expected {shape[0]} values of {one.datatype}: {e}") from e
        name = str(one.name)
        if name in seen:
            raise MalformedError(f"inputs[{k}].name: {name[:80]!r} is given twice")
        seen.add(name)
        for row, value in zip(rows, values, strict=True):
            plain = _plain(value)
            if name in _TOP:
                row[name] = plain
            else:
                row["entity" if name in plan.declared_keys else "features"][name] = plain
    if not rows:
        raise MalformedError("inputs: expected one tensor for each field of the request")
    return rows


def _check_data(one: InferInput, k: int) -> None:
    """Raises MalformedError when a value is not of its datatype: numpy makes 1 of 1.7 and true of "no"."""
    datatype, data = str(one.datatype), cast(Any, one.data)
    family = next((f for f in _FAMILIES if datatype.startswith(f)), None)
    if family is None or not isinstance(data, list):
        return  # as_numpy knows what to do with it
    allowed, form = _FAMILIES[family]
    pending = list(cast(list[Any], data))
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += cast(list[Any], value)
        elif type(value) not in allowed:
            raise MalformedError(f"inputs[{k}].data: {datatype} takes {form}, got {str(value)[:40]!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if isinstance(value, float) and math.isnan(value) else value


def _to_v2(request: InferRequest, answers: list[dict[str, Any]]) -> InferResponse:
    binary = bool(request.use_binary_outputs)
    tensors: list[tuple[str, str, Any]] = [
        (SCORE_OUTPUT, "FP32", np.array([a["score"] for a in answers], np.float32)),
        (INTERVAL_OUTPUT, "FP32", np.array([[a["confidence_lower"], a["confidence_upper"]] for a in answers], np.float32)),
        ("decision", "BYTES", np.array([a["decision"].encode() for a in answers], np.object_)),
        # A tensor has no lists of its own length: names with commas between them, which no name holds; empty when none
        ("degraded", "BYTES", np.array([",".join(a["degraded"]).encode() for a in answers], np.object_)),
    ]
    outputs: list[InferOutput] = []
    for name, datatype, tensor in tensors:
        output = InferOutput(name=name, shape=list(tensor.shape), datatype=datatype)
        output.set_data_from_numpy(tensor, binary_data=binary)
        outputs.append(output)
    return InferResponse(
        response_id=str(request.id or ""), model_name=cast(str, answers[0]["model_name"]),
        model_version=cast(str, answers[0]["model_version"]), infer_outputs=outputs, use_binary_outputs=binary,
    )
