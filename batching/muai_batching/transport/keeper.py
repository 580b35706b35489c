"""The thread that keeps a ledger alive, and the ledgers of this process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

import redis

from muai_batching.transport.keys import StateKeys
from muai_batching.transport.lease import LeaseObserver
from muai_batching.transport.ledger import CONNECTION_ERRORS, Ledger
from muai_batching.transport.monitor import reclaim_overdue
from muai_batching.transport.store import ClaimStore

logger = logging.getLogger(__name__)

#: Acks of other threads gather this long before they are told to Redis together.
ACK_GATHER_S = 0.005


class Keeper:
    """Beats for a ledger, flushes its acks, watches the other consumers. Its thread ends when nothing is left to do."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._nudged = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._observer = LeaseObserver(ledger.lease_ttl_s)
        ledger.nudge = self._nudged.set
        ledger.on_registered = self._start

    def _start(self) -> None:
        self._stopping.clear()
        self._observer = LeaseObserver(self.ledger.lease_ttl_s)
        self._thread = threading.Thread(target=self._run, name="muai-lease", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        interval_s = self.ledger.lease_ttl_s / 4
        next_beat_s = time.monotonic()
        idle_beats = 0
        while not self._stopping.is_set():
            if self._nudged.wait(max(0.0, next_beat_s - time.monotonic())):
                self._stopping.wait(ACK_GATHER_S)
                self._nudged.clear()
                self._quietly(self.ledger.flush)
            if time.monotonic() < next_beat_s:
                continue
            next_beat_s = time.monotonic() + interval_s
            self._quietly(self._beat)
            idle_beats = idle_beats + 1 if self.ledger.book.is_idle() else 0
            if idle_beats > 4 and self._retire():
                return

    def _beat(self) -> None:
        beats = self.ledger.beat()
        self.ledger.sweep_abandoned()
        self.ledger.recover_if_due()
        self.ledger.flush()
        reclaim_overdue(self.ledger.store, self._observer, beats, time.monotonic())

    def _quietly(self, act: Callable[[], object]) -> None:
        """What fails here is tried again at the next beat; the consumer itself learns of a lost broker on its own."""
        try:
            act()
        except CONNECTION_ERRORS:
            self.ledger.expect_loss()
            logger.debug("lease upkeep failed, trying again", exc_info=True)
        except Exception:
            logger.exception("lease upkeep failed, trying again")

    def _retire(self) -> bool:
        with contextlib.suppress(*CONNECTION_ERRORS):
            return self.ledger.retire()
        return False

    def stop(self) -> None:
        """End the thread and give back everything."""
        self._stopping.set()
        self._nudged.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2)
        with contextlib.suppress(*CONNECTION_ERRORS, redis.RedisError):
            self.ledger.end()
        self.ledger.store.client.close()
        self.ledger.store.client.connection_pool.disconnect()


_keepers: dict[tuple[str, ...], Keeper] = {}
_registry_lock = threading.Lock()


def ledger_for(
    identity: tuple[str, ...], connect: Callable[[], redis.Redis], prefix: str, lease_ttl_s: float
) -> Ledger:
    """This process's ledger for one broker and state prefix, made at the first call."""
    with _registry_lock:
        keeper = _keepers.get(identity)
        if keeper is None:
            keeper = Keeper(Ledger(ClaimStore(connect(), StateKeys(prefix)), lease_ttl_s=lease_ttl_s))
            _keepers[identity] = keeper
        return keeper.ledger


def ledgers() -> list[Ledger]:
    """All ledgers of this process."""
    with _registry_lock:
        return [keeper.ledger for keeper in _keepers.values()]


def close_ledgers() -> None:
    """Give back everything this process holds, pinned or not, and forget all ledgers. Runs at exit by itself."""
    with _registry_lock:
        keepers = list(_keepers.values())
        _keepers.clear()
    for keeper in keepers:
        keeper.stop()


def _forget_in_child() -> None:
    """A forked child holds nothing of its parent's."""
    global _registry_lock
    _registry_lock = threading.Lock()
    _keepers.clear()


atexit.register(close_ledgers)
os.register_at_fork(after_in_child=_forget_in_child)


def pin(tag: int) -> bool:
    """`Ledger.pin` for a message's `delivery_tag`, whichever ledger holds it.

    Inside a Celery task the tag is `self.request.properties["delivery_tag"]`.
    """
    return any(ledger.book.is_held(tag) and ledger.pin(tag) for ledger in ledgers())


def unpin(tag: int) -> None:
    """`Ledger.unpin`, whichever ledger holds the tag."""
    for ledger in ledgers():
        ledger.unpin(tag)
