"""What is measured, as it is kept: one JSON file per figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec


class Metric(msgspec.Struct, frozen=True):
    """Repeats of one measurement."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant of a figure."""

    name: str
    settings: str = ""
    versions: dict[str, str] = {}
    metrics: dict[str, Metric] = {}
    skipped: str = ""
    """Why there are no metrics; empty where there are."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A measured value beside what is aimed at."""

    text: str
    value: float
    goal: float
    at_most: bool = False
    """Whether less is better."""

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One table of the report, and where, when and how it was measured."""

    name: str
    title: str
    mode: str
    measured_at: str
    """UTC, ISO 8601."""
    wall_s: float
    machine: dict[str, str]
    how: str
    """What was done, in words for the report."""
    rows: tuple[Row, ...]
    goals: tuple[Goal, ...] = ()
    series: dict[str, tuple[float, ...]] = {}
    """Columns of equal length, for what is drawn over time."""

    def row(self, name: str) -> Row | None:
        """The contestant of that name where it was measured."""
        return next((row for row in self.rows if row.name == name and row.metrics), None)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `percent` of them do not exceed.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """Ratio of each pair that was measured one after the other; the machine's drift cancels out in it."""
    return tuple(one / other for one, other in zip(numerators, denominators, strict=True))


def ratio_goal(rows: Mapping[str, Row], metric: str, of: str, to: str, goal: float) -> list[Goal]:
    """The goal that `of` reaches `goal` times what `to` does, by medians; none where either was not measured."""
    if not (rows[of].metrics and rows[to].metrics):
        return []
    value = rows[of].metrics[metric].median / rows[to].metrics[metric].median
    return [Goal(text=f"{metric} of {of} over {to}", value=value, goal=goal)]


def save(figure: Figure, folder: Path) -> Path:
    """Write the figure to `folder`, replacing what was there of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{figure.name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(figure), indent=1))
    return path


def load(name: str, folder: Path) -> Figure | None:
    """The kept figure, or None."""
    path = folder / f"{name}.json"
    return msgspec.json.decode(path.read_bytes(), type=Figure) if path.exists() else None
