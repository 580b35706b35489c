"""What requests ask beyond sampling: what is refused by whom, and what templates are given."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from muai_batching.routing import cools_engine
from muai_producers.errors import (
    InferenceFailedError,
    InvalidRequestError,
    OutOfMemoryError,
    UnsupportedParameterError,
    error_from_wire,
)
from muai_producers.wire import InferenceRequest, Parameters, request_from_fields, validate_inputs
from muai_workers.engines.parameters import check_tools, refuse_constraints, template_tools, template_turns

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}


def parameters(**fields: Any) -> Parameters:
    return msgspec.convert(fields, Parameters)


def request(messages: list[dict[str, Any]], **fields: Any) -> InferenceRequest:
    return request_from_fields(
        {"model": "m", "task": "chat", "inputs": validate_inputs("chat", {"messages": messages}), **fields},
        request_id="1",
    )


def test_a_tool_conversation_travels_unchanged() -> None:
    turns = [
        {"role": "user", "content": "How is the weather in Bonn?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    sent = request(turns, parameters={"tools": [WEATHER], "tool_choice": "auto", "response_format": SCHEMA})
    arrived = msgspec.json.decode(msgspec.json.encode(sent), type=InferenceRequest)
    assert arrived == sent
    assert arrived.inputs["messages"] == turns
    assert msgspec.json.decode(msgspec.json.encode(arrived.parameters)) == {
        "tools": [WEATHER],
        "tool_choice": "auto",
        "response_format": SCHEMA,
    }


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "user"}, "the user's turn has no content"),
        ({"role": "assistant"}, "the assistant's turn has no content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only the assistant's turn has tool_calls"),
        ({"role": "user", "content": "x", "tool_call_id": "call_1"}, "only a tool's turn has a tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "missing required field `function`"),
    ],
)
def test_a_turn_that_makes_no_sense_is_refused_by_name(turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        validate_inputs("chat", {"messages": [turn]})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {**NAMED, "function": {"name": "stocks"}}}, "names 'stocks'"),
        ({"response_format": {"type": "json_schema"}}, "exactly when its type is json_schema"),
        ({"response_format": {"type": "xml"}}, "Invalid enum value 'xml'"),
        ({"presence_penalty": 3}, "<= 2.0"),
        ({"min_p": 1.5}, "<= 1.0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        request([{"role": "user", "content": "x"}], parameters=fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": SCHEMA},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": NAMED},
    ],
)
def test_an_engine_without_structured_output_passes_on_what_asks_for_it(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameterError) as raised:
        refuse_constraints(parameters(**fields))
    assert type(error_from_wire(raised.value.to_wire())) is UnsupportedParameterError


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "auto"}],
)
def test_what_leaves_the_answer_free_is_served_everywhere(fields: dict[str, Any]) -> None:
    refuse_constraints(parameters(**fields))


def test_a_parameter_that_an_engine_lacks_does_not_cool_it_down() -> None:
    assert not cools_engine(UnsupportedParameterError("no such thing"))
    assert not cools_engine(OutOfMemoryError("full"))
    assert cools_engine(InferenceFailedError("broken"))


def test_tools_need_a_chat() -> None:
    check_tools("chat", parameters(tools=[WEATHER]))
    with pytest.raises(InvalidRequestError, match="tools need the task chat, not text-generation"):
        check_tools("text-generation", parameters(tools=[WEATHER]))


def test_templates_get_tools_only_when_the_model_may_use_them() -> None:
    assert template_tools(parameters(tools=[WEATHER])) == [WEATHER]
    assert template_tools(parameters(tools=[WEATHER], tool_choice="none")) is None
    assert template_tools(parameters()) is None


def test_templates_get_a_content_always_and_arguments_as_objects() -> None:
    broken = {**CALL, "function": {"name": "weather", "arguments": "{city"}}
    turns = template_turns(request([{"role": "assistant", "tool_calls": [CALL, broken]}]))
    assert turns[0]["content"] == ""
    assert [call["function"]["arguments"] for call in turns[0]["tool_calls"]] == [{"city": "Bonn"}, "{city"]
