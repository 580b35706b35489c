"""Whose figures they are, and what is counted of them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

STAGES = ("queue", "batching", "dispatch", "inference", "total")
"""Of a request: until the collector has it, until its batch is formed, until a worker begins, in the engine; and all
of it, from submission to answer."""
DURATION, COUNTER, SIZE, PERCENT = "d", "c", "s", "r"
ERROR = "error:"
"""What counters of errors begin with; the error's code follows."""
ATTEMPT = "attempt:"
"""The same, of errors that sent a request on to its next engine."""
MAX_OPERATIONS = 64
"""Operations of other names that a process records for one series; more of them are one, called `other`."""


class Series(NamedTuple):
    """Requests of one model on one engine; `engine` is '' for what came to no engine."""

    model: str
    engine: str
    task: str

    @property
    def member(self) -> str:
        """Its name where it is kept."""
        return "m\t" + "\t".join(self)


class Host(NamedTuple):
    """The resources of one machine."""

    name: str

    @property
    def member(self) -> str:
        """Its name where it is kept."""
        return f"h\t{self.name}"


def read_member(member: str) -> Series | Host | None:
    """Inverse of `member`; None for what another version wrote."""
    kind, *rest = member.split("\t")
    if kind == "m" and len(rest) == 3:
        return Series(*rest)
    return Host(*rest) if kind == "h" and len(rest) == 1 else None


def _counts() -> defaultdict[int, int]:
    return defaultdict(int)


@dataclass(slots=True)
class Tally:
    """What was counted of one series. Tallies are added, in any order."""

    durations: defaultdict[str, defaultdict[int, int]] = field(default_factory=lambda: defaultdict(_counts))
    """By operation: bins and how many fell into each."""
    counters: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    sizes: defaultdict[int, int] = field(default_factory=_counts)
    """Batches by how many requests they had."""
    percents: defaultdict[str, defaultdict[int, int]] = field(default_factory=lambda: defaultdict(_counts))
    """By resource: samples by whole percent."""

    def fields(self) -> Iterator[tuple[str, int]]:
        """As it is kept: flat, each field a count."""
        for operation, bins in self.durations.items():
            for key, count in bins.items():
                yield f"{DURATION}:{key}:{operation}", count
        for name, count in self.counters.items():
            yield f"{COUNTER}:{name}", count
        for size, count in self.sizes.items():
            yield f"{SIZE}:{size}", count
        for resource, percents in self.percents.items():
            for percent, count in percents.items():
                yield f"{PERCENT}:{percent}:{resource}", count

    def add_fields(self, fields: Mapping[bytes, bytes]) -> None:
        """Add what was kept; fields of another version are passed over."""
        for name, raw in fields.items():
            kind, _, rest = name.decode().partition(":")
            if kind == COUNTER:
                self.counters[rest] += int(raw)
            elif kind == SIZE:
                self.sizes[int(rest)] += int(raw)
            elif kind in (DURATION, PERCENT):
                key, _, what = rest.partition(":")
                (self.durations if kind == DURATION else self.percents)[what][int(key)] += int(raw)

    def add(self, other: Tally) -> None:
        """Add another."""
        for mine, theirs in ((self.durations, other.durations), (self.percents, other.percents)):
            for what, counts in theirs.items():
                kept = mine[what]
                for key, count in counts.items():
                    kept[key] += count
        for name, count in other.counters.items():
            self.counters[name] += count
        for size, count in other.sizes.items():
            self.sizes[size] += count
