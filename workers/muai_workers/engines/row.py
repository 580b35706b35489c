"""One request on its way through the decoding loop: its tokens so far, and when and how it ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from muai_producers.errors import RequestCancelledError
from muai_producers.wire import InferenceRequest, Parameters
from muai_workers.engines.base import Completion, EngineOutput, Piece
from muai_workers.engines.failures import not_a_number
from muai_workers.engines.pieces import PieceCutter
from muai_workers.engines.sampling import Sampler
from muai_workers.engines.tokens import TextTokenizer, TokenRow

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class RowContext:
    """What the rows of a model share."""

    model: str
    tokenizer: TextTokenizer
    end_ids: Collection[int]
    extra: Mapping[str, Any]
    """Goes into every output."""


@dataclass(eq=False)
class Row:
    """A request, its prompt and what was generated for it."""

    context: RowContext
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
    cached_tokens: int | None = None
    """Prompt tokens that were not computed again; None: nobody looked."""

    @property
    def request(self) -> InferenceRequest:
        return self.source.request

    @property
    def parameters(self) -> Parameters:
        return self.source.request.parameters

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.source.ids, *self.generated]

    @property
    def final_tokens(self) -> int:
        """The most that prompt and answer together can become."""
        return len(self.source.ids) + self.max_new_tokens

    def take(self, token: int) -> FinishReason | None:
        """Append `token`; returns why the row is finished, or None when it goes on."""
        if token in self.context.end_ids:
            return "stop"
        self.generated.append(token)
        if self.parameters.stop:
            text = self._decode()
            places = [place for place in map(text.find, self.parameters.stop) if place >= 0]
            if places:
                self.text = text[: min(places)]
                return "stop"
        return "length" if len(self.generated) >= self.max_new_tokens else None

    def piece(self) -> Piece | None:
        """What can be told of the text since the last piece; None: nothing, or nobody reads it."""
        if self.cutter is None:
            return None
        text = self.cutter.cut(self._decode())
        return Piece(self.request.id, text, len(self.generated)) if text else None

    def finish(self, reason: FinishReason) -> list[Completion | Piece]:
        """The last piece of the text, if there is one, and the completion."""
        text = self._decode() if self.text is None else self.text
        rest = "" if self.cutter is None else self.cutter.rest(text)
        pieces = [Piece(self.request.id, rest, len(self.generated))] if rest else []
        reused = {} if self.cached_tokens is None else {"cached_tokens": self.cached_tokens}
        output = EngineOutput(
            {"text": text, "finish_reason": reason},
            input_tokens=len(self.source.ids),
            output_tokens=len(self.generated),
            cache_hit=bool(self.cached_tokens),
            extra={**self.context.extra, **reused},
        )
        return [*pieces, Completion(self.request.id, output=output)]

    def broken(self) -> Completion:
        """The completion of a row whose logits are no numbers."""
        return Completion(self.request.id, error=not_a_number(self.context.model, self.context.extra))

    def cancelled(self) -> Completion:
        """The completion of a request that was stopped."""
        return Completion(self.request.id, error=cancelled(self.request.id))

    def _decode(self) -> str:
        if self.continues:
            return self.context.tokenizer.decode_after(self.source.ids, self.generated)
        return self.context.tokenizer.decode(self.generated)


def cancelled(request_id: str) -> RequestCancelledError:
    """What a request that was stopped in the middle completes with."""
    return RequestCancelledError(f"request {request_id} was cancelled while it ran")
