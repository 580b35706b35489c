"""What every engine is: the protocol that workers and `OptimizationManager` speak."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from muai_config import ModelSpec, Settings
from muai_producers.errors import MuaiError
from muai_producers.wire import InferenceRequest


@dataclass(frozen=True)
class Availability:
    """Whether an engine can run here, and why (not)."""

    available: bool
    reason: str
    """One sentence for people: the version and device that it runs on, or what is missing and how to get it."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do."""

    tasks: frozenset[str]
    dtypes: frozenset[str]
    continuous_batching: bool = False
    """True: many batches run inside the engine at once, each request finishing on its own."""
    streaming: bool = False
    """Requests with `stream` give their text in `Piece`s before they complete."""
    abort: bool = False
    """A request that is running can be stopped."""
    kv_reuse: bool = False
    """Later turns of a conversation do not compute the earlier ones again."""
    structured_output: bool = False
    """Answers can be held to a JSON schema, a choice or a grammar."""
    tensor_parallel: bool = False
    """One model's layers can be shared among several devices."""
    pipeline_parallel: bool = False
    """One model's layers can be spread over several devices."""


@dataclass(frozen=True)
class EngineOutput:
    """What an engine computed for one request.

    `outputs` by task: embedding → `embedding` (list of floats, the model's hidden size); text-classification →
    `labels` (list of `{"label", "score"}`, best first, scores summing to 1); text-generation, chat and
    summarization → `text`, `finish_reason` (`stop`, `length` or `tool_calls`), and `tool_calls` where the model wants
    some (list of `{"id", "type", "function": {"name", "arguments"}}`, the arguments JSON as text).
    """

    outputs: dict[str, Any]
    input_tokens: int = 0
    output_tokens: int = 0
    cache_hit: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the result's metadata: execution provider, dtype, degradations."""


@dataclass(frozen=True)
class Completion:
    """One request finished: exactly one of `output` and `error` is set."""

    request_id: str
    output: EngineOutput | None = None
    error: MuaiError | None = None
    """A `RequestError` is the request's own fault; an `EngineError` sends that request to the next engine."""


@dataclass(frozen=True)
class Piece:
    """Some more text of a request that has `stream` set.

    The pieces of a request, joined, are the text of its completion: one whose text cannot be told yet, such as half a
    character or what may become a stop string, is held back until it can.
    """

    request_id: str
    text: str
    output_tokens: int
    """Generated so far, this piece included."""


@dataclass(frozen=True)
class CacheStatistics:
    """What an engine keeps of earlier computations for one model, since the model was loaded."""

    used_bytes: int = 0
    max_bytes: int = 0
    entries: int = 0
    hits: int = 0
    """Requests that found some of their prompt."""
    misses: int = 0
    hit_tokens: int = 0
    """Prompt tokens that were not computed again."""
    prompt_tokens: int = 0
    """Prompt tokens of all requests that looked."""
    evictions: int = 0


@runtime_checkable
class Engine(Protocol):
    """An inference library that loads models and runs requests. Thread-safe."""

    name: str
    capabilities: Capabilities

    def availability(self) -> Availability:
        """Say whether the engine can run here. Cheap after the first call; never raises."""
        ...

    def refusal(self, spec: ModelSpec) -> str | None:
        """Why this engine cannot serve the model, or None when it can try."""
        ...

    def load(self, spec: ModelSpec) -> None:
        """Load the model; a model that is loaded already stays as it is.

        Raises:
            ModelLoadError: with the cause.
            EngineUnavailableError: the library or its device is missing.
        """
        ...

    def unload(self, model: str) -> None:
        """Free the model's memory; unknown names do nothing."""
        ...

    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        ...

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        """Bytes that the weights take when loaded with the dtype that would be chosen here."""
        ...

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        """Run requests together; yields one completion per request, each as soon as it is there, in any order, and
        before it the pieces of its text where the request has `stream` set and the engine streams.

        A model that is not in memory is loaded first.

        A request that is wrong by itself (too long, wrong inputs) is a completion with a `RequestError` and harms no
        other. A failure of the whole forward pass raises; the requests not yet completed are then unanswered.

        Raises:
            OutOfMemoryError: the batch does not fit; a smaller one may.
            EngineError: anything else that the library raised, as its cause.
        """
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """Stop requests that run: each completes with `RequestCancelledError` as soon as the engine can. Ids that do
        not run, and requests that cannot be stopped, are passed over.
        """
        ...

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        """By model, of the models that are loaded and for which something is kept. Cheap."""
        ...

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """Free what is kept of a conversation; unknown ones do nothing."""
        ...

    def reconfigure(self, settings: Settings) -> None:
        """Work by these settings from now on, as far as they are reloadable; what runs goes on as it began."""
        ...

    def close(self) -> None:
        """Unload everything and end what the engine started."""
        ...
