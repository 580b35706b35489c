"""From arguments and lines to requests."""

import click
import pytest

from muai_producers.cli.inputs import parse_parameters, read_requests
from muai_producers.cli.submitting import request_options


def test_Given_pairs_Then_values_are_json_where_they_can_be() -> None:
    parameters = parse_parameters(["max_tokens=64", "temperature=0.5", "truncate=true", "note=a b=c"])
    assert parameters == {"max_tokens": 64, "temperature": 0.5, "truncate": True, "note": "a b=c"}


def test_Given_stop_several_times_Then_it_becomes_a_list_of_texts() -> None:
    assert parse_parameters(["stop=END", "stop=7", 'stop=["a", "b"]']) == {"stop": ["END", "7", "a", "b"]}


@pytest.mark.parametrize("pair", ["max_tokens", "=3", ""])
def test_Given_no_pair_Then_it_is_refused_by_name(pair: str) -> None:
    with pytest.raises(click.BadParameter, match="NAME=VALUE"):
        parse_parameters([pair])


def test_Given_a_parameter_twice_Then_it_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="top_k is given twice"):
        parse_parameters(["top_k=1", "top_k=2"])


def test_Given_lines_of_text_Then_each_is_a_request_and_empty_ones_are_passed_over() -> None:
    requests = list(read_requests(["one\n", "\n", " two \r\n"], as_json=False, options={"model": "m"}))
    assert requests == [{"model": "m", "inputs": "one"}, {"model": "m", "inputs": " two "}]


def test_Given_lines_of_json_Then_texts_inputs_and_whole_requests_are_taken() -> None:
    lines = ['"a text"', '{"text": "b"}', '{"inputs": "c", "priority": 9, "model": "other"}']
    requests = list(read_requests(lines, as_json=True, options={"model": "m", "priority": 1}))
    assert requests == [
        {"model": "m", "priority": 1, "inputs": "a text"},
        {"model": "m", "priority": 1, "inputs": {"text": "b"}},
        {"model": "other", "priority": 9, "inputs": "c"},
    ]


@pytest.mark.parametrize("line", ["not json", "[1]", "7", '{"txt": "a"}', "{}"])
def test_Given_a_line_that_is_no_request_Then_its_number_is_named(line: str) -> None:
    with pytest.raises(click.BadParameter, match="line 2"):
        list(read_requests(['"fine"', line], as_json=True, options={}))


def test_Given_options_Then_only_what_was_given_reaches_the_client() -> None:
    given = {
        "task": None,
        "priority": 0,
        "deadline_s": None,
        "tenant": "t",
        "params": ("seed=1",),
        "engines": ("onnx",),
    }
    assert request_options({**given, "idempotency_key": None}) == {
        "priority": 0,
        "tenant": "t",
        "parameters": {"seed": 1},
        "engine_preference": ["onnx"],
    }
