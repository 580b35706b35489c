"""What a worker says of itself, in the fleet and to Flower: neither may hold it up."""

from __future__ import annotations

import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.consumer.heart import Heart

from muai_batching.app import CollectorConsumer
from muai_batching.serving import HeartbeatOnce, HeartbeatOnceStep, QuietConsumer
from muai_producers.fleet import WorkerRecord
from muai_workers.announcing import Announcer
from muai_workers.engine_worker import EngineConsumer

LIMIT_S = 20.0
RECORD = WorkerRecord(name="w", engine="fake", slots=1, ahead=1, pid=1, host="h", started_at=0.0)


class FleetThatWaits:
    """A fleet whose announcements take until they are let go."""

    def __init__(self) -> None:
        self.announcing = threading.Event()
        self.let_go = threading.Event()
        self.said: list[str] = []

    def announce(self, record: WorkerRecord, *, is_news: bool = False) -> None:
        self.announcing.set()
        assert self.let_go.wait(LIMIT_S)
        self.said.append(f"{record.name} lives{', news' if is_news else ''}")

    def withdraw(self, name: str) -> None:
        self.said.append(f"{name} goes")


@pytest.fixture
def fleet() -> FleetThatWaits:
    return FleetThatWaits()


def announcer(fleet: Any) -> Announcer:
    return Announcer(fleet, lambda: RECORD)


def test_given_a_store_that_is_slow_when_a_signal_handler_withdraws_then_the_handler_does_not_wait(
    fleet: FleetThatWaits,
) -> None:
    worker = announcer(fleet)
    worker.start()
    assert fleet.announcing.wait(LIMIT_S)
    said_in_handler: list[list[str]] = []

    def handler(*_: Any) -> None:
        worker.withdraw()
        said_in_handler.append(list(fleet.said))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert said_in_handler == [[]]  # and so before the announcement that is under way came to its end
    fleet.let_go.set()
    worker.stop()
    assert fleet.said == ["w lives, news", "w goes"]


def test_given_a_worker_that_is_told_to_end_before_it_is_ready_then_it_is_never_announced(
    fleet: FleetThatWaits,
) -> None:
    worker = announcer(fleet)
    worker.withdraw()
    worker.start()
    worker.stop()
    assert fleet.said == ["w goes"]


def test_given_an_announcer_that_never_started_when_stopped_then_that_is_no_error(fleet: FleetThatWaits) -> None:
    announcer(fleet).stop()
    assert fleet.said == []


class Events:
    """A dispatcher of events that keeps what it is asked for."""

    enabled = True

    def __init__(self) -> None:
        self.on_enabled: set[Any] = set()
        self.on_disabled: set[Any] = set()
        self.sent: list[tuple[str, bool]] = []

    def send(self, event: str, *, retry: bool, **_: Any) -> None:
        self.sent.append((event, retry))


def test_given_a_heartbeat_when_it_is_sent_then_it_is_tried_once() -> None:
    events, timer = Events(), SimpleNamespace(call_repeatedly=lambda every_s, call, args: (call, args), cancel=print)
    heartbeat = HeartbeatOnce(timer, events)
    heartbeat.start()
    call, args = heartbeat.tref
    call(*args)
    heartbeat.stop()
    assert events.sent == [("worker-online", False), ("worker-heartbeat", False), ("worker-offline", False)]


@pytest.mark.parametrize("consumer", [QuietConsumer, EngineConsumer, CollectorConsumer])
def test_given_any_worker_of_ours_then_its_heartbeat_is_the_one_that_tries_once(consumer: Any) -> None:
    steps = consumer.Blueprint.default_steps
    assert HeartbeatOnceStep in steps
    stock = f"{Heart.__module__}:{Heart.__qualname__}"
    assert stock not in steps
