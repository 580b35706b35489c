"""The specification's server properties 25, 26 and 28; 27 stands with the state store's tests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.requests import a_request
from tests.transport_support import OwnRedis

from muai_config import ModelSpec, build_settings
from muai_producers import InferenceClient
from muai_producers.errors import QueueFullError, RequestCancelledError
from muai_producers.messages import queue_for
from muai_producers.store import Answer, Store, failure_answer
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.engines.isolate import run_isolated
from muai_workers.results import ResultWriter

ON_A_SERVER = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spec(name: str) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "task": "embedding", "source": "hub:none", "engines": ["fake"]})


# Property 25: Models remain loaded in server mode
@pytest.mark.property(25)
@settings(max_examples=200, deadline=None)
@given(
    asked=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), max_size=30),
    preload=st.sets(st.sampled_from("abc")),
)
def test_given_any_batches_then_each_model_is_loaded_once_and_stays(
    asked: list[tuple[str, int]], preload: set[str]
) -> None:
    engine = FakeEngine(FakeOptions())
    for name in preload:
        engine.load(spec(name))
    for name, size in asked:
        requests = [a_request(str(number), model=name) for number in range(size)]
        model = spec(name)
        run_isolated(
            lambda part, model=model: engine.run(model, "embedding", part),
            requests,
            lambda _: None,
            prepare=lambda model=model: engine.load(model),
        )
    used = preload | {name for name, _ in asked}
    assert engine.loads == len(used)
    assert set(engine.loaded()) == used


# Property 26: Requests are queued in server mode
@pytest.mark.property(26)
@ON_A_SERVER
@given(priorities=st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_given_any_requests_then_each_is_on_its_queue_in_order_and_counted(
    clean_redis: OwnRedis, priorities: list[int]
) -> None:
    clean_redis.client.flushall()
    document = {"queue": {"broker_url": clean_redis.url}}
    with InferenceClient(build_settings(document, {})) as client:
        ids = client.submit_many({"model": "m", "inputs": "x", "priority": priority} for priority in priorities)
        assert client.store.in_flight() == len(ids)
    expected = Counter(queue_for(priority) for priority in priorities)
    for queue, count in expected.items():
        messages = clean_redis.client.lrange(queue, 0, -1)
        queued = [
            request_id for request_id, priority in zip(ids, priorities, strict=True) if queue_for(priority) == queue
        ]
        assert len(messages) == count
        assert all(
            request_id.encode() in message for request_id, message in zip(reversed(queued), messages, strict=True)
        )


class SlowStore:
    """Remembers what is written to it, as slowly as it is told."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def answer(self, answers: list[Answer]) -> list[bool]:
        self.written += [answer.request_id for answer in answers]
        return [True] * len(answers)


# Property 28: Graceful shutdown completes pending requests
@pytest.mark.property(28)
@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 600))
def test_given_any_answers_pending_when_the_worker_closes_then_all_are_written_in_order(count: int) -> None:
    store = SlowStore()
    writer = ResultWriter(store)  # type: ignore[arg-type]
    for number in range(count):
        writer.write(failure_answer(str(number), RequestCancelledError("x")))
    writer.close()
    assert store.written == [str(number) for number in range(count)]


# Property 27: Full queue rejects new requests
@pytest.mark.property(27)
@ON_A_SERVER
@given(capacity=st.integers(1, 30), sizes=st.lists(st.integers(1, 12), max_size=12), answered=st.integers(0, 10))
def test_given_any_submits_and_answers_then_no_more_than_the_capacity_is_ever_in_flight(
    store: Store, clean_redis: OwnRedis, capacity: int, sizes: list[int], answered: int
) -> None:
    clean_redis.client.flushall()
    document = {
        "queue": {"broker_url": clean_redis.url},
        "monitoring": {"server": {"queue_capacity": capacity}},
    }
    with InferenceClient(build_settings(document, {})) as client:
        in_flight: list[str] = []
        for size in sizes:
            fits = len(in_flight) + size <= capacity
            try:
                in_flight += client.submit_many([{"model": "m", "inputs": "x"}] * size)
                assert fits
            except QueueFullError:
                assert not fits
                done, in_flight = in_flight[:answered], in_flight[answered:]
                store.answer([failure_answer(request_id, RequestCancelledError("x")) for request_id in done])
            assert store.in_flight() == len(in_flight) <= capacity
