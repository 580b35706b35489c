"""How long a batch takes by how much is in it: straight lines, by least squares, from sums that add up. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

SIZE_LINE = ("fit_count", "fit_n", "fit_nn", "fit_us", "fit_n_us", "fit_uu")
"""Counters of the line over requests: batches, Σn, Σn², Σt, Σn·t, Σt²; t in µs, and t² in units of 10⁴ µs²."""
TOKEN_LINE = ("line_count", "line_x", "line_xx", "line_us", "line_x_us", "line_uu")
"""The same over padded tokens, of batches that were padded. "line_n" counts their requests."""
TOKEN_REQUESTS = "line_n"
SQUARE_UNIT = 10_000
"""µs² in one unit of Σt²: the sum of a busy month stays below 2^63."""
MIN_EXPLAINED = 0.5
"""Of the differences between batches' times, what their tokens must explain to be taken for their cause."""
MIN_BATCHES = 10


@dataclass(frozen=True)
class Line:
    """slope·x + fixed_ms.

    Attributes:
        error_ms: standard error of `fixed_ms`; None where squares of times are not at hand.
        explained: share of the variance of times, 0 to 1; None likewise.
    """

    slope: float
    fixed_ms: float
    error_ms: float | None = None
    explained: float | None = None


@dataclass(frozen=True)
class BatchTime:
    """a·n + b in milliseconds, the time for which a batch of n holds its slot.

    Attributes:
        per_request_ms: a, of requests as long as the mean.
        per_batch_ms: b.
        error_ms: standard error of b; None where not known.
    """

    per_request_ms: float
    per_batch_ms: float
    error_ms: float | None


def counted(size: int, took_us: int, padded_tokens: int) -> Iterator[tuple[str, int]]:
    """What one batch adds to the counters.

    Args:
        padded_tokens: 0 where nothing is padded.
    """
    yield from zip(SIZE_LINE, _terms(size, took_us), strict=True)
    if padded_tokens:
        yield from zip(TOKEN_LINE, _terms(padded_tokens, took_us), strict=True)
        yield TOKEN_REQUESTS, size


def _terms(x: int, took_us: int) -> tuple[int, ...]:
    return 1, x, x * x, took_us, x * took_us, took_us * took_us // SQUARE_UNIT


def batch_time(counters: Mapping[str, int]) -> BatchTime | None:
    """The better line: over padded tokens where they explain the times, as they differ where sizes do not, else over
    requests. None until two different batches were seen."""
    line = fitted_line([counters.get(name, 0) for name in TOKEN_LINE])
    if line is not None and line.explained is not None and line.explained >= MIN_EXPLAINED:
        count, requests, sum_us = (counters.get(name, 0) for name in ("line_count", TOKEN_REQUESTS, "line_us"))
        if count >= MIN_BATCHES and requests:
            return BatchTime((sum_us / 1000 - count * line.fixed_ms) / requests, line.fixed_ms, line.error_ms)
    line = fitted_line([counters.get(name, 0) for name in SIZE_LINE])
    return None if line is None else BatchTime(line.slope, line.fixed_ms, line.error_ms)


def fitted_line(sums: Sequence[int]) -> Line | None:
    """The line through batches; neither of its parts is below 0. None until batches of two sizes were seen.

    Args:
        sums: in the order of `SIZE_LINE`; without the last there is no error to be told.
    """
    count, sum_x, sum_xx, sum_us, sum_x_us = sums[:5]
    spread = count * sum_xx - sum_x * sum_x
    if count < 2 or spread <= 0:
        return None
    mean_x, mean_ms = sum_x / count, sum_us / 1000 / count
    slope = (count * sum_x_us - sum_x * sum_us) / 1000 / spread
    slope = min(max(slope, 0.0), mean_ms / mean_x)
    fixed_ms = max(0.0, mean_ms - slope * mean_x)
    own_ms2 = spread / count  # Σ(x - mean)²
    total_ms2 = (sums[5] * SQUARE_UNIT / 1e6 - count * mean_ms * mean_ms) if len(sums) > 5 else 0.0
    if total_ms2 <= 0.0:
        return Line(slope, fixed_ms)
    left_ms2 = max(0.0, total_ms2 - slope * slope * own_ms2)
    variance = left_ms2 / max(1, count - 2)
    error_ms = math.sqrt(variance * (1 / count + mean_x * mean_x / own_ms2))
    return Line(slope, fixed_ms, error_ms, 1.0 - left_ms2 / total_ms2)
