"""How long a batch of n takes: fitted online, per model and engine, and inverted to hold a latency target.

A forward pass over n requests takes about a·n + b. Both are estimated by least squares whose memory fades, so that
the fit follows a model that is warming up or a device that is shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FADING = 0.98
"""Weight of a sample after the next one: about the last 50 count."""
P95_SIGMAS = 1.645
MIN_SAMPLES = 5
BATCHES_IN_THE_WAY = 2
"""A request's latency under load is its own batch and the one before it."""


@dataclass
class LatencyFit:
    """Seconds of a batch as a function of its size."""

    weight: float = 0.0
    sum_n: float = 0.0
    sum_nn: float = 0.0
    sum_t: float = 0.0
    sum_nt: float = 0.0
    variance: float = 0.0
    """Of what the fit leaves unexplained, in seconds squared."""
    num_samples: int = 0

    def add(self, size: int, took_s: float) -> None:
        """Take in a batch that was run."""
        if self.num_samples >= 2:
            error_s = took_s - self.predict_s(size)
            self.variance += (1 - FADING) * (error_s * error_s - self.variance)
        self.weight = self.weight * FADING + 1
        self.sum_n = self.sum_n * FADING + size
        self.sum_nn = self.sum_nn * FADING + size * size
        self.sum_t = self.sum_t * FADING + took_s
        self.sum_nt = self.sum_nt * FADING + size * took_s
        self.num_samples += 1

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b), in seconds per request and seconds per batch, neither below 0."""
        if not self.num_samples:
            return 0.0, 0.0
        mean_n, mean_t = self.sum_n / self.weight, self.sum_t / self.weight
        spread = self.sum_nn / self.weight - mean_n * mean_n
        if spread < 0.25:
            # Nearly all of one size: that says nothing of a and b apart, so all of it is charged to the requests.
            return mean_t / mean_n, 0.0
        slope = (self.sum_nt / self.weight - mean_n * mean_t) / spread
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return slope, max(0.0, mean_t - slope * mean_n)

    def predict_s(self, size: int) -> float:
        """Expected seconds of a batch of `size`."""
        per_request_s, per_batch_s = self.coefficients
        return per_request_s * size + per_batch_s

    def largest_size(self, target_s: float, limit: int) -> int:
        """Largest batch, from 1 to `limit`, with which 95 % of requests are expected to meet `target_s` under load."""
        if self.num_samples < MIN_SAMPLES:
            return limit
        per_request_s, per_batch_s = self.coefficients
        budget_s = target_s / BATCHES_IN_THE_WAY - per_batch_s - P95_SIGMAS * math.sqrt(self.variance)
        if budget_s < 0.0:
            return 1
        if per_request_s <= 0.0:
            return limit
        return max(1, min(limit, int(budget_s / per_request_s + 1e-9)))


class LatencyFits:
    """The fits of a collector, by engine and model."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str, str], LatencyFit] = {}

    def add(self, engine: str, model: str, size: int, took_s: float) -> None:
        """Take in a batch that an engine has run."""
        self._fits.setdefault((engine, model), LatencyFit()).add(size, took_s)

    def of(self, engine: str, model: str) -> LatencyFit:
        """The fit; an empty one where nothing was run yet."""
        return self._fits.get((engine, model)) or LatencyFit()
