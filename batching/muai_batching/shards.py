"""Several collectors: each batch key belongs to one of them at a time, so that their batches stay full.

Batch keys are spread over `queue.collector_shards` shards, and shards over the live collectors by leases in the state
store. A collector keeps the requests of its own shards and passes the others on to their shards' queues. A collector
that dies loses its leases; the others take its shards over and find on their queues what it had not sent.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

from muai_batching.assembler import BatchKey
from muai_config.queues import shard_queue
from muai_producers.store import Store

# ARGV: key prefix, number of shards, collector, lease in ms, most shards that it may hold. Returns those it holds.
_CLAIM = """
local held, free = {}, {}
for shard = 0, tonumber(ARGV[2]) - 1 do
  local key = ARGV[1] .. shard
  local owner = redis.call('GET', key)
  if owner == ARGV[3] and #held < tonumber(ARGV[5]) then
    redis.call('PEXPIRE', key, ARGV[4])
    held[#held + 1] = shard
  elseif owner == ARGV[3] then
    redis.call('DEL', key)
  elseif not owner then
    free[#free + 1] = shard
  end
end
for _, shard in ipairs(free) do
  if #held < tonumber(ARGV[5]) then
    redis.call('SET', ARGV[1] .. shard, ARGV[3], 'PX', ARGV[4])
    held[#held + 1] = shard
  end
end
return held
"""


def shard_of(key: BatchKey, num_shards: int) -> int:
    """The shard of a batch key; the same in every process."""
    return zlib.crc32(repr((key.model, key.task, key.chain)).encode()) % num_shards


def fair_share(num_shards: int, num_collectors: int) -> int:
    """Most shards that one of the live collectors holds."""
    return math.ceil(num_shards / max(1, num_collectors))


class ShardLeases:
    """One collector's claim on shards, to be renewed well within `lease_s`.

    Raises:
        redis.exceptions.RedisError: from `claim`, when the store does not answer.
    """

    def __init__(self, store: Store, name: str, num_shards: int, lease_s: float) -> None:
        self._client: Any = store.client
        self._prefix = f"{store.keys.prefix}:shard:"
        self._name = name
        self._num_shards = num_shards
        self._lease_ms = int(lease_s * 1000)

    def claim(self, num_collectors: int) -> frozenset[int]:
        """Renew what is held, take what is free, give up what is more than a fair share; returns what is held now."""
        most = fair_share(self._num_shards, num_collectors)
        held = self._client.eval(_CLAIM, 0, self._prefix, self._num_shards, self._name, self._lease_ms, most)
        return frozenset(int(shard) for shard in held)

    def release(self) -> None:
        """Give everything up, for the others to take at once."""
        self._client.eval(_CLAIM, 0, self._prefix, self._num_shards, self._name, self._lease_ms, 0)


def shard_owners(store: Store, num_shards: int) -> list[str]:
    """The collector that holds each shard; '' for none.

    Raises:
        redis.exceptions.RedisError: the store does not answer.
    """
    client: Any = store.client
    found = client.mget([f"{store.keys.prefix}:shard:{shard}" for shard in range(num_shards)])
    return ["" if owner is None else owner.decode() for owner in found]


class Sharding:
    """Which requests are this collector's: pure bookkeeping over what it holds.

    Until the first answer of the state store everything counts as its own.
    """

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards
        self.held: frozenset[int] | None = None

    def elsewhere(self, key: BatchKey) -> str | None:
        """The queue to which requests of a batch key are to be passed on; None when they are this collector's."""
        if self.num_shards <= 1 or self.held is None:
            return None
        shard = shard_of(key, self.num_shards)
        return None if shard in self.held else shard_queue(shard)
