"""The decoding loop: rows with parameters of their own share each step, and leave the batch as they finish."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from muai_config import ModelSpec
from muai_producers.errors import RequestCancelledError
from muai_producers.wire import InferenceRequest, Parameters
from muai_workers.engines.base import Completion, EngineOutput, Piece
from muai_workers.engines.failures import not_a_number
from muai_workers.engines.padding import PaddedRows, pad_rows
from muai_workers.engines.pieces import PieceCutter
from muai_workers.engines.sampling import Sampler, choose_tokens
from muai_workers.engines.tokens import TextTokenizer, TokenRow, admit

DEFAULT_NEW_TOKENS = 128
"""For models whose catalog entry does not say."""
FinishReason = Literal["stop", "length"]


class Decoder(Protocol):
    """One batch on its way through a model, with its keys and values. Logits have the shape (num_rows, vocabulary)."""

    def start(self, rows: PaddedRows) -> torch.Tensor:
        """Take in the prompts, padded as `DecodingModel` was told; returns the logits that follow them."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; returns the logits that follow."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        ...


@dataclass
class _Row:
    """A request in the loop."""

    source: TokenRow
    max_new_tokens: int
    sampler: Sampler
    continues: bool
    """Whether the answer goes on where the prompt ends, rather than standing by itself."""
    generated: list[int] = field(default_factory=list)
    text: str | None = None
    """Set early where a stop string was found."""
    cutter: PieceCutter | None = None
    """Of a request that asked for a stream."""

    @property
    def parameters(self) -> Parameters:
        return self.source.request.parameters

    def take(self, token: int, end_ids: Collection[int], tokenizer: TextTokenizer) -> FinishReason | None:
        """Append `token`; returns why the row is finished, or None when it goes on."""
        if token in end_ids:
            return "stop"
        self.generated.append(token)
        if self.parameters.stop:
            text = self.decode(tokenizer)
            places = [place for place in map(text.find, self.parameters.stop) if place >= 0]
            if places:
                self.text = text[: min(places)]
                return "stop"
        return "length" if len(self.generated) >= self.max_new_tokens else None

    def piece(self, tokenizer: TextTokenizer) -> Piece | None:
        """What can be told of the text since the last piece; None: nothing, or nobody reads it."""
        if self.cutter is None:
            return None
        text = self.cutter.cut(self.decode(tokenizer))
        return Piece(self.source.request.id, text, len(self.generated)) if text else None

    def decode(self, tokenizer: TextTokenizer) -> str:
        if self.continues:
            return tokenizer.decode_after(self.source.ids, self.generated)
        return tokenizer.decode(self.generated)


class DecodingModel:
    """A model that generates, whatever computes its steps. Thread-safe as far as `new_decoder`'s decoders are."""

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
    ) -> None:
        """
        Args:
            new_decoder: called once for each batch.
            context_tokens: prompt and answer together; None: unlimited, or the prompt does not count (seq2seq).
            limit_tokens: longest prompt.
            padding_side: left where the answer continues the prompt.
        """
        self._spec = spec
        self._tokenizer = tokenizer
        self._new_decoder = new_decoder
        self._end_ids = end_ids
        self._context_tokens = context_tokens
        self._limit_tokens = limit_tokens
        self._padding_side = padding_side
        self._extra = extra
        self._aborted: set[str] = set()
        """Ids of running requests that are to stop."""
        self._running: set[str] = set()

    def abort(self, request_ids: Collection[str]) -> None:
        """As `Engine.abort`; looked at before each token."""
        self._aborted.update(self._running.intersection(request_ids))

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
            self._tokenizer, task, requests, self._prompt_limit(), keep=keep, reserve_tokens=self._reserve
        )
        yield from refused
        continues = task == "text-generation"
        rows = [self._row(row, continues) for row in admitted]
        if not rows:
            return
        ids = {row.source.request.id for row in rows}
        self._running |= ids
        try:
            yield from self._decode(rows)
        finally:
            self._running -= ids
            self._aborted -= ids

    def _row(self, source: TokenRow, continues: bool) -> _Row:
        parameters = source.request.parameters
        cutter = PieceCutter(parameters.stop) if source.request.stream else None
        return _Row(source, self._room(source), Sampler(parameters, source.ids), continues, cutter=cutter)

    def _prompt_limit(self) -> int | None:
        # One position must be left for the answer.
        limits = [self._limit_tokens, None if self._context_tokens is None else self._context_tokens - 1]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def _wanted(self, request: InferenceRequest) -> int:
        return request.parameters.max_tokens or self._spec.max_new_tokens or DEFAULT_NEW_TOKENS

    def _room(self, row: TokenRow) -> int:
        wanted = self._wanted(row.request)
        return wanted if self._context_tokens is None else min(wanted, self._context_tokens - len(row.ids))

    def _reserve(self, request: InferenceRequest) -> int:
        """Tokens of the prompt that are given up for the answer when the prompt is cut: half of it at most."""
        limit = self._prompt_limit()
        if limit is None or self._context_tokens is None:
            return 0
        return max(0, min(limit + self._wanted(request) - self._context_tokens, limit // 2))

    def _decode(self, rows: list[_Row]) -> Iterator[Completion | Piece]:
        decoder = self._new_decoder()
        logits = decoder.start(pad_rows([row.source.ids for row in rows], self._tokenizer.pad_id, self._padding_side))
        while True:
            tokens = choose_tokens(logits, [row.sampler for row in rows])
            going: list[int] = []
            for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                request_id = row.source.request.id
                if token is None:
                    yield Completion(request_id, error=not_a_number(self._spec.name, self._extra))
                    continue
                if request_id in self._aborted:
                    yield Completion(request_id, error=cancelled(request_id))
                    continue
                reason = row.take(token, self._end_ids, self._tokenizer)
                if reason is not None:
                    yield from self._finish(row, reason)
                    continue
                going.append(index)
                piece = row.piece(self._tokenizer)
                if piece is not None:
                    yield piece
            if not going:
                return
            if len(going) < len(rows):
                decoder.keep(going)
                rows = [rows[index] for index in going]
            logits = decoder.step([row.generated[-1] for row in rows])

    def _finish(self, row: _Row, reason: FinishReason) -> Iterator[Completion | Piece]:
        text = row.decode(self._tokenizer) if row.text is None else row.text
        rest = "" if row.cutter is None else row.cutter.rest(text)
        if rest:
            yield Piece(row.source.request.id, rest, len(row.generated))
        output = EngineOutput(
            {"text": text, "finish_reason": reason},
            input_tokens=len(row.source.ids),
            output_tokens=len(row.generated),
            extra=self._extra,
        )
        yield Completion(row.source.request.id, output=output)


def cancelled(request_id: str) -> RequestCancelledError:
    """What a request that was stopped in the middle completes with."""
    return RequestCancelledError(f"request {request_id} was cancelled while it ran")
