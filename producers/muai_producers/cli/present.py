"""Results on the terminal: for people as text, for programs as one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from muai_producers.errors import MuaiError
from muai_producers.wire import InferenceResult

if TYPE_CHECKING:
    from muai_producers.streams.text import StreamEvent

SHOWN_NUMBERS = 6


def echo_json(value: Any) -> None:
    """One line of JSON."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def echo_outcome(request_id: str, outcome: InferenceResult | MuaiError, *, as_json: bool, with_id: bool) -> None:
    """Print how a request ended; an error goes to standard error, unless a program reads."""
    if as_json:
        failed = isinstance(outcome, MuaiError)
        ended = {"error": outcome.to_wire()} if isinstance(outcome, MuaiError) else outcome.to_dict()
        echo_json({"request_id": request_id, "state": "FAILURE" if failed else "SUCCESS", **ended})
        return
    lead = f"{request_id}  " if with_id else ""
    if isinstance(outcome, MuaiError):
        click.echo(f"{lead}{outcome.code}: {' '.join(outcome.message.split())}", err=True)
    else:
        click.echo(lead + readable_outputs(outcome.outputs))
        if not with_id:
            click.echo(footnote(outcome), err=True)


def echo_stream(events: Iterable[StreamEvent], *, as_json: bool) -> None:
    """Print a text as it comes; what an error interrupts ends in a line of its own."""
    at_line_start, any_text = True, False
    try:
        for event in events:
            if as_json:
                result = {} if event.result is None else {"result": event.result.to_dict()}
                echo_json({"event": event.kind, "offset": event.offset, "text": event.text, **result})
            elif event.kind == "text":
                click.echo(event.text, nl=False)
                at_line_start, any_text = event.text.endswith("\n"), True
            elif event.kind == "restart":
                click.echo("" if at_line_start else "\n", nl=False)
                click.echo("(begun anew: another engine or worker answers otherwise)", err=True)
                at_line_start = True
            elif event.result is not None:
                if not any_text:
                    click.echo(readable_outputs(event.result.outputs), nl=False)
                    at_line_start = False
                click.echo("" if at_line_start else "\n", nl=False)
                at_line_start = True
                click.echo(footnote(event.result), err=True)
    finally:
        if not at_line_start:
            click.echo()


def readable_outputs(outputs: dict[str, Any]) -> str:
    """The outputs of one request for people."""
    if "text" in outputs:
        return str(outputs["text"])
    if "labels" in outputs:
        return ", ".join(f"{label['label']} {label['score']:.3f}" for label in outputs["labels"])
    if "embedding" in outputs:
        vector = outputs["embedding"]
        shown = ", ".join(f"{number:.4f}" for number in vector[:SHOWN_NUMBERS])
        return f"[{shown}, …] ({len(vector)} numbers; --json prints them all)"
    return json.dumps(outputs, ensure_ascii=False)


def footnote(result: InferenceResult) -> str:
    """How a result came about, in one line."""
    parts = [result.engine_used, f"{result.latency_ms:.0f} ms", f"in a batch of {result.batch_size}"]
    parts += [
        f"not by {attempt['engine']}: {attempt['error'].get('message', '')}"
        for attempt in result.metadata.get("attempts", [])
    ]
    return f"({'; '.join(parts)})"
