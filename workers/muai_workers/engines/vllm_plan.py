"""From our configuration to vLLM's: pure, so that every key's way can be told without vLLM being there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muai_config import ModelSpec, Settings
from muai_config.optimization import VLLMSettings

Device = Literal["cpu", "cuda"]
BYTES_PER_MB = 1_000_000
CPU_BLOCK_TOKENS = 32
"""vLLM's own choice for a CPU is 128: prompts shorter than that would never find anything in the prefix cache."""
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class VLLMPlan:
    """How a model is to be loaded."""

    arguments: dict[str, Any]
    """Of vLLM's `AsyncEngineArgs`."""
    degraded: tuple[str, ...] = ()
    """What of the configuration this device or vLLM cannot do, and what is done instead."""

    @property
    def shapes(self) -> dict[str, Any]:
        """Of vLLM's `StructuredOutputsConfig`.

        A weak model that may write blanks between the parts of JSON can go on writing them until its limit. Only a
        backend that is named can do without, and this is the one that knows most of JSON schema.
        """
        return {"backend": "guidance", "disable_any_whitespace": True}

    @property
    def num_ranks(self) -> int:
        """Processes that the model is spread over."""
        return int(self.arguments["tensor_parallel_size"] * self.arguments["pipeline_parallel_size"])


def plan_vllm(spec: ModelSpec, folder: Path, settings: Settings, device: Device) -> VLLMPlan:
    """What vLLM is to be told.

    `swap_space`, which vLLM no longer has, becomes its offloading of keys and values to main memory; that is counted
    over all GPUs together. On a CPU there is no second memory, and keys and values get what `cache.max_memory_mb` says;
    on a GPU they get what weights leave of `gpu_memory_utilization`.
    """
    vllm, cache = settings.optimization.vllm, settings.optimization.cache
    ranks = vllm.tensor_parallel_size * vllm.pipeline_parallel_size
    arguments: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": spec.name,
        "dtype": vllm_dtype(spec, vllm, device),
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "pipeline_parallel_size": vllm.pipeline_parallel_size,
        "enable_prefix_caching": cache.enabled,
        "trust_remote_code": spec.trust_remote_code,
        # Other formats can hold code.
        "load_format": "safetensors",
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
    }
    degraded: list[str] = []
    if vllm.max_model_len is not None:
        arguments["max_model_len"] = vllm.max_model_len
    if vllm.max_num_seqs is not None:
        arguments["max_num_seqs"] = vllm.max_num_seqs
    if vllm.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = vllm.max_num_batched_tokens
    block_size = vllm.block_size or (CPU_BLOCK_TOKENS if device == "cpu" else None)
    if block_size is not None:
        arguments["block_size"] = block_size
    eager = vllm.enforce_eager if vllm.enforce_eager is not None else device == "cpu"
    arguments["enforce_eager"] = eager
    if device == "cpu":
        arguments["kv_cache_memory_bytes"] = cache.max_memory_mb * BYTES_PER_MB // ranks
        if "swap_space" in vllm.model_fields_set and vllm.swap_space:
            degraded.append("vllm.swap_space: a CPU has no second memory to swap to")
    elif vllm.swap_space:
        arguments["kv_offloading_size"] = float(vllm.swap_space * ranks)
    if cache.enabled and cache.eviction_policy != "lru":
        degraded.append(f"cache.eviction_policy {cache.eviction_policy}: vLLM lets go of the least recently used")
    return VLLMPlan(arguments, tuple(degraded))


def vllm_dtype(spec: ModelSpec, settings: VLLMSettings, device: Device) -> str:
    """vLLM's name for the number format. `auto` is fp32 on a CPU, as on the other engines: vLLM's own auto would turn
    such weights into bf16, which gives other answers.
    """
    wanted = spec.dtype if spec.dtype != "auto" else settings.dtype
    if wanted == "auto":
        return "float32" if device == "cpu" else "auto"
    return DTYPES[wanted]


def weight_item_bytes(dtype: str) -> int:
    """Bytes of one number of the weights; `auto` on a GPU never takes more than two."""
    return ITEM_BYTES.get(dtype, 2)


def thread_binding(cores: Sequence[int], ranks: int) -> str | None:
    """`VLLM_CPU_OMP_THREADS_BIND` for `ranks` processes on `cores`; None leaves it to vLLM.

    By itself vLLM binds one process well, and fails with several where they do not have a physical core each.
    """
    if ranks == 1:
        return None
    if len(cores) < ranks:
        return "nobind"
    share = len(cores) // ranks
    groups = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)


def tool_parser_of(spec: ModelSpec, chat_template: str | None) -> str | None:
    """vLLM's name for how the model writes calls of tools; None: nobody knows, and the text is given as it is."""
    if spec.tool_parser is not None:
        return spec.tool_parser
    marks = {"<tool_call>": "hermes", "[TOOL_CALLS]": "mistral", "<|python_tag|>": "llama3_json"}
    return next((name for mark, name in marks.items() if mark in (chat_template or "")), None)
