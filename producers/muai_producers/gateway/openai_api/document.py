"""The OpenAPI document of these paths."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from muai_producers.gateway.answers import ModelEntry
from muai_producers.gateway.openai_api.answers import ChatCompletion, Completion, EmbeddingList
from muai_producers.gateway.openai_api.bodies import ChatCompletionBody, CompletionBody, EmbeddingBody
from muai_producers.gateway.openai_api.failures import OpenAIErrorBody

JSON = "application/json"
TEMPLATE = "#/components/schemas/{model}"
_ID = "5f0c2a8e-6a2b-4c1d-9e3f-7b8a9c0d1e2f"
_CREATED = 1_760_000_000
_USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}
_CHAT_BODIES = {
    "chat": {
        "summary": "Go on with a chat",
        "value": {"model": "qwen-chat", "messages": [{"role": "user", "content": "How far is the moon?"}]},
    },
    "stream": {
        "summary": "As a stream, with the tokens used",
        "value": {
            "model": "qwen-chat",
            "messages": [{"role": "user", "content": "How far is the moon?"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 64,
            "temperature": 0,
        },
    },
}
_CHAT = {
    "id": f"chatcmpl-{_ID}",
    "object": "chat.completion",
    "created": _CREATED,
    "model": "qwen-chat",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "About 384,400 kilometres."},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ],
    "usage": _USAGE,
}
_TEXT = {
    "id": f"cmpl-{_ID}",
    "object": "text_completion",
    "created": _CREATED,
    "model": "qwen-chat",
    "choices": [{"index": 0, "text": " about 384,400 kilometres.", "finish_reason": "stop", "logprobs": None}],
    "usage": _USAGE,
}
_EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.12, -0.03, 0.98]}],
    "model": "all-minilm-l6-v2",
    "usage": {"prompt_tokens": 7, "total_tokens": 7},
}
_MODEL = {
    "id": "all-minilm-l6-v2",
    "object": "model",
    "created": 0,
    "owned_by": "muai",
    "task": "embedding",
    "engines": ["onnx", "pytorch"],
    "max_input_tokens": 256,
}
_CHUNK = (
    f'data: {{"id":"chatcmpl-{_ID}","object":"chat.completion.chunk",…,"choices":[{{"index":0,"delta":'
    '{"content":"About"},"finish_reason":null,"logprobs":null}]}\n\ndata: [DONE]\n\n'
)
_TEXT_CHUNK = (
    f'data: {{"id":"cmpl-{_ID}","object":"text_completion",…,"choices":[{{"index":0,"text":" about",'
    '"finish_reason":null,"logprobs":null}]}\n\ndata: [DONE]\n\n'
)
_ERRORS = {
    400: ("The request is wrong; `param` names the field.", "invalid_request", "temperature: Expected `float` <= 2.0"),
    401: ("No API key, or none that is known.", "unauthorized", "an API key is needed: send Authorization: Bearer KEY"),
    404: ("There is no such model.", "model_not_found", "there is no model 'gpt-9'"),
    429: ("Full; nothing was enqueued. See `Retry-After`.", "queue_full", "full: 100 of 100 requests are in flight"),
    408: ("The body did not arrive in time.", "body_timeout", "the body did not arrive within 30 s"),
    409: ("The Idempotency-Key had other content.", "idempotency_conflict", "idempotency key 'x' was used before"),
    413: ("The body is too large.", "payload_too_large", "the body has more than 16000000 bytes"),
    415: ("The body is not JSON.", "unsupported_media_type", "the body must be application/json, got 'text/plain'"),
    500: ("A fault of the gateway's.", "internal_error", "an internal error; the gateway's log has more"),
    502: ("No engine served it.", "engines_exhausted", "no engine served the request"),
    503: ("Stopping, or the broker does not answer.", "broker_unavailable", "the broker does not answer"),
    504: ("Its deadline passed.", "deadline_exceeded", "the deadline passed before it was answered"),
}
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_KINDS |= dict.fromkeys((500, 502, 503, 504), "server_error")


def _content(schema: type, **example: Any) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": TEMPLATE.format(model=schema.__name__)}, **example}}


def _error(status: int) -> dict[str, Any]:
    description, code, message = _ERRORS[status]
    error: dict[str, Any] = {
        "message": message,
        "type": _KINDS.get(status, "invalid_request_error"),
        "param": None,
        "code": code,
        "details": {},
        "request_id": "9f1c0e7a52d84b6f",
    }
    return {"description": description, "content": _content(OpenAIErrorBody, example={"error": error})}


def _operation(
    name: str, summary: str, answer: dict[str, Any], errors: tuple[int, ...], **extra: Any
) -> dict[str, Any]:
    return {
        "operation_id": name,
        "summary": summary,
        "description": "As OpenAI's clients call it.",
        "tags": ["OpenAI"],
        "response_model": None,
        "responses": {200: answer, **{status: _error(status) for status in _always(errors)}},
        "openapi_extra": {"parameters": [], **extra},
    }


def _always(errors: tuple[int, ...]) -> tuple[int, ...]:
    """The errors of an operation, with those that every one has."""
    return tuple(sorted({*errors, 400, 401, 500, 503}))


def _body(kind: type, examples: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": _content(kind, examples=examples)}


_ALL = (400, 404, 408, 409, 413, 415, 429, 502, 503, 504)


def _stream(chunk: str) -> dict[str, Any]:
    return {"text/event-stream": {"schema": {}, "example": chunk}}


CHAT = _operation(
    "createChatCompletion",
    "Go on with a chat",
    {
        "description": "The answers; with `stream`, chunks.",
        "content": {**_content(ChatCompletion, example=_CHAT), **_stream(_CHUNK)},
    },
    _ALL,
    requestBody=_body(ChatCompletionBody, _CHAT_BODIES),
)
COMPLETION = _operation(
    "createCompletion",
    "Go on with texts",
    {
        "description": "The answers; with `stream`, chunks.",
        "content": {**_content(Completion, example=_TEXT), **_stream(_TEXT_CHUNK)},
    },
    _ALL,
    requestBody=_body(
        CompletionBody,
        {
            "text": {"summary": "Go on with a text", "value": {"model": "qwen-chat", "prompt": "The moon is"}},
            "streamed": {
                "summary": "The same in chunks",
                "value": {"model": "qwen-chat", "prompt": "The moon is", "stream": True},
            },
        },
    ),
)
EMBEDDING = _operation(
    "createEmbedding",
    "Embed texts",
    {"description": "In the order of the texts.", "content": _content(EmbeddingList, example=_EMBEDDINGS)},
    _ALL,
    requestBody=_body(
        EmbeddingBody,
        {
            "texts": {
                "summary": "Embed two sentences",
                "value": {"model": "all-minilm-l6-v2", "input": ["How far is the moon?", "Salt."]},
            }
        },
    ),
)
MODEL = _operation(
    "retrieveModel",
    "One model",
    {"description": "It is there.", "content": _content(ModelEntry, example=_MODEL)},
    (404,),
)
MODEL["openapi_extra"]["parameters"] = [
    {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "example": "all-minilm-l6-v2"}
]
BODIES = (ChatCompletionBody, CompletionBody, EmbeddingBody)
ANSWERS = (ChatCompletion, Completion, EmbeddingList, ModelEntry, OpenAIErrorBody)


def schemas() -> dict[str, Any]:
    """The schemas of what these paths take and give."""
    _, bodies = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=TEMPLATE)
    _, answers = msgspec.json.schema_components(ANSWERS, ref_template=TEMPLATE.format(model="{name}"))
    return {**bodies["$defs"], **answers}
