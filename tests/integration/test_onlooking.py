"""What onlookers read of an installation: the last answers, what waits where and since when, dead letters' lines."""

from __future__ import annotations

import time
import uuid

import kombu
import pytest
from tests.integration.test_collector import MODELS, Bench
from tests.requests import a_request
from tests.transport_support import OwnRedis, publish, rabbitmq_url

from muai_config import build_settings
from muai_producers import InferenceClient
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import (
    BrokerError,
    EnginesExhaustedError,
    InvalidRequestError,
    MalformedMessageError,
    ModelLoadError,
)
from muai_producers.fleet import MAX_FORMING, CollectorRecord, Fleet, Forming
from muai_producers.queue_depths import queue_reader
from muai_producers.recent import MAX_META_BYTES, MAX_RECENT, Recent
from muai_producers.store import Limits, Store, failure_answer, success_answer
from muai_producers.wire import InferenceRequest, InferenceResult

pytestmark = pytest.mark.redis
NO_LIMITS = Limits()


def a_result(text: str = "yes") -> InferenceResult:
    return InferenceResult(
        outputs={"label": text}, engine_used="fake", latency_ms=12.5, batch_size=4, cache_hit=False, metadata={}
    )


def answered(store: Store, *requests: InferenceRequest, text: str = "yes") -> None:
    store.admit(requests, NO_LIMITS)
    store.answer([success_answer(request, a_result(text)) for request in requests])


def test_Given_answers_of_several_tenants_Then_each_list_has_its_own_newest_first_and_no_webhook(store: Store) -> None:
    hook = "https://hooks.example.com/secret-token"
    answered(store, a_request("a1", tenant="a", webhook=hook), a_request("b1", tenant="b"))
    store.admit([a_request("a2", tenant="a")], NO_LIMITS)
    store.answer([failure_answer("a2", ModelLoadError("no such file"), tenant="a")])
    store.answer([success_answer(a_request("plain"), a_result())])  # never admitted: a plain Celery producer's
    recent = Recent(store)
    assert [one.id for one in recent.newest(10)] == ["plain", "a2", "b1", "a1"]
    failed, succeeded = recent.newest(10, "a")
    assert (failed.id, failed.tenant, failed.model) == ("a2", "a", "m")
    assert failed.summary is not None
    assert failed.summary.result is not None
    assert (failed.summary.status, failed.summary.result.code) == ("FAILURE", "model_load_failed")
    assert succeeded.summary is not None
    assert succeeded.summary.result is not None
    assert (succeeded.summary.result.engine_used, succeeded.summary.result.latency_ms) == ("fake", 12.5)
    assert time.time() - 60 < (succeeded.admitted_at or 0) <= time.time()
    assert recent.newest(10)[0].tenant == ""
    assert recent.newest(10, "nobody") == []
    assert hook.encode() not in b"".join(store.client.lrange(f"{store.keys.recent}:a", 0, -1))  # type: ignore[attr-defined]


def test_Given_thousands_of_answers_Then_the_lists_stay_small_and_a_huge_result_is_not_read(store: Store) -> None:
    for _ in range(30):
        answered(store, *(a_request(str(uuid.uuid4()), tenant="busy") for _ in range(40)))
    answered(store, a_request("huge", tenant="busy"), text="x" * MAX_META_BYTES)
    client = store.client
    for name in (store.keys.recent, f"{store.keys.recent}:busy"):
        assert MAX_RECENT <= client.llen(name) <= 2 * MAX_RECENT  # type: ignore[attr-defined]
    assert 0 < client.ttl(f"{store.keys.recent}:busy") <= store.result_ttl_s  # type: ignore[attr-defined]
    newest = Recent(store).newest(1000)
    assert len(newest) == MAX_RECENT
    assert (newest[0].id, newest[0].summary) == ("huge", None)


def test_Given_requests_that_wait_at_a_collector_Then_it_announces_the_batches_that_they_form(store: Store) -> None:
    bench = Bench(store, build_settings({"models": MODELS}, {}))
    bench.fleet("onnx", outstanding={"onnx": 9})
    for number, priority in enumerate((9, 5, 5, 0)):
        bench.now_s, bench.wall_s = 100.0 + number, 1000.0 + number
        bench.receive(f"r{number}", priority=priority)
    bench.receive("other", model="llm", task="text-generation")
    bench.collector.tick()
    bench.wall_s += 10
    bench.now_s += 10
    Fleet(store).announce_collector(bench.collector.announcement(CollectorRecord(name="c")))
    (record,) = Fleet(store).view(()).collectors
    assert (record.waiting, record.num_keys) == (5, 2)
    assert record.forming == (
        Forming(
            model="m",
            task="embedding",
            engine="onnx",
            waiting=4,
            waiting_high=1,
            waiting_low=1,
            max_size=32,
            oldest_at=1000.0,
        ),
        Forming(model="llm", task="text-generation", waiting=1, max_size=32, oldest_at=1003.0),
    )
    bench.fleet("onnx")
    bench.collector.tick()
    assert bench.collector.announcement(record).waiting == 1


def test_Given_more_batch_keys_than_are_announced_Then_the_announcement_stays_small(store: Store) -> None:
    models = {f"m{n}": {"task": "embedding", "source": "hub:none", "engines": ["onnx"]} for n in range(MAX_FORMING + 8)}
    bench = Bench(store, build_settings({"models": models}, {}))
    for number, model in enumerate(models):
        bench.now_s = 100.0 + number
        bench.receive(model, model=model)
    record = bench.collector.announcement(CollectorRecord(name="c"))
    assert (record.waiting, record.num_keys) == (MAX_FORMING + 8, MAX_FORMING + 8)
    assert [one.model for one in record.forming] == [f"m{n}" for n in range(MAX_FORMING)]


def test_Given_queues_on_redis_Then_depth_and_age_of_the_oldest_are_told_whatever_clients_wrote(
    clean_redis: OwnRedis,
) -> None:
    settings = build_settings({"queue": {"broker_url": clean_redis.url}, "models": MODELS}, {})
    reader = queue_reader(settings)
    assert all(depth.messages == 0 and depth.oldest_at is None for depth in reader.depths().values())
    began_s = time.time()
    with InferenceClient(settings) as client:
        trap = '"submitted_at":7 \\"submitted_at\\":8 \\\\"submitted_at\\\\":9'
        client.submit_many([{"model": "m", "inputs": trap}, {"model": "m", "inputs": "b"}])
        client.submit("m", "urgent", priority=9)
    clean_redis.client.lpush("inference.low", "no message at all")
    depths = reader.depths()
    assert {name: depth.messages for name, depth in depths.items() if depth.messages} == {
        "inference": 2,
        "inference.high": 1,
        "inference.low": 1,
    }
    assert began_s <= (depths["inference"].oldest_at or 0) <= (depths["inference.high"].oldest_at or 0) <= time.time()
    assert depths["inference.low"].oldest_at is None
    reader.close()


def test_Given_no_broker_Then_the_reader_says_so() -> None:
    for url in ("redis://127.0.0.1:1/0", "amqp://guest:guest@127.0.0.1:1//"):
        reader = queue_reader(build_settings({"queue": {"broker_url": url}}, {}))
        with pytest.raises(BrokerError, match="the broker does not answer"):
            reader.depths()
        reader.close()


@pytest.mark.rabbitmq
def test_Given_queues_on_rabbitmq_Then_depths_are_told_and_a_queue_that_nobody_declared_is_empty() -> None:
    url, name = rabbitmq_url(), f"muai-test-{uuid.uuid4().hex}"
    with kombu.Connection(url) as connection, connection.channel() as channel:
        kombu.Queue(name, durable=False, auto_delete=True).bind(channel).declare()
        publish(connection, name, "one", "two")
        reader = queue_reader(build_settings({"queue": {"broker_url": url}}, {}), ["muai-test-nobody", name])
        depths = reader.depths()
        assert (depths[name].messages, depths[name].oldest_at) == (2, None)
        assert depths["muai-test-nobody"].messages == 0
        reader.close()
        kombu.Queue(name).bind(channel).delete()


def test_Given_dead_letters_Then_their_lines_come_without_the_requests_and_entries_by_their_ids(store: Store) -> None:
    letters = DeadLetters(store)
    error = EnginesExhaustedError("no engine served it", {"attempts": [{"engine": "onnx", "error": {"code": "x"}}]})
    letters.add(a_request("dead", text="x" * 100_000), error)
    letters.add_message("garbage", b"\xff", MalformedMessageError("not JSON"))
    garbage, dead = letters.lines(10)
    assert (garbage.request_id, garbage.is_request, garbage.code) == ("garbage", False, "malformed_message")
    assert (dead.request_id, dead.is_request, dead.model) == ("dead", True, "m")
    assert dead.attempts[0]["engine"] == "onnx"
    assert [line.request_id for line in letters.lines(1)] == ["garbage"]
    (found,) = letters.entries([dead.entry_id, "1-1"])
    assert found.request is not None
    assert found.request.inputs == {"text": "x" * 100_000}
    with pytest.raises(InvalidRequestError, match="two numbers"):
        letters.entries(["-"])
