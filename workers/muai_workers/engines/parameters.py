"""What a request's parameters ask beyond sampling, and what chat templates are given of them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from muai_producers.chat import forced_tools
from muai_producers.errors import InvalidRequestError, UnsupportedParameterError
from muai_producers.wire import InferenceRequest, Parameters


def refuse_constraints(parameters: Parameters) -> None:
    """For engines that cannot hold an answer to a grammar.

    Raises:
        UnsupportedParameterError: the answer is to have a shape, or to be the call of a tool.
    """
    shape = parameters.response_format
    if shape is not None and shape.type != "text":
        raise unsupported("response_format", shape.type)
    if forced_tools(parameters.tools, parameters.tool_choice):
        raise unsupported("tool_choice", msgspec.to_builtins(parameters.tool_choice))


def unsupported(parameter: str, value: Any) -> UnsupportedParameterError:
    """The error that sends a request on to an engine that has the parameter."""
    return UnsupportedParameterError(
        f"this engine cannot do what {parameter} {value!r} asks for; one with structured output can (vllm)",
        {"parameter": parameter, "value": value},
    )


def check_tools(task: str, parameters: Parameters) -> None:
    """Tools are written into the prompt by a chat template, so nothing but a chat can have them.

    Raises:
        InvalidRequestError: names the task.
    """
    if parameters.tools and task != "chat":
        raise InvalidRequestError(f"tools need the task chat, not {task}", {"field": "parameters.tools"})


def template_tools(parameters: Parameters) -> list[dict[str, Any]] | None:
    """The tools as chat templates want them; None where the model is to see none."""
    if not parameters.tools or parameters.tool_choice == "none":
        return None
    return list(msgspec.to_builtins(parameters.tools))


def template_turns(request: InferenceRequest) -> list[dict[str, Any]]:
    """The turns as chat templates want them: always a content, and the arguments of calls as objects, not as text."""
    return [_template_turn(turn) for turn in request.inputs["messages"]]


def _template_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    given = {**turn, "content": turn.get("content") or ""}
    return {**given, "tool_calls": [_template_call(call) for call in calls]} if calls else given


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = function["arguments"]  # what a model once wrote need not be JSON
    return {**call, "function": {**function, "arguments": arguments}}
