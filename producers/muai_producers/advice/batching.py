"""Advice on batching: how many requests should be run together, and how long they should wait for each other. Pure.

An engine that runs batch after batch takes a·n + b for n requests, fitted to all that it ran: so a slot serves
n/(a·n + b) of them in each unit of time. A vLLM server's step of decoding takes as long as reading the weights and
every running request's keys and values (see `quantization`), so more requests share the reading of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from muai_producers.advice.bottlenecks import IDLE_SHARE
from muai_producers.advice.estimates import WORTH_IT, Estimate, estimate
from muai_producers.advice.proposals import LOW_EFFORT, RESTART, Proposal, change, gigabytes, has
from muai_producers.advice.quantization import RIDGE_TOKENS
from muai_producers.advice.records import BatchingOptimization, Bottleneck, OptimizationType
from muai_producers.advice.situation import Situation

BATCHER = "optimization.batcher"
SIZE_KEY, TOKENS_KEY = f"{BATCHER}.max_batch_size", f"{BATCHER}.max_batch_tokens"
ADAPTIVE_KEY, TARGET_KEY = f"{BATCHER}.adaptive_batching", f"{BATCHER}.latency_target_ms"
LEAST_KEY, ENABLED_KEY = f"{BATCHER}.min_batch_size", f"{BATCHER}.enabled"
STEP = 2
"""A size is doubled at most: what comes after is measured first."""
MAX_SIZE = 4096
SURE = 2.0
"""Standard errors on either side of what was measured: 19 of 20 cases lie within."""
FULL_SHARE = 0.9
ROOM_SHARE = 0.9
PADDING_LEFT = (0.75, 0.5)
"""Of the padding, when batches of requests sorted by length are halved: half where lengths are spread evenly, since a
batch then spans half of the lengths; three quarters where they are not."""
_KIND = OptimizationType.BATCHING
_ALL_MODELS = "The setting is for all models of the installation"


class BatchingOptimizer:
    """See the module."""

    def propose(self, situation: Situation, found: Collection[Bottleneck]) -> list[Proposal]:
        """What it would have done."""
        looks = _ours if situation.is_ours else _servers
        return list(looks(situation, found))


# -- ours ------------------------------------------------------------------------------------------------------------


def _ours(now: Situation, found: Collection[Bottleneck]) -> Iterator[Proposal]:
    if not now.is_measured:
        return
    larger = None
    if has(found, "queueing") and not has(found, "memory_pressure"):
        larger = _larger_batches(now)
    elif not has(found, "queueing"):
        waiting = _no_waiting(now)
        if waiting is not None:
            yield waiting
    if larger is not None:
        yield larger
    elif has(found, "padding_waste"):
        smaller = _smaller_batches(now)
        if smaller is not None:
            yield smaller


def _larger_batches(now: Situation) -> Proposal | None:
    size = now.config.get(SIZE_KEY)
    if not isinstance(size, int) or not now.mean_batch or (now.p95_batch or 0.0) < FULL_SHARE * size:
        return None
    wanted = min(_bounds(now, size))
    gain = _gain_of_size(now, float(wanted))
    if wanted <= size or gain.high < WORTH_IT:
        return None
    return Proposal(
        _KIND,
        "Run more requests in one batch",
        "Requests wait although every batch is full.",
        (change(now, SIZE_KEY, wanted, "More requests share what a batch costs however large it is"),),
        (gain,),
        LOW_EFFORT,
        _batching(now, wanted),
        against=("queueing",),
        risks=("A batch takes longer, and more memory while it runs", _ALL_MODELS),
        prerequisites=("Memory for a batch of that size",),
    )


def _bounds(now: Situation, size: int) -> Iterator[int]:
    """Sizes that each thing allows."""
    yield min(STEP * size, MAX_SIZE)
    tokens = now.config.get(TOKENS_KEY)
    if isinstance(tokens, int) and now.prompt_tokens:
        yield max(size, math.floor(tokens / now.prompt_tokens))
    target = now.config.get(TARGET_KEY)
    if isinstance(target, int | float) and now.per_request_ms:
        yield max(size, math.floor((target - (now.per_batch_ms or 0.0)) / now.per_request_ms))


def _gain_of_size(now: Situation, wanted: float) -> Estimate:
    mean = now.mean_batch or 1.0
    a, b = now.per_request_ms, now.per_batch_ms
    if a is None or b is None or a <= 0:
        # A fit by which requests cost nothing has seen sizes that differ by less than the machine's moods.
        told = f"batches of {mean:.1f} on average were too much alike to tell what one costs apart from its requests"
        return estimate("throughput increase", 0.0, wanted / mean - 1, told)

    whole_ms = a * mean + b
    least, most = (min(max(b + sign * SURE * (now.per_batch_error_ms or 0.0), 0.0), whole_ms) for sign in (-1, 1))

    def gain(size: float, shared_ms: float) -> float:
        """What is not shared in a batch is its requests' own, however the line through the mean is turned."""
        return whole_ms / mean / ((whole_ms - shared_ms) / mean + shared_ms / size) - 1

    middle = (mean + wanted) / 2
    unsure = "" if now.per_batch_error_ms is None else f" (± {most - b:.2g} in 19 of 20 cases)"
    told = (
        f"a batch of n was measured to hold its slot for {a:.3g}·n + {b:.3g} ms, the latter{unsure} whatever n is: a "
        f"slot serves {1000 * mean / whole_ms:.0f} requests/s in batches of {mean:.1f}; they fill to between "
        f"{middle:.0f} and {wanted:.0f}"
    )
    return estimate("throughput increase", gain(middle, least), gain(wanted, most), told)


def _smaller_batches(now: Situation) -> Proposal | None:
    size, waste, mean = now.config.get(SIZE_KEY), now.padding_waste, now.mean_batch
    a, b = now.per_request_ms, now.per_batch_ms
    if not isinstance(size, int) or size < 2 or waste is None or not mean or a is None or b is None:
        return None
    half = max(1, min(round(mean / 2), size // 2))
    least = now.config.get(LEAST_KEY)
    if isinstance(least, int) and half < least:
        return None
    now_ms = a + b / mean
    rates = [(a * (1 - waste) / (1 - left * waste)) + b / half for left in PADDING_LEFT]
    if not all(rates):
        return None
    low, high = (now_ms / each - 1 for each in rates)
    if low < 0 or high < WORTH_IT:
        return None  # what batches cost however large they are would eat it up
    told = (
        f"{waste:.0%} of what is computed is padding; in batches of {half} a half to three quarters of it is left, and "
        f"{b:.3g} ms for each batch are shared by fewer"
    )
    return Proposal(
        _KIND,
        "Run fewer requests in one batch",
        "Requests of different lengths are padded to the longest of their batch.",
        (change(now, SIZE_KEY, half, "Smaller batches of neighbours in length hold less padding"),),
        (estimate("throughput increase", low, high, told),),
        LOW_EFFORT,
        _batching(now, half),
        against=("padding_waste",),
        risks=(_ALL_MODELS,),
    )


def _no_waiting(now: Situation) -> Proposal | None:
    share = now.share_of_total(now.batching_ms)
    if now.config.get(ADAPTIVE_KEY) is not False or now.config.get(ENABLED_KEY) is False or share is None:
        return None
    if share < WORTH_IT or now.busy_share is None or now.busy_share > 1 - IDLE_SHARE:
        return None
    told = (
        f"requests wait {now.batching_ms:.1f} of their {now.total_ms:.1f} ms for others; with a slot idle "
        f"{1 - now.busy_share:.0%} of the time, at least that part of it goes"
    )
    return Proposal(
        _KIND,
        "Let a batch leave while an engine is idle",
        "Requests wait for others although an engine could take them.",
        (change(now, ADAPTIVE_KEY, True, "A batch leaves at once while a slot is idle, and grows while all are busy"),),
        (estimate("latency reduction", share * (1 - now.busy_share), share, told),),
        LOW_EFFORT,
        _batching(now, None),
        against=("low_utilization",),
        risks=("Smaller batches, and so more of them, while the load is low", _ALL_MODELS),
    )


def _batching(now: Situation, size: int | None) -> BatchingOptimization:
    is_continuous = now.engine == "vllm"
    return BatchingOptimization(
        max_batch_size=size, enable_continuous_batching=is_continuous, enable_dynamic_batching=True
    )


# -- vLLM servers ----------------------------------------------------------------------------------------------------


def _servers(now: Situation, found: Collection[Bottleneck]) -> Iterator[Proposal]:
    made = None
    if has(found, "memory_pressure"):
        made = _fewer_at_once(now)
    elif has(found, "queueing") or not now.is_measured:
        made = _more_at_once(now)
    if made is not None:
        yield made


def _parameter(now: Situation) -> str:
    """The option, by the name that whoever asks has for it."""
    return "max_batch_size" if "max_batch_size" in now.config and "max_num_seqs" not in now.config else "max_num_seqs"


def _limit(now: Situation) -> int | None:
    """Requests that the server runs at once at most: as it is told, else those that run while others wait."""
    told = now.config.get(_parameter(now))
    if isinstance(told, int) and not isinstance(told, bool) and told > 0:
        return told
    return math.ceil(now.running) if now.running and now.waiting else None


def _more_at_once(now: Situation) -> Proposal | None:
    limit, room = _limit(now), _room(now)
    if limit is None or (now.running is not None and now.running < FULL_SHARE * limit):
        return None
    bounds = [STEP * limit, MAX_SIZE]
    bounds += [] if room is None else [room]
    bounds += [] if now.waiting is None else [limit + math.ceil(now.waiting)]
    wanted = min(bounds)
    gain = _gain_at_once(now, limit, wanted) if wanted > limit else None
    if gain is None or gain.high < WORTH_IT:
        return None
    is_known = "" if now.is_measured else "Nothing was measured: see that requests wait before you do it. "
    reason = "Requests that run together share each reading of the weights"
    reason += "" if room is None else f"; keys and values have room for {room} of them"
    return Proposal(
        _KIND,
        "Run more requests at once",
        f"{is_known}Requests wait for one of {limit} places, while there is room for more.",
        (change(now, _parameter(now), wanted, reason),),
        (gain,),
        RESTART,
        _batching(now, wanted),
        against=("queueing",),
        risks=("Each request's text comes more slowly while more of them run", "Increased memory usage"),
        prerequisites=("Room for their keys and values",),
    )


def _room(now: Situation) -> int | None:
    """Requests whose keys and values there is room for, at their longest."""
    if now.kv_capacity_tokens is None or now.context_tokens is None or now.context_tokens[1] < 1:
        return None
    return math.floor(ROOM_SHARE * now.kv_capacity_tokens / now.context_tokens[1])


def _gain_at_once(now: Situation, limit: int, wanted: int) -> Estimate:
    ratio = wanted / limit
    weights, each, context = now.weight_bytes, now.kv_token_bytes, now.context_tokens
    if weights is None or each is None or context is None:
        told = (
            f"{wanted} requests instead of {limit} share each step, which takes no longer while reading the weights is "
            f"what it waits for, up to some {RIDGE_TOKENS} tokens, and in proportion longer beyond"
        )
        return estimate("throughput increase", 0.0, ratio - 1, told)
    long, short = (
        ratio * (weights + limit * tokens * each) / (weights + wanted * tokens * each)
        for tokens in (context[1], context[0])
    )
    decoding = now.decode_ms / now.inference_ms if now.decode_ms and now.inference_ms else 1.0
    slowed = 1 / ((1 - decoding) + decoding / long)
    told = (
        f"a step of decoding reads {gigabytes(weights)} of weights once for all, and {gigabytes(context[0] * each)} to "
        f"{gigabytes(context[1] * each)} of keys and values for each request; {decoding:.0%} of computing is decoding"
    )
    if wanted > RIDGE_TOKENS:
        told += f"; beyond {RIDGE_TOKENS} requests at once computing may take over"
        slowed = min(slowed, max(1.0, RIDGE_TOKENS / limit))
    return estimate("throughput increase", slowed - 1, short - 1, told)


def _fewer_at_once(now: Situation) -> Proposal | None:
    """Where requests are put off, fewer of them at once waste less."""
    limit, room = _limit(now), _room(now)
    if not now.preemptions or not now.requests or limit is None or room is None or not 1 <= room < limit:
        return None
    again = now.preemptions / (now.preemptions + now.requests)
    told = (
        f"{now.preemptions:.0f} times a request's prompt was computed again, for {now.requests:.0f} that were served: "
        f"{again:.0%} of such computing goes, if all put-off requests go"
    )
    high = 1 / (1 - again * (now.share_of_total(now.prefill_ms) or 0.0)) - 1
    if high < WORTH_IT:
        return None
    return Proposal(
        _KIND,
        "Run fewer requests at once",
        "More requests are begun than their keys and values have room for.",
        (change(now, _parameter(now), room, f"Keys and values have room for {room} requests at their mean length"),),
        (estimate("throughput increase", 0.0, high, told),),
        RESTART,
        _batching(now, room),
        against=("memory_pressure",),
        risks=("Requests wait before they begin, instead of being put off when they have begun",),
    )
