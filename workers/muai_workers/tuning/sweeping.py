"""Runs a sweep: candidates in groups that need one start of the engine each, loads in rising order, each run kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muai_workers.tuning.sweep import (
    Candidate,
    Measurement,
    Measurements,
    Saturation,
    SweepError,
    summarize,
    todo,
)
from muai_workers.tuning.sweep_load import OpenLoop
from muai_workers.tuning.sweep_stack import SweptStack, swept_stack

FIRST_COUNT = 64
"""Requests that warm the model up, and say how many more make a measurement of saturation."""
SATURATION_S = 3.0
MAX_COUNT = 20_000


@dataclass(frozen=True)
class Sweep:
    """What is to be measured.

    Args:
        on_step: told what is measured now, and how much is left at most.
    """

    document: Mapping[str, Any]
    engine: str
    requests: Sequence[Mapping[str, Any]]
    candidates: Sequence[Candidate]
    loads: Sequence[float]
    target_p95_ms: float
    seconds: float
    seed: int
    home: Path
    on_step: Callable[[str, int], None]

    def run(self, kept: Measurements) -> None:
        """Measure what is not kept yet.

        Raises:
            SweepError: it cannot go on; what was measured is kept.
        """
        for _, group in itertools.groupby(self.candidates, key=lambda one: one.name if one.needs_restart else ""):
            members = list(group)
            if kept.saturation is not None and not self._left(members, kept):
                continue
            static = members[0].settings if members[0].needs_restart else {}
            with swept_stack(self.home, self.document, static, self.engine) as swept:
                self._group(swept, members, kept)

    def _left(self, members: Sequence[Candidate], kept: Measurements) -> list[tuple[Candidate, float]]:
        return list(todo(members, self.loads, kept.done, self.target_p95_ms))

    def _group(self, swept: SweptStack, members: Sequence[Candidate], kept: Measurements) -> None:
        loop = OpenLoop(swept.client, self.requests)
        current: Candidate | None = None
        if kept.saturation is None:
            current = max(members, key=lambda one: int(one.row))
            self._put(swept, current)
            kept.add(Saturation(rate_rps=self._saturation(loop)))
        else:
            loop.saturate(FIRST_COUNT, self.seed)
        saturation = kept.saturation
        assert saturation is not None
        while left := self._left(members, kept):
            candidate, load = left[0]
            # The other loads of those that are left may follow.
            self.on_step(f"{candidate.name} at {load:.0%}", self.most_left(kept))
            if candidate != current:
                self._put(swept, candidate)
                current = candidate
            kept.add(self._measured(loop, candidate, load, saturation.rate_rps))

    def _put(self, swept: SweptStack, candidate: Candidate) -> None:
        if not candidate.needs_restart:
            swept.set(candidate.settings)

    def _saturation(self, loop: OpenLoop) -> float:
        self.on_step("saturation", len(self.candidates) * len(self.loads))
        loop.saturate(FIRST_COUNT, self.seed)  # loads the model
        rate = loop.saturate(FIRST_COUNT, self.seed)
        count = min(MAX_COUNT, max(FIRST_COUNT, math.ceil(rate * SATURATION_S)))
        return max(loop.saturate(count, self.seed + number) for number in (1, 2))

    def _measured(self, loop: OpenLoop, candidate: Candidate, load: float, saturation_rps: float) -> Measurement:
        rate = load * saturation_rps
        latencies_ms = loop.run(rate, self.seconds, self.seed)
        if not latencies_ms:
            raise SweepError(
                f"no request comes within {self.seconds:g} s at {rate:.3g} a second: --seconds makes runs longer"
            )
        return summarize(candidate.name, load, rate, self.seconds, latencies_ms, self.target_p95_ms)

    def most_left(self, kept: Measurements) -> int:
        """How many measurements are left at most: all loads of what is not done with."""
        done = {(one.candidate, one.load) for one in kept.done}
        open_names = {candidate.name for candidate, _ in self._left(self.candidates, kept)}
        return sum((name, load) not in done for name in open_names for load in self.loads)
