"""Head sampling: whether a request that begins a trace is traced, decided once, where it enters."""

from __future__ import annotations

import threading
from typing import Final

_RANGE: Final = 1 << 64


class HeadSampler:
    """A share of the requests, and never more than so many a second. Thread-safe.

    Which requests belong to the share follows from their trace ids alone, as OpenTelemetry's own ratio sampler has it.

    Args:
        rate: share of requests, 0 to 1.
        max_per_s: most requests a second of this process; None: no limit. A second's worth may come at once.
    """

    def __init__(self, rate: float, max_per_s: float | None) -> None:
        self.rate = rate
        self._max_per_s = max_per_s
        self._tokens = 0.0 if max_per_s is None else max(1.0, max_per_s)
        self._filled_s: float | None = None
        self._lock = threading.Lock()

    @property
    def rate(self) -> float:
        """May be set while requests come."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = rate
        self._bound = round(rate * _RANGE)

    def takes(self, trace_id: int, now_s: float) -> bool:
        """Whether the request is traced.

        Args:
            now_s: monotonic seconds.
        """
        if (trace_id & (_RANGE - 1)) >= self._bound:
            return False
        return self._max_per_s is None or self._has_token(self._max_per_s, now_s)

    def _has_token(self, max_per_s: float, now_s: float) -> bool:
        with self._lock:
            if self._filled_s is not None:
                most = max(1.0, max_per_s)
                self._tokens = min(most, self._tokens + max(0.0, now_s - self._filled_s) * max_per_s)
            self._filled_s = now_s
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True
