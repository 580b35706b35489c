"""Looking at the consumers from outside, and taking back what dead ones hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import redis

from muai_batching.transport.keys import DEFAULT_STATE_PREFIX, StateKeys
from muai_batching.transport.lease import LeaseObserver
from muai_batching.transport.store import ClaimStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """One consumer: how many messages it holds and how often its heart has beaten (negative: given up)."""

    consumer: str
    num_claims: int
    beats: int


@dataclass(frozen=True)
class Reclaimed:
    """A dead consumer and how many messages went back from it to their queues."""

    consumer: str
    num_messages: int


def lease_table(client: redis.Redis, prefix: str = DEFAULT_STATE_PREFIX) -> list[Lease]:
    """All consumers known to the broker behind `client`. `prefix` includes the broker's `global_keyprefix`."""
    store = ClaimStore(client, StateKeys(prefix))
    beats = store.beats()
    with client.pipeline(transaction=False) as pipe:
        for consumer in beats:
            pipe.hlen(store.keys.claims(consumer))
        sizes = pipe.execute()
    return [Lease(consumer, size, count) for (consumer, count), size in zip(beats.items(), sizes, strict=True)]


def reclaim_dead(
    client: redis.Redis, observer: LeaseObserver, now_s: float, prefix: str = DEFAULT_STATE_PREFIX
) -> list[Reclaimed]:
    """Look at all heartbeats once and give back what dead consumers hold; call it every quarter of the lease.

    Args:
        observer: keeps what earlier calls saw; one per caller.
        now_s: the caller's monotonic clock.
    """
    store = ClaimStore(client, StateKeys(prefix))
    return reclaim_overdue(store, observer, store.beats(), now_s)


def reclaim_overdue(store: ClaimStore, observer: LeaseObserver, beats: dict[str, int], now_s: float) -> list[Reclaimed]:
    """`reclaim_dead` for heartbeats that were read already."""
    reclaimed = []
    for consumer, count in observer.observe(beats, now_s):
        if store.condemn(consumer, count):
            moved = store.reclaim(consumer)
            logger.warning("consumer %s is gone; %d message(s) back in their queues", consumer, moved)
            reclaimed.append(Reclaimed(consumer, moved))
    return reclaimed
