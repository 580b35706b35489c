"""How an instance stands: what was measured of it and how it is configured, alike for ours and for others'. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from muai_producers.advice.architecture import Architecture, item_bytes

UNQUANTIZED = frozenset({"", "none", "null", "false"})
_QUANTIZED_NAME = re.compile(
    r"(?:^|[-_/.])(awq|gptq|fp8|int8|int4|w8a8|w4a16|nf4|bnb|gguf|nvfp4|mxfp4)(?:$|[-_/.])", re.I
)
MOST_BITS = {"awq": 4, "gptq": 4, "int4": 4, "w4a16": 4, "nf4": 4, "nvfp4": 4, "mxfp4": 4}


@dataclass(frozen=True)
class Situation:
    """One instance at one time. None stands for what is not known.

    Attributes:
        source: where the figures come from; '' where nothing was measured, and `unmeasured` says why.
        config: its parameters: those of a vLLM server by vLLM's names, our own by dotted key.
        waiting: requests that wait at the engine, now or on average.
        max_batch: requests that it runs at once at most.
        mean_batch: requests that it runs at once on average.
        wait_ms: mean time of a request before the engine begins with it; `total_ms` has it too.
        batching_ms: the part of `wait_ms` in which it waits for companions.
        per_request_ms: a of a·n + b, the fitted duration of a batch of n; `per_batch_ms` is b, and `per_batch_error_ms`
            its standard error.
        busy_share: of the time in which the engine's slots run a batch.
        kv_used_share: of the room for keys and values, 0 to 1.
        prefix_hit_share: of prompt tokens that looked, those that were found.
        evictions: conversations let go for want of room, of `lookups`.
        memory_percent: of the fullest device, or host where there is none.
    """

    instance_id: str
    instance_type: str
    is_ours: bool
    engine: str
    model: str = ""
    source: str = ""
    unmeasured: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: Architecture | None = None
    device: str = ""
    gpu_name: str = ""
    requests: float | None = None
    running: float | None = None
    waiting: float | None = None
    max_batch: int | None = None
    mean_batch: float | None = None
    p95_batch: float | None = None
    wait_ms: float | None = None
    batching_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    inference_ms: float | None = None
    total_ms: float | None = None
    per_request_ms: float | None = None
    per_batch_ms: float | None = None
    per_batch_error_ms: float | None = None
    busy_share: float | None = None
    padding_waste: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    tokens_per_step: float | None = None
    kv_used_share: float | None = None
    kv_capacity_tokens: float | None = None
    kv_bytes_per_token: float | None = None
    preemptions: float | None = None
    prefix_hit_share: float | None = None
    prefix_caching: bool | None = None
    kept_bytes: float | None = None
    evictions: float | None = None
    lookups: float | None = None
    memory_percent: float | None = None
    memory_total_bytes: float | None = None
    utilization_percent: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether anything was."""
        return bool(self.source)

    @property
    def quantization(self) -> str:
        """How the weights are quantized already; '' where they are not."""
        told = str(self.config.get("quantization", "") or "").lower()
        if told not in UNQUANTIZED:
            return told
        named = _QUANTIZED_NAME.search(str(self.config.get("model", "") or self.model))
        return named[1].lower() if named else ""

    @property
    def weight_item_bytes(self) -> float:
        """Bytes of one weight: by the configuration, else by the model's own file, else the two of 16 bits."""
        if self.quantization:
            return MOST_BITS.get(self.quantization, 8) / 8
        own = self.architecture.dtype if self.architecture else ""
        return item_bytes(self.config.get("dtype")) or item_bytes(own) or 2

    @property
    def weight_bytes(self) -> float | None:
        """All weights as they are now; embeddings are left as they are by what quantizes the rest."""
        found = self.architecture
        if found is None:
            return None
        others = (found.num_parameters - found.num_quantizable) * (2 if self.quantization else self.weight_item_bytes)
        return found.num_quantizable * self.weight_item_bytes + others

    @property
    def kv_item_bytes(self) -> float:
        """Bytes of one number of keys and values."""
        own = item_bytes(self.config.get("kv_cache_dtype"))
        return own or (2 if self.quantization else self.weight_item_bytes)

    @property
    def kv_token_bytes(self) -> float | None:
        """Bytes of one token's keys and values: measured, else counted from the architecture."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        return self.architecture.kv_per_token * self.kv_item_bytes if self.architecture else None

    @property
    def context_tokens(self) -> tuple[float, float] | None:
        """Tokens that a running request holds: on average over its time, and at its end."""
        if self.prompt_tokens is None or self.output_tokens is None:
            return None
        return self.prompt_tokens + self.output_tokens / 2, self.prompt_tokens + self.output_tokens

    def share_of_total(self, part_ms: float | None) -> float | None:
        """How much of a request's time a part of it is."""
        if part_ms is None or not self.total_ms:
            return None
        return min(1.0, part_ms / self.total_ms)

    def figures(self) -> dict[str, float]:
        """All that was measured, by name."""
        found = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[one.name] = round(float(value), 6)
        return found
