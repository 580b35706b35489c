"""What OpenAI's clients are answered with. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from muai_producers.vectors import as_bytes, from_base64, to_base64
from muai_producers.wire import InferenceResult


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    message: ChatAnswer
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    logprobs: None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """How the chat goes on."""

    id: str
    """`chatcmpl-` and the id of the first answer's request."""
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the answers."""

    index: int
    text: str
    finish_reason: str | None
    """`stop` or `length`; null in all chunks of a stream but the last."""
    logprobs: None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the text goes on; also each chunk of a stream."""

    id: str
    """`cmpl-` and the id of the first answer's request."""
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is new."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one of the answers."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    """Only where it was asked for: null in all chunks but the last."""


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One text's embedding."""

    index: int
    embedding: list[float] | str
    """Numbers, or base64 of them as little-endian 32-bit floats."""
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens used."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """The embeddings, in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


def usage_of(results: Sequence[InferenceResult], answers_per_prompt: int = 1) -> Usage:
    """Tokens used by all answers; a prompt with several answers counts once."""
    told = [result.metadata.get("usage") or {} for result in results]
    prompt_tokens = sum(int(one.get("input_tokens", 0)) for one in told[::answers_per_prompt])
    completion_tokens = sum(int(one.get("output_tokens", 0)) for one in told)
    return Usage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens
    )


def finish_reason(result: InferenceResult) -> str:
    """Why an answer ended."""
    return "tool_calls" if result.outputs.get("tool_calls") else str(result.outputs.get("finish_reason") or "stop")


def chat_completion(request_id: str, model: str, results: Sequence[InferenceResult]) -> ChatCompletion:
    """The answer to a chat, `results` being those of its `n` requests."""
    return ChatCompletion(
        id=f"chatcmpl-{request_id}",
        object="chat.completion",
        created=int(time.time()),
        model=model,
        choices=[
            ChatChoice(index=index, message=_chat_answer(result), finish_reason=finish_reason(result))
            for index, result in enumerate(results)
        ],
        usage=usage_of(results, len(results)),
    )


def _chat_answer(result: InferenceResult) -> ChatAnswer:
    calls = result.outputs.get("tool_calls") or None
    text = result.outputs["text"]
    return ChatAnswer(role="assistant", content=None if calls and not text else text, tool_calls=calls)


def completion(request_id: str, model: str, results: Sequence[InferenceResult], answers_per_prompt: int) -> Completion:
    """The answer to prompts."""
    return Completion(
        id=f"cmpl-{request_id}",
        object="text_completion",
        created=int(time.time()),
        model=model,
        choices=[
            TextChoice(index=index, text=result.outputs["text"], finish_reason=finish_reason(result))
            for index, result in enumerate(results)
        ],
        usage=usage_of(results, answers_per_prompt),
    )


def embedding_list(model: str, results: Sequence[InferenceResult], encoding: str) -> EmbeddingList:
    """The answer to texts."""
    vectors = [result.outputs["embedding"] for result in results]
    tokens = usage_of(results).prompt_tokens
    return EmbeddingList(
        data=[Embedding(index=index, embedding=_written(vector, encoding)) for index, vector in enumerate(vectors)],
        model=model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _written(vector: list[float] | str, encoding: str) -> list[float] | str:
    """As it was asked for; another encoding than that comes from a request that was made before, with the same key."""
    if isinstance(vector, str):
        return vector if encoding == "base64" else from_base64(vector)
    return to_base64(as_bytes(vector)) if encoding == "base64" else vector
