"""What the spans of a request say of it, and the span that the request itself is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muai_producers.errors import MuaiError
from muai_producers.tracing import names
from muai_producers.tracing.base import Finished
from muai_producers.tracing.context import RequestSpan, SpanId, derived_span_id, request_span
from muai_producers.wire import InferenceRequest


def request_attributes(request: InferenceRequest, task: str | None = None) -> dict[str, Any]:
    """Who asked for what. Nothing of the inputs: traces lie with others, and for long."""
    kind = request.task or task
    return {
        names.REQUEST_ID: request.id,
        names.WORKFLOW_TYPE: kind,
        names.USER_ID: request.tenant,
        names.MODEL_NAME: request.model,
        names.PRIORITY: request.priority,
        names.GEN_AI_OPERATION: names.GEN_AI_OPERATIONS.get(kind or ""),
        names.GEN_AI_MODEL: request.model,
        names.GEN_AI_CONVERSATION: request.conversation_id,
        names.GEN_AI_MAX_TOKENS: request.parameters.max_tokens,
        names.GEN_AI_TEMPERATURE: request.parameters.temperature or None,
    }


def part_attributes(request: InferenceRequest) -> dict[str, Any]:
    """What the smaller spans below it repeat: enough to find them by. An attribute costs 6 µs on its way out."""
    return {names.REQUEST_ID: request.id, names.MODEL_NAME: request.model}


def request_finished(
    request: InferenceRequest,
    span: RequestSpan,
    end_s: float,
    error: BaseException | None,
    *,
    task: str | None = None,
    state: str,
    more: Mapping[str, Any] | None = None,
) -> Finished:
    """The span of a request, from its submission to its terminal result.

    Args:
        state: SUCCESS, FAILURE or REVOKED.
        more: attributes beyond those of every request.
    """
    told = {**request_attributes(request, task), names.STATE: state, **(more or {})}
    if isinstance(error, MuaiError):
        told[names.ERROR_CODE] = error.code
    start_s = request.submitted_at or end_s
    return Finished(
        names.REQUEST, span.own, span.parent_id, start_s, end_s, told, "server", error=error, inputs=(request.inputs,)
    )


def part_of(request: InferenceRequest, span: RequestSpan, name: str, *where: str) -> SpanId:
    """The id of one of a request's spans, as everybody derives it who knows the request and where it was done."""
    return span.child(derived_span_id(request.id, name, *where))


def batch_span_id(batch_id: str) -> SpanId:
    """The span of a batch, in a trace of its own: a batch belongs to all of its requests."""
    trace_id = (derived_span_id("batch", batch_id) << 64) | derived_span_id(batch_id)
    return SpanId(trace_id, derived_span_id(batch_id), True)


__all__ = ["batch_span_id", "part_attributes", "part_of", "request_attributes", "request_finished", "request_span"]
