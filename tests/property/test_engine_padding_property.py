"""Rows and rectangles."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muai_workers.engines.padding import group_by_length, pad_rows, share_out

rows_strategy = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=20)


# Property 8: Variable-length sequences are padded correctly
@pytest.mark.property(8)
@given(rows=rows_strategy, side=st.sampled_from(("left", "right")))
def test_padded_rows_are_of_one_length_and_lose_nothing(rows: list[list[int]], side: Literal["left", "right"]) -> None:
    padded = pad_rows(rows, 100, side)
    width = max(map(len, rows))
    assert padded.ids.shape == padded.mask.shape == padded.positions.shape == (len(rows), width)
    for row, ids, mask, positions in zip(rows, padded.ids, padded.mask, padded.positions, strict=True):
        real = mask.astype(bool)
        assert ids[real].tolist() == row
        assert set(ids[~real].tolist()) <= {100}
        assert positions[real].tolist() == list(range(len(row)))
        padding = [0] * (width - len(row))
        assert mask.tolist() == (padding + [1] * len(row) if side == "left" else [1] * len(row) + padding)


@given(
    lengths=st.lists(st.integers(1, 500), max_size=60),
    overhead=st.integers(0, 1000),
    max_padded=st.integers(1, 4000),
)
def test_groups_hold_every_row_once_within_their_limits(lengths: list[int], overhead: int, max_padded: int) -> None:
    groups = group_by_length(lengths, call_overhead_tokens=overhead, max_padded_tokens=max_padded)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[index] for index in group]
        assert len(group) == 1 or len(group) * max(members) <= max_padded
        assert len(group) * max(members) - sum(members) <= overhead


@given(lengths=st.lists(st.integers(1, 500), max_size=60), num_parts=st.integers(1, 9))
def test_parts_hold_every_row_once_and_about_as_many_tokens_each(lengths: list[int], num_parts: int) -> None:
    parts = share_out(lengths, num_parts)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert len(parts) <= num_parts
    for part in parts:
        tokens = sum(lengths[index] for index in part)
        assert 0 < tokens <= sum(lengths) / num_parts + max(lengths)
    in_order = [lengths[index] for part in parts for index in part]
    assert in_order == sorted(lengths, reverse=True)
