"""What a batch tells the fleet's performance data."""

from __future__ import annotations

from dataclasses import dataclass

from muai_producers.errors import MuaiError
from muai_producers.performance.recorder import StatisticsRecorder
from muai_producers.performance.series import Series
from muai_producers.wire import InferenceResult

STAGES_MS = ("queue_ms", "batching_ms", "dispatch_ms", "inference_ms")


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

    def served(self, result: InferenceResult) -> None:
        """A request of the batch has its result."""
        metadata, usage = result.metadata, result.metadata["usage"]
        tokens: int = usage["input_tokens"]
        self.num_served += 1
        self.useful_tokens += tokens
        self.longest_tokens = max(self.longest_tokens, tokens)
        stages_ms = [*(metadata[stage] for stage in STAGES_MS), result.latency_ms]
        self.recorder.served(self.series, stages_ms, tokens, usage["output_tokens"], result.cache_hit)

    def attempts_failed(self, errors: list[MuaiError]) -> None:
        """Requests that the engine did not serve, through no fault of theirs."""
        for error in errors:
            self.recorder.attempt_failed(self.series, error.code)

    def finished(self, size: int, took_s: float) -> None:
        """The batch has left the engine."""
        if size and self.num_served:
            padded = self.longest_tokens * self.num_served if self.pads else 0
            self.recorder.ran(self.series, size, took_s, useful_tokens=self.useful_tokens, padded_tokens=padded)
