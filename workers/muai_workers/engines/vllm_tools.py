"""Calls of tools in what a model writes, found by vLLM's own parsers: there is one for each family of models."""

from __future__ import annotations

import logging
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager

from muai_producers.errors import ModelLoadError
from muai_workers.engines.vllm_requests import tool_call

log = logging.getLogger(__name__)


class ToolReader:
    """Reads the calls that a model writes.

    Args:
        name: vLLM's name for the way this model writes them.
        tokenizer: the model's, as vLLM gives it.
    Raises:
        ModelLoadError: vLLM knows no such way.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        try:
            self._parser: Any = ToolParserManager.get_tool_parser(name)
        except KeyError as error:
            raise ModelLoadError(f"vLLM has no tool parser {name!r}: see the model's tool_parser") from error
        self._tokenizer = tokenizer

    def read(self, text: str, tools: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        """The text beside the calls, and the calls; none where the text holds none that can be read."""
        asked = ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tools=tools)
        found = self._parser(self._tokenizer, asked.tools).extract_tool_calls(text, asked)
        if not found.tools_called:
            return text, []
        calls = [tool_call(one.function.name, one.function.arguments) for one in found.tool_calls]
        return found.content or "", calls
