"""One batch at an engine worker, while it runs: what is known of it, and what its results say of that."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from muai_producers.errors import MuaiError
from muai_producers.wire import Batch, InferenceRequest, InferenceResult
from muai_workers.engines.base import EngineOutput
from muai_workers.recording import RunFigures
from muai_workers.tracing import NO_TRACE, AnyTrace


@dataclass
class BatchRun:
    """One batch at work."""

    batch: Batch
    requests: list[InferenceRequest]
    """Those of the batch that are still wanted."""
    deaths: int
    run_started_s: float
    """Monotonic seconds."""
    failed: dict[str, MuaiError] = field(default_factory=dict)
    """Requests that this engine did not serve, through no fault of theirs."""
    positions: dict[str, int] = field(default_factory=dict)
    """Where each request stands in the batch."""
    served: list[tuple[InferenceRequest, InferenceResult]] = field(default_factory=list)
    told_of_all: dict[str, Any] = field(default_factory=dict)
    """What the metadata of each of its results says alike."""
    again: list[Batch] = field(default_factory=list)
    """What goes on elsewhere."""
    loading_s: float = 0.0
    """Until the model was in memory: what a batch takes is judged without it."""
    took_s: float = 0.0
    """In the engine."""
    held_s: float = 0.0
    """What its slot was taken up with it: from when both were there, the batch and the slot."""
    trace: AnyTrace = NO_TRACE
    figures: RunFigures = field(init=False)

    def received_s(self, request: InferenceRequest) -> float:
        """When the collector got the request, in wall-clock seconds."""
        received = self.batch.received_at
        return received[self.positions[request.id]] if received else self.batch.formed_at

    def result(self, request: InferenceRequest, output: EngineOutput, now_s: float) -> InferenceResult:
        """What its sender gets.

        Args:
            now_s: wall-clock seconds.
        """
        received_s = self.received_s(request)
        return InferenceResult(
            outputs=output.outputs,
            engine_used=self.batch.engine,
            latency_ms=milliseconds(request.submitted_at, now_s),
            batch_size=len(self.requests),
            cache_hit=output.cache_hit,
            metadata={
                **self.told_of_all,
                "request_id": request.id,
                "queue_ms": milliseconds(request.submitted_at, received_s),
                "batching_ms": milliseconds(received_s, self.batch.formed_at),
                "inference_ms": round((time.monotonic() - self.run_started_s) * 1000, 3),
                "usage": {"input_tokens": output.input_tokens, "output_tokens": output.output_tokens},
                **output.extra,
            },
        )


def milliseconds(start_s: float, end_s: float) -> float:
    """From the one to the other; 0 where clocks of two machines make the end come first."""
    return round((end_s - start_s) * 1000, 3) if end_s > start_s else 0.0
