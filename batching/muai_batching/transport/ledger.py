"""One process's claims at one broker: outlives channels and connections, knows what is handed out."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from muai_batching.transport.book import ClaimBook, Holder, TagSource
from muai_batching.transport.errors import FencedError, LeaseLostError, StaleClaimError
from muai_batching.transport.lease import consumer_name
from muai_batching.transport.store import Claimed, ClaimStore, Command, ListOrder, Settlement

logger = logging.getLogger(__name__)

CONNECTION_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

FLUSH_AT = 256

#: Pause between two questions to a Redis that does not answer.
ASK_AGAIN_S = 0.2

_tags = TagSource()


def _nothing() -> None:
    pass


class Ledger:
    """Claims, acks, settlements, and what to do when a reply stays away. Thread-safe, starts no thread.

    `nudge` is called when something is due that no caller waits for: acks to flush, or a lost reply to look after.
    """

    def __init__(
        self,
        store: ClaimStore,
        tags: TagSource = _tags,
        lease_ttl_s: float = 8.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._known_alive_s = clock()
        self.book = ClaimBook()
        self.nudge: Callable[[], None] = _nothing
        self.on_registered: Callable[[], None] = _nothing
        self.consumer = self._new_name()
        self._tags = tags
        self._io_lock = threading.RLock()
        self._registered = False
        self._ended = threading.Event()
        self._must_recover = False
        self._abandoned: deque[Holder] = deque()
        self._uncertain: set[tuple[int, ...]] = set()

    def _new_name(self) -> str:
        return consumer_name(socket.gethostname(), os.getpid(), uuid.uuid4().hex[:12], self.lease_ttl_s)

    # Claiming

    def claim(self, holder: Holder, order: ListOrder, room: int) -> Claimed:
        """Claim up to `room` messages, which `holder` holds from then on.

        A reply that never arrives costs nothing: what it carried goes back to its lists and is claimed again.

        Raises:
            redis.exceptions.ConnectionError, redis.exceptions.TimeoutError: Redis stays away.
        """
        with self._io_lock:
            for _ in range(2):
                self._prepare()
                try:
                    return self._claim(holder, order, room)
                except FencedError:
                    self._begin_new_life()
                except (StaleClaimError, *CONNECTION_ERRORS):
                    self._must_recover = True
            self._prepare()
            return self._claim(holder, order, room)

    def _claim(self, holder: Holder, order: ListOrder, room: int) -> Claimed:
        asked_s = self._clock()
        claimed = self.store.claim(self.consumer, order, self._tags.draw(room), room)
        self._known_alive_s = asked_s
        suspects = [(tag, digest) for tag, digest, _ in claimed.suspects]
        self.book.deliver(holder, claimed.first, claimed.count, suspects)
        return claimed

    def _prepare(self) -> None:
        if not self._registered:
            self.store.register(self.consumer)
            self._registered = True
            self.on_registered()
        if self._must_recover:
            self.recover()

    def recover(self) -> int:
        """Return to their lists the messages that Redis books for us and nobody here ever got; how many."""
        with self._io_lock:
            try:
                booked = self.store.recover(self.consumer, self._tags.last)
            except FencedError:
                self._begin_new_life()
                return 0
            unknown = self.book.unknown(booked)
            if unknown:
                logger.warning("%d message(s) whose delivery was cut off go back to their queues", len(unknown))
                self.store.give_back(self.consumer, unknown)
            self._must_recover = False
            return len(unknown)

    def recover_if_due(self) -> None:
        if self._must_recover and self._registered:
            self.recover()

    def expect_loss(self) -> None:
        """A connection broke: before the next claim, look what Redis books for us."""
        self._must_recover = True

    def _begin_new_life(self) -> None:
        lost, old = self.book.void(), self.consumer
        logger.warning("consumer %s was given up by the others; %d claim(s) void, starting anew", old, len(lost))
        self._uncertain.clear()
        self.consumer = self._new_name()
        self.store.register(self.consumer)
        self._must_recover = False
        self.store.resign(old)
        self.store.reclaim(old)

    # Ending claims

    def ack(self, holder: Holder, tag: int) -> bool:
        """End a claim, in Redis soon: a lost ack only redelivers. False when the claim is not ours any more."""
        if not self.book.ack(holder, tag):
            return False
        due = self.book.num_acks_due
        if due == 1:
            self.nudge()
        elif due >= FLUSH_AT:
            self.flush()
        return True

    def ack_many(self, holder: Holder, tags: Sequence[int]) -> None:
        for tag in tags:
            self.book.ack(holder, tag)
        self.flush()

    def flush(self) -> bool:
        """Tell Redis of all ended claims; False when it cannot be reached: they are kept for later."""
        while self.book.num_acks_due:
            tags, digests = self.book.begin_flush(FLUSH_AT * 4)
            done = False
            try:
                if tags:
                    self.store.drop(self.consumer, tags, digests)
                done = True
            except CONNECTION_ERRORS:
                logger.debug("acks kept until Redis is back", exc_info=True)
                self._must_recover = True
                return False
            finally:
                self.book.end_flush(tags, done)
        return True

    def give_back(self, holder: Holder, tags: Sequence[int]) -> None:
        """End claims unserved: the messages are the next to be consumed, in their old order."""
        self._return(self.book.forget(holder, tags))

    def _return(self, tags: Sequence[int]) -> None:
        if not tags:
            return
        try:
            self.store.give_back(self.consumer, tags)
            self.book.drop_digests(tags)
        except CONNECTION_ERRORS:
            # Nobody answers for these tags now, so the recovery that follows a reconnect returns them.
            logger.debug("messages go back when Redis is back", exc_info=True)
            self._must_recover = True
            self.nudge()

    def settle(self, holder: Holder, tags: Sequence[int], commands: Sequence[Command]) -> list[Any]:
        """Run `commands` and end the claims `tags`, both or neither; return the commands' replies.

        Commands take full Redis keys. A settlement whose reply was lost is looked up: if it took effect, its
        replies are None each.

        Raises:
            LeaseLostError: some claim is not ours any more; nothing was changed.
            SettleCommandError: Redis refused a command; the claims are still held.
            redis.exceptions.ConnectionError: unknown whether it took effect; calling again is safe.
        """
        outcome = self.settle_many(holder, [(tags, commands)])[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def settle_many(
        self, holder: Holder, items: Sequence[tuple[Sequence[int], Sequence[Command]]]
    ) -> list[list[Any] | Exception]:
        """`settle` for each item on its own, in one round trip; errors stand in the item's place."""
        wanted = [Settlement(tags, commands, self.book.digests(tags)) for tags, commands in items]
        try:
            outcomes = self.store.settle(self.consumer, wanted)
        except CONNECTION_ERRORS:
            self._must_recover = True
            self._uncertain.update(tuple(item.tags) for item in wanted)
            outcomes = self.store.settle(self.consumer, wanted)
        noted = [self._note(holder, item, outcome) for item, outcome in zip(wanted, outcomes, strict=True)]
        if any(isinstance(outcome, LeaseLostError) for outcome in noted):
            self._look_whether_given_up()
        return noted

    def _look_whether_given_up(self) -> None:
        """One lost claim may mean that all are: then nobody is to try them one by one."""
        with contextlib.suppress(*CONNECTION_ERRORS):  # the next heartbeat will tell
            self.beat()

    def _note(self, holder: Holder, item: Settlement, outcome: list[Any] | Exception) -> list[Any] | Exception:
        tags = tuple(item.tags)
        if isinstance(outcome, LeaseLostError) and self._took_effect_unheard(holder, tags, outcome):
            outcome = [None] * len(item.commands)
        self._uncertain.discard(tags)
        if not isinstance(outcome, Exception):
            self.book.forget(holder, tags)
            self.book.drop_digests(tags)
        elif isinstance(outcome, LeaseLostError):
            self.book.forget(holder, outcome.tags)
        return outcome

    def _took_effect_unheard(self, holder: Holder, tags: tuple[int, ...], lost: LeaseLostError) -> bool:
        """Only we end claims of a living consumer: claims that are gone were settled by the call without reply."""
        return (
            tags in self._uncertain
            and set(lost.tags) == set(tags)
            and self.book.holds(holder, tags)
            and self._still_alive()
        )

    def _still_alive(self) -> bool:
        return self.store.beats().get(self.consumer, -1) >= 0

    # Work under way

    def pin(self, tag: int) -> bool:
        """The message's work begins: from now on neither a lost connection nor a closed channel returns it.

        False when the claim is not ours any more: the work must not begin. A process that was stopped for a while,
        or cut off, asks Redis first whether it has been given up, and waits for the answer as long as it takes.
        """
        while self._clock() - self._known_alive_s > self.lease_ttl_s / 2:
            try:
                self.beat()
            except CONNECTION_ERRORS:
                if self._ended.wait(ASK_AGAIN_S):
                    return False
        return self.book.pin(tag)

    def unpin(self, tag: int) -> None:
        """The work stopped without an end to its claim; a message without a channel goes back to its queue."""
        if self.book.unpin(tag):
            self._return([tag])

    # Life

    def open(self, on_credit: Callable[[], None]) -> Holder:
        holder = Holder(on_credit=on_credit)
        self.book.open(holder)
        return holder

    def close(self, holder: Holder) -> None:
        """Give back all that `holder` holds unpinned."""
        reachable = self.flush()
        loose = self.book.close(holder)
        if reachable:
            self._return(loose)

    def abandon(self, holder: Holder) -> None:
        """`close` for a garbage collector: takes no lock, acts at the next heartbeat."""
        self._abandoned.append(holder)

    def sweep_abandoned(self) -> None:
        while self._abandoned:
            self.close(self._abandoned.popleft())

    def beat(self) -> dict[str, int]:
        """One heartbeat; returns everybody's counters."""
        asked_s, consumer = self._clock(), self.consumer
        try:
            beats = self.store.beat(consumer)
        except FencedError:
            with self._io_lock:
                if self.consumer == consumer:  # else another thread has found out first
                    self._begin_new_life()
            beats = {}
        self._known_alive_s = asked_s
        return beats

    def retire(self) -> bool:
        """Deregister if nothing is held and nobody listens; a later claim begins anew."""
        with self._io_lock:
            if not self.book.is_idle():
                return False
            if self._registered and not self.store.deregister(self.consumer):
                self.recover()
                return False
            self._registered = False
            self.consumer = self._new_name()
            return True

    def end(self) -> None:
        """The process ends: everything still held goes back at once, pinned or not."""
        self._ended.set()
        self.flush()
        if not self._registered:
            return
        self._registered = False
        self.store.resign(self.consumer)
        self.store.reclaim(self.consumer)
