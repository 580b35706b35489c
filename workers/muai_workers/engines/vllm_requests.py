"""What vLLM is asked for one request, and what its text means. Pure: vLLM's own classes are filled by the caller."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from muai_producers.chat import Tool, forced_tools
from muai_producers.wire import InferenceRequest, Parameters


def sampling_fields(parameters: Parameters, max_tokens: int) -> dict[str, Any]:
    """Fields of vLLM's `SamplingParams`."""
    return {
        "max_tokens": max_tokens,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "top_k": parameters.top_k,
        "min_p": parameters.min_p,
        "repetition_penalty": parameters.repetition_penalty,
        "presence_penalty": parameters.presence_penalty,
        "frequency_penalty": parameters.frequency_penalty,
        "seed": parameters.seed,
        "stop": list(parameters.stop) or None,
    }


def shape_fields(parameters: Parameters) -> dict[str, Any] | None:
    """Fields of vLLM's `StructuredOutputsParams`; None: the answer may be anything.

    A call of a tool that must be made is held to a JSON list of calls, whatever way the model would write it by itself.
    """
    tools = forced_tools(parameters.tools, parameters.tool_choice)
    if tools:
        return {"json": calls_schema(tools)}
    shape = parameters.response_format
    if shape is None or shape.type == "text":
        return None
    if shape.json_schema is None:
        return {"json_object": True}
    return {"json": shape.json_schema.schema}


def calls_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a list with one call of one of the tools."""
    return {"type": "array", "minItems": 1, "maxItems": 1, "items": {"anyOf": [_call_schema(tool) for tool in tools]}}


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"type": "string", "enum": [tool.function.name]},
            "arguments": tool.function.parameters or {"type": "object", "properties": {}},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def may_call(request: InferenceRequest) -> bool:
    """Whether the answer may hold calls of tools."""
    return bool(request.parameters.tools) and request.parameters.tool_choice != "none"


def calls_in_list(text: str) -> list[dict[str, Any]] | None:
    """The calls that a text made by `calls_schema` holds; None: it was cut off before its end."""
    try:
        listed = json.loads(text)
    except ValueError:
        return None
    return [tool_call(one["name"], json.dumps(one["arguments"], ensure_ascii=False)) for one in listed]


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """A call as results carry it.

    Args:
        arguments: JSON as text.
    """
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
