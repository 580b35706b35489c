"""Results for those who wait: one listening thread, bulk look-ups, and a future for each who waits."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import redis

from muai_producers.errors import BrokerError, RequestNotFoundError
from muai_producers.gateway.callers import ANYBODY, Caller
from muai_producers.gateway.coalescing import Coalescer
from muai_producers.gateway.standing import Standing, read_owned, read_standing
from muai_producers.listening import ResultListener, Watch
from muai_producers.request_ids import new_owner, new_request_id, owner_of
from muai_producers.store import META_PREFIX, Store, read_entry

log = logging.getLogger(__name__)
LOOKUPS = 1000
"""Requests looked up in one round trip."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What the state store has on a request."""

    meta: bytes | None
    in_flight: bool
    tenant: str = ""
    """Whose request it is, where it is in flight; the stored state says it of those that are answered."""


class ResultHub:
    """Where requests stand, and word of their end.

    Args:
        listener_client: used by the listening thread alone.
        executor: runs the look-ups.
    """

    def __init__(self, store: Store, listener_client: redis.Redis, executor: Executor) -> None:
        self._store = store
        self._owner = new_owner()
        self.reply_channel = store.keys.reply_channel(self._owner)
        listener_store = Store(listener_client, prefix=store.keys.prefix, result_ttl_s=store.result_ttl_s)
        self._listener = ResultListener(listener_client, listener_store, self.reply_channel)
        self._lookups: Coalescer[str, Sight] = Coalescer(self.look_up, executor, max_items=LOOKUPS)
        self._executor = executor
        self._waiters: dict[str, list[asyncio.Future[bytes | None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: list[tuple[str, bytes | None]] = []
        self._lock = threading.Lock()
        self._hurrying = False

    def start(self) -> None:
        """Belong to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """End the listening thread."""
        self._listener.close()

    def new_id(self) -> str:
        """An id that names this hub, so that whoever cancels the request knows who listens for it."""
        return new_request_id(self._owner)

    def channel_of(self, request_id: str) -> str:
        """The reply channel of whoever submitted a request; a channel without listeners for ids of other makes."""
        return self._store.keys.reply_channel(owner_of(request_id))

    # -- waiting, on the event loop ------------------------------------------------------------------------------

    async def look(self, request_id: str, caller: Caller = ANYBODY) -> Standing:
        """Where a request stands.

        Raises:
            RequestNotFoundError: no request of that id is known, or it is not the caller's: the two look the same.
            BrokerError: the state store does not answer.
        """
        sight = await self._lookups.add(request_id)
        if sight.meta is not None or sight.in_flight:
            standing, tenant = read_owned(request_id, sight.meta)
            if caller.sees(sight.tenant or tenant):
                return standing
        raise RequestNotFoundError(
            f"no request {request_id[:100]!r} is known: it was never accepted, or its result has expired",
            {"id": request_id[:256]},
        )

    def expect(self, request_id: str) -> asyncio.Future[bytes | None]:
        """A future of the stored terminal state, for a request that `listen` is about to be told of.

        Whoever calls must pass it to `settle`.
        """
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(request_id, []).append(future)
        return future

    async def settle(self, request_id: str, future: asyncio.Future[bytes | None], timeout_s: float) -> Standing:
        """Where the request stands when it is finished, or else when `timeout_s` is over."""
        try:
            meta = await self._within(future, timeout_s)
        finally:
            self.forget(request_id, future)
        return read_standing(request_id, meta) if meta is not None else await self.look(request_id)

    async def wait(self, request_id: str, timeout_s: float, caller: Caller = ANYBODY) -> Standing:
        """As `look`, but a request that is not finished is waited for, `timeout_s` at most."""
        standing = await self.look(request_id, caller)
        if standing.finished or timeout_s <= 0 or self._hurrying:
            return standing
        future = self.expect(request_id)
        loop = asyncio.get_running_loop()
        watch: Watch | None = None
        try:
            watch = await loop.run_in_executor(self._executor, self._listen_to, request_id)
            standing = await self.look(request_id)  # it may have finished before anybody listened
            if standing.finished:
                return standing
            meta = await self._within(future, timeout_s)
        finally:
            self.forget(request_id, future)
            if watch is not None:
                watch.close()
        return read_standing(request_id, meta) if meta is not None else await self.look(request_id)

    def hurry(self) -> None:
        """Tell all who wait where their requests stand now: the gateway is about to end."""
        self._hurrying = True
        for futures in self._waiters.values():
            for future in futures:
                _resolve(future, None)

    async def _within(self, future: asyncio.Future[bytes | None], timeout_s: float) -> bytes | None:
        if self._hurrying and not future.done():
            return None
        timer = asyncio.get_running_loop().call_later(timeout_s, _resolve, future, None)
        try:
            return await future
        finally:
            timer.cancel()

    def forget(self, request_id: str, future: asyncio.Future[bytes | None]) -> None:
        """Nobody waits for this future any more."""
        futures = self._waiters.get(request_id)
        if futures is not None and future in futures:
            futures.remove(future)
            if not futures:
                del self._waiters[request_id]

    # -- hearing, on other threads -------------------------------------------------------------------------------

    def look_up(self, request_ids: Sequence[str]) -> list[Sight]:
        """What is known of each request, in one round trip.

        In flight is asked first: what is answered between the two questions shows as answered, never as unknown.
        """
        if not request_ids:
            return []
        pipe = self._store.client.pipeline(transaction=False)
        pipe.hmget(self._store.keys.inflight, request_ids)
        pipe.mget([META_PREFIX + request_id for request_id in request_ids])
        try:
            in_flight, metas = pipe.execute()
        except redis.RedisError as error:
            raise BrokerError(f"the state store does not answer: {error}") from error
        return [
            Sight(meta, entry is not None, "" if entry is None else read_entry(entry)[0])
            for meta, entry in zip(metas, in_flight, strict=True)
        ]

    def listen(self, request_ids: Sequence[str]) -> Watch:
        """Hear of requests that name this hub's channel and are not sent yet."""
        return self._listener.watch(request_ids, self._on_done)

    def _listen_to(self, request_id: str) -> Watch:
        own = owner_of(request_id) == self._owner
        return self._listener.watch([request_id], self._on_done, own=own)

    def _on_done(self, request_ids: list[str]) -> None:
        """Fetch what has finished, here on the listening thread: the event loop is woken once, with the results."""
        awaited = [request_id for request_id in request_ids if request_id in self._waiters]
        if not awaited:
            return
        metas = {request_id: self._listener.take_carried(request_id) for request_id in awaited}
        unknown = [request_id for request_id, meta in metas.items() if meta is None]
        try:
            metas |= {request_id: sight.meta for request_id, sight in zip(unknown, self.look_up(unknown), strict=True)}
        except BrokerError as error:
            # Each waiter then looks for itself, and tells its client if that fails too.
            log.warning("%d results could not be fetched: %s", len(unknown), error)
        with self._lock:
            is_first = not self._arrived
            self._arrived += metas.items()
        if is_first and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for request_id, meta in arrived:
            for future in self._waiters.pop(request_id, ()):
                _resolve(future, meta)


def _resolve(future: asyncio.Future[bytes | None], meta: bytes | None) -> None:
    if not future.done():
        future.set_result(meta)
