"""Whether figures have changed by more than their noise: Welch's test. Pure.

Welch's test does not suppose that both samples scatter alike, which before and after a change of settings they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

MAX_TERMS = 300
PRECISION = 1e-12
TINY = 1e-300


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Repeated measurements of one figure."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    """Of single measurements, estimated from them."""


def sample_of(values: Sequence[float]) -> Sample:
    """The sample of these measurements."""
    if not values:
        return Sample()
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Sample(count=len(values), mean=mean, variance=squares / (len(values) - 1) if len(values) > 1 else 0.0)


def chance_of_rise(before: Sample, after: Sample, resolution: float) -> float:
    """How likely a rise as large as this one is where nothing has changed: the p-value, one-sided, of Welch's test.

    Args:
        resolution: standard deviation that a measurement has at least, whatever the sample happens to show: a few that
            agree by chance are no proof.
    Returns:
        0 to 1; 1.0 where there is too little to say anything.
    """
    if before.count < 2 or after.count < 2:
        return 1.0
    floor = resolution * resolution
    parts = [max(one.variance, floor) / one.count for one in (before, after)]
    spread = sum(parts)
    if spread <= 0.0:
        return 0.0 if after.mean > before.mean else 1.0
    degrees = spread**2 / sum(part**2 / (one.count - 1) for part, one in zip(parts, (before, after), strict=True))
    return student_tail((after.mean - before.mean) / math.sqrt(spread), degrees)


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution; `degrees` need not be whole."""
    tail = 0.5 * _regularized_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    return tail if t >= 0 else 1.0 - tail


def _regularized_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction, which converges fast below the mean; above, by symmetry."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _regularized_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction of the incomplete beta function."""
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < PRECISION:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY
