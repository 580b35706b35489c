"""What the console does with dead letters: replays and purges them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from muai_producers.dead_letters import DeadLetters, replayed
from muai_producers.errors import MuaiError

if TYPE_CHECKING:
    from muai_producers.store import Store
    from muai_producers.wire import InferenceRequest

log = logging.getLogger(__name__)
MAX_AT_ONCE = 500
READ_AT_ONCE = 25
"""Requests of dead letters held in memory at once: each may have some megabytes."""


@dataclass(frozen=True)
class Deed:
    """What became of a wish."""

    replayed: int = 0
    purged: int = 0
    unreadable: int = 0
    """Were no requests, so could not be replayed."""
    refused: int = 0
    """Were refused by the queue, and stay."""
    left: int = 0
    """Dead letters that there are now."""
    nothing: int = 0
    """1: nothing had been chosen."""

    def to_query(self) -> dict[str, int]:
        """For the address of the page that tells it."""
        return {name: value for name, value in asdict(self).items() if value or name == "left"}

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Self | None:
        """Inverse of `to_query`; None where the query tells of none."""
        told = {
            name: int(query[name][:9])
            for name in cls.__dataclass_fields__
            if query.get(name, "").isascii() and query.get(name, "").isdecimal()
        }
        return cls(**told) if told else None


class LetterDesk:
    """Replays and purges. Blocks: call it on a thread.

    Args:
        submit: hands in requests again; as `InferenceClient.submit_many`.
        deadline_s: what a replayed request has from now on; None: no deadline.
    Raises:
        redis.exceptions.RedisError: the state store does not answer.
    """

    def __init__(self, store: Store, submit: Callable[[list[InferenceRequest]], Any], deadline_s: float | None) -> None:
        self._letters = DeadLetters(store)
        self._submit = submit
        self._deadline_s = deadline_s

    def act(self, action: str, entries: Sequence[str] | None) -> Deed:
        """Replay or purge entries.

        Args:
            action: `replay` or `purge`.
            entries: None: all; of a replay the newest `MAX_AT_ONCE`.
        Raises:
            InvalidRequestError: an id is none of an entry.
        """
        if action == "purge":
            purged = self._letters.purge() if entries is None else self._purge(entries)
            return Deed(purged=purged, left=len(self._letters))
        ids = [line.entry_id for line in self._letters.lines(MAX_AT_ONCE)] if entries is None else list(entries)
        return self._replay(ids)

    def _purge(self, entries: Sequence[str]) -> int:
        return self._letters.remove([letter.entry_id for letter in self._letters.entries(entries)])

    def _replay(self, ids: Sequence[str]) -> Deed:
        left_to_try, num_replayed, unreadable, refused = sorted(ids, key=_age), 0, 0, 0
        while left_to_try and not refused:
            some, left_to_try = left_to_try[:READ_AT_ONCE], left_to_try[READ_AT_ONCE:]
            for letter in self._letters.entries(some):
                if letter.request is None:
                    unreadable += 1
                elif refused or not self._submitted(letter.entry_id, letter.request):
                    refused += 1  # so would be the next, as a rule: the queue is full, or the broker does not answer
                else:
                    self._letters.remove([letter.entry_id])
                    num_replayed += 1
        refused += len(left_to_try)
        return Deed(replayed=num_replayed, unreadable=unreadable, refused=refused, left=len(self._letters))

    def _submitted(self, entry_id: str, request: InferenceRequest) -> bool:
        try:
            self._submit([replayed(entry_id, request, self._deadline_s, time.time())])
        except MuaiError as error:
            log.warning("dead letter %s was not replayed: %s", entry_id, error)
            return False
        return True


def _age(entry_id: str) -> list[int]:
    """Orders entries as they came; what is no entry's id is refused when it is read."""
    return [int(part) for part in entry_id.split("-") if part.isascii() and part.isdecimal()]
