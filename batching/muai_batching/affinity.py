"""Where the turns of a conversation go, and whose queue has lost its worker: pure decisions over plain values.

A conversation is pinned to the own queue of the worker that keeps its keys and values. Its next turn goes there while
that worker lives and has room, and to the queue of the whole engine otherwise; who takes it there has the pin then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from muai_producers.fleet import FleetView, WorkerRecord

Way = Literal["pinned", "spill", "wait", "gone"]
"""`pinned`: to the worker's own queue. `spill`: to any worker, for this one has too much to do and another has nothing.
`wait`: nobody has room. `gone`: the worker does not serve the model any more, and the pin is worth nothing.
"""


@dataclass(frozen=True)
class Owner:
    """The live worker whose own queue a conversation is pinned to, at the moment of a decision."""

    engine: str
    slots: int
    """Batches that it runs at once."""
    unfinished: int
    """Batches in its own queue, those that run included."""

    def room(self, spill_load: float) -> int:
        """Batches that may be sent to it before it has too much to do."""
        return max(0, math.ceil(spill_load * self.slots) - self.unfinished)


def owner_of(queue: str, model: str, chain: Collection[str], view: FleetView, unfinished: int) -> Owner | None:
    """Whose own queue it is; None when no live worker has it, or its engine is not to serve the model now."""
    worker = next((one for one in view.workers if queue and one.queue == queue), None)
    if worker is None or worker.slots < 1 or worker.engine not in chain or (worker.engine, model) in view.cooling:
        return None
    return Owner(worker.engine, worker.slots, unfinished)


def way_of(owner: Owner | None, idle_elsewhere: int, spill_load: float, *, may_wait: bool = True) -> Way:
    """Where the next batch of an owner's conversations goes.

    Args:
        owner: None: it is dead, or does not serve the model any more.
        idle_elsewhere: slots of the engine, or of another that would serve the model, with nothing to do.
        may_wait: whether a batch that finds no room may stay where it is; one that must leave now may not.
    """
    if owner is None:
        return "gone"
    if owner.room(spill_load) > 0:
        return "pinned"
    return "wait" if may_wait and idle_elsewhere <= 0 else "spill"


@dataclass
class Bereaved:
    """Watches for own queues whose workers have gone.

    A worker that is out of the picture is sent nothing more, but it may have been silent only because the state store
    was away: its queue is closed once it has been missing for `grace_s`, by the observer's own clock.
    """

    grace_s: float
    missing_since: dict[str, float] = field(default_factory=dict)

    def observe(self, queues: Mapping[str, str], workers: Collection[WorkerRecord], now_s: float) -> list[str]:
        """The own queues that are to be closed now.

        Args:
            queues: every own queue that has not been closed.
            workers: those that live.
            now_s: monotonic seconds.
        """
        alive = {worker.queue for worker in workers}
        missing = [queue for queue in queues if queue not in alive]
        self.missing_since = {queue: self.missing_since.get(queue, now_s) for queue in missing}
        return [queue for queue in missing if now_s - self.missing_since[queue] >= self.grace_s]
