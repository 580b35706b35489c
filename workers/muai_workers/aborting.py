"""Stopping what runs and is not wanted any more: cancelled by its client, or past its deadline.

Workers hear of cancellations on one channel, and look for themselves now and then, so that a lost notification delays
an abort and no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from muai_producers.store import TERMINAL, Store
from muai_producers.wire import InferenceRequest

log = logging.getLogger(__name__)
POLL_S = 0.5
RECHECK_S = 2.0


class Watched:
    """The requests of one run, and which of them have ended before their engine was done."""

    def __init__(self, requests: Sequence[InferenceRequest]) -> None:
        self.running = {request.id: request for request in requests}
        self.gone: set[str] = set()
        self.answered: set[str] = set()

    def answer(self, request_id: str) -> None:
        """The engine is done with the request while others of its run go on: nothing of it is left to stop."""
        self.answered.add(request_id)

    def is_gone(self, request_id: str) -> bool:
        """Whether the request has its end already: nothing more is to be done for it."""
        return request_id in self.gone


class AbortWatch:
    """Watches over running requests, from a thread of its own. Thread-safe.

    Args:
        abort: as `Engine.abort`.
        on_expired: told, on the watching thread, of each request whose deadline passes while it runs.
        wall_s: wall-clock seconds.
    """

    def __init__(
        self,
        store: Store,
        abort: Callable[[Collection[str]], None],
        on_expired: Callable[[InferenceRequest], None],
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._client: Any = store.client
        self._abort = abort
        self._on_expired = on_expired
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @contextmanager
    def watching(self, requests: Sequence[InferenceRequest]) -> Iterator[Watched]:
        """Watch over requests as long as they run."""
        watched = Watched(requests)
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="muai-aborts", daemon=True)
                self._thread.start()
        try:
            yield watched
        finally:
            with self._lock:
                self._watched.discard(watched)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(self._store.keys.revoked_channel)
                    self._receive(pubsub)
            except redis.RedisError as error:
                log.warning("cannot hear of cancelled requests: %s; trying again", error)
                self._expire()
                self._closed.wait(POLL_S)

    def _receive(self, pubsub: Any) -> None:
        checked_s = float("-inf")
        while not self._closed.is_set():
            if time.monotonic() - checked_s > RECHECK_S:
                checked_s = time.monotonic()
                self._recheck()
            message = pubsub.get_message(timeout=self._patience_s())
            if message is not None:
                self._drop(message["data"].decode().split("\n"))
            self._expire()
            self._repeat()

    def _patience_s(self) -> float:
        deadlines = [request.deadline for _, request in self._open() if request.deadline is not None]
        return min([POLL_S, *(max(0.01, deadline - self._wall_s()) for deadline in deadlines)])

    def _open(self) -> list[tuple[Watched, InferenceRequest]]:
        with self._lock:
            return [
                (watched, request)
                for watched in self._watched
                for request in watched.running.values()
                if request.id not in watched.gone and request.id not in watched.answered
            ]

    def _drop(self, request_ids: Collection[str]) -> None:
        """These are answered already: stop them."""
        named = set(request_ids)
        for watched, request in self._open():
            if request.id in named:
                watched.gone.add(request.id)
                self._abort([request.id])

    def _expire(self) -> None:
        now_s = self._wall_s()
        for watched, request in self._open():
            if request.deadline is not None and request.deadline <= now_s:
                watched.gone.add(request.id)
                self._on_expired(request)
                self._abort([request.id])

    def _recheck(self) -> None:
        ids = [request.id for _, request in self._open()]
        states = self._store.states(ids)
        found = zip(ids, states, strict=True)
        self._drop([request_id for request_id, state in found if state and state.status in TERMINAL])

    def _repeat(self) -> None:
        """An engine passes over what it has not begun: a request that was dropped while the model loaded, say."""
        with self._lock:
            gone = [request_id for watched in self._watched for request_id in watched.gone]
        if gone:
            self._abort(gone)
