"""Buckets of time: how fine the data are kept for how long, and which buckets answer for a window. Pure.

Processes write the finest level alone; the control worker adds finished buckets up into the next one. A level's buckets
consist of whole buckets of the level below, so a window is told by coarse ones as far as they are made, and by finer
ones from there to now, with nothing counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LATE_S = 5.0
"""A bucket is not added up earlier after its end: its last writes may be on their way."""
MAX_LATE_S = 60.0
"""What a process could not write for so long, it gives up."""
SLACK_S = 10_800
"""Every level is kept so much longer, until the next one surely has it."""
AGAIN = 2
"""Buckets that are added up again at each roll-up, for what came late."""


@dataclass(frozen=True)
class Level:
    """Buckets of one size."""

    size_s: int
    keep_s: int
    longest_window_s: int
    """The longest window that these buckets are read for."""


FINEST = Level(10, 7_200, 900)


def levels(retention_s: int) -> tuple[Level, ...]:
    """From the finest to the coarsest."""
    kept = ((60, 86_400, 21_600), (600, 604_800, 259_200), (3600, retention_s, retention_s))
    coarser = [Level(size_s, min(keep_s, retention_s) + SLACK_S, longest) for size_s, keep_s, longest in kept]
    return (FINEST, *coarser)


@dataclass(frozen=True)
class Span:
    """Buckets of one level, side by side."""

    size_s: int
    start_s: int
    end_s: int

    def starts(self) -> range:
        """Where each of them begins."""
        return range(self.start_s, self.end_s, self.size_s)


def floor_to(moment_s: float, size_s: int) -> int:
    """Where the bucket that holds a moment begins."""
    return int(moment_s // size_s) * size_s


def spans(since_s: float, now_s: float, made: Mapping[int, int], all_levels: tuple[Level, ...]) -> list[Span]:
    """The buckets that tell of `since_s` until `now_s`, each moment once, oldest first.

    The window grows to where its first bucket begins.

    Args:
        made: by size, up to when a level's buckets have been added up.
    """
    window_s = now_s - since_s
    chosen = next((n for n, level in enumerate(all_levels) if window_s <= level.longest_window_s), len(all_levels) - 1)
    found: list[Span] = []
    begin_s = floor_to(since_s, all_levels[chosen].size_s)
    for level in reversed(all_levels[1 : chosen + 1]):
        # Multiples of a coarser level's size, as `begin_s` and every `made` are, are multiples of the finer ones'.
        end_s = min(made.get(level.size_s, 0), floor_to(now_s, level.size_s))
        if end_s > begin_s:
            found.append(Span(level.size_s, begin_s, end_s))
            begin_s = end_s
    oldest_s = floor_to(now_s - FINEST.keep_s, FINEST.size_s)
    found.append(Span(FINEST.size_s, max(begin_s, oldest_s), floor_to(now_s, FINEST.size_s) + FINEST.size_s))
    return found


def to_make(level: Level, below: Level, made: Mapping[int, int], now_s: float) -> list[int]:
    """Starts of the level's buckets that a roll-up is to make now, some of them once more."""
    finished_s = now_s - LATE_S if below is FINEST else made.get(below.size_s, 0)
    end_s = floor_to(finished_s, level.size_s)
    oldest_s = floor_to(now_s - below.keep_s, level.size_s) + level.size_s
    begin_s = max(oldest_s, made.get(level.size_s, 0) - AGAIN * level.size_s)
    return list(range(begin_s, end_s, level.size_s))
