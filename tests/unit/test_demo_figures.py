"""What the demonstration counts and claims."""

from collections.abc import Sequence
from typing import Any

import pytest

from muai_producers.wire import InferenceResult
from muai_workers.demo.corpus import PROMPTS, QUESTIONS, load_sentences
from muai_workers.demo.figures import cosine, count, nearest, percentile
from muai_workers.demo.play import check_batches, check_fallback


def result(
    engine: str = "onnx",
    batch: str = "a",
    latency_ms: float = 1.0,
    attempts: Sequence[Any] = (),
    vector: Any = (1.0, 0.0),
) -> InferenceResult:
    return InferenceResult(
        outputs={"embedding": list(vector)},
        engine_used=engine,
        latency_ms=latency_ms,
        batch_size=1,
        cache_hit=False,
        metadata={"batch_id": batch, "attempts": list(attempts)},
    )


FAILED = {"engine": "onnx", "error": {"code": "model_load_failed"}}
SKIPPED = {"engine": "onnx", "error": {"code": "engine_unavailable"}}


def test_Given_the_corpus_Then_it_is_400_different_sentences_with_the_answers_among_them() -> None:
    sentences = load_sentences()
    texts = {sentence.text for sentence in sentences}
    assert len(sentences) == len(texts) == 400
    assert len({sentence.topic for sentence in sentences}) == 20
    assert {question.answer for question in QUESTIONS} <= texts
    assert len(PROMPTS) == len(set(PROMPTS)) == 20


def test_Given_results_Then_batches_are_told_by_their_ids() -> None:
    figures = count("x", [result(batch=batch, latency_ms=number) for number, batch in enumerate("aaab")])
    assert (figures.requests, figures.batches, figures.mean_batch_size) == (4, 2, 2.0)
    assert (figures.p50_ms, figures.p95_ms, figures.mean_attempts) == (1.0, 3.0, 1.0)
    assert figures.describe_engines() == "onnx"


def test_Given_attempts_that_failed_Then_each_is_named_with_its_error() -> None:
    figures = count("x", [result("pytorch", attempts=[FAILED]), result("pytorch", attempts=[SKIPPED]), result()])
    assert figures.describe_attempts() == "onnx engine_unavailable for 1; onnx model_load_failed for 1"
    assert figures.describe_engines() == "onnx 1, pytorch 2"
    assert figures.mean_attempts == pytest.approx(5 / 3)


@pytest.mark.parametrize(("share", "value"), [(0.5, 2.0), (0.95, 4.0), (0.0, 1.0)])
def test_Given_ordered_values_Then_the_percentile_is_one_of_them(share: float, value: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], share) == value


def test_Given_no_values_Then_the_percentile_is_zero() -> None:
    assert percentile([], 0.5) == 0.0


def test_Given_vectors_Then_the_nearest_come_first() -> None:
    found = nearest([1.0, 0.0], [[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]], 2)
    assert [index for _, index in found] == [1, 2]
    assert found[1][0] == pytest.approx(cosine([1.0, 0.0], [1.0, 1.0])) == pytest.approx(0.5**0.5)


def test_Given_a_true_fallback_Then_nothing_is_unmet() -> None:
    again = [result("pytorch", attempts=[FAILED]), result("pytorch", attempts=[SKIPPED])]
    assert check_fallback([[1.0, 0.0], [2.0, 0.0]], again) == []


@pytest.mark.parametrize(
    ("again", "claim"),
    [
        (result("onnx", attempts=[FAILED]), "engine that was to fail"),
        (result("pytorch"), "do not name the attempt"),
        (result("pytorch", attempts=[SKIPPED]), "no batch was tried"),
        (result("pytorch", attempts=[FAILED], vector=(0.0, 1.0)), "the engines disagree"),
    ],
)
def test_Given_a_fallback_that_was_none_Then_the_demonstration_says_so(again: InferenceResult, claim: str) -> None:
    assert any(claim in one for one in check_fallback([[1.0, 0.0]], [again]))


def test_Given_small_batches_Then_the_demonstration_says_so() -> None:
    small = count("sentences", [result(batch=str(number // 8)) for number in range(400)])
    large = count("sentences", [result(batch=str(number // 10)) for number in range(400)])
    assert len(check_batches([small])) == 1
    assert check_batches([large]) == []
