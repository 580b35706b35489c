"""Which GPUs a worker process gets: from `--gpus` to groups of them. Pure, and without any GPU library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from muai_config import Settings

SHARING = {"vllm": "tensor_parallel_size", "deepspeed": "tensor_parallel"}
"""Engines that share the layers of a model among GPUs, and the setting that says among how many."""
_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")
_DEVICE = re.compile(r"\d{1,4}|(?:GPU|MIG)-[0-9A-Za-z/-]+")


def parse_gpus(text: str, visible: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """The GPUs that `0,1`, `0-3`, `GPU-<uuid>` or `all` stand for, in order.

    Args:
        visible: asked for `all` only.
    Raises:
        ValueError: says what is wrong with the text.
    """
    if text.strip() == "all":
        found = tuple(visible())
        if not found:
            raise ValueError("all: no GPU is visible here")
        return found
    gpus: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        span = _RANGE.fullmatch(part)
        if span is not None:
            first, last = int(span[1]), int(span[2])
            if first > last:
                raise ValueError(f"{part!r} counts downwards")
            gpus += [str(number) for number in range(first, last + 1)]
        elif _DEVICE.fullmatch(part):
            gpus.append(part)
        else:
            raise ValueError(
                f"{part!r} is no GPU: allowed are numbers, ranges such as 0-3, GPU-… or MIG-… ids, and all"
            )
    if len(set(gpus)) < len(gpus):
        raise ValueError(f"{text!r} names a GPU twice")
    return tuple(gpus)


def group_gpus(gpus: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Cut the GPUs into groups, one for each worker process.

    Raises:
        ValueError: they do not divide evenly.
    """
    if len(gpus) % size:
        raise ValueError(
            f"{len(gpus)} GPUs cannot be shared out in groups of {size}, which the engine is configured for"
        )
    return [tuple(gpus[start : start + size]) for start in range(0, len(gpus), size)]


def with_tensor_parallel(settings: Settings, engine: str, size: int | None) -> Settings:
    """The settings with as many GPUs to each layer of the engine's models as the command line says.

    Raises:
        ValueError: the engine runs a model on one GPU.
    """
    if size is None or (size == 1 and engine not in SHARING):
        return settings
    if engine not in SHARING:
        raise ValueError(
            f"{engine} runs a model on one GPU; {' and '.join(SHARING)} share its layers among several: for more "
            "throughput leave the option out, and each GPU gets a worker of its own"
        )
    section = getattr(settings.optimization, engine).model_copy(update={SHARING[engine]: size})
    return settings.model_copy(update={"optimization": settings.optimization.model_copy(update={engine: section})})


def group_size(settings: Settings, engine: str) -> int:
    """How many GPUs one process of the engine is configured to use."""
    if engine == "vllm":
        vllm = settings.optimization.vllm
        return vllm.tensor_parallel_size * vllm.pipeline_parallel_size
    if engine == "deepspeed":
        return settings.optimization.deepspeed.tensor_parallel * settings.optimization.deepspeed.pipeline_parallel
    return 1
