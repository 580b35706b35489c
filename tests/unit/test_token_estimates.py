"""How many tokens an input will have, by estimate."""

from __future__ import annotations

import random

import pytest
from tests.requests import a_request

from muai_producers.token_estimates import input_tokens, request_tokens, text_tokens
from muai_producers.wire import Parameters, Tool

NO_PARAMETERS = Parameters()
WORDS = ["a", "of", "the", "model", "queue", "request", "inference", "throughput", "because", "which", "latency"]


def test_prose_is_counted_by_words_whatever_their_length() -> None:
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(50)]
    assert len({len(text) for text in texts}) > 10
    assert {text_tokens(text) for text in texts} == {41}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 1),
        ("hi", 1),
        ("x" * 400, 101),
        ("0123456789abcdef " * 100, 426),
        ("1 2 3 4 5 6 7 8", 4),
        (" " * 80, 21),
        ("\n" * 80, 21),
        ("日" * 100, 76),
        ("\ud800" * 4, 4),
    ],
    ids=["nothing", "little", "one word", "long words", "digits", "spaces", "lines", "ideographs", "half a surrogate"],
)
def test_what_is_no_prose_is_counted_by_bytes(text: str, tokens: int) -> None:
    assert text_tokens(text) == tokens


def test_a_longer_text_of_the_same_kind_has_no_fewer_tokens() -> None:
    for unit in ("word ", "x", "日本 ", "averylongwordindeed "):
        counts = [text_tokens(unit * times) for times in range(4, 200)]
        assert counts == sorted(counts)


def test_turns_calls_and_tools_count() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    plain = [{"role": "user", "content": "how is the weather in Bonn today"}]
    calling = [*plain, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": None}]
    alone = input_tokens({"messages": plain}, NO_PARAMETERS)
    assert alone == text_tokens("how is the weather in Bonn today")
    assert input_tokens({"messages": calling}, NO_PARAMETERS) > alone + len(str(call)) // 5
    tool = Tool(function={"name": "weather", "description": "the weather of a city, " * 20})
    assert input_tokens({"messages": plain}, Parameters(tools=[tool])) > alone + 100


def test_a_quota_is_charged_for_what_may_be_generated_too() -> None:
    request = a_request("1", text="hi", parameters=Parameters(max_tokens=100))
    assert request_tokens(request) == 101
    assert request_tokens(a_request("2", text="hi")) == 1
