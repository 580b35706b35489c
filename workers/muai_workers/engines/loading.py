"""Models in memory: each loaded once, however many threads ask for it at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from muai_config import ModelSpec
from muai_producers.errors import UnsupportedTaskError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Piece


class LoadedModel(Protocol):
    """A model in memory, ready to run. Thread-safe."""

    def serves(self, task: str) -> bool:
        """Whether requests for `task` may go to this model."""
        ...

    def run(self, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        """As `Engine.run`, except that what the library raises passes through as it is."""
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """As `Engine.abort`."""
        ...

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """As `Engine.end_conversation`, as far as requests under way are concerned."""
        ...

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        """Run at most so many requests, and tokens with their padding, at once from now on."""
        ...

    def close(self) -> None:
        """Called when the model is unloaded: free what outlives its requests. What runs goes on."""
        ...


Model = TypeVar("Model", bound=LoadedModel)


class LoadedModels(Generic[Model]):
    """The models that one engine holds, by name."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get_or_load(self, name: str, load: Callable[[], Model]) -> Model:
        """The model, loaded by `load` when it is not there yet.

        Threads that ask for a model which is being loaded wait for it; those that ask for another do not. When `load`
        raises, the next one that waits tries again.
        """
        with self._lock:
            model = self._models.get(name)
            if model is not None:
                return model
            loading = self._loading.setdefault(name, threading.Lock())
        with loading:
            with self._lock:
                model = self._models.get(name)
            if model is None:
                model = load()
                with self._lock:
                    self._models[name] = model
        return model

    def abort(self, request_ids: Collection[str]) -> None:
        """As `Engine.abort`."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            model.abort(request_ids)

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """As `Engine.end_conversation`, as far as requests under way are concerned."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            model.end_conversation(tenant, conversation_id)

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        """As `LoadedModel.relimit`, for all of them."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            model.relimit(max_rows, max_tokens)

    def drop(self, name: str) -> bool:
        """Forget the model; its memory goes when the last run that uses it ends. False: it was not there."""
        with self._lock:
            model = self._models.pop(name, None)
        if model is None:
            return False
        model.close()
        return True

    def drop_this(self, name: str, model: Model) -> None:
        """As `drop`, if it is still this very model that goes by the name: it is broken, another may not be."""
        with self._lock:
            if self._models.get(name) is not model:
                return
            del self._models[name]
        model.close()

    def drop_all(self) -> None:
        for name in self.names():
            self.drop(name)

    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._models)

    def items(self) -> tuple[tuple[str, Model], ...]:
        with self._lock:
            return tuple(self._models.items())


def refuse_task(spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion]:
    """Answer requests for a task that the model does not serve."""
    message = f"{spec.name} serves {spec.task}, not {task}"
    if task == "chat" and spec.task in ("text-generation", "chat"):
        message = f"{spec.name} does not chat: its tokenizer has no chat template"
    for request in requests:
        yield Completion(request.id, error=UnsupportedTaskError(message, {"model": spec.name, "task": task}))
