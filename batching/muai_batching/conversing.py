"""Conversations at the collector: holds turns back until they may go, and sends them to where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from muai_batching.affinity import Owner, Way, owner_of, way_of
from muai_batching.assembler import HELD, Assembler, BatchKey, Room
from muai_batching.fair_queue import Waiting
from muai_batching.observing import CollectorMetrics
from muai_batching.routing import NextAttempt
from muai_batching.turns import HeldTurns
from muai_producers.conversations import Conversations, conversation_of
from muai_producers.fleet import FleetView, OwnBatchDone, TurnsEnded
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

ASKED_AT_ONCE = 256
MAX_ROUNDS = 8
"""Bounds how long one turn of the event loop may take."""


class Conversing:
    """What a collector knows of conversations, and does for them. Without them it asks the state store nothing.

    Turns that are held back lie in the assembler, under a batch key of which no batch is formed: they expire, are
    cancelled, counted and passed on like all others.
    """

    def __init__(self, settings: Settings, store: Store, assembler: Assembler, metrics: CollectorMetrics) -> None:
        self._assembler = assembler
        self._metrics = metrics
        self._store = Conversations(store)
        self._held = HeldTurns()
        self._view = FleetView()
        self._unfinished: dict[str, int] = {}
        self._closed: set[str] = set()
        """Own queues that refused a batch, until the next picture of the fleet."""
        self.reconfigure(settings)

    def reconfigure(self, settings: Settings) -> None:
        """Work by these settings from now on."""
        self._enabled = settings.optimization.affinity.enabled
        self._spill_load = settings.optimization.affinity.spill_load

    # -- turns ---------------------------------------------------------------------------------------------------

    def take_in(self, key: BatchKey, item: Waiting) -> BatchKey:
        """The batch key under which a request waits now: its own where it belongs to no conversation."""
        conversation = conversation_of(item.request) if self._enabled else None
        if conversation is None:
            return key
        self._held.add(conversation, key, item)
        return replace(key, queue=HELD)

    def let_go(self) -> bool:
        """Put turns that may go where they belong; True when there is more to ask.

        Raises:
            redis.exceptions.RedisError: the store does not answer; everything is held on.
        """
        for _ in range(MAX_ROUNDS):
            questions = self._held.questions(ASKED_AT_ONCE)
            if not questions:
                return False
            for asked, told in zip(questions, self._store.take_turns(questions), strict=True):
                turn = self._held.answered(asked, told.first)
                if turn is not None:
                    held = replace(turn.key, queue=HELD)
                    self._assembler.move(turn.item, held, self._pinned(turn.key, told.pin))
        return True

    def on_turns_ended(self, ended: TurnsEnded) -> None:
        """Those that wait for them may go."""
        for conversation in ended.conversations:
            self._held.wake(conversation)

    def ask_all(self) -> None:
        """Ask about all that is held back: a turn may have ended without a word, by being cancelled."""
        self._held.wake_all()

    def forget_all(self) -> None:
        """What was held back is delivered again."""
        self._held.clear()

    def _pinned(self, key: BatchKey, pin: str) -> BatchKey:
        if pin and self._owner(key, pin) is not None:
            return replace(key, queue=pin)
        self._metrics.turns(key.model, "repinned" if pin else "new")
        return key

    # -- workers -------------------------------------------------------------------------------------------------

    def on_fleet(self, view: FleetView) -> None:
        """A new picture of the fleet."""
        self._view = view
        self._unfinished = dict(view.own_outstanding)
        self._closed.clear()
        self._leave_the_gone()

    def on_own_batch_done(self, done: OwnBatchDone) -> None:
        """A batch of a worker's own queue has ended."""
        self._unfinished[done.queue] = done.outstanding

    def sending(self, queue: str, change: int = 1) -> None:
        """A batch goes to that own queue; with -1, it has not gone."""
        if queue:
            self._unfinished[queue] = max(0, self._unfinished.get(queue, 0) + change)

    def sent(self, key: BatchKey, queue: str, count: int) -> None:
        """So many turns of a batch key went there; '' is the queue of the whole engine."""
        if key.queue:
            self._metrics.turns(key.model, "pinned" if queue else "spilled", count)

    def refused(self, queue: str) -> None:
        """An own queue took no batch: it is closed, or nobody knows it."""
        if queue:
            self._closed.add(queue)
            self._leave_the_gone()

    def _leave_the_gone(self) -> None:
        """What is pinned to workers that are gone may go anywhere."""
        for key, count in self._assembler.waiting_by_key().items():
            if key.queue not in ("", HELD) and self._owner(key, key.queue) is None:
                for item in self._assembler.take(key):
                    self._assembler.add(replace(key, queue=""), item)
                self._metrics.turns(key.model, "repinned", count)

    def _owner(self, key: BatchKey, queue: str) -> Owner | None:
        if queue in self._closed:
            return None
        return owner_of(queue, key.model, key.chain, self._view, self._unfinished.get(queue, 0))

    # -- where a batch goes --------------------------------------------------------------------------------------

    def way(self, key: BatchKey, idle_elsewhere: int, *, may_wait: bool = True) -> Way:
        """As `way_of`, for the batch key of a pinned conversation."""
        return way_of(self._owner(key, key.queue), idle_elsewhere, self._spill_load, may_wait=may_wait)

    def attempt(self, key: BatchKey) -> NextAttempt:
        """The first attempt at the worker that a batch key is pinned to; the rest of the chain stays for the next."""
        owner = self._owner(key, key.queue)
        assert owner is not None
        return NextAttempt(owner.engine, tuple(engine for engine in key.chain if engine != owner.engine), ())

    def room(self, key: BatchKey) -> Room:
        """What the worker that a batch key is pinned to can take: sent at once, for it queues them itself."""
        owner = self._owner(key, key.queue)
        left = 0 if owner is None else owner.room(self._spill_load)
        return Room(left, left)

    def held(self) -> Sequence[Waiting]:
        """Turns that are held back now."""
        return self._held.items()
