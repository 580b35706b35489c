"""Hearing of finished requests: one thread and one subscription per client, however many requests wait.

Notifications say where to look, and those of few small answers carry them; the state store says what is true. So a
lost notification delays a result by at most `RECHECK_S`, and never loses it; by `BUSY_RECHECK_S` while others arrive,
which shows that the subscription lives: to look at all that is open is costly where much is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis

from muai_producers.store import META_PREFIX, TERMINAL, Store

log = logging.getLogger(__name__)
RECHECK_S = 2.0
BUSY_RECHECK_S = 30.0
RECHECK_CHUNK = 1000
MAX_CARRIED = 1000
"""States kept that nobody has taken yet."""
CONFIRMED_S = 5.0
"""Longest wait for Redis to say that a subscription stands."""


class Watch:
    """Interest in some requests, until closed.

    `on_done` is called, from the listening thread, with each list of ids that have become terminal; an id may be
    named more than once.
    """

    def __init__(self, listener: ResultListener, ids: Iterable[str], on_done: Callable[[list[str]], None]) -> None:
        self.open_ids = set(ids)
        self.on_done = on_done
        self._listener = listener

    def close(self) -> None:
        """Stop listening for what is still open."""
        self._listener.unwatch(self)


class ResultListener:
    """Listens on a reply channel of its own, and on single requests' channels for requests that others submitted.

    Args:
        client: a Redis client for this purpose; the listener subscribes through it from its own thread.
        store: reads the states when rechecking; used from the listening thread only.
        channel: the reply channel that this client's requests name.
    """

    def __init__(self, client: redis.Redis, store: Store, channel: str) -> None:
        self._client = client
        self._store = store
        self._channel = channel
        self._lock = threading.Lock()
        self._watches: dict[str, list[Watch]] = {}
        self._pubsub: Any = None
        self._foreign: set[str] = set()
        self._carried: dict[str, bytes] = {}
        self._closed = threading.Event()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, ids: Sequence[str], on_done: Callable[[list[str]], None], *, own: bool = True) -> Watch:
        """Start hearing of `ids`. Whoever calls must look at the store once afterwards: what finished before counts.

        Args:
            own: the requests name this listener's channel; else each one's own channel is subscribed to.
        """
        self._start()
        watch = Watch(self, ids, on_done)
        with self._lock:
            for request_id in watch.open_ids:
                self._watches.setdefault(request_id, []).append(watch)
            if not own:
                channels = [META_PREFIX + request_id for request_id in watch.open_ids]
                self._foreign.update(channels)
                if self._pubsub is not None and channels:
                    self._pubsub.subscribe(*channels)
        return watch

    @property
    def is_listening(self) -> bool:
        """Whether the subscription stands, so that to watch what names this channel costs nothing."""
        return self._ready.is_set() and not self._closed.is_set()

    def take_carried(self, request_id: str) -> bytes | None:
        """The terminal state, as it is stored, that a request's notice carried; once."""
        with self._lock:
            return self._carried.pop(request_id, None)

    def unwatch(self, watch: Watch) -> None:
        """Forget what is still open in `watch`."""
        with self._lock:
            for request_id in watch.open_ids:
                remaining = [other for other in self._watches.get(request_id, ()) if other is not watch]
                if remaining:
                    self._watches[request_id] = remaining
                else:
                    self._watches.pop(request_id, None)
                    self._forget_foreign(request_id)
            watch.open_ids = set()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout=5.0)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="muai-results", daemon=True)
                self._thread.start()
        self._ready.wait(timeout=5.0)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                self._subscribe()
                self._ready.set()
                self._recheck()
                self._receive()
            except redis.RedisError as error:
                log.warning("listening for results: %s; trying again", error)
                self._closed.wait(0.5)
        if self._pubsub is not None:
            self._pubsub.close()

    def _subscribe(self) -> None:
        pubsub: Any = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        with self._lock:
            pubsub.subscribe(self._channel, *self._foreign)
            self._pubsub = pubsub
        # What is sent once this has returned finds its answer's notice heard.
        pubsub.get_message(timeout=CONFIRMED_S)

    def _receive(self) -> None:
        rechecked_s = heard_s = time.monotonic()
        while not self._closed.is_set():
            message = self._pubsub.get_message(timeout=0.5)
            now_s = time.monotonic()
            if message is not None:
                self._heard(message)
                heard_s = now_s
            if now_s - max(rechecked_s, heard_s) > RECHECK_S or now_s - rechecked_s > BUSY_RECHECK_S:
                self._recheck()
                rechecked_s = time.monotonic()

    def _heard(self, message: dict[str, Any]) -> None:
        channel = message["channel"].decode()
        if channel == self._channel:
            self._done([self._read(line) for line in message["data"].split(b"\n")])
        elif (
            message["data"][:13] in (b'{"status":"SU', b'{"status":"FA')
            or message["data"][:18] == b'{"status":"REVOKED'
        ):
            self._done([channel.removeprefix(META_PREFIX)])

    def _read(self, line: bytes) -> str:
        """The id in a notice's line; what it carries is kept, where somebody waits for it."""
        name, _, meta = line.partition(b" ")
        request_id = name.decode()
        if meta:
            with self._lock:
                if request_id in self._watches:
                    if len(self._carried) >= MAX_CARRIED:  # whoever waited has gone
                        del self._carried[next(iter(self._carried))]
                    self._carried[request_id] = meta
        return request_id

    def _recheck(self) -> None:
        with self._lock:
            ids = list(self._watches)
        for start in range(0, len(ids), RECHECK_CHUNK):
            chunk = ids[start : start + RECHECK_CHUNK]
            states = self._store.states(chunk)
            found = zip(chunk, states, strict=True)
            self._done([request_id for request_id, state in found if state and state.status in TERMINAL])

    def _done(self, ids: Sequence[str]) -> None:
        told: dict[Watch, list[str]] = {}
        with self._lock:
            for request_id in ids:
                for watch in self._watches.pop(request_id, ()):
                    told.setdefault(watch, []).append(request_id)
                    watch.open_ids.discard(request_id)
                self._forget_foreign(request_id)
        for watch, finished in told.items():
            watch.on_done(finished)

    def _forget_foreign(self, request_id: str) -> None:
        channel = META_PREFIX + request_id
        if channel in self._foreign:
            self._foreign.discard(channel)
            if self._pubsub is not None:
                self._pubsub.unsubscribe(channel)
