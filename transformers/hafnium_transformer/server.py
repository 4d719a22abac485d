"""KServe's ModelServer with our hot path and our gate before its app, uvloop, and the transformer's own work around it.

The SDK's `start()` names its uvicorn app by a string and leaves no place to put anything before it; `run()` here does the
same things with that place. While the port is open already, the contract is fetched and the feature store opened in the
background: the process is alive at once and ready when both are there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import uvloop
from kserve import ModelServer
from kserve.model_server import app as kserve_app
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.rest.server import RESTServer

from hafnium_contract.asgi import App
from hafnium_contract.errors import InputError
from hafnium_contract.serving.connection_limits import ConnectionLimits
from hafnium_contract.serving.garbage import release, settle
from hafnium_contract.serving.grpc_calls import InferenceServer, listening_address, when_failed
from hafnium_contract.serving.limited_protocol import limited_protocol_class
from hafnium_contract.serving.tracing import FLUSH_S
from hafnium_contract.serving.workers import is_worker, others_missing, say_ready, worker_socket
from hafnium_transformer.admission import Admission
from hafnium_transformer.coalescing import Coalescer
from hafnium_transformer.errors import ScoringError
from hafnium_transformer.gate import Gate
from hafnium_transformer.grpc_gate import GrpcGate
from hafnium_transformer.hot_path import HotPath
from hafnium_transformer.log_target import log_target
from hafnium_transformer.log_writer import EntityHash, InferenceLog
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.model import RiskTransformer
from hafnium_transformer.online_store.feast import FeastReader, SdkStore
from hafnium_transformer.online_store.records import OnlineStore
from hafnium_transformer.predictor_client import HopLimits, PredictorClient
from hafnium_transformer.scoring import Scorer
from hafnium_transformer.settings import Settings

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Tracing

log = logging.getLogger("hafnium.transformer")
_SWITCH_S = 0.0005
"""How long the log's thread may keep the interpreter while requests wait. Python's default of 5 ms showed in the p99."""
_WAIT_S = 0.05
_RETRY_FIRST_S, _RETRY_MAX_S = 0.1, 2.0
"""Pause between tries to get the contract: short at first, since predictor and transformer start together."""


class _GatedRestServer(RESTServer):
    """Creates KServe's app as ever and puts the gate before it, and the hot path before both."""

    def put_before(self, gate: Gate, hot_path: HotPath | None, limits: ConnectionLimits) -> None:
        self._gate = gate
        self.config.http = limited_protocol_class(limits) if hot_path is None else hot_path.routes.protocol_class(limits)

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
        self._gate.stopping = True
        self._server.should_exit = True


class TransformerServer(ModelServer):
    """Serves until SIGTERM, then finishes what is in flight and writes the rest of the inference log."""

    def __init__(self, settings: Settings, tracing: Tracing | None = None) -> None:
        super().__init__(
            http_port=settings.http_port, grpc_port=settings.grpc_port, workers=1, enable_grpc=settings.enable_grpc,
            enable_latency_logging=False, grace_period=settings.grace_period_s, timeout_keep_alive=settings.keep_alive_s,
        )
        self._settings = settings
        self._tracing = tracing
        self._opening = threading.Event()
        """A thread is importing Feast or opening its store: seconds in which nothing can end it."""
        self.exit_status = 0
        """2: it could not listen where it was told to."""

    def run(self) -> None:
        """Blocks until the server has stopped."""
        sys.setswitchinterval(_SWITCH_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())
        release()

    async def _run(self) -> None:
        s = self._settings
        np.seterr(over="ignore")  # a derived value too large for float32 becomes inf, which the predictor refuses: no warning beside it
        metrics = TransformerMetrics()
        key = s.entity_hash_key.get_secret_value() if s.entity_hash_key else None
        inference_log = None if not s.inference_log else InferenceLog(
            log_target(s.inference_log), metrics, flush_seconds=s.log_flush_seconds, flush_rows=s.log_flush_rows,
            queue_rows_max=s.log_queue_rows_max, entity_hash=EntityHash(key),
        )
        client = PredictorClient(s.predictor_host, s.model_name, tls=s.predictor_use_ssl, limits=HopLimits(
            s.connection_age_s, s.retry_share, s.retry_spare, s.breaker_failures_max, s.breaker_pause_first_s, s.breaker_pause_max_s,
        ))
        scorer = Scorer(s, client, metrics, inference_log)
        self.register_model(RiskTransformer(s, scorer))
        rest = _GatedRestServer(
            "kserve.model_server:app", self.dataplane, self.model_repository_extension, self.http_port,
            grace_period=self.grace_period, timeout_keep_alive=self.timeout_keep_alive,
        )
        rest.config.host = s.host
        rest.config.proxy_headers = False  # x-forwarded-for is anybody's to send: a client is its connection's address on all paths
        admission = Admission(s, metrics)
        coalescer = Coalescer(
            scorer, admission.limit, batches_max=s.batches_in_flight_max, rows_max=s.coalesced_rows_max, traced=self._tracing is not None)
        hot_path = HotPath(scorer, coalescer, admission, metrics, s, self._tracing) if s.hot_path else None
        gate = Gate(cast(App, kserve_app), scorer, admission, metrics, s, self._tracing)
        rest.put_before(gate, hot_path, s.connection_limits)
        # uvicorn takes the signals over while it serves and raises them again when it has drained: they must not kill us.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: rest.request_exit())
        background = [asyncio.create_task(self._become_ready(scorer))]
        serving_grpc: asyncio.Task[None] | None = None
        if self.enable_grpc:
            grpc_gate = GrpcGate(scorer, admission, metrics, s, self._tracing)
            serving_grpc = asyncio.create_task(self._serve_grpc(grpc_gate, rest))
            when_failed(serving_grpc, lambda: self._without_grpc(rest))
        try:
            while is_worker() and others_missing() == 0 and not scorer.active and not rest.told_to_stop:
                await asyncio.sleep(_WAIT_S)  # started again beside others that answer: it must not take what it can't answer yet
            await rest.start()
        finally:
            if serving_grpc is not None:
                rest.request_exit()  # however HTTP ended
                await asyncio.gather(serving_grpc, return_exceptions=True)
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            client.close()
            scorer.close()
            if inference_log is not None:
                await asyncio.to_thread(inference_log.close)
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close, FLUSH_S)
            log.info("stopped")
            if self._opening.is_set():
                # Nothing was scored yet, and all that there was is written. Python would wait for the thread until its import is over,
                # on a busy machine longer than Kubernetes waits
                logging.shutdown()
                os._exit(self.exit_status)

    async def _become_ready(self, scorer: Scorer) -> None:
        """Opens the feature store, gets the contract, and afterwards keeps the store's registry fresh."""
        pause = _RETRY_FIRST_S
        repo = self._settings.feature_repo
        opened = repo is None
        while not scorer.active:
            try:
                if repo is not None and not opened:
                    scorer.use_store(*await self._open_store(repo))
                    opened = True
                await scorer.refresh(None)
            except (ScoringError, InputError) as e:
                reason = e.detail if isinstance(e, ScoringError) else str(e)
                self._not_yet(scorer, reason)
            except Exception as e:  # noqa: BLE001 - whatever Feast raises over a broken repository: say it and try again
                self._not_yet(scorer, f"feature store: {type(e).__name__}: {e}")
            if not scorer.active:
                await asyncio.sleep(pause)
                pause = min(pause * 2.0, _RETRY_MAX_S)
        settle()
        say_ready()
        while repo is not None:
            await asyncio.sleep(self._settings.registry_refresh_s)
            try:
                await scorer.refresh_registry()
            except Exception as e:  # noqa: BLE001 - its storage may fail in any way; the old one stays in force
                log.warning("feature store's registry was not refreshed: %s: %s", type(e).__name__, e)

    async def _open_store(self, repo: Path) -> tuple[FeastReader, OnlineStore]:
        s = self._settings
        reader = await asyncio.to_thread(self._open_reader, repo)
        store = reader.direct_store(rows_max=s.lookup_queue_rows_max) if s.lookup_direct else None
        if store is None:
            store = SdkStore(
                reader, threads=s.lookup_threads, rows_max=s.lookup_rows_max, queue_rows_max=s.lookup_queue_rows_max
            )
        log.info("features are read by %s", type(store).__name__)
        return reader, store

    def _open_reader(self, repo: Path) -> FeastReader:
        self._opening.set()
        try:
            return FeastReader(repo)
        finally:
            self._opening.clear()

    @staticmethod
    def _not_yet(scorer: Scorer, reason: str) -> None:
        if reason != scorer.reason:
            log.info("not ready yet: %s", reason)
        scorer.reason = reason

    async def _serve_grpc(self, gate: GrpcGate, rest: _GatedRestServer) -> None:
        s = self._settings
        server = InferenceServer(
            listening_address(s.host, s.grpc_port), gate, body_bytes_max=s.body_bytes_max, grace_period_s=s.grace_period_s)
        servicer = InferenceServicer(self.dataplane, self.model_repository_extension)
        add_GRPCInferenceServiceServicer_to_server(servicer, server.server)
        await server.serve(lambda: rest.told_to_stop)

    def _without_grpc(self, rest: _GatedRestServer) -> None:
        """A server that was asked for gRPC and can't give it is not to be ready."""
        self.exit_status = 2
        rest.request_exit()
