"""The next token, by each request's parameters."""

from __future__ import annotations

from collections import Counter

import pytest

from muai_producers.wire import Parameters

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine

from muai_workers.engines.sampling import Sampler, choose_tokens  # noqa: E402 - only where torch is


def drawn(logits: list[float], count: int = 400, **parameters: object) -> Counter[int]:
    sampler = Sampler(Parameters(seed=7, **parameters), [])  # type: ignore[arg-type]
    row = torch.tensor(logits)
    return Counter(sampler.choose(row) for _ in range(count))


def test_the_default_takes_the_likeliest_token_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose_tokens(logits, [Sampler(Parameters(), [])] * 2) == [1, 0]


def test_temperature_draws_in_proportion() -> None:
    counts = drawn([0.0, 0.0, -50.0], temperature=1.0)
    assert counts[2] == 0
    assert 120 < counts[0] < 280


def test_top_k_keeps_the_best_k() -> None:
    assert set(drawn([1.0, 1.1, 0.9, 1.2], temperature=2.0, top_k=2)) == {1, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # Probabilities of about 0.64, 0.24, 0.09 and 0.03.
    assert set(drawn([3.0, 2.0, 1.0, 0.0], temperature=1.0, top_p=0.8)) == {0, 1}
    assert set(drawn([3.0, 2.0, 1.0, 0.0], temperature=1.0, top_p=0.01)) == {0}


def test_repetition_penalty_holds_for_the_prompt_and_for_what_was_generated() -> None:
    sampler = Sampler(Parameters(repetition_penalty=2.0), [0])
    logits = torch.tensor([3.0, 2.0, 1.4])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 0, 0]
    assert logits.tolist() == pytest.approx([3.0, 2.0, 1.4])


def test_the_penalty_pushes_negative_scores_down_too() -> None:
    assert Sampler(Parameters(repetition_penalty=2.0), [0]).choose(torch.tensor([-1.0, -1.5])) == 1


def test_a_seed_repeats_and_its_absence_does_not() -> None:
    logits = torch.zeros(1000)

    def ten(seed: int | None) -> list[int]:
        sampler = Sampler(Parameters(temperature=1.0, seed=seed), [])
        return [sampler.choose(logits) for _ in range(10)]

    assert ten(1) == ten(1) != ten(2)
    assert ten(None) != ten(None)


def test_rows_with_and_without_sampling_share_a_batch() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    samplers = [Sampler(Parameters(), []), Sampler(Parameters(repetition_penalty=5.0), [1])]
    assert choose_tokens(logits, samplers) == [1, 1]
    assert choose_tokens(torch.tensor([[0.5, 1.0]]), samplers[1:]) == [0]


def test_a_row_of_nan_is_told_apart_from_its_neighbours() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0]])
    assert choose_tokens(logits, [Sampler(Parameters(), []), Sampler(Parameters(), [])]) == [None, 1]


def test_min_p_keeps_what_is_likely_beside_the_likeliest() -> None:
    # Probabilities of about 0.64, 0.24, 0.09 and 0.03.
    assert set(drawn([3.0, 2.0, 1.0, 0.0], temperature=1.0, min_p=0.3)) == {0, 1}


def test_a_presence_penalty_is_taken_once_from_each_token_of_the_answer() -> None:
    sampler = Sampler(Parameters(presence_penalty=0.5), [0, 0, 0])
    row = torch.tensor([1.0, 0.9, 0.2])
    # The prompt does not count; penalties do not add up, so the first two take turns by their own logits.
    assert [sampler.choose(row) for _ in range(4)] == [0, 1, 0, 0]


def test_a_frequency_penalty_is_taken_for_each_time_a_token_was_used() -> None:
    sampler = Sampler(Parameters(frequency_penalty=0.5), [])
    row = torch.tensor([1.0, 0.9, 0.2])
    assert [sampler.choose(row) for _ in range(5)] == [0, 1, 0, 1, 2]


def test_penalties_are_not_passed_over_when_the_rest_of_a_batch_is_plain() -> None:
    samplers = [Sampler(Parameters(frequency_penalty=2.0), []), Sampler(Parameters(), [])]
    logits = torch.tensor([[1.0, 0.5], [1.0, 0.5]])
    assert [choose_tokens(logits, samplers) for _ in range(2)] == [[0, 0], [1, 0]]
