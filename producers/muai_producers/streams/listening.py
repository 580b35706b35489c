"""Hearing of streams: one thread and one subscription per process, however many read, and each stream fetched once.

As with results, a notification says where to look, and the state store says what is true: one that is lost delays a
piece by at most `RECHECK_S`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import redis

from muai_producers.store import META_PREFIX, TERMINAL, StoredState
from muai_producers.streams.store import read_entry
from muai_producers.streams.text import TextLog

if TYPE_CHECKING:
    from muai_producers.store import Store

log = logging.getLogger(__name__)
RECHECK_S = 2.0
FETCHED_TOGETHER = 500
Wake = Callable[[], None]


class Feed:
    """What is known of one request's text, for all who read it in this process.

    Written by the listening thread; read by anybody. It holds the text once, and each reader remembers how far it has
    come, so that a slow one keeps nobody waiting and takes no room.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.log = TextLog()
        self.state: StoredState | None = None
        """The terminal state, once there is one."""
        self.wakes: dict[object, Wake] = {}
        self.last_entry = b"0-0"
        self.is_torn = False
        """Whether a part of the text is missing: only the result can tell more."""

    def add(self, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> bool:
        """Take in entries of the stream; returns whether there is news for the readers.

        All of them at once: a reader that goes on from where it was must not see less than there is.
        """
        text_log, texts, num_chars = self.log, list[str](), self.log.num_chars
        for entry_id, fields in entries:
            self.last_entry = entry_id
            entry = read_entry(fields)
            if entry.restarts:
                text_log, texts, num_chars = TextLog(), [], 0
                self.is_torn = False
            self.is_torn = self.is_torn or entry.chars_before != num_chars
            if not self.is_torn:
                texts.append(entry.text)
                num_chars += len(entry.text)
        if texts:
            text_log.append("".join(texts))
            self.log = text_log
        return bool(texts)


class Subscription:
    """A reader's interest in one feed, until closed."""

    def __init__(self, listener: StreamListener, feed: Feed) -> None:
        self.feed = feed
        self._listener = listener

    def close(self) -> None:
        """Hear no more of it."""
        self._listener.unsubscribe(self)


class StreamListener:
    """Keeps the feeds of all requests that somebody reads.

    Args:
        client: a Redis client; the listening thread subscribes and fetches through it.
        store: reads the terminal states, on the listening thread only.
    """

    def __init__(self, client: redis.Redis, store: Store) -> None:
        self._client: Any = client
        self._store = store
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed] = {}
        self._pubsub: Any = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def subscribe(self, request_id: str, wake: Wake) -> Subscription:
        """Follow a request; `wake` is called, from the listening thread, whenever its feed has news, and must return at
        once. What the feed has already is nobody's news: look at it once.
        """
        with self._lock:
            feed = self._feeds.setdefault(request_id, Feed(request_id))
            subscription = Subscription(self, feed)
            feed.wakes[subscription] = wake
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="muai-streams", daemon=True)
                self._thread.start()
            elif self._pubsub is not None:
                # The confirmation makes the thread look, so that nothing falls between the look and the subscription.
                self._attempt(lambda: self._pubsub.subscribe(*self._channels(request_id)))
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """See `Subscription.close`."""
        feed = subscription.feed
        with self._lock:
            feed.wakes.pop(subscription, None)
            if not feed.wakes and self._feeds.get(feed.request_id) is feed:
                del self._feeds[feed.request_id]
                if self._pubsub is not None:
                    self._attempt(lambda: self._pubsub.unsubscribe(*self._channels(feed.request_id)))

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def _channels(self, request_id: str) -> tuple[str, str]:
        return self._store.keys.stream(request_id), META_PREFIX + request_id

    @staticmethod
    def _attempt(send: Callable[[], None]) -> None:
        """A connection that breaks here is found broken by the thread, which subscribes to everything anew."""
        try:
            send()
        except redis.RedisError as error:
            log.debug("the subscription is broken: %s", error)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                self._connect()
                self._receive()
            except redis.RedisError as error:
                log.warning("listening for streams: %s; trying again", error)
                self._disconnect()
                self._closed.wait(0.5)
        self._disconnect()

    def _connect(self) -> None:
        pubsub = self._client.pubsub()
        with self._lock:
            channels = [channel for request_id in self._feeds for channel in self._channels(request_id)]
            # The first is there so that the connection is one of subscriptions though nobody reads.
            pubsub.subscribe(self._store.keys.stream(""), *channels)
            self._pubsub = pubsub

    def _disconnect(self) -> None:
        with self._lock:
            pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _receive(self) -> None:
        checked_s = time.monotonic()
        pubsub, prefix = self._pubsub, self._store.keys.stream("")
        while not self._closed.is_set():
            dirty: dict[str, None] = {}
            message = pubsub.get_message(timeout=0.5)
            while message is not None:
                if message["type"] in ("message", "subscribe"):
                    channel = message["channel"].decode()
                    dirty[channel.removeprefix(META_PREFIX).removeprefix(prefix)] = None
                message = pubsub.get_message(timeout=0.0) if len(dirty) < FETCHED_TOGETHER else None
            if time.monotonic() - checked_s > RECHECK_S:
                checked_s = time.monotonic()
                dirty = dict.fromkeys(list(self._feeds))
            self._look(list(dirty))

    def _look(self, request_ids: Sequence[str]) -> None:
        with self._lock:
            feeds = [self._feeds[request_id] for request_id in request_ids if request_id in self._feeds]
        for start in range(0, len(feeds), FETCHED_TOGETHER):
            self._fetch(feeds[start : start + FETCHED_TOGETHER])

    def _fetch(self, feeds: Sequence[Feed]) -> None:
        """Bring feeds up to date. The stream is asked first: what comes between the two questions is in the result."""
        by_key = {self._store.keys.stream(feed.request_id).encode(): feed for feed in feeds}
        found = self._client.xread({key: feed.last_entry for key, feed in by_key.items()})
        news = {by_key[key] for key, entries in _by_stream(found) if by_key[key].add(entries)}
        open_feeds = [feed for feed in feeds if feed.state is None]
        for feed, state in zip(open_feeds, self._store.states([feed.request_id for feed in open_feeds]), strict=True):
            if state is not None and state.status in TERMINAL:
                feed.state = state
                news.add(feed)
        with self._lock:
            wakes = [wake for feed in feeds if feed in news or feed.state for wake in feed.wakes.values()]
        for wake in wakes:
            wake()


def _by_stream(found: Any) -> Any:
    """Pairs of stream and entries, as protocol 2 and protocol 3 of Redis give them."""
    if isinstance(found, dict):
        return [(key, [entry for part in parts for entry in part]) for key, parts in found.items()]
    return found
