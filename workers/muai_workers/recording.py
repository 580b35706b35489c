"""What a batch tells the fleet's performance data."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from muai_producers.errors import MuaiError
from muai_producers.performance.recorder import StatisticsRecorder
from muai_producers.performance.series import Series
from muai_producers.wire import InferenceResult

STAGES_MS = ("queue_ms", "batching_ms", "dispatch_ms", "inference_ms")
TOLD_WITHIN_S = 1.0


@dataclass
class RunFigures:
    """The figures of one run of a batch.

    Args:
        pads: whether the engine pads the requests of a batch to the longest of them.
    """

    recorder: StatisticsRecorder
    series: Series
    pads: bool
    num_served: int = 0
    useful_tokens: int = 0
    longest_tokens: int = 0
    untold: list[InferenceResult] = field(default_factory=list)
    untold_since_s: float = 0.0
    """Monotonic seconds."""

    def served(self, result: InferenceResult) -> None:
        """A request of the batch has its result. They are told of together, within `TOLD_WITHIN_S` of each other."""
        now_s = time.monotonic()
        if not self.untold:
            self.untold_since_s = now_s
        self.untold.append(result)
        if now_s - self.untold_since_s >= TOLD_WITHIN_S:
            self._tell()

    def _tell(self) -> None:
        results, self.untold = self.untold, []
        if not results:
            return
        metadata = [result.metadata for result in results]
        usages = [one["usage"] for one in metadata]
        tokens: list[int] = [usage["input_tokens"] for usage in usages]
        input_tokens = sum(tokens)
        self.num_served += len(results)
        self.useful_tokens += input_tokens
        self.longest_tokens = max(self.longest_tokens, *tokens)
        stages_ms = [[one[stage] for one in metadata] for stage in STAGES_MS]
        stages_ms.append([result.latency_ms for result in results])
        output_tokens = sum([usage["output_tokens"] for usage in usages])
        cache_hits = sum([result.cache_hit for result in results])
        self.recorder.served(self.series, stages_ms, input_tokens, output_tokens, cache_hits)

    def attempts_failed(self, errors: list[MuaiError]) -> None:
        """Requests that the engine did not serve, through no fault of theirs."""
        for error in errors:
            self.recorder.attempt_failed(self.series, error.code)

    def finished(self, size: int, took_s: float) -> None:
        """The batch has left the engine.

        Args:
            took_s: for which it held its slot.
        """
        self._tell()
        if size and self.num_served:
            padded = self.longest_tokens * self.num_served if self.pads else 0
            self.recorder.ran(self.series, size, took_s, useful_tokens=self.useful_tokens, padded_tokens=padded)
