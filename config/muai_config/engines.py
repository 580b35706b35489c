"""The engines and the tasks: their names, and which engine can serve which task."""

from collections.abc import Mapping
from typing import Final, Literal

EngineName = Literal["vllm", "deepspeed", "onnx", "pytorch"]
TaskName = Literal["text-generation", "chat", "embedding", "text-classification", "summarization"]

ENGINES: Final[tuple[EngineName, ...]] = ("vllm", "deepspeed", "onnx", "pytorch")
TASKS: Final[tuple[TaskName, ...]] = ("text-generation", "chat", "embedding", "text-classification", "summarization")

# What a chain is filtered by when the model names no engines of its own. PyTorch serves everything: it is the last
# resort. vLLM's strength is decoding; encoders gain nothing from it. Encoder-decoder models have no ONNX path.
TASKS_BY_ENGINE: Final[Mapping[EngineName, frozenset[TaskName]]] = {
    "vllm": frozenset({"text-generation", "chat"}),
    "deepspeed": frozenset({"text-generation", "chat", "embedding", "text-classification"}),
    "onnx": frozenset({"text-generation", "chat", "embedding", "text-classification"}),
    "pytorch": frozenset(TASKS),
}


def suits(engine: EngineName, task: TaskName) -> bool:
    """Whether `engine` can serve `task` at all, on whatever hardware."""
    return task in TASKS_BY_ENGINE[engine]
