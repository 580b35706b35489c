"""The fitted latency of batches: near the truth after a few of them, and inverted to the safe side."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from muai_batching.latency import LatencyFit

MANY = settings(max_examples=200, deadline=None)
slopes, bases = st.floats(1e-4, 0.05), st.floats(0.0, 0.2)


@MANY
@given(slope=slopes, base=bases, sizes=st.lists(st.integers(1, 64), min_size=6, max_size=60))
def test_given_a_straight_engine_then_what_was_seen_is_predicted(slope: float, base: float, sizes: list[int]) -> None:
    fit = LatencyFit()
    for size in sizes:
        fit.add(size, slope * size + base)
    if max(sizes) - min(sizes) >= 4:
        for size in sizes:
            assert abs(fit.predict_s(size) - (slope * size + base)) <= 0.05 * (slope * size + base) + 1e-6


@MANY
@given(slope=slopes, base=bases, seed=st.integers(0, 2**32), target_s=st.floats(0.01, 2.0))
def test_given_noise_then_the_chosen_size_meets_the_target_or_is_one(
    slope: float, base: float, seed: int, target_s: float
) -> None:
    chance, fit = random.Random(seed), LatencyFit()
    for _ in range(100):
        size = chance.randint(1, 64)
        fit.add(size, (slope * size + base) * chance.uniform(0.9, 1.1))
    size = fit.largest_size(target_s, 64)
    assert 1 <= size <= 64
    assert size == 1 or 2 * (slope * size + base) <= target_s * 1.15


@MANY
@given(samples=st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), max_size=40), target_s=st.floats(0.001, 10))
def test_given_any_measurements_then_neither_coefficient_is_negative_and_the_size_is_allowed(
    samples: list[tuple[int, float]], target_s: float
) -> None:
    fit = LatencyFit()
    for size, took_s in samples:
        fit.add(size, took_s)
    assert min(fit.coefficients) >= 0.0
    assert 1 <= fit.largest_size(target_s, 32) <= 32
