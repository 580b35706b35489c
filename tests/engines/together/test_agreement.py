"""The same model, the same prompts: every engine gives the same greedy tokens, on one device or spread over several."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests import models
from tests.engines.answers import ask
from workers.environments.build import names, python_of

pytestmark = pytest.mark.engine
# The model has random weights: its texts mean nothing, and leave no chance for two engines to agree by accident.
PROMPTS = (
    "The river is quiet",
    "When one engine fails the next engine takes the work.",
    "A",
    "Rain fell all night on the hills. In the morning the garden was green. " * 3,
    "The queue was long but it moved fast",
)
HERE = Path(sys.executable)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": ("onnx", {}),
    "vllm": ("vllm", {}),
    "vllm, tensor parallel 2": ("vllm", {"vllm": {"tensor_parallel_size": 2}}),
    "vllm, pipeline parallel 2": ("vllm", {"vllm": {"pipeline_parallel_size": 2, "enforce_eager": False}}),
    "deepspeed": ("deepspeed", {}),
    "deepspeed, tensor parallel 2": ("deepspeed", {"deepspeed": {"tensor_parallel": 2}}),
}


@cache
def folder() -> Path:
    from muai_workers.models.tiny import build_tiny_causal

    return build_tiny_causal(models.scratch_folder() / "agreement", train=False, context_tokens=256)


@cache
def expected() -> list[dict[str, Any]]:
    return ask(HERE, "pytorch", folder(), PROMPTS)


def built(engine: str) -> bool:
    """Whether the engine has its environment, or runs in this one."""
    return engine in ("onnx", "pytorch") or engine in names()


@pytest.mark.parametrize("variant", [name for name, (engine, _) in VARIANTS.items() if built(engine)])
def test_an_engine_answers_as_pytorch_does_token_by_token(variant: str) -> None:
    engine, optimization = VARIANTS[variant]
    python = HERE if engine == "onnx" else python_of(engine)
    answers = ask(python, engine, folder(), PROMPTS, **optimization)
    assert any(answer["tokens"] > 20 for answer in expected())
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in expected()]
    # An answer that is cut off within a character: engines differ in whether they show that there was one.
    texts = [[answer["text"].rstrip("\ufffd") for answer in given] for given in (answers, expected())]
    assert texts[0] == texts[1]
