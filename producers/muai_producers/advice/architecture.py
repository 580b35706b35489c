"""What a model's weights, and its keys and values, take in memory: counted from its `config.json`. Pure.

The counts are those of the published architectures: embeddings, attention with grouped keys and values, and a
feed-forward block that is gated (three matrices) in Llama and its relatives, plain (two) in BERT and its. Biases and
norms, below a hundredth of the whole, are counted only roughly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {
    "float32": 4, "fp32": 4, "float16": 2, "fp16": 2, "half": 2, "bfloat16": 2, "bf16": 2, "float8": 1, "fp8": 1,
    "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1,
}  # fmt: skip
PLAIN_FEED_FORWARD = frozenset({"bert", "roberta", "distilbert", "gpt2", "opt", "gpt_neox", "electra", "xlm-roberta"})


@dataclass(frozen=True)
class Architecture:
    """A model's sizes.

    Args:
        num_quantizable: parameters in the matrices of its layers: those that quantization makes smaller.
        kv_per_token: numbers that one token's keys and values are.
    """

    num_parameters: int
    num_quantizable: int
    kv_per_token: int
    dtype: str = ""
    max_tokens: int | None = None

    @property
    def quantizable_share(self) -> float:
        """Of the weights."""
        return self.num_quantizable / self.num_parameters


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The sizes that a `config.json` tells; None where it lacks one that is needed, or is of another kind."""
    hidden, layers = _count(config, "hidden_size", "n_embd", "d_model"), _count(config, "num_hidden_layers", "n_layer")
    heads, vocabulary = _count(config, "num_attention_heads", "n_head"), _count(config, "vocab_size")
    if not (hidden and layers and heads and vocabulary) or config.get("is_encoder_decoder"):
        return None
    kv_heads = _count(config, "num_key_value_heads") or heads
    head = _count(config, "head_dim") or hidden // heads
    inner = _count(config, "intermediate_size", "n_inner") or 4 * hidden
    is_plain = config.get("model_type") in PLAIN_FEED_FORWARD
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    layer = attention + (2 if is_plain else 3) * hidden * inner
    experts = _count(config, "num_local_experts", "num_experts")
    if experts:
        expert_inner = _count(config, "moe_intermediate_size") or inner
        layer = attention + experts * 3 * hidden * expert_inner
    positions = _count(config, "max_position_embeddings", "n_positions")
    is_tied = bool(config.get("tie_word_embeddings", is_plain))
    embeddings = vocabulary * hidden * (1 if is_tied else 2) + (positions or 0) * hidden * is_plain
    return Architecture(
        num_parameters=layers * layer + embeddings,
        num_quantizable=layers * layer,
        kv_per_token=2 * layers * kv_heads * head,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        max_tokens=positions,
    )


def item_bytes(dtype: object) -> int | None:
    """Bytes of one number; None for a name that says nothing, such as auto."""
    return ITEM_BYTES.get(str(dtype).removeprefix("torch.").lower())


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
