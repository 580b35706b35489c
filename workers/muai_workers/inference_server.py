"""`InferenceServer`: server mode in one process, without a broker: models that stay loaded, a bounded queue before
them, batches formed as the collector forms them, and an end that finishes what was accepted.

Several processes, durability and HTTP are what the gateway, the collector and the workers are for; this is for a
program that serves from its own process. Health and readiness have the same fields there and here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from muai_batching.assembler import Assembler, BatchKey, Formed, Room
from muai_batching.collector import policy_from
from muai_batching.fair_queue import Waiting
from muai_producers.errors import MuaiError, QueueFullError
from muai_producers.gateway.health import Health, Readiness
from muai_producers.token_estimates import input_tokens
from muai_producers.wire import InferenceRequest, InferenceResult, Parameters
from muai_workers.model_manager import build_request, find_model
from muai_workers.optimization_manager import OptimizationManager

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
ONE_BATCH = Room(idle=1, ahead=1)


class ServerStoppedError(MuaiError):
    """The server takes nothing new, or ended before this request was done."""

    code = "shutting_down"
    retryable = True
    http_status = 503


class InferenceServer:
    """Serves requests of this process. Thread-safe.

    Args:
        config: capacity, models to load at the start and the time to stop are those of `monitoring.server`.
        manager: runs the batches; None: one of its own, closed with the server.
    """

    def __init__(self, config: Settings, manager: OptimizationManager | None = None) -> None:
        self._settings = config
        self._server = config.monitoring.server
        self._owns_manager = manager is None
        self._manager = manager or OptimizationManager(config)
        self._assembler = Assembler(policy_from(config))
        self._pending: dict[str, Future[InferenceResult]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._accepting = False
        self._ended = False
        self._started_s = time.monotonic()
        self._load_errors: dict[str, str] = {}

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the models that are to be preloaded, then serve. A model that no engine can load shows in the health."""
        for model in self._server.preload_models:
            self._preload(model)
        with self._changed:
            self._accepting, self._ended = True, False
        self._thread = threading.Thread(target=self._serve, name="muai-server", daemon=True)
        self._thread.start()

    def _preload(self, model: str) -> None:
        try:
            self._manager.load_model(model)
        except MuaiError as error:
            log.error("%s could not be loaded at the start: %s", model, error)
            self._load_errors[model] = error.message

    def stop(self, graceful_timeout: float | None = None) -> None:
        """Take nothing new, finish what was accepted, then end.

        Args:
            graceful_timeout: seconds to finish in; None: `graceful_shutdown_timeout`. What is not done by then fails
                with `ServerStoppedError`.
        """
        limit_s = self._server.graceful_shutdown_timeout if graceful_timeout is None else graceful_timeout
        with self._changed:
            self._accepting = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending, limit_s)
            left, self._pending = self._pending, {}
            self._ended = True
            self._assembler.discard(lambda _: True)
            self._changed.notify_all()
        for request_id, future in left.items():
            future.set_exception(ServerStoppedError(f"the server ended before request {request_id} was done"))
        if self._thread is not None:
            self._thread.join(5.0)  # a batch that is running goes on; its results are nobody's any more
        if self._owns_manager:
            self._manager.close()

    def __enter__(self) -> InferenceServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        model_name: str,
        inputs: Mapping[str, Any],
        parameters: Parameters | None = None,
        task: str | None = None,
    ) -> Future[InferenceResult]:
        """Put a request into the queue; the future has its result, or raises its error.

        Raises:
            RequestError: the request is wrong.
            QueueFullError: `queue_capacity` requests are accepted and not answered.
            ServerStoppedError: the server is stopping, or was not started.
        """
        spec = find_model(self._settings, model_name)
        request = build_request(spec, inputs, parameters, task)
        key = BatchKey(spec.name, request.task or spec.task, self._settings.chain(spec))
        future: Future[InferenceResult] = Future()
        with self._changed:
            if not self._accepting:
                raise ServerStoppedError("the server is not running; nothing was accepted")
            capacity, in_flight = self._server.queue_capacity, len(self._pending)
            if in_flight >= capacity:
                raise QueueFullError(
                    f"full: {in_flight} of {capacity} requests are in flight (queue_capacity); try again later",
                    {"limit": "queue_capacity", "allowed": capacity, "in_flight": in_flight, "retry_after_s": 1.0},
                )
            self._pending[request.id] = future
            tokens = input_tokens(request.inputs, request.parameters)
            self._assembler.add(key, Waiting(request, tokens, time.monotonic()))
            self._changed.notify_all()
        return future

    def infer(self, model_name: str, inputs: Mapping[str, Any], timeout_s: float | None = None) -> InferenceResult:
        """Submit and wait; raises as `submit`, and what the request ended with."""
        return self.submit(model_name, inputs).result(timeout_s)

    # -- the serving thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (formed := self._next()) is not None:
            by_parameters: dict[bytes, list[InferenceRequest]] = {}
            for item in formed.items:
                by_parameters.setdefault(msgspec.json.encode(item.request.parameters), []).append(item.request)
            for requests in by_parameters.values():
                self._run(formed.key, requests)

    def _next(self) -> Formed | None:
        """The next batch, waited for; None when the server has ended."""
        with self._changed:
            while not self._ended:
                now_s = time.monotonic()
                formed = self._assembler.form(now_s, lambda _: ONE_BATCH)
                if formed is not None:
                    return formed
                due_s = self._assembler.next_timeout_s()
                self._changed.wait(None if due_s is None else max(0.001, due_s - now_s))
        return None

    def _run(self, key: BatchKey, requests: list[InferenceRequest]) -> None:
        outcomes: list[InferenceResult | MuaiError]
        try:
            inputs = [request.inputs for request in requests]
            outcomes = self._manager.infer_many(key.model, inputs, None, requests[0].parameters, key.task)
        except MuaiError as error:
            outcomes = [error] * len(requests)
        with self._changed:
            futures = [self._pending.pop(request.id, None) for request in requests]
            self._changed.notify_all()
        for future, outcome in zip(futures, outcomes, strict=True):
            if future is None or not future.set_running_or_notify_cancel():
                continue
            if isinstance(outcome, MuaiError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    # -- what it says of itself ----------------------------------------------------------------------------------

    def health_check(self) -> Health:
        """How the server does: unhealthy when it serves nothing, degraded when it cannot serve all."""
        engines = self._manager.get_engine_status()
        unserved = [name for name in self._settings.models if not self._manager.get_available_engines(name)]
        fatal = [] if self._accepting else ["the server is not running"]
        if self._settings.models and len(unserved) == len(self._settings.models):
            fatal.append("no engine can serve any model")
        warnings = [f"no engine can serve {name}" for name in sorted(unserved)]
        warnings += [f"{model} could not be preloaded: {error}" for model, error in self._load_errors.items()]
        wanted = {name for spec in self._settings.models.values() for name in self._settings.chain(spec)}
        warnings += [
            f"{name}: {status.error_message}"
            for name, status in engines.items()
            if name in wanted and not status.available
        ]
        capacity = self._server.queue_capacity
        if len(self._pending) >= 0.9 * capacity:
            warnings.append(f"nearly full: {len(self._pending)} of {capacity} requests are in flight")
        return Health(
            status="unhealthy" if fatal else "degraded" if warnings else "healthy",
            uptime_seconds=round(time.monotonic() - self._started_s, 3),
            models_loaded=sorted({model for status in engines.values() for model in status.models_loaded}),
            engines_available=[name for name, status in engines.items() if status.available],
            queue_size=len(self._pending),
            queue_capacity=capacity,
            reasons=fatal + warnings,
        )

    def readiness_check(self) -> Readiness:
        """Whether requests should be sent: it accepts them, and each preloaded model is loaded."""
        engines = self._manager.get_engine_status()
        loaded = {model for status in engines.values() for model in status.models_loaded}
        checks = {"serving": self._accepting}
        checks |= {f"model:{model}": model in loaded for model in self._server.preload_models}
        reasons = [] if self._accepting else ["the server is not running"]
        reasons += [f"{model} is not loaded" for model in self._server.preload_models if model not in loaded]
        return Readiness(ready=all(checks.values()), checks=checks, reasons=reasons)
