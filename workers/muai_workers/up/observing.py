"""What an installation is doing, read from its broker and state store by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from muai_producers.connections import state_client
from muai_producers.fleet import Fleet
from muai_producers.queue_depths import queue_reader
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
EVERY_S = 0.5


@dataclass(frozen=True)
class Observation:
    """How things stood at one moment."""

    taken_s: float
    """Monotonic seconds at which the reading began."""
    in_flight: int
    """Requests accepted and not yet answered."""
    answered: int | None
    """Since the state store began; None where it does not count them."""
    ready_workers: frozenset[str]
    """Names of the engine workers that take batches."""
    depth_by_queue: Mapping[str, int] = field(default_factory=dict)
    """Messages waiting, of the queues that have any."""


class Observer:
    """Looks twice a second; a store or broker that is away leaves the last observation standing."""

    def __init__(self, settings: Settings) -> None:
        self.latest: Observation | None = None
        self._settings = settings
        self._client = state_client(settings.queue.state_url, timeout_s=2.0)
        self._store = Store(self._client, prefix=settings.queue.key_prefix)
        self._broker = queue_reader(settings)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="muai-observe", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()
        self._thread.join(timeout=5.0)
        self._client.close()
        self._broker.close()

    def _observe(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.latest = self._look()
            except Exception as error:  # noqa: BLE001 - a look that fails, for whatever reason, must not end the looking
                log.debug("cannot observe: %s", error)

    def _look(self) -> Observation:
        taken_s = time.monotonic()
        answered: Any = self._client.hget(self._store.keys.stats, "answered")
        return Observation(
            taken_s=taken_s,
            in_flight=self._store.in_flight(),
            answered=None if answered is None else int(answered),
            ready_workers=frozenset(worker.name.partition("@")[0] for worker in Fleet(self._store).view(()).workers),
            depth_by_queue={queue: depth.messages for queue, depth in self._broker.depths().items() if depth.messages},
        )
