"""The claims in Redis: one method per script, no state of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import NoScriptError

from muai_batching.transport import scripts
from muai_batching.transport.errors import FencedError, LeaseLostError, SettleCommandError, StaleClaimError
from muai_batching.transport.keys import StateKeys
from muai_batching.transport.scripts import Script

Word = str | bytes
Command = Sequence[Word]

#: Claims moved, or acks made, in one script or command.
CHUNK = 500


@dataclass(frozen=True)
class Claimed:
    """What one claim brought: tags count up from `first` through `groups`, in order of consumption.

    groups: (index into the list keys asked for, payloads).
    suspects: (tag, digest, deaths) of messages that some consumer died holding.
    """

    first: int
    groups: list[tuple[int, list[bytes]]]
    suspects: list[tuple[int, str, int]]

    @property
    def count(self) -> int:
        return sum(len(payloads) for _, payloads in self.groups)


@dataclass(frozen=True)
class ListOrder:
    """Which lists to claim from: `keys` level by level, best first, `per_level` each; `shared`: a level's lists
    share the room evenly, else the first takes all it can."""

    keys: Sequence[str]
    per_level: int
    shared: bool = True


def chunks(items: Sequence[int], size: int = CHUNK) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class ClaimStore:
    """Calls to Redis. Every method may raise redis-py's connection errors; none retries after one."""

    def __init__(self, client: redis.Redis, keys: StateKeys) -> None:
        self.client: Any = client  # redis-py leaves execute_command untyped
        self.keys = keys

    def _run(self, script: Script, keys: Sequence[str], args: Sequence[Word | int]) -> Any:
        words = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return self.client.execute_command(*words)
        except NoScriptError:
            self.client.script_load(script.source)
            return self.client.execute_command(*words)

    def register(self, consumer: str) -> None:
        self._run(scripts.REGISTER, [self.keys.beats], [consumer])

    def deregister(self, consumer: str) -> bool:
        """Forget a consumer that holds nothing; False when it still holds something."""
        return bool(self._run(scripts.DEREGISTER, self._life_keys(consumer), [consumer]))

    def _life_keys(self, consumer: str) -> list[str]:
        return [self.keys.beats, self.keys.floors, self.keys.claims(consumer)]

    def beat(self, consumer: str) -> dict[str, int]:
        """Count a heartbeat and return everybody's counters.

        Raises:
            FencedError: the consumer is unknown or given up.
        """
        reply = self._run(scripts.BEAT, [self.keys.beats], [consumer])
        if reply[0] == scripts.FENCED:
            raise FencedError(consumer)
        flat = reply[1]
        return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}

    def beats(self) -> dict[str, int]:
        raw: Mapping[bytes, bytes] = self.client.hgetall(self.keys.beats)
        return {consumer.decode(): int(count) for consumer, count in raw.items()}

    def claim(self, consumer: str, order: ListOrder, first: int, room: int) -> Claimed:
        """Move up to `room` messages from the lists into the consumer's claims, tagged from `first` on.

        Raises:
            FencedError: the consumer is unknown or given up.
            StaleClaimError: these tags were used, or written off, before.
        """
        state = [self.keys.beats, self.keys.floors, self.keys.deliveries, self.keys.claims(consumer)]
        args = (consumer, first, room, order.per_level, int(order.shared))
        reply = self._run(scripts.CLAIM, [*state, *order.keys], args)
        if reply[0] == scripts.FENCED:
            raise FencedError(consumer)
        if reply[0] == scripts.STALE:
            raise StaleClaimError(f"tags from {first} on are spent")
        groups = [(number - 1, payloads) for number, payloads in reply[1]]
        return Claimed(first, groups, [(tag, digest.decode(), deaths) for tag, digest, deaths in reply[2]])

    def drop(self, consumer: str, tags: Sequence[int], digests: Sequence[str]) -> None:
        """End claims: the messages are done with."""
        self.client.execute_command("HDEL", self.keys.claims(consumer), *tags)
        if digests:
            self.client.execute_command("HDEL", self.keys.deliveries, *digests)

    def give_back(self, consumer: str, tags: Sequence[int]) -> int:
        """Return claims to the consuming end of their lists, in their old order; how many were still held."""
        keys = [self.keys.claims(consumer), self.keys.deliveries]
        return sum(self._run(scripts.GIVE_BACK, keys, part) for part in chunks(sorted(tags, reverse=True)))

    def recover(self, consumer: str, floor: int) -> list[int]:
        """Write off every claim still under way with tags up to `floor`; return the tags Redis books.

        Raises:
            FencedError: the consumer is unknown or given up.
        """
        reply = self._run(scripts.RECOVER, self._life_keys(consumer), [consumer, floor])
        if reply[0] == scripts.FENCED:
            raise FencedError(consumer)
        return [int(tag) for tag in reply[1]]

    def settle(self, consumer: str, items: Sequence[Settlement]) -> list[list[Any] | LeaseLostError | Exception]:
        """Per item: run its commands and end its claims, both or neither. One round trip for all items."""
        pending = list(range(len(items)))
        outcomes: list[Any] = [None] * len(items)
        while pending:
            with self.client.pipeline(transaction=False) as pipe:
                for index in pending:
                    pipe.execute_command(*self._settle_words(consumer, items[index]))
                for index, reply in zip(pending, pipe.execute(raise_on_error=False), strict=True):
                    outcomes[index] = reply
            pending = [index for index in pending if isinstance(outcomes[index], NoScriptError)]
            if pending:
                self.client.script_load(scripts.SETTLE.source)
        return [_settled(reply) for reply in outcomes]

    def _settle_words(self, consumer: str, item: Settlement) -> tuple[Any, ...]:
        words: list[Any] = [len(item.tags), *item.tags, len(item.digests), *item.digests]
        for command in item.commands:
            words.append(len(command))
            words.extend(command)
        return ("EVALSHA", scripts.SETTLE.sha, 2, self.keys.claims(consumer), self.keys.deliveries, *words)

    def condemn(self, consumer: str, observed: int) -> bool:
        """Declare a consumer dead unless it beat since `observed`; True when it is given up now."""
        return bool(self._run(scripts.CONDEMN, [self.keys.beats], [consumer, observed, scripts.DEAD]))

    def resign(self, consumer: str) -> None:
        """Give oneself up: what is held goes back by `reclaim`, and nobody died of it."""
        self._run(scripts.CONDEMN, [self.keys.beats], [consumer, "", scripts.RESIGNED])

    def reclaim(self, consumer: str) -> int:
        """Give the claims of a consumer that was given up back to their lists, in their old order, and forget it.

        May be called by several at once, and again after a call that was cut short.
        """
        tags = sorted((int(tag) for tag in self.client.hkeys(self.keys.claims(consumer))), reverse=True)
        keys = [*self._life_keys(consumer), self.keys.deliveries]
        return sum(self._run(scripts.RECLAIM, keys, (consumer, *part)) for part in [*chunks(tags), ()])


@dataclass(frozen=True)
class Settlement:
    """Claims to end together with the commands that move their work on."""

    tags: Sequence[int]
    commands: Sequence[Command]
    digests: Sequence[str] = ()


def _settled(reply: Any) -> list[Any] | Exception:
    if isinstance(reply, Exception):
        return reply
    if reply[0] == b"lost":
        return LeaseLostError([int(tag) for tag in reply[1]])
    if reply[0] == b"error":
        return SettleCommandError(reply[1], reply[2].decode())
    replies: list[Any] = reply[1]
    return replies
