"""When requests arrive in an open loop: gaps drawn at random, whatever the system does meanwhile."""

from __future__ import annotations

import random
from itertools import accumulate

GAMMA_SHAPE = 0.25
"""Bursty traffic: gaps of a gamma distribution of this shape vary twice as much as Poisson's."""


def arrival_times(kind: str, rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, seconds) of arrivals at `rate` per second on average.

    Args:
        kind: `poisson` or `gamma`.
    Raises:
        ValueError: another kind.
    """
    if kind not in ("poisson", "gamma"):
        raise ValueError(f"arrivals are poisson or gamma, not {kind}")
    rng = random.Random(seed)
    shape = 1.0 if kind == "poisson" else GAMMA_SHAPE
    gaps = (rng.gammavariate(shape, 1.0 / (rate * shape)) for _ in range(round(3 * rate * seconds) + 100))
    return [time_s for time_s in accumulate(gaps) if time_s < seconds]
