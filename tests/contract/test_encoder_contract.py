"""What every engine that serves encoders keeps: embeddings and labels, the real ones on real models."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import models
from tests.engine_subject import WRONG, Subject, assert_cut, cosine, errors_of

from muai_producers.errors import (
    ModelLoadError,
)
from muai_producers.vectors import from_base64
from muai_producers.wire import InferenceRequest

EMBEDDED = st.lists(st.sampled_from(models.SENTENCES), min_size=1, max_size=12)


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


def test_embeddings_in_base64_are_the_same_numbers(encoding: Subject) -> None:
    formats = ["float", "base64", "base64", "float"]
    requests = [
        models.request(f"{text} {number}", encoding.encoder, text, encoding_format=one)
        for text in models.SENTENCES
        for number, one in enumerate(formats)
    ]
    outputs = [one["embedding"] for one in encoding.outputs(encoding.encoder, requests)]
    assert [type(one) for one in outputs] == [list, str, str, list] * len(models.SENTENCES)
    for packed, whole in zip(outputs[1::4], outputs[0::4], strict=True):
        assert from_base64(packed) == pytest.approx(whole, abs=1e-6)


def test_embeddings_have_length_one(encoding: Subject) -> None:
    assert np.allclose(np.linalg.norm(encoding.embed(models.SENTENCES), axis=1), 1.0, atol=1e-5)


def test_embeddings_equal_those_of_sentence_transformers(really_encoding: Subject) -> None:
    for ours, theirs in zip(really_encoding.embed(models.SENTENCES), reference_embeddings(), strict=True):
        assert cosine(ours, theirs) > 0.9999


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
    assert errors_of(completions) == WRONG
    alone = encoding.run(spec, [good])["good"].output
    assert completions["good"].output is not None
    assert alone is not None
    assert cosine(completions["good"].output.outputs["embedding"], alone.outputs["embedding"]) > 0.9999


def test_an_overlong_text_is_cut_when_its_request_lets_it(encoding: Subject) -> None:
    assert_cut(encoding, encoding.encoder)


def test_memory_of_an_encoder_is_estimated_from_its_weights(really_encoding: Subject) -> None:
    # 22.7 million numbers of 4 bytes; ONNX Runtime has them once more for passes side by side.
    copies = 2 if really_encoding.engine.name == "onnx" and torch.get_num_threads() > 1 else 1
    estimated = really_encoding.engine.estimate_memory_bytes(models.encoder_spec(dtype="fp32"))
    assert estimated == pytest.approx(copies * 90.9e6, rel=0.01)


def test_a_model_trained_for_another_task_is_a_load_error(really_encoding: Subject) -> None:
    spec = models.model_spec("not-a-classifier", "text-classification", str(models.encoder_spec().source))
    with pytest.raises(ModelLoadError, match="was not trained for text-classification"):
        really_encoding.engine.load(spec)


@cache
def reference_embeddings() -> Any:
    from sentence_transformers import SentenceTransformer

    folder = models.encoder_spec().source.local_folder()
    return SentenceTransformer(str(folder), device="cpu").encode(list(models.SENTENCES))
