"""What is asked of the optimization engine, and what it answers: the specification's fields, on the wire."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_ENTRIES = 64
Text = Annotated[str, Meta(min_length=1, max_length=256)]
Parameter = Annotated[str, Meta(min_length=1, max_length=200)]
InstanceType = Literal["vllm", "deepspeed", "onnx", "pytorch", "fake", "muai"]


class OptimizationType(StrEnum):
    """What an optimization is about."""

    KV_CACHE = "kv_cache"
    QUANTIZATION = "quantization"
    BATCHING = "batching"


class ImpactLevel(StrEnum):
    """How much an optimization is expected to bring: by the middle of its best range, and the least of it."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class QuantizationMethod(StrEnum):
    """How weights are stored in fewer bits."""

    INT8 = "int8"
    FP8 = "fp8"
    AWQ = "awq"


class ConfigChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting, as it is and as it should be."""

    parameter: Parameter
    """Of our instances the setting's dotted key, else the option's name at the server."""
    current_value: Any
    """null: it is not set, or not known."""
    recommended_value: Any
    reason: Annotated[str, Meta(max_length=2000)]


class Optimization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that would help."""

    type: OptimizationType
    title: Annotated[str, Meta(max_length=200)]
    description: Annotated[str, Meta(max_length=2000)]
    config_changes: Annotated[list[ConfigChange], Meta(max_length=MAX_ENTRIES)]
    expected_impact: ImpactLevel
    estimated_improvement: Annotated[str, Meta(max_length=2000)]
    """Ranges, each with where it comes from."""
    implementation_effort: Annotated[str, Meta(max_length=200)]
    risks: Annotated[list[Annotated[str, Meta(max_length=500)]], Meta(max_length=MAX_ENTRIES)]
    prerequisites: Annotated[list[Annotated[str, Meta(max_length=500)]], Meta(max_length=MAX_ENTRIES)]


class KVCacheOptimization(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How keys and values should be kept; what is left out stays as it is."""

    dtype: str | None = None
    memory_bytes: int | None = None
    enable_prefix_caching: bool | None = None
    max_memory_mb: int | None = None
    """Of conversations that our instances keep."""


class QuantizationOptimization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model should be quantized."""

    method: QuantizationMethod
    target_bits: int
    quantize_weights: bool
    quantize_activations: bool


class BatchingOptimization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests should be batched."""

    max_batch_size: int | None
    """null: as it is."""
    enable_continuous_batching: bool
    """Requests join and leave a batch while it runs: what vLLM always does."""
    enable_dynamic_batching: bool
    """The load decides how large a batch is."""


class OptimizationPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What would help an instance, most urgent first."""

    instance_id: Text
    instance_type: InstanceType
    timestamp: str
    optimizations: Annotated[list[Optimization], Meta(max_length=MAX_ENTRIES)]
    kv_cache_config: KVCacheOptimization | None = None
    """This and the next two are left out where the plan has nothing of the kind."""
    quantization_config: QuantizationOptimization | None = None
    batching_config: BatchingOptimization | None = None
    priority_order: list[str]
    """`TYPE_INDEX` of each, in the order in which to do them."""
    estimated_total_improvement: str
    """Of all of it together; where there is nothing, why."""


class OptimizationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose plan is wanted."""

    instance_id: Text
    """One of our models by name, or a vLLM server as HOST:PORT."""
    instance_type: InstanceType
    """The engine; `muai`: whichever of ours serves the model most."""
    current_config: Annotated[dict[Parameter, Any], Meta(max_length=MAX_ENTRIES)] = {}
    """What a vLLM server was started with, as far as is known; of our instances it is known."""


class AnalysisRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose bottlenecks are wanted."""

    instance_id: Text
    """As for a plan."""
    instance_type: InstanceType
    current_config: Annotated[dict[Parameter, Any], Meta(max_length=MAX_ENTRIES)] = {}
    """As for a plan."""


BottleneckKind = Literal["memory_pressure", "cache_inefficiency", "queueing", "low_utilization", "padding_waste"]
Severity = Literal["critical", "warning", "info"]


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One figure that speaks for a bottleneck."""

    metric: str
    value: float
    threshold: float
    """What the figure was held against."""
    meaning: str
    """Both in a sentence."""


class Bottleneck(msgspec.Struct, frozen=True, kw_only=True):
    """Something that holds the instance up."""

    kind: BottleneckKind
    severity: Severity
    description: str
    evidence: list[Evidence]


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """What holds an instance up, most severe first."""

    instance_id: str
    instance_type: str
    timestamp: str
    source: str
    """Where the figures come from, and of what time they are."""
    bottlenecks: list[Bottleneck]
    figures: dict[str, float]
    """All that was measured, by name."""


class ApplyRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be done of a plan."""

    plan: OptimizationPlan
    """As it was answered."""
    optimizations: Annotated[list[Text], Meta(max_length=MAX_ENTRIES)] | None = None
    """Which, as in `priority_order`; all where it is left out."""
    why: Annotated[str, Meta(max_length=300)] = ""
    version: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    """The version of the runtime configuration that it is thought of for: with another one there it is refused."""


class NotApplied(msgspec.Struct, frozen=True, kw_only=True):
    """A change that has to be made elsewhere."""

    parameter: str
    recommended_value: Any
    reason: str


class ApplyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was done of a plan."""

    version: int
    """Of the runtime configuration, as it is now."""
    rollback_to: int
    """The version to give to POST /api/v1/config/rollback to take it back."""
    applied: dict[str, Any]
    """New values by dotted key."""
    not_applied: list[NotApplied]
