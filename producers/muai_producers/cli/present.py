"""Results on the terminal: for people as text, for programs as one JSON object a line."""

from __future__ import annotations

import json
from typing import Any

import click

from muai_producers.errors import MuaiError
from muai_producers.wire import InferenceResult

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
