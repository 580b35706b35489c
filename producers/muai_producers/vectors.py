"""Embeddings as they travel and are kept: 32-bit floats, the lowest byte first, as base64 where the wire is JSON."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Any

_MUST_SWAP = sys.byteorder == "big"


def as_bytes(vector: Sequence[float]) -> bytes:
    """Four bytes for each number."""
    numbers = array("f", vector)
    if _MUST_SWAP:
        numbers.byteswap()
    return numbers.tobytes()


def to_base64(raw: bytes) -> str:
    """What `as_bytes` gives, as text."""
    return base64.b64encode(raw).decode("ascii")


def from_base64(text: str) -> list[float]:
    """The numbers again, exactly as they were.

    Raises:
        ValueError: it is no base64, or not of whole numbers.
    """
    numbers = array("f")
    numbers.frombytes(base64.b64decode(text, validate=True))
    if _MUST_SWAP:
        numbers.byteswap()
    return numbers.tolist()


def unpack_embedding(outputs: dict[str, Any]) -> None:
    """Put the numbers in the place of an embedding in base64; all other outputs stay as they are."""
    embedding = outputs.get("embedding")
    if isinstance(embedding, str):
        outputs["embedding"] = from_base64(embedding)
