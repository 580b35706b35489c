"""Generation, whatever computes its steps: requests in, rows through the decoding loop, completions out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from muai_config import ModelSpec
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.decode_loop import DecodeLoop, LoopLimits
from muai_workers.engines.decoder import Decoder
from muai_workers.engines.lengths import DEFAULT_NEW_TOKENS, Lengths
from muai_workers.engines.pieces import PieceCutter
from muai_workers.engines.row import FinishReason, Row, RowContext, cancelled
from muai_workers.engines.sampling import Sampler
from muai_workers.engines.tokens import TextTokenizer, TokenRow, admit
from muai_workers.kv_cache import ModelCache

__all__ = ["DEFAULT_NEW_TOKENS", "Decoder", "DecodingModel", "FinishReason", "cancelled"]


class DecodingModel:
    """A model that generates. Thread-safe: the requests of several calls share its loop."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: TextTokenizer,
        new_decoder: Callable[[], Decoder],
        *,
        end_ids: Collection[int],
        context_tokens: int | None,
        limit_tokens: int | None,
        padding_side: Literal["left", "right"],
        extra: Mapping[str, Any],
        limits: LoopLimits | None = None,
        cache: ModelCache | None = None,
        relieve: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            new_decoder: called once for each group of rows.
            context_tokens: prompt and answer together; None: unlimited, or the prompt does not count (seq2seq).
            limit_tokens: longest prompt.
            padding_side: left where the answer continues the prompt.
            cache: what is kept of conversations; None: nothing.
            relieve: frees what memory can be freed, when it has run out.
        """
        self._spec = spec
        self._tokenizer = tokenizer
        self._context = RowContext(spec.name, tokenizer, end_ids, extra)
        self._lengths = Lengths(spec, context_tokens, limit_tokens)
        self._padding_side = padding_side
        self._cache = cache
        self._loop = DecodeLoop(
            spec.name,
            new_decoder,
            pad_id=tokenizer.pad_id,
            padding_side=padding_side,
            limits=limits or LoopLimits(),
            cache=cache,
            relieve=relieve,
        )

    def abort(self, request_ids: Collection[str]) -> None:
        """As `Engine.abort`; looked at before each token."""
        self._loop.abort(request_ids)

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """Keep nothing of what is under way for a conversation."""
        self._loop.forget(tenant, conversation_id)

    def relimit(self, max_rows: int, max_tokens: int) -> None:
        """As `LoadedModel.relimit`."""
        self._loop.relimit(max_rows, max_tokens)

    def close(self) -> None:
        """Free what is kept of conversations. What runs goes on."""
        if self._cache is not None:
            self._cache.close()
        self._loop.close()

    def serves(self, task: str) -> bool:
        if task == "chat" and not self._tokenizer.has_chat_template:
            return False
        return any(
            task == known and self._spec.serves(known, has_chat_template=self._tokenizer.has_chat_template)
            for known in ("text-generation", "chat", "summarization")
        )

    def run(self, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        keep: Literal["start", "end"] = "end" if self._padding_side == "left" else "start"
        admitted, refused = admit(
            self._tokenizer,
            task,
            requests,
            self._lengths.prompt_limit(),
            keep=keep,
            reserve_tokens=self._lengths.reserve,
        )
        yield from refused
        continues = task == "text-generation"
        if admitted:
            yield from self._loop.run([self._row(row, continues) for row in admitted])

    def _row(self, source: TokenRow, continues: bool) -> Row:
        parameters = source.request.parameters
        cutter = PieceCutter(parameters.stop) if source.request.stream else None
        sampler = Sampler(parameters, source.ids)
        return Row(
            self._context,
            source,
            self._lengths.room(source.request, len(source.ids)),
            sampler,
            continues,
            cutter=cutter,
        )
