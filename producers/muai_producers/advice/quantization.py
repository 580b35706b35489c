"""Advice on quantization: whether the weights should be stored in fewer bits, and in which. Pure.

A step of decoding reads all weights and all keys and values once, and that is what takes its time, as long as the
step has fewer tokens than the device computes for each byte that it reads (Williams et al., Roofline, 2009; Pope et
al., Efficiently Scaling Transformer Inference, 2022). So halving the bytes of the weights saves, of the time of
decoding, the share that those bytes are of all that is read; and beyond that many tokens, nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from muai_producers.advice.estimates import WORTH_IT, Estimate, estimate
from muai_producers.advice.proposals import RELOAD, Proposal, change, gigabytes, has
from muai_producers.advice.records import (
    Bottleneck,
    ConfigChange,
    OptimizationType,
    QuantizationMethod,
    QuantizationOptimization,
)
from muai_producers.advice.situation import Situation

RIDGE_TOKENS = 150
"""Tokens of a step up to which reading is what takes the time: an A100's 312 TFLOP/s over 2 TB/s, the lowest of today's
GPUs for servers."""
ONNX_KEY = "optimization.onnx.enable_quantization"
FP8_GPUS = (
    "H100",
    "H200",
    "H20",
    "GH200",
    "B100",
    "B200",
    "B300",
    "GB200",
    "L4",
    "L40",
    "RTX 40",
    "RTX 50",
    "RTX 6000 Ada",
)
_KIND = OptimizationType.QUANTIZATION


@dataclass(frozen=True)
class Choice:
    """How the weights should be stored."""

    method: QuantizationMethod
    bits: int

    @property
    def config(self) -> QuantizationOptimization:
        """As the plan has it; fp8 is what GPUs multiply in, so activations are in 8 bits too."""
        return QuantizationOptimization(
            method=self.method,
            target_bits=self.bits,
            quantize_weights=True,
            quantize_activations=self.method is QuantizationMethod.FP8,
        )


class QuantizationOptimizer:
    """See the module."""

    def propose(self, situation: Situation, found: Collection[Bottleneck]) -> list[Proposal]:
        """What it would have done: nothing where the weights are quantized, or nothing is wrong that it would help."""
        is_pressed = has(found, "memory_pressure") or has(found, "queueing")
        if situation.quantization or (situation.is_measured and not is_pressed):
            return []
        if not situation.is_measured and "quantization" not in situation.config and situation.architecture is None:
            return []  # nothing at all is known
        is_onnx = situation.is_ours and situation.engine == "onnx"
        made = _of_onnx(situation, found) if is_onnx else _of_decoding(situation, found)
        return [] if made is None or max(one.high for one in made.relevant(found)) < WORTH_IT else [made]


def choose(now: Situation) -> Choice:
    """8 bits, in the format that the GPU multiplies in where it is known to; 4 where memory lacks most and weights have
    more of it than keys and values."""
    kv_bytes = (now.kv_capacity_tokens or 0.0) * (now.kv_token_bytes or 0.0)
    is_short = bool(now.preemptions) and (now.kv_used_share or 0.0) >= 0.97
    if is_short and now.weight_bytes is not None and 0 < kv_bytes < now.weight_bytes / 2:
        return Choice(QuantizationMethod.AWQ, 4)
    if any(name in now.gpu_name for name in FP8_GPUS):
        return Choice(QuantizationMethod.FP8, 8)
    return Choice(QuantizationMethod.INT8, 8)


def _of_decoding(now: Situation, found: Collection[Bottleneck]) -> Proposal | None:
    if now.is_ours and (now.engine not in ("vllm",) or now.device == "cpu"):
        return None  # the other engines load no quantized weights
    choice = choose(now)
    name = choice.method.value.upper()
    estimates = (_memory(now, choice), _speed(now, _decoding(now, choice), now.decode_ms, found))
    prerequisites = [
        f"Weights of the model that are quantized to {choice.method.value}, or a server that does it itself"
    ]
    if now.architecture is None:
        prerequisites.append("The model's sizes are not known here, so the ranges are wide: name it in `model`")
    return Proposal(
        _KIND,
        f"Apply {name} Quantization",
        f"Weights in {choice.bits} bits leave more room for requests, and are read faster at each step of decoding.",
        (_change(now, choice),),
        estimates,
        RELOAD,
        choice.config,
        against=("memory_pressure", "queueing"),
        risks=("Answers get a little less exact; compare them on your own prompts",),
        prerequisites=tuple(prerequisites),
    )


def _change(now: Situation, choice: Choice) -> ConfigChange:
    reason = f"Weights of {choice.bits} bits instead of {8 * now.weight_item_bytes:g}"
    if not now.is_ours:
        return ConfigChange(
            parameter="quantization",
            current_value=now.config.get("quantization"),
            recommended_value=choice.method.value,
            reason=reason,
        )
    return ConfigChange(
        parameter=f"models.{now.model}.source",
        current_value=None,
        recommended_value=f"the same model, quantized to {choice.method.value}",
        reason=reason,
    )


def _saved(now: Situation, bits: int) -> float:
    """Share of a quantized matrix's bytes that goes."""
    return max(0.0, 1 - bits / (8 * now.weight_item_bytes))


def _memory(now: Situation, choice: Choice) -> Estimate:
    saved = _saved(now, choice.bits)
    bits = f"{choice.bits} bits instead of {8 * now.weight_item_bytes:g}"
    if now.architecture is None or now.weight_bytes is None:
        told = f"{bits}, for whatever part of them is quantized"
        return estimate("memory reduction", 0.0, saved, told, of="the weights")
    # Embeddings stay as they are in most formats; the scales of the others are below a twentieth.
    share = now.architecture.quantizable_share
    low, high = share * saved * 0.95, share * saved
    after = now.weight_bytes * (1 - high)
    told = f"{bits} for {share:.0%} of them, {gigabytes(now.weight_bytes)} become {gigabytes(after)}"
    return estimate("memory reduction", low, high, told, of="the weights")


@dataclass(frozen=True)
class Saving:
    """By how much computing becomes shorter, as shares of itself."""

    low: float
    high: float
    source: str


def _speed(now: Situation, saving: Saving, part_ms: float | None, found: Collection[Bottleneck]) -> Estimate:
    """What a saving in one part of the computing brings: before a queue more requests, else a shorter time for each.

    Args:
        part_ms: how much of a request's time the part is; None where that is not known.
    """
    if has(found, "queueing"):
        share = 1.0 if part_ms is None or not now.inference_ms else min(1.0, part_ms / now.inference_ms)
        low, high = (1 / max(1e-3, 1 - share * each) - 1 for each in (saving.low, saving.high))
        told = f"{saving.source}; that is {share:.0%} of what an engine does for a request"
        return estimate("throughput increase", 0.0 if part_ms is None else low, high, told)
    known = now.share_of_total(part_ms)
    if known is None:
        return estimate("latency reduction", 0.0, saving.high, f"{saving.source}, if that is all of a request's time")
    told = f"{saving.source}; that is {known:.0%} of a request's time"
    return estimate("latency reduction", saving.low * known, saving.high * known, told)


def _decoding(now: Situation, choice: Choice) -> Saving:
    """By how much decoding becomes shorter."""
    saved, weights, kv = _saved(now, choice.bits), now.weight_bytes, _kv_bytes(now)
    share = now.architecture.quantizable_share if now.architecture else 1.0
    tokens = now.tokens_per_step
    if tokens is not None and tokens >= RIDGE_TOKENS:
        return Saving(
            0.0, 0.0, f"a step has {tokens:.0f} tokens, more than the {RIDGE_TOKENS} that reading is waited for"
        )
    if weights is None or kv is None:
        told = f"decoding becomes shorter by at most the {share * saved:.0%} by which the weights shrink"
        return Saving(0.0, share * saved, told)
    low, high = (share * saved * weights / (weights + held) for held in (kv[1], kv[0]))
    told = (
        f"each step of decoding reads {gigabytes(weights)} of weights and {gigabytes(kv[0])} to {gigabytes(kv[1])} of "
        f"keys and values, and {share * saved:.0%} of the weights less then"
    )
    return Saving(low, high, told)


def _kv_bytes(now: Situation) -> tuple[float, float] | None:
    """Bytes of keys and values that a step reads: at requests' mean length, and at their last."""
    if now.context_tokens is None or now.kv_token_bytes is None:
        return None if now.is_measured else (0.0, 0.0)
    at_once = max(1.0, now.running or now.mean_batch or 1.0)
    return at_once * now.context_tokens[0] * now.kv_token_bytes, at_once * now.context_tokens[1] * now.kv_token_bytes


def _of_onnx(now: Situation, found: Collection[Bottleneck]) -> Proposal | None:
    if now.config.get(ONNX_KEY) is not False or now.device == "cuda":
        return None
    told = (
        "at most a quarter of the computing is left where the CPU has instructions for 8-bit integers, which do four "
        "for each one in 32 bits"
    )
    speed = _speed(now, Saving(0.0, 0.75, told), now.inference_ms, found)
    return Proposal(
        _KIND,
        "Store weights as 8-bit integers",
        "ONNX Runtime computes with 8-bit integers on a CPU; the conversion is checked against the original.",
        (change(now, ONNX_KEY, True, "Weights of 8 bits instead of 32"),),
        (_memory(now, Choice(QuantizationMethod.INT8, 8)), speed),
        RELOAD,
        QuantizationOptimization(
            method=QuantizationMethod.INT8, target_bits=8, quantize_weights=True, quantize_activations=True
        ),
        against=("memory_pressure", "queueing"),
        risks=("Answers get a little less exact; optimization.onnx.quantized_min_cosine bounds by how much",),
        prerequisites=("A restart of the engine's workers, which convert the model anew",),
    )
