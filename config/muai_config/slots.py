"""How many batches a worker of an engine takes at once, and how many it holds ready. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from muai_config.catalog import DECODING_TASKS
from muai_config.engines import EngineName
from muai_config.settings import Settings

ALWAYS_CONTINUOUS: frozenset[EngineName] = frozenset({"vllm"})
LOOPING: frozenset[EngineName] = frozenset({"deepspeed", "onnx", "pytorch"})
"""Engines whose decoding loop admits requests while others run, and whose encoders run batch by batch."""


@dataclass(frozen=True)
class Slots:
    """Of one worker."""

    running: int
    """Batches at once."""
    ahead: int
    """Further batches that it holds ready for each of them."""


def slots_of(settings: Settings, engine: EngineName) -> Slots:
    """An engine that batches continuously has many slots and nothing waiting before them: what it holds ready could as
    well run already, and a long answer must not keep a short one out.
    """
    queue = settings.queue
    if batches_continuously(settings, engine):
        return Slots(max(queue.continuous_slots, queue.worker_concurrency), 0)
    return Slots(queue.worker_concurrency, queue.worker_prefetch)


def batches_continuously(settings: Settings, engine: EngineName) -> bool:
    """Whether requests join those that run, rather than wait for a batch of theirs.

    Where every model that a worker of these may serve generates, it takes further batches into those that run.
    An encoder gains nothing by many small batches at once, and would lose its large ones; so where there is one among
    the models, batches are sent as encoders want them.
    """
    if engine in ALWAYS_CONTINUOUS:
        return True
    tasks = {spec.task for spec in settings.models.values() if engine in settings.chain(spec)}
    return engine in LOOPING and bool(tasks) and tasks <= DECODING_TASKS
