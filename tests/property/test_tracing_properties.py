"""Properties 19 to 24, and 59 for traces: what a trace says of any request, and that no failure of tracing is felt."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace as api
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from muai_batching.tracing import CollectorTracing
from muai_config import build_settings
from muai_producers.errors import InferenceFailedError, MuaiError, OutOfMemoryError
from muai_producers.store import Answer
from muai_producers.tracing.context import (
    SpanId,
    current_trace,
    derived_span_id,
    read_trace,
    request_span,
    root_trace,
)
from muai_producers.tracing.sampling import HeadSampler
from muai_producers.tracing.tracer import OTelTracer
from muai_producers.wire import Batch, InferenceRequest
from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.tracing import BatchTrace, WorkerTracing

CONFIG = build_settings({"monitoring": {"tracing": {"max_traces_per_s": 0}}}, {}).monitoring.tracing
IDS = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["Cs"]), min_size=1, max_size=60)
NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,30}", fullmatch=True)


class Exported:
    """A tracer whose spans can be looked at."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self._memory = InMemorySpanExporter()
        self.tracer = OTelTracer(CONFIG, "test", make_exporter_=lambda: exporter or self._memory)

    def spans(self) -> list[ReadableSpan]:
        self.tracer.close(10.0)
        return list(self._memory.get_finished_spans())


@contextmanager
def exported(exporter: SpanExporter | None = None) -> Iterator[Exported]:
    one = Exported(exporter)
    try:
        yield one
    finally:
        one.tracer.close(0.0)


def _request(request_id: str, trace: dict[Any, str]) -> InferenceRequest:
    return InferenceRequest(
        id=request_id, model="m", task="embedding", inputs={"text": "secret"}, trace=trace, submitted_at=1.0
    )


class _Store:
    def states(self, ids: Sequence[str]) -> list[None]:
        return [None for _ in ids]


def _run(tracer: OTelTracer, batch: Batch, errors: dict[str, MuaiError]) -> None:
    """What a worker notes of a batch whose requests end well, but for those of `errors`."""
    now = iter(range(1000, 100_000))
    tracing = WorkerTracing(tracer, _Store(), {}, lambda: float(next(now)))  # type: ignore[arg-type]
    trace = tracing.begin(batch)
    trace.prepared(batch.requests)
    trace.load(lambda: None, is_loaded=False)
    output = EngineOutput({}, input_tokens=7, output_tokens=3)
    list(trace.run(batch.requests, (Completion(request.id, output) for request in batch.requests)))
    for request in batch.requests:
        error = errors.get(request.id)
        tracing.answering(request, None if error else output, error)
        tracing.written([Answer(request.id, b"", "")], [True])
    tracing.finish(trace)


def _batch(requests: list[InferenceRequest], **more: Any) -> Batch:
    fields = {"id": "batch-1", "engine": "onnx", "model": "m", "task": "embedding", "chain": (), "formed_at": 1.0}
    return Batch(requests=requests, **{**fields, **more})


@pytest.mark.property(19)
@given(ids=st.lists(IDS, min_size=1, max_size=20, unique=True))
@settings(max_examples=30, deadline=None)
def test_Given_requests_without_a_trace_Then_each_has_a_root_span_in_a_trace_of_its_own(ids: list[str]) -> None:
    with exported() as one:
        collecting = CollectorTracing(one.tracer, system="redis")
        entered = [collecting.entered(_request(request_id, {}), {}) for request_id in ids]
        _run(one.tracer, _batch(entered), {})
        roots = [span for span in one.spans() if span.name == "request"]
    assert sorted(str((span.attributes or {})["request_id"]) for span in roots) == sorted(ids)
    assert all(span.parent is None for span in roots)
    assert len({span.context.trace_id for span in roots}) == len(ids)


@pytest.mark.property(20)
@given(steps=st.lists(NAMES, min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_Given_a_workflow_of_several_steps_Then_each_is_a_child_of_the_workflows_span(steps: list[str]) -> None:
    with exported() as one:
        tracer = one.tracer
        with tracer.trace_request("r"), tracer.trace_workflow("chat"):
            for step in steps:
                with tracer.trace_workflow(step):
                    pass
        spans = one.spans()
    (workflow,) = [span for span in spans if (span.attributes or {}).get("workflow_type") == "chat"]
    children = [span for span in spans if span.parent is not None and span.parent.span_id == workflow.context.span_id]
    assert workflow.name == "workflow_execution"
    assert [span.name for span in sorted(children, key=lambda span: span.start_time or 0)] == steps


@pytest.mark.property(21)
@given(
    model=NAMES,
    engine=st.sampled_from(["vllm", "deepspeed", "onnx", "pytorch"]),
    size=st.integers(1, 40),
)
@settings(max_examples=30, deadline=None)
def test_Given_an_inference_Then_its_span_has_model_engine_and_batch_size(model: str, engine: str, size: int) -> None:
    with exported() as one:
        requests = [_request(f"r{number}", root_trace(f"r{number}")) for number in range(size)]
        _run(one.tracer, _batch(requests, model=model, engine=engine), {})
        with one.tracer.trace_inference(model, engine) as live:
            live.set_attribute("batch_size", size)
        spans = [span for span in one.spans() if span.name in ("inference", "forward_pass")]
    assert len(spans) == 2 * size + 1
    for span in spans:
        told = span.attributes or {}
        assert (told["engine"], told["batch_size"]) == (engine, size)
        assert told["model_name"] == ("m" if span.parent is not None else model)


@pytest.mark.property(22)
@given(failing=st.lists(st.booleans(), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_Given_a_span_that_has_ended_Then_its_duration_and_status_are_there(failing: list[bool]) -> None:
    ids = [f"r{number}" for number in range(len(failing))]
    errors = {name: OutOfMemoryError("full") for name, fails in zip(ids, failing, strict=True) if fails}
    with exported() as one:
        _run(one.tracer, _batch([_request(name, root_trace(name)) for name in ids]), dict(errors))
        spans = one.spans()
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time >= span.start_time
        assert span.status.status_code is not StatusCode.UNSET
    roots = {str((span.attributes or {})["request_id"]): span for span in spans if span.name == "request"}
    assert {name for name, span in roots.items() if span.status.status_code is StatusCode.ERROR} == set(errors)
    assert all((span.end_time or 0) > (span.start_time or 0) for span in roots.values())


@pytest.mark.property(23)
@given(message=st.text(max_size=3000), kind=st.sampled_from([InferenceFailedError, ValueError, KeyError]))
@settings(max_examples=50, deadline=None)
def test_Given_an_error_Then_type_message_and_stack_are_in_the_span(message: str, kind: type[Exception]) -> None:
    with exported() as one:

        def run() -> None:
            with one.tracer.trace_request("r"), one.tracer.trace_inference("m", "onnx"):
                raise kind(message)

        with pytest.raises(kind) as caught:
            run()
        spans = one.spans()
    text = caught.value.message if isinstance(caught.value, MuaiError) else str(caught.value)
    assert [span.name for span in spans] == ["inference", "request"]
    for span in spans:
        told = span.attributes or {}
        assert told["error_type"] == kind.__name__
        assert str(told["error_message"]) == text[:1024]
        assert kind.__name__ in str(told["stack_trace"])
        assert span.status.status_code is StatusCode.ERROR
        assert [event.name for event in span.events] == ["exception"]


@pytest.mark.property(24)
@given(
    trace_id=st.integers(1, 2**128 - 1),
    span_id=st.integers(1, 2**64 - 1),
    sampled=st.booleans(),
    state=st.from_regex(r"([a-z]{1,8}=[a-zA-Z0-9]{1,20})?", fullmatch=True),
    in_headers=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_Given_a_callers_trace_Then_every_component_carries_it_on(
    trace_id: int, span_id: int, sampled: bool, state: str, in_headers: bool
) -> None:
    caller = SpanId(trace_id, span_id, sampled, state)
    assert read_trace(caller.traceparent(), state) == caller
    with exported() as one:
        collecting = CollectorTracing(one.tracer, system="redis")
        carried = caller.as_trace()
        request = _request("r", {} if in_headers else carried)
        entered = collecting.entered(request, dict(carried) if in_headers else {})
        collecting.routed(entered)
        batch = _batch([entered])
        collecting.sent(batch)
        _run(one.tracer, batch, {})
        spans = [span for span in one.spans() if span.name != "batch"]
    assert entered.trace == carried
    assert bool(spans) == sampled
    assert all(span.context.trace_id == trace_id for span in spans)
    assert all(span.context.trace_state.to_header() == state for span in spans)
    for span in spans:
        if span.name == "request":
            assert span.parent is not None
            assert span.parent.span_id == span_id


@pytest.mark.property(24)
@given(name=NAMES)
@settings(max_examples=20, deadline=None)
def test_Given_an_application_with_a_span_of_its_own_Then_the_client_takes_it_up(name: str) -> None:
    assert current_trace() == {}
    with exported() as one:
        with one.tracer.trace_request(name) as span:
            trace = current_trace()
            context = span.get_span_context()
        one.spans()
    parent = request_span(_request("r", trace))
    assert parent is not None
    assert (parent.own.trace_id, parent.parent_id) == (context.trace_id, context.span_id)
    assert parent.own.span_id == derived_span_id("r")
    assert not api.get_current_span().get_span_context().is_valid


class _Failing(SpanExporter):
    """Fails in one of the ways in which exporters fail."""

    def __init__(self, how: str) -> None:
        self._how = how

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._how == "raises":
            raise ConnectionError("no collector")
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        if self._how == "raises":
            raise RuntimeError("not even that")


@pytest.mark.property(59)
@given(how=st.sampled_from(["raises", "refuses"]), ids=st.lists(IDS, min_size=1, max_size=10, unique=True))
@settings(max_examples=20, deadline=None)
def test_Given_traces_that_cannot_be_exported_Then_requests_go_on_and_it_is_counted(how: str, ids: list[str]) -> None:
    with exported(_Failing(how)) as one:
        batch = _batch([_request(name, root_trace(name)) for name in ids])
        _run(one.tracer, batch, {})
        one.tracer.flush()
        _run(one.tracer, batch, {})  # as if nothing had happened
        assert one.tracer.head("another") == one.tracer.head("yet another"), "nothing new is traced meanwhile"
        one.tracer.close(5.0)
        state = one.tracer.state()
    assert state.failures >= 1
    assert state.exported == 0
    assert state.dropped >= len(ids)
    assert state.error is not None


@pytest.mark.property(59)
@given(where=st.sampled_from(["links", "attributes", "states"]))
@settings(max_examples=6, deadline=None)
def test_Given_a_fault_in_the_tracing_itself_Then_it_ends_there(where: str) -> None:
    class Broken(_Store):
        def states(self, ids: Sequence[str]) -> list[None]:
            raise ConnectionError("no state store")

    with exported() as one:
        about: dict[str, Any] = {"bad": object()} if where == "attributes" else {}
        tracing = WorkerTracing(one.tracer, Broken(), about)  # type: ignore[arg-type]
        request = _request("r", root_trace("r"))
        trace = tracing.begin(_batch([request], after="earlier" if where == "links" else ""))
        trace.prepared([request])
        tracing.finish(trace)
        one.spans()


@given(rate=st.floats(0.0, 1.0), limit=st.one_of(st.none(), st.floats(0.1, 50.0)))
@settings(max_examples=40, deadline=None)
def test_Given_a_sample_rate_and_a_limit_Then_neither_is_exceeded(rate: float, limit: float | None) -> None:
    chance = random.Random(7)
    sampler = HeadSampler(rate, limit)
    seconds, per_s = 20, 200
    taken = sum(
        sampler.takes(chance.getrandbits(128), second + number / per_s)
        for second in range(seconds)
        for number in range(per_s)
    )
    assert taken <= rate * seconds * per_s + 6 * (seconds * per_s) ** 0.5
    if limit is None:
        assert taken >= rate * seconds * per_s - 6 * (seconds * per_s) ** 0.5
    else:
        assert taken <= limit * seconds + max(1.0, limit)


def test_Given_no_request_of_a_batch_that_is_traced_Then_nothing_is_noted() -> None:
    with exported() as one:
        tracing = WorkerTracing(one.tracer, _Store(), {})  # type: ignore[arg-type]
        trace = tracing.begin(_batch([_request("r", {})]))
        assert not isinstance(trace, BatchTrace)
        tracing.finish(trace)
        assert one.spans() == []
