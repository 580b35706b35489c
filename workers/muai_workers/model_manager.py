"""`ModelManager`: models in this process, on plain PyTorch, loaded when first asked for and kept."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from muai_config import ModelSpec, Settings, UnknownModelError
from muai_producers.errors import InferenceFailedError, ModelNotFoundError, UnsupportedTaskError
from muai_producers.wire import (
    INPUT_FIELD,
    InferenceRequest,
    Parameters,
    new_request_id,
    request_from_fields,
    validate_inputs,
)
from muai_workers.engines.base import Completion, Engine, EngineOutput
from muai_workers.engines.failures import raising_engine_errors
from muai_workers.engines.registry import create_engine

LifecycleEvent = Literal["loaded", "unloaded"]
LifecycleListener = Callable[[LifecycleEvent, str, str], None]
"""Told the event, the model and the engine."""


class ModelManager:
    """Loads, keeps and unloads models. Thread-safe."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        """
        Args:
            engine: what runs the models; None: PyTorch, made when the first model is loaded.
        """
        self._settings = settings
        self._engine = engine
        self._listeners: list[LifecycleListener] = []
        self._used: OrderedDict[str, None] = OrderedDict()
        """Names of loaded models, least recently used first."""
        self._kept: Counter[str] = Counter()
        """How many blocks of `keeping` run for each model."""
        self._lock = threading.RLock()

    @property
    def engine(self) -> Engine:
        """The engine that runs the models.

        Raises:
            EngineUnavailableError: PyTorch is not installed.
        """
        with self._lock:
            if self._engine is None:
                self._engine = create_engine("pytorch", self._settings)
            return self._engine

    def on_lifecycle(self, listener: LifecycleListener) -> None:
        """Have `listener` told of each load and unload, in the thread that causes it."""
        self._listeners.append(listener)

    def load_model(self, model_name: str) -> None:
        """Load the model, or count it as used just now; over `model_cache.max_cached` the least recently used goes.

        Raises:
            ModelNotFoundError: the catalog has no such model.
            EngineError: it cannot be loaded.
        """
        with self.keeping(model_name):
            pass

    @contextmanager
    def keeping(self, model_name: str) -> Iterator[None]:
        """Load the model as `load_model` does, and let it not be the one that goes while the block runs."""
        spec = find_model(self._settings, model_name)
        with self._lock:
            self._kept[model_name] += 1
        try:
            # Loaded outside the lock: another model's requests need not wait for this one.
            self.engine.load(spec)
            with self._lock:
                is_new = model_name not in self._used
                self._used[model_name] = None
                self._used.move_to_end(model_name)
            if is_new:
                self._tell("loaded", model_name)
            self._unload_surplus()
            yield
        finally:
            with self._lock:
                self._kept[model_name] -= 1
            self._unload_surplus()

    def unload_model(self, model_name: str) -> bool:
        """Free the model's memory; False: it was not loaded."""
        with self._lock:
            if model_name not in self._used:
                return False
            del self._used[model_name]
            self.engine.unload(model_name)
        self._tell("unloaded", model_name)
        return True

    def loaded_models(self) -> tuple[str, ...]:
        """Names of the models in memory, least recently used first."""
        with self._lock:
            return tuple(self._used)

    def infer(
        self,
        model_name: str,
        inputs: Mapping[str, Any],
        parameters: Parameters | None = None,
        task: str | None = None,
    ) -> EngineOutput:
        """Run one request.

        Raises:
            MuaiError: the request's own error, or the engine's.
        """
        spec = find_model(self._settings, model_name)
        request = build_request(spec, inputs, parameters, task)
        with self.keeping(model_name), raising_engine_errors():
            events = self.engine.run(spec, request.task or spec.task, [request])
            (completion,) = (event for event in events if isinstance(event, Completion))
        if completion.output is None:
            raise completion.error or InferenceFailedError("the engine completed the request with nothing")
        return completion.output

    def close(self) -> None:
        """Unload everything."""
        for name in self.loaded_models():
            self.unload_model(name)
        if self._engine is not None:
            self._engine.close()

    def _unload_surplus(self) -> None:
        limit = self._settings.model_cache.max_cached
        if limit is None:
            return
        with self._lock:
            idle = [name for name in self._used if not self._kept[name]]
            surplus = idle[: max(0, len(self._used) - limit)]
        for name in surplus:
            self.unload_model(name)

    def _tell(self, event: LifecycleEvent, model: str) -> None:
        for listener in self._listeners:
            listener(event, model, self.engine.name)


def find_model(settings: Settings, name: str) -> ModelSpec:
    """The catalog's entry.

    Raises:
        ModelNotFoundError: there is none; the message names the nearest.
    """
    try:
        return settings.model(name)
    except UnknownModelError as error:
        raise ModelNotFoundError(str(error), {"model": name}) from error


def build_request(
    spec: ModelSpec, inputs: Mapping[str, Any], parameters: Parameters | None = None, task: str | None = None
) -> InferenceRequest:
    """A request as the queue would carry it.

    Raises:
        InvalidRequestError: the inputs are not what the task reads.
    """
    chosen = task or spec.task
    if chosen not in INPUT_FIELD:
        raise UnsupportedTaskError(f"there is no task {chosen!r}; there are {', '.join(INPUT_FIELD)}")
    canonical = validate_inputs(chosen, inputs)
    return request_from_fields(
        {"model": spec.name, "inputs": canonical, "task": chosen, "parameters": parameters or Parameters()},
        request_id=new_request_id(),
    )
