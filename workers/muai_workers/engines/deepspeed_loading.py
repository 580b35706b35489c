"""A model in one rank: loaded whole, shared out by DeepSpeed, and compared with what it answered before."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from muai_producers.errors import ModelLoadError
from muai_workers.engines.deepspeed_messages import Ready, Start
from muai_workers.engines.deepspeed_plan import (
    GENERATES,
    TOLERANCES,
    DeepSpeedPlan,
    DeviceFacts,
    plan_ranks,
)
from muai_workers.engines.encoder import Forward
from muai_workers.engines.torch_causal import CausalDecoder, rows_can_join
from muai_workers.engines.torch_encoder import load_encoder, torch_forward
from muai_workers.engines.torch_loading import TorchPlan, load_module, read_config
from muai_workers.models.weights import count_parameters

log = logging.getLogger(__name__)
_DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
PROBE = ((3, 5, 4, 6, 7, 5, 3, 4), (4, 4, 6, 3, 5, 7, 6, 5))
"""Token ids that every vocabulary has."""


@dataclass(frozen=True)
class LoadedShare:
    """What a rank computes with: `forward` for encoders, `new_decoder` for causal models."""

    ready: Ready
    forward: Forward | None = None
    new_decoder: Callable[[], CausalDecoder] | None = None


def load_share(start: Start, rank: int, world_size: int, rendezvous: Path) -> LoadedShare:
    """Load this rank's share; all ranks do it together.

    Raises:
        ModelLoadError: the weights are not the task's, or the shared-out model answers otherwise than the whole one.
    """
    if start.num_threads is not None:
        torch.set_num_threads(start.num_threads)
    device = _device(rank)
    _meet(device, rank, world_size, rendezvous)
    facts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(facts, _facts(device))
    plan = plan_ranks(start.spec, start.settings, facts, count_parameters(start.folder))
    try:
        return _load(start, plan, device, rank)
    except Exception as error:
        # All ranks fail alike: what kernels cannot do depends on the model.
        if not plan.kernel_inject:
            raise
        reason = f"the model's own layers instead of DeepSpeed's kernels: {type(error).__name__}: {error}"[:300]
        again = replace(plan, kernel_inject=False, degradations=(*plan.degradations, reason))
        return _load(start, again, device, rank)


def _device(rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _facts(device: torch.device) -> DeviceFacts:
    if device.type == "cpu":
        return DeviceFacts("cpu", 0)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return DeviceFacts("cuda", free_bytes, torch.cuda.is_bf16_supported())


def _meet(device: torch.device, rank: int, world_size: int, rendezvous: Path) -> None:
    """Join the other ranks. DeepSpeed takes over the process group that it finds."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    import deepspeed

    if device.type == "cpu" and not _can_compile(world_size):
        # Ranks then add up their parts through gloo: slower than through shared memory, and just as right.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _can_compile(world_size: int) -> bool:
    """Whether the compiled reduction is worth having, and what it is compiled with is here."""
    import shutil

    return world_size > 1 and shutil.which("ninja") is not None and shutil.which("g++") is not None


def _load(start: Start, plan: DeepSpeedPlan, device: torch.device, rank: int) -> LoadedShare:
    # Loaded into main memory: what is to be shared out need not fit on one device.
    source = read_config(start.spec, start.folder)
    torch_plan = TorchPlan(
        start.spec, start.folder, source, torch.device("cpu"), _DTYPES[plan.dtype], start.attention, compile=False
    )
    wrapper: Any = None
    if start.spec.task in GENERATES:
        whole: Any = load_module(AutoModelForCausalLM, torch_plan)
    else:
        wrapper, _ = load_encoder(torch_plan)
        whole = wrapper.model
    accepted = frozenset(inspect.signature(whole.forward).parameters)
    num_bytes_whole = _num_bytes(whole)
    before = _probe(whole, torch.device("cpu")) if rank == 0 else None
    shared = _shared_out(whole, plan, device)
    _compare(start, plan, before, _probe(shared, device))
    torch_plan = replace(torch_plan, device=device)
    ready = Ready(
        _told_of_sharing(plan, start, shared, num_bytes_whole),
        device.type,
        _num_bytes(shared),
        joins=rows_can_join(torch_plan.config, accepted),
    )
    if wrapper is None:
        return LoadedShare(
            ready, new_decoder=lambda: CausalDecoder(shared, torch_plan.config, device, accepted, ready.joins)
        )
    wrapper.model = shared
    return LoadedShare(ready, forward=torch_forward(wrapper, torch_plan))


def _shared_out(module: Any, plan: DeepSpeedPlan, device: torch.device) -> Any:
    import deepspeed

    if not plan.zero:
        engine = deepspeed.init_inference(
            module,
            tensor_parallel={"tp_size": plan.world_size},
            dtype=_DTYPES[plan.dtype],
            replace_with_kernel_inject=plan.kernel_inject,
        )
        return engine.module
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"}},
        "fp16": {"enabled": plan.dtype == "fp16"},
        "bf16": {"enabled": plan.dtype == "bf16"},
    }
    # One weight after the other, so that the device never holds more than one of them.
    deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=_DTYPES[plan.dtype])
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    engine = deepspeed.initialize(model=module, config=config)[0]
    return engine.module.eval()


@torch.inference_mode()
def _probe(module: Any, device: torch.device) -> torch.Tensor:
    """What the model answers to a fixed input: logits, or the vectors of the last layer."""
    ids = torch.tensor(PROBE, device=device)
    answer: torch.Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return answer.float().cpu()


def _compare(start: Start, plan: DeepSpeedPlan, before: torch.Tensor | None, after: torch.Tensor) -> None:
    """All ranks come to the same verdict, that of rank 0."""
    verdict: list[Any] = [None]
    if before is not None:
        difference = float((before - after).abs().max() / before.abs().max())
        allowed = TOLERANCES[plan.dtype]
        verdict[0] = (difference, allowed) if not difference <= allowed else None  # NaN is not
    torch.distributed.broadcast_object_list(verdict, 0)
    if verdict[0] is not None:
        difference, allowed = verdict[0]
        raise ModelLoadError(
            f"{start.spec.name} answers otherwise under DeepSpeed than by itself: by {difference:.3g} of its largest "
            f"number, and {allowed:.3g} is allowed for {plan.dtype}",
            {"model": start.spec.name, "difference": difference, "allowed": allowed},
        )


def _told_of_sharing(plan: DeepSpeedPlan, start: Start, shared: Any, whole_bytes: int) -> DeepSpeedPlan:
    """The plan, with a word about layers that DeepSpeed left whole."""
    if plan.world_size == 1 or plan.zero or _num_bytes(shared) < 0.95 * whole_bytes:
        return plan
    reason = (
        f"no tensor parallelism: DeepSpeed knows no way to share the layers of {start.spec.name}; every rank has all"
    )
    return replace(plan, degradations=(*plan.degradations, reason))


def _num_bytes(module: Any) -> int:
    # ZeRO leaves an empty tensor in place of a weight, and the rank's share of it beside.
    own = [getattr(one, "ds_tensor", None) for one in module.parameters()]
    return sum(
        (one if part is None else part).numel() * one.element_size()
        for one, part in zip(module.parameters(), own, strict=True)
    )
