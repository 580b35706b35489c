"""What computes the steps of generation: one forward pass for all rows of a group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from muai_workers.engines.padding import PaddedRows
from muai_workers.kv_cache import KeysAndValues


class Decoder(Protocol):
    """A group of rows on its way through a model, with its keys and values.

    Logits have the shape (num_rows, vocabulary). All calls for one model come from one thread.
    """

    def start(self, rows: PaddedRows) -> torch.Tensor:
        """Take in the prompts, padded as `DecodingModel` was told; returns the logits that follow them."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; returns the logits that follow."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        ...


@runtime_checkable
class JoiningDecoder(Decoder, Protocol):
    """A decoder whose rows can come and go, and whose keys and values can be taken out and put in."""

    joins: bool
    """Whether it really can, for this model."""

    def resume(self, rows: PaddedRows, kept: Sequence[KeysAndValues | None]) -> torch.Tensor:
        """As `start`, for rows whose first tokens are computed already.

        Args:
            rows: the tokens that are still to be computed, with positions counted from the first of them.
            kept: for each row the keys and values of the tokens before those.
        """
        ...

    def join(self, other: Any) -> None:
        """Take in the rows of another group, behind those that are here. When it raises, nothing has changed."""
        ...

    def kept(self, row: int) -> KeysAndValues:
        """A copy of a row's keys and values."""
        ...
