"""What every engine keeps: the fake and the real ones pass the same tests, the real ones on real models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import models
from tests.engines_here import REAL, engines, real_engines

from muai_config import ModelSpec
from muai_producers.errors import (
    InputTooLongError,
    InvalidRequestError,
    ModelLoadError,
    RequestCancelledError,
    UnsupportedTaskError,
)
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Engine, Piece

EMBEDDED = st.lists(st.sampled_from(models.SENTENCES), min_size=1, max_size=12)
PROMPTS = ("The river is", "When one engine fails", "A", "Rain fell all night on the hills. In", "The queue was long")


@dataclass(frozen=True)
class Subject:
    """An engine under test and its models."""

    engine: Engine
    encoder: ModelSpec
    classifier: ModelSpec
    causal: ModelSpec
    examples: int
    """How many random batches are worth their time."""

    def run(
        self, spec: ModelSpec, requests: Sequence[InferenceRequest], task: str | None = None
    ) -> dict[str, Completion]:
        events = self.engine.run(spec, task or spec.task, requests)
        completions = [event for event in events if isinstance(event, Completion)]
        assert sorted(one.request_id for one in completions) == sorted(one.id for one in requests)
        return {one.request_id: one for one in completions}

    def outputs(self, spec: ModelSpec, requests: Sequence[InferenceRequest], task: str | None = None) -> list[Any]:
        completions = self.run(spec, requests, task)
        assert [one.error for one in completions.values()] == [None] * len(requests)
        return [completions[one.id].output.outputs for one in requests]  # type: ignore[union-attr]

    @property
    def small(self) -> ModelSpec:
        """The model that loads soonest."""
        return self.classifier if self.classifier.task in self.engine.capabilities.tasks else self.causal

    def embed(self, texts: Sequence[str]) -> Any:
        requests = [models.request(str(index), self.encoder, text) for index, text in enumerate(texts)]
        return np.array([one["embedding"] for one in self.outputs(self.encoder, requests)])

    def generate(self, prompts: Sequence[str], **parameters: Any) -> list[Any]:
        requests = [models.request(str(index), self.causal, text, **parameters) for index, text in enumerate(prompts)]
        return self.outputs(self.causal, requests)


@cache
def subject_named(name: str) -> Subject:
    if name == "fake":
        from muai_workers.engines.fake import FakeEngine

        spec = partial(models.model_spec, source="folder:/nowhere")
        return Subject(
            FakeEngine(),
            spec("encoder", "embedding", max_input_tokens=60),
            spec("classifier", "text-classification"),
            spec("causal", "text-generation", max_input_tokens=95),
            examples=100,
        )
    from muai_workers.engines.registry import create_engine

    return Subject(
        # What vLLM sets aside for keys and values on a CPU; the others take what they need of it.
        create_engine(name, models.settings(cache={"max_memory_mb": 64})),
        models.encoder_spec(max_input_tokens=256),
        models.folder_spec("tiny-classifier", "text-classification", models.classifier_folder()),
        models.folder_spec("tiny-causal", "text-generation", models.causal_folder()),
        examples=10,
    )


@pytest.fixture(params=engines())
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_named(request.param)


@pytest.fixture(params=real_engines())
def real(request: pytest.FixtureRequest) -> Subject:
    return subject_named(request.param)


@pytest.fixture(params=engines("embedding"))
def encoding(request: pytest.FixtureRequest) -> Subject:
    """One that serves encoders as well."""
    return subject_named(request.param)


@pytest.fixture(params=real_engines("embedding"))
def really_encoding(request: pytest.FixtureRequest) -> Subject:
    """A real one that serves encoders as well."""
    return subject_named(request.param)


def test_engine_says_why_it_is_available(subject: Subject) -> None:
    availability = subject.engine.availability()
    assert availability.available
    assert availability.reason


def test_engine_fits_the_protocol(subject: Subject) -> None:
    assert isinstance(subject.engine, Engine)
    assert subject.engine.refusal(subject.causal) is None


# Property 8: Variable-length sequences are padded correctly
@pytest.mark.property(8)
def test_embedding_does_not_depend_on_the_batch(encoding: Subject) -> None:
    single = {text: encoding.embed([text])[0] for text in models.SENTENCES}

    @settings(max_examples=encoding.examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EMBEDDED)
    def check(texts: list[str]) -> None:
        for text, vector in zip(texts, encoding.embed(texts), strict=True):
            assert cosine(vector, single[text]) > 0.9999

    check()


def test_embedding_does_not_depend_on_a_batch_that_is_divided(encoding: Subject) -> None:
    texts = [" ".join(models.SENTENCES[at:] + models.SENTENCES[:at]) for at in range(len(models.SENTENCES))] * 8
    texts += models.SENTENCES
    together = encoding.embed(texts)
    for text, vector in zip(texts[-2 * len(models.SENTENCES) :], together[-2 * len(models.SENTENCES) :], strict=True):
        assert cosine(vector, encoding.embed([text])[0]) > 0.9999


def test_embeddings_have_length_one(encoding: Subject) -> None:
    assert np.allclose(np.linalg.norm(encoding.embed(models.SENTENCES), axis=1), 1.0, atol=1e-5)


def test_embeddings_equal_those_of_sentence_transformers(really_encoding: Subject) -> None:
    for ours, theirs in zip(really_encoding.embed(models.SENTENCES), reference_embeddings(), strict=True):
        assert cosine(ours, theirs) > 0.9999


def test_generated_tokens_do_not_depend_on_the_batch(subject: Subject) -> None:
    together = subject.generate(PROMPTS, max_tokens=12)
    assert together == [subject.generate([prompt], max_tokens=12)[0] for prompt in PROMPTS]


def test_requests_of_a_batch_keep_their_own_parameters(subject: Subject) -> None:
    limits = [1, 7, 3, 2, 5]
    requests = [
        models.request(str(index), subject.causal, prompt, max_tokens=limit)
        for index, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    completions = subject.run(subject.causal, requests)
    for request, limit in zip(requests, limits, strict=True):
        output = completions[request.id].output
        assert output is not None
        assert output.output_tokens <= limit
        alone = subject.generate([request.inputs["prompt"]], max_tokens=limit)[0]
        assert output.outputs == alone


def test_a_short_answer_does_not_wait_for_a_long_one(real: Subject) -> None:
    requests = [
        models.request("long", real.causal, "The river", max_tokens=12),
        models.request("short", real.causal, "The baker opens", max_tokens=1),
    ]
    assert [one.request_id for one in real.engine.run(real.causal, "text-generation", requests)] == ["short", "long"]


def test_sampling_with_a_seed_does_not_depend_on_the_batch(real: Subject) -> None:
    hot = {"temperature": 1.8, "top_k": 50, "top_p": 0.98, "repetition_penalty": 1.1, "max_tokens": 10}
    requests = [models.request(str(index), real.causal, "The", seed=index, **hot) for index in range(4)]
    together = real.outputs(real.causal, requests)
    assert together == [real.outputs(real.causal, [request])[0] for request in requests]
    assert len({one["text"] for one in together}) > 1


def test_stop_strings_end_the_answer_of_their_request_alone(real: Subject) -> None:
    requests = [
        models.request("stops", real.causal, "The river is quiet in the", stop=("boat",), max_tokens=20),
        models.request("goes on", real.causal, "The river is quiet in the", max_tokens=20),
    ]
    stopped, full = real.outputs(real.causal, requests)
    assert full["text"].startswith(stopped["text"])
    assert "boat" in full["text"]
    assert stopped == {"text": " morning. A ", "finish_reason": "stop"}


def test_an_answer_that_is_cut_off_says_so(subject: Subject) -> None:
    assert subject.generate(["Rain fell all night on the hills"], max_tokens=2)[0]["finish_reason"] == "length"


def test_a_trained_model_ends_its_sentence_by_itself(real: Subject) -> None:
    answer = real.generate(["The train leaves the city"], max_tokens=60)[0]
    assert answer == {"text": " at noon. It follows the coast to the south.", "finish_reason": "stop"}


def test_chat_answers_the_last_turn(real: Subject) -> None:
    messages = [{"role": "user", "content": "Where is the boat?"}]
    requests = [models.request("chat", real.causal, messages, task="chat", max_tokens=20)]
    answer = real.outputs(real.causal, requests, "chat")[0]
    assert answer == {"text": "The boat waits at the old bridge.", "finish_reason": "stop"}


def test_usage_counts_tokens(subject: Subject) -> None:
    completion = subject.run(subject.causal, [models.request("one", subject.causal, "The river", max_tokens=1)])["one"]
    assert completion.output is not None
    assert completion.output.input_tokens > 0
    assert completion.output.output_tokens == 1


def test_labels_are_a_distribution_best_first(encoding: Subject) -> None:
    texts = ("what a wonderful film", "the service was terrible", "i love this book")
    requests = [models.request(text, encoding.classifier, text) for text in texts]
    for output in encoding.outputs(encoding.classifier, requests):
        scores = [one["score"] for one in output["labels"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)


def test_a_trained_classifier_is_right_about_plain_opinions(really_encoding: Subject) -> None:
    texts = {
        "what a wonderful film": "POSITIVE",
        "The service was terrible!": "NEGATIVE",
        "i love this book": "POSITIVE",
    }
    requests = [models.request(text, really_encoding.classifier, text) for text in texts]
    outputs = really_encoding.outputs(really_encoding.classifier, requests)
    assert [one["labels"][0]["label"] for one in outputs] == list(texts.values())


def test_wrong_requests_harm_no_neighbour(encoding: Subject) -> None:
    spec = encoding.encoder
    good = models.request("good", spec, "A cat sleeps.")
    requests = [
        models.request("wrong type", spec, 7),
        good,
        models.request("empty", spec, "   "),
        InferenceRequest(id="wrong key", model=spec.name, inputs={"prompt": "A cat sleeps."}),
        models.request("too long", spec, "word " * 3000),
    ]
    completions = encoding.run(spec, requests)
    errors = {name: type(one.error) for name, one in completions.items() if one.error is not None}
    assert errors == {
        "wrong type": InvalidRequestError,
        "empty": InvalidRequestError,
        "wrong key": InvalidRequestError,
        "too long": InputTooLongError,
    }
    alone = encoding.run(spec, [good])["good"].output
    assert completions["good"].output is not None
    assert alone is not None
    assert cosine(completions["good"].output.outputs["embedding"], alone.outputs["embedding"]) > 0.9999


def test_wrong_prompts_harm_no_neighbour(subject: Subject) -> None:
    spec = subject.causal
    good = models.request("good", spec, PROMPTS[0], max_tokens=4)
    requests = [
        models.request("wrong type", spec, 7),
        models.request("empty", spec, "   "),
        good,
        InferenceRequest(id="wrong key", model=spec.name, inputs={"text": "A cat sleeps."}),
        models.request("too long", spec, "river " * 200),
    ]
    completions = subject.run(spec, requests)
    errors = {name: type(one.error) for name, one in completions.items() if one.error is not None}
    assert errors == {
        "wrong type": InvalidRequestError,
        "empty": InvalidRequestError,
        "wrong key": InvalidRequestError,
        "too long": InputTooLongError,
    }
    assert completions["good"].output == subject.run(spec, [good])["good"].output


def test_an_overlong_text_is_cut_when_its_request_lets_it(encoding: Subject) -> None:
    assert_cut(encoding, encoding.encoder)


def test_an_overlong_prompt_is_cut_when_its_request_lets_it(subject: Subject) -> None:
    assert_cut(subject, subject.causal)


def assert_cut(subject: Subject, spec: ModelSpec) -> None:
    completion = subject.run(spec, [models.request("long", spec, "word " * 3000, truncate=True, max_tokens=1)])["long"]
    assert completion.output is not None
    assert 0 < completion.output.input_tokens <= (spec.max_input_tokens or 95)


def test_a_prompt_that_fills_the_context_is_refused(subject: Subject) -> None:
    completion = subject.run(subject.causal, [models.request("long", subject.causal, "river " * 200)])["long"]
    assert isinstance(completion.error, InputTooLongError)
    assert completion.error.details["input_tokens"] > completion.error.details["max_input_tokens"] == 95


def test_another_task_is_refused_request_by_request(real: Subject) -> None:
    requests = [models.request(str(index), real.causal, "text", task="text-classification") for index in range(2)]
    completions = real.run(real.causal, requests, "text-classification")
    assert {type(one.error) for one in completions.values()} == {UnsupportedTaskError}


def test_no_requests_no_completions(subject: Subject) -> None:
    assert subject.run(subject.small, []) == {}
    assert subject.run(subject.causal, []) == {}


def streaming(spec: ModelSpec, name: str, text: str, **parameters: Any) -> InferenceRequest:
    return msgspec.structs.replace(models.request(name, spec, text, **parameters), stream=True)


def test_the_pieces_of_a_stream_are_the_text_of_its_result(subject: Subject) -> None:
    if not subject.engine.capabilities.streaming:
        pytest.skip(f"{subject.engine.name} does not stream")
    plain = models.request("plain", subject.causal, PROMPTS[0], max_tokens=12)
    requests = [
        *(streaming(subject.causal, str(index), prompt, max_tokens=12) for index, prompt in enumerate(PROMPTS)),
        plain,
    ]
    pieces: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for event in subject.engine.run(subject.causal, "text-generation", requests):
        if isinstance(event, Piece):
            assert event.request_id not in texts
            pieces.setdefault(event.request_id, []).append(event.text)
        else:
            assert event.output is not None, event.error
            texts[event.request_id] = event.output.outputs["text"]
    assert "plain" not in pieces
    assert texts.pop("plain") == texts["0"]
    assert {name: "".join(parts) for name, parts in pieces.items()} == {
        name: text for name, text in texts.items() if text
    }
    assert any(len(parts) > 1 for parts in pieces.values())


def test_a_stop_string_never_shows_in_a_stream(subject: Subject) -> None:
    if not subject.engine.capabilities.streaming:
        pytest.skip(f"{subject.engine.name} does not stream")
    (whole,) = subject.generate([PROMPTS[3]], max_tokens=12)
    stop = whole["text"].strip()[3:6]
    request = streaming(subject.causal, "0", PROMPTS[3], max_tokens=12, stop=(stop,))
    events = list(subject.engine.run(subject.causal, "text-generation", [request]))
    told = "".join(event.text for event in events if isinstance(event, Piece))
    (completion,) = (event for event in events if isinstance(event, Completion))
    assert completion.output is not None
    assert told == completion.output.outputs["text"]
    assert stop not in told


def test_an_aborted_request_stops_and_its_neighbours_go_on(subject: Subject) -> None:
    if not subject.engine.capabilities.abort:
        pytest.skip(f"{subject.engine.name} cannot stop a request")
    requests = [streaming(subject.causal, str(index), PROMPTS[index], max_tokens=40) for index in (0, 3)]

    def run_and_abort() -> Completion:
        completions: dict[str, Completion] = {}
        for event in subject.engine.run(subject.causal, "text-generation", requests):
            if isinstance(event, Completion):
                completions[event.request_id] = event
            elif event.request_id == "3":
                subject.engine.abort(["3", "unknown"])
        assert completions["0"].output is not None
        return completions["3"]

    # An answer of a few tokens may be complete before this hears of its first.
    aborted = next((one for one in (run_and_abort() for _ in range(10)) if one.error is not None), None)
    assert aborted is not None
    assert isinstance(aborted.error, RequestCancelledError)
    (again,) = subject.run(subject.causal, requests[1:]).values()
    assert again.output is not None, "an abort must not outlive its request"


def test_a_model_is_loaded_once_under_eight_threads(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = subject.small
    subject.engine.unload(spec.name)
    count_loads = counter_of_loads(subject.engine, monkeypatch)
    barrier = threading.Barrier(8)

    def load(_: int) -> None:
        barrier.wait(timeout=30)
        subject.engine.load(spec)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(load, range(8)))
    assert count_loads() == 1
    assert subject.engine.loaded().count(spec.name) == 1


def test_threads_share_an_engine_without_touching_each_other(subject: Subject) -> None:
    encodes = subject.encoder.task in subject.engine.capabilities.tasks
    texts = [models.SENTENCES[index:] + models.SENTENCES[:index] for index in range(6 if encodes else 0)]
    alone = [subject.embed(batch) for batch in texts]
    written = [subject.generate([prompt], max_tokens=8) for prompt in PROMPTS]
    with ThreadPoolExecutor(6) as threads:
        embedded = threads.map(subject.embed, texts)
        generated = threads.map(lambda prompt: subject.generate([prompt], max_tokens=8), PROMPTS)
        for expected, vectors in zip(alone, embedded, strict=True):
            assert np.allclose(vectors, expected, atol=1e-5)
        assert list(generated) == written


def test_an_unloaded_model_is_gone_and_comes_back_when_asked_for(subject: Subject) -> None:
    spec = subject.small
    subject.engine.load(spec)
    subject.engine.unload(spec.name)
    assert spec.name not in subject.engine.loaded()
    subject.engine.unload("no such model")
    subject.outputs(spec, [models.request("again", spec, "good", max_tokens=1)])
    assert spec.name in subject.engine.loaded()


def test_memory_is_estimated_from_the_weights(real: Subject) -> None:
    spec = real.causal.model_copy(update={"dtype": "fp32"})
    (weights,) = models.causal_folder().glob("*.safetensors")
    assert real.engine.estimate_memory_bytes(spec) == pytest.approx(weights.stat().st_size, rel=0.01)


def test_memory_of_an_encoder_is_estimated_from_its_weights(really_encoding: Subject) -> None:
    # 22.7 million numbers of 4 bytes; ONNX Runtime has them once more for passes side by side.
    copies = 2 if really_encoding.engine.name == "onnx" and torch.get_num_threads() > 1 else 1
    estimated = really_encoding.engine.estimate_memory_bytes(models.encoder_spec(dtype="fp32"))
    assert estimated == pytest.approx(copies * 90.9e6, rel=0.01)


def test_a_folder_without_a_model_is_a_load_error(real: Subject, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds no model"):
        real.engine.load(models.folder_spec("nothing", "text-generation", tmp_path))


def test_a_model_trained_for_another_task_is_a_load_error(really_encoding: Subject) -> None:
    spec = models.model_spec("not-a-classifier", "text-classification", str(models.encoder_spec().source))
    with pytest.raises(ModelLoadError, match="was not trained for text-classification"):
        really_encoding.engine.load(spec)


@pytest.mark.engine
@pytest.mark.skipif(not {"onnx", "pytorch"} <= set(REAL), reason="of ONNX Runtime and PyTorch")
# Property 4: ONNX conversion preserves model behavior
@pytest.mark.property(4)
def test_onnx_answers_as_pytorch_does() -> None:
    onnx, pytorch = subject_named("onnx"), subject_named("pytorch")

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip())), min_size=1, max_size=6))
    def check(texts: list[str]) -> None:
        for ours, theirs in zip(onnx.embed(texts), pytorch.embed(texts), strict=True):
            assert np.abs(ours - theirs).max() < 1e-4
        requests = [models.request(str(index), onnx.classifier, text) for index, text in enumerate(texts)]
        for ours, theirs in zip(
            onnx.outputs(onnx.classifier, requests), pytorch.outputs(pytorch.classifier, requests), strict=True
        ):
            scores = [{one["label"]: one["score"] for one in answer["labels"]} for answer in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)

    check()
    assert onnx.generate(PROMPTS, max_tokens=20) == pytorch.generate(PROMPTS, max_tokens=20)


def cosine(first: Any, second: Any) -> float:
    return float(np.dot(first, second) / (np.linalg.norm(first) * np.linalg.norm(second)))


@cache
def reference_embeddings() -> Any:
    from sentence_transformers import SentenceTransformer

    folder = models.encoder_spec().source.local_folder()
    return SentenceTransformer(str(folder), device="cpu").encode(list(models.SENTENCES))


def counter_of_loads(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many models `engine` has really loaded since."""
    if engine.name == "fake":
        before = engine.loads
        return lambda: engine.loads - before
    loads: list[str] = []
    original = engine._load
    monkeypatch.setattr(engine, "_load", lambda spec: (loads.append(spec.name), original(spec))[1])
    return lambda: len(loads)
