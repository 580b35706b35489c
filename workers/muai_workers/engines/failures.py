"""What a library raised, as an error of our tree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from muai_producers.errors import InferenceFailedError, ModelLoadError, MuaiError, OutOfMemoryError

_PYDANTIC_HEAD = re.compile(r"\d+ validation errors? for ")
# CUDA, PyTorch's CPU allocator, and ONNX Runtime's arena, in that order.
_OUT_OF_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "failed to allocate memory")


def as_engine_error(error: Exception) -> MuaiError:
    """An error of a run; those of our tree stay as they are, the rest are kept as the cause."""
    if isinstance(error, MuaiError):
        return error
    details = {"cause": type(error).__name__}
    translated: MuaiError
    if is_out_of_memory(error):
        translated = OutOfMemoryError(f"out of memory: {_first_line(error)}", details)
    else:
        translated = InferenceFailedError(f"{type(error).__name__}: {_first_line(error)}", details)
    translated.__cause__ = error
    return translated


def not_a_number(model: str, how: Mapping[str, Any]) -> InferenceFailedError:
    """The error for a request whose answer holds NaN: wrong to send, and no JSON.

    Args:
        how: device and number format, for whoever reads the message.
    """
    told = ", ".join(f"{name} {value}" for name, value in how.items())
    message = f"{model} answered with NaN ({told}); a wider number format may help"
    return InferenceFailedError(message, {"model": model, **how})


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library said that memory ran out; no library is imported to find out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY_WORDS)


@contextmanager
def raising_engine_errors() -> Iterator[None]:
    """Turn what a library raises while it runs into an `EngineError`."""
    try:
        yield
    except MuaiError:
        raise
    except Exception as error:
        raise as_engine_error(error) from error


@contextmanager
def raising_load_errors(model: str, engine: str) -> Iterator[None]:
    """Turn what a library raises while it loads a model into a `ModelLoadError`, or `OutOfMemoryError`."""
    details = {"model": model, "engine": engine}
    try:
        yield
    except MuaiError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"{engine} has no memory for {model}: {_first_line(error)}", details) from error
        cause = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelLoadError(f"{engine} could not load {model}: {cause}", details) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and _PYDANTIC_HEAD.match(lines[0]):
        lines = [line.strip().partition(" [type=")[0] for line in lines[1:]]
        # The place, where there is one, and what is wrong there.
        lines = [": ".join(lines[:2]) if not lines[0].startswith("Value error") else lines[0]]
    return lines[0][:500] if lines else "no message"
