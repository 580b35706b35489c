"""What a figure is to the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.plan import Plan
from benchmarks.results import Goal, Row
from benchmarks.session import Session


@dataclass(frozen=True)
class Measured:
    """What came out."""

    rows: list[Row]
    goals: list[Goal] = field(default_factory=list)
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One figure: what it is called, what it does, and how many steps it reports."""

    title: str
    how: str
    steps: Callable[[Plan], int]
    measure: Callable[[Session], Measured]
