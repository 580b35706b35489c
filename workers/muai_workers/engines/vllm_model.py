"""A model that runs in vLLM: requests in, token ids to its engine, text out."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from muai_config import ModelSpec
from muai_producers.chat import forced_tools
from muai_producers.errors import EngineUnavailableError, InvalidRequestError, MuaiError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import CacheStatistics, Completion, EngineOutput, Piece
from muai_workers.engines.cache_salts import CacheSalts
from muai_workers.engines.failures import as_engine_error
from muai_workers.engines.lengths import Lengths
from muai_workers.engines.row import cancelled
from muai_workers.engines.tokens import TextTokenizer, TokenRow, admit
from muai_workers.engines.vllm_loop import BackgroundEngine, Job
from muai_workers.engines.vllm_requests import calls_in_list, may_call, sampling_fields, shape_fields
from muai_workers.engines.vllm_tools import ToolReader

log = logging.getLogger(__name__)


class VLLMModel:
    """One model and the vLLM engine that runs it. Thread-safe: the requests of all calls are admitted to that engine.

    Args:
        make: makes vLLM's engine.
        reader: finds calls of tools in what the model writes; None: it is not known how this model writes them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: TextTokenizer,
        make: Callable[[], Any],
        *,
        limit_tokens: int | None,
        salts: CacheSalts,
        reader: ToolReader | None,
        caches: bool,
        extra: Mapping[str, Any],
    ) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._salts = salts
        self._reader = reader
        self._caches = caches
        self._extra = dict(extra)
        self._counts = CacheStatistics()
        self._num_running = 0
        self._closing = False
        self._changed = threading.Condition()
        self._background = BackgroundEngine(spec.name, make, self._failure)
        config = self._background.engine.vllm_config
        self._lengths = Lengths(spec, int(config.model_config.max_model_len), limit_tokens)

    @property
    def is_dead(self) -> bool:
        """Whether its engine has ended by itself."""
        return self._background.dead is not None

    def serves(self, task: str) -> bool:
        """As `LoadedModel.serves`."""
        if task == "chat" and not self._tokenizer.has_chat_template:
            return False
        return any(
            task == known and self._spec.serves(known, has_chat_template=self._tokenizer.has_chat_template)
            for known in ("text-generation", "chat")
        )

    def run(self, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        """As `LoadedModel.run`."""
        rows, refused = admit(
            self._tokenizer,
            task,
            requests,
            self._lengths.prompt_limit(),
            structured_output=True,
            keep="end",
            reserve_tokens=self._lengths.reserve,
        )
        yield from refused
        if not rows:
            return
        with self._running():
            jobs: list[Job] = []
            for row in rows:
                try:
                    jobs.append(Job(row.request.id, partial(self._serve, row, self._sampling(row))))
                except (ValueError, VLLMClientError) as error:
                    yield Completion(row.request.id, error=InvalidRequestError(f"vLLM refuses the request: {error}"))
            if jobs:
                yield from self._collect(jobs)

    def abort(self, request_ids: Collection[str]) -> None:
        """As `LoadedModel.abort`."""
        self._background.abort(request_ids)

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """What is under way is computed under the old secret, which nobody will have again."""

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        """What runs at once is vLLM's own decision."""

    def close(self) -> None:
        """Shut the engine down, now or when the last request that runs is done."""
        with self._changed:
            self._closing = True
            if self._num_running:
                return
        self._background.close()

    def cache_statistics(self) -> CacheStatistics:
        """Of the prefix cache; its bytes are those that are set aside for keys and values."""
        with self._changed:
            counts = self._counts
        return replace(counts, max_bytes=self._max_bytes())

    # -- one request -----------------------------------------------------------------------------------------------

    def _sampling(self, row: TokenRow) -> SamplingParams:
        request = row.request
        shape = shape_fields(request.parameters)
        reads_calls = may_call(request)
        return SamplingParams(
            **sampling_fields(request.parameters, self._lengths.room(request, len(row.ids))),
            structured_outputs=None if shape is None else StructuredOutputsParams(**shape),
            # What marks a call is a special token in some vocabularies.
            skip_special_tokens=not (reads_calls and self._reader is not None),
            # A text that may turn out to be a call is told once it is all there.
            output_kind=RequestOutputKind.DELTA if request.stream and not reads_calls else RequestOutputKind.FINAL_ONLY,
        )

    async def _serve(
        self, row: TokenRow, sampling: SamplingParams, engine: Any, tell: Callable[[Piece], None]
    ) -> Completion:
        request = row.request
        prompt = tokens_input(row.ids, cache_salt=self._salts.of(request.tenant, request.conversation_id))
        text: list[str] = []
        num_tokens, cached = 0, None
        outputs: AsyncIterator[Any] = engine.generate(prompt, sampling, request.id)
        async for output in outputs:
            (answer,) = output.outputs
            text.append(answer.text)
            num_tokens += len(answer.token_ids)
            cached = output.num_cached_tokens if cached is None else cached
            if sampling.output_kind is RequestOutputKind.DELTA and answer.text:
                tell(Piece(request.id, answer.text, num_tokens))
        if answer.finish_reason == "abort":
            return Completion(request.id, error=cancelled(request.id))
        if answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str):
            num_tokens -= 1  # the token that says that the answer ends
        return self._completion(row, "".join(text), answer.finish_reason, num_tokens, cached or 0, tell)

    def _completion(
        self, row: TokenRow, text: str, reason: str, num_tokens: int, cached: int, tell: Callable[[Piece], None]
    ) -> Completion:
        request = row.request
        outputs: dict[str, Any] = {"text": text, "finish_reason": "length" if reason == "length" else "stop"}
        if may_call(request):
            outputs = self._with_calls(request, outputs)
            if request.stream and outputs["text"]:
                tell(Piece(request.id, outputs["text"], num_tokens))
        self._count(len(row.ids), cached)
        extra = {**self._extra, "cached_tokens": cached} if self._caches else self._extra
        output = EngineOutput(outputs, len(row.ids), num_tokens, cache_hit=cached > 0, extra=extra)
        return Completion(request.id, output=output)

    def _with_calls(self, request: InferenceRequest, outputs: dict[str, Any]) -> dict[str, Any]:
        text = outputs["text"]
        if forced_tools(request.parameters.tools, request.parameters.tool_choice):
            left, calls = "", calls_in_list(text)
        elif self._reader is not None:
            left, calls = self._reader.read(text, msgspec.to_builtins(request.parameters.tools))
        else:
            return outputs
        if not calls:
            return outputs
        return {"text": left, "finish_reason": "tool_calls", "tool_calls": calls}

    def _failure(self, request_id: str, error: BaseException) -> Completion | MuaiError:
        """What an exception of vLLM means."""
        if isinstance(error, EngineDeadError):
            message = f"vLLM's engine for {self._spec.name} has died; its log says why"
            return EngineUnavailableError(message, {"engine": "vllm", "model": self._spec.name})
        cause = error.__cause__ if isinstance(error, EngineGenerateError) and error.__cause__ else error
        if isinstance(cause, VLLMClientError | ValueError):
            return Completion(request_id, error=InvalidRequestError(f"vLLM refuses the request: {cause}"))
        if isinstance(cause, Exception):
            return Completion(request_id, error=as_engine_error(cause))
        raise cause

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._changed:
            if self._closing:
                raise EngineUnavailableError(f"{self._spec.name} is being unloaded", {"engine": "vllm"})
            self._num_running += 1
        try:
            yield
        finally:
            if self._leave():
                self._background.close()

    def _leave(self) -> bool:
        """A run has ended; returns whether it was the last before the model may go."""
        with self._changed:
            self._num_running -= 1
            return self._closing and not self._num_running

    def _collect(self, jobs: Sequence[Job]) -> Iterator[Completion | Piece]:
        run = self._background.start(jobs)
        left = len(jobs)
        try:
            while left:
                event = run.events.get()
                if isinstance(event, MuaiError):
                    raise event
                left -= isinstance(event, Completion)
                yield event
        finally:
            if left:
                self._background.give_up(run)

    def _count(self, prompt_tokens: int, cached: int) -> None:
        with self._changed:
            counts = self._counts
            self._counts = replace(
                counts,
                hits=counts.hits + (cached > 0),
                misses=counts.misses + (cached == 0),
                hit_tokens=counts.hit_tokens + cached,
                prompt_tokens=counts.prompt_tokens + prompt_tokens,
            )

    def _max_bytes(self) -> int:
        return int(self._background.engine.vllm_config.cache_config.kv_cache_memory_bytes or 0)
