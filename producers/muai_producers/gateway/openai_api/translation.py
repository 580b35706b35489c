"""From a body of OpenAI's to what our own API is sent: one inference for each answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.openai_api.bodies import (
    MAX_TEXTS,
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    Generation,
)
from muai_producers.gateway.submission import InferenceBody

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat may go on as long as the model lets it."""
_SHARED = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "truncate",
)


def chat_inferences(body: ChatCompletionBody) -> list[InferenceBody]:
    """One inference for each of the `n` answers.

    Raises:
        InvalidRequestError: a value is out of range; `field` names it.
    """
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequestError("max_tokens and max_completion_tokens differ", {"field": "max_completion_tokens"})
    parameters = _parameters(body, limits.pop() if limits else None)
    given = {"response_format": body.response_format, "tools": body.tools, "tool_choice": body.tool_choice}
    parameters |= {name: value for name, value in given.items() if value is not None}
    inputs = {"messages": [message.turn() for message in body.messages]}
    # The text of a call of tools is known for one only when it is whole.
    streams = bool(body.stream) and not body.tools
    return _inferences(body, [inputs], "chat", parameters, streams=streams)


def completion_inferences(body: CompletionBody) -> list[InferenceBody]:
    """One inference for each of the `n` answers to each prompt, as `chat_inferences`."""
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = [{"prompt": prompt} for prompt in body.prompt]
    return _inferences(body, prompts, "text-generation", _parameters(body, max_tokens), streams=bool(body.stream))


def embedding_inferences(body: EmbeddingBody) -> list[InferenceBody]:
    """One inference for each text, as `chat_inferences`."""
    parameters = {"truncate": bool(body.truncate), "encoding_format": body.encoding_format}
    fields = {"model": body.model, "task": "embedding", "parameters": parameters}
    fields |= _told(body.priority, body.deadline_s)
    return [_converted({**fields, "inputs": {"text": text}}) for text in body.input]


def _parameters(body: Generation, max_tokens: int | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
    parameters["temperature"] = 1.0 if body.temperature is None else body.temperature
    if max_tokens is not None:
        parameters["max_tokens"] = max_tokens
    if body.stop:
        parameters["stop"] = body.stop
    return parameters


def _inferences(
    body: Generation, inputs: Sequence[dict[str, Any]], task: str, parameters: dict[str, Any], *, streams: bool
) -> list[InferenceBody]:
    num_answers = body.n or 1
    if num_answers * len(inputs) > MAX_TEXTS:
        raise InvalidRequestError(
            f"{num_answers * len(inputs)} answers in one call, at most {MAX_TEXTS}", {"field": "n"}
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options is for streams only", {"field": "stream_options"})
    fields = {"model": body.model, "task": task, "stream": streams, **_told(body.priority, body.deadline_s)}
    if body.conversation_id is not None:
        fields["conversation_id"] = body.conversation_id
    return [
        _converted({**fields, "inputs": one, "parameters": {**parameters, **_seed(body.seed, number)}})
        for one in inputs
        for number in range(num_answers)
    ]


def _told(priority: int | None, deadline_s: float | None) -> dict[str, Any]:
    given = {"priority": priority, "deadline_s": deadline_s}
    return {name: value for name, value in given.items() if value is not None}


def _seed(seed: int | None, number: int) -> dict[str, int]:
    """Several answers with one seed are to differ, and to be the same ones the next time."""
    return {} if seed is None else {"seed": seed + number}


def _converted(fields: dict[str, Any]) -> InferenceBody:
    try:
        return msgspec.convert(fields, InferenceBody)
    except msgspec.ValidationError as error:
        told, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`").removeprefix("parameters.").removeprefix("inputs.")
        raise InvalidRequestError(f"{field}: {told}" if field else told, {"field": field}) from None
