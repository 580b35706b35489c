"""Groups of rows whose keys and values lie in the ranks: what the decoding loop holds of them here."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from muai_workers.engines.deepspeed_messages import Drop, Join, Keep, KeptPart, Resume, Step, TakeOut
from muai_workers.engines.deepspeed_ranks import RankGroup
from muai_workers.engines.padding import PaddedRows
from muai_workers.kv_cache import KeysAndValues

_numbers = itertools.count()


class RankKept:
    """Keys and values of one row's first tokens, each rank with its own heads; freed there when this is."""

    def __init__(self, ranks: RankGroup, number: int, num_bytes: int, num_tokens: int) -> None:
        self.number = number
        self.num_bytes = num_bytes
        """Of all ranks together."""
        self.num_tokens = num_tokens
        weakref.finalize(self, ranks.drop, Drop(kept=number)).atexit = False

    def first(self, num_tokens: int) -> RankKeptPart:
        """Nothing is copied."""
        return RankKeptPart(self, num_tokens)


@dataclass(frozen=True)
class RankKeptPart:
    """The first tokens of what is kept."""

    whole: RankKept
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        return self.whole.num_bytes * self.num_tokens // self.whole.num_tokens

    def first(self, num_tokens: int) -> RankKeptPart:
        return RankKeptPart(self.whole, num_tokens)


class RankDecoder:
    """A group of rows on its way through a causal model that is shared out among ranks."""

    def __init__(self, ranks: RankGroup) -> None:
        self.joins = all(ready.joins for ready in ranks.ready)
        self._ranks = ranks
        self._number = next(_numbers)
        weakref.finalize(self, ranks.drop, Drop(group=self._number)).atexit = False

    def start(self, rows: PaddedRows) -> torch.Tensor:
        return self.resume(rows, [None] * len(rows.ids))

    def resume(self, rows: PaddedRows, kept: Sequence[KeysAndValues | None]) -> torch.Tensor:
        parts = [None if one is None else _part(one) for one in kept]
        return _logits(self._ranks.call(Resume(self._number, rows, parts)))

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        return _logits(self._ranks.call(Step(self._number, list(tokens))))

    def keep(self, rows: Sequence[int]) -> None:
        self._ranks.call(Keep(self._number, list(rows)))

    def join(self, other: RankDecoder) -> None:
        self._ranks.call(Join(self._number, other._number))

    def kept(self, row: int) -> RankKept:
        number = next(_numbers)
        sizes = self._ranks.call(TakeOut(self._number, row, number))
        return RankKept(self._ranks, number, sum(size for size, _ in sizes), sizes[0][1])


def _part(kept: Any) -> KeptPart:
    return (
        KeptPart(kept.number, kept.num_tokens)
        if isinstance(kept, RankKept)
        else KeptPart(kept.whole.number, kept.num_tokens)
    )


def _logits(answers: list[NDArray[Any] | None]) -> torch.Tensor:
    return torch.from_numpy(answers[0])
