"""`muai submit`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from muai_producers.cli.inputs import parse_parameters, read_requests
from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_producers.client import InferenceClient

CHUNK = 500
TASKS = ("text-generation", "chat", "embedding", "text-classification", "summarization")


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="One request per line: a text, or JSON where the name ends in .jsonl.",
)
@click.option("--task", type=click.Choice(TASKS), help="What to do; the model's own task by default.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter, such as max_tokens=64.")
@click.option("--priority", type=click.IntRange(0, 9), help="9 is the most urgent; 5 by default.")
@click.option("--deadline-s", type=click.FloatRange(min=0, min_open=True), help="Seconds in which it must be done.")
@click.option("--tenant", help="On whose account.")
@click.option("--engine", "engines", multiple=True, help="Engine to try first; may be repeated.")
@click.option("--idempotency-key", help="The same key and content is the same request.")
@click.option("--wait", is_flag=True, help="Wait for the results and print them.")
@click.option("--stream", is_flag=True, help="Print the text as it is generated.")
@click.option("--timeout-s", type=click.FloatRange(min=0), help="Longest wait; the requests go on after it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@pass_invocation
def submit(
    invocation: Invocation,
    /,
    model: str,
    text: str | None,
    path: Path | None,
    wait: bool,
    stream: bool,
    timeout_s: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Submit TEXT (- reads it from standard input) or the lines of a file to MODEL."""
    if (text is None) == (path is None):
        raise click.UsageError("give either a TEXT (- for standard input) or --file")
    if path is not None and given["idempotency_key"] is not None:
        raise click.UsageError("--idempotency-key names one request; in a .jsonl file each line can have its own")
    if path is not None and stream:
        raise click.UsageError("--stream prints one text; the lines of a file would run into each other")
    options = {"model": model, **request_options(given)}
    with invocation.client() as client:
        if path is not None:
            failed = _submit_file(client, path, options, wait=wait, timeout_s=timeout_s, as_json=as_json)
        else:
            content = sys.stdin.read() if text == "-" else text
            ids = client.submit_many([{**options, "inputs": content, "stream": stream}])
            if stream:
                from muai_producers.cli.present import echo_stream

                echo_stream(client.stream(ids[0], timeout_s=timeout_s), as_json=as_json)
                return
            failed = _report(client, ids, wait=wait, timeout_s=timeout_s, as_json=as_json, with_id=False)
    if failed:
        click.get_current_context().exit(1)


def request_options(given: dict[str, Any]) -> dict[str, Any]:
    """The client's arguments for the options that were given."""
    names = ("task", "priority", "deadline_s", "tenant", "idempotency_key")
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("params"):
        options["parameters"] = parse_parameters(given["params"])
    if given.get("engines"):
        options["engine_preference"] = list(given["engines"])
    return options


def _submit_file(
    client: InferenceClient, path: Path, options: dict[str, Any], *, wait: bool, timeout_s: float | None, as_json: bool
) -> int:
    with click.open_file(str(path), encoding="utf-8") as lines:
        ids: list[str] = []
        try:
            for chunk in _chunks(read_requests(lines, as_json=path.suffix == ".jsonl", options=options)):
                ids += _submit_chunk(client, chunk, ids)
        finally:
            # Also when a later chunk was refused: what was accepted is served, and its ids are all there is of it.
            if not wait:
                _report(client, ids, wait=False, timeout_s=None, as_json=as_json, with_id=True)
    if not wait:
        return 0
    return _report(client, ids, wait=True, timeout_s=timeout_s, as_json=as_json, with_id=True)


def _submit_chunk(client: InferenceClient, chunk: list[dict[str, Any]], ids: list[str]) -> list[str]:
    from muai_producers.errors import MuaiError

    try:
        return client.submit_many(chunk)
    except MuaiError as error:
        ids += error.details.get("accepted", [])
        if ids:
            error.message = f"{error.message} ({len(ids)} requests were accepted before that)"
        raise


def _chunks(requests: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(requests)
    while chunk := list(itertools.islice(iterator, CHUNK)):
        yield chunk


def _report(
    client: InferenceClient, ids: list[str], *, wait: bool, timeout_s: float | None, as_json: bool, with_id: bool
) -> int:
    """Print ids, or results as they come; returns how many failed."""
    from muai_producers.cli.present import echo_json, echo_outcome
    from muai_producers.errors import MuaiError

    if not wait:
        for request_id in ids:
            if as_json:
                echo_json({"request_id": request_id})
            else:
                click.echo(request_id)
        return 0
    failed = 0
    for request_id, outcome in client.results(ids, timeout_s):
        failed += isinstance(outcome, MuaiError)
        echo_outcome(request_id, outcome, as_json=as_json, with_id=with_id)
    return failed
