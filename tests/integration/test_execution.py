"""An engine worker's run of one batch, on the fake engine: who is answered, with what, and who goes on elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.requests import a_request

from muai_config import Settings, build_settings
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import RequestCancelledError
from muai_producers.fleet import Fleet, WorkerRecord
from muai_producers.store import REVOKED, Store, failure_answer
from muai_producers.wire import Batch
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.execution import BatchRunner, WorkerIdentity

NOW_S = 1000.0


class Bench:
    """A runner on a fake engine."""

    def __init__(self, store: Store, settings: Settings, **options: Any) -> None:
        self.store = store
        self.engine = FakeEngine(FakeOptions(**options))
        self.runner = BatchRunner(settings, self.engine, store, WorkerIdentity("w1", "0"), wall_s=lambda: NOW_S)
        for engine in ("pytorch", "fake"):
            Fleet(store).announce(WorkerRecord(name=engine, engine=engine, slots=1))

    def run(self, *texts: str, **batch: Any) -> list[Batch]:
        requests = [
            a_request(f"r{n}", model="two", text=text, **batch.pop("fields", {})) for n, text in enumerate(texts)
        ]
        return self.runner.run(a_batch(requests, **batch))

    def states(self, count: int) -> list[str]:
        return [meta["status"] if meta else "?" for meta in self.store.fetch([f"r{n}" for n in range(count)])]

    def result(self, number: int) -> dict[str, Any]:
        (meta,) = self.store.fetch([f"r{number}"])
        assert meta is not None
        found: dict[str, Any] = meta["result"]
        return found


def a_batch(requests: list[Any], **fields: Any) -> Batch:
    values: dict[str, Any] = {"id": "b", "engine": "fake", "model": "two", "task": "embedding", "chain": ("pytorch",)}
    return Batch(**{**values, "formed_at": NOW_S, **fields}, requests=requests)


@pytest.fixture
def make(store: Store, muai_settings: Settings) -> Iterator[Any]:
    benches: list[Bench] = []

    def make_bench(**options: Any) -> Bench:
        benches.append(Bench(store, options.pop("settings", muai_settings), **options))
        return benches[-1]

    yield make_bench
    for bench in benches:
        bench.runner.close()


def test_given_a_good_batch_then_each_request_is_answered_with_its_history(make: Any) -> None:
    bench = make()
    assert bench.run("a", "b", "c") == []
    assert bench.states(3) == ["SUCCESS"] * 3
    result = bench.result(1)
    assert (result["engine_used"], result["batch_size"]) == ("fake", 3)
    assert result["metadata"]["worker"] == "w1"
    assert result["metadata"]["batch_id"] == "b"
    assert result["metadata"]["attempts"] == []
    assert bench.store.client.zcard(bench.store.keys.outstanding("fake")) == 0
    assert not bench.store.client.exists(bench.store.keys.runs)


def test_given_a_model_that_is_loaded_first_then_the_batch_is_not_said_to_take_as_long(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, told = make(load_ms=1500.0), []
    finish = bench.store.finish_batch
    monkeypatch.setattr(bench.store, "finish_batch", lambda *a, **k: (told.append(k["took_s"]), finish(*a, **k)))
    bench.run("a")
    assert bench.states(1) == ["SUCCESS"]
    assert len(told) == 1
    assert told[0] < 1.0, "collectors size batches, and look for companions, by what a batch takes"


def test_given_one_poisonous_request_of_32_then_31_succeed_and_it_alone_goes_on(make: Any) -> None:
    bench = make()
    texts = [f"text {n}" for n in range(32)]
    texts[17] = "POISON"
    (moved,) = bench.run(*texts)
    assert [request.id for request in moved.requests] == ["r17"]
    assert moved.engine == "pytorch"
    assert [attempt.engine for attempt in moved.attempts] == ["fake"]
    states = bench.states(32)
    assert states.pop(17) == "RETRY"
    assert states == ["SUCCESS"] * 31


def test_given_the_chain_is_spent_then_failure_names_every_attempt_and_a_dead_letter_is_kept(make: Any) -> None:
    bench = make()
    assert bench.run("POISON", chain=()) == []
    assert bench.states(1) == ["FAILURE"]
    error = bench.result(0)
    assert error["exc_type"] == "EnginesExhaustedError"
    assert [attempt["engine"] for attempt in error["exc_message"][1]["attempts"]] == ["fake"]
    assert bench.store.client.xlen(bench.store.keys.dead) == 1


def test_given_the_model_cannot_be_loaded_then_all_go_to_the_next_engine_and_this_one_cools_down(make: Any) -> None:
    bench = make(fail_to_load=("two",))
    (moved,) = bench.run("a", "b")
    assert [request.id for request in moved.requests] == ["r0", "r1"]
    assert moved.attempts[0].error["code"] == "model_load_failed"
    assert ("fake", "two") in Fleet(bench.store).view(["fake"]).cooling


def test_given_no_fallback_then_the_engines_own_error_is_the_answer(make: Any, clean_redis: Any) -> None:
    document = {
        "queue": {"broker_url": clean_redis.url},
        "optimization": {"fallback_on_error": False},
        "models": {"two": {"task": "embedding", "source": "hub:none", "engines": ["fake", "pytorch"]}},
    }
    bench = make(settings=build_settings(document, {}))
    assert bench.run("POISON") == []
    assert bench.result(0)["exc_type"] == "InferenceFailedError"


def test_given_a_request_error_then_it_fails_by_itself_and_goes_nowhere_else(make: Any) -> None:
    bench = make()
    assert bench.run("fine", "BAD") == []
    assert bench.states(2) == ["SUCCESS", "FAILURE"]
    assert bench.store.client.xlen(bench.store.keys.dead) == 0


def test_given_cancelled_answered_or_expired_requests_then_they_never_reach_the_engine(make: Any) -> None:
    bench = make()
    bench.store.answer([failure_answer("r0", RequestCancelledError("cancelled"), state=REVOKED)])
    requests = [
        a_request("r0", model="two"),
        a_request("r1", model="two", deadline=999.0),
        a_request("r2", model="two"),
    ]
    bench.runner.run(a_batch(requests))
    assert bench.states(3) == ["REVOKED", "FAILURE", "SUCCESS"]
    assert bench.result(1)["code"] == "deadline_exceeded"
    assert bench.result(2)["batch_size"] == 1


def test_given_out_of_memory_then_halves_run_and_all_succeed(make: Any) -> None:
    bench = make(out_of_memory_above=3)
    assert bench.run(*[f"t{n}" for n in range(16)]) == []
    assert bench.states(16) == ["SUCCESS"] * 16


def test_given_a_worker_died_with_the_batch_then_its_requests_run_alone(make: Any) -> None:
    bench = make()
    bench.store.start_batch("b", ["r0", "r1"], {})
    alone = bench.run("a", "b")
    assert [[request.id for request in part.requests] for part in alone] == [["r0"], ["r1"]]
    assert {(part.engine, part.deaths, part.chain) for part in alone} == {("fake", 1, ("pytorch",))}


def test_given_a_request_that_died_alone_too_often_then_it_is_a_dead_letter(make: Any) -> None:
    bench = make()
    bench.store.start_batch("b", ["r0"], {})
    assert bench.run("a", deaths=2) == []
    assert bench.result(0)["exc_type"] == "PoisonedRequestError"
    assert bench.store.client.xlen(bench.store.keys.dead) == 1


def test_given_it_died_once_with_others_and_one_death_is_the_limit_then_it_still_gets_a_try_alone(
    make: Any, clean_redis: Any
) -> None:
    document = {
        "queue": {"broker_url": clean_redis.url, "max_deliveries": 1},
        "models": {"two": {"task": "embedding", "source": "hub:none", "engines": ["fake"]}},
    }
    bench = make(settings=build_settings(document, {}))
    bench.store.start_batch("b", ["r0", "r1"], {})
    for part in bench.run("a", "b"):
        bench.runner.run(part)
    assert bench.states(2) == ["SUCCESS", "SUCCESS"]


def test_given_a_fault_of_our_own_then_every_request_is_answered_and_kept(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()

    def stumble(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(bench.runner, "_execute", stumble)
    assert bench.run("a", "b") == []
    assert bench.states(2) == ["FAILURE", "FAILURE"]
    assert "ZeroDivisionError" in bench.result(0)["exc_message"][0]
    assert bench.store.client.xlen(bench.store.keys.dead) == 2
    assert bench.store.client.zcard(bench.store.keys.outstanding("fake")) == 0


def test_given_a_batch_that_cannot_be_read_then_it_is_kept_as_a_dead_letter(make: Any) -> None:
    bench = make()
    bench.runner.refuse("b", '{"not": "a batch"}', ValueError("no id"))
    (letter,) = DeadLetters(bench.store).newest()
    assert (letter.request_id, letter.raw) == ("b", b'{"not": "a batch"}')


def test_given_one_slot_when_answers_are_being_written_then_the_next_batch_is_in_the_engine_already(make: Any) -> None:
    bench = make()
    second_ran = threading.Event()
    flush, run = bench.runner.writer.flush, bench.engine.run

    def flush_once_the_second_ran() -> None:
        assert second_ran.wait(30.0)
        flush()

    def watched(spec: Any, task: str, requests: Any) -> Any:
        if requests[0].id == "r1":
            second_ran.set()
        return run(spec, task, requests)

    bench.runner.writer.flush, bench.engine.run = flush_once_the_second_ran, watched
    with ThreadPoolExecutor(2) as pool:
        batches = [a_batch([a_request(f"r{n}", model="two")], id=f"b{n}") for n in range(2)]
        assert [again for again in pool.map(bench.runner.run, batches) if again] == []
    assert bench.states(2) == ["SUCCESS"] * 2


def test_given_one_slot_then_never_two_batches_are_in_the_engine(make: Any) -> None:
    bench = make(latency_per_batch_ms=20.0)
    inside, most = [0], [0]
    lock, run = threading.Lock(), bench.engine.run

    def counted(*arguments: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            yield from run(*arguments)
        finally:
            with lock:
                inside[0] -= 1

    bench.engine.run = counted
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bench.runner.run, [a_batch([a_request(f"r{n}", model="two")], id=f"b{n}") for n in range(6)]))
    assert most == [1]
    assert bench.states(6) == ["SUCCESS"] * 6


def test_given_a_claim_that_is_refused_then_nothing_is_begun_and_the_turn_is_free(make: Any) -> None:
    bench = make()

    def gone() -> None:
        raise LookupError("it has gone to another")

    with pytest.raises(LookupError):
        bench.runner.run(a_batch([a_request("r0", model="two")]), gone)
    assert bench.states(1) == ["?"]
    assert bench.run("a") == []
    assert bench.states(1) == ["SUCCESS"]


def test_given_a_budget_for_models_then_the_worker_unloads_what_it_has_used_least_lately(
    store: Store, muai_settings: Settings
) -> None:
    models = {name: {"task": "embedding", "source": "hub:none", "engines": ["fake"]} for name in ("one", "two", "big")}
    settings = build_settings(
        {"queue": {"broker_url": muai_settings.queue.broker_url}, "models": {**models, "max_memory_mb": 100}}, {}
    )
    engine = FakeEngine(FakeOptions(model_mb={"one": 60.0, "two": 60.0, "big": 200.0}))
    runner = BatchRunner(settings, engine, store, WorkerIdentity("w1"), wall_s=lambda: NOW_S)
    try:
        for name in ("one", "two"):
            request = a_request(f"r-{name}", model=name, text="a")
            assert runner.run(a_batch([request], id=name, model=name, chain=())) == []
        assert engine.loaded() == ("two",)
        runner.run(a_batch([a_request("r-big", model="big", text="a")], id="big", model="big", chain=()))
        (answered, told) = store.fetch(["r-two", "r-big"])
    finally:
        runner.close()
    assert answered is not None
    assert answered["status"] == "SUCCESS"
    assert told is not None
    assert told["status"] == "FAILURE"
    assert "big needs about 200 MB, and models.max_memory_mb is 100" in str(told)
    assert engine.loaded() == ("two",)
