"""The tuner's arithmetic: a wrong p-value would keep what is noise, and take back what helps."""

from __future__ import annotations

import math
import random

import pytest

from muai_workers.tuning.comparing import Sample, chance_of_rise, sample_of, student_tail


@pytest.mark.parametrize(
    ("t", "degrees", "tail"),
    # From tables of Student's distribution; one degree of freedom is Cauchy's, two have a closed form.
    [
        (1.812, 10, 0.05),
        (2.764, 10, 0.01),
        (2.015, 5, 0.05),
        (1.960, 1e6, 0.025),
        (12.706, 1, 0.025),
        (0.0, 7, 0.5),
        (-1.812, 10, 0.95),
    ],
)
def test_given_a_quantile_of_the_tables_then_the_tail_is_theirs(t: float, degrees: float, tail: float) -> None:
    assert student_tail(t, degrees) == pytest.approx(tail, abs=2e-4)


@pytest.mark.parametrize("t", [-30.0, -2.0, 0.1, 1.0, 5.0, 40.0])
def test_given_one_and_two_degrees_then_the_tail_is_the_closed_form(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-10)
    assert student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-10)


def test_given_the_worked_example_of_unequal_variances_then_welchs_p_is_its() -> None:
    # Means 2.0 and 3.5, variances 1.0 and 2.5, five each: t = 1.5 / sqrt(0.7), 6.759 degrees of freedom.
    before, after = Sample(count=5, mean=2.0, variance=1.0), Sample(count=5, mean=3.5, variance=2.5)
    degrees = 0.7**2 / (0.2**2 / 4 + 0.5**2 / 4)
    assert chance_of_rise(before, after, 0.0) == pytest.approx(student_tail(1.5 / math.sqrt(0.7), degrees))
    assert 0.05 < chance_of_rise(before, after, 0.0) < 0.07


def test_given_nothing_but_noise_then_a_rise_is_seen_as_often_as_the_level_says() -> None:
    chance = random.Random(3)
    seen = 0
    for _ in range(2000):
        before = sample_of([chance.gauss(0.9, 0.02) for _ in range(20)])
        after = sample_of([chance.gauss(0.9, 0.05) for _ in range(5)])
        seen += chance_of_rise(before, after, 0.0) < 0.05
    assert 0.03 < seen / 2000 < 0.07


def test_given_too_little_or_measurements_that_agree_by_chance_then_nothing_is_proven() -> None:
    one, two = sample_of([0.9]), sample_of([0.91, 0.91])
    assert chance_of_rise(one, two, 0.002) == 1.0
    assert chance_of_rise(sample_of([0.909, 0.909]), two, 0.002) > 0.2
    assert chance_of_rise(sample_of([0.9, 0.9]), two, 0.0) == 0.0
    assert chance_of_rise(two, two, 0.0) == 1.0
