"""From OpenAI's bodies to requests and from results to its answers, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from muai_producers.errors import (
    DeadlineExceededError,
    EnginesExhaustedError,
    InvalidRequestError,
    MalformedMessageError,
    MuaiError,
)
from muai_producers.gateway.openai_api.answers import chat_completion, usage_of
from muai_producers.gateway.openai_api.bodies import ChatCompletionBody, CompletionBody, EmbeddingBody, read_body
from muai_producers.gateway.openai_api.calls import Told
from muai_producers.gateway.openai_api.chunks import ChatForm, TextForm, written
from muai_producers.gateway.openai_api.failures import error_body, told_error
from muai_producers.gateway.openai_api.translation import chat_inferences, completion_inferences
from muai_producers.gateway.streams import News
from muai_producers.streams.text import StreamEvent
from muai_producers.wire import InferenceResult

TURNS = [{"role": "user", "content": "hello"}]
CALLS = [{"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatCompletionBody:
    return read_body(json.dumps({"model": "m", "messages": TURNS, **fields}).encode(), ChatCompletionBody)


def result(text: str = "hi", **outputs: Any) -> InferenceResult:
    return InferenceResult(
        outputs={"text": text, "finish_reason": "stop", **outputs},
        engine_used="fake",
        latency_ms=1.0,
        batch_size=1,
        cache_hit=False,
        metadata={"usage": {"input_tokens": 3, "output_tokens": 2}},
    )


def news(*events: StreamEvent, error: MuaiError | None = None) -> News:
    return News(list(events), error=error)


def text(value: str) -> StreamEvent:
    return StreamEvent("text", "1-0", value)


def end(outcome: InferenceResult) -> StreamEvent:
    return StreamEvent("result", "1-0", result=outcome)


def read(
    told: Sequence[tuple[int, News]], *, form: Any = None, num_answers: int = 1, include_usage: bool = False
) -> list[Any]:
    """The events that a stream of this news is written as; `[DONE]` as that text."""

    async def source() -> AsyncGenerator[Told, None]:
        for index, one in told:
            yield Told(index, one)

    async def scenario() -> bytes:
        form_or_chat = form or ChatForm("r", "m", include_usage)
        chunks = written(source(), form_or_chat, num_answers, include_usage)
        return b"".join([chunk async for chunk in chunks])

    lines = asyncio.run(scenario()).decode().split("\n\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_given_nothing_but_the_messages_then_openais_defaults_hold() -> None:
    (inference,) = chat_inferences(chat())
    assert inference.task == "chat"
    assert inference.inputs == {"messages": TURNS}
    assert inference.parameters.temperature == 1.0
    assert inference.parameters.max_tokens is None
    assert not inference.stream
    (completion,) = completion_inferences(read_body(b'{"model": "m", "prompt": "hello"}', CompletionBody))
    assert (completion.task, completion.parameters.max_tokens) == ("text-generation", 16)


def test_given_every_parameter_then_each_arrives_and_answers_have_seeds_of_their_own() -> None:
    options = {"top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": -1.0}
    body = chat(**options, seed=5, n=3, stop=["a", "b"], max_completion_tokens=9, priority=8, deadline_s=3.5)
    inferences = chat_inferences(body)
    assert [inference.parameters.seed for inference in inferences] == [5, 6, 7]
    parameters = inferences[0].parameters
    assert {name: getattr(parameters, name) for name in options} == options
    assert (parameters.stop, parameters.max_tokens) == (("a", "b"), 9)
    assert (inferences[0].priority, inferences[0].deadline_s) == (8, 3.5)


def test_given_turns_of_all_kinds_then_they_travel_as_ours() -> None:
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "how is "}, {"type": "text", "text": "it"}]},
        {"role": "assistant", "content": None, "tool_calls": CALLS, "refusal": None, "audio": None},
        {"role": "tool", "content": "sunny", "tool_call_id": "call-1"},
    ]
    (inference,) = chat_inferences(chat(messages=turns, tools=[TOOL], stream=True))
    assert isinstance(inference.inputs, dict)
    assert inference.inputs["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "how is it"},
        {"role": "assistant", "tool_calls": CALLS},
        {"role": "tool", "content": "sunny", "tool_call_id": "call-1"},
    ]
    assert inference.parameters.tools[0].function.name == "weather"
    assert not inference.stream, "a call of a tool is known for one only when its text is whole"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"n": 129}, "n"),
        ({"stop": [1]}, "stop"),
        ({"tools": [{"type": "search"}]}, "tools[0].type"),
        ({"messages": [{"role": "user"}, {"content": "x"}]}, "messages[1].role"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_given_a_wrong_field_then_the_error_names_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as wrong:
        chat_inferences(chat(**fields))
    told = error_body(400, wrong.value.code, wrong.value.message, wrong.value.details).error
    assert told.param == param


def test_given_too_many_answers_or_no_json_then_it_is_refused() -> None:
    prompts = read_body(json.dumps({"model": "m", "prompt": ["x"] * 100, "n": 128}).encode(), CompletionBody)
    with pytest.raises(InvalidRequestError, match="2048"):
        completion_inferences(prompts)
    with pytest.raises(InvalidRequestError, match="2048"):
        read_body(json.dumps({"model": "m", "input": ["x"] * 2049}).encode(), EmbeddingBody)
    with pytest.raises(MalformedMessageError):
        read_body(b"{", EmbeddingBody)


def test_given_a_call_of_a_tool_then_answer_and_chunks_carry_it() -> None:
    called = result("", tool_calls=CALLS, finish_reason="tool_calls")
    (choice,) = chat_completion("r", "m", [called]).choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (None, CALLS, "tool_calls")
    *chunks, done = read([(0, news(end(called)))])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"tool_calls": [{"index": 0, **CALLS[0]}]}, {}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert done == "[DONE]"


def test_given_answers_to_several_prompts_then_each_prompt_counts_once() -> None:
    usage = usage_of([result()] * 4, answers_per_prompt=2)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 8, 14)


def test_given_two_answers_told_in_turns_then_their_chunks_keep_apart_and_usage_comes_where_asked_for() -> None:
    told = [
        (1, news(text("b"))),
        (0, news(text("a"))),
        (0, news()),
        (1, news(end(result("b")))),
        (0, news(end(result("a")))),
    ]
    *chunks, usage, done = read(told, num_answers=2, include_usage=True)
    assert [(one["choices"][0]["index"], one["usage"]) for one in chunks] == [
        (1, None),
        (1, None),
        (0, None),
        (0, None),
        (1, None),
        (0, None),
    ]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 7)
    assert done == "[DONE]"
    assert all("usage" not in one for one in read(told, num_answers=2)[:-1])


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ([(0, news(text("a"))), (0, news(StreamEvent("restart", "0-0"), text("b")))], "stream_restarted"),
        ([(0, news(text("a"))), (0, news(error=DeadlineExceededError("too late")))], "deadline_exceeded"),
    ],
)
def test_given_a_stream_that_cannot_end_well_then_an_error_ends_it(told: Any, code: str) -> None:
    events = read(told, form=TextForm("r", "m", False))
    assert events[0]["choices"][0]["text"] == "a"
    assert events[-1]["error"]["code"] == code
    assert events[-1]["error"]["type"] == "server_error"


def test_given_a_parameter_that_no_engine_has_then_the_request_is_to_blame() -> None:
    lacking = {"code": "unsupported_parameter", "message": "no grammar here", "details": {"parameter": "tool_choice"}}
    attempts = [{"engine": "onnx", "error": lacking}, {"engine": "vllm", "error": {"code": "engine_unavailable"}}]
    told = told_error(EnginesExhaustedError("none left", {"attempts": attempts}))
    assert (told.http_status, told.details["field"], told.message) == (400, "tool_choice", "no grammar here")
    attempts[1] = {"engine": "vllm", "error": {"code": "out_of_memory"}}
    assert told_error(EnginesExhaustedError("none left", {"attempts": attempts})).http_status == 502
