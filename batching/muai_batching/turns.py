"""Turns that a collector holds back until the turns before them have ended. Pure bookkeeping.

The order of a conversation is kept in the state store, for its turns may be with several collectors. Here is what one
collector has of it, and which questions it has to ask.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from muai_batching.assembler import BatchKey
from muai_batching.fair_queue import Waiting
from muai_producers.conversations import Asked

TIE_S = 2**-21
"""What sets turns apart that were submitted in one call: half a microsecond, which a float of today's time resolves."""


@dataclass(order=True)
class Turn:
    """A turn that waits."""

    place: float
    """Its place in the order of its conversation: when it was submitted, in wall-clock seconds since the epoch."""
    item: Waiting = field(compare=False)
    key: BatchKey = field(compare=False)
    """The batch key that it would have without a conversation."""
    is_known: bool = field(default=False, compare=False)
    """Whether the state store knows of it."""

    @property
    def is_held(self) -> bool:
        """Whether it waits still: it may have expired, been cancelled, or been passed on."""
        return self.item.queued


class HeldTurns:
    """By conversation, the turns that are held back."""

    def __init__(self) -> None:
        self._turns: dict[str, list[Turn]] = {}
        self._due: dict[str, str] = {}
        """Conversations to ask about, each with the turn that the store says is first; '' where that is not known."""

    def __len__(self) -> int:
        return sum(len(turns) for turns in self._turns.values())

    def add(self, conversation: str, key: BatchKey, item: Waiting) -> None:
        """Hold a turn back, behind those of its conversation that were submitted before or in the same call."""
        place = submitted_at = item.request.submitted_at
        turns = self._turns.setdefault(conversation, [])
        for turn in reversed(turns):
            if turn.item.request.submitted_at == submitted_at:
                place = turn.place + TIE_S
            if turn.place <= place:
                break
        insort(turns, Turn(place, item, key))
        self._due.setdefault(conversation, "")

    def wake(self, conversation: str) -> None:
        """A turn has ended: ask about the next."""
        if conversation in self._turns:
            self._due.setdefault(conversation, "")

    def wake_all(self) -> None:
        """Ask about every conversation anew; what ends a turn need not have been heard of."""
        for conversation in self._turns:
            self._due.setdefault(conversation, "")

    def clear(self) -> None:
        """Forget everything."""
        self._turns.clear()
        self._due.clear()

    def questions(self, most: int) -> list[Asked]:
        """What to ask the store next, `most` at most. Stays due until it is answered."""
        asked = []
        for conversation, first in list(self._due.items()):
            turns = [turn for turn in self._turns.get(conversation, ()) if turn.is_held]
            if not turns:
                self._forget(conversation)
                continue
            self._turns[conversation] = turns
            new = tuple((turn.item.request.id, turn.place) for turn in turns if not turn.is_known)
            asked.append(Asked(conversation, first or turns[0].item.request.id, new))
            if len(asked) >= most:
                break
        return asked

    def answered(self, asked: Asked, first: str) -> Turn | None:
        """Take in what the store says is first; returns the turn that may go, which is held back no longer."""
        turns = self._turns.get(asked.conversation, [])
        told = {turn for turn, _ in asked.new}
        for turn in turns:
            turn.is_known = turn.is_known or turn.item.request.id in told
        self._due.pop(asked.conversation, None)
        ready = next((turn for turn in turns if turn.item.request.id == first), None)
        if ready is None:
            return None
        if first != asked.turn:
            # It is here after all, though not the first by its place: another collector had let it go before.
            self._due[asked.conversation] = first
            return None
        turns.remove(ready)
        if not turns:
            self._forget(asked.conversation)
        return ready

    def _forget(self, conversation: str) -> None:
        self._turns.pop(conversation, None)
        self._due.pop(conversation, None)

    def items(self) -> Sequence[Waiting]:
        """All that are held back."""
        return [turn.item for turns in self._turns.values() for turn in turns if turn.is_held]
