"""`OptimizationManager`: inference in this process, on the best engine that can serve it, without any broker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from muai_batching.routing import (
    EngineState,
    attempt,
    chain_spent,
    cools_engine,
    next_attempt,
    resolve_chain,
)
from muai_config import ModelSpec, Settings
from muai_producers.errors import EngineError, EngineUnavailableError, InvalidRequestError, MuaiError
from muai_producers.monitoring.outcomes import record_failure
from muai_producers.monitoring.recorder import Recorder
from muai_producers.monitoring.recorder import recorder as own_recorder
from muai_producers.tracing import NO_TRACER, Tracer, names
from muai_producers.wire import Attempt, InferenceRequest, InferenceResult, Parameters
from muai_workers.engines.base import Availability, Completion, Engine, EngineOutput, Piece
from muai_workers.engines.isolate import run_isolated
from muai_workers.engines.registry import ENGINE_NAMES, create_engine
from muai_workers.model_manager import ModelManager, build_request, find_model
from muai_workers.monitoring.models import ModelWatch
from muai_workers.monitoring.serving import record_run, record_served

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatus:
    """One engine, as an operator sees it."""

    name: str
    available: bool
    models_loaded: list[str]
    error_message: str | None
    """Why it is not available, or None."""
    last_check: datetime
    """UTC."""


@dataclass(frozen=True)
class _Check:
    engine: Engine | None
    availability: Availability
    at: datetime


class OptimizationManager:
    """Follows each model's chain: the preferred engine first, each at most once. Thread-safe."""

    def __init__(
        self,
        settings: Settings,
        model_manager: ModelManager | None = None,
        engines: Mapping[str, Engine] | None = None,
        now_s: Callable[[], float] = time.monotonic,
        tracer: Tracer = NO_TRACER,
        recorder: Recorder = own_recorder,
    ) -> None:
        """
        Args:
            model_manager: runs what falls to PyTorch; None: one of its own.
            engines: the engines to use, by name; None: those of the registry, each made when first needed.
            tracer: makes a span of each call and of each attempt of it.
            recorder: what the metrics are told; a `PrometheusExporter(source=…)` shows it.
        """
        self._tracer = tracer
        self._settings = settings
        self._now_s = now_s
        self._recorder = recorder
        self._watches: list[ModelWatch] = []
        self._given = None if engines is None else dict(engines)
        self._models = model_manager or ModelManager(settings, None if engines is None else engines.get("pytorch"))
        self._managers: dict[str, ModelManager] = {}
        """Of the engines but PyTorch."""
        self._checks: dict[str, _Check] = {}
        self._cooling: dict[tuple[str, str], EngineState] = {}
        """By engine and model: one model that an engine cannot run does not keep it from the others."""
        self._lock = threading.RLock()

    def infer(
        self,
        model_name: str,
        inputs: Mapping[str, Any],
        engine_preference: str | Sequence[str] | None = None,
        parameters: Parameters | None = None,
        task: str | None = None,
    ) -> InferenceResult:
        """Run one request.

        Args:
            inputs: what the task reads, such as `{"text": …}`.
            engine_preference: tried first, where the model's chain has it.
            task: None: the catalog's.
        Raises:
            RequestError: the request itself is wrong.
            EnginesExhaustedError: no engine served it; says what each of them answered.
            EngineError: as the engine raised it, where `fallback_on_error` is false.
        """
        answer = self.infer_many(model_name, [inputs], engine_preference, parameters, task)[0]
        if isinstance(answer, MuaiError):
            raise answer
        return answer

    def infer_many(
        self,
        model_name: str,
        inputs: Sequence[Mapping[str, Any]],
        engine_preference: str | Sequence[str] | None = None,
        parameters: Parameters | None = None,
        task: str | None = None,
    ) -> list[InferenceResult | MuaiError]:
        """Run requests as one batch; one answer for each, in their order, failures as errors that are not raised.

        Raises:
            ModelNotFoundError: the catalog has no such model.
            InvalidRequestError: there is no such engine as is preferred.
        """
        spec = find_model(self._settings, model_name)
        answers: dict[int, InferenceResult | MuaiError] = {}
        requests: dict[int, InferenceRequest] = {}
        for index, one in enumerate(inputs):
            try:
                requests[index] = build_request(spec, one, parameters, task)
            except MuaiError as error:
                answers[index] = error
        preference = self._preference(engine_preference)
        if requests:
            run = _ChainRun(list(requests.values()))
            with self._tracer.trace_request(next(iter(requests.values())).id):
                self._follow_chain(spec, self._chain(spec, preference), run)
            answers |= {index: run.answers[request.id] for index, request in requests.items()}
            self._record(spec.name, [(request, run.answers[request.id]) for request in requests.values()])
        return [answers[index] for index in range(len(inputs))]

    def load_model(self, model_name: str) -> str:
        """Load the model on the first engine of its chain that can, so that its first request need not wait for it;
        returns that engine's name.

        Raises:
            ModelNotFoundError: the catalog has no such model.
            EngineError: as the last engine raised it, or none can serve the model.
        """
        error: EngineError = EngineUnavailableError(f"no engine can serve {model_name}", {"model": model_name})
        for name in self.get_available_engines(model_name):
            engine = self._check(name).engine
            assert engine is not None  # an engine that was not made is not available
            try:
                self._manager(name, engine).load_model(model_name)
            except EngineError as failure:
                logger.warning("%s cannot load %s: %s", name, model_name, failure)
                error = failure
            else:
                return name
        raise error

    def _record(self, model: str, answered: Sequence[tuple[InferenceRequest, InferenceResult | MuaiError]]) -> None:
        served: dict[str, list[tuple[InferenceRequest, InferenceResult]]] = {}
        for request, answer in answered:
            if isinstance(answer, MuaiError):
                record_failure(self._recorder, model, request.tenant, answer)
            else:
                served.setdefault(answer.engine_used, []).append((request, answer))
        for engine, pairs in served.items():
            record_served(self._recorder, model, engine, pairs)

    def get_available_engines(self, model_name: str) -> list[str]:
        """The engines that can serve the model now, in the order in which they would be tried.

        Raises:
            ModelNotFoundError: the catalog has no such model.
        """
        spec = find_model(self._settings, model_name)
        chain = self._chain(spec, ())
        states = self._states(spec, chain)
        return [name for name in chain if next_attempt([name], states, self._now_s()).engine is not None]

    def get_engine_status(self) -> dict[str, EngineStatus]:
        """Every engine, checked when it was first needed or now."""
        names = ENGINE_NAMES if self._given is None else tuple(self._given)
        return {name: self._status(name) for name in names}

    def close(self) -> None:
        """Unload every model and end what the engines started."""
        self._models.close()
        for check in self._checks.values():
            if check.engine is not None:
                check.engine.close()
        for watch in self._watches:
            watch.close()

    def _preference(self, preference: str | Sequence[str] | None) -> tuple[str, ...]:
        names = (preference,) if isinstance(preference, str) else tuple(preference or ())
        known = dict.fromkeys((*ENGINE_NAMES, *(self._given or ())))
        for name in names:
            if name not in known:
                raise InvalidRequestError(f"there is no engine {name!r}; there are {', '.join(known)}")
        return names

    def _chain(self, spec: ModelSpec, preference: Sequence[str]) -> tuple[str, ...]:
        if self._given is None:
            configured: tuple[str, ...] = self._settings.chain(spec)
        elif not self._settings.optimization.enabled:
            configured = ("pytorch",)
        else:
            # Engines that were handed in may have names that the settings do not know: they follow the known ones.
            known = [name for name in self._settings.chain(spec) if name in self._given]
            configured = (*known, *(name for name in self._given if name not in ENGINE_NAMES))
        return resolve_chain(preference, configured, allowed=configured)

    def _follow_chain(self, spec: ModelSpec, chain: Sequence[str], run: _ChainRun) -> None:
        while run.left:
            decision = next_attempt(chain, self._states(spec, chain), self._now_s())
            run.skip(decision.skipped)
            if decision.engine is None:
                run.give_up(spec.name)
                return
            self._run_on(decision.engine, spec, run)
            if not self._settings.optimization.fallback_on_error:
                run.answer_with_last_errors()
            chain = decision.rest

    def _run_on(self, name: str, spec: ModelSpec, run: _ChainRun) -> None:
        """Have one engine serve what is left; what it could not serve stays left, with the attempt noted."""
        engine = self._check(name).engine
        assert engine is not None  # an engine that was not made is not available
        started_s = time.perf_counter()
        task = run.task(spec)
        batch = list(run.left.values())

        def complete(completion: Completion) -> None:
            run.complete(name, completion, len(batch), (time.perf_counter() - started_s) * 1000)

        with ExitStack() as kept:
            span = kept.enter_context(self._tracer.trace_inference(spec.name, name))
            told = {names.MODEL_NAME: spec.name, names.ENGINE: name, names.BATCH_SIZE: len(batch)}
            if span is not None:
                span.set_attributes(told)

            def load() -> None:
                with self._tracer.trace_part(names.MODEL_LOADING, told):
                    kept.enter_context(self._manager(name, engine).using(spec))

            def forward(part: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
                with self._tracer.trace_part(names.FORWARD_PASS, {**told, names.BATCH_SIZE: len(part)}):
                    yield from engine.run(spec, task, part)

            report = run_isolated(forward, batch, complete, prepare=load)
            if span is not None and report.engine_failure is not None:
                self._tracer.record_error(span, report.engine_failure)
        record_run(self._recorder, spec.name, name, len(batch), sum(request.id in run.left for request in batch))
        failure = report.engine_failure
        with self._lock:
            state = self._cooling.get((name, spec.name), EngineState(True))
            if failure is not None and cools_engine(failure):
                logger.warning("%s cannot serve %s: %s", name, spec.name, failure)
                state = state.after_failure(self._now_s(), self._settings.queue.engine_cooldown_s)
            else:
                state = state.after_success()
            self._cooling[name, spec.name] = state

    def _states(self, spec: ModelSpec, chain: Sequence[str]) -> dict[str, EngineState]:
        """What is known of each engine of `chain`; makes those that were not needed before."""
        states = {}
        for name in chain:
            check = self._check(name)
            reason = None if check.availability.available else check.availability.reason
            if reason is None and check.engine is not None:
                reason = check.engine.refusal(spec)
            cooling = self._cooling.get((name, spec.name), EngineState(True))
            states[name] = EngineState(reason is None, reason or "", cooling.cooling_until_s)
        return states

    def _check(self, name: str) -> _Check:
        with self._lock:
            check = self._checks.get(name)
            if check is None:
                check = self._checks[name] = self._look_at(name)
            return check

    def _look_at(self, name: str) -> _Check:
        now = datetime.now(UTC)
        try:
            if name == "pytorch":
                engine = self._models.engine
            elif self._given is not None:
                engine = self._given[name]
            else:
                engine = create_engine(name, self._settings)
        except EngineUnavailableError as error:
            return _Check(None, Availability(False, error.message), now)
        self._watches.append(ModelWatch(engine, self._recorder))
        return _Check(engine, engine.availability(), now)

    def _manager(self, name: str, engine: Engine) -> ModelManager:
        """Who loads the engine's models; each engine has a budget of its own."""
        if name == "pytorch":
            return self._models
        with self._lock:
            if name not in self._managers:
                self._managers[name] = ModelManager(self._settings, engine)
            return self._managers[name]

    def _status(self, name: str) -> EngineStatus:
        check = self._check(name)
        return EngineStatus(
            name=name,
            available=check.availability.available,
            models_loaded=[] if check.engine is None else list(check.engine.loaded()),
            error_message=None if check.availability.available else check.availability.reason,
            last_check=check.at,
        )


class _ChainRun:
    """One batch on its way along a chain: who is answered, who is left, and what each engine has said."""

    def __init__(self, requests: Sequence[InferenceRequest]) -> None:
        self.left = {request.id: request for request in requests}
        self.answers: dict[str, InferenceResult | MuaiError] = {}
        self._attempts: dict[str, list[Attempt]] = {request.id: [] for request in requests}
        self._last_errors: dict[str, MuaiError] = {}
        self._started_s = time.perf_counter()

    def task(self, spec: ModelSpec) -> str:
        return next(iter(self.left.values())).task or spec.task

    def skip(self, skipped: Sequence[Attempt]) -> None:
        for request_id in self.left:
            self._attempts[request_id].extend(skipped)

    def complete(self, engine: str, completion: Completion, batch_size: int, inference_ms: float) -> None:
        error = completion.error
        if isinstance(error, EngineError):
            self._attempts[completion.request_id].append(attempt(engine, error))
            self._last_errors[completion.request_id] = error
            return
        request = self.left.pop(completion.request_id)
        if completion.output is None:
            self.answers[request.id] = error or MuaiError("the engine completed the request with nothing")
        else:
            self.answers[request.id] = self._result(engine, request, completion.output, batch_size, inference_ms)

    def answer_with_last_errors(self) -> None:
        """Answer those that an engine has failed with that engine's error."""
        for request_id in [one for one in self.left if one in self._last_errors]:
            del self.left[request_id]
            self.answers[request_id] = self._last_errors[request_id]

    def give_up(self, model: str) -> None:
        for request_id in self.left:
            self.answers[request_id] = chain_spent(model, self._attempts[request_id])
        self.left.clear()

    def _result(
        self, engine: str, request: InferenceRequest, output: EngineOutput, batch_size: int, inference_ms: float
    ) -> InferenceResult:
        history = [{"engine": one.engine, "error": one.error} for one in self._attempts[request.id]]
        return InferenceResult(
            outputs=output.outputs,
            engine_used=engine,
            latency_ms=(time.perf_counter() - self._started_s) * 1000,
            batch_size=batch_size,
            cache_hit=output.cache_hit,
            metadata={
                "request_id": request.id,
                "model": request.model,
                "task": request.task,
                "inference_ms": inference_ms,
                "attempts": history,
                "usage": {"input_tokens": output.input_tokens, "output_tokens": output.output_tokens},
                **output.extra,
            },
        )
