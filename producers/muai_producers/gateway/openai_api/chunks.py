"""A call's answers as chunks: what OpenAI's clients read of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from muai_producers.errors import MuaiError
from muai_producers.gateway.openai_api.answers import (
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    TextChoice,
    Usage,
    finish_reason,
    usage_of,
)
from muai_producers.gateway.openai_api.calls import Told
from muai_producers.gateway.openai_api.failures import StreamRestartedError, error_body, told_error
from muai_producers.gateway.sse import HEARTBEAT, event
from muai_producers.wire import InferenceResult

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Form(Protocol):
    """How one of the APIs writes its chunks."""

    def start(self, index: int) -> Any:
        """The first chunk of an answer; None: there is no such."""
        ...

    def text(self, index: int, text: str) -> Any:
        """Some more text."""
        ...

    def end(self, index: int, result: InferenceResult) -> list[Any]:
        """The last chunks of an answer."""
        ...

    def usage(self, usage: Usage) -> Any:
        """The tokens used."""
        ...


@dataclass(frozen=True)
class ChatForm:
    """Chunks of a chat completion."""

    request_id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def start(self, index: int) -> ChatCompletionChunk:
        return self._chunk(index, ChatDelta(role="assistant", content=""))

    def text(self, index: int, text: str) -> ChatCompletionChunk:
        return self._chunk(index, ChatDelta(content=text))

    def end(self, index: int, result: InferenceResult) -> list[ChatCompletionChunk]:
        calls = result.outputs.get("tool_calls") or []
        numbered = [{"index": number, **call} for number, call in enumerate(calls)]
        chunks = [self._chunk(index, ChatDelta(tool_calls=numbered))] if numbered else []
        return [*chunks, self._chunk(index, ChatDelta(), finish_reason(result))]

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        return self._with([], usage)

    def _chunk(self, index: int, delta: ChatDelta, reason: str | None = None) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason)
        return self._with([choice], None if self.include_usage else msgspec.UNSET)

    def _with(self, choices: list[ChatChunkChoice], usage: Usage | msgspec.UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=f"chatcmpl-{self.request_id}",
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )


@dataclass(frozen=True)
class TextForm:
    """Chunks of a completion."""

    request_id: str
    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def start(self, index: int) -> None:
        return None

    def text(self, index: int, text: str) -> Completion:
        return self._chunk(index, text)

    def end(self, index: int, result: InferenceResult) -> list[Completion]:
        return [self._chunk(index, "", finish_reason(result))]

    def usage(self, usage: Usage) -> Completion:
        return self._with([], usage)

    def _chunk(self, index: int, text: str, reason: str | None = None) -> Completion:
        choice = TextChoice(index=index, text=text, finish_reason=reason)
        return self._with([choice], None if self.include_usage else msgspec.UNSET)

    def _with(self, choices: list[TextChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(
            id=f"cmpl-{self.request_id}",
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )


async def written(
    told: AsyncGenerator[Told, None], form: Form, answers_per_prompt: int, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a stream. One that cannot end well ends in an error, and without `[DONE]`."""
    results: dict[int, InferenceResult] = {}
    begun: set[int] = set()
    try:
        async for one in told:
            chunks = [] if one.index in begun or not one.news.events else [form.start(one.index)]
            begun |= {one.index} if one.news.events else set()
            for step in one.news.events:
                if step.kind == "restart":
                    raise StreamRestartedError(
                        "another engine or worker went on with the request and answers otherwise; what was sent is "
                        "void, send the request again"
                    )
                if step.kind == "text":
                    chunks.append(form.text(one.index, step.text))
                elif step.result is not None:
                    results[one.index] = step.result
                    chunks += form.end(one.index, step.result)
            if one.news.error is not None:
                raise told_error(one.news.error)
            yield b"".join(event(_encode(chunk)) for chunk in chunks if chunk is not None) or HEARTBEAT
    except MuaiError as error:
        yield event(_encode(error_body(error.http_status, error.code, error.message, error.details)))
        return
    finally:
        await told.aclose()
    if include_usage:
        yield event(_encode(form.usage(usage_of(_in_order(results), answers_per_prompt))))
    yield DONE


def _in_order(results: dict[int, InferenceResult]) -> Sequence[InferenceResult]:
    return [results[index] for index in sorted(results)]
