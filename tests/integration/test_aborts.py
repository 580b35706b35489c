"""What runs is stopped when nobody wants it any more: cancelled by its client, or past its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest
from tests import models
from tests.transport_support import OwnRedis, wait_until

from muai_config import Settings, build_settings
from muai_producers import InferenceClient
from muai_producers.errors import DeadlineExceededError, RequestCancelledError
from muai_producers.store import Store
from muai_producers.wire import Batch, InferenceRequest, Parameters
from muai_workers.aborting import AbortWatch
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.execution import BatchRunner, WorkerIdentity

pytestmark = pytest.mark.redis
WORDS = " ".join(f"word{number}" for number in range(1000))
ENDLESS = FakeOptions(latency_per_piece_ms=20.0)


@pytest.fixture
def settings(clean_redis: OwnRedis) -> Settings:
    model = {"task": "text-generation", "source": "hub:none", "engines": ["fake"]}
    return build_settings({"queue": {"broker_url": clean_redis.url}, "models": {"chatty": model}}, {})


@pytest.fixture
def client(settings: Settings) -> Iterator[InferenceClient]:
    with InferenceClient(settings) as client:
        yield client


class NotingEngine(FakeEngine):
    """Notes which requests completed with what, and can be told to ignore aborts."""

    def __init__(self, options: FakeOptions, *, deaf: bool = False) -> None:
        super().__init__(options)
        self.deaf = deaf
        self.completed: dict[str, Completion] = {}

    def run(self, *args: Any) -> Iterator[Completion | Piece]:
        for event in super().run(*args):
            if isinstance(event, Completion):
                self.completed[event.request_id] = event
            yield event

    def abort(self, request_ids: Collection[str]) -> None:
        if not self.deaf:
            super().abort(request_ids)


def a_request(request_id: str, text: str = WORDS, **fields: Any) -> InferenceRequest:
    parameters = Parameters(max_tokens=1000)
    return InferenceRequest(
        id=request_id, model="chatty", inputs={"prompt": text}, stream=True, parameters=parameters, **fields
    )


def serve(
    settings: Settings, store: Store, engine: Any, requests: Sequence[InferenceRequest]
) -> tuple[BatchRunner, threading.Thread]:
    runner = BatchRunner(settings, engine, store, WorkerIdentity("w1"))
    values = {"id": "b", "engine": engine.name, "model": "chatty", "task": "text-generation", "chain": ()}
    thread = threading.Thread(target=runner.run, args=(Batch(**values, requests=list(requests)),))
    thread.start()
    return runner, thread


def test_given_a_running_request_when_it_is_cancelled_then_the_engine_stops_it_and_its_neighbour_goes_on(
    settings: Settings, store: Store, client: InferenceClient
) -> None:
    engine = NotingEngine(ENDLESS)
    runner, thread = serve(settings, store, engine, [a_request("long"), a_request("short", "one two")])
    next(client.stream("long", timeout_s=20))
    assert client.cancel("long")
    thread.join(timeout=15)  # all of it would take 20 s
    assert not thread.is_alive()
    assert isinstance(engine.completed["long"].error, RequestCancelledError)
    assert client.status("long").state == "REVOKED"
    assert client.result("short", timeout_s=5).outputs["text"] == "two one"
    assert not store.client.hget(store.keys.stats, "duplicates_refused")  # type: ignore[attr-defined]
    runner.close()


def test_given_a_deadline_that_passes_in_mid_run_then_the_client_is_told_at_once_and_the_engine_stops(
    settings: Settings, store: Store, client: InferenceClient
) -> None:
    engine = NotingEngine(ENDLESS)
    runner, thread = serve(settings, store, engine, [a_request("late", deadline=time.time() + 0.5)])
    with pytest.raises(DeadlineExceededError):
        client.result("late", timeout_s=10)
    thread.join(timeout=15)
    assert not thread.is_alive()
    assert isinstance(engine.completed["late"].error, RequestCancelledError)
    runner.close()


def test_given_an_engine_that_cannot_stop_then_the_deadline_is_true_all_the_same_and_its_result_is_discarded(
    settings: Settings, store: Store, client: InferenceClient
) -> None:
    engine = NotingEngine(FakeOptions(latency_per_batch_ms=1500.0), deaf=True)
    runner, thread = serve(settings, store, engine, [a_request("late", "one", deadline=time.time() + 0.3)])
    with pytest.raises(DeadlineExceededError):
        client.result("late", timeout_s=10)
    assert "late" not in engine.completed
    thread.join(timeout=15)
    assert engine.completed["late"].output is not None
    assert client.status("late").state == "FAILURE"
    runner.close()


def test_given_a_cancellation_while_the_model_loads_then_the_request_never_reaches_the_engine(
    settings: Settings, store: Store, client: InferenceClient
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        loading.set()
        go_on.wait(timeout=20)

    engine = FakeEngine(FakeOptions(load_ms=1.0), sleep=sleep)
    runner, thread = serve(settings, store, engine, [a_request("one", "a"), a_request("two", "b c")])
    assert loading.wait(timeout=20)
    client.cancel("one")
    (watched,) = runner._aborts._watched
    wait_until(lambda: watched.is_gone("one"), what="the worker to hear of it")
    go_on.set()
    thread.join(timeout=15)
    assert list(engine.runs) == [("two",)]
    assert client.result("two", timeout_s=5).outputs["text"] == "c b"
    runner.close()


@pytest.mark.engine
def test_given_pytorch_when_a_running_request_is_cancelled_then_it_stops_and_its_neighbour_is_answered(
    clean_redis: OwnRedis, store: Store
) -> None:
    from muai_workers.engines.pytorch import PyTorchEngine
    from muai_workers.models.tiny import build_tiny_causal

    folder = build_tiny_causal(models.scratch_folder() / "endless", train=False, context_tokens=4096)
    document = {
        "queue": {"broker_url": clean_redis.url},
        "models": {"chatty": {"task": "text-generation", "source": f"folder:{folder}", "engines": ["pytorch"]}},
    }
    settings = build_settings(document, {})
    engine = PyTorchEngine(settings)
    requests = [
        InferenceRequest(
            id=request_id,
            model="chatty",
            inputs={"prompt": "The river"},
            stream=True,
            parameters=Parameters(max_tokens=max_tokens),
        )
        for request_id, max_tokens in (("long", 4000), ("short", 8))
    ]
    runner, thread = serve(settings, store, engine, requests)
    with InferenceClient(settings) as client:
        events = client.stream("long", timeout_s=60)
        next(events)
        assert client.cancel("long")
        with pytest.raises(RequestCancelledError):
            list(events)
        assert client.result("short", timeout_s=60).metadata["usage"]["output_tokens"] <= 8
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert client.status("long").state == "REVOKED"
    runner.close()
    engine.close()


def test_given_a_batch_that_runs_on_then_what_is_answered_of_it_is_neither_stopped_nor_expired(
    settings: Settings, client: InferenceClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muai_workers.aborting.RECHECK_S", 0.0)
    stopped: list[str] = []
    expired: list[InferenceRequest] = []
    now_s = 1000.0
    watch = AbortWatch(store, stopped.extend, expired.append, wall_s=lambda: now_s)
    with watch.watching([a_request("first", deadline=1001.0), a_request("second"), a_request("third")]) as watched:
        watched.answer("first")
        assert client.cancel("first")  # a terminal state, as its result is
        now_s = 1002.0
        for request_id in ("second", "third"):
            assert client.cancel(request_id)
            assert wait_until(lambda request_id=request_id: request_id in stopped, 10.0)  # type: ignore[misc]
    watch.close()
    assert "first" not in stopped
    assert expired == []
