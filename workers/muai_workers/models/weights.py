"""What a model's safetensors files hold, read from their headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def count_parameters(folder: Path) -> int:
    """Numbers in the model's weights, without loading them; 0 when there are no safetensors files."""
    return sum(math.prod(tensor["shape"]) for path in weight_files(folder) for tensor in _tensors(path))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order of name."""
    return sorted(folder.glob("*.safetensors"))


def _tensors(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, dict[str, Any]] = json.loads(file.read(header_bytes))
    yield from (tensor for name, tensor in header.items() if name != "__metadata__")
