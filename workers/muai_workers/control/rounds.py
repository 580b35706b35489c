"""Work that goes on between two ticks of the clock: rounds over whatever is open, until nothing moves or time is up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from kombu.exceptions import OperationalError

from muai_producers.errors import MuaiError
from muai_workers.control.singleton import singleton

log = logging.getLogger(__name__)
IDLE_S = 0.05
"""Between two rounds in which nothing moved."""


class Rounds:
    """Goes over open things, a step at each in turn, one process at each of them at a time.

    Args:
        step: takes a step at one thing and says whether anything was done.
        limit_s: a process that dies in a step keeps others from its thing for so long. A step that takes longer may
            be taken by two; what they do must bear that.
    """

    def __init__(
        self,
        client: Any,
        lock_prefix: str,
        open_ids: Callable[[], Sequence[str]],
        step: Callable[[str], bool],
        *,
        limit_s: float = 10.0,
    ) -> None:
        self._client = client
        self._lock_prefix = lock_prefix
        self._open_ids = open_ids
        self._step = step
        self._limit_s = limit_s
        self._busy = threading.Lock()

    def run(self, for_s: float) -> int:
        """Go round until there is nothing open, or for `for_s` seconds; returns the steps that did something.

        Returns at once while another thread of this process is at it.
        """
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            return self._run(time.monotonic() + for_s)
        finally:
            self._busy.release()

    def _run(self, until_s: float) -> int:
        steps = num_rounds = 0
        while open_ids := self._open_ids():
            first = num_rounds % len(open_ids)  # where there is room for one alone, each is the first in turn
            moved = sum(self._one(open_id) for open_id in (*open_ids[first:], *open_ids[:first]))
            steps, num_rounds = steps + moved, num_rounds + 1
            if time.monotonic() >= until_s:
                break
            if not moved:
                time.sleep(IDLE_S)
        return steps

    def _one(self, open_id: str) -> bool:
        with singleton(self._client, f"{self._lock_prefix}:{open_id}", self._limit_s) as is_ours:
            if not is_ours:
                return False
            try:
                return self._step(open_id)
            except (redis.RedisError, OperationalError):
                raise
            except (MuaiError, OSError) as error:
                log.warning("%s: %s; trying again", open_id, error)
                return False
