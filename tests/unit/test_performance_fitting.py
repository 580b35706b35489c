"""Lines through batches: over padded tokens where they explain the times, else over requests."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_producers.performance.fitting import SIZE_LINE, BatchTime, batch_time, counted, fitted_line


def summed(batches: list[tuple[int, float, int]]) -> Counter[str]:
    """Counters of batches of (requests, milliseconds, padded tokens)."""
    counters: Counter[str] = Counter()
    for size, took_ms, tokens in batches:
        for name, more in counted(size, int(took_ms * 1000), tokens):
            counters[name] += more
    return counters


def test_batches_of_one_size_are_told_apart_by_their_tokens() -> None:
    time = batch_time(summed([(2, 0.1 * tokens + 4.0, tokens) for tokens in range(20, 160, 4)]))
    assert time is not None
    assert time.per_batch_ms == pytest.approx(4.0, abs=0.01)
    assert time.per_request_ms == pytest.approx(0.1 * 88 / 2, abs=0.01), "at the mean length, 88 tokens of two requests"
    assert time.error_ms == pytest.approx(0.0, abs=0.05)


def test_tokens_that_explain_nothing_are_not_taken_for_the_cause() -> None:
    """A generating model's batches take as long as what is written, whatever was read."""
    rng = random.Random(1)
    batches = [(size, 5.0 * size + 60.0, rng.randint(10, 500)) for size in (1, 2, 4, 8) for _ in range(20)]
    time = batch_time(summed(batches))
    assert time is not None
    assert (time.per_request_ms, time.per_batch_ms) == pytest.approx((5.0, 60.0), abs=0.01)


@pytest.mark.parametrize("batches", [[], [(4, 9.0, 0)], [(4, 9.0, 0), (4, 12.0, 0)], [(2, 9.0, 40)] * 20])
def test_batches_that_are_all_alike_tell_nothing(batches: list[tuple[int, float, int]]) -> None:
    assert batch_time(summed(batches)) is None


def test_sums_without_squares_of_times_give_a_line_and_no_error() -> None:
    counters = summed([(1, 7.0, 0), (4, 13.0, 0), (8, 21.0, 0)])
    line = fitted_line([counters[name] for name in SIZE_LINE[:5]])
    assert line is not None
    assert (line.slope, line.fixed_ms, line.error_ms) == (pytest.approx(2.0), pytest.approx(5.0), None)
    del counters["fit_uu"]  # data that an earlier version wrote
    assert batch_time(counters) == BatchTime(line.slope, line.fixed_ms, None)


@given(
    st.integers(0, 10_000),
    st.floats(0.005, 2.0),
    st.floats(0.5, 500.0),
    st.floats(0.0, 0.1),
    st.integers(40, 200),
)
def test_given_a_noisy_line_then_the_truth_lies_within_five_errors_of_what_was_fitted(
    seed: int, per_token_ms: float, per_batch_ms: float, noise: float, count: int
) -> None:
    rng = random.Random(seed)
    batches = []
    for _ in range(count):
        tokens = rng.randint(10, 400)
        batches.append((4, (per_token_ms * tokens + per_batch_ms) + per_batch_ms * rng.gauss(0, noise), tokens))
    line = fitted_line(
        [summed(batches)[name] for name in ("line_count", "line_x", "line_xx", "line_us", "line_x_us", "line_uu")]
    )
    assert line is not None
    assert line.error_ms is not None or noise == 0.0
    resolution_ms = 0.02 + 0.001 * per_batch_ms
    assert abs(line.fixed_ms - per_batch_ms) <= 5 * (line.error_ms or 0.0) + resolution_ms
    assert abs(line.slope - per_token_ms) * 200 <= 5 * (line.error_ms or 0.0) + resolution_ms
