"""KServe's Model over the engine: V1 rows, V2 JSON and gRPC, as the SDK decodes them."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model
from kserve.errors import InferenceError, InvalidInput

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.errors import HafniumError
from hafnium_contract.v2_binary import TensorError, check_numbers
from hafnium_contract.wire import CONTRACT_HEADER, MODEL_DIGEST_HEADER
from hafnium_predictor.engine import Engine, load_engine
from hafnium_predictor.errors import AnswerError, ContractMismatchError, ModelFailureError, NotReadyError, RowsError
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_predictor.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import LiveSpan, Tracing

log = logging.getLogger("hafnium.predictor")
Matrix = npt.NDArray[np.float32]
SPAN: ContextVar[LiveSpan | None] = ContextVar("hafnium_span", default=None)
"""Of the request in hand, for who counts its rows. The SDK is between it and the gates."""


class RiskModel(Model):
    """One bundle under one name. Never ready before its bundle is checked and warm; `reason` says why not."""

    def __init__(self, settings: Settings, metrics: PredictorMetrics, tracing: Tracing | None = None) -> None:
        super().__init__(settings.model_name)
        self.reason = f"loading {settings.model_dir}"
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._engine: Engine | None = None

    def load(self) -> bool:
        """Opens, checks and warms the bundle. On a bad one it logs why, keeps the reason, and stays not ready."""
        s = self._settings
        try:
            engine = load_engine(s.model_dir, self._metrics, rows_max=s.rows_max, warmup_rows=s.warmup_rows)
        except (HafniumError, OSError) as e:
            self.reason = str(e)
            log.error("bundle refused: %s", e)
            return False
        except Exception as e:  # whatever a foreign file provokes, the process has to stay up and say it
            self.reason = f"{s.model_dir}: unexpected {type(e).__name__}: {e}"
            log.exception("bundle refused")
            return False
        self._metrics.loaded(engine.bundle.manifest)
        self._engine = engine
        self.reason = ""
        self.ready = True
        m = engine.bundle.manifest
        log.info("ready: %s version %s, %s, contract %s", m.model_name, m.model_version, m.digest, m.contract_digest)
        return True

    def start(self) -> None:
        """The SDK's start() declares any model ready; this one becomes ready in load() only."""

    @property
    def engine_or_none(self) -> Engine | None:
        return self._engine

    @property
    def loaded(self) -> Engine:
        """The engine. Raises NotReadyError with the reason."""
        if self._engine is None:
            raise NotReadyError(self.reason)
        return self._engine

    def get_input_types(self) -> list[dict[str, Any]]:
        """Input of V2's model metadata."""
        return [{"name": INPUT_NAME, "datatype": "FP32", "shape": [-1, self._engine.columns if self._engine else -1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Outputs of V2's model metadata."""
        return [{"name": SCORE_OUTPUT, "datatype": "FP32", "shape": [-1]},
                {"name": INTERVAL_OUTPUT, "datatype": "FP32", "shape": [-1, 2]}]

    async def predict(
        self, payload: Any, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | InferResponse:
        """V1 `{"instances": [[...], ...]}` → `{"predictions": [score], "intervals": [[low, high]]}`; V2 → V2."""
        return self._predict(payload, headers)

    def _predict(self, payload: Any, headers: dict[str, str] | None) -> dict[str, Any] | InferResponse:
        try:
            engine = self.loaded
            check_contract(engine, (headers or {}).get(CONTRACT_HEADER))
            read = matrix_from_v2 if isinstance(payload, InferRequest) else matrix_from_v1
            matrix = read(payload, engine.columns, engine.rows_max)
            if self._tracing is not None and (span := SPAN.get()) is not None:
                span.add({"hafnium.rows": len(matrix)})
            score, interval = engine.run(matrix)
            if isinstance(payload, InferRequest):
                return _to_v2(payload, engine, score, interval)
            return {"predictions": score.tolist(), "intervals": interval.tolist()}
        except ModelFailureError as e:
            raise InferenceError(str(e)) from e
        except AnswerError as e:
            raise InvalidInput(str(e)) from e


def check_contract(engine: Engine, digest: str | None) -> None:
    """Raises ContractMismatchError when a row was encoded for another contract than the model's."""
    own = engine.bundle.contract.digest
    if digest is not None and digest != own:
        raise ContractMismatchError(f"the row was encoded for contract {digest}, this model takes {own}; fetch it again")


def matrix_from_v1(payload: Any, columns: int, rows_max: int) -> Matrix:
    """Body of a V1 request → [rows, columns]; null is missing. Raises RowsError."""
    instances = cast(dict[str, Any], payload).get("instances") if isinstance(payload, dict) else None
    if not isinstance(instances, list) or not instances:
        raise RowsError('expected {"instances": [[…], …]} with at least one row')
    rows = cast(list[Any], instances)
    if len(rows) > rows_max:
        raise RowsError(f"instances: {len(rows)} rows; from 1 to {rows_max} are taken")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(cast(list[Any], row)) != columns:
            got = f"{len(cast(list[Any], row))} values" if isinstance(row, list) else type(row).__name__
            raise RowsError(f"instances[{i}]: expected a list of {columns} numbers, got {got}")
        for j, value in enumerate(cast(list[Any], row)):
            if value is not None and type(value) not in (int, float, bool):
                raise RowsError(f"instances[{i}][{j}]: expected a number or null, got {str(value)[:40]!r}")
    try:
        with np.errstate(over="ignore"):  # too large becomes inf, which run() refuses with its place
            return np.array(rows, np.float64).astype(np.float32)
    except (ValueError, TypeError, OverflowError) as e:
        raise RowsError(f"instances: expected numbers: {e}") from e


def matrix_from_v2(request: InferRequest, columns: int, rows_max: int) -> Matrix:
    """A V2 request (JSON or gRPC) → [rows, columns]. Raises RowsError."""
    inputs: list[InferInput] = list(request.inputs)
    if len(inputs) != 1 or inputs[0].name != INPUT_NAME:
        raise RowsError(f"inputs: expected one input {INPUT_NAME!r}, got {[str(i.name)[:40] for i in inputs[:5]]}")
    one = inputs[0]
    if one.datatype not in ("FP32", "FP64"):
        raise RowsError(f"inputs[0].datatype: expected FP32 or FP64, got {str(one.datatype)[:20]!r}")
    shape = [int(s) for s in one.shape]
    if len(shape) != 2 or shape[1] != columns or not 1 <= shape[0] <= rows_max:
        raise RowsError(f"inputs[0].shape: expected [1 to {rows_max}, {columns}], got {shape[:8]}")
    try:
        check_numbers(one.data)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(one.as_numpy(), np.float32)
    except (TensorError, InvalidInput, ValueError, TypeError, OverflowError) as e:
        raise RowsError(f"inputs[0].data: expected {shape[0] * columns} numbers: {e}") from e


def _to_v2(request: InferRequest, engine: Engine, score: Matrix, interval: Matrix) -> InferResponse:
    manifest = engine.bundle.manifest
    binary = bool(request.use_binary_outputs)
    outputs: list[InferOutput] = []
    for name, tensor in ((SCORE_OUTPUT, score), (INTERVAL_OUTPUT, interval)):
        output = InferOutput(name=name, shape=list(tensor.shape), datatype="FP32")
        output.set_data_from_numpy(tensor, binary_data=binary)
        outputs.append(output)
    # gRPC has no headers of ours, so its answer says in its parameters which model gave it
    by_grpc = bool(vars(request)["from_grpc"])  # an attribute that hides the class's method of the same name
    facts = {CONTRACT_HEADER: manifest.contract_digest, MODEL_DIGEST_HEADER: manifest.digest} if by_grpc else None
    return InferResponse(
        response_id=str(request.id or ""), model_name=manifest.model_name, model_version=manifest.model_version,
        infer_outputs=outputs, use_binary_outputs=binary, parameters=facts,
    )
