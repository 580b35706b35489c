"""Keeps the collector's picture of the fleet fresh, and the fleet's of the collector, from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from muai_batching.own_queues import Janitor
from muai_batching.shards import ShardLeases
from muai_producers.fleet import CollectorRecord, Fleet, FleetView, Notice, read_notice
from muai_producers.store import Store

log = logging.getLogger(__name__)
REFRESH_S = 1.0


class FleetWatcher:
    """Reads the fleet every second, and at once when a worker comes, goes, or finishes a batch.

    Args:
        client: a Redis client; used from this thread only.
        leases: this collector's claims on shards, renewed at each look; None where there are no shards.
        record: gives how this collector is announced at the moment.
        on_view: called with each new picture, and with the shards that are held.
        on_notice: called with what changes in between, such as the end of a batch.
        janitor: closes the own queues of workers that have gone; None where workers have none.
        Both functions are called from the watcher's thread.
    """

    def __init__(
        self,
        client: redis.Redis,
        store: Store,
        engines: Sequence[str],
        leases: ShardLeases | None,
        record: Callable[[], CollectorRecord],
        on_view: Callable[[FleetView, frozenset[int]], Any],
        on_notice: Callable[[Notice], Any],
        janitor: Janitor | None = None,
    ) -> None:
        self._client = client
        self._channel = store.keys.fleet_channel
        self._fleet = Fleet(store)
        self._engines = list(engines)
        self._leases = leases
        self._record = record
        self._on_view = on_view
        self._on_notice = on_notice
        self._janitor = janitor
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="muai-fleet", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=5.0)
        if self._janitor is not None:
            self._janitor.close()
        try:
            self._fleet.withdraw_collector(self._record().name)
            if self._leases is not None:
                self._leases.release()
        except redis.RedisError as error:
            log.warning("could not withdraw this collector (%s); its announcement runs out by itself", error)

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                self._watch_until_error()
            except redis.RedisError as error:
                log.warning("watching the fleet: %s; trying again", error)
                self._closed.wait(0.5)

    def _watch_until_error(self) -> None:
        pubsub: Any = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            pubsub.subscribe(self._channel)
            refreshed_s = -REFRESH_S
            while not self._closed.is_set():
                if time.monotonic() - refreshed_s >= REFRESH_S:
                    self._fleet.announce_collector(self._record())
                    view = self._fleet.view(self._engines)
                    self._on_view(view, self._held(view))
                    if self._janitor is not None:
                        self._janitor.look(view, time.monotonic())
                    refreshed_s = time.monotonic()
                message = pubsub.get_message(timeout=max(0.0, refreshed_s + REFRESH_S - time.monotonic()))
                if message is not None and not self._heard(message["data"].decode()):
                    refreshed_s = -REFRESH_S
        finally:
            pubsub.close()

    def _held(self, view: FleetView) -> frozenset[int]:
        return self._leases.claim(len(view.collectors)) if self._leases is not None else frozenset()

    def _heard(self, notice: str) -> bool:
        """Act on a notice; False when it calls for a fresh look."""
        told = read_notice(notice)
        if told is None:
            return False
        self._on_notice(told)
        return True
