"""The metrics of an installation in a real Redis: sums that hold, gauges that go with their process, true queues."""

from __future__ import annotations

import time

import pytest
import redis
from celery import Celery
from tests.chaos.brokers import RabbitNode
from tests.transport_support import OwnRedis, wait_until

from muai_config import Settings, celery_settings
from muai_producers import InferenceClient
from muai_producers.monitoring import instruments, shared
from muai_producers.monitoring.guard import Standings
from muai_producers.monitoring.pushing import MetricsPusher
from muai_producers.monitoring.recorder import Gathered, Recorder, Series
from muai_producers.monitoring.shared import SharedMetrics, degraded_parts
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store
from muai_workers.monitoring.families import families
from muai_workers.monitoring.installation import Installation

pytestmark = pytest.mark.redis
SERVED = ("inference_requests_total", ("m", "onnx", "success"))


def pusher(store: Store, name: str, recorder: Recorder, own: Standings | None = None) -> MetricsPusher:
    return MetricsPusher(SharedMetrics(store), "engine", name, recorder, own or Standings())


def test_given_two_processes_then_their_counts_are_one_sum_which_outlives_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "ALIVE_S", 0.3)
    recorders = [Recorder(), Recorder()]
    for number, recorder in enumerate(recorders):
        recorder.count(instruments.REQUESTS, "m", "onnx", "success", by=2)
        recorder.observe(instruments.LATENCY, "m", "onnx", values=[0.2, 3.0])
        recorder.set(instruments.COLLECTED, "m", value=5)
        pusher(store, f"worker-{number}", recorder).push()
    metrics = SharedMetrics(store)
    totals = metrics.read()
    assert totals.sums.counters[SERVED] == 4
    assert sum(totals.sums.histograms["inference_latency_seconds", ("m", "onnx")][:-1]) == 4
    assert totals.gauges()["muai_requests_collected", ("m",)] == 10
    wait_until(lambda: not metrics.processes(), timeout_s=10, what="the end of both")
    totals = metrics.read()
    assert totals.gauges() == {}
    assert totals.sums.counters[SERVED] == 4


def test_given_an_answer_that_got_lost_when_sent_again_then_it_counts_once(store: Store) -> None:
    metrics = SharedMetrics(store)
    increases = Gathered({SERVED: 3.0}, {("batch_size", ("m",)): [1.0] * 12})
    assert metrics.add("engine/a", 1, increases)
    assert not metrics.add("engine/a", 1, increases)
    assert metrics.add("engine/a", 2, increases)
    assert metrics.read().sums.counters[SERVED] == 6


def test_given_a_store_that_refuses_then_nothing_is_lost_and_the_process_is_degraded(store: Store) -> None:
    recorder, own = Recorder(), Standings()
    away = redis.Redis(port=1, socket_connect_timeout=0.2)
    lame = MetricsPusher(SharedMetrics(Store(away)), "engine", "a", recorder, own, every_s=0.02)
    recorder.count(instruments.REQUESTS, "m", "onnx", "success", by=7)
    lame.start()
    wait_until(lambda: own.failures().get("metrics", 0) > 1, timeout_s=10, what="failures that count")
    assert "Connection" in own.degraded()["metrics"]
    lame._shared = SharedMetrics(store)  # the store is back
    wait_until(lambda: SERVED in SharedMetrics(store).read().sums.counters, timeout_s=10, what="the counts")
    lame.close()
    counters = SharedMetrics(store).read().sums.counters
    assert counters[SERVED] == 7
    assert counters["muai_monitoring_failures_total", ("metrics",)] > 1


def test_given_tenants_without_end_then_the_series_are_bounded_and_none_is_lost(store: Store) -> None:
    for number in range(3):
        recorder = Recorder()
        for tenant in range(150):
            recorder.count(instruments.TENANT_REQUESTS, f"t{number}-{tenant}", "success")
        pusher(store, f"gateway-{number}", recorder).push()
    counters = SharedMetrics(store).read().sums.counters
    assert len(counters) == 201
    assert sum(counters.values()) == 450
    assert counters["muai_tenant_requests_total", ("other", "success")] == 250


def test_given_a_process_that_is_degraded_then_others_hear_of_it_until_it_ends(store: Store) -> None:
    own = Standings()
    own.report("metrics", "port 9090 is taken")
    one = pusher(store, "exporter", Recorder(), own)
    one.push()
    metrics = SharedMetrics(store)
    assert "port 9090 is taken" in degraded_parts(metrics.processes())["metrics"]
    metrics.withdraw(one.process_id)
    assert degraded_parts(metrics.processes()) == {}


def look(settings: Settings) -> dict[Series, float]:
    installation = Installation(settings)
    try:
        return installation.look().gauges
    finally:
        installation.close()


def test_given_a_capacity_changed_at_run_time_then_the_page_shows_it(muai_settings: Settings, store: Store) -> None:
    assert look(muai_settings)["muai_queue_capacity", ()] != 77
    ConfigEditor(muai_settings, ConfigVersions(store)).set({"monitoring.server.queue_capacity": 77}, by="ada")
    assert look(muai_settings)["muai_queue_capacity", ()] == 77


def test_given_requests_that_wait_then_depth_and_age_are_those_of_their_queues(
    muai_settings: Settings, clean_redis: OwnRedis
) -> None:
    with InferenceClient(muai_settings) as client:
        client.submit("noop", 'says "submitted_at": 5', priority=9, tenant="a")
        client.submit("noop", "later", priority=9, tenant="b")
        client.submit("noop", "low", priority=0)
    app = Celery(set_as_current=False)
    # A plain producer with kombu's own Redis priorities: another list, which counting the queue's own would miss.
    app.conf.update(celery_settings(muai_settings, "producer") | {"broker_transport": None})
    app.send_task("muai.infer", kwargs={"model": "noop", "inputs": {"text": "x"}}, queue="inference", priority=9)
    assert clean_redis.client.llen("inference") == 0
    time.sleep(0.2)
    gauges = look(muai_settings)
    assert gauges["muai_queue_depth", ("inference.high", "high")] == 2
    assert gauges["muai_queue_depth", ("inference", "normal")] == 1
    assert gauges["muai_queue_depth", ("inference.low", "low")] == 1
    assert 0.2 <= gauges["muai_oldest_request_age_seconds", ("inference.high",)] < 60
    assert gauges["muai_requests_in_flight", ()] == 3
    assert gauges["muai_tenant_requests_in_flight", ("a",)] == 1
    assert gauges["muai_workers", ("fake",)] == 0
    assert gauges["muai_state_store_up", ()] == gauges["muai_broker_up", ()] == 1


def test_given_a_store_and_a_broker_that_are_away_then_the_page_says_so(muai_settings: Settings) -> None:
    away = muai_settings.queue.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    gauges = look(muai_settings.model_copy(update={"queue": away}))
    assert gauges == {("muai_state_store_up", ()): 0.0, ("muai_broker_up", ()): 0.0}
    assert [one.name for one in families(Gathered(), gauges)] == ["muai_state_store_up", "muai_broker_up"]


@pytest.fixture
def amqp_settings(muai_settings: Settings, rabbit_node: RabbitNode) -> Settings:
    """RabbitMQ is the broker, on a node that nobody else uses."""
    queue = {"broker_url": rabbit_node.url(), "redis_url": muai_settings.queue.broker_url}
    return muai_settings.model_copy(update={"queue": muai_settings.queue.model_copy(update=queue)})


@pytest.mark.rabbitmq
def test_given_rabbitmq_then_depths_are_told_and_nothing_is_taken(amqp_settings: Settings) -> None:
    with InferenceClient(amqp_settings) as client:
        client.submit("noop", "waits", priority=9)
    for _ in range(2):
        gauges = look(amqp_settings)
        assert gauges["muai_queue_depth", ("inference.high", "high")] == 1
        assert gauges["muai_queue_depth", ("engine.fake", "")] == 0
        assert gauges["muai_broker_up", ()] == 1
