"""KServe's ModelServer with our hot path and our gate before its app, uvloop, and a process that outlives a bad bundle.

The SDK's `start()` refuses to start without a ready model, so that Kubernetes would show a crash loop and no reason; it
also names its uvicorn app by a string. Both are what this subclass changes. The SDK's configuration, endpoints, gRPC
server and health paths stay.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import uvloop
from kserve import ModelServer
from kserve.model_server import app as kserve_app
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import RESTServer

from hafnium_contract.asgi import App
from hafnium_contract.serving.garbage import release, settle
from hafnium_contract.serving.grpc_calls import InferenceServer, listening_address, when_failed
from hafnium_contract.serving.limited_protocol import limited_protocol_class
from hafnium_contract.serving.tracing import FLUSH_S
from hafnium_contract.serving.workers import is_worker, others_missing, say_ready, worker_socket
from hafnium_predictor.gate import Gate
from hafnium_predictor.grpc_gate import GrpcGate
from hafnium_predictor.hot_path import HotPath
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_predictor.model import RiskModel
from hafnium_predictor.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

log = logging.getLogger("hafnium.predictor")


class _GatedRestServer(RESTServer):
    """Creates KServe's app as ever and puts the gate before it, and the hot path before both."""

    def gate(self, model: RiskModel, metrics: PredictorMetrics, settings: Settings, tracing: Tracing | None) -> None:
        self._gate = Gate(cast(App, kserve_app), model, metrics, settings, tracing)
        limits = settings.connection_limits
        hot = HotPath(model, metrics, settings, tracing).routes.protocol_class(limits) if settings.hot_path else None
        self.config.http = hot or limited_protocol_class(limits)

    async def start(self) -> None:
        """Serves until it is told to stop; a worker on the socket that it was given."""
        self.create_application()
        shared = worker_socket()
        await self._server.serve(None if shared is None else [shared])

    def create_application(self) -> None:
        super().create_application()
        self.config.app = cast(Any, self._gate)

    @property
    def told_to_stop(self) -> bool:
        return self._server.should_exit

    def request_exit(self) -> None:
        self._server.should_exit = True


class PredictorServer(ModelServer):
    """Serves one RiskModel until SIGTERM, then finishes what is in flight."""

    def __init__(self, settings: Settings, tracing: Tracing | None = None) -> None:
        super().__init__(
            http_port=settings.http_port, grpc_port=settings.grpc_port, workers=1, enable_grpc=settings.enable_grpc,
            enable_latency_logging=False, grace_period=settings.grace_period_s, timeout_keep_alive=settings.keep_alive_s,
        )
        self._settings = settings
        self._metrics = PredictorMetrics(settings.model_name)
        self._tracing = tracing
        self._model = RiskModel(settings, self._metrics, tracing)
        self.exit_status = 0
        """2: it could not listen where it was told to."""

    def run(self) -> None:
        """Blocks until the server has stopped."""
        self.register_model(self._model)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        release()

    async def _run(self) -> None:
        np.seterr(over="ignore")  # a number too large for float32 becomes inf, which the engine refuses by name: no warning beside it
        rest = _GatedRestServer(
            "kserve.model_server:app", self.dataplane, self.model_repository_extension, self.http_port,
            grace_period=self.grace_period, timeout_keep_alive=self.timeout_keep_alive,
        )
        rest.config.host = self._settings.host
        rest.config.proxy_headers = False  # x-forwarded-for is anybody's to send, and nothing here reads it
        rest.gate(self._model, self._metrics, self._settings, self._tracing)
        # uvicorn takes the signals over while it serves and raises them again when it has drained: they must not kill us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: rest.request_exit())
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(None, self._load)
        grpc_task = asyncio.create_task(self._serve_grpc(loading, rest)) if self.enable_grpc else None
        if grpc_task is not None:
            when_failed(grpc_task, lambda: self._without_grpc(rest))
        if is_worker() and others_missing() == 0:
            await loading  # started again beside others that answer: it must not take what it can't answer yet
        await rest.start()
        self._model.ready = False
        await loading
        if grpc_task is not None:
            await asyncio.gather(grpc_task, return_exceptions=True)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close, FLUSH_S)
        log.info("stopped")

    def _load(self) -> bool:
        loaded = self._model.load()
        settle()
        if loaded:
            say_ready()
        return loaded

    async def _serve_grpc(self, loading: asyncio.Future[bool], rest: _GatedRestServer) -> None:
        """gRPC opens when the model is ready: the SDK answers INTERNAL for a model that is not (it means UNAVAILABLE)."""
        if not await asyncio.shield(loading) or rest.told_to_stop:
            return
        s = self._settings
        server = InferenceServer(
            listening_address(s.host, s.grpc_port), GrpcGate(self._model, self._metrics, s, self._tracing),
            body_bytes_max=s.body_bytes_max, grace_period_s=s.grace_period_s, streams_max=s.grpc_streams_max,
        )
        servicer = InferenceServicer(self.dataplane, self.model_repository_extension)
        add_GRPCInferenceServiceServicer_to_server(servicer, server.server)
        await server.serve(lambda: rest.told_to_stop)

    def _without_grpc(self, rest: _GatedRestServer) -> None:
        """A server that was asked for gRPC and can't give it is not to be ready."""
        self.exit_status = 2
        rest.request_exit()
