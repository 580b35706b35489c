"""What the optimizers make: one thing that would help, with what it is expected to bring. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from muai_producers.advice.estimates import Estimate, Gain, impact, told
from muai_producers.advice.records import (
    BatchingOptimization,
    Bottleneck,
    BottleneckKind,
    ConfigChange,
    ImpactLevel,
    KVCacheOptimization,
    Optimization,
    OptimizationType,
    QuantizationOptimization,
    Severity,
)
from muai_producers.advice.situation import Situation

LOW_EFFORT = "Low - a reloadable setting, applied within a second"
RESTART = "Medium - a restart with other options"
RELOAD = "Medium - other weights, and a model reload"
_EFFORT_ORDER = (LOW_EFFORT, RESTART, RELOAD)
_URGENCY: Mapping[Severity, int] = {"critical": 0, "warning": 1, "info": 2}
_GAINS: Mapping[BottleneckKind, tuple[Gain, ...]] = {
    "memory_pressure": ("memory reduction",),
    "queueing": ("throughput increase", "latency reduction"),
    "cache_inefficiency": ("latency reduction",),
    "padding_waste": ("throughput increase",),
}
_IMPACT_ORDER = (ImpactLevel.HIGH, ImpactLevel.MEDIUM, ImpactLevel.LOW)


@dataclass(frozen=True)
class Proposal:
    """One thing that would help.

    Args:
        against: the bottlenecks that it lessens; none where it is advised by the model alone.
        config: the part of the plan that it fills.
    """

    type: OptimizationType
    title: str
    description: str
    changes: tuple[ConfigChange, ...]
    estimates: tuple[Estimate, ...]
    effort: str
    config: KVCacheOptimization | QuantizationOptimization | BatchingOptimization
    against: tuple[BottleneckKind, ...] = ()
    risks: tuple[str, ...] = ()
    prerequisites: tuple[str, ...] = ()

    def relevant(self, found: Collection[Bottleneck]) -> Sequence[Estimate]:
        """The estimates that say something on the bottlenecks which it lessens; all of them where it lessens none."""
        kinds = {one.kind for one in found} & set(self.against)
        gains = {gain for kind in kinds for gain in _GAINS.get(kind, ())}
        return [one for one in self.estimates if one.gain in gains] or self.estimates

    def optimization(self, found: Collection[Bottleneck]) -> Optimization:
        """As it is answered."""
        return Optimization(
            type=self.type,
            title=self.title,
            description=self.description,
            config_changes=list(self.changes),
            expected_impact=impact(self.relevant(found)),
            estimated_improvement=told(self.estimates),
            implementation_effort=self.effort,
            risks=list(self.risks),
            prerequisites=list(self.prerequisites),
        )

    def rank(self, found: Collection[Bottleneck]) -> tuple[int, int, int, float]:
        """For sorting: what lessens the severest bottleneck first, then what brings most, then what is easiest."""
        urgency = min((_URGENCY[one.severity] for one in found if one.kind in self.against), default=len(_URGENCY))
        own = self.relevant(found)
        middle = max((one.middle for one in own), default=0.0)
        return urgency, _IMPACT_ORDER.index(impact(own)), _EFFORT_ORDER.index(self.effort), -middle


class Optimizer(Protocol):
    """One kind of advice."""

    def propose(self, situation: Situation, found: Collection[Bottleneck]) -> list[Proposal]:
        """What it would have done."""
        ...


def change(situation: Situation, parameter: str, recommended: object, reason: str) -> ConfigChange:
    """A change of one of the instance's parameters."""
    return ConfigChange(
        parameter=parameter,
        current_value=situation.config.get(parameter),
        recommended_value=recommended,
        reason=reason,
    )


def has(found: Collection[Bottleneck], kind: BottleneckKind) -> bool:
    """Whether that bottleneck is there."""
    return any(one.kind == kind for one in found)


def gigabytes(num_bytes: float) -> str:
    """As people read it."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"
