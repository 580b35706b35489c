"""OpenAI's bodies as requests, and results as OpenAI's answers, without HTTP: for lines of batches."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from muai_producers.batches.records import Endpoint
from muai_producers.errors import InvalidRequestError
from muai_producers.wire import InferenceResult

PASSED_ON = ("temperature", "top_p", "seed")
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""What callers may send and nothing here depends on."""
MAX_INPUTS = 2048
_READ: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": frozenset({"messages", "max_completion_tokens", "max_tokens", "stop", "n", "stream"}),
    "/v1/completions": frozenset({"prompt", "max_tokens", "stop", "n", "stream"}),
    "/v1/embeddings": frozenset({"input", "encoding_format"}),
}


def requests_from_openai(endpoint: Endpoint, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests that a body asks for, each as the fields of an `InferenceRequest`: model, task, inputs, parameters.

    More than one for a list of prompts or of inputs.

    Raises:
        InvalidRequestError: a field is missing, unknown, or asks for what is not served; `field` names it.
    """
    _refuse_unknown(endpoint, body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "must be the name of a model")
    if endpoint == "/v1/chat/completions":
        messages = [_message(turn) for turn in _listed("messages", body.get("messages"))]
        return [_fields(model, "chat", {"messages": messages}, _parameters(body))]
    if endpoint == "/v1/completions":
        prompts = _texts("prompt", body.get("prompt"))
        return [_fields(model, "text-generation", {"prompt": text}, _parameters(body)) for text in prompts]
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise _wrong("encoding_format", "must be float or base64")
    return [_fields(model, "embedding", {"text": text}, {}) for text in _texts("input", body.get("input"))]


def openai_answer(
    endpoint: Endpoint, body: Mapping[str, Any], results: Sequence[InferenceResult], answer_id: str, created_s: int
) -> dict[str, Any]:
    """What OpenAI's endpoint would answer, from the results of `requests_from_openai`'s requests, in their order."""
    model = body["model"]
    if endpoint == "/v1/embeddings":
        is_packed = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _vector(result.outputs["embedding"], is_packed)}
            for index, result in enumerate(results)
        ]
        tokens = _usage(results)["prompt_tokens"]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "model": model, "data": data, "usage": usage}
    is_chat = endpoint == "/v1/chat/completions"
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{answer_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created_s,
        "model": model,
        "choices": [_choice(index, result, is_chat) for index, result in enumerate(results)],
        "usage": _usage(results),
    }


def _choice(index: int, result: InferenceResult, is_chat: bool) -> dict[str, Any]:
    text = result.outputs.get("text", "")
    said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    reason = result.outputs.get("finish_reason", "stop")
    return {"index": index, **said, "logprobs": None, "finish_reason": reason}


def _usage(results: Sequence[InferenceResult]) -> dict[str, int]:
    told = [result.metadata.get("usage", {}) for result in results]
    read, written = (sum(one.get(name) or 0 for one in told) for name in ("input_tokens", "output_tokens"))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _vector(numbers: Sequence[float], is_packed: bool) -> Any:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if is_packed else list(numbers)


def _fields(model: str, task: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "task": task, "inputs": inputs, "parameters": parameters}


def _parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {name: body[name] for name in PASSED_ON if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            parameters["max_tokens"] = body[name]
    stop = body.get("stop")
    if stop is not None:
        parameters["stop"] = [stop] if isinstance(stop, str) else stop
    if body.get("n", 1) != 1:
        raise _wrong("n", "must be 1; send as many lines as answers are wanted")
    if body.get("stream"):
        raise _wrong("stream", "cannot be served in a batch")
    return parameters


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise _wrong("messages", "must be a list of objects with role and content")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise _wrong("messages", "may hold parts of the type text only")
        return {**turn, "content": "".join(part for part in parts if part)}
    return turn


def _texts(field: str, given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else _listed(field, given)
    if not all(isinstance(text, str) for text in texts):
        raise _wrong(field, "must be a text or a list of texts; lists of tokens are not served")
    return texts


def _listed(field: str, given: Any) -> list[Any]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise _wrong(field, f"must be a list of 1 to {MAX_INPUTS} entries")
    return given


def _refuse_unknown(endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    passed_on = () if endpoint == "/v1/embeddings" else PASSED_ON
    for name, value in body.items():
        if name not in ("model", *passed_on) and name not in _READ[endpoint] | WITHOUT_EFFECT and value is not None:
            raise _wrong(str(name)[:100], f"is not served by {endpoint} in a batch")


def _wrong(field: str, told: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {told}", {"field": field})
