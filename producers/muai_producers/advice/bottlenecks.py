"""What holds an instance up, told by its figures. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from muai_producers.advice.records import Bottleneck, BottleneckKind, Evidence, Severity
from muai_producers.advice.situation import Situation

KV_FULL = 0.9
"""Of the room for keys and values: beyond it vLLM soon has to preempt requests, and compute them again."""
MEMORY_FULL_PERCENT = 90.0
WAIT_SHARE = 0.5
"""A request that waits for longer than it is computed."""
WAITING_SHARE = 0.25
"""Requests that wait, of those that run."""
TIMEOUT_KEY = "optimization.batcher.batch_timeout_ms"
IDLE_SHARE = 0.3
KV_IDLE = 0.1
PADDING_SHARE = 0.25
HIT_SHARE = 0.1
LONG_PROMPT_TOKENS = 256
"""A prefix cache has nothing to save on shorter prompts that would be worth a change."""
MIN_REQUESTS = 5
PUT_OFF_SHARE = 0.01
_CRITICAL: dict[str, Callable[[Evidence], float]] = {
    "kv_used_share": lambda _: 0.97,
    "memory_percent": lambda _: 97.0,
    "preemptions": lambda one: 5 * one.threshold,
    "waiting": lambda one: 4 * one.threshold,
    "wait_share": lambda _: 0.8,
}
"""From where on a bottleneck is critical, by the figure that speaks for it."""
_ORDER: dict[Severity, int] = {"critical": 0, "warning": 1, "info": 2}


def bottlenecks(situation: Situation) -> list[Bottleneck]:
    """All of them, most severe first."""
    found = [bottleneck for look in _LOOKS if (bottleneck := look(situation)) is not None]
    return sorted(found, key=lambda one: _ORDER[one.severity])


def _made(kind: BottleneckKind, severity: Severity, description: str, evidence: list[Evidence]) -> Bottleneck | None:
    if not evidence:
        return None
    return Bottleneck(kind=kind, severity=severity, description=description, evidence=evidence)


def _evidence(metric: str, value: float, threshold: float, meaning: str) -> Evidence:
    return Evidence(metric=metric, value=round(value, 4), threshold=round(threshold, 4), meaning=meaning)


def _memory_pressure(now: Situation) -> Bottleneck | None:
    evidence = list(_memory_evidence(now))
    is_critical = any(one.value >= _CRITICAL[one.metric](one) for one in evidence)
    told = "There is too little memory for what is asked at once."
    return _made("memory_pressure", "critical" if is_critical else "warning", told, evidence)


def _memory_evidence(now: Situation) -> Iterator[Evidence]:
    if now.kv_used_share is not None and now.kv_used_share >= KV_FULL:
        told = f"{now.kv_used_share:.0%} of the room for keys and values is in use; {KV_FULL:.0%} is much"
        yield _evidence("kv_used_share", now.kv_used_share, KV_FULL, told)
    allowed = max(1.0, PUT_OFF_SHARE * (now.requests or 0.0))
    if now.preemptions is not None and now.preemptions >= allowed:
        told = f"{now.preemptions:.0f} times a request was put off for want of room and computed again"
        told += f", for {now.requests:.0f} that were served" if now.requests else ""
        yield _evidence("preemptions", now.preemptions, allowed, told)
    # vLLM takes its share of a GPU at the start: that it is taken says nothing.
    is_reserved = now.engine == "vllm" and now.device == "cuda"
    if now.memory_percent is not None and now.memory_percent >= MEMORY_FULL_PERCENT and not is_reserved:
        told = f"{now.memory_percent:.0f} % of the memory is in use; {MEMORY_FULL_PERCENT:.0f} % is much"
        yield _evidence("memory_percent", now.memory_percent, MEMORY_FULL_PERCENT, told)


def _queueing(now: Situation) -> Bottleneck | None:
    evidence = list(_queue_evidence(now))
    is_critical = any(one.value >= _CRITICAL[one.metric](one) for one in evidence)
    told = "Requests wait for longer than they need to: more arrive than are run at once."
    return _made("queueing", "critical" if is_critical else "warning", told, evidence)


def _queue_evidence(now: Situation) -> Iterator[Evidence]:
    at_once = now.running if now.running is not None else now.mean_batch
    if now.waiting and at_once is not None and now.waiting >= max(1.0, WAITING_SHARE * at_once):
        told = f"{now.waiting:.0f} requests wait while {at_once:.0f} run; a quarter of those that run is much"
        yield _evidence("waiting", now.waiting, max(1.0, WAITING_SHARE * at_once), told)
    waited_ms = None if now.wait_ms is None else max(0.0, now.wait_ms - _for_company_ms(now))
    share = now.share_of_total(waited_ms)
    if share is not None and share >= WAIT_SHARE and (now.requests or 0) >= MIN_REQUESTS:
        told = f"{share:.0%} of a request's time is waiting ({waited_ms:.0f} of {now.total_ms:.0f} ms); half is much"
        yield _evidence("wait_share", share, WAIT_SHARE, told)


def _for_company_ms(now: Situation) -> float:
    """The part of the wait that is the configuration's will: for companions, for as long as it says."""
    timeout_ms = now.config.get(TIMEOUT_KEY)
    return min(now.batching_ms or 0.0, float(timeout_ms)) if isinstance(timeout_ms, int) else 0.0


def _low_utilization(now: Situation) -> Bottleneck | None:
    if not now.is_measured or any(True for _ in _queue_evidence(now)):
        return None
    evidence = []
    if now.utilization_percent is not None and now.utilization_percent < 100 * IDLE_SHARE:
        told = f"the GPU works {now.utilization_percent:.0f} % of the time"
        evidence.append(_evidence("utilization_percent", now.utilization_percent, 100 * IDLE_SHARE, told))
    if now.busy_share is not None and now.busy_share < IDLE_SHARE:
        told = f"the engine's slots run a batch {now.busy_share:.0%} of the time"
        evidence.append(_evidence("busy_share", now.busy_share, IDLE_SHARE, told))
    if not now.is_ours and now.kv_used_share is not None and now.kv_used_share < KV_IDLE and not now.waiting:
        told = f"{now.kv_used_share:.1%} of the room for keys and values is in use, and nothing waits"
        evidence.append(_evidence("kv_used_share", now.kv_used_share, KV_IDLE, told))
    return _made("low_utilization", "info", "There is more here than the load needs.", evidence)


def _padding_waste(now: Situation) -> Bottleneck | None:
    waste = now.padding_waste
    if waste is None or waste < PADDING_SHARE:
        return None
    told = f"{waste:.0%} of what the engine computes in a batch is padding"
    severity: Severity = "warning" if waste < 2 * PADDING_SHARE else "critical"
    evidence = [_evidence("padding_waste", waste, PADDING_SHARE, told)]
    return _made("padding_waste", severity, "Requests of very different lengths share batches.", evidence)


def _cache_inefficiency(now: Situation) -> Bottleneck | None:
    evidence = []
    is_long = now.prompt_tokens is not None and now.prompt_tokens >= LONG_PROMPT_TOKENS
    if is_long and now.prefix_caching is False:
        told = f"prompts have {now.prompt_tokens:.0f} tokens on average and none of them is looked for in a cache"
        evidence.append(_evidence("prompt_tokens", now.prompt_tokens or 0.0, LONG_PROMPT_TOKENS, told))
    elif is_long and now.prefix_hit_share is not None and now.prefix_hit_share < HIT_SHARE:
        told = f"{now.prefix_hit_share:.1%} of the prompts' tokens are found in the cache"
        evidence.append(_evidence("prefix_hit_share", now.prefix_hit_share, HIT_SHARE, told))
    if now.evictions and now.lookups and now.evictions >= HIT_SHARE * now.lookups:
        told = f"{now.evictions:.0f} conversations were let go for want of room, in {now.lookups:.0f} look-ups"
        evidence.append(_evidence("evictions", now.evictions, HIT_SHARE * now.lookups, told))
    return _made("cache_inefficiency", "warning", "Prompts are computed that were computed before.", evidence)


_LOOKS: tuple[Callable[[Situation], Bottleneck | None], ...] = (
    _memory_pressure,
    _queueing,
    _cache_inefficiency,
    _padding_waste,
    _low_utilization,
)
