"""What a vLLM server says of itself at `/metrics`, read. Pure.

The names are those of vLLM's current version (0.32), with those of before where they have changed. Counters and
histograms are sums since the server's start, so means are over all that time; gauges are of this moment.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muai_producers.advice.situation import Situation
from muai_producers.errors import MuaiError

PREFIX = "vllm:"
_KEPT = ("vllm:", "# TYPE vllm:", "process_start_time_seconds ")
# Ours: vLLM's, newest first.
GAUGES = {
    "running": ("num_requests_running",),
    "waiting": ("num_requests_waiting",),
    "kv_used_share": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
}
HIGHEST = frozenset({"kv_used_share"})
"""Of several engines behind one server the fullest counts; of other gauges they are added."""
COUNTERS = {
    "prefix_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "preemptions": ("num_preemptions",),
    "generated": ("generation_tokens",),
    "succeeded": ("request_success",),
}
HISTOGRAMS = {
    "wait_s": ("request_queue_time_seconds",),
    "prefill_s": ("request_prefill_time_seconds",),
    "decode_s": ("request_decode_time_seconds",),
    "inference_s": ("request_inference_time_seconds",),
    "total_s": ("e2e_request_latency_seconds",),
    "first_token_s": ("time_to_first_token_seconds",),
    "prompt_tokens": ("request_prompt_tokens",),
    "output_tokens": ("request_generation_tokens",),
    "step_tokens": ("iteration_tokens_total",),
}
MOST = 1e18
"""A figure above it, below 0, or that is none, is passed over."""
NO_NUMBER = frozenset({"", "None", "auto"})


class ScrapeError(MuaiError):
    """The instance could not be measured: it did not answer, or with something else than vLLM's metrics."""

    code = "instance_unreachable"
    retryable = True
    http_status = 424


@dataclass(frozen=True)
class Scrape:
    """One server's metrics.

    Attributes:
        means: of histograms, by our names: the mean and how many it is of.
        cache: the labels of `cache_config_info`.
    """

    model: str
    values: Mapping[str, float]
    means: Mapping[str, tuple[float, float]]
    cache: Mapping[str, str] = field(default_factory=dict)
    started_at: float | None = None

    def mean(self, name: str) -> float | None:
        """None where nothing was counted."""
        mean, count = self.means.get(name, (0.0, 0.0))
        return mean if count else None


def read_metrics(text: str, model: str = "") -> Scrape:
    """Read a page of metrics.

    Args:
        model: by its served name, where the server has several; '': the one that served most.
    Raises:
        ScrapeError: it is no such page, or has nothing of vLLM.
    """
    from prometheus_client.parser import text_string_to_metric_families

    lines = [line for line in text.splitlines() if line.startswith(_KEPT)]
    try:
        samples = [
            sample
            for family in text_string_to_metric_families("\n".join(lines) + "\n")
            for sample in family.samples
            if 0 <= sample.value < MOST
        ]
    except (ValueError, KeyError, IndexError) as error:
        raise ScrapeError(f"what it says at /metrics cannot be read as Prometheus' text format: {error}") from None
    ours = [sample for sample in samples if sample.name.startswith(PREFIX)]
    if not ours:
        raise ScrapeError("it says nothing of vLLM at /metrics (no name there begins with vllm:)")
    model = model if _has(ours, model) else _busiest(ours)
    own = [sample for sample in ours if sample.labels.get("model_name", model) == model]
    start = next((sample.value for sample in samples if sample.name == "process_start_time_seconds"), None)
    return Scrape(
        model,
        {**_values(own, GAUGES), **_values(own, COUNTERS, "_total")},
        _means(own),
        next((dict(sample.labels) for sample in ours if sample.name == PREFIX + "cache_config_info"), {}),
        start,
    )


def _has(samples: Sequence[Any], model: str) -> bool:
    return bool(model) and any(sample.labels.get("model_name") == model for sample in samples)


def _busiest(samples: Sequence[Any]) -> str:
    served: dict[str, float] = {}
    for sample in samples:
        name = sample.labels.get("model_name")
        if name is not None:
            is_count = sample.name == PREFIX + "generation_tokens_total"
            served[name] = served.get(name, 0.0) + (sample.value if is_count else 0.0)
    return max(sorted(served), key=lambda name: served[name], default="")


def _values(samples: Sequence[Any], names: Mapping[str, Sequence[str]], suffix: str = "") -> dict[str, float]:
    found = {}
    for ours, theirs in names.items():
        for name in theirs:
            values = [sample.value for sample in samples if sample.name == PREFIX + name + suffix]
            if values:
                found[ours] = max(values) if ours in HIGHEST else sum(values)
                break
    return found


def _means(samples: Sequence[Any]) -> dict[str, tuple[float, float]]:
    found = {}
    for ours, theirs in HISTOGRAMS.items():
        for name in theirs:
            sums = [sample.value for sample in samples if sample.name == f"{PREFIX}{name}_sum"]
            counts = [sample.value for sample in samples if sample.name == f"{PREFIX}{name}_count"]
            if counts and sums:
                count = sum(counts)
                found[ours] = (sum(sums) / count if count else 0.0, count)
                break
    return found


def with_scrape(situation: Situation, scrape: Scrape, now_s: float | None = None) -> Situation:
    """The situation of a vLLM server, with what it said of itself.

    Args:
        now_s: wall-clock seconds.
    """
    now_s = time.time() if now_s is None else now_s
    age = "" if scrape.started_at is None else f", {max(0.0, now_s - scrape.started_at):.0f} s ago"
    values, cache = scrape.values, scrape.cache
    config = {**_cache_config(cache), **situation.config}
    capacity = _number(cache, "kv_cache_size_tokens")
    blocks, block_size = _number(cache, "num_gpu_blocks"), _number(cache, "block_size")
    if capacity is None and blocks is not None and block_size is not None:
        capacity = blocks * block_size
    memory = _number(cache, "kv_cache_memory_bytes")
    steps = scrape.means.get("step_tokens", (0.0, 0.0))[1]
    prefix = values.get("prefix_queries", 0.0)
    told = _replaced(situation, scrape)
    return dataclasses.replace(
        told,
        source=f"the metrics of {situation.instance_id}: counted since its start{age}, gauges of now",
        config=config,
        running=values.get("running"),
        waiting=values.get("waiting"),
        kv_used_share=values.get("kv_used_share"),
        preemptions=values.get("preemptions"),
        requests=values.get("succeeded"),
        mean_batch=values.get("generated", 0.0) / steps if steps else None,
        prefix_hit_share=values.get("prefix_hits", 0.0) / prefix if prefix else None,
        prefix_caching=_flag(cache, "enable_prefix_caching"),
        kv_capacity_tokens=capacity,
        kv_bytes_per_token=memory / capacity if memory and capacity else None,
        max_batch=_batch_limit(config),
    )


def _replaced(situation: Situation, scrape: Scrape) -> Situation:
    milliseconds: dict[str, Any] = {
        f"{name}_ms": None if (mean := scrape.mean(f"{name}_s")) is None else 1000 * mean
        for name in ("wait", "prefill", "decode", "inference", "total")
    }
    return dataclasses.replace(
        situation,
        model=scrape.model or situation.model,
        prompt_tokens=scrape.mean("prompt_tokens"),
        output_tokens=scrape.mean("output_tokens"),
        tokens_per_step=scrape.mean("step_tokens"),
        **milliseconds,
    )


def _cache_config(cache: Mapping[str, str]) -> dict[str, Any]:
    """What the server itself says of its configuration."""
    found: dict[str, Any] = {}
    if cache.get("cache_dtype"):
        found["kv_cache_dtype"] = cache["cache_dtype"]
    for name in ("gpu_memory_utilization", "kv_cache_memory_bytes", "block_size"):
        value = _number(cache, name)
        if value is not None:
            found[name] = int(value) if value.is_integer() else value
    prefix = _flag(cache, "enable_prefix_caching")
    if prefix is not None:
        found["enable_prefix_caching"] = prefix
    return found


def _batch_limit(config: Mapping[str, Any]) -> int | None:
    for name in ("max_num_seqs", "max_batch_size"):
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _number(labels: Mapping[str, str], name: str) -> float | None:
    told = labels.get(name, "")
    if told in NO_NUMBER:
        return None
    try:
        value = float(told)
    except ValueError:
        return None
    return value if 0 <= value < MOST else None


def _flag(labels: Mapping[str, str], name: str) -> bool | None:
    return {"True": True, "False": False}.get(labels.get(name, ""))
