"""The collector as a Celery worker: visible to Flower and `celery inspect`, stopped by the same signals."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.worker import state as worker_state
from kombu import Connection

from muai_batching.collector import Collector
from muai_batching.dispatch import ConfirmingDispatcher, Dispatcher, RedisDispatcher
from muai_batching.own_queues import Janitor, own_queues_of
from muai_batching.serving import QuietConsumer, serve
from muai_batching.shards import ShardLeases
from muai_batching.watcher import FleetWatcher
from muai_config import celery_settings, load_settings
from muai_config.engines import ALL_ENGINES
from muai_config.queues import REQUEST_QUEUES, shard_queue
from muai_producers.connections import state_client
from muai_producers.fleet import CollectorRecord, Fleet, FleetView, Notice, collector_process
from muai_producers.messages import INFER_TASK
from muai_producers.monitoring.pushing import start_pushing
from muai_producers.performance.recorder import recorder_for
from muai_producers.performance.sampling import end_sampling, offer_sampling
from muai_producers.runtime_config.following import ConfigFollower
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.store import Store
from muai_producers.tracing import create_tracer

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> Celery:
    """The Celery application of the collector."""
    app = Celery("muai.collector", set_as_current=False)
    app.conf.update(celery_settings(settings, "collector"))
    # A class of its own for this application: Celery makes the consumer, and gives it no settings of ours.
    app.conf.worker_consumer = type("CollectorConsumer", (CollectorConsumer,), {"settings": settings})
    app.conf.worker_pool = "solo"

    @app.task(name=INFER_TASK, ignore_result=True)
    def infer(**_: Any) -> None:
        """Registered so that `inspect registered` shows it; the consumer takes its messages before any pool."""
        raise RuntimeError("requests are collected, not executed: send muai.infer to the queue 'inference'")

    return app


class CollectorConsumer(QuietConsumer):
    """A Celery consumer that hands the messages of `muai.infer` to the collector instead of to a pool.

    Any other message on the request queues is answered and kept as a dead letter.
    """

    collector: Collector | None = None
    settings: Settings

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Called by Celery at each start of the event loop, also after a lost connection."""
        self._start_collecting()
        collector = self.collector
        assert collector is not None
        take, schedule = collector.on_message, self._schedule_tick

        def on_task_received(message: Any) -> None:
            headers = message.headers
            if isinstance(headers, dict) and headers.get("task") == INFER_TASK:
                take(message)
            else:
                collector.on_undecodable(message, ValueError(f"only {INFER_TASK} is served here"))
            schedule()

        return on_task_received

    def _start_collecting(self) -> None:
        self._consumed_shards: frozenset[int] = frozenset()
        self._paused = False
        if self.collector is not None:
            self.collector.forget_all()
            return
        settings = self.settings
        client = state_client(settings.queue.state_url)
        store = Store(client, prefix=settings.queue.key_prefix, result_ttl_s=settings.queue.result_ttl_s)
        revoked = worker_state.revoked
        self._live = LiveSettings(settings, collector_process(self.hostname))
        self._follower = ConfigFollower(self._live)
        self._follower.start()
        self._follower.take_sighup()
        settings = self._live.current
        self._tracer = create_tracer(settings, "collector")
        self.collector = Collector(
            settings,
            store,
            _dispatcher(settings, store),
            is_revoked=lambda request_id: request_id in revoked,
            tracer=self._tracer,
            statistics=recorder_for(settings),
        )
        offer_sampling(self.app, settings, self.collector.statistics)
        self._live.subscribe(self._tracer.reconfigure, settings)
        self._live.subscribe(lambda changed: self.hub.call_soon(self._on_settings, changed), settings)
        self._tick_scheduled = False
        self._timer: Any = None
        self._news: deque[Callable[[], None]] = deque()
        self._is_record_due = False
        self._record = CollectorRecord(
            name=self.hostname, pid=os.getpid(), host=socket.gethostname(), started_at=time.time()
        )
        watched = state_client(settings.queue.state_url)
        watched_store = Store(watched, prefix=settings.queue.key_prefix)
        num_shards = settings.queue.collector_shards
        leases = ShardLeases(watched_store, self.hostname, num_shards, settings.queue.lease_ttl_s)
        self._watcher = FleetWatcher(
            watched,
            watched_store,
            ALL_ENGINES,
            leases if num_shards > 1 else None,
            lambda: self._record,
            lambda view, held: self._hear(lambda: self._on_fleet(view, held)),
            lambda notice: self._hear(lambda: self._on_notice(notice)),
            Janitor(own_queues_of(settings), Fleet(watched_store)),
        )
        self._watcher.start()

    def _on_settings(self, settings: Settings) -> None:
        assert self.collector is not None
        self.collector.on_settings(settings)

    def _hear(self, news: Callable[[], None]) -> None:
        """Have the event loop told something; called from the watcher's thread.

        The hub runs what is scheduled for one turn of it in any order, and on AMQP not before its next event. A batch
        must not leave by an older picture of the fleet than there is, so each tick takes in all news first.
        """
        self._news.append(news)
        self.hub.call_soon(self._on_news)

    def _on_news(self) -> None:
        if self._news:
            # Not through call_soon: what is scheduled from within the hub's own callbacks waits for its next event.
            self._tick()

    def _take_in_news(self) -> None:
        while self._news:
            self._news.popleft()()

    def _on_fleet(self, view: FleetView, held: frozenset[int]) -> None:
        assert self.collector is not None
        self.collector.on_fleet(view)
        if self.collector.sharding.num_shards > 1:
            self._consume_shards(held)
            self.collector.on_shards(held)
        self.collector.sweep()
        self._is_record_due = True

    def _consume_shards(self, held: frozenset[int]) -> None:
        for shard in held - self._consumed_shards:
            self.add_task_queue(shard_queue(shard))
        for shard in self._consumed_shards - held:
            self.cancel_task_queue(shard_queue(shard))
        self._consumed_shards = held

    def _on_notice(self, notice: Notice) -> None:
        assert self.collector is not None
        self.collector.on_notice(notice)

    def _schedule_tick(self) -> None:
        if not self._tick_scheduled:
            self._tick_scheduled = True
            self.hub.call_soon(self._tick)

    def _tick(self) -> None:
        assert self.collector is not None
        self._tick_scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._take_in_news()
        delay_s = self.collector.tick()
        if self._is_record_due:
            self._is_record_due = False
            self._record = self.collector.announcement(self._record)  # for the watcher's thread, which announces it
        self._pause_or_go_on()
        if delay_s == 0.0:
            # Through the timer, so that the loop reads its sockets in between.
            self._timer = self.hub.call_later(0, self._tick)
        elif delay_s is not None:
            self._timer = self.hub.call_later(delay_s, self._tick)

    def _pause_or_go_on(self) -> None:
        """Stop taking messages while those held have `buffer_mb`; what does not fit stays with the broker."""
        assert self.collector is not None
        num_bytes = self.collector.assembler.num_bytes
        limit = self.settings.optimization.batcher.buffer_mb * 1_000_000
        if not self._paused and num_bytes >= limit:
            log.warning("holding %d MB of requests, the most that buffer_mb allows; the rest waits", limit // 1_000_000)
            self._paused = True
            self.task_consumer.cancel()
        elif self._paused and num_bytes < limit // 2:
            self._paused = False
            self.task_consumer.consume()

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A message whose envelope kombu refuses."""
        if self.collector is not None:
            self.collector.on_undecodable(message, exc)
            self._schedule_tick()

    def shutdown(self) -> None:
        """Celery's own shutdown returns what is unacknowledged to the queue."""
        if self.collector is not None:
            self._watcher.close()
            end_sampling(self.app)
            self.collector.statistics.close()
            self._follower.close()
        super().shutdown()
        if self.collector is not None:
            self._tracer.close()


def _dispatcher(settings: Settings, store: Store) -> Dispatcher:
    if settings.queue.broker_is_redis and settings.queue.broker_url == settings.queue.state_url:
        return RedisDispatcher(store)
    conf = celery_settings(settings, "producer")
    connection = Connection(
        conf["broker_url"],
        transport=conf.get("broker_transport"),
        ssl=conf.get("broker_use_ssl") or False,
        transport_options={k: v for k, v in conf["broker_transport_options"].items() if k != "confirm_publish"},
    )
    return ConfirmingDispatcher(store, connection, conf["task_queues"])


def run_collector(settings: Settings, name: str | None = None, *, log_level: str = "INFO") -> None:
    """Run a collector until it is told to stop. Blocks.

    Args:
        name: the worker's name in Flower; made from the host and process id where None.
    """
    name = name or f"collector-{os.getpid()}"
    pusher = start_pushing(settings, "collector", name)
    try:
        serve(create_app(settings), settings, name=name, queues=REQUEST_QUEUES, pool="solo", log_level=log_level)
    finally:
        if pusher is not None:
            pusher.close()


def __getattr__(name: str) -> Any:
    """`app`, for `celery -A muai_batching.app`: built when asked for, from the configuration in the environment."""
    if name == "app":
        return create_app(load_settings())
    raise AttributeError(name)
