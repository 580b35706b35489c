"""Keeps the collector's picture of the fleet fresh, from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from muai_producers.fleet import BatchDone, Fleet, FleetView
from muai_producers.store import Store

log = logging.getLogger(__name__)
REFRESH_S = 1.0


class FleetWatcher:
    """Reads the fleet every second, and at once when a worker comes, goes, or finishes a batch.

    Args:
        client: a Redis client; used from this thread only.
        on_view: called with each new picture.
        on_batch_done: called at the end of each batch.
        Both are called from the watcher's thread.
    """

    def __init__(
        self,
        client: redis.Redis,
        store: Store,
        engines: Sequence[str],
        on_view: Callable[[FleetView], Any],
        on_batch_done: Callable[[BatchDone], Any],
    ) -> None:
        self._client = client
        self._channel = store.keys.fleet_channel
        self._fleet = Fleet(store)
        self._engines = list(engines)
        self._on_view = on_view
        self._on_batch_done = on_batch_done
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="muai-fleet", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(timeout=5.0)

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
                    self._on_view(self._fleet.view(self._engines))
                    refreshed_s = time.monotonic()
                message = pubsub.get_message(timeout=max(0.0, refreshed_s + REFRESH_S - time.monotonic()))
                if message is not None and not self._heard(message["data"].decode()):
                    refreshed_s = -REFRESH_S
        finally:
            pubsub.close()

    def _heard(self, notice: str) -> bool:
        """Act on a notice; False when it calls for a fresh look."""
        done = BatchDone.from_notice(notice)
        if done is None:
            return False
        self._on_batch_done(done)
        return True
