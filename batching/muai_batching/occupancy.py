"""How busy the engines are, as far as a collector knows: what may be sent to them now. Pure, with the clock passed in.

What is sent ahead of its time is chosen from what has come by then, and whatever comes later stands behind it. So a
batch that will wait at a worker for seconds stays here, where it can still become a better one, until its turn is near.
"""

from __future__ import annotations

from muai_batching.assembler import NO_ROOM, Room
from muai_producers.fleet import BatchDone, FleetView

HELD_SHARE = 0.5
"""Of the time in which a slot is expected to become free, no batch is sent ahead. The rest is for batches that end
sooner than those before them; should one end sooner still, its slot is idle, and is sent a batch at once."""
HELD_FROM_S = 0.2
"""Expected time below which batches are sent ahead at once: the way to a slot that fell idle takes some 10 ms."""


class Occupancy:
    """Batches that are with each engine, and when more may follow."""

    def __init__(self) -> None:
        self.fleet = FleetView()
        self._outstanding: dict[str, int] = {}
        self._ahead_from_s: dict[str, float] = {}

    def on_fleet(self, view: FleetView) -> None:
        """A new picture of the fleet."""
        self.fleet = view
        self._outstanding = dict(view.outstanding)

    def on_batch_done(self, done: BatchDone, now_s: float) -> None:
        """A batch has finished, and one that waited behind it begins."""
        self._outstanding[done.engine] = done.outstanding
        self._hold(done.engine, done.took_s, now_s)

    def sending(self, engine: str, expected_s: float, now_s: float) -> None:
        """A batch is on its way to its engine.

        Args:
            expected_s: what it is expected to take; 0 where that is not known.
        """
        if self.idle(engine) > 0:
            self._hold(engine, expected_s, now_s)
        self._outstanding[engine] = self._outstanding.get(engine, 0) + 1

    def not_sent(self, engine: str) -> None:
        """A batch is not on its way after all."""
        self._outstanding[engine] = self._outstanding.get(engine, 0) - 1

    def sent(self, engine: str, outstanding: int) -> None:
        """The broker's word on how many there are."""
        self._outstanding[engine] = outstanding

    def idle(self, engine: str | None) -> int:
        """Slots of the engine with nothing to do; below 0 when batches wait there."""
        return 0 if engine is None else self.fleet.slots(engine) - self._outstanding.get(engine, 0)

    def room(self, engine: str, now_s: float) -> Room:
        """What the engine can take now."""
        idle, ahead = self.idle(engine), self.fleet.capacity(engine) - self._outstanding.get(engine, 0)
        if ahead <= 0 or (idle <= 0 and now_s < self._ahead_from_s.get(engine, now_s)):
            return NO_ROOM
        return Room(max(0, idle), ahead)

    def next_room_s(self, now_s: float) -> float | None:
        """When batches that are held for the present may be sent ahead; None where none are."""
        return min((from_s for from_s in self._ahead_from_s.values() if from_s > now_s), default=None)

    def _hold(self, engine: str, expected_s: float, now_s: float) -> None:
        """A batch begins now that takes so long: send none ahead for a share of the time until a slot is free."""
        until_free_s = expected_s / max(1, self.fleet.slots(engine))
        self._ahead_from_s[engine] = now_s + HELD_SHARE * until_free_s if until_free_s >= HELD_FROM_S else now_s
