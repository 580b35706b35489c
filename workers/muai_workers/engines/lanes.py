"""Several forward passes side by side on a CPU, each with a share of the threads.

Threads that share one forward pass wait for each other after every operation: they lose what the slowest of them loses,
and whatever else the machine does is lost once per thread. Passes of their own have nothing to wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Pass = Callable[[], NDArray[np.float32]]
LEAST_TOKENS = 448
"""In a lane of torch's: below it a pass gains less from having its threads to itself than its own cost beside the
tokens. Measured with MiniLM on two cores: 2 x 160 tokens as fast as 320 at once, 2 x 640 by 14 % faster than 1,280."""
GOOD_TOKENS = 1024
"""In a pass of a lane: with more, its memory comes from the system and goes back with every pass, and the pages are
zeroed anew each time. Measured there, 3,000 sentences in batches of 256: 342 to 349 a second and under a hundred page
faults in passes of about 1,024 tokens; 334 and some 200,000 in the longest that padding allows."""
MAX_LANES = 8


class Lanes(Protocol):
    """Where an encoder's forward passes run."""

    @property
    def width(self) -> int:
        """How many passes run at once."""
        ...

    def count_for(self, num_tokens: int) -> int:
        """Into how many parts of like cost so many tokens had best be divided."""
        ...

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each pass's position and result, as they end."""
        ...

    def close(self) -> None:
        """Nothing runs any more. What is asked for nevertheless runs in the caller's thread."""
        ...


class OneLane:
    """One pass after the other, with all threads of whatever computes it."""

    width = 1

    def count_for(self, num_tokens: int) -> int:
        return 1

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        yield from ((position, each()) for position, each in enumerate(passes))

    def close(self) -> None:
        """Nothing is held."""


class ThreadLanes:
    """As many passes at once as there are threads, or `MAX_LANES`; few tokens go through one, outside of the lanes.

    Args:
        least_tokens: in a lane.
    """

    def __init__(self, num_threads: int, least_tokens: int) -> None:
        self.width = min(num_threads, MAX_LANES)
        self._least_tokens = least_tokens
        self._is_closed = False
        self._pool = ThreadPoolExecutor(self.width, "muai-lane", initializer=_enter)

    def count_for(self, num_tokens: int) -> int:
        if num_tokens < self.width * self._least_tokens:
            return 1
        return self.width * max(1, round(num_tokens / (self.width * GOOD_TOKENS)))

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if self._is_closed or len(passes) < self.width:
            yield from OneLane().run(passes)
            return
        futures: dict[Future[NDArray[np.float32]], int] = {}
        try:
            for position, each in enumerate(passes):
                futures[self._pool.submit(each)] = position
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # nothing goes on in the memory that a failed pass asks to have freed
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()

    def close(self) -> None:
        self._is_closed = True
        self._pool.shutdown()


class TorchLanes(ThreadLanes):
    """In each of them torch computes with its share of the threads."""

    def __init__(self, num_threads: int, least_tokens: int = LEAST_TOKENS) -> None:
        super().__init__(num_threads, least_tokens)
        _give_out(num_threads, self._pool, self.width)
        torch.set_num_threads(num_threads)  # of this thread, and of those that torch has not met yet


_here = threading.local()


def in_lane() -> bool:
    """Whether the calling thread is a lane, so that other passes run beside its own."""
    return getattr(_here, "is_lane", False)


def _enter() -> None:
    _here.is_lane = True


def lanes_for(*, is_compiled: bool) -> Lanes:
    """Several where they help: on a CPU of several threads, with modules that any thread may call."""
    num_threads = torch.get_num_threads()
    if torch.cuda.is_available() or is_compiled or num_threads < 2:
        return OneLane()
    return TorchLanes(num_threads)


def _give_out(num_threads: int, pool: ThreadPoolExecutor, num_lanes: int) -> None:
    """Let torch compute with its share of the threads in each thread of the pool; all of them are given out."""
    all_there = threading.Barrier(num_lanes)

    def prepare(share: int) -> None:
        all_there.wait()
        torch.get_num_threads()  # before it is asked the first time, torch overrules what it was told
        torch.set_num_threads(share)

    shares = [num_threads // num_lanes + (lane < num_threads % num_lanes) for lane in range(num_lanes)]
    for future in [pool.submit(prepare, share) for share in shares]:
        future.result()
