"""The engine worker's sign of life in the fleet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import redis

from muai_producers.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerRecord

log = logging.getLogger(__name__)


class Announcer:
    """Announces a worker until it is stopped; a state store that is away is waited for.

    Args:
        record: gives what there is to say at the moment.
    """

    def __init__(self, fleet: Fleet, record: Callable[[], WorkerRecord]) -> None:
        self._fleet = fleet
        self._record = record
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._announce, name="muai-announce", daemon=True)

    def start(self) -> None:
        """Announce now and from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Withdraw: the collectors send this worker nothing more."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join(timeout=5.0)
        try:
            self._fleet.withdraw(self._record().name)
        except redis.RedisError as error:
            log.warning("could not withdraw from the fleet (%s); the announcement runs out by itself", error)

    def _announce(self) -> None:
        is_news = True
        while not self._stopped.is_set():
            try:
                self._fleet.announce(self._record(), is_news=is_news)
                is_news = False
            except redis.RedisError as error:
                log.warning("could not announce this worker: %s; trying again", error)
                is_news = True
            self._stopped.wait(ANNOUNCE_EVERY_S)
