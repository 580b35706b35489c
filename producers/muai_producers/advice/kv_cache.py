"""Advice on keys and values: how much room they need, in how many bits, and what is kept of earlier prompts. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from muai_producers.advice.estimates import WORTH_IT, estimate
from muai_producers.advice.proposals import LOW_EFFORT, RESTART, Proposal, change, gigabytes, has
from muai_producers.advice.records import Bottleneck, KVCacheOptimization, OptimizationType
from muai_producers.advice.situation import Situation

CACHE_KEY = "optimization.cache.max_memory_mb"
SAFE_HEADROOM, BARE_HEADROOM = 8, 4
"""Times what is in use now."""
ROOM_PERCENT = 80.0
LEAST_CACHE_MB = 64
_KIND = OptimizationType.KV_CACHE


class KVCacheOptimizer:
    """See the module."""

    def propose(self, situation: Situation, found: Collection[Bottleneck]) -> list[Proposal]:
        """What it would have done."""
        looks = self._ours if situation.is_ours else self._servers
        return list(looks(situation, found))

    def _servers(self, now: Situation, found: Collection[Bottleneck]) -> Iterator[Proposal]:
        makers = []
        if has(found, "memory_pressure"):
            makers.append(_fewer_bits)
        if has(found, "cache_inefficiency") and now.prefix_caching is False:
            makers.append(_prefix_caching)
        if has(found, "low_utilization"):
            makers.append(_less_reserved)
        yield from filter(None, (maker(now) for maker in makers))

    def _ours(self, now: Situation, found: Collection[Bottleneck]) -> Iterator[Proposal]:
        makers = []
        if has(found, "memory_pressure"):
            makers.append(_smaller_cache)
        elif has(found, "cache_inefficiency"):
            makers.append(_larger_cache)
        yield from filter(None, (maker(now) for maker in makers))


def _fewer_bits(now: Situation) -> Proposal | None:
    now_bytes = now.kv_item_bytes
    if now_bytes <= 1 or now.device == "cpu":
        return None
    saved, each = 1 - 1 / now_bytes, now.kv_token_bytes
    told = f"a number of the keys and values has 1 byte instead of {now_bytes:g}"
    if each is not None:
        told += f": {each / 1024:.0f} KiB for each token become {each / now_bytes / 1024:.0f}"
    reason = "Keys and values in 8 bits leave room for more requests at once, and for longer ones"
    if now.kv_capacity_tokens:
        reason += f": {now_bytes * now.kv_capacity_tokens:.0f} tokens instead of {now.kv_capacity_tokens:.0f}"
    return Proposal(
        _KIND,
        "Keep keys and values in 8 bits",
        "Running requests hold nearly more keys and values than there is room for; the rest is computed again.",
        (change(now, "kv_cache_dtype", "fp8", reason),),
        (estimate("memory reduction", saved, saved, told, of="keys and values"),),
        RESTART,
        KVCacheOptimization(dtype="fp8"),
        against=("memory_pressure",),
        risks=("Answers change a little; compare them on your own prompts",),
        prerequisites=("A GPU and an attention backend that take fp8 keys and values",),
    )


def _prefix_caching(now: Situation) -> Proposal | None:
    share = now.share_of_total(now.prefill_ms)
    if share is None or share < WORTH_IT:
        return None
    told = (
        f"at most all of the prompts' computation, which is {now.prefill_ms:.0f} of a request's {now.total_ms:.0f} ms; "
        "nothing where no prompt begins like another"
    )
    return Proposal(
        _KIND,
        "Look for prompts' beginnings in the cache",
        "Prompts are long, and each is computed from its first token on.",
        (change(now, "enable_prefix_caching", True, "What several prompts begin with is computed once"),),
        (estimate("latency reduction", 0.0, share, told),),
        RESTART,
        KVCacheOptimization(enable_prefix_caching=True),
        against=("cache_inefficiency",),
        risks=("Whoever measures response times can tell whether a prompt was seen before",),
        prerequisites=("What prompts have in common stands at their beginning",),
    )


def _less_reserved(now: Situation) -> Proposal | None:
    capacity, each, used = now.kv_capacity_tokens, now.kv_token_bytes, now.kv_used_share
    if not capacity or each is None or used is None or now.context_tokens is None:
        return None
    longest = now.config.get("max_model_len")
    at_least = float(longest) if isinstance(longest, int) and 0 < longest < 2**53 else 4 * now.context_tokens[1]
    needs = [max(at_least, headroom * used * capacity) for headroom in (SAFE_HEADROOM, BARE_HEADROOM)]
    safe, bare = (1 - need / capacity for need in needs)
    if safe < WORTH_IT:
        return None
    wanted = math.ceil(needs[0] * each)
    told = (
        f"{gigabytes(capacity * each)} are reserved for keys and values and {used:.1%} are in use: room for "
        f"{SAFE_HEADROOM} to {BARE_HEADROOM} times that, and for the longest request, is left"
    )
    return Proposal(
        _KIND,
        "Reserve less memory for keys and values",
        "Nearly all of the memory that was set aside for keys and values is unused: it could serve another model.",
        (
            change(
                now, "kv_cache_memory_bytes", wanted, f"{needs[0]:.0f} tokens are {SAFE_HEADROOM} times what is held"
            ),
        ),
        (estimate("memory reduction", safe, bare, told, of="keys and values"),),
        RESTART,
        KVCacheOptimization(memory_bytes=wanted),
        against=("low_utilization",),
        risks=("The figure is of one moment: a busier hour needs more",),
        prerequisites=("The use of keys and values was watched over a busy day",),
    )


def _smaller_cache(now: Situation) -> Proposal | None:
    limit_mb, kept, total = now.config.get(CACHE_KEY), now.kept_bytes, now.memory_total_bytes
    if not isinstance(limit_mb, int) or not kept or not total or now.device == "cuda":
        return None
    wanted_mb = max(LEAST_CACHE_MB, math.ceil(kept / 2e6))
    saved = (kept - 1e6 * wanted_mb) / total
    if saved < WORTH_IT or wanted_mb >= limit_mb:
        return None
    told = f"kept conversations shrink from {gigabytes(kept)} to {wanted_mb} MB, of {gigabytes(total)} of memory"
    return Proposal(
        _KIND,
        "Keep less of conversations",
        "The host's memory is nearly full, and conversations that are kept have a good part of it.",
        (change(now, CACHE_KEY, wanted_mb, "Half of what is kept now"),),
        (estimate("memory reduction", saved, saved, told, of="the host"),),
        LOW_EFFORT,
        KVCacheOptimization(max_memory_mb=wanted_mb),
        against=("memory_pressure",),
        risks=("Later turns of conversations that are let go are computed from their beginning",),
    )


def _larger_cache(now: Situation) -> Proposal | None:
    limit_mb, share = now.config.get(CACHE_KEY), now.share_of_total(now.inference_ms)
    is_full = now.memory_percent is None or now.memory_percent > ROOM_PERCENT
    if not isinstance(limit_mb, int) or is_full or share is None or not now.lookups or not now.evictions:
        return None
    back = min(1.0, now.evictions / now.lookups)
    told = (
        f"{now.evictions:.0f} conversations were let go in {now.lookups:.0f} look-ups: at most {back:.0%} of requests "
        f"find more, and save at most the {share:.0%} of their time that is computing; nothing where none comes back"
    )
    high = back * share
    if high < WORTH_IT:
        return None
    return Proposal(
        _KIND,
        "Keep more of conversations",
        "Conversations are let go for want of room, while the memory is not full.",
        (change(now, CACHE_KEY, 2 * limit_mb, "Twice the room, for turns that come later"),),
        (estimate("latency reduction", 0.0, high, told),),
        LOW_EFFORT,
        KVCacheOptimization(max_memory_mb=2 * limit_mb),
        against=("cache_inefficiency",),
        risks=(f"Up to {limit_mb} MB more memory on each worker",),
        prerequisites=(f"{limit_mb} MB of memory are free on each worker",),
    )
