"""`ModelManager`: the models of one engine in this process: loaded when first asked for, kept while there is room."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from muai_config import ModelSpec, Settings, UnknownModelError
from muai_producers.errors import (
    InferenceFailedError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedTaskError,
)
from muai_producers.monitoring.guard import guarded
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
from muai_workers.models.memory import MemoryMeter, memory_meter
from muai_workers.models.residency import Limits, Resident, believed_bytes, make_room

log = logging.getLogger(__name__)
BYTES_PER_MB = 1_000_000
WAIT_LIMIT_S = 60.0
"""So long a model waits for others that are in use, and then counts as one that there is no memory for."""
LifecycleEvent = Literal["loading", "loaded", "failed", "unloaded"]
LifecycleListener = Callable[[LifecycleEvent, str, str], None]
"""Told the event, the model and the engine."""


@dataclass
class _Model:
    """What is known of one model, loaded or not."""

    keeps: bool
    num_bytes: int = 0
    loaded: bool = False
    changing: bool = False
    loading: bool = False
    """In the engine, with the room for it made."""
    users: int = 0
    """Batches that run on it, or wait for it to be loaded."""
    running: int = 0
    """Of these, the ones that count against its `max_concurrency`."""


class ModelManager:
    """Loads, keeps and unloads the models of one engine. Thread-safe.

    A model's first load by several at once happens once, and those that ask for another model do not wait for it. With
    `models.max_memory_mb` set, what is estimated before a load and measured after it stays within it: the least
    recently used goes first, never one that is in use or that `keep_loaded` keeps.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine | None = None,
        meter: MemoryMeter | None = None,
        wait_limit_s: float = WAIT_LIMIT_S,
    ) -> None:
        """
        Args:
            engine: what runs the models; None: PyTorch, made when the first model is loaded.
            meter: tells how much memory is in use; None: of this process's GPUs, else main memory.
            wait_limit_s: how long a model may wait for room that others have in use.
        """
        self._settings = settings
        self._engine = engine
        self._meter = meter
        self._wait_limit_s = wait_limit_s
        cache = settings.model_cache
        self._limits = Limits(
            None if cache.max_memory_mb is None else cache.max_memory_mb * BYTES_PER_MB, cache.max_cached
        )
        self._listeners: list[LifecycleListener] = []
        self._models: OrderedDict[str, _Model] = OrderedDict()
        """Least recently used first."""
        self._changes = 0
        """Loads and unloads so far: a measurement in which another fell says nothing."""
        self._changed = threading.Condition(threading.RLock())

    @property
    def engine(self) -> Engine:
        """The engine that runs the models.

        Raises:
            EngineUnavailableError: PyTorch is not installed.
        """
        with self._changed:
            if self._engine is None:
                self._engine = create_engine("pytorch", self._settings)
            return self._engine

    def on_lifecycle(self, listener: LifecycleListener) -> None:
        """Have `listener` told of each load and unload, in the thread that causes it. What it raises is logged."""
        self._listeners.append(listener)

    def load_model(self, model_name: str) -> None:
        """Load the model, or count it as used just now; what there is no room for goes, least recently used first.

        Raises:
            ModelNotFoundError: the catalog has no such model.
            EngineError: it cannot be loaded.
        """
        with self.keeping(model_name):
            pass

    def keeping(self, model_name: str) -> Any:
        """As `using`, by name.

        Raises:
            ModelNotFoundError: the catalog has no such model.
        """
        return self.using(find_model(self._settings, model_name))

    @contextmanager
    def using(self, spec: ModelSpec) -> Iterator[None]:
        """Load the model unless it is there, and let it not be the one that goes while the block runs.

        Waits where `max_concurrency` batches of the model run already.

        Raises:
            ModelLoadError: it cannot be loaded, or is larger than what all models may take.
            OutOfMemoryError: others that are in use left no room for it in time.
        """
        model = self._enter(spec)
        try:
            self._ensure_loaded(spec, model)
            yield
        finally:
            self._leave(model)

    def unload_model(self, model_name: str) -> bool:
        """Free the model's memory; False: it was not loaded."""
        with self._changed:
            model = self._models.get(model_name)
            while model is not None and model.changing:
                self._changed.wait()
            if model is None or not model.loaded:
                return False
            model.changing = True
        self._unload(model_name, model)
        return True

    def loaded_models(self) -> tuple[str, ...]:
        """Names of the models in memory, least recently used first."""
        with self._changed:
            return tuple(name for name, model in self._models.items() if model.loaded)

    def loading_models(self) -> tuple[str, ...]:
        """Names of the models that are being loaded."""
        with self._changed:
            return tuple(name for name, model in self._models.items() if model.loading)

    def memory_bytes(self) -> dict[str, int]:
        """What each model in memory takes: as measured when it was loaded, or as estimated where nothing could be."""
        with self._changed:
            return {name: model.num_bytes for name, model in self._models.items() if model.loaded}

    def relieve(self) -> None:
        """Unload what nobody uses and nothing keeps: memory has run out."""
        while True:
            with self._changed:
                idle = [one.name for one in self._residents() if one.may_go]
                if not idle:
                    return
                model = self._models[idle[0]]
                model.changing = True
            self._unload(idle[0], model)

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

    # -- use -----------------------------------------------------------------------------------------------------

    def _enter(self, spec: ModelSpec) -> _Model:
        with self._changed:
            model = self._models.setdefault(spec.name, _Model(spec.keep_loaded))
            model.users += 1
            while spec.max_concurrency is not None and model.running >= spec.max_concurrency:
                self._changed.wait()
            model.running += 1
            return model

    def _leave(self, model: _Model) -> None:
        with self._changed:
            model.users -= 1
            model.running -= 1
            self._changed.notify_all()
        self._unload_surplus()

    # -- loading -------------------------------------------------------------------------------------------------

    def _ensure_loaded(self, spec: ModelSpec, model: _Model) -> None:
        with self._changed:
            while model.changing:
                self._changed.wait()
            self._models.move_to_end(spec.name)
            # The engine may have let go of it by itself, because it broke.
            if model.loaded and spec.name in self.engine.loaded():
                return
            model.loaded, model.changing = False, True
        try:
            self._tell("loading", spec.name)
            self._load(spec, model)
        except BaseException:
            self._settle(model, loaded=False, num_bytes=0)
            self._tell("failed", spec.name)
            raise
        self._tell("loaded", spec.name)
        self._unload_surplus()

    def _load(self, spec: ModelSpec, model: _Model) -> None:
        budgeted = self._limits.max_bytes is not None
        estimated = self.engine.estimate_memory_bytes(spec) if budgeted else 0
        self._reserve(spec, model, estimated)
        with self._changed:
            self._changes += 1
            began = self._changes
        before = self._used_bytes()
        model.loading = True
        try:
            self.engine.load(spec)
        finally:
            model.loading = False
        after = self._used_bytes()
        with self._changed:
            alone = self._changes == began
        measured = after - before if alone and before is not None and after is not None else None
        num_bytes = believed_bytes(estimated, measured)
        if not self._fits(model, num_bytes):
            self.engine.unload(spec.name)
            raise self._too_large(spec, num_bytes, "takes")
        self._settle(model, loaded=True, num_bytes=num_bytes)

    def _used_bytes(self) -> int | None:
        if self._meter is None:
            self._meter = memory_meter()
        return self._meter.used_bytes()

    def _fits(self, model: _Model, num_bytes: int) -> bool:
        """Whether the model, now that it is measured, finds room beside those that stay whatever happens."""
        with self._changed:
            others = sum(one.num_bytes for one in self._models.values() if one.keeps and one is not model)
        return self._limits.max_bytes is None or others + num_bytes <= self._limits.max_bytes

    def _reserve(self, spec: ModelSpec, model: _Model, num_bytes: int) -> None:
        """Take the bytes for a model that is about to be loaded, once others that must go for it are gone."""
        deadline_s = time.monotonic() + self._wait_limit_s
        while True:
            with self._changed:
                room = make_room(self._residents(besides=spec.name), num_bytes, self._limits)
                if not room.unload:
                    if room.enough:
                        model.num_bytes = num_bytes
                        return
                    if not room.may_come:
                        raise self._too_large(spec, num_bytes, "needs about")
                    if not self._changed.wait(max(0.0, deadline_s - time.monotonic())):
                        raise self._no_room(spec, num_bytes)
                    continue
                name = room.unload[0]
                victim = self._models[name]
                victim.changing = True
            self._unload(name, victim)

    def _residents(self, besides: str | None = None) -> list[Resident]:
        return [
            Resident(name, one.num_bytes, one.users, one.keeps, one.changing)
            for name, one in self._models.items()
            if name != besides and (one.loaded or one.num_bytes)
        ]

    def _settle(self, model: _Model, *, loaded: bool, num_bytes: int) -> None:
        with self._changed:
            self._changes += 1
            model.loaded, model.num_bytes, model.changing = loaded, num_bytes, False
            self._changed.notify_all()

    def _too_large(self, spec: ModelSpec, num_bytes: int, verb: str) -> ModelLoadError:
        budget = self._settings.model_cache.max_memory_mb
        kept = [name for name, one in self._models.items() if one.keeps and one.loaded and name != spec.name]
        beside = f", beside {', '.join(kept)}, which keep_loaded keeps" if kept else ""
        return ModelLoadError(
            f"{spec.name} {verb} {num_bytes / BYTES_PER_MB:.0f} MB, and models.max_memory_mb is {budget}{beside}: "
            "raise it, or let another worker serve the model",
            {"model": spec.name, "bytes": num_bytes},
        )

    def _no_room(self, spec: ModelSpec, num_bytes: int) -> OutOfMemoryError:
        busy = ", ".join(name for name, one in self._models.items() if one.users and name != spec.name)
        return OutOfMemoryError(
            f"{spec.name} needs about {num_bytes / BYTES_PER_MB:.0f} MB, and for {self._wait_limit_s:g} s {busy} had "
            f"been in use: models.max_memory_mb is {self._settings.model_cache.max_memory_mb}",
            {"model": spec.name, "bytes": num_bytes},
        )

    # -- unloading -----------------------------------------------------------------------------------------------

    def _unload(self, name: str, model: _Model) -> None:
        """Unload a model that is marked as changing."""
        try:
            self.engine.unload(name)
        finally:
            self._settle(model, loaded=False, num_bytes=0)
        self._tell("unloaded", name)

    def _unload_surplus(self) -> None:
        while self._limits != Limits():
            with self._changed:
                unload = make_room(self._residents(), 0, self._limits, new_models=0).unload
                if not unload:
                    return
                model = self._models[unload[0]]
                model.changing = True
            self._unload(unload[0], model)

    def _tell(self, event: LifecycleEvent, model: str) -> None:
        for listener in self._listeners:
            with guarded("metrics"):
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
