"""What DeepSpeed is asked to do on which devices, and what is said of what it cannot."""

from __future__ import annotations

from typing import Any

import pytest
from tests import models

from muai_config.optimization import DeepSpeedSettings
from muai_workers.engines.deepspeed_plan import DeepSpeedPlan, DeviceFacts, plan_ranks, refusal

GPU = DeviceFacts("cuda", free_bytes=10_000_000_000)
CPU = DeviceFacts("cpu", free_bytes=0)
TASKS = frozenset({"text-generation", "chat", "embedding", "text-classification"})


def planned(
    devices: list[DeviceFacts], task: str = "chat", parameters: int = 1_000_000, **options: Any
) -> DeepSpeedPlan:
    fields = {"dtype": options.pop("model_dtype", "auto")}
    spec = models.model_spec("model", task, "hub:none", **fields)
    return plan_ranks(spec, DeepSpeedSettings.model_validate(options), devices, parameters)


def test_on_a_cpu_fp16_and_kernels_are_done_without_and_said_to_be() -> None:
    plan = planned([CPU, CPU])
    assert (plan.world_size, plan.dtype, plan.kernel_inject, plan.zero) == (2, "fp32", False, False)
    assert len(plan.degradations) == 2
    assert "fp32 instead of fp16" in plan.degradations[0]
    assert "kernels" in plan.degradations[1]


def test_what_a_cpu_can_do_is_done_without_a_word() -> None:
    plan = planned([CPU], dtype="bf16", replace_with_kernel_inject=False)
    assert (plan.dtype, plan.degradations) == ("bf16", ())


def test_a_models_own_number_format_goes_before_the_engines() -> None:
    assert planned([GPU], dtype="fp16", model_dtype="bf16").dtype == "bf16"


def test_the_least_of_the_devices_decides() -> None:
    plan = planned([GPU, DeviceFacts("cuda", 10_000_000_000, has_bf16=False)], dtype="bf16")
    assert plan.dtype == "fp16"
    assert "no bf16" in plan.degradations[0]


@pytest.mark.parametrize(("task", "expected"), [("embedding", True), ("chat", False)])
def test_kernels_take_the_place_of_layers_where_requests_keep_no_state(task: str, expected: bool) -> None:
    plan = planned([GPU], task)
    assert plan.kernel_inject is expected
    assert bool(plan.degradations) is not expected


@pytest.mark.parametrize(
    ("parameters", "num_gpus", "setting", "expected"),
    [
        (3_900_000_000, 1, "auto", False),  # 7.8 of the 8 GB that weights may take
        (4_100_000_000, 1, "auto", True),
        (4_100_000_000, 2, "auto", False),
        (9_000_000_000, 2, "auto", True),
        (9_000_000_000, 2, "never", False),
        (1_000_000, 1, "always", True),
    ],
)
def test_weights_that_do_not_fit_lie_in_main_memory(
    parameters: int, num_gpus: int, setting: str, expected: bool
) -> None:
    plan = planned([GPU] * num_gpus, parameters=parameters, zero_inference=setting, replace_with_kernel_inject=False)
    assert plan.zero is expected
    assert bool(plan.degradations) is (expected and setting == "auto")


def test_with_zero_inference_there_are_no_kernels() -> None:
    plan = planned([GPU], "embedding", zero_inference="always")
    assert not plan.kernel_inject
    assert "ZeRO" in plan.degradations[0]


def test_pipeline_stages_are_refused_with_the_way_out() -> None:
    settings = DeepSpeedSettings(pipeline_parallel=2)
    for task in ("chat", "embedding"):
        reason = refusal(models.model_spec("model", task, "hub:none"), settings, TASKS)
        assert reason is not None
        assert "pipeline_parallel is 2" in reason
        assert "tensor_parallel" in reason
        assert "vllm" in reason
    assert refusal(models.model_spec("model", "chat", "hub:none"), DeepSpeedSettings(), TASKS) is None


def test_encoder_decoder_models_are_refused() -> None:
    reason = refusal(models.model_spec("model", "summarization", "hub:none"), DeepSpeedSettings(), TASKS)
    assert reason is not None
    assert "pytorch" in reason
