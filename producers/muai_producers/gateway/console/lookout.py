"""Looks at the installation for the console: however many watch, one look at a time, each kept for a moment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import redis

from muai_producers.connections import state_client
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import BrokerError, RequestNotFoundError
from muai_producers.gateway.callers import Caller
from muai_producers.gateway.console import telling
from muai_producers.gateway.console.records import DeadLetterList, Overview, RecentList, RequestWay
from muai_producers.gateway.health import Observer, health
from muai_producers.queue_depths import SHOWN_QUEUES, QueueDepth, queue_reader, read_depths
from muai_producers.recent import Recent
from muai_producers.store import META_PREFIX, Store

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
THREADS = 3
KEPT_S = 0.5
LOOK_TIMEOUT_S = 4.0
SHOWN_DEAD_LETTERS = 50
Found = TypeVar("Found")


@dataclass(frozen=True)
class Look:
    """What the state store counts and what waits at the broker, at one moment."""

    counts: telling.Counts | None
    """None: the state store does not answer."""
    depths: Mapping[str, QueueDepth]


class Lookout:
    """What the console knows. Belongs to one event loop; its connections are its own and give up soon.

    Raises:
        BrokerError: from every method but `overview`, when the state store does not answer.
    """

    def __init__(self, settings: Settings, observer: Observer, is_draining: Callable[[], bool]) -> None:
        self._settings = settings
        self._observer = observer
        # Threads of its own: however many watch, and whatever does not answer, requests are not kept waiting for it.
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="muai-console")
        self._is_draining = is_draining
        self._client = state_client(settings.queue.state_url, timeout_s=2.0)
        self._store = Store(self._client, prefix=settings.queue.key_prefix)
        self._recent = Recent(self._store)
        self._letters = DeadLetters(self._store)
        self._queues = queue_reader(settings, SHOWN_QUEUES)
        self._started_s = time.monotonic()
        self._looking: asyncio.Future[Look] | None = None
        self._looked_s = 0.0

    def on_settings(self, settings: Settings) -> None:
        """Tell by these settings from now on, as far as they are reloadable."""
        self._settings = settings

    async def overview(self, caller: Caller) -> Overview:
        """How things stand, as far as the caller may see; what does not answer is said, not raised."""
        picture, look = await asyncio.gather(self._observer.picture(), self._look())
        verdict = health(
            picture, self._settings, uptime_s=time.monotonic() - self._started_s, draining=self._is_draining()
        )
        now_s = time.time()
        has_state = picture.state_error is None and look.counts is not None
        reasons = verdict.reasons
        status = verdict.status
        if not has_state and picture.state_error is None:
            status, reasons = "unhealthy", ["the state store does not answer", *reasons]
        fleet, tenant = None, None if caller.is_operator else caller.tenant
        if caller.is_operator:
            fleet = telling.fleet_state(self._settings, picture.fleet, look.depths, look.counts, now_s)
        in_flight = None if look.counts is None else look.counts.in_flight
        if tenant is not None and has_state:
            in_flight = await self._in_flight_of(tenant)
        return Overview(
            taken_at=now_s,
            status=status,
            reasons=reasons,
            tenant=tenant,
            state_store=has_state,
            in_flight=in_flight,
            capacity=verdict.queue_capacity,
            answered=None if look.counts is None or tenant is not None else look.counts.answered,
            fleet=fleet,
        )

    async def recent(self, caller: Caller, limit: int) -> RecentList:
        """The last answers that the caller may see."""
        tenant = None if caller.is_operator else caller.tenant
        found = await self._ask(lambda: self._recent.newest(limit, tenant))
        return RecentList(data=[telling.recent_entry(request) for request in found])

    async def way(self, caller: Caller, request_id: str) -> RequestWay:
        """A request's way.

        Raises:
            RequestNotFoundError: no request of that id is known, or it is not the caller's: the two look the same.
        """
        meta, in_flight = await self._ask(lambda: self._read(request_id))
        if meta is not None or in_flight is not None:
            way = telling.request_way(request_id, meta, in_flight)
            if caller.is_operator or caller.sees(way.tenant or ""):
                return way
        raise RequestNotFoundError(
            f"no request {request_id[:100]!r} is known: it was never accepted, or its result has expired",
            {"id": request_id[:256]},
        )

    async def dead_letters(self, limit: int = SHOWN_DEAD_LETTERS) -> DeadLetterList:
        """The newest dead letters. For operators: who asks is not looked at here."""
        total, lines = await self._ask(lambda: (len(self._letters), self._letters.lines(limit)))
        return DeadLetterList(total=total, data=[telling.dead_letter_state(line) for line in lines])

    def close(self) -> None:
        """Close the connections."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._queues.close()
        self._client.close()

    # -- looking -------------------------------------------------------------------------------------------------

    async def _look(self) -> Look:
        if self._looking is None or (self._looking.done() and time.monotonic() - self._looked_s > KEPT_S):
            self._looking = asyncio.get_running_loop().run_in_executor(self._executor, self._look_now)
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), LOOK_TIMEOUT_S)
        except TimeoutError:
            return Look(None, {})

    def _look_now(self) -> Look:
        counts: telling.Counts | None = None
        depths: Mapping[str, QueueDepth] = {}
        try:
            counts = self._count()
        except redis.RedisError as error:
            log.warning("the state store does not answer: %s", error)
        if counts is not None or self._settings.queue.broker_url != self._settings.queue.state_url:
            try:
                depths = read_depths(self._queues)
            except BrokerError as error:
                log.warning("%s", error)
        self._looked_s = time.monotonic()
        return Look(counts, depths)

    def _count(self) -> telling.Counts:
        keys, pipe = self._store.keys, self._client.pipeline(transaction=False)
        pipe.hlen(keys.inflight)
        pipe.hmget(keys.stats, "answered", "duplicates_refused")
        pipe.xlen(keys.dead)
        in_flight, (answered, refused), dead = pipe.execute()
        return telling.Counts(int(in_flight), int(answered or 0), int(dead), int(refused or 0))

    async def _in_flight_of(self, tenant: str) -> int | None:
        counter: Any = lambda: self._client.hget(self._store.keys.load, f"t:{tenant}")  # noqa: E731 - typed badly
        try:
            return int(await self._ask(counter) or 0)
        except BrokerError:
            return None

    def _read(self, request_id: str) -> tuple[bytes | None, telling.InFlight | None]:
        pipe = self._client.pipeline(transaction=False)
        # In flight is asked first: what is answered between the two questions shows as answered.
        pipe.hget(self._store.keys.inflight, request_id)
        pipe.get(META_PREFIX + request_id)
        entry, meta = pipe.execute()
        if entry is None:
            return meta, None
        tenant, model, _, admitted_s, *_ = entry.decode().split("\t")
        return meta, telling.InFlight(tenant, model, float(admitted_s))

    async def _ask(self, ask: Callable[[], Found]) -> Found:
        def call() -> Found:
            try:
                return ask()
            except redis.RedisError as error:
                raise BrokerError(f"the state store does not answer: {error}") from error

        asked = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            return await asyncio.wait_for(asked, LOOK_TIMEOUT_S)
        except TimeoutError:
            raise BrokerError(f"the state store did not answer within {LOOK_TIMEOUT_S:g} s") from None
