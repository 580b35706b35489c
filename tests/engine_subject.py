"""Engines under test with their models, each loaded once for all tests of a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from muai_config import ModelSpec
from muai_producers.errors import InputTooLongError, InvalidRequestError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, Engine
from tests import models

WRONG = {
    "wrong type": InvalidRequestError,
    "empty": InvalidRequestError,
    "wrong key": InvalidRequestError,
    "too long": InputTooLongError,
}
"""How each of these requests is refused."""


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


def assert_cut(subject: Subject, spec: ModelSpec) -> None:
    completion = subject.run(spec, [models.request("long", spec, "word " * 3000, truncate=True, max_tokens=1)])["long"]
    assert completion.output is not None
    assert 0 < completion.output.input_tokens <= (spec.max_input_tokens or 95)


def cosine(first: Any, second: Any) -> float:
    return float(np.dot(first, second) / (np.linalg.norm(first) * np.linalg.norm(second)))


def errors_of(completions: Mapping[str, Completion]) -> dict[str, type[Exception]]:
    """The kind of error of each request that has one."""
    return {name: type(one.error) for name, one in completions.items() if one.error is not None}
