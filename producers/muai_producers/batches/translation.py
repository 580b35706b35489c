"""A line's body as our own API's bodies, and results as OpenAI's answers: what the gateway does, without HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from muai_producers.batches.records import Endpoint
from muai_producers.errors import InvalidRequestError
from muai_producers.gateway.openai_api.answers import chat_completion, completion, embedding_list
from muai_producers.gateway.openai_api.bodies import (
    ChatCompletionBody,
    CompletionBody,
    EmbeddingBody,
    Generation,
    read_body,
)
from muai_producers.gateway.openai_api.translation import (
    chat_inferences,
    completion_inferences,
    embedding_inferences,
)
from muai_producers.gateway.submission import InferenceBody
from muai_producers.wire import InferenceResult


def requests_from_openai(endpoint: Endpoint, body: Mapping[str, Any]) -> list[InferenceBody]:
    """The inferences that a body asks for: several for a list of prompts or of texts, and for several answers.

    Raises:
        InvalidRequestError: a field is missing, unknown, or asks for what is not served; `field` names it.
    """
    raw = msgspec.json.encode(body)
    if endpoint == "/v1/embeddings":
        return embedding_inferences(read_body(raw, EmbeddingBody))
    if endpoint == "/v1/chat/completions":
        chat = read_body(raw, ChatCompletionBody)
        _refuse_stream(chat)
        return chat_inferences(chat)
    text = read_body(raw, CompletionBody)
    _refuse_stream(text)
    return completion_inferences(text)


def openai_answer(
    endpoint: Endpoint, body: Mapping[str, Any], results: Sequence[InferenceResult], request_id: str
) -> msgspec.Struct:
    """What the endpoint would answer, from the results of `requests_from_openai`'s inferences, in their order."""
    model = body["model"]
    if endpoint == "/v1/embeddings":
        return embedding_list(model, results, body.get("encoding_format", "float"))
    if endpoint == "/v1/chat/completions":
        return chat_completion(request_id, model, results)
    return completion(request_id, model, results, body.get("n") or 1)


def _refuse_stream(body: Generation) -> None:
    if body.stream:
        raise InvalidRequestError("there are no streams in a batch; leave stream out", {"field": "stream"})
