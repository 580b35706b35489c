"""What a chat carries beside plain turns: tools, calls of them, and the shape that an answer is held to.

The shapes are those of OpenAI's chat completions, so that what a client sends there travels here unchanged.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

ToolName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_.:-]+$")]


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which function the model wants called, and with what."""

    name: ToolName
    arguments: str
    """A JSON object as text, as the model wrote it."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call that the assistant asked for."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    function: CalledFunction
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn of a chat. An assistant's turn that calls tools may have no content."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] = []
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    """Of a tool's turn: the call that it answers."""

    def __post_init__(self) -> None:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only the assistant's turn has tool_calls, not the {self.role}'s")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"only a tool's turn has a tool_call_id, not the {self.role}'s")
        if self.content is None and not self.tool_calls:
            raise ValueError(f"the {self.role}'s turn has no content")


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A function that the model may ask to be called."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None: it takes none."""
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the model may use."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The name of a function among the tools."""

    name: ToolName


class NamedToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The one tool that the model must call."""

    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A schema that the answer must satisfy."""

    name: ToolName
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the whole text of the answer must be: anything, some JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format has json_schema exactly when its type is json_schema")


def forced_tools(tools: tuple[Tool, ...], choice: ToolChoice | None) -> tuple[Tool, ...]:
    """The tools of which the model must call one; none when it may answer in words.

    Raises:
        ValueError: the choice needs tools that there are not.
    """
    if isinstance(choice, NamedToolChoice):
        chosen = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not chosen:
            raise ValueError(f"tool_choice names {choice.function.name!r}, which is not among the tools")
        return chosen
    if choice == "required":
        if not tools:
            raise ValueError("tool_choice is required, and there are no tools")
        return tools
    return ()
