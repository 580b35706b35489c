"""Requests per minute: one bucket per tenant, shared by all gateways, timed by the state store's clock alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from muai_producers.store import Store

# ARGV: per charge a key, requests per minute, and what is taken. A bucket is kept as the moment at which it will be
# full again, which is all that there is to know of it. Answers milliseconds to wait, 0 where the charge was taken.
CHARGE = """
local clock = redis.call('TIME')
local now_ms = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local waits = {}
for i = 1, #ARGV, 3 do
  local interval_ms = 60000 / tonumber(ARGV[i + 1])
  local full_at_ms = math.max(now_ms, tonumber(redis.call('GET', ARGV[i]) or '0'))
  local after_ms = full_at_ms + tonumber(ARGV[i + 2]) * interval_ms
  local wait_ms = math.ceil(after_ms - now_ms - 60000)
  if wait_ms > 0 then
    waits[#waits + 1] = wait_ms
  else
    waits[#waits + 1] = 0
    redis.call('SET', ARGV[i], string.format('%.3f', after_ms), 'PX', math.max(1, math.ceil(after_ms - now_ms)))
  end
end
return waits
"""


@dataclass(frozen=True, slots=True)
class Charge:
    """Requests that a tenant is about to make."""

    tenant: str
    requests_per_minute: int
    num_requests: int


class Rates:
    """The tenants' buckets: each holds one minute's requests and fills evenly.

    Raises:
        redis.exceptions.RedisError: the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._prefix = f"{store.keys.prefix}:rate:"
        client: Any = store.client
        self._charge = client.register_script(CHARGE)

    def take(self, charges: Sequence[Charge]) -> list[float]:
        """Take each charge that its bucket has room for; returns the seconds to wait, 0.0 where it was taken."""
        args: list[Any] = []
        for charge in charges:
            args += (self._prefix + charge.tenant, charge.requests_per_minute, charge.num_requests)
        return [wait_ms / 1000 for wait_ms in self._charge(keys=[], args=args)]
