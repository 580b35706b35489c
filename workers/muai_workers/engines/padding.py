"""Rows of different lengths into one rectangle, and which rows belong together in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PaddedRows:
    """Token ids as a model takes them; every array has the shape (num_rows, longest_row), type int64."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    """1 at a real token, 0 at padding."""
    positions: NDArray[np.int64]
    """Counted from each row's first real token; 0 at padding."""


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> PaddedRows:
    """Pad every row to the longest. Decoding pads on the left, so that every row's last token stands at the end."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = row
        mask[index, columns] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) * mask
    return PaddedRows(ids, mask, positions)


def group_by_length(lengths: Sequence[int], *, call_overhead_tokens: int, max_padded_tokens: int) -> list[list[int]]:
    """Divide rows into groups of similar length, each to be one forward pass.

    A group is closed when the padding that it has gathered costs more than one further call would, or when it would
    exceed `max_padded_tokens`; a row longer than that stands alone.

    Args:
        lengths: tokens of each row.
        call_overhead_tokens: what a forward pass costs beside its tokens, in tokens.
    Returns:
        indices into `lengths`, longest rows first: the largest allocation comes first, where it fails earliest.
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[index]
        fits = bool(groups) and (len(groups[-1]) + 1) * longest <= max_padded_tokens
        if fits and padding + longest - length <= call_overhead_tokens:
            groups[-1].append(index)
            padding += longest - length
        else:
            groups.append([index])
            longest, padding = length, 0
    return groups


def share_out(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Divide rows into parts of about as many tokens each, rows of like length together.

    Returns:
        indices into `lengths`, longest rows first; no part is empty, so there are fewer parts than asked for where
        there are fewer rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    total, before = sum(lengths), 0
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index in order:
        # A row belongs where its middle lies.
        at = (before + lengths[index] / 2) * num_parts / total if total else 0.0
        parts[min(int(at), num_parts - 1)].append(index)
        before += lengths[index]
    return [part for part in parts if part]
