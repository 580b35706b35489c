"""Who of several consumers takes a message: the one with the least in its hands. Pure.

Consumers ask for messages themselves, so nobody hands them out; but one that has work waits a little before it takes
more, in proportion to what it has, and one that has none takes it meanwhile. Where all have their hands full the wait
is over long before the work is, and delays nothing. Where work is short it is not worth the while.

Times are seconds of a monotonic clock, passed in.
"""

from __future__ import annotations

SHARE = 0.1
"""Of the time that a message takes: so long waits a consumer whose hands are full."""
LONGEST_S = 0.02
SHORTEST_S = 0.002
"""Messages of which it would be less are taken as they come: waiting behind one of them costs little."""
FORGOTTEN_S = 1.0
"""A wait that ended longer ago than this was for another message."""
SMOOTHING = 0.2


class Restraint:
    """Of one consumer.

    Args:
        at_work: messages that it works on at once; what it takes beyond these is held ready. 0: it takes what there is.
    """

    def __init__(self, at_work: int = 0) -> None:
        self._at_work = at_work
        self._took_s: float | None = None
        self._due_s: float | None = None

    @property
    def at_work(self) -> int:
        return self._at_work

    def took(self, seconds: float) -> None:
        """A message was worked on for so long."""
        before_s = seconds if self._took_s is None else self._took_s
        self._took_s = before_s + SMOOTHING * (seconds - before_s)

    def patience_s(self, held: int) -> float:
        """How long to leave a message to others before taking it, with so many in hand."""
        return self._longest_s() * min(1.0, held / self._at_work) if self._at_work else 0.0

    def _longest_s(self) -> float:
        """With full hands; 0: messages are taken as they come."""
        if not self._at_work:
            return 0.0
        longest_s = LONGEST_S if self._took_s is None else min(LONGEST_S, SHARE * self._took_s)
        return longest_s if longest_s >= SHORTEST_S else 0.0

    def may_take(self, held: int, room: int, now_s: float) -> int:
        """How many messages to take now, of those that may be there; 0: wait for `rest_s` and ask again.

        Args:
            room: how many more it may hold.
        """
        if not self._longest_s():
            self._due_s = None
            return room
        if held and (self._due_s is None or now_s - self._due_s > FORGOTTEN_S):
            self._due_s = now_s + self.patience_s(held)
        if self.is_waiting(held, now_s):
            return 0
        self._due_s = None
        # One by one while hands are free: the next may be for another. With full hands, all there is room for.
        return min(room, 1) if held < self._at_work else room

    def is_waiting(self, held: int, now_s: float) -> bool:
        """Whether it leaves what there is to others for now."""
        return held > 0 and self._due_s is not None and now_s < self._due_s

    def rest_s(self, now_s: float) -> float:
        """How long it still waits."""
        return 0.0 if self._due_s is None else max(0.0, self._due_s - now_s)
