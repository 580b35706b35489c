"""What the cache of conversations keeps, finds and lets go of."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from muai_config.optimization import CacheSettings
from muai_producers.wire import InferenceRequest
from muai_workers.kv_cache import CacheKey, KVCacheManager, ModelCache, common_prefix

MB = 1_000_000


@dataclass(frozen=True)
class Kept:
    """Stands in for tensors."""

    num_tokens: int
    num_bytes: int = MB

    def first(self, num_tokens: int) -> Kept:
        return Kept(num_tokens, self.num_bytes)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def manager(max_memory_mb: int = 3, clock: Clock | None = None, **options: object) -> KVCacheManager:
    settings = CacheSettings.model_validate({"max_memory_mb": max_memory_mb, **options})
    return KVCacheManager(settings, clock or Clock())


def key(conversation_id: str, tenant: str = "default", model: str = "m") -> CacheKey:
    return CacheKey(tenant, conversation_id, model)


def test_a_prompt_reuses_the_tokens_that_it_begins_with() -> None:
    cache = manager()
    cache.store_cache(key("a"), [1, 2, 3, 4], Kept(4))
    found = cache.get_cache(key("a"), [1, 2, 9, 4, 5])
    assert found is not None
    assert (found.num_tokens, found.kept.num_tokens) == (2, 2)
    assert cache.get_cache(key("a"), [7, 1, 2]) is None


def test_one_token_is_always_left_to_compute() -> None:
    cache = manager()
    cache.store_cache(key("a"), [1, 2, 3], Kept(3))
    for prompt, expected in (([1, 2, 3], 2), ([1, 2], 1)):
        found = cache.get_cache(key("a"), prompt)
        assert found is not None
        assert found.num_tokens == expected
    assert cache.get_cache(key("a"), [1]) is None


@pytest.mark.parametrize(
    "other", [key("b"), key("a", tenant="another"), key("a", model="other"), key("", tenant="defaulta")]
)
def test_nobody_else_finds_a_conversation(other: CacheKey) -> None:
    cache = manager()
    cache.store_cache(key("a"), [1, 2, 3], Kept(3))
    assert cache.get_cache(other, [1, 2, 3, 4]) is None


# Property 12: LRU eviction occurs on memory overflow
@pytest.mark.property(12)
@pytest.mark.parametrize(("policy", "gone"), [("lru", "b"), ("fifo", "a")])
def test_what_goes_first_is_the_policys(policy: str, gone: str) -> None:
    cache = manager(eviction_policy=policy)
    for name in ("a", "b", "c"):
        cache.store_cache(key(name), [1, 2], Kept(2))
    assert cache.get_cache(key("a"), [1, 2, 3]) is not None
    cache.store_cache(key("a"), [1, 2, 3], Kept(3))
    cache.store_cache(key("d"), [1, 2], Kept(2))
    assert [name for name in "abcd" if cache.get_cache(key(name), [1, 2, 3]) is None] == [gone]
    assert cache.used_bytes == 3 * MB
    assert cache.get_stats(["m"])["m"].evictions == 1


def test_a_later_turn_replaces_the_earlier_and_is_no_eviction() -> None:
    cache = manager()
    for size in (1, 2, 3):
        assert cache.store_cache(key("a"), [1, 2], Kept(2, size * MB))
    assert not cache.store_cache(key("a"), [1, 2], Kept(2, 4 * MB))
    stats = cache.get_stats(["m"])["m"]
    assert (stats.entries, stats.used_bytes, stats.evictions, cache.used_bytes) == (0, 0, 0, 0)


def test_a_conversation_that_ends_or_falls_silent_is_forgotten() -> None:
    clock = Clock()
    cache = manager(clock=clock, conversation_ttl_s=60)
    for name in ("ended", "silent", "alive"):
        cache.store_cache(key(name), [1, 2], Kept(2))
    cache.end_conversation("another", "ended")
    assert cache.used_bytes == 3 * MB
    cache.end_conversation("default", "ended")
    assert cache.used_bytes == 2 * MB
    clock.now_s = 50.0
    assert cache.get_cache(key("alive"), [1, 2, 3]) is not None
    clock.now_s = 100.0
    assert cache.get_stats(["m"])["m"].entries == 1
    assert cache.get_cache(key("alive"), [1, 2, 3]) is not None


def test_an_unloaded_model_leaves_nothing_and_keeps_nothing_more() -> None:
    cache = manager()
    mine, other = ModelCache(cache, "m"), ModelCache(cache, "other")
    request = InferenceRequest(id="1", model="m", inputs={"prompt": "x"}, conversation_id="a")
    mine.keep(request, [1, 2], Kept(2))
    other.keep(request, [1, 2], Kept(2))
    mine.close()
    assert cache.used_bytes == MB
    mine.keep(request, [1, 2], Kept(2))
    assert (cache.used_bytes, mine.find(request, [1, 2, 3])) == (MB, None)
    assert cache.get_stats(["m"])["m"].misses == 0
    assert other.find(request, [1, 2, 3]) is not None


def test_requests_without_a_conversation_and_a_cache_that_is_off_keep_nothing() -> None:
    cache, off = manager(), manager(enabled=False)
    alone = InferenceRequest(id="1", model="m", inputs={"prompt": "x"})
    ModelCache(cache, "m").keep(alone, [1, 2], Kept(2))
    assert ModelCache(cache, "m").find(alone, [1, 2, 3]) is None
    assert (cache.used_bytes, cache.get_stats(["m"])["m"].misses) == (0, 0)
    assert not off.store_cache(key("a"), [1, 2], Kept(2))
    assert off.get_cache(key("a"), [1, 2, 3]) is None
    assert off.get_stats(["m"]) == {}


# Property 14: Cache hit rates are tracked
@pytest.mark.property(14)
def test_hits_are_counted_by_model() -> None:
    cache = manager()
    cache.get_cache(key("a"), [1, 2, 3])
    cache.store_cache(key("a"), [1, 2, 3], Kept(3))
    cache.get_cache(key("a"), [1, 2, 3, 4, 5])
    cache.get_cache(key("a", model="other"), [1])
    stats = cache.get_stats(["m", "other", "idle"])
    assert (stats["m"].hits, stats["m"].misses, stats["m"].hit_tokens, stats["m"].prompt_tokens) == (1, 1, 3, 8)
    assert (stats["other"].hits, stats["other"].misses) == (0, 1)
    assert stats["idle"].prompt_tokens == 0
    assert stats["m"].max_bytes == 3 * MB


def test_memory_that_is_needed_is_freed() -> None:
    cache = manager()
    for name in ("a", "b", "c"):
        cache.store_cache(key(name), [1, 2], Kept(2))
    assert cache.evict(1) == MB
    cache.reconfigure(CacheSettings(max_memory_mb=1, eviction_policy="fifo"))
    assert cache.used_bytes == MB
    assert cache.evict_all() == MB
    assert (cache.used_bytes, cache.evict_all()) == (0, 0)
    assert cache.get_stats(["m"])["m"].evictions == 3


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 9, 3], 1), ([4], [5], 0)],
)
def test_common_prefix(first: list[int], second: list[int], expected: int) -> None:
    assert common_prefix(first, second) == common_prefix(second, first) == expected
