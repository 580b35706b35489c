"""What becomes of a delivery after a try. Pure."""

from __future__ import annotations

from dataclasses import dataclass

PAUSES_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)
"""Between one try and the next; the last one goes on."""
LONGEST_PAUSE_S = 3600.0
GONE = 410
"""What a receiver answers that wants no more of it."""


@dataclass(frozen=True, slots=True)
class Tried:
    """How one try went."""

    status: int | None = None
    """Of HTTP; None: there was no answer."""
    reason: str = ""
    """Where there was no answer: why."""
    retry_after_s: float | None = None
    """How long the receiver asked us to wait."""

    @property
    def delivered(self) -> bool:
        """Whether the receiver has taken it."""
        return self.status is not None and 200 <= self.status < 300

    def told(self) -> str:
        """In words."""
        if self.status is None:
            return self.reason
        if 300 <= self.status < 400:
            return f"status {self.status}; redirects are not followed"
        return f"status {self.status}"


def next_try_s(
    tried: Tried, num_tries: int, first_s: float, now_s: float, give_up_after_s: float, chance: float
) -> float | None:
    """When to try again, in wall-clock seconds; None: not any more.

    The pauses grow to an hour, and each is longer by up to a fifth at random, so that what failed together does not
    come back together. A pause that the receiver asks for is kept, an hour of it at most.

    Args:
        num_tries: so far, this one included.
        first_s: when the first try began.
        chance: from 0 to 1, drawn by the caller.
    """
    if tried.delivered or tried.status == GONE:
        return None
    pause_s = PAUSES_S[min(num_tries, len(PAUSES_S)) - 1]
    if tried.retry_after_s is not None:
        pause_s = max(pause_s, min(tried.retry_after_s, LONGEST_PAUSE_S))
    due_s = now_s + pause_s * (1 + 0.2 * chance)
    return due_s if due_s <= first_s + give_up_after_s else None
