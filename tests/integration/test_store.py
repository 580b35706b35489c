"""The state store's promises, on a real Redis: one terminal result, a count that does not drift, idempotent submit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from celery import Celery
from tests.requests import a_request
from tests.transport_support import OwnRedis

from muai_config import Settings, build_settings
from muai_producers import InferenceClient
from muai_producers.errors import (
    IdempotencyConflictError,
    InvalidRequestError,
    PayloadTooLargeError,
    QueueFullError,
    RequestCancelledError,
    ResultTimeoutError,
)
from muai_producers.store import BATCHED, REVOKED, STARTED, Store, failure_answer, success_answer
from muai_producers.wire import InferenceResult

pytestmark = pytest.mark.redis


def a_result(**outputs: Any) -> InferenceResult:
    return InferenceResult(
        outputs=outputs, engine_used="fake", latency_ms=1.0, batch_size=1, cache_hit=False, metadata={}
    )


@pytest.fixture
def client(muai_settings: Settings) -> Any:
    with InferenceClient(muai_settings) as client:
        yield client


def limited(server: OwnRedis, **limits: Any) -> InferenceClient:
    document = {"queue": {"broker_url": server.url, **{k: v for k, v in limits.items() if k != "queue_capacity"}}}
    if "queue_capacity" in limits:
        document["monitoring"] = {"server": {"queue_capacity": limits["queue_capacity"]}}
    return InferenceClient(build_settings(document, {}))


def test_given_a_result_when_others_write_too_then_the_first_stays_and_the_rest_are_counted(store: Store) -> None:
    request = a_request("one")
    assert store.answer([success_answer(request, a_result(n=1))]) == [True]
    again = [
        success_answer(request, a_result(n=2)),
        failure_answer("one", RequestCancelledError("late"), state=REVOKED),
    ]
    assert store.answer(again) == [False, False]
    (meta,) = store.fetch(["one"])
    assert meta is not None
    assert meta["result"]["outputs"] == {"n": 1}
    assert store.client.hget(store.keys.stats, "duplicates_refused") == b"2"  # type: ignore[attr-defined]


def test_given_each_terminal_state_then_no_passing_state_replaces_it(store: Store) -> None:
    store.answer([success_answer(a_request("s"), a_result())])
    store.answer([failure_answer("f", QueueFullError("no"))])
    store.answer([failure_answer("r", RequestCancelledError("no"), state=REVOKED)])
    assert store.mark(STARTED, ["s", "f", "r", "new"]) == [False, False, False, True]
    assert store.mark(BATCHED, ["new"]) == [True]
    assert [meta and meta["status"] for meta in store.fetch(["s", "f", "r", "new"])] == [
        "SUCCESS",
        "FAILURE",
        "REVOKED",
        "BATCHED",
    ]


def test_given_a_hundred_writers_at_once_then_exactly_one_wins(clean_redis: OwnRedis, store: Store) -> None:
    wins: list[bool] = []
    barrier = threading.Barrier(20)

    def write(number: int) -> None:
        barrier.wait()
        for turn in range(5):
            wins.extend(store.answer([success_answer(a_request(f"r{turn}"), a_result(n=number))]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wins.count(True) == 5
    assert len(wins) == 100


def test_given_a_full_queue_then_submit_is_refused_before_anything_is_enqueued(clean_redis: OwnRedis) -> None:
    with limited(clean_redis, queue_capacity=3) as client:
        client.submit_many([{"model": "m", "inputs": "x"}] * 3)
        with pytest.raises(QueueFullError, match="3 of 3") as refused:
            client.submit("m", "x")
        assert refused.value.http_status == 429
        assert refused.value.retry_after_s > 0
        assert clean_redis.client.llen("inference") == 3


@pytest.mark.parametrize("limit", ["tenant_max_requests", "model_max_requests"])
def test_given_a_tenants_or_models_limit_then_only_that_one_is_refused(clean_redis: OwnRedis, limit: str) -> None:
    with limited(clean_redis, **{limit: 2}) as client:
        client.submit_many([{"model": "m", "inputs": "x", "tenant": "t"}] * 2)
        with pytest.raises(QueueFullError, match=limit):
            client.submit("m", "x", tenant="t")
        client.submit("other", "x", tenant="u")


def test_given_answers_twice_and_unknown_ids_then_the_capacity_in_use_is_exact(
    client: InferenceClient, store: Store
) -> None:
    ids = client.submit_many([{"model": "m", "inputs": "x", "tenant": f"t{n % 3}"} for n in range(30)])
    answers = [failure_answer(request_id, RequestCancelledError("x")) for request_id in [*ids[:20], *ids[:20], "never"]]
    store.answer(answers)
    assert store.in_flight() == 10
    store.release(ids)
    store.release(ids)
    assert store.in_flight() == 0
    assert store.client.hgetall(store.keys.load) == {}  # type: ignore[attr-defined]


# Property 27: Full queue rejects new requests
@pytest.mark.property(27)
def test_given_concurrent_submits_over_capacity_then_exactly_the_capacity_is_accepted(clean_redis: OwnRedis) -> None:
    accepted: list[str] = []
    refused: list[QueueFullError] = []

    def submit() -> None:
        with limited(clean_redis, queue_capacity=25) as client:
            for _ in range(10):
                try:
                    accepted.append(client.submit("m", "x"))
                except QueueFullError as error:
                    refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accepted) == 25
    assert len(refused) == 75
    assert clean_redis.client.llen("inference") == 25


def test_given_the_same_key_and_content_when_submitted_by_a_hundred_at_once_then_one_request_exists(
    clean_redis: OwnRedis, muai_settings: Settings
) -> None:
    ids: list[str] = []
    with InferenceClient(muai_settings) as client:
        barrier = threading.Barrier(100)

        def submit() -> None:
            barrier.wait()
            ids.append(client.submit("m", "x", idempotency_key="k"))

        threads = [threading.Thread(target=submit) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ids) == 100
    assert len(set(ids)) == 1
    assert clean_redis.client.llen("inference") == 1


def test_given_the_same_key_and_other_content_then_it_is_a_conflict(client: InferenceClient) -> None:
    first = client.submit("m", "x", idempotency_key="k")
    with pytest.raises(IdempotencyConflictError) as conflict:
        client.submit("m", "y", idempotency_key="k")
    assert conflict.value.details["request_id"] == first
    assert client.submit("m", "y", idempotency_key="k", tenant="other") != first


def test_given_a_repeated_call_after_a_lost_reply_then_nothing_is_enqueued_twice(
    client: InferenceClient, clean_redis: OwnRedis
) -> None:
    request = a_request("same")
    assert client.submit_many([request]) == client.submit_many([request]) == ["same"]
    assert clean_redis.client.llen("inference") == 1


def test_given_a_plain_celery_app_then_async_result_reads_our_results_and_errors(
    clean_redis: OwnRedis, store: Store
) -> None:
    app = Celery(broker=clean_redis.url, backend=clean_redis.url, set_as_current=False)
    store.answer([success_answer(a_request("ok"), a_result(n=1)), failure_answer("bad", InvalidRequestError("no"))])
    assert app.AsyncResult("ok").get(timeout=5)["outputs"] == {"n": 1}
    with pytest.raises(InvalidRequestError, match="no"):
        app.AsyncResult("bad").get(timeout=5)
    app.close()


def test_given_nobody_answers_then_the_wait_ends_and_names_what_is_open(client: InferenceClient) -> None:
    request_id = client.submit("m", "x")
    with pytest.raises(ResultTimeoutError) as timeout:
        client.result(request_id, timeout_s=0.05)
    assert timeout.value.details["open"] == [request_id]


def test_given_an_answer_while_waiting_for_another_clients_request_then_it_is_heard(
    client: InferenceClient, muai_settings: Settings, store: Store
) -> None:
    request_id = client.submit("m", "x")
    with InferenceClient(muai_settings) as other:
        answer = success_answer(a_request(request_id), a_result(n=1))
        timer = threading.Timer(0.1, store.answer, [[answer]])
        timer.start()
        assert other.result(request_id, timeout_s=5).outputs == {"n": 1}
        timer.join()


def test_given_a_cancelled_request_then_it_stays_revoked(client: InferenceClient, store: Store) -> None:
    request_id = client.submit("m", "x")
    assert client.cancel(request_id)
    assert not client.cancel(request_id)
    assert store.answer([success_answer(a_request(request_id), a_result())]) == [False]
    with pytest.raises(RequestCancelledError):
        client.result(request_id, timeout_s=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": 5}, "inputs"),
        ({"inputs": "x", "priority": 11}, "priority"),
        ({"inputs": "x", "parameters": {"temperature": 9}}, "temperature"),
        ({"inputs": "x", "parameters": {"temprature": 1}}, "temprature"),
        ({"inputs": "x", "colour": "red"}, "colour"),
        ({"inputs": "x", "deadline_s": "soon"}, "deadline_s"),
        ({"inputs": "x", "tenant": "a\tb"}, "tenant"),
    ],
)
def test_given_bad_options_then_the_error_names_them_and_nothing_is_sent(
    client: InferenceClient, clean_redis: OwnRedis, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        client.submit_many([{"model": "m", **options}])
    assert clean_redis.client.llen("inference") == 0


def test_given_a_request_too_large_then_it_is_refused_by_size(clean_redis: OwnRedis) -> None:
    with limited(clean_redis, max_payload_mb=1) as client, pytest.raises(PayloadTooLargeError, match="max_payload_mb"):
        client.submit("m", "x" * 1_000_001)
