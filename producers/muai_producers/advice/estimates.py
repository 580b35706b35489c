"""By how much something would improve: ranges, each with where it comes from, and how they add up. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from muai_producers.advice.records import ImpactLevel

Gain = Literal["memory reduction", "latency reduction", "throughput increase"]
GAINS: tuple[Gain, ...] = get_args(Gain)
HIGH, MEDIUM = 0.3, 0.1
MOST = 9.0
"""More than ten times as much is claimed of nothing."""
WORTH_IT = 0.05
"""A change whose best case brings less than this is not advised."""


@dataclass(frozen=True)
class Estimate:
    """By how much one thing would improve.

    Args:
        low: a share: 0.2 is 20 %, less of memory or latency, more of throughput.
        source: how the two were computed.
        of: the part that it is of, where that is not the whole: "the weights".
    """

    gain: Gain
    low: float
    high: float
    source: str
    of: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high) and 0.0 <= self.low <= self.high):
            raise ValueError(f"no range of improvement: {self.low} to {self.high}")

    @property
    def middle(self) -> float:
        """Between the two."""
        return (self.low + self.high) / 2

    @property
    def what(self) -> str:
        """What would improve."""
        return f"{self.gain} of {self.of}" if self.of else self.gain


def estimate(gain: Gain, low: float, high: float, source: str, of: str = "") -> Estimate:
    """An estimate, with bounds that are out of order, below 0 or beyond `MOST` set right: neither case of a model is
    always the better one."""
    low, high = sorted((min(MOST, max(0.0, low)), min(MOST, max(0.0, high))))
    return Estimate(gain, low, high, source, of)


def percents(low: float, high: float) -> str:
    """A range as people read it."""
    first, last = round(100 * low), round(100 * high)
    return f"{last}%" if first == last else f"{first}-{last}%"


def told(estimates: Sequence[Estimate]) -> str:
    """All of them in a sentence."""
    return "; ".join(f"{percents(one.low, one.high)} {one.what} ({one.source})" for one in estimates)


def impact(estimates: Iterable[Estimate]) -> ImpactLevel:
    """By the middle of the best range: from 30 % high, where even the least is 10 %; from 10 % medium."""
    estimates = list(estimates)
    if any(one.middle >= HIGH and one.low >= MEDIUM for one in estimates):
        return ImpactLevel.HIGH
    return ImpactLevel.MEDIUM if any(one.middle >= MEDIUM for one in estimates) else ImpactLevel.LOW


def total(estimates: Sequence[Estimate]) -> str:
    """What all of it brings together: at least the best of them alone, at most all of them one on top of the other."""
    parts = []
    for what in dict.fromkeys(one.what for one in estimates):
        own = [one for one in estimates if one.what == what]
        low = max(one.low for one in own)
        if own[0].gain == "throughput increase":
            high = math.prod(1 + one.high for one in own) - 1
        else:
            high = 1 - math.prod(1 - min(one.high, 1.0) for one in own)
        parts.append(f"{percents(low, max(low, high))} {what}")
    return f"{', '.join(parts)} expected (at least the best of them alone, at most each on top of the others)"
