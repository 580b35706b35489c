"""How DeepSpeed is to run a model on the devices that are here, and what of the wishes they cannot do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from muai_config import ModelSpec
from muai_config.engines import TaskName
from muai_config.optimization import DeepSpeedSettings

DeviceKind = Literal["cpu", "cuda"]
DtypeName = Literal["fp16", "fp32", "bf16"]
DTYPE_BYTES: dict[DtypeName, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
GENERATES: frozenset[TaskName] = frozenset({"text-generation", "chat"})
ROOM_FOR_WEIGHTS = 0.8
"""Of a GPU's free memory; the rest is for keys, values and what a forward pass needs."""
TOLERANCES: dict[DtypeName, float] = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
"""How far answers of the model under DeepSpeed may be from those before, as a share of the largest of them."""


@dataclass(frozen=True)
class DeviceFacts:
    """What one rank has to compute on."""

    kind: DeviceKind
    free_bytes: int
    has_bf16: bool = True


@dataclass(frozen=True)
class DeepSpeedPlan:
    """How every rank of a model runs it."""

    world_size: int
    dtype: DtypeName
    kernel_inject: bool
    zero: bool
    """ZeRO-Inference: the weights lie in main memory, shared out among the ranks, and each layer's come to the device
    when it is computed."""
    degradations: tuple[str, ...] = ()
    """What was asked for and is not done, each with its reason."""


def plan_ranks(
    spec: ModelSpec, settings: DeepSpeedSettings, devices: Sequence[DeviceFacts], num_parameters: int
) -> DeepSpeedPlan:
    """Decide for `devices`, one for each rank; they may differ, and what the least of them cannot do none does."""
    kind = devices[0].kind
    told: list[str] = []
    dtype: DtypeName = settings.dtype if spec.dtype == "auto" else spec.dtype
    if dtype == "fp16" and kind == "cpu":
        dtype = "fp32"
        told.append("fp32 instead of fp16: on a CPU DeepSpeed computes in fp32 or bf16")
    if dtype == "bf16" and not all(device.has_bf16 for device in devices):
        dtype = "fp16"
        told.append("fp16 instead of bf16: this GPU has no bf16")
    zero, reason = _decide_zero(settings, devices, num_parameters * DTYPE_BYTES[dtype])
    if reason:
        told.append(reason)
    kernel_inject = False
    if settings.replace_with_kernel_inject:
        against = _why_no_kernels(spec.task, kind, zero)
        kernel_inject = not against
        if against:
            told.append(f"the model's own layers instead of DeepSpeed's kernels: {against}")
    return DeepSpeedPlan(len(devices), dtype, kernel_inject, zero, tuple(told))


def _decide_zero(settings: DeepSpeedSettings, devices: Sequence[DeviceFacts], weights_bytes: int) -> tuple[bool, str]:
    if settings.zero_inference == "always":
        return True, ""
    if settings.zero_inference == "never" or devices[0].kind == "cpu":
        return False, ""  # what does not fit into a CPU's memory does not fit beside it either
    room_bytes = min(device.free_bytes for device in devices) * ROOM_FOR_WEIGHTS
    if weights_bytes / len(devices) <= room_bytes:
        return False, ""
    reason = (
        f"ZeRO-Inference, with the weights in main memory: {weights_bytes / len(devices) / 1e9:.1f} GB for each GPU do "
        f"not fit into the {room_bytes / 1e9:.1f} GB that are free for them"
    )
    return True, reason


def _why_no_kernels(task: TaskName, kind: DeviceKind, zero: bool) -> str:
    if kind == "cpu":
        return "they are for GPUs"
    if zero:
        return "ZeRO-Inference moves the weights of the model's own layers"
    if task in GENERATES:
        return "they keep keys and values in one place for each process, which requests that come and go cannot share"
    return ""


def refusal(spec: ModelSpec, settings: DeepSpeedSettings, tasks: frozenset[str]) -> str | None:
    """Why DeepSpeed cannot serve the model as it is configured; None when it can try."""
    if spec.task not in tasks:
        return f"the deepspeed engine has no {spec.task}: encoder-decoder models are pytorch's"
    if settings.pipeline_parallel > 1:
        return (
            f"optimization.deepspeed.pipeline_parallel is {settings.pipeline_parallel}, and DeepSpeed has no pipeline "
            "for inference with keys and values; set it to 1 and optimization.deepspeed.tensor_parallel to the number "
            "of GPUs, or serve the model with vllm"
        )
    return None
