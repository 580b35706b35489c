"""Which models stay in memory and which go to make room for another. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Resident:
    """A model in memory, or on its way into it or out of it."""

    name: str
    num_bytes: int
    users: int = 0
    """Batches that run on it, or wait for it."""
    keeps: bool = False
    """It never goes to make room."""
    changing: bool = False
    """It is being loaded or unloaded."""

    @property
    def may_go(self) -> bool:
        return not (self.users or self.keeps or self.changing)


@dataclass(frozen=True)
class Limits:
    """None: there is none."""

    max_bytes: int | None = None
    max_models: int | None = None


@dataclass(frozen=True)
class Room:
    """What is to be done for room."""

    unload: tuple[str, ...]
    """Least recently used first; no more than it takes."""
    enough: bool
    """Whether the bytes fit once these are gone."""
    may_come: bool
    """Where they do not: whether they would once what is in use now is not."""


def make_room(residents: Sequence[Resident], needed_bytes: int, limits: Limits, *, new_models: int = 1) -> Room:
    """Choose what goes for a model that is to come.

    Bytes are a hard limit; the number of models is kept as far as those in use allow it.

    Args:
        residents: least recently used first.
        new_models: 0: nothing comes, what is over the limits goes.
    """
    used_bytes = sum(one.num_bytes for one in residents)
    kept_bytes = sum(one.num_bytes for one in residents if one.keeps)
    if limits.max_bytes is not None and kept_bytes + needed_bytes > limits.max_bytes and new_models:
        return Room((), False, False)  # nothing need go for what cannot come
    count = len(residents) + new_models
    unload = []
    for one in residents:
        too_many = limits.max_models is not None and count > limits.max_models
        too_large = limits.max_bytes is not None and used_bytes + needed_bytes > limits.max_bytes
        if not (too_many or too_large):
            break
        # One that holds nothing makes no room.
        if one.may_go and (too_many or one.num_bytes):
            unload.append(one.name)
            used_bytes -= one.num_bytes
            count -= 1
    enough = limits.max_bytes is None or used_bytes + needed_bytes <= limits.max_bytes
    return Room(tuple(unload), enough, True)


def believed_bytes(estimated: int, measured: int | None) -> int:
    """What a model counts for once it is loaded.

    A difference far below the estimate says that memory which an earlier model had left to this process was used
    again, not that the weights are smaller.

    Args:
        measured: by how much the memory in use grew; None: nobody could tell.
    """
    if measured is None or measured < estimated // 2:
        return estimated
    return measured
