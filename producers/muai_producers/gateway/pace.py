"""How fast requests are being answered, and what that says of waiting. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
LEAST_S = 1.0
"""Two looks closer together than this say nothing of a rate."""
LONGEST_S = 60.0


class Pace:
    """Answers per second over the last half minute, from looks at a counter that only grows."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()

    def saw(self, answered: int, now_s: float) -> None:
        """Remember the counter as it is at `now_s`, in monotonic seconds."""
        if self._looks and answered < self._looks[-1][1]:
            self._looks.clear()  # another store, or one that began anew
        self._looks.append((now_s, answered))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - WINDOW_S:
            self._looks.popleft()

    def age_s(self, now_s: float) -> float:
        """Seconds since the last look; infinite before the first."""
        return now_s - self._looks[-1][0] if self._looks else float("inf")

    def per_s(self) -> float | None:
        """Answers per second; None while nothing is known."""
        if len(self._looks) < 2:
            return None
        (first_s, first), (last_s, last) = self._looks[0], self._looks[-1]
        return (last - first) / (last_s - first_s) if last_s - first_s >= LEAST_S else None

    def wait_s(self, num_requests: int) -> float | None:
        """Seconds in which so many requests will be answered at this pace; None while nothing is known."""
        rate = self.per_s()
        if rate is None:
            return None
        return min(LONGEST_S, num_requests / rate) if rate > 0 else LONGEST_S
