"""Streams between a worker's run and its readers, on a real Redis."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.transport_support import OwnRedis, wait_until

from muai_config import ModelSpec, Settings, build_settings
from muai_producers import AsyncInferenceClient, InferenceClient, StreamEvent
from muai_producers.errors import InferenceFailedError, RequestCancelledError, ResultTimeoutError
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.store import Store
from muai_producers.streams.store import MORE, RESTART, StreamStore, Write
from muai_producers.wire import Batch, InferenceRequest, Parameters
from muai_workers.engines.base import Completion, EngineOutput, Piece
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.execution import BatchRunner, WorkerIdentity

pytestmark = pytest.mark.redis
WORDS = " ".join(f"word{number}" for number in range(30))
ANSWER = " ".join(reversed(WORDS.split()))
SLOWLY = {"latency_per_piece_ms": 10.0}


class BreakingEngine(FakeEngine):
    """Raises after some words of a stream."""

    def _pieces(self, request: InferenceRequest, text: str) -> Iterator[Piece]:
        for number, piece in enumerate(super()._pieces(request, text)):
            if number == 12:
                raise InferenceFailedError("the device is gone")
            yield piece


class ShoutingEngine(FakeEngine):
    """Says the same in capital letters."""

    def _answer(self, spec: ModelSpec, task: str, request: InferenceRequest) -> EngineOutput:
        output = super()._answer(spec, task, request)
        return EngineOutput({**output.outputs, "text": output.outputs["text"].upper()}, 1, output.output_tokens)


class Bench:
    """Workers without processes: each batch runs in a thread of the test's."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.client = InferenceClient(settings)
        self._runners: list[BatchRunner] = []
        for engine in ("fake", "pytorch"):
            Fleet(store).announce(WorkerRecord(name=engine, engine=engine, slots=1))

    def worker(self, engine: Any, name: str = "w1") -> BatchRunner:
        self._runners.append(BatchRunner(self.settings, engine, self.store, WorkerIdentity(name)))
        return self._runners[-1]

    def run(self, runner: BatchRunner, batch: Batch) -> threading.Thread:
        """Run a batch, and on the same worker or another what it hands back."""
        thread = threading.Thread(target=runner.run, args=(batch,))
        thread.start()
        return thread

    def close(self) -> None:
        for runner in self._runners:
            runner.close()
        self.client.close()


@pytest.fixture
def bench(clean_redis: OwnRedis, store: Store) -> Iterator[Bench]:
    document = {
        "queue": {"broker_url": clean_redis.url, "stream_ttl_s": 100},
        "models": {"chatty": {"task": "text-generation", "source": "hub:none", "engines": ["fake", "pytorch"]}},
    }
    bench = Bench(build_settings(document, {}), store)
    yield bench
    bench.close()


def a_stream(request_id: str = "r", text: str = WORDS, **fields: Any) -> InferenceRequest:
    parameters = Parameters(max_tokens=100, **fields.pop("parameters", {}))
    return InferenceRequest(
        id=request_id, model="chatty", inputs={"prompt": text}, stream=True, parameters=parameters, **fields
    )


def a_batch(requests: Sequence[InferenceRequest], **fields: Any) -> Batch:
    values: dict[str, Any] = {"id": "b", "engine": "fake", "model": "chatty", "task": "text-generation"}
    return Batch(**{**values, "chain": ("pytorch",), **fields}, requests=list(requests))


def page(events: Sequence[StreamEvent]) -> tuple[str, int]:
    """What a reader has before its eyes in the end, and how often it was begun anew."""
    text, restarts = "", 0
    for event in events:
        if event.kind == "restart":
            text, restarts = "", restarts + 1
        text += event.text
    return text, restarts


def test_given_a_stream_then_the_text_comes_in_pieces_and_the_result_last(bench: Bench) -> None:
    thread = bench.run(bench.worker(FakeEngine(FakeOptions(**SLOWLY))), a_batch([a_stream()]))
    events = list(bench.client.stream("r", timeout_s=20))
    thread.join()
    assert page(events) == (ANSWER, 0)
    assert sum(event.kind == "text" for event in events) > 3
    assert events[-1].kind == "result"
    assert events[-1].result is not None
    assert events[-1].result.outputs["text"] == ANSWER


def test_given_a_reader_that_comes_back_with_its_offset_then_it_reads_on_where_it_was(bench: Bench) -> None:
    thread = bench.run(bench.worker(FakeEngine(FakeOptions(**SLOWLY))), a_batch([a_stream()]))
    events: list[StreamEvent] = []
    while not events or events[-1].kind != "result":
        with InferenceClient(bench.settings) as another:
            for event in another.stream("r", events[-1].offset if events else None, timeout_s=20):
                events.append(event)
                if len(events) % 2 == 0:
                    break
    thread.join()
    assert page(events) == (ANSWER, 0)


def test_given_asyncio_then_many_readers_of_many_streams_read_the_same(bench: Bench) -> None:
    async def read(client: AsyncInferenceClient, request_id: str) -> tuple[str, int]:
        return page([event async for event in client.stream(request_id, timeout_s=20)])

    async def scenario() -> list[tuple[str, int]]:
        async with AsyncInferenceClient(bench.settings) as client:
            return await asyncio.gather(*(read(client, f"r{number % 8}") for number in range(40)))

    requests = [a_stream(f"r{number}", f"{number} {WORDS}") for number in range(8)]
    thread = bench.run(bench.worker(FakeEngine(FakeOptions(latency_per_piece_ms=1.0))), a_batch(requests))
    assert asyncio.run(scenario()) == [(f"{ANSWER} {number % 8}", 0) for number in range(40)]
    thread.join()


def test_given_a_finished_request_or_one_without_a_stream_then_its_whole_text_at_once(bench: Bench) -> None:
    plain = InferenceRequest(id="plain", model="chatty", inputs={"prompt": WORDS}, parameters=Parameters(max_tokens=99))
    bench.worker(FakeEngine()).run(a_batch([a_stream(), plain]))
    for request_id in ("r", "plain"):
        events = list(bench.client.stream(request_id, timeout_s=20))
        assert [event.kind for event in events] == ["text", "result"]
        assert events[0].text == ANSWER
        assert [event.kind for event in bench.client.stream(request_id, events[0].offset)] == ["result"]


def test_given_a_request_that_fails_or_is_cancelled_then_its_error_is_raised(bench: Bench) -> None:
    bench.worker(FakeEngine()).run(a_batch([a_stream("bad", "BAD")]))
    with pytest.raises(Exception, match="the input holds BAD"):
        list(bench.client.stream("bad", timeout_s=20))
    bench.client.cancel("cancelled")
    with pytest.raises(RequestCancelledError):
        list(bench.client.stream("cancelled", timeout_s=20))
    with pytest.raises(ResultTimeoutError):
        list(bench.client.stream("never", timeout_s=0.05))


@pytest.mark.parametrize(("engine", "restarts"), [(FakeEngine, 0), (ShoutingEngine, 1)])
def test_given_a_fallback_in_mid_stream_then_nothing_is_read_twice_and_the_end_is_the_result(
    bench: Bench, engine: Callable[..., FakeEngine], restarts: int
) -> None:
    first = bench.worker(BreakingEngine(FakeOptions(**SLOWLY)))
    second = bench.worker(engine(FakeOptions(**SLOWLY), name="pytorch"), "w2")

    def serve() -> None:
        for moved in first.run(a_batch([a_stream()])):
            second.run(moved)

    thread = threading.Thread(target=serve)
    thread.start()
    events = list(bench.client.stream("r", timeout_s=20))
    thread.join()
    assert events[-1].result is not None
    assert events[-1].result.engine_used == "pytorch"
    assert page(events) == (events[-1].result.outputs["text"], restarts)


def test_given_a_batch_that_is_halved_in_mid_stream_then_nothing_is_read_twice(bench: Bench) -> None:
    class OnceBroken(BreakingEngine):
        def run(self, *args: Any) -> Iterator[Completion | Piece]:
            return super().run(*args) if not self.runs else FakeEngine.run(FakeEngine(self.options), *args)

    requests = [a_stream("r"), a_stream("s", f"more {WORDS}")]
    thread = bench.run(bench.worker(OnceBroken(FakeOptions(**SLOWLY))), a_batch(requests))
    read = [page(list(bench.client.stream(request_id, timeout_s=20))) for request_id in ("r", "s")]
    thread.join()
    assert read == [(ANSWER, 0), (f"{ANSWER} more", 0)]


def test_given_redis_does_not_answer_for_a_while_then_the_engine_goes_on_and_the_text_is_whole(
    bench: Bench, clean_redis: OwnRedis
) -> None:
    ended = threading.Event()

    class Told(FakeEngine):
        def run(self, *args: Any) -> Iterator[Completion | Piece]:
            yield from super().run(*args)
            ended.set()

    thread = bench.run(bench.worker(Told(FakeOptions(**SLOWLY))), a_batch([a_stream()]))
    events = bench.client.stream("r", timeout_s=20)
    read = [next(events)]
    clean_redis.process.send_signal(signal.SIGSTOP)
    try:
        assert ended.wait(timeout=20), "the engine waits for Redis"
    finally:
        clean_redis.process.send_signal(signal.SIGCONT)
    read += events
    thread.join()
    assert page(read) == (ANSWER, 0)


def test_given_a_worker_that_lost_its_request_then_it_writes_nothing_more(store: Store) -> None:
    streams = StreamStore(store, ttl_s=100)
    assert streams.claim("zombie", ["r"]) == [""]
    assert streams.append([Write("r", "zombie", 0, MORE, 0, "one ")]) == [True]
    assert streams.claim("heir", ["r"]) == ["one "]
    writes = [Write("r", "zombie", 1, MORE, 4, "wrong"), Write("r", "heir", 0, MORE, 4, "two")]
    assert streams.append(writes) == [False, True]
    assert streams.append([Write("r", "zombie", 2, RESTART, 0, "wrong")]) == [False]
    assert streams.claim("next", ["r"]) == ["one two"]


def test_given_a_write_whose_answer_got_lost_then_its_repetition_adds_nothing(store: Store) -> None:
    streams = StreamStore(store, ttl_s=100)
    streams.claim("w", ["r"])
    write = Write("r", "w", 0, MORE, 0, "once")
    assert streams.append([write]) == streams.append([write]) == [True]
    assert streams.append([Write("r", "w", 1, RESTART, 0, "anew")]) == [True]
    assert streams.append([Write("r", "w", 1, RESTART, 0, "anew")]) == [True]
    assert streams.claim("x", ["r"]) == ["anew"]


def test_given_a_result_then_the_stream_grows_no_more_and_its_keys_expire(bench: Bench, clean_redis: OwnRedis) -> None:
    bench.worker(FakeEngine(FakeOptions(**SLOWLY))).run(a_batch([a_stream()]))
    name = bench.store.keys.stream("r")
    wait_until(lambda: not clean_redis.client.exists(f"{name}:owner"), what="the stream to be let go")
    assert 0 < clean_redis.client.ttl(name) <= 100
    streams = StreamStore(bench.store, ttl_s=100)
    (told,) = streams.claim("late", ["r"])
    assert ANSWER.startswith(told or "")
    assert streams.append([Write("r", "late", 0, MORE, len(told or ""), "more")]) == [False]
    assert streams.claim("later", ["r"]) == [told]


def test_given_the_stream_has_expired_then_the_result_tells_the_text(bench: Bench, clean_redis: OwnRedis) -> None:
    thread = bench.run(bench.worker(FakeEngine(FakeOptions(**SLOWLY))), a_batch([a_stream()]))
    events = bench.client.stream("r", timeout_s=20)
    first = next(events)
    events.close()  # type: ignore[attr-defined]
    thread.join()
    clean_redis.client.delete(bench.store.keys.stream("r"))
    rest = list(bench.client.stream("r", first.offset, timeout_s=20))
    assert page([first, *rest]) == (ANSWER, 0)


def test_given_a_streamed_request_that_samples_then_a_repeated_run_gets_the_same_seed(bench: Bench) -> None:
    seen: list[int | None] = []

    class Noting(FakeEngine):
        def run(self, spec: Any, task: str, requests: Sequence[InferenceRequest]) -> Iterator[Completion | Piece]:
            seen.extend(request.parameters.seed for request in requests)
            return super().run(spec, task, requests)

    sampled = a_stream(parameters={"temperature": 1.0})
    for number in range(2):
        bench.worker(Noting()).run(a_batch([sampled], id=f"b{number}"))
        bench.store.client.delete("celery-task-meta-r")  # type: ignore[attr-defined]
    assert seen[0] is not None
    assert seen[0] == seen[1]
    bench.worker(Noting()).run(a_batch([a_stream("greedy")]))
    assert seen[2] is None
