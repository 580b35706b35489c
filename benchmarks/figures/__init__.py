"""The figures by name, in the order in which they are measured."""

from __future__ import annotations

from benchmarks.figures import (
    advice,
    conversations,
    fairness,
    http,
    memory,
    model,
    monitoring,
    onnx,
    open_loop,
    queue,
    recording,
    tracing,
    tuning,
    vllm,
)
from benchmarks.figures.base import Measured, Measurement

FIGURES: dict[str, Measurement] = {
    "queue": queue.MEASUREMENT,
    "model": model.MEASUREMENT,
    "http": http.MEASUREMENT,
    "open-loop": open_loop.MEASUREMENT,
    "fairness": fairness.MEASUREMENT,
    "memory": memory.MEASUREMENT,
    "recording": recording.MEASUREMENT,
    "monitoring": monitoring.MEASUREMENT,
    "onnx": onnx.MEASUREMENT,
    "conversations": conversations.CHAT,
    "cache-budget": conversations.BUDGET,
    "vllm": vllm.MEASUREMENT,
    "tracing": tracing.MEASUREMENT,
    "tuning": tuning.MEASUREMENT,
    "advice": advice.MEASUREMENT,
}

__all__ = ["FIGURES", "Measured", "Measurement"]
