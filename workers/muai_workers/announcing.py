"""The engine worker's sign of life in the fleet."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import redis

from muai_batching.own_queues import BROKER_ERRORS, OwnQueues
from muai_producers.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerRecord

log = logging.getLogger(__name__)
WITHDRAW_LIMIT_S = 5.0


class Announcer:
    """Announces a worker until it is stopped; a state store that is away is waited for.

    Args:
        record: gives what there is to say at the moment.
        own_queues: opens the worker's own queue, where the record names one, before it is announced and again should it
            have been closed because the worker was silent; closes it when the worker goes.
    """

    def __init__(self, fleet: Fleet, record: Callable[[], WorkerRecord], own_queues: OwnQueues | None = None) -> None:
        self._fleet = fleet
        self._record = record
        self._own_queues = own_queues
        self._is_shut = False
        # Not an Event, whose lock the very code may hold that a signal interrupts: this queue's put is re-entrant.
        self._told_to_end: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="muai-announce", daemon=True)

    def start(self) -> None:
        """Announce now and from now on."""
        self._thread.start()

    def withdraw(self) -> None:
        """Have the fleet told that this worker is going, soon. Waits for nothing: a signal handler may call it."""
        self._told_to_end.put(None)

    def stop(self) -> None:
        """Withdraw, and wait until the fleet knows: the collectors send this worker nothing more."""
        self.withdraw()
        if self._thread.is_alive():
            self._thread.join(WITHDRAW_LIMIT_S)
        if self._own_queues is not None:
            self._shut()
            self._own_queues.close()

    def _run(self) -> None:
        is_news, wait_s = True, 0.0
        while not self._is_told_to_end(wait_s):
            is_news = not self._announce(is_news)
            wait_s = ANNOUNCE_EVERY_S
        try:
            self._fleet.withdraw(self._record().name)
        except redis.RedisError as error:
            log.warning("could not withdraw from the fleet (%s); the announcement runs out by itself", error)
        self._shut()  # what waits there need not wait for what runs here

    def _is_told_to_end(self, wait_s: float) -> bool:
        try:
            self._told_to_end.get(timeout=wait_s)
        except queue.Empty:
            return False
        return True

    def _announce(self, is_news: bool) -> bool:
        record = self._record()
        try:
            if is_news:
                self._open(record)
            was_known = self._fleet.announce(record, is_news=is_news)
            if not was_known and not is_news:
                self._open(record)
        except BROKER_ERRORS as error:
            log.warning("could not announce this worker: %s; trying again", error)
            return False
        return True

    def _open(self, record: WorkerRecord) -> None:
        if record.queue and self._own_queues is not None:
            self._own_queues.open(record.queue)

    def _shut(self) -> None:
        """Close the worker's own queue; what does not work here the collectors do, once they miss the worker."""
        record = self._record()
        if self._own_queues is None or not record.queue or self._is_shut:
            return
        try:
            if self._own_queues.shut(record.queue, record.engine) is not None:
                self._is_shut = True
                self._fleet.forget_own_queue(record.queue)
        except BROKER_ERRORS as error:
            log.warning("could not close %s: %s; it is closed once this worker is missed", record.queue, error)
