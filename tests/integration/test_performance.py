"""Performance data when the state store misbehaves: nothing is counted twice, nobody waits, and no request is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import OwnRedis, TcpProxy, wait_until

from muai_producers import InferenceClient
from muai_producers.connections import state_client
from muai_producers.keys import Keys, new_key
from muai_producers.monitoring.guard import standings
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.recorder import StoreRecorder
from muai_producers.performance.series import MAX_OPERATIONS, STAGES, Series
from muai_producers.performance.store import PerformanceStore
from muai_producers.store import Store

pytestmark = pytest.mark.redis
SERIES = Series("m", "onnx", "embedding")
WEEK_S = 604_800


@pytest.fixture
def monitor(store: Store) -> PerformanceMonitor:
    return PerformanceMonitor(store, WEEK_S)


def recorder_through(port: int) -> StoreRecorder:
    client = state_client(f"redis://127.0.0.1:{port}/0", timeout_s=0.5, retries=0)
    return StoreRecorder(PerformanceStore(Store(client), WEEK_S))


def test_given_a_write_whose_answer_is_lost_then_it_is_made_again_and_counts_once(
    clean_redis: OwnRedis, monitor: PerformanceMonitor
) -> None:
    proxy = TcpProxy(clean_redis.port)
    recorder = recorder_through(proxy.port)
    try:
        recorder.served(SERIES, ((1.0,),) * 5)
        recorder.flush()
        proxy.cut_reply_containing(b":1")
        recorder.served(SERIES, ((2.0,),) * 5)
        wait_until(lambda: recorder.flush() or proxy.sprung.is_set(), what="the answer to be lost")
        recorder.flush()
        wait_until(lambda: monitor.report(60).total.requests == 2, what="both to be counted")
        recorder.flush()
        assert monitor.report(60).total.requests == 2
        assert "statistics" in standings.degraded()
    finally:
        recorder.close()
        proxy.close()


def test_given_a_state_store_that_hangs_then_recording_does_not_wait_and_what_is_held_is_bounded(
    clean_redis: OwnRedis, monitor: PerformanceMonitor
) -> None:
    proxy = TcpProxy(clean_redis.port)
    now_s = [time.time()]
    client = state_client(f"redis://127.0.0.1:{proxy.port}/0", timeout_s=0.2, retries=0)
    recorder = StoreRecorder(PerformanceStore(Store(client), WEEK_S), lambda: now_s[0])
    proxy.close()
    try:
        started_s = time.perf_counter()
        for _ in range(2000):
            recorder.served(SERIES, ((1.0,),) * 5)
        assert time.perf_counter() - started_s < 1.0
        for _ in range(10):
            recorder.flush()
            now_s[0] += 100.0
        assert recorder.lost > 0, "what could not be written for long is given up"
        assert monitor.report(60).total.requests == 0
    finally:
        recorder.close()


def test_given_operations_of_many_names_then_the_series_stays_bounded(
    clean_redis: OwnRedis, store: Store, monitor: PerformanceMonitor
) -> None:
    recorder = StoreRecorder(PerformanceStore(store, WEEK_S))
    for number in range(MAX_OPERATIONS + 50):
        recorder.timed(SERIES, f"step-{number}", 5.0)
    recorder.served(SERIES, ((1.0,),) * 5)
    recorder.close()
    [series] = monitor.report(60).series
    assert len(series.operations) == MAX_OPERATIONS + 1
    assert series.operations["other"].count == 50
    assert set(series.latency) == set(STAGES)


def test_given_series_whose_data_have_expired_then_their_names_are_forgotten(
    clean_redis: OwnRedis, store: Store, monitor: PerformanceMonitor
) -> None:
    recorder = StoreRecorder(PerformanceStore(store, WEEK_S))
    recorder.served(SERIES, ((1.0,),) * 5)
    recorder.close()
    assert monitor.data.forget_dead(time.time()) == 0
    assert monitor.series_since(time.time() - 60) == [SERIES]
    assert monitor.data.forget_dead(time.time() + 2 * WEEK_S) == 1
    for key in clean_redis.client.scan_iter("muai:perf:*"):
        assert clean_redis.client.ttl(key) > 0 or key.endswith((b":series", b":made")), key


# -- in a whole installation -----------------------------------------------------------------------------------------


def refuse_statistics(server: OwnRedis) -> str:
    """The address for a user that may do everything but touch performance data."""
    server.client.execute_command(
        "ACL", "SETUSER", "limited", "on", ">secret", "+@all", "&*", "~[^m]*", "~m[^u]*", "~muai:[^p]*", "~muai[^:]*"
    )
    with redis.Redis(port=server.port, username="limited", password="secret") as client:
        client.set("muai:stats-probe", 1)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("muai:perf:probe", 1)
    return server.url.replace("redis://", "redis://limited:secret@")


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path, queue_capacity=5000, sections={"gateway": {"require_keys": True}}) as stack:
        yield stack


def test_given_statistics_that_are_refused_then_every_request_is_answered_and_performance_is_for_operators(
    refused: GatewayStack,
) -> None:
    stack = refused
    text = stack.config.read_text().replace(stack.redis.url, refuse_statistics(stack.redis))
    stack.config.write_text(text)
    stack.start_gateway()
    stack.start_serving()
    stack.start("control", "--name", "control")
    with InferenceClient(stack.settings) as client:
        ids = client.submit_many({"model": "noop", "inputs": f"text {number}"} for number in range(1000))
        outcomes = dict(client.results(ids, timeout_s=60))
    assert len(outcomes) == 1000
    assert all(outcome.engine_used == "fake" for outcome in outcomes.values())  # type: ignore[union-attr]

    def logs() -> str:
        return "".join(process.log.read_text() for process in stack.processes)

    # Statistics are written now and then, apart from the requests.
    wait_until(lambda: "statistics failed, requests go on" in logs(), what="word of it")
    assert list(stack.redis.client.scan_iter("muai:perf:*")) == []
    _check_access(stack)


def _check_access(stack: GatewayStack) -> None:
    plain, record = new_key("acme")
    operator, operators = new_key("ops", operator=True)
    keys = Keys(Store(stack.redis.client))
    keys.add(record)
    keys.add(operators)
    for path in ("/api/v1/performance", "/api/v1/alerts"):
        assert httpx.get(stack.url + path).status_code == 401
        forbidden = httpx.get(stack.url + path, headers=bearer(plain))
        assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "forbidden")
    assert httpx.get(f"{stack.url}/api/v1/alerts", headers=bearer(operator)).json() == {"data": []}
    for query in ("window_s=0", "window_s=-1", "window_s=nan", "window_s=1e99", "window_s=soon"):
        wrong = httpx.get(f"{stack.url}/api/v1/performance?{query}", headers=bearer(operator))
        assert (wrong.status_code, wrong.json()["error"]["details"]["field"]) == (400, "window_s"), query
    for query in ("open=maybe", "limit=0", "limit=x", "limit=100000"):
        assert httpx.get(f"{stack.url}/api/v1/alerts?{query}", headers=bearer(operator)).status_code == 400, query


def bearer(key: str) -> dict[str, Any]:
    return {"authorization": f"Bearer {key}"}
