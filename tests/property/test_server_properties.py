"""The specification's server properties 25 to 28 and 60, of the queue and of the server in one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.requests import a_request
from tests.transport_support import OwnRedis

from muai_config import ModelSpec, Settings, build_settings
from muai_config.engines import ALL_ENGINES
from muai_producers import InferenceClient
from muai_producers.errors import QueueFullError, RequestCancelledError
from muai_producers.fleet import CollectorRecord, FleetView, WorkerRecord
from muai_producers.gateway.health import Picture, health, readiness
from muai_producers.messages import queue_for
from muai_producers.store import Answer, Store, failure_answer
from muai_producers.wire import InferenceRequest, InferenceResult
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.engines.isolate import run_isolated
from muai_workers.inference_server import InferenceServer, ServerStoppedError
from muai_workers.optimization_manager import OptimizationManager
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


# -- the server in one process ---------------------------------------------------------------------------------------


class GatedEngine(FakeEngine):
    """Runs nothing before its gate is open, and remembers the batches."""

    def __init__(self, options: FakeOptions | None = None, name: str = "fake") -> None:
        super().__init__(options, name=name)
        self.gate = threading.Event()

    def run(self, spec: ModelSpec, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
        assert self.gate.wait(30)
        yield from super().run(spec, task, requests)


def server_settings(models: Sequence[str] = "abc", **server: Any) -> Settings:
    catalog = {name: {"task": "embedding", "source": "hub:none", "engines": ["fake"]} for name in models}
    return build_settings({"models": catalog, "monitoring": {"server": server}}, {})


def a_server(engine: FakeEngine, **server: Any) -> InferenceServer:
    settings = server_settings(**server)
    return InferenceServer(settings, OptimizationManager(settings, engines={"fake": engine}))


IN_PROCESS = settings(max_examples=60, deadline=None)
MODELS = st.lists(st.sampled_from("abc"), max_size=40)


# Property 25: Models remain loaded in server mode
@pytest.mark.property(25)
@IN_PROCESS
@given(asked=MODELS, preload=st.sets(st.sampled_from("abc")))
def test_given_a_server_then_preloaded_models_are_there_at_the_start_and_all_are_loaded_once(
    asked: list[str], preload: set[str]
) -> None:
    engine = FakeEngine()
    with a_server(engine, preload_models=sorted(preload), queue_capacity=1000) as server:
        assert set(engine.loaded()) == preload
        assert server.readiness_check().ready
        for future in [server.submit(model, {"text": "x"}) for model in asked]:
            assert future.result(30).outputs
        assert set(server.health_check().models_loaded) == preload | set(asked)
    assert engine.loads == len(preload | set(asked))


# Property 26: Requests are queued in server mode
# Property 27: Full queue rejects new requests
@pytest.mark.property(26)
@pytest.mark.property(27)
@IN_PROCESS
@given(asked=MODELS, capacity=st.integers(1, 30))
def test_given_a_server_then_what_fits_is_queued_and_what_does_not_is_refused(asked: list[str], capacity: int) -> None:
    engine = GatedEngine()
    with a_server(engine, queue_capacity=capacity) as server:
        accepted: list[Future[InferenceResult]] = []
        for model in asked:
            if len(accepted) < capacity:
                accepted.append(server.submit(model, {"text": "x"}))
            else:
                with pytest.raises(QueueFullError) as full:
                    server.submit(model, {"text": "x"})
                assert full.value.details["in_flight"] == capacity
            assert server.health_check().queue_size == len(accepted)
        engine.gate.set()
        assert all(future.result(30).outputs for future in accepted)
        assert server.health_check().queue_size == 0
    assert sum(len(run) for run in engine.runs) == len(accepted)


# Property 28: Graceful shutdown completes pending requests
@pytest.mark.property(28)
@IN_PROCESS
@given(asked=MODELS)
def test_given_a_server_that_is_stopped_then_what_it_accepted_is_answered_and_nothing_new_is_taken(
    asked: list[str],
) -> None:
    engine = GatedEngine()
    server = a_server(engine, queue_capacity=1000)
    server.start()
    accepted = [server.submit(model, {"text": "x"}) for model in asked]
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    engine.gate.set()
    stopping.join(30)
    assert all(future.result(0).outputs for future in accepted)
    with pytest.raises(ServerStoppedError):
        server.submit("a", {"text": "x"})
    assert server.health_check().status == "unhealthy"
    assert not server.readiness_check().ready


def test_given_a_server_whose_time_to_stop_is_over_then_what_is_left_is_told_so() -> None:
    engine = GatedEngine()
    server = a_server(engine)
    server.start()
    future = server.submit("a", {"text": "x"})
    killer = threading.Timer(1.0, engine.gate.set)  # `stop` must not have waited for it
    killer.start()
    server.stop(graceful_timeout=0.05)
    with pytest.raises(ServerStoppedError):
        future.result(0)
    killer.join()


# Property 60: Health checks reflect degradation status
@pytest.mark.property(60)
@IN_PROCESS
@given(unavailable=st.sets(st.sampled_from(["one", "two"])), broken=st.sets(st.sampled_from("abc")))
def test_given_engines_that_are_missing_or_models_that_do_not_load_then_the_servers_health_says_which(
    unavailable: set[str], broken: set[str]
) -> None:
    config = server_settings(preload_models=["a", "b", "c"])
    engines = {
        name: FakeEngine(
            FakeOptions(unavailable="not here" if name in unavailable else None, fail_to_load=tuple(broken)), name=name
        )
        for name in ("one", "two")
    }
    with InferenceServer(config, OptimizationManager(config, engines=engines)) as server:
        seen, ready = server.health_check(), server.readiness_check()
    expected = "unhealthy" if len(unavailable) == 2 else "degraded" if broken else "healthy"
    assert seen.status == expected
    assert seen.engines_available == [name for name in ("one", "two") if name not in unavailable]
    assert (seen.reasons == []) == (expected == "healthy")
    if expected == "degraded":
        assert all(any(model in reason for reason in seen.reasons) for model in broken)
    assert ready.ready == (expected == "healthy")


# -- the installation, as the gateway sees it --------------------------------------------------------------------------

ENGINES = st.sets(st.sampled_from(ALL_ENGINES))


# Property 60: Health checks reflect degradation status
@pytest.mark.property(60)
@settings(max_examples=300, deadline=None)
@given(
    running=ENGINES,
    has_collector=st.booleans(),
    state_error=st.sampled_from([None, "ConnectionError"]),
    broker_error=st.sampled_from([None, "TimeoutError"]),
    cooling=st.booleans(),
    in_flight=st.integers(0, 100),
    draining=st.booleans(),
)
def test_given_any_state_of_the_installation_then_health_and_readiness_say_what_is_wrong(
    running: set[str],
    has_collector: bool,
    state_error: str | None,
    broker_error: str | None,
    cooling: bool,
    in_flight: int,
    draining: bool,
) -> None:
    config = server_settings(preload_models=["a"], queue_capacity=100)
    fleet = FleetView(
        workers=tuple(WorkerRecord(name=name, engine=name, slots=1, models_loaded=("a",)) for name in sorted(running)),
        cooling={("fake", "a"): "it failed"} if cooling else {},
        collectors=(CollectorRecord(name="c"),) if has_collector else (),
    )
    picture = Picture(state_error, broker_error, fleet, in_flight)
    seen = health(picture, config, uptime_s=1.0, draining=draining)
    unreachable = state_error is not None or broker_error is not None
    strained = not has_collector or "fake" not in running or cooling or in_flight >= 90 or draining
    assert seen.status == ("unhealthy" if unreachable else "degraded" if strained else "healthy")
    assert (seen.reasons == []) == (seen.status == "healthy")
    assert (seen.queue_size, seen.queue_capacity) == (in_flight, 100)
    assert seen.engines_available == [name for name in ALL_ENGINES if name in running]
    ready = readiness(picture, config, draining=draining)
    assert ready.ready == (not unreachable and has_collector and "fake" in running and not draining)
    assert (ready.reasons == []) == ready.ready
    assert ready.checks["model:a"] == ("fake" in running)
