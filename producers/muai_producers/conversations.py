"""Conversations in the state store: whose turn it is, and which worker keeps what was computed for the turns before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from muai_producers.store import Store
from muai_producers.store_scripts import TAKE_TURNS
from muai_producers.wire import InferenceRequest

TURNS_KEPT_S = 86_400
"""How long turns that nobody has ended are remembered, at least: should their result have run out unseen, the
conversation goes on then. Results are kept for as long, or longer ones count."""


def conversation_of(request: InferenceRequest) -> str | None:
    """What a request's conversation is called in the store; None where it has none.

    No two tenants, models or conversations share a name, whatever characters theirs are made of.
    """
    if request.conversation_id is None:
        return None
    whose = msgspec.json.encode((request.tenant, request.conversation_id, request.model))
    return hashlib.blake2b(whose, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Asked:
    """A question: may this turn go?"""

    conversation: str
    turn: str
    """A request's id."""
    new: Sequence[tuple[str, float]] = ()
    """Turns that the store has not been told of, each with its place in the order: the asked one among them where it is
    new.
    """


@dataclass(frozen=True)
class Told:
    """The answer."""

    first: str
    """The turn that may go; once it is the one that was asked for, it stays so until it has ended."""
    pin: str = ""
    """The own queue of the worker that keeps the conversation; '' where none does, or another turn is first."""


class Conversations:
    """Turns and pins.

    Raises:
        redis.exceptions.RedisError: the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._keys = store.keys
        self._ttl_s = max(TURNS_KEPT_S, store.result_ttl_s)
        self._take: Any = store.client.register_script(TAKE_TURNS)

    def take_turns(self, asked: Sequence[Asked]) -> list[Told]:
        """Take in the turns that are new, and say for each conversation whose turn it is; one round trip."""
        names: list[str] = []
        args: list[Any] = [self._ttl_s]
        for one in asked:
            names += (self._keys.turns(one.conversation), self._keys.conversation_pin(one.conversation))
            args += (one.turn, len(one.new))
            for turn, place in one.new:
                args += (repr(place), turn)
        told = [word.decode() for word in self._take(keys=names, args=args)] if asked else []
        return [Told(*pair) for pair in zip(told[::2], told[1::2], strict=True)]
