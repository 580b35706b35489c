"""What the lines that are written meanwhile are about: per thread, and per task of an event loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from muai_producers.tracing.context import request_span
from muai_producers.wire import Batch, InferenceRequest


@dataclass(frozen=True, slots=True)
class LogContext:
    """Fields of every line, and the texts that no line may repeat."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Mapping[str, Any]] = ()
    """Of the requests that are at work: whatever a library raises may quote them."""


_NOTHING = LogContext()
_CONTEXT: ContextVar[LogContext] = ContextVar("muai_log_context", default=_NOTHING)


def current() -> LogContext:
    """What is known here."""
    return _CONTEXT.get()


@contextmanager
def log_context(inputs: Sequence[Mapping[str, Any]] = (), **fields: Any) -> Iterator[None]:
    """Give every line of this block these fields; those that are None or '' are left out."""
    outer = _CONTEXT.get()
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    token = _CONTEXT.set(LogContext({**outer.fields, **known}, inputs or outer.inputs))
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def about_request(request: InferenceRequest, **more: Any) -> Any:
    """`log_context` for lines on one request."""
    span = request_span(request)
    return log_context(
        (request.inputs,),
        request_id=request.id,
        model_name=request.model,
        tenant=request.tenant,
        trace_id="" if span is None else f"{span.own.trace_id:032x}",
        **more,
    )


def about_batch(batch: Batch, **more: Any) -> Any:
    """`log_context` for lines on a batch; on its request where it has but one."""
    about = {"batch_id": batch.id, "batch_size": len(batch.requests), "engine": batch.engine, **more}
    if len(batch.requests) == 1:
        return about_request(batch.requests[0], **about)
    return log_context([request.inputs for request in batch.requests], model_name=batch.model, **about)
