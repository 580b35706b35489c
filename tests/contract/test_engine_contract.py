"""What every engine keeps: the fake and the real ones pass the same tests, the real ones on real models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import models
from tests.engine_subject import WRONG, Subject, assert_cut, errors_of, subject_named
from tests.engines_here import REAL

from muai_config import ModelSpec
from muai_producers.errors import (
    InputTooLongError,
    ModelLoadError,
    RequestCancelledError,
    UnsupportedTaskError,
)
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Engine, Piece

PROMPTS = ("The river is", "When one engine fails", "A", "Rain fell all night on the hills. In", "The queue was long")


def test_engine_says_why_it_is_available(subject: Subject) -> None:
    availability = subject.engine.availability()
    assert availability.available
    assert availability.reason


def test_engine_fits_the_protocol(subject: Subject) -> None:
    assert isinstance(subject.engine, Engine)
    assert subject.engine.refusal(subject.causal) is None


# Property 8: Variable-length sequences are padded correctly


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
    assert errors_of(completions) == WRONG
    assert completions["good"].output == subject.run(spec, [good])["good"].output


def test_an_overlong_prompt_is_cut_when_its_request_lets_it(subject: Subject) -> None:
    assert_cut(subject, subject.causal)


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


def test_a_folder_without_a_model_is_a_load_error(real: Subject, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="holds no model"):
        real.engine.load(models.folder_spec("nothing", "text-generation", tmp_path))


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


def counter_of_loads(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many models `engine` has really loaded since."""
    if engine.name == "fake":
        before = engine.loads
        return lambda: engine.loads - before
    loads: list[str] = []
    original = engine._load
    monkeypatch.setattr(engine, "_load", lambda spec: (loads.append(spec.name), original(spec))[1])
    return lambda: len(loads)
