"""From arguments and files to requests: what `muai submit` sends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

INPUT_KEYS = frozenset({"text", "prompt", "messages"})
LIST_PARAMETERS = frozenset({"stop"})


def parse_parameters(pairs: Iterable[str]) -> dict[str, Any]:
    """`name=value` pairs as parameters; a value is JSON where it can be read as such, else a text.

    A parameter that is a list may be named more than once.

    Raises:
        click.BadParameter: a pair has no `=`, or a name that is no list comes twice.
    """
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE, such as max_tokens=64")
        value = _json_or_text(text)
        if name in LIST_PARAMETERS:
            values = value if isinstance(value, list) else [text]
            parameters[name] = [*parameters.get(name, []), *values]
        elif name in parameters:
            raise click.BadParameter(f"{name} is given twice")
        else:
            parameters[name] = value
    return parameters


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_requests(lines: Iterable[str], *, as_json: bool, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The requests of a file: a line is a text, or in a .jsonl file a text, an input, or any of a request's fields.

    Empty lines are passed over.

    Args:
        options: hold for every line; what a line says itself comes first.
    Raises:
        click.BadParameter: a line is not JSON or no request; names its number.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        text = line.rstrip("\r\n")
        yield {**options, **(_line_fields(text, number) if as_json else {"inputs": text})}


def _line_fields(text: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"line {number} is not JSON: {error}") from None
    if isinstance(value, str):
        return {"inputs": value}
    if isinstance(value, dict) and set(value) <= INPUT_KEYS and value:
        return {"inputs": value}
    if isinstance(value, dict) and "inputs" in value:
        return value
    raise click.BadParameter(f"line {number} is neither a text nor an object with inputs, text, prompt or messages")
