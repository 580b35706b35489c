"""`KVCacheManager`: what is kept of conversations in one process, and what goes when memory runs out.

It decides; it touches no tensor. What it keeps are opaque values that say how many bytes they hold and can be cut.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from muai_config.optimization import CacheSettings
from muai_workers.engines.base import CacheStatistics

BYTES_PER_MB = 1_000_000
EvictionPolicy = Literal["lru", "fifo"]


@dataclass(frozen=True)
class CacheKey:
    """Whose cache: nobody finds another tenant's, another conversation's or another model's."""

    tenant: str
    conversation_id: str
    model: str


class KeysAndValues(Protocol):
    """What a model computed for the first tokens of a text. Never changed once it is kept."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors, as they lie in memory."""
        ...

    @property
    def num_tokens(self) -> int: ...

    def first(self, num_tokens: int) -> KeysAndValues:
        """Those of the first tokens alone."""
        ...


@dataclass(frozen=True)
class Reuse:
    """What of a prompt need not be computed again."""

    num_tokens: int
    """At least 1, and always fewer than the prompt has: the last token's forward pass gives the next one."""
    kept: KeysAndValues


@dataclass(frozen=True)
class _Entry:
    ids: tuple[int, ...]
    """The tokens that `kept` stands for."""
    kept: KeysAndValues
    used_s: float


@dataclass
class _Count:
    """Of one model, since it was loaded."""

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    evictions: int = 0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((at for at in range(shorter) if first[at] != second[at]), shorter)


class KVCacheManager:
    """One budget of memory for the conversations of all models of an engine. Thread-safe.

    A conversation has at most one cache for each model: that of its latest turn.

    Args:
        settings: the budget, what goes first, and when a conversation counts as over. Where it is not enabled nothing
            is kept and nothing found.
        now_s: monotonic seconds.
    """

    def __init__(self, settings: CacheSettings, now_s: Callable[[], float] = time.monotonic) -> None:
        self._enabled = settings.enabled
        self._max_bytes = settings.max_memory_mb * BYTES_PER_MB
        self._policy: EvictionPolicy = settings.eviction_policy
        self._ttl_s = settings.conversation_ttl_s
        self._now_s = now_s
        self._entries: OrderedDict[CacheKey, _Entry] = OrderedDict()
        """What goes first stands first."""
        self._used_bytes = 0
        self._counts: dict[str, _Count] = {}
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def reconfigure(self, settings: CacheSettings) -> None:
        """Take another budget and eviction policy from now on; what is over a smaller budget goes at once."""
        with self._lock:
            self._max_bytes, self._policy = settings.max_memory_mb * BYTES_PER_MB, settings.eviction_policy
            self._make_room(0)

    def get_cache(self, key: CacheKey, ids: Sequence[int]) -> Reuse | None:
        """What is kept for the tokens that `ids` begins with; counted as a hit or a miss.

        Args:
            ids: the whole prompt.
        """
        if not self._enabled:
            return None
        with self._lock:
            self._forget_idle()
            count = self._counts.setdefault(key.model, _Count())
            count.prompt_tokens += len(ids)
            entry = self._entries.get(key)
            num_tokens = 0 if entry is None else min(common_prefix(entry.ids, ids), len(ids) - 1)
            if entry is None or num_tokens < 1:
                count.misses += 1
                return None
            count.hits += 1
            count.hit_tokens += num_tokens
            self._entries[key] = _Entry(entry.ids, entry.kept, self._now_s())
            if self._policy == "lru":
                self._entries.move_to_end(key)
        return Reuse(num_tokens, entry.kept.first(num_tokens))

    def store_cache(self, key: CacheKey, ids: Sequence[int], kept: KeysAndValues) -> bool:
        """Keep what was computed for `ids` in place of what was kept before; False: it does not fit the budget."""
        num_bytes = kept.num_bytes
        if not self._enabled:
            return False
        with self._lock:
            self._forget_idle()
            if num_bytes > self._max_bytes:
                if key in self._entries:
                    self._drop(key)
                return False
            before = self._entries.get(key)
            more_bytes = num_bytes - (0 if before is None else before.kept.num_bytes)
            self._make_room(more_bytes, spare=key)
            self._entries[key] = _Entry(tuple(ids), kept, self._now_s())
            self._used_bytes += more_bytes
            if self._policy == "lru":
                self._entries.move_to_end(key)
        return True

    def evict(self, required_bytes: int) -> int:
        """Free at least that many bytes, as far as there are any; returns how many were freed."""
        with self._lock:
            freed = 0
            while self._entries and freed < required_bytes:
                freed += self._evict_next()
            return freed

    def evict_all(self) -> int:
        """Free everything, because memory is needed for what runs; returns the bytes."""
        with self._lock:
            freed = 0
            while self._entries:
                freed += self._evict_next()
            return freed

    def end_conversation(self, tenant: str, conversation_id: str) -> None:
        """Free what is kept of a conversation, for every model."""
        with self._lock:
            for key in [one for one in self._entries if (one.tenant, one.conversation_id) == (tenant, conversation_id)]:
                self._drop(key)

    def drop_model(self, model: str) -> None:
        """Free what is kept for a model that was unloaded, and forget its counts."""
        with self._lock:
            for key in [one for one in self._entries if one.model == model]:
                self._drop(key)
            self._counts.pop(model, None)

    def get_stats(self, models: Collection[str]) -> Mapping[str, CacheStatistics]:
        """By model, for those that are named."""
        if not self._enabled:
            return {}
        with self._lock:
            self._forget_idle()
            return {model: self._statistics(model) for model in models}

    # -- under the lock ------------------------------------------------------------------------------------------

    def _statistics(self, model: str) -> CacheStatistics:
        count = self._counts.get(model, _Count())
        own = [entry.kept.num_bytes for key, entry in self._entries.items() if key.model == model]
        return CacheStatistics(
            used_bytes=sum(own),
            max_bytes=self._max_bytes,
            entries=len(own),
            hits=count.hits,
            misses=count.misses,
            hit_tokens=count.hit_tokens,
            prompt_tokens=count.prompt_tokens,
            evictions=count.evictions,
        )

    def _forget_idle(self) -> None:
        before_s = self._now_s() - self._ttl_s
        for key in [key for key, entry in self._entries.items() if entry.used_s < before_s]:
            self._drop(key)

    def _make_room(self, num_bytes: int, spare: CacheKey | None = None) -> None:
        while self._used_bytes + num_bytes > self._max_bytes and any(key != spare for key in self._entries):
            self._evict_next(spare)

    def _evict_next(self, spare: CacheKey | None = None) -> int:
        key = next(key for key in self._entries if key != spare)
        self._counts.setdefault(key.model, _Count()).evictions += 1
        return self._drop(key)

    def _drop(self, key: CacheKey) -> int:
        num_bytes = self._entries.pop(key).kept.num_bytes
        self._used_bytes -= num_bytes
        return num_bytes
