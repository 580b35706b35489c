"""`FakeEngine`: an engine without a model, for tests of web apps and for load trials.

Its answers depend on the request alone, so a test can state them beforehand; it takes as long as it is told to, and it
fails as it is told to. It passes the same contract tests as the real engines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import random
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from muai_config import ModelSpec, Settings
from muai_producers.errors import (
    EngineUnavailableError,
    InferenceFailedError,
    InputTooLongError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryError,
    RequestCancelledError,
    RequestError,
    UnsupportedParameterError,
)
from muai_producers.vectors import as_bytes, to_base64
from muai_producers.wire import INPUT_FIELD, InferenceRequest, check_inputs
from muai_workers.engines.base import (
    Availability,
    CacheStatistics,
    Capabilities,
    Completion,
    EngineOutput,
    Piece,
)
from muai_workers.engines.parameters import check_tools, refuse_constraints

ALL_TASKS = frozenset(INPUT_FIELD)
DEFAULT_NEW_TOKENS = 16
REMEMBERED_RUNS = 10_000


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a fake engine behaves. Tokens are words between blanks. A batch of n takes `a·n + b` milliseconds."""

    latency_per_request_ms: float = 0.0
    latency_per_batch_ms: float = 0.0
    latency_per_piece_ms: float = 0.0
    """Between two words of a stream."""
    embedding_size: int = 8
    poison_marker: str = "POISON"
    """An input that holds it makes the whole batch raise."""
    bad_marker: str = "BAD"
    """An input that holds it is refused by itself."""
    kill_marker: str = "KILL"
    """An input that holds it kills the process with SIGKILL."""
    slow_marker: str = "SLOW"
    """A batch with an input that holds it takes `slow_ms` longer."""
    slow_ms: float = 2000.0
    keeps_conversations: bool = False
    """Its cache is said to hold a megabyte of each conversation, and to be found by its later turns; nothing is."""
    out_of_memory_above: int | None = None
    """Larger batches raise `OutOfMemoryError`."""
    unavailable: str | None = None
    """The reason why the engine cannot run here; None: it can."""
    fail_to_load: tuple[str, ...] = ()
    """Names of models that cannot be loaded."""
    refuse: tuple[str, ...] = ()
    """Names of models that it says it cannot serve."""
    load_ms: float = 0.0
    hang_file: str | None = None
    """Nothing comes of a run while this file says what CUDA_VISIBLE_DEVICES says to this process: its GPU hangs."""
    model_mb: dict[str, float] = {}
    """Main memory that each of these models really takes, in millions of bytes."""

    @classmethod
    def from_env_value(cls, value: str) -> FakeOptions:
        """Read options from a JSON object, such as the variable `MUAI_TEST_FAKE_ENGINE` holds.

        Raises:
            ValueError: it is no JSON object, or names an option that there is not.
        """
        try:
            return msgspec.json.decode(value or "{}", type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"fake engine options: {error}") from error


class FakeEngine:
    """See the module. `name` lets it stand in for a real engine in a chain."""

    capabilities = Capabilities(tasks=ALL_TASKS, dtypes=frozenset({"auto", "fp32"}), streaming=True, abort=True)

    def __init__(
        self, options: FakeOptions | None = None, *, name: str = "fake", sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.name = name
        self.options = options or FakeOptions()
        if self.options.keeps_conversations:
            self.capabilities = dataclasses.replace(self.capabilities, kv_reuse=True)
        self.runs: deque[tuple[str, ...]] = deque(maxlen=REMEMBERED_RUNS)
        """Ids of the requests of each call of `run`, oldest first, the last `REMEMBERED_RUNS`."""
        self.loads = 0
        """How often a model was really loaded."""
        self._sleep = sleep
        self._models: dict[str, bytes] = {}
        """What they take, by name."""
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self._conversations: dict[str, set[tuple[str, str]]] = {}
        self._cache: dict[str, CacheStatistics] = {}
        self._aborted: set[str] = set()

    def availability(self) -> Availability:
        if self.options.unavailable is not None:
            return Availability(False, self.options.unavailable)
        return Availability(True, "the fake engine runs everywhere")

    def refusal(self, spec: ModelSpec) -> str | None:
        return f"the fake engine was told to refuse {spec.name}" if spec.name in self.options.refuse else None

    def load(self, spec: ModelSpec) -> None:
        if self.options.unavailable is not None:
            raise EngineUnavailableError(self.options.unavailable, {"engine": self.name})
        with self._lock:
            if spec.name in self._models:
                return
            if spec.name in self.options.fail_to_load:
                raise ModelLoadError(f"the fake engine was told not to load {spec.name}", {"model": spec.name})
            if self.options.load_ms:
                self._sleep(self.options.load_ms / 1000)
            # Not zeros: pages that hold nothing else are not there until somebody writes to them.
            self._models[spec.name] = b"\x01" * self.estimate_memory_bytes(spec)
            self.loads += 1

    def unload(self, model: str) -> None:
        with self._lock:
            self._models.pop(model, None)

    def loaded(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._models)

    def estimate_memory_bytes(self, spec: ModelSpec) -> int:
        return int(self.options.model_mb.get(spec.name, 0.0) * 1_000_000)

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        self.load(spec)
        ids = tuple(request.id for request in requests)
        with self._lock:
            self.runs.append(ids)
            self._running.update(ids)
        try:
            yield from self._run(spec, task, requests)
        finally:
            with self._lock:
                self._running.difference_update(ids)
                self._aborted.difference_update(ids)

    def _run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        while self._hangs():
            self._sleep(0.02)
        self._misbehave([str(request.inputs) for request in requests])
        latency_ms = self.options.latency_per_request_ms * len(requests) + self.options.latency_per_batch_ms
        if any(self.options.slow_marker in str(request.inputs) for request in requests):
            latency_ms += self.options.slow_ms
        if latency_ms:
            self._sleep(latency_ms / 1000)
        known = self._remember(spec.name, requests) if self.options.keeps_conversations else frozenset()
        for request in requests:
            completion = self._complete(spec, task, request)
            if completion.output is not None and request.id in known:
                found = dataclasses.replace(completion.output, cache_hit=True)
                completion = dataclasses.replace(completion, output=found)
            if completion.output is not None and request.stream and "text" in completion.output.outputs:
                yield from self._pieces(request, completion.output.outputs["text"])
            if request.id in self._aborted:
                stopped = RequestCancelledError(f"request {request.id} was cancelled while it ran")
                completion = Completion(request.id, error=stopped)
            yield completion

    def _pieces(self, request: InferenceRequest, text: str) -> Iterator[Piece]:
        for number, word in enumerate(re.findall(r"\S+\s*", text), 1):
            if request.id in self._aborted:
                return
            if self.options.latency_per_piece_ms:
                self._sleep(self.options.latency_per_piece_ms / 1000)
            yield Piece(request.id, word, number)

    def abort(self, request_ids: Collection[str]) -> None:
        with self._lock:
            self._aborted.update(self._running.intersection(request_ids))

    def _remember(self, model: str, requests: Sequence[InferenceRequest]) -> frozenset[str]:
        """Keep what is said to be kept; returns the requests whose conversation was known."""
        hits = set()
        with self._lock:
            for request in requests:
                if request.conversation_id is None:
                    continue
                before = self._cache.get(model, CacheStatistics(max_bytes=1 << 30))
                known = self._conversations.setdefault(model, set())
                is_hit = (request.tenant, request.conversation_id) in known
                known.add((request.tenant, request.conversation_id))
                if is_hit:
                    hits.add(request.id)
                tokens = len(str(request.inputs).split())
                self._cache[model] = dataclasses.replace(
                    before,
                    used_bytes=len(known) << 20,
                    entries=len(known),
                    hits=before.hits + is_hit,
                    misses=before.misses + (not is_hit),
                    hit_tokens=before.hit_tokens + is_hit * tokens,
                    prompt_tokens=before.prompt_tokens + tokens,
                )
        return frozenset(hits)

    def cache_statistics(self) -> Mapping[str, CacheStatistics]:
        with self._lock:
            return dict(self._cache)

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """The fake engine remembers nothing."""

    def reconfigure(self, settings: Settings) -> None:
        """What the fake engine does is told by its options alone."""

    def close(self) -> None:
        with self._lock:
            self._models.clear()

    def _hangs(self) -> bool:
        if self.options.hang_file is None:
            return False
        try:
            named = Path(self.options.hang_file).read_text(encoding="ascii")
        except FileNotFoundError:
            return False
        return named == os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def _misbehave(self, texts: Sequence[str]) -> None:
        if any(self.options.kill_marker in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        limit = self.options.out_of_memory_above
        if limit is not None and len(texts) > limit:
            raise OutOfMemoryError(f"{len(texts)} requests do not fit, at most {limit} do", {"batch_size": len(texts)})
        if any(self.options.poison_marker in text for text in texts):
            raise InferenceFailedError(f"an input holds {self.options.poison_marker}")

    def _complete(self, spec: ModelSpec, task: str, request: InferenceRequest) -> Completion:
        try:
            refuse_constraints(request.parameters)
            check_inputs(task, request.inputs)
            check_tools(task, request.parameters)
            return Completion(request.id, output=self._answer(spec, task, request))
        except (RequestError, UnsupportedParameterError) as error:
            return Completion(request.id, error=error)

    def _answer(self, spec: ModelSpec, task: str, request: InferenceRequest) -> EngineOutput:
        text = _text(task, request)
        words = text.split()
        if self.options.bad_marker in text:
            raise InvalidRequestError(f"the input holds {self.options.bad_marker}")
        if spec.max_input_tokens is not None and len(words) > spec.max_input_tokens:
            if not request.parameters.truncate:
                raise InputTooLongError(
                    f"the input has {len(words)} tokens, {spec.name} takes {spec.max_input_tokens}",
                    {"input_tokens": len(words), "max_input_tokens": spec.max_input_tokens},
                )
            words = words[: spec.max_input_tokens]
        text = " ".join(words)
        if task == "embedding":
            vector = _direction(text, self.options.embedding_size)
            is_packed = request.parameters.encoding_format == "base64"
            return EngineOutput({"embedding": to_base64(as_bytes(vector)) if is_packed else vector}, len(words))
        if task == "text-classification":
            return EngineOutput({"labels": _labels(text)}, len(words))
        answer, finish_reason = _continuation(spec, request, words)
        outputs: dict[str, Any] = {"text": " ".join(answer), "finish_reason": finish_reason}
        return EngineOutput(outputs, len(words), len(answer))


def _text(task: str, request: InferenceRequest) -> str:
    value = request.inputs[INPUT_FIELD[task]]
    return value if isinstance(value, str) else " ".join(str(turn.get("content") or "") for turn in value)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _direction(text: str, size: int) -> list[float]:
    generator = random.Random(_seed(text))
    vector = [generator.gauss(0.0, 1.0) for _ in range(size)]
    length = math.hypot(*vector)
    return [value / length for value in vector]


def _labels(text: str) -> list[dict[str, Any]]:
    score = 0.5 + (_seed(text) % 1000) / 2002
    first, second = ("POSITIVE", "NEGATIVE") if _seed(text) % 2 else ("NEGATIVE", "POSITIVE")
    return [{"label": first, "score": score}, {"label": second, "score": 1.0 - score}]


def _continuation(spec: ModelSpec, request: InferenceRequest, words: Sequence[str]) -> tuple[list[str], str]:
    """The input's words, last first, as far as the token limit and the stop strings let them."""
    limit = request.parameters.max_tokens or spec.max_new_tokens or DEFAULT_NEW_TOKENS
    answer: list[str] = []
    for word in reversed(words):
        if any(stop in word for stop in request.parameters.stop):
            return answer, "stop"
        if len(answer) == limit:
            return answer, "length"
        answer.append(word)
    return answer, "stop"


def create(settings: Settings) -> FakeEngine:
    """The fake engine at its defaults: no setting concerns it."""
    return FakeEngine()
