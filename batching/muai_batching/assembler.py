"""When to send a batch and which requests go into it: a state machine of plain values, with the clock passed in.

Nothing here talks to a broker. The collector adds what arrives, asks what is ready, and says how much room the
engines have.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from muai_batching.fair_queue import FairQueue, Waiting

CREDIT_BATCHES = 4
"""By how much a tenant that asked for nothing lately is let ahead. Half of it makes up for what it finds under way and
would not find alone: the batch that runs, and the one behind it."""
HELD = "held"
"""In place of a queue in a batch key: its requests belong to no batch for the present."""


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What requests must share to be in one batch."""

    model: str
    task: str
    chain: tuple[str, ...]
    """Engines that may serve it, preferred first."""
    queue: str = ""
    """The own queue of the worker that keeps their conversations; '' for requests that any worker may have, `HELD` for
    turns that may not go yet.
    """


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Limits and habits of batching; the configuration's `optimization.batcher`, in seconds."""

    max_batch_size: int = 32
    max_batch_tokens: int = 32_768
    """Of the padded batch: longest request times number of requests."""
    batch_timeout_s: float = 0.05
    min_batch_size: int = 1
    adaptive: bool = True
    enabled: bool = True
    max_wait_s: float = 5.0
    """Longest that a request is passed over, in favour of later ones of a better length."""
    ageing_s: float = 0.5
    """Waiting time that one step of priority is worth."""
    lookahead: int = 256
    """Requests, next in order, among which companions of like length are chosen, for an engine of unknown speed."""
    latency_target_s: float | None = None
    """What 95 % of requests should take at most; batches are kept small enough for it. None: no target."""

    @property
    def size_limit(self) -> int:
        """Most requests in a batch."""
        return self.max_batch_size if self.enabled else 1


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine can take now, in batches."""

    idle: int
    """Slots with nothing to do."""
    ahead: int
    """Batches that may be sent in all, those that wait at the workers behind a running one included."""
    max_size: int = 1_000_000
    """Largest batch that keeps to the latency target there."""
    lookahead: int | None = None
    """In place of the policy's, where the engine's speed is known."""


NO_ROOM = Room(0, 0)


@dataclass(frozen=True, slots=True)
class Formed:
    """A batch, decided."""

    key: BatchKey
    items: tuple[Waiting, ...]

    @property
    def padded_tokens(self) -> int:
        """What the batch costs: the longest request's tokens times the number of requests."""
        return max(item.tokens for item in self.items) * len(self.items)


DEEPEST_LOOKAHEAD = 8192
"""Simulated, 4,000 sentences in batches of 256: 140 forward passes with a window of 2,048, 114 from 4,096 on."""
SEARCH_S = 1e-6
"""What looking at one request more costs."""
SEARCH_SHARE = 0.01
WAIT_SHARE = 0.4


def worthwhile_lookahead(batch_s: float, policy: BatchPolicy) -> int:
    """How far ahead to look for requests of like length when a full batch leaves every `batch_s` seconds.

    Further is better, as long as the search takes a hundredth of the batch's time, and as long as what is passed over
    is served well within `max_wait_s`: about as many requests as are looked at are served before it.
    """
    affordable = SEARCH_SHARE * batch_s / SEARCH_S
    soon_enough = WAIT_SHARE * policy.max_wait_s / batch_s * policy.size_limit if batch_s > 0 else affordable
    return int(max(policy.size_limit, min(DEEPEST_LOOKAHEAD, max(policy.lookahead, affordable), soon_enough)))


def should_send(count: int, oldest_wait_s: float, room: Room, policy: BatchPolicy) -> bool:
    """Whether a batch key with `count` requests waiting sends a batch now.

    Fixed batching sends what is full or has waited `batch_timeout_s`, whatever the engines do. Adaptive batching
    sends at once while a slot is idle, keeps one full batch ready behind each running one, and else lets it grow.
    """
    if count == 0:
        return False
    full = count >= min(policy.size_limit, room.max_size)
    timed_out = oldest_wait_s >= policy.batch_timeout_s
    if not policy.adaptive or not policy.enabled:
        return full or timed_out
    if room.idle > 0:
        return full or timed_out or count >= policy.min_batch_size
    return room.ahead > 0 and full


def choose(queue: FairQueue, policy: BatchPolicy, now_s: float, room: Room = NO_ROOM) -> tuple[Waiting, ...]:
    """The requests of the next batch: the next in order, and those nearest to it in length among the following.

    A padded batch costs its longest request times its size, so companions are taken from a window of the requests
    sorted by length that contains the next one. Every batch serves the request that is next in order; and once that
    one has been passed over for `max_wait_s`, order alone counts. Requests that are passed over are marked as such.
    """
    limit = min(policy.size_limit, room.max_size)
    lookahead = policy.lookahead if room.lookahead is None else room.lookahead
    candidates = queue.peek(limit if len(queue) <= limit else max(limit, lookahead))
    first = candidates[0]
    is_overdue = first.passed_over_s is not None and now_s - first.passed_over_s > policy.max_wait_s
    if len(candidates) <= limit or is_overdue:
        chosen = _fit(candidates[:limit], first, policy.max_batch_tokens)
    else:
        chosen = _fit(_alike(candidates, first, limit), first, policy.max_batch_tokens)
    _mark_passed_over(candidates, chosen, now_s)
    return chosen


def _alike(candidates: Sequence[Waiting], first: Waiting, limit: int) -> list[Waiting]:
    """The `limit` candidates nearest to each other in length, `first` among them."""
    by_length = sorted(candidates, key=attrgetter("tokens"))
    at = by_length.index(first)
    starts = range(max(0, at - limit + 1), min(at, len(by_length) - limit) + 1)
    sums = [0, *itertools.accumulate(item.tokens for item in by_length)]
    # Windows are of equal size, so the least padding is the least excess over the window's own tokens.
    best = min(starts, key=lambda s: by_length[s + limit - 1].tokens * limit - (sums[s + limit] - sums[s]))
    return by_length[best : best + limit]


def _mark_passed_over(candidates: Iterable[Waiting], chosen: Collection[Waiting], now_s: float) -> None:
    """Note the time on each candidate before the last chosen one that was not chosen."""
    ids = {id(item) for item in chosen}
    left = len(ids)
    for item in candidates:
        if id(item) in ids:
            left -= 1
            if not left:
                return
        elif item.passed_over_s is None:
            item.passed_over_s = now_s


def _fit(items: Sequence[Waiting], first: Waiting, max_tokens: int) -> tuple[Waiting, ...]:
    """As many of `items` as the token limit admits, `first` always among them, the nearest to it in length first."""
    longest = max(item.tokens for item in items)
    if longest * len(items) <= max_tokens:
        return tuple(items)
    chosen, longest = [first], first.tokens
    for item in sorted(items, key=lambda item: abs(item.tokens - first.tokens)):
        if item is first:
            continue
        longer = max(longest, item.tokens)
        if longer * (len(chosen) + 1) <= max_tokens:
            chosen.append(item)
            longest = longer
    return tuple(chosen)


@dataclass(frozen=True, slots=True)
class KeyPicture:
    """What waits under one batch key, for onlookers."""

    key: BatchKey
    waiting: int
    by_priority: tuple[int, ...]
    """Of `waiting`, by priority from 0 to 9."""
    oldest_s: float
    """Monotonic seconds at which the longest waiting one came."""


class Assembler:
    """Requests that wait for a batch, by batch key.

    Args:
        policy: what `policy` is assigned later takes effect at the next decision.
    """

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._queues: dict[BatchKey, FairQueue] = {}
        self.num_requests = 0
        self.num_bytes = 0

    def add(self, key: BatchKey, item: Waiting) -> None:
        """Take in a request. Its tokens must not exceed `policy.max_batch_tokens`."""
        queue = self._queues.get(key)
        if queue is None:
            credit = CREDIT_BATCHES * self.policy.size_limit
            queue = self._queues[key] = FairQueue(self.policy.ageing_s, credit)
        queue.ageing_s = self.policy.ageing_s
        queue.push(item)
        self.num_requests += 1
        self.num_bytes += item.num_bytes

    def form(self, now_s: float, room: Callable[[BatchKey], Room | None]) -> Formed | None:
        """The batch that should be sent now, or None. Call again until None, with the room that is then left.

        Among batch keys that are ready, the one whose oldest request has waited longest goes first.

        Args:
            room: what the engine of a batch key can take; None while no engine serves it, which holds its requests.
        """
        ready: list[tuple[float, BatchKey, Room]] = []
        for key, queue in self._queues.items():
            space, oldest_s = room(key), queue.oldest_arrival_s()
            if space is not None and should_send(len(queue), now_s - oldest_s, space, self.policy):
                ready.append((oldest_s, key, space))
        if not ready:
            return None
        _, key, space = min(ready, key=lambda entry: entry[0])
        items = choose(self._queues[key], self.policy, now_s, space)
        self._remove(key, items, served=True)
        return Formed(key, items)

    def next_timeout_s(self) -> float | None:
        """Monotonic time at which a batch becomes due by waiting alone; None when nothing ever does."""
        if self.policy.adaptive and self.policy.enabled and self.policy.min_batch_size <= 1:
            return None
        oldest = (queue.oldest_arrival_s() for key, queue in self._queues.items() if key.queue != HELD)
        oldest_s = min(oldest, default=None)
        return None if oldest_s is None else oldest_s + self.policy.batch_timeout_s

    def take(self, key: BatchKey) -> list[Waiting]:
        """Take out, and return, every request under a batch key."""
        items = self._queues[key].items()
        self._remove(key, items, served=False)
        return items

    def move(self, item: Waiting, key: BatchKey, to: BatchKey) -> None:
        """Put a request under another batch key."""
        self._remove(key, [item], served=False)
        self.add(to, item)

    def discard(self, unwanted: Callable[[Waiting], bool]) -> list[Waiting]:
        """Take out, and return, every request that `unwanted` says."""
        found: list[Waiting] = []
        for key, queue in list(self._queues.items()):
            items = [item for item in queue.items() if unwanted(item)]
            if items:
                self._remove(key, items, served=False)
                found += items
        return found

    def _remove(self, key: BatchKey, items: Iterable[Waiting], *, served: bool) -> None:
        queue = self._queues[key]
        for item in items:
            self.num_requests -= 1
            self.num_bytes -= item.num_bytes
        queue.remove(items, served=served)
        if not len(queue):
            # An empty queue has nothing to remember: shares count among those who wait.
            del self._queues[key]

    def oldest_submitted_s(self) -> float | None:
        """Wall-clock time at which the oldest request that waits was submitted; None when none waits."""
        return min(
            (item.request.submitted_at for queue in self._queues.values() for item in queue.items()), default=None
        )

    def waiting_by_key(self) -> dict[BatchKey, int]:
        """How many requests wait under each batch key."""
        return {key: len(queue) for key, queue in self._queues.items()}

    def pictures(self, most: int) -> list[KeyPicture]:
        """What waits under each batch key, the longest waiting first, `most` at most."""
        found = [
            KeyPicture(key, len(queue), tuple(queue.num_by_priority), queue.oldest_arrival_s())
            for key, queue in self._queues.items()
        ]
        return heapq.nsmallest(most, found, key=attrgetter("oldest_s"))
