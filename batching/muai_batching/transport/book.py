"""The ledger's bookkeeping: which tags this process holds, for whom, and what is owed to Redis. Pure, thread-safe."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Holder:
    """One channel's claims. `on_credit` is called when a claim ends while the channel waits for room (`starved`)."""

    tags: dict[int, None] = field(default_factory=dict)
    starved: bool = False
    on_credit: Callable[[], None] = _nothing


class TagSource:
    """Tags of this process: increasing, each used once, whichever ledger draws them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def draw(self, count: int) -> int:
        """Reserve `count` tags and return the first."""
        with self._lock:
            first = self._last + 1
            self._last += count
            return first

    @property
    def last(self) -> int:
        return self._last


class ClaimBook:
    """Every tag is in one place: held by a holder, an orphan (its holder closed, its work goes on), or owed an ack."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders: set[Holder] = set()
        self._orphans: dict[int, None] = {}
        self._pinned: set[int] = set()
        self._acks: dict[int, None] = {}
        self._flushing: set[int] = set()
        self._digests: dict[int, str] = {}

    @property
    def num_acks_due(self) -> int:
        return len(self._acks)

    def is_idle(self) -> bool:
        """Whether nobody listens and nothing is held or owed."""
        return not (self._holders or self._orphans or self._acks or self._flushing)

    def open(self, holder: Holder) -> None:
        with self._lock:
            self._holders.add(holder)

    def deliver(self, holder: Holder, first: int, count: int, digests: Iterable[tuple[int, str]] = ()) -> None:
        """Book `count` tags from `first` on as held; `digests` of those with deaths on record."""
        with self._lock:
            holder.tags.update(dict.fromkeys(range(first, first + count)))
            self._digests.update(digests)

    def ack(self, holder: Holder, tag: int) -> bool:
        """Owe Redis the end of a claim; False when the claim is not this process's any more."""
        with self._lock:
            if not self._take(holder, tag):
                return False
            self._acks[tag] = None
        self._credit(holder)
        return True

    def forget(self, holder: Holder, tags: Iterable[int]) -> list[int]:
        """Stop holding `tags`, also those of other holders; return the ones that were held."""
        with self._lock:
            taken = [tag for tag in tags if self._take(holder, tag)]
            holders = [holder, *self._holders]
        for one in holders:
            self._credit(one)
        return taken

    def _take(self, holder: Holder, tag: int) -> bool:
        place = self._place(holder, tag)
        if place is None:
            return False
        del place[tag]
        self._pinned.discard(tag)
        return True

    def _place(self, holder: Holder, tag: int) -> dict[int, None] | None:
        if tag in holder.tags:
            return holder.tags
        if tag in self._orphans:
            return self._orphans
        return next((other.tags for other in self._holders if tag in other.tags), None)

    @staticmethod
    def _credit(holder: Holder) -> None:
        if holder.starved:
            holder.starved = False
            holder.on_credit()

    def pin(self, tag: int) -> bool:
        with self._lock:
            if not self.is_held(tag):
                return False
            self._pinned.add(tag)
            return True

    def unpin(self, tag: int) -> bool:
        """Undo `pin`; True when the claim has no holder any more and must be given back."""
        with self._lock:
            self._pinned.discard(tag)
            return self._orphans.pop(tag, self) is None

    def is_held(self, tag: int) -> bool:
        with self._lock:
            return self._place(Holder(), tag) is not None

    def holds(self, holder: Holder, tags: Iterable[int]) -> bool:
        """Whether all of `tags` are this process's."""
        with self._lock:
            return all(self._place(holder, tag) is not None for tag in tags)

    def close(self, holder: Holder) -> list[int]:
        """Forget a holder. Pinned tags become orphans; the others are returned, for Redis to have back."""
        with self._lock:
            self._holders.discard(holder)
            loose = [tag for tag in holder.tags if tag not in self._pinned]
            self._orphans.update(dict.fromkeys(tag for tag in holder.tags if tag in self._pinned))
            holder.tags.clear()
            return loose

    def begin_flush(self, limit: int) -> tuple[list[int], list[str]]:
        """Tags whose claims end now, and the digests whose deaths are settled. Follow with `end_flush`."""
        with self._lock:
            tags = list(islice(self._acks, limit))
            for tag in tags:
                del self._acks[tag]
            self._flushing.update(tags)
            return tags, self.digests(tags)

    def end_flush(self, tags: Sequence[int], done: bool) -> None:
        with self._lock:
            self._flushing.difference_update(tags)
            if done:
                self.drop_digests(tags)
            else:
                self._acks.update(dict.fromkeys(tags))

    def digests(self, tags: Iterable[int]) -> list[str]:
        return [self._digests[tag] for tag in tags if tag in self._digests] if self._digests else []

    def drop_digests(self, tags: Iterable[int]) -> None:
        if self._digests:
            for tag in tags:
                self._digests.pop(tag, None)

    def unknown(self, tags: Iterable[int]) -> list[int]:
        """Of the tags Redis books for this process, those nobody here answers for."""
        with self._lock:
            known = self._orphans.keys() | self._acks.keys() | self._flushing
            for holder in self._holders:
                known |= holder.tags.keys()
            return [tag for tag in tags if tag not in known]

    def void(self) -> list[int]:
        """Forget every claim: they are others' now. Returns the tags that were held."""
        with self._lock:
            lost = list(self._orphans)
            for holder in self._holders:
                lost.extend(holder.tags)
                holder.tags.clear()
            for gone in (self._orphans, self._pinned, self._acks, self._digests):
                gone.clear()
            holders = list(self._holders)
        for holder in holders:
            self._credit(holder)
        return lost
