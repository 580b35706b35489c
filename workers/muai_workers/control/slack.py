"""How many lines of batches may be in the queue: as many as are allowed while nobody else asks, and a little work now
and then while others do. Pure.

An engine that runs a line's batch keeps whoever comes then waiting until it ends, whatever the priorities say. So while
others ask, lines go out in bursts that take an engine hardly longer than one request alone would, and after each burst
the engine is left to the others for many times as long as the burst took it. Neither the share of requests that meet
a burst nor the wait of one that does is large, and both are bounded. Lines take no more of the time than their windows
want.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from muai_batching.latency import LatencyFit
from muai_producers.wire import InferenceResult

QUIET_S = 2.0
"""Nobody has asked for so long: lines have the engines to themselves."""
LEAST_BURST = 4
LEAST_SHARE = 0.01
"""Of the time, lines may take this much though there is no hurry: so few requests meet them, their handling included,
that the 95th percentile of the others stays where it is."""
HASTE = 1.5
"""How much faster than its window wants a batch is run: what it meets is not known beforehand."""
GROWTH = 1.5
"""How much longer than for one request an engine may be busy with a burst."""


class Slack:
    """Of one process that runs batches.

    Args:
        busy_share: of the time, the most that lines may take while others ask.
        max_in_flight: most requests of lines at once, of one batch.
    """

    def __init__(self, busy_share: float, max_in_flight: int) -> None:
        self._busy_share = busy_share
        self._max_in_flight = max_in_flight
        self._others: int | None = None
        self._others_came_s = float("-inf")
        self._resume_s = float("-inf")
        self._fits: dict[tuple[str, str], LatencyFit] = {}
        self._last = LatencyFit()
        self._owed: dict[str, tuple[int, float]] = {}

    def owes(self, batch_id: str, num_lines: int, left_s: float) -> None:
        """So many lines of a batch are to be done in the time that its window leaves."""
        self._owed[batch_id] = num_lines, max(1.0, left_s)

    def forget_but(self, open_ids: Collection[str]) -> None:
        """Batches other than these have ended, wherever that was."""
        self._owed = {batch_id: owed for batch_id, owed in self._owed.items() if batch_id in open_ids}

    @property
    def share(self) -> float:
        """Of the time, what lines take while others ask."""
        burst = self._burst()
        line_s = self._last.predict_s(burst) / burst
        wanted = HASTE * line_s * sum(lines / left_s for lines, left_s in self._owed.values())
        return min(self._busy_share, max(LEAST_SHARE, wanted))

    def saw(self, others_admitted: int, now_s: float) -> None:
        """Remember how many requests other than lines have ever been admitted, at `now_s` in monotonic seconds."""
        if self._others is not None and others_admitted > self._others:
            self._others_came_s = now_s
        self._others = others_admitted

    def ended(self, results: Iterable[InferenceResult], now_s: float) -> None:
        """Take in results of lines: how long each of their batches kept its engine."""
        took_s: dict[str, float] = {}
        for result in results:
            batch_id = str(result.metadata.get("batch_id", ""))
            inference_s = float(result.metadata.get("inference_ms") or 0.0) / 1000
            took_s[batch_id] = max(took_s.get(batch_id, 0.0), inference_s)
            key = (result.engine_used, str(result.metadata.get("model", "")))
            self._last = self._fits.setdefault(key, LatencyFit())
            self._last.add(max(1, result.batch_size), inference_s)
        if took_s:
            pause_s = sum(took_s.values()) * (1 / self.share - 1)
            self._resume_s = max(self._resume_s, now_s + pause_s)

    def is_quiet(self, now_s: float) -> bool:
        """Whether nobody else asks."""
        return now_s - self._others_came_s > QUIET_S

    def room(self, own_in_flight: int, now_s: float) -> int:
        """Requests that lines may add now.

        Args:
            own_in_flight: requests of lines in the queue, of all batches.
        """
        if self.is_quiet(now_s):
            return self._max_in_flight
        if own_in_flight or now_s < self._resume_s:
            return 0
        return self._burst()

    def _burst(self) -> int:
        per_request_s, per_batch_s = self._last.coefficients
        if per_request_s <= 0.0:
            return self._max_in_flight if per_batch_s > 0.0 else min(LEAST_BURST, self._max_in_flight)
        largest = GROWTH + (GROWTH - 1) * per_batch_s / per_request_s
        return max(1, min(self._max_in_flight, max(LEAST_BURST, int(largest))))
