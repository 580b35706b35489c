"""Who calls: the key of a request, the tenant that it belongs to, and what that tenant may do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import redis
from starlette.requests import Request

from muai_producers.errors import BrokerError, CapacityError
from muai_producers.gateway.coalescing import Coalescer
from muai_producers.gateway.failures import UnauthorizedError
from muai_producers.gateway.sessions import Sessions, spoken_for
from muai_producers.keys import NO_LIMITS, KeyRecord, Keys, TenantLimits, id_of, matches
from muai_producers.rates import Charge, Rates

CALLER_KEY = "muai.caller"
"""Where the ASGI scope keeps the caller."""
MAX_KNOWN = 10_000
DEFAULT_TENANT = "default"


class RateLimitedError(CapacityError):
    """The tenant's requests per minute are used up."""

    code = "rate_limited"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent an HTTP request."""

    tenant: str = DEFAULT_TENANT
    limits: TenantLimits = NO_LIMITS
    is_operator: bool = False
    """Whether the console shows and does for it what concerns the whole installation."""
    is_confined: bool = False
    """Whether other tenants' requests do not exist for this one. Without keys everybody is the same caller."""
    who: str = "somebody over HTTP, without a key"
    """For whoever reads later who it was."""

    def sees(self, tenant: str) -> bool:
        """Whether what belongs to `tenant` exists for this caller."""
        return not self.is_confined or tenant == self.tenant


ANYBODY = Caller(is_operator=True)


def caller_of(request: Request) -> Caller:
    """Who sent this request."""
    caller: Caller = request.scope.get(CALLER_KEY, ANYBODY)
    return caller


class Doorkeeper:
    """Finds out who calls, and counts requests per minute. Belongs to one event loop.

    What is known of a key is used for `cache_s`, so that the state store is not asked for each request.

    Args:
        sessions: the console's, each of which stands for a key; None: there is no console.
        required: whether a key is needed; if not, keys are not even looked at: clients of other makes send some
            always.
    """

    def __init__(
        self,
        keys: Keys,
        rates: Rates,
        executor: Executor,
        *,
        required: bool,
        cache_s: float,
        sessions: Sessions | None = None,
    ) -> None:
        self._keys = keys
        self._rates = rates
        self._required = required
        self._cache_s = cache_s
        self._sessions = sessions
        self._known: dict[str, tuple[float, KeyRecord | None]] = {}
        self._lookups: Coalescer[str, KeyRecord | None] = Coalescer(self._find, executor, max_items=500)
        self._session_lookups: Coalescer[str, str | None] = Coalescer(self._key_ids, executor, max_items=500)
        self._charges: Coalescer[Charge, float] = Coalescer(self._take, executor, max_items=500)

    async def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who sends these headers: by a key, or by a session of the console's with its page's token beside it.

        Raises:
            UnauthorizedError: no key, or none that is known.
            BrokerError: the state store does not answer.
        """
        if not self._required:
            return ANYBODY
        headers = tuple(headers)
        key = _presented(headers)
        if key is None and self._sessions is not None and (session := spoken_for(headers)) is not None:
            return await self.of_session(session)
        if key is None:
            raise UnauthorizedError("an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY")
        return _caller(await self.key(key))

    @property
    def required(self) -> bool:
        """Whether a key is needed."""
        return self._required

    async def key(self, key: str) -> KeyRecord:
        """The record of a key.

        Raises:
            UnauthorizedError: it is not known.
            BrokerError: the state store does not answer.
        """
        key_id = id_of(key)
        record = None if key_id is None else await self._record(key_id)
        if record is None or not matches(record, key):
            raise UnauthorizedError("this API key is not known: it was mistyped, or has been revoked")
        return record

    async def of_session(self, session: str) -> Caller:
        """Who has the session.

        Raises:
            UnauthorizedError: it has ended, or its key has been revoked.
            BrokerError: the state store does not answer.
        """
        if self._sessions is None:
            raise UnauthorizedError("there is no console, so there are no sessions of it")
        key_id = await self._session_lookups.add(session)
        record = None if key_id is None else await self._record(key_id)
        if record is None:
            raise UnauthorizedError("the session has ended; sign in again")
        return _caller(record)

    async def charge(self, caller: Caller, num_requests: int = 1) -> None:
        """Count requests against the caller's requests per minute.

        Raises:
            RateLimitedError: there is no room for them; nothing was counted.
        """
        allowed = caller.limits.requests_per_minute
        if allowed is None or num_requests == 0:
            return
        wait_s = await self._charges.add(Charge(caller.tenant, allowed, num_requests))
        if wait_s > 0:
            raise RateLimitedError(
                f"tenant {caller.tenant} may make {allowed} requests a minute, and has; try again in {wait_s:.1f} s",
                {"limit": "requests_per_minute", "allowed": allowed, "retry_after_s": wait_s},
            )

    async def _record(self, key_id: str) -> KeyRecord | None:
        now_s = time.monotonic()
        known = self._known.get(key_id)
        if known is not None and known[0] > now_s:
            return known[1]
        record = await self._lookups.add(key_id)
        if len(self._known) >= MAX_KNOWN:  # whoever tries keys at random must not fill the memory
            self._known.clear()
        self._known[key_id] = (now_s + self._cache_s, record)
        return record

    def _find(self, key_ids: Sequence[str]) -> list[KeyRecord | None]:
        return _asking(self._keys.find, key_ids)

    def _key_ids(self, sessions: Sequence[str]) -> list[str | None]:
        assert self._sessions is not None
        return _asking(self._sessions.key_ids, sessions)

    def _take(self, charges: Sequence[Charge]) -> list[float]:
        return _asking(self._rates.take, charges)


def _caller(record: KeyRecord) -> Caller:
    named = f" ({record.name})" if record.name else ""
    who = f"key {record.id}{named}, tenant {record.tenant}"
    return Caller(record.tenant, record.limits, is_operator=record.operator, is_confined=True, who=who)


def _asking(ask: Any, items: Sequence[Any]) -> list[Any]:
    try:
        answers: list[Any] = ask(items)
    except redis.RedisError as error:
        raise BrokerError(f"the state store does not answer: {error}") from error
    return answers


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in the headers; Authorization goes before X-API-Key."""
    other = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
        elif name == b"x-api-key":
            other = value.decode("latin-1").strip()
    return other
