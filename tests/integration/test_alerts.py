"""Alerts against a real Redis: notices are made once, delivered once, tried again, and given up in the end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from tests.receiving import Receiver, receiver
from tests.transport_support import OwnRedis

from muai_config import Settings, build_settings
from muai_producers.alerts.records import Alert, Finding
from muai_producers.alerts.store import CLAIM_S, MAX_HISTORY, AlertStore
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.performance.recorder import StoreRecorder
from muai_producers.performance.series import Series
from muai_producers.performance.store import PerformanceStore
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.scheduled import TaskRuns, overdue
from muai_producers.store import Store
from muai_workers.control.scheduling import Deadline, Scheduled, Scheduler
from muai_workers.control.watching import register_watching
from muai_workers.monitoring.anomalies import AnomalyDetector
from muai_workers.monitoring.delivering import MAX_ATTEMPTS, deliveries_of
from muai_workers.monitoring.destinations import DeliveryError, post

pytestmark = pytest.mark.redis
NOW_S = 1_790_000_000.0


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as made:
        yield made


class Clock:
    """A time of the test's own."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def settings_for(server: OwnRedis, **anomaly: Any) -> Settings:
    return build_settings({"queue": {"broker_url": server.url}, "monitoring": {"anomaly": anomaly}}, {})


def detector(server: OwnRedis, clock: Clock, **anomaly: Any) -> AnomalyDetector:
    store = Store(server.client)
    monitor = PerformanceMonitor(store, 604_800, wall_s=clock)
    return AnomalyDetector(settings_for(server, **anomaly), store, monitor, wall_s=clock)


def an_alert(subject: str = "m") -> Alert:
    return Alert(
        id="given", alert_type="latency", subject=subject, severity="error", message="it is slow", timestamp=NOW_S
    )


def hooked(hook: Receiver) -> dict[str, Any]:
    return {"alert_destinations": ["webhook"], "webhook_url": hook.url}


@pytest.mark.property(38)
def test_given_an_alert_then_it_is_sent_to_the_log_and_the_webhook(
    clean_redis: OwnRedis, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    sender = detector(clean_redis, Clock(), **hooked(hook))
    assert sender.send_alert(an_alert())
    [body] = hook.bodies
    assert (body["alert_type"], body["status"], body["subject"]) == ("latency", "firing", "m")
    assert body["timestamp"].startswith("2026-")
    assert "alert latency: it is slow" in caplog.text
    [entry] = sender.alerts.history()
    assert {(state.destination, state.status) for state in entry.deliveries} == {("log", "sent"), ("webhook", "sent")}


@pytest.mark.property(39)
def test_given_a_storm_from_twenty_threads_then_one_is_sent_of_each_subject(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    senders = [detector(clean_redis, Clock(), **hooked(hook)) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        sent = list(pool.map(lambda number: senders[number % 20].send_alert(an_alert(f"m{number % 3}")), range(120)))
    assert sorted(body["subject"] for body in hook.bodies) == ["m0", "m1", "m2"]
    assert sum(sent) == 3


def test_given_a_webhook_that_refuses_then_it_is_tried_again_with_pauses_and_given_up_and_the_history_says_so(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    clock = Clock()
    sender = detector(clean_redis, clock, **hooked(hook))
    hook.status = 500
    sender.send_alert(an_alert())
    moments = [clock.now_s]
    while len(hook.bodies) < MAX_ATTEMPTS:
        clock.now_s += 1.0
        before = len(hook.bodies)
        sender.deliverer.run(Deadline(5.0))
        moments += [clock.now_s] * (len(hook.bodies) - before)
    pauses = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > 16 * pauses[0], "exponential"
    states = {state.destination: state for state in sender.alerts.history()[0].deliveries}
    assert (states["webhook"].status, states["webhook"].attempts) == ("failed", MAX_ATTEMPTS)
    assert states["webhook"].error == "answered 500"
    assert states["log"].status == "sent"
    clock.now_s += 3600
    sender.deliverer.run(Deadline(5.0))
    assert len(hook.bodies) == MAX_ATTEMPTS, "given up is given up"
    assert sender.alerts.counts() == {"log:sent": 1, "webhook:failed": 1}


def test_given_a_sender_that_dies_while_it_sends_then_another_sends_after_a_while(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    clock = Clock()
    store = AlertStore(Store(clean_redis.client))
    notices = deliveries_of([an_alert()], ["webhook"])
    assert store.commit(b"", {}, [an_alert()], notices, NOW_S)
    assert len(store.claim(NOW_S, 10) or []) == 2  # and dies
    other = detector(clean_redis, clock, **hooked(hook))
    other.deliverer.run(Deadline(5.0))
    assert hook.bodies == []
    clock.now_s += CLAIM_S + 1
    other.deliverer.run(Deadline(5.0))
    assert len(hook.bodies) == 1


def test_given_two_checks_that_read_the_same_state_then_one_writes_and_its_notices_alone_are_made(
    clean_redis: OwnRedis,
) -> None:
    store = AlertStore(Store(clean_redis.client))
    _, seen = store.states()
    assert store.commit(seen, {}, [an_alert()], deliveries_of([an_alert()], []), NOW_S)
    assert not store.commit(seen, {}, [an_alert()], deliveries_of([an_alert()], []), NOW_S + 1)
    assert len(store.claim(NOW_S + 2, 10) or []) == 1


def test_given_the_end_of_an_alert_whose_beginning_waits_then_it_waits_too(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    clock = Clock()
    sender = detector(clean_redis, clock, **hooked(hook), resolve_after_s=0.0, throughput_threshold_rps=0.0)
    hook.status = 503
    sender.send_alert(an_alert())
    clock.now_s += 1
    sender.check(Deadline(5.0))  # finds nothing: the alert is over
    assert [body["status"] for body in hook.bodies] == ["firing"]
    hook.status = 200
    clock.now_s += 30
    sender.deliverer.run(Deadline(5.0))
    clock.now_s += 30
    sender.deliverer.run(Deadline(5.0))
    assert [body["status"] for body in hook.bodies] == ["firing", "firing", "resolved"]


def test_given_what_another_process_reports_then_it_is_an_alert_until_it_is_withdrawn(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    clock = Clock()
    clock.now_s = time.time()
    sender = detector(clean_redis, clock, **hooked(hook), resolve_after_s=0.0)
    full = Finding(type="disk_full", subject="host-1", severity="critical", message="no room left")
    sender.alerts.report(full, keep_s=3600.0)
    sender.check(Deadline(5.0))
    sender.check(Deadline(5.0))
    sender.alerts.withdraw(full)
    sender.check(Deadline(5.0))
    assert [(body["alert_type"], body["status"]) for body in hook.bodies] == [
        ("disk_full", "firing"),
        ("disk_full", "resolved"),
    ]


def test_given_the_specifications_methods_then_each_gives_an_alert_above_its_threshold(clean_redis: OwnRedis) -> None:
    checker = detector(clean_redis, Clock())
    alert = checker.check_latency("embed", 1500.0)
    assert alert is not None
    assert alert.metadata["threshold_ms"] == 1000.0
    assert checker.check_latency("embed", 900.0) is None
    memory = checker.check_resources(gpu_memory_percent=95.0, cpu_percent=12.0)
    assert memory is not None
    assert memory.metadata["cpu_percent"] == 12.0
    assert checker.check_resources(gpu_memory_percent=80.0, cpu_percent=100.0) is None
    assert checker.check_error_rate(60) is None, "nobody asked for anything"


def test_given_more_alerts_than_are_kept_then_the_oldest_are_forgotten(clean_redis: OwnRedis) -> None:
    store = AlertStore(Store(clean_redis.client))
    alerts = [
        Alert(id=f"a{n}", alert_type="latency", subject="m", severity="error", message="", timestamp=NOW_S + n)
        for n in range(MAX_HISTORY + 5)
    ]
    for number, alert in enumerate(alerts):
        _, seen = store.states()
        assert store.commit(seen, {}, [alert], [], NOW_S + number)
    assert store.trim() == 5
    entries = store.history(MAX_HISTORY)
    assert len(entries) == MAX_HISTORY
    assert entries[0].alert.id == f"a{MAX_HISTORY + 4}"


def test_given_a_receiver_that_moves_or_is_not_there_then_it_is_an_error_and_not_followed(hook: Receiver) -> None:
    hook.status = 302
    with pytest.raises(DeliveryError, match="302"):
        post(hook.url, {})
    with pytest.raises(DeliveryError):
        post("http://127.0.0.1:9/", {})


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_given_ten_control_workers_that_are_asked_at_once_then_a_task_runs_once_in_its_interval(
    clean_redis: OwnRedis,
) -> None:
    store = Store(clean_redis.client)
    runs: list[str] = []
    begun = threading.Event()

    def work(_: Deadline) -> None:
        runs.append(threading.current_thread().name)
        begun.wait(0.05)

    task = Scheduled("muai.control.test", 60.0, 30.0, work, "statistics")
    schedulers = [Scheduler(store) for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda number: schedulers[number % 10].run(task), range(40)))
    assert len(runs) == 1
    [run] = TaskRuns(store).all()
    assert (run.task, run.every_s) == ("muai.control.test", 60.0)


def test_given_a_task_that_fails_or_stops_running_then_it_is_noted_and_overdue(clean_redis: OwnRedis) -> None:
    store = Store(clean_redis.client)
    scheduler = Scheduler(store)

    def fails(_: Deadline) -> None:
        raise ValueError("no")

    good = Scheduled("muai.control.test", 0.05, 1.0, lambda _: 7, "statistics")
    assert scheduler.run(good) == 7
    assert overdue(TaskRuns(store).all(), time.time()) == []
    clean_redis.client.delete("muai:interval:muai.control.test")
    bad = Scheduled("muai.control.test", 0.05, 1.0, fails, "statistics")
    assert scheduler.run(bad) is None
    [run] = TaskRuns(store).all()
    assert "failed" in run.error
    [told] = overdue([run], run.ended_at + 2.0)
    assert "muai.control.test" in told
    assert overdue([run], run.ended_at + 1.0) == []


def test_given_alerts_that_last_when_the_check_is_switched_off_then_they_end_and_nothing_begins(
    clean_redis: OwnRedis, hook: Receiver
) -> None:
    clock = Clock()
    checker = detector(clean_redis, clock, **hooked(hook))
    finding = Finding(type="gpu_failure", subject="0", severity="critical", message="it is gone")
    checker.alerts.report(finding, 1e9)
    checker.check(Deadline(5.0))
    assert [alert.subject for alert in checker.alerts.open()] == ["0"]
    checker.on_settings(settings_for(clean_redis, enabled=False, **hooked(hook)))
    for _ in range(3):
        clock.now_s += 20
        assert checker.check(Deadline(5.0)).began == ()
    assert checker.alerts.open() == []
    checker.deliverer.run(Deadline(5.0))
    assert [body["status"] for body in hook.bodies] == ["firing", "resolved"]


@pytest.mark.property(58)
def test_given_a_threshold_changed_at_run_time_then_the_scheduled_check_goes_by_it(clean_redis: OwnRedis) -> None:
    settings, store = settings_for(clean_redis, enabled=False), Store(clean_redis.client)
    app, live = Celery("test", set_as_current=False), LiveSettings(settings, "control")
    schedule = register_watching(app, live)
    series = Series("m", "onnx", "embedding")
    recorder = StoreRecorder(PerformanceStore(store, 604_800))
    for _ in range(50):
        recorder.served(series, [(10.0,)] * 4 + [(50.0,)])
    recorder.close()
    changes = {"monitoring.anomaly.enabled": True, "monitoring.anomaly.latency_threshold_ms": 10.0}
    assert live.apply(ConfigEditor(settings, ConfigVersions(store)).set(changes, by="ada"))
    assert schedule["check-anomalies"]["task"] == "muai.control.check_anomalies"
    app.tasks["muai.control.check_anomalies"]()
    assert ("latency", "m") in {(alert.alert_type, alert.subject) for alert in AlertStore(store).open()}
