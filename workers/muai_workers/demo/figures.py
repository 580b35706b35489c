"""What the demonstration reads off its results. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muai_producers.wire import InferenceResult


@dataclass(frozen=True)
class Figures:
    """One step's results, counted."""

    title: str
    requests: int
    batches: int
    engines: Mapping[str, int]
    """Requests that each engine served."""
    mean_attempts: float
    """Engines that a request met, the one that served it included."""
    failed_attempts: Mapping[tuple[str, str], int]
    """Requests by engine that did not serve them and its error's code."""
    p50_ms: float
    p95_ms: float

    @property
    def mean_batch_size(self) -> float:
        """Requests for each batch."""
        return self.requests / self.batches if self.batches else 0.0

    def describe_engines(self) -> str:
        """Such as `onnx`, or with counts where there are several."""
        if len(self.engines) == 1:
            return next(iter(self.engines))
        return ", ".join(f"{engine} {count}" for engine, count in sorted(self.engines.items()))

    def describe_attempts(self) -> str:
        """What was tried before, by engine and error; '' when nothing was."""
        return "; ".join(
            f"{engine} {code} for {number}" for (engine, code), number in sorted(self.failed_attempts.items())
        )


def count(title: str, results: Sequence[InferenceResult]) -> Figures:
    """Count results; a batch is told by its id."""
    latencies = sorted(result.latency_ms for result in results)
    attempts = Counter(
        (attempt["engine"], attempt["error"]["code"]) for result in results for attempt in result.metadata["attempts"]
    )
    return Figures(
        title=title,
        requests=len(results),
        batches=len({result.metadata["batch_id"] for result in results}),
        engines=Counter(result.engine_used for result in results),
        mean_attempts=1 + attempts.total() / len(results) if results else 0.0,
        failed_attempts=attempts,
        p50_ms=percentile(latencies, 0.50),
        p95_ms=percentile(latencies, 0.95),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the ordered values do not exceed; 0 where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of the angle between two vectors."""
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.hypot(*one) * math.hypot(*other))


def nearest(query: Sequence[float], vectors: Sequence[Sequence[float]], limit: int) -> list[tuple[float, int]]:
    """The best `limit` vectors as `(cosine, index)`, best first."""
    scored = ((cosine(query, vector), index) for index, vector in enumerate(vectors))
    return sorted(scored, reverse=True)[:limit]
