"""Traces over real processes, brokers and a real OTLP receiver: if these fail, an operator sees no way of a request."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from celery import Celery
from tests.traced_stack import TracedStack
from tests.tracing_support import Inbox, Received, grpc_receiver, http_receiver, names_of, tree_of
from tests.transport_support import own_redis, wait_until

from muai_producers import InferenceClient
from muai_producers.errors import EnginesExhaustedError, InvalidRequestError

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SPECIFIED = {
    "request": ["batching", "response_formatting", "routing", "workflow_execution"],
    "workflow_execution": ["inference", "postprocessing", "preprocessing"],
    "inference": ["forward_pass"],
}
"""The specification's tree, of a model that is loaded already."""


@pytest.fixture(scope="module", params=["redis-grpc", "rabbitmq-http"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Inbox]]:
    folder = tmp_path_factory.mktemp("traced")
    with ExitStack() as kept:
        redis = kept.enter_context(own_redis(folder))
        broker = redis.url
        if request.param == "rabbitmq-http":
            broker = request.getfixturevalue("rabbit_node").url()
        receiver = http_receiver() if request.param == "rabbitmq-http" else grpc_receiver()
        endpoint, inbox = kept.enter_context(receiver)
        tracing = {"protocol": "http"} if request.param == "rabbitmq-http" else {}
        stack = TracedStack(folder, broker, redis.url, endpoint, **tracing)
        kept.callback(stack.stop)
        stack.start()
        with InferenceClient(stack.settings) as client:
            client.infer("plain", "warm up", timeout_s=60)  # the model is loaded once
        yield stack, inbox


@pytest.fixture
def client(traced: tuple[TracedStack, Inbox]) -> Iterator[InferenceClient]:
    with InferenceClient(traced[0].settings) as client:
        yield client


def _one(spans: list[Received], name: str) -> Received:
    (span,) = [span for span in spans if span.name == name]
    return span


@pytest.mark.property(19)
@pytest.mark.property(21)
def test_Given_a_request_of_the_plain_client_Then_its_spans_form_the_specified_tree(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    request_id = client.submit("plain", "two words", tenant="shop")
    client.result(request_id, timeout_s=30)
    spans = inbox.wait_for(request_id, "request", "routing", "batching")
    assert names_of(tree_of(spans)) == SPECIFIED
    inference = _one(spans, "inference")
    assert inference.attributes["model_name"] == "plain"
    assert inference.attributes["engine"] == "fake"
    assert inference.attributes["batch_size"] == 1
    assert inference.attributes["sequence_length"] == 2
    assert inference.attributes["gen_ai.operation.name"] == "chat"
    root = _one(spans, "request")
    assert root.is_ok
    assert root.attributes["user_id"] == "shop"
    assert root.attributes["workflow_type"] == "chat"
    assert all(
        root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in spans if span.name != "batching"
    )
    assert {span.resource["muai.role"] for span in spans} == {"collector", "worker"}
    assert not any("two words" in str(span) for span in spans), "inputs are in a span"


def test_Given_a_batch_Then_its_span_links_to_all_its_requests_and_they_to_it(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    ids = client.submit_many({"model": "plain", "inputs": f"number {number}"} for number in range(8))
    dict(client.results(ids, timeout_s=30))
    requests = [_one(inbox.wait_for(request_id, "request", "inference", "batching"), "request") for request_id in ids]
    assert len({span.trace_id for span in requests}) == 8, "each request has a trace of its own"
    batch_ids = {span.attributes["muai.batch.id"] for span in requests}

    def batches() -> list[Received]:
        found = [s for s in inbox.now() if s.name == "batch" and s.attributes["muai.batch.id"] in batch_ids]
        return found if len(found) == len(batch_ids) else []

    spans = wait_until(batches, what="the batch's span")
    linked = {link for span in spans for link in span.links}
    assert linked == {(span.trace_id, span.span_id) for span in requests}
    assert sum(span.attributes["batch_size"] for span in spans) == 8
    for request_id in ids:
        inference = _one(inbox.of_request(request_id), "inference")
        assert inference.links[0] in {(span.trace_id, span.span_id) for span in spans}


@pytest.mark.property(24)
@pytest.mark.parametrize("wait", ["?wait=30", ""])
def test_Given_a_web_request_with_a_trace_of_its_callers_Then_everything_belongs_to_it(
    traced: tuple[TracedStack, Inbox], wait: str
) -> None:
    stack, inbox = traced
    body = {"model": "plain", "inputs": "from the web"}
    url = f"http://127.0.0.1:{stack.port}/v1/inference{wait}"
    answer = httpx.post(url, json=body, headers={"traceparent": TRACEPARENT, "tracestate": "vendor=1"}, timeout=40)
    assert answer.headers["traceparent"] == TRACEPARENT
    request_id = answer.json()["id"]
    wanted = ["request", "routing", "batching", "admission", *(["delivery"] if wait else [])]
    spans = inbox.wait_for(request_id, *wanted)
    tree = names_of(tree_of(spans, outer="00f067aa0ba902b7"))
    more = ["admission", "delivery"] if wait else ["admission"]
    assert tree == {**SPECIFIED, "request": sorted([*SPECIFIED["request"], *more])}
    assert {span.trace_id for span in spans} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert {span.resource["muai.role"] for span in spans} == {"gateway", "collector", "worker"}


def test_Given_an_unsampled_trace_of_the_callers_Then_nothing_is_recorded(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    not_sampled = TRACEPARENT[:-2] + "00"
    request_id = client.submit("plain", "unseen", trace={"traceparent": not_sampled})
    client.result(request_id, timeout_s=30)
    later = client.submit("plain", "seen")
    client.result(later, timeout_s=30)
    inbox.wait_for(later, "request", "routing")
    assert inbox.of_request(request_id) == []


@pytest.mark.property(24)
def test_Given_a_plain_Celery_producer_with_OpenTelemetrys_instrumentation_Then_its_trace_goes_on(
    traced: tuple[TracedStack, Inbox],
) -> None:
    stack, inbox = traced
    code = """
import sys
from celery import Celery
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
trace.set_tracer_provider(TracerProvider())
CeleryInstrumentor().instrument()
app = Celery(broker=sys.argv[1], backend=sys.argv[2])
app.conf.task_create_missing_queue_type = "quorum"
with trace.get_tracer("shop").start_as_current_span("checkout") as span:
    result = app.send_task("muai.infer", kwargs={"model": "plain", "inputs": {"text": "plain"}}, queue="inference")
result.get(timeout=30)
print(f"{span.get_span_context().trace_id:032x}", result.id)
"""
    queue = stack.settings.queue
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, queue.broker_url, queue.state_url],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    trace_id, request_id = done.stdout.split()
    spans = inbox.wait_for(request_id, "request", "routing", "inference")
    assert {span.trace_id for span in spans} == {trace_id}
    producer_id = _one(spans, "request").parent_id
    assert names_of(tree_of(spans, outer=producer_id)) == SPECIFIED


def test_Given_a_plain_Celery_producer_without_a_trace_Then_the_request_is_a_root(
    traced: tuple[TracedStack, Inbox],
) -> None:
    stack, inbox = traced
    queue = stack.settings.queue
    app = Celery("shop", broker=queue.broker_url, backend=queue.state_url, set_as_current=False)
    app.conf.task_create_missing_queue_type = "quorum"  # as RabbitMQ has it; Redis has no types
    task = app.send_task("muai.infer", kwargs={"model": "plain", "inputs": {"text": "plain"}}, queue="inference")
    task.get(timeout=30)
    app.close()
    assert names_of(tree_of(inbox.wait_for(task.id, "request", "routing"))) == SPECIFIED


@pytest.mark.property(23)
def test_Given_an_engine_that_fails_Then_the_attempts_are_in_one_trace_and_linked(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    request_id = client.submit("plain", "POISON for the first")
    assert client.result(request_id, timeout_s=30).engine_used == "onnx"
    spans = inbox.wait_for(request_id, "request", "inference", "inference")
    tree_of(spans)
    first, second = sorted((s for s in spans if s.name == "inference"), key=lambda s: s.start_ns)
    assert (first.attributes["engine"], second.attributes["engine"]) == ("fake", "onnx")
    assert (first.attributes["muai.attempt"], second.attributes["muai.attempt"]) == (1, 2)
    assert (first.trace_id, first.span_id) in second.links
    assert first.is_error
    assert second.is_ok
    assert first.attributes["error_type"] == "InferenceFailedError"
    assert "POISON" in first.attributes["error_message"]
    assert "fake.py" in first.attributes["stack_trace"]
    assert "exception" in first.events
    passes = [span for span in spans if span.name == "forward_pass" and span.parent_id == first.span_id]
    assert passes
    assert all(span.is_error for span in passes)
    assert _one(spans, "request").is_ok


def test_Given_a_model_that_an_engine_cannot_load_Then_that_is_in_the_trace_and_the_next_loads_it(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    request_id = client.submit("unloadable", "a text")
    assert client.result(request_id, timeout_s=30).engine_used == "onnx"
    spans = inbox.wait_for(request_id, "request", "model_loading", "model_loading")
    tree_of(spans)
    loadings = sorted((span for span in spans if span.name == "model_loading"), key=lambda span: span.start_ns)
    assert [span.attributes["engine"] for span in loadings] == ["fake", "onnx"]
    assert loadings[0].is_error
    assert "told not to load" in loadings[0].attributes["error_message"]
    assert loadings[1].is_ok


@pytest.mark.property(22)
@pytest.mark.property(23)
@pytest.mark.parametrize(
    ("text", "error", "code"),
    [("POISON and VENOM", EnginesExhaustedError, "engines_exhausted"), ("BAD", InvalidRequestError, "invalid_request")],
)
def test_Given_a_request_that_fails_Then_its_span_has_type_message_and_stack(
    traced: tuple[TracedStack, Inbox], client: InferenceClient, text: str, error: type[Exception], code: str
) -> None:
    _, inbox = traced
    request_id = client.submit("plain", text)
    with pytest.raises(error):
        client.result(request_id, timeout_s=30)
    root = _one(inbox.wait_for(request_id, "request"), "request")
    assert root.is_error
    assert root.end_ns > root.start_ns
    assert root.attributes["error_type"] == error.__name__
    assert root.attributes["muai.error.code"] == code
    assert root.attributes["error_message"]
    assert root.attributes["stack_trace"]
    assert root.attributes["muai.state"] == "FAILURE"


def test_Given_a_cancelled_request_Then_its_span_says_so(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    request_id = client.submit("plain", "never mind")
    assert client.cancel(request_id)
    root = _one(inbox.wait_for(request_id, "request"), "request")
    assert root.attributes["muai.state"] == "REVOKED"
    assert root.attributes["error_type"] == "RequestCancelledError"


def test_Given_a_request_for_no_model_of_the_catalog_Then_the_collectors_refusal_ends_its_trace(
    traced: tuple[TracedStack, Inbox], client: InferenceClient
) -> None:
    _, inbox = traced
    request_id = client.submit("nobody", "a text")
    spans = inbox.wait_for(request_id, "request", "routing")
    assert names_of(tree_of(spans)) == {"request": ["routing"]}
    assert _one(spans, "request").attributes["muai.error.code"] == "model_not_found"


@pytest.mark.property(20)
def test_Given_a_workflow_Then_its_steps_are_spans_and_their_requests_below_them(
    traced: tuple[TracedStack, Inbox],
) -> None:
    stack, inbox = traced
    url = f"http://127.0.0.1:{stack.port}/v1/workflows/chat"
    run_id = httpx.post(url, json={"parameters": {"message": "tell me"}}).json()["id"]
    spans = inbox.wait_for(run_id, "request", "workflow_execution", "recall", "generate", "remember")
    (trace_id,) = {span.trace_id for span in spans}

    def whole() -> list[Received]:
        found = [span for span in inbox.now() if span.trace_id == trace_id]
        return found if sum(span.name == "request" for span in found) == 2 else []

    name, ((execution, steps),) = tree_of(wait_until(whole, what="the inner request"))
    assert (name, execution) == ("request", "workflow_execution")
    assert [step[0] for step in steps] == ["recall", "generate", "remember"]
    assert [child[0] for child in steps[1][1]] == ["request"]
    assert sorted(child[0] for child in steps[1][1][0][1]) == SPECIFIED["request"]
