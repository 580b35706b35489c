"""Deliveries that are to be made, in the state store. The script that writes a result puts its delivery here in the
same step, so that none is forgotten; claiming one moves it out of reach for a while, so that a process that dies with
it only delays it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from muai_producers.store import Store

# KEYS: deliveries, when each is due. ARGV: now, most to claim, until when the claims hold.
CLAIM = """
local ids = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])
local found = {}
for _, id in ipairs(ids) do
  local entry = redis.call('HGET', KEYS[1], id)
  if entry then
    redis.call('ZADD', KEYS[2], ARGV[3], id)
    found[#found + 1] = id
    found[#found + 1] = entry
  else
    redis.call('ZREM', KEYS[2], id)
  end
end
return found
"""
# KEYS: as CLAIM. ARGV: id, when it is due again, the entry. Gone in the meantime: it stays gone.
AGAIN = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
return 1
"""
DELIVERED, GIVEN_UP = "webhooks_delivered", "webhooks_given_up"


@dataclass(frozen=True, slots=True)
class Delivery:
    """Word of one request's end, to be posted."""

    request_id: str
    tenant: str
    url: str
    num_tries: int = 0
    """So far."""
    first_s: float = 0.0
    """When the first try began, wall clock; 0.0: there was none."""

    def entry(self) -> str:
        """As it is kept; the first two fields are written by the store's script."""
        return f"{self.tenant}\t{self.url}\t{self.num_tries}\t{self.first_s!r}"

    @classmethod
    def read(cls, request_id: str, entry: str) -> Delivery:
        """Inverse of `entry`."""
        tenant, url, *rest = entry.split("\t")
        num_tries, first_s = (int(rest[0]), float(rest[1])) if rest else (0, 0.0)
        return cls(request_id, tenant, url, num_tries, first_s)


class Outbox:
    """The deliveries of an installation.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._keys = [store.keys.webhooks, store.keys.webhooks_due]
        self._stats = store.keys.stats
        self._claim = self._client.register_script(CLAIM)
        self._again = self._client.register_script(AGAIN)

    def claim(self, most: int, hold_s: float, now_s: float | None = None) -> list[Delivery]:
        """Deliveries that are due; nobody else gets them for `hold_s`."""
        now_s = time.time() if now_s is None else now_s
        found = [raw.decode() for raw in self._claim(keys=self._keys, args=[now_s, most, now_s + hold_s])]
        return [Delivery.read(request_id, entry) for request_id, entry in zip(found[::2], found[1::2], strict=True)]

    def again(self, delivery: Delivery, due_s: float) -> None:
        """Put a delivery back that failed, with what its tries have come to."""
        self._again(keys=self._keys, args=[delivery.request_id, due_s, delivery.entry()])

    def settle(self, delivery: Delivery, outcome: str) -> None:
        """The delivery is made or given up, and counted as `DELIVERED` or `GIVEN_UP`."""
        pipe = self._client.pipeline(transaction=True)
        pipe.hdel(self._keys[0], delivery.request_id).zrem(self._keys[1], delivery.request_id)
        pipe.hincrby(self._stats, outcome, 1)
        pipe.execute()

    def num_waiting(self) -> int:
        """Deliveries that are neither made nor given up."""
        return int(self._client.hlen(self._keys[0]))
