"""Texts as they come, for all who read them through this gateway: one thread hears of all, and wakes who waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import redis

from muai_producers.errors import MuaiError
from muai_producers.gateway.sse import HEARTBEAT_S
from muai_producers.gateway.standing import Standing, standing_of
from muai_producers.store import Store
from muai_producers.streams.following import Follower
from muai_producers.streams.listening import StreamListener

if TYPE_CHECKING:
    from muai_producers.streams.text import StreamEvent


@dataclass(frozen=True)
class News:
    """What a reader is told at once; nothing at all where only time has passed."""

    events: list[StreamEvent] = field(default_factory=list)
    end: Standing | None = None
    """Once the request has finished."""
    error: MuaiError | None = None
    """What it finished with, if not with a result."""
    offset: str = ""
    """How far the reader has come by then."""


class StreamHub:
    """Readers of streams. Belongs to one event loop once `start` was called.

    Args:
        client: used by the listening thread alone.
    """

    def __init__(self, store: Store, client: redis.Redis) -> None:
        own_store = Store(client, prefix=store.keys.prefix, result_ttl_s=store.result_ttl_s)
        self._listener = StreamListener(client, own_store)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._woken: list[asyncio.Event] = []
        self._waiting: set[asyncio.Event] = set()
        self._hurrying = False

    def start(self) -> None:
        """Belong to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """End the listening thread."""
        self._listener.close()

    def hurry(self) -> None:
        """End all readings: the gateway is about to end, and another one goes on with them."""
        self._hurrying = True
        for waiting in self._waiting:
            waiting.set()

    async def read(
        self, request_id: str, after: str | None = None, *, patience_s: float = HEARTBEAT_S
    ) -> AsyncGenerator[News, None]:
        """Follow a request to its end, or to the gateway's. The last news has `end`, unless the gateway ended first.

        Args:
            after: the offset of the last event seen.
            patience_s: so often something is yielded in any case.
        Raises:
            InvalidRequestError: `after` is no offset.
        """
        awake = asyncio.Event()
        self._waiting.add(awake)
        follower = Follower(self._listener, request_id, after, lambda: self._wake(awake))
        try:
            while not self._hurrying:
                awake.clear()
                events = follower.take()
                if follower.finished:
                    assert follower.state is not None
                    yield News(events, standing_of(request_id, follower.state), follower.error, follower.offset)
                    return
                if events:
                    yield News(events)
                try:
                    await asyncio.wait_for(awake.wait(), patience_s)
                except TimeoutError:
                    yield News()
        finally:
            follower.close()
            self._waiting.discard(awake)

    def _wake(self, awake: asyncio.Event) -> None:
        """On the listening thread: the event loop is woken once, for all of them."""
        with self._lock:
            is_first = not self._woken
            self._woken.append(awake)
        if is_first and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            woken, self._woken = self._woken, []
        for awake in woken:
            awake.set()
