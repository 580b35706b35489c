"""The spans of a workflow's run: the run, its execution, and each step where it is run."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from muai_producers.errors import RequestCancelledError
from muai_producers.monitoring.guard import guarded
from muai_producers.store import FAILURE, REVOKED, SUCCESS
from muai_producers.tracing import names
from muai_producers.tracing.base import Finished, Tracer
from muai_producers.tracing.context import RequestSpan, SpanId, derived_span_id, span_of

if TYPE_CHECKING:
    from muai_producers.workflows.runs import Run


def _execution(run: Run, span: RequestSpan) -> SpanId:
    return span.child(derived_span_id(run.id, names.WORKFLOW_EXECUTION))


def _about(run: Run) -> dict[str, Any]:
    return {names.REQUEST_ID: run.id, names.WORKFLOW_TYPE: run.workflow, names.USER_ID: run.tenant}


def run_step(tracer: Tracer, run: Run, step: str) -> Any:
    """Context manager: the span of one step, the current one meanwhile, so that its requests are below it."""
    span = span_of(run.id, run.trace) if tracer.enabled else None
    if span is None:
        return contextlib.nullcontext()
    return tracer.trace_part(step, {**_about(run), names.STEP: step}, _execution(run, span))


@guarded("traces")
def run_ended(tracer: Tracer, run: Run, error: BaseException | None) -> None:
    """Tell the spans of the run and of its execution: its terminal result is written."""
    span = span_of(run.id, run.trace) if tracer.enabled else None
    if span is None:
        return
    now_s = time.time()
    about = _about(run)
    is_cancelled = isinstance(error, RequestCancelledError)
    about[names.STATE] = SUCCESS if error is None else REVOKED if is_cancelled else FAILURE
    execution = _execution(run, span)
    tracer.record(
        [
            Finished(
                names.WORKFLOW_EXECUTION, execution, span.own.span_id, run.submitted_at, now_s, about, error=error
            ),
            Finished(names.REQUEST, span.own, span.parent_id, run.submitted_at, now_s, about, "server", error=error),
        ]
    )
