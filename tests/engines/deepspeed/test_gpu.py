"""DeepSpeed on GPUs: what a CPU cannot show. Skipped where there is none, and says so."""

from __future__ import annotations

import pytest
import torch
from tests import models

from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.engines.deepspeed import DeepSpeedEngine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is at hand"),
]


def answer(spec: models.ModelSpec, text: str, **options: object) -> EngineOutput:
    engine = DeepSpeedEngine(models.settings(deepspeed=options))
    try:
        (completion,) = engine.run(spec, spec.task, [models.request("1", spec, text, max_tokens=20)])
        assert isinstance(completion, Completion)
        assert completion.output is not None, completion.error
        return completion.output
    finally:
        engine.close()


@pytest.mark.parametrize("zero_inference", ["never", "always"])
def test_generation_on_gpus_says_what_the_model_was_trained_to_say(zero_inference: str) -> None:
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    output = answer(spec, "The train leaves the city", dtype="fp16", zero_inference=zero_inference)
    assert output.outputs["text"] == " at noon. It follows the coast to the south."
    assert (output.extra["device"], output.extra["dtype"]) == ("cuda", "fp16")


def test_layers_are_shared_out_among_the_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"one GPU only: {torch.cuda.get_device_name()}")
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    output = answer(spec, "The train leaves the city", tensor_parallel=2)
    assert output.outputs["text"] == " at noon. It follows the coast to the south."
    assert output.extra["tensor_parallel"] == 2


def test_kernels_serve_an_encoder_or_the_result_says_why_not() -> None:
    injected = answer(models.encoder_spec(), "A cat sleeps.", replace_with_kernel_inject=True)
    plain = answer(models.encoder_spec(), "A cat sleeps.", replace_with_kernel_inject=False)
    assert injected.extra["kernel_inject"] or "kernels" in " ".join(injected.extra["degradations"])
    assert injected.outputs["embedding"] == pytest.approx(plain.outputs["embedding"], abs=0.02)
