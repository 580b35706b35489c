"""Forward passes side by side: all are run, each with its share of the threads; a failure leaves nothing running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from muai_workers.engines.lanes import GOOD_TOKENS, LEAST_TOKENS, MAX_LANES, TorchLanes, in_lane, lanes_for

NUM_LANES = 3


@pytest.fixture
def lanes() -> Iterator[TorchLanes]:
    before = torch.get_num_threads()
    made = TorchLanes(NUM_LANES)
    yield made
    made.close()
    torch.set_num_threads(before)


def number(value: float) -> np.ndarray:
    return np.array([value], dtype=np.float32)


def test_given_as_many_passes_as_lanes_then_all_run_at_once_with_their_share_of_the_threads(lanes: TorchLanes) -> None:
    together = threading.Barrier(NUM_LANES)

    def one() -> np.ndarray:
        together.wait(10.0)
        return number(torch.get_num_threads())

    results = dict(lanes.run([one] * NUM_LANES))
    assert {position: float(value[0]) for position, value in results.items()} == dict.fromkeys(range(NUM_LANES), 1.0)
    assert torch.get_num_threads() == NUM_LANES


def test_given_passes_side_by_side_then_each_knows_it_and_one_alone_knows_too(lanes: TorchLanes) -> None:
    def one() -> np.ndarray:
        return number(in_lane())

    assert [float(value[0]) for _, value in lanes.run([one] * NUM_LANES)] == [1.0] * NUM_LANES
    assert [float(value[0]) for _, value in lanes.run([one])] == [0.0]


def test_given_more_threads_than_lanes_then_none_of_them_is_left_out() -> None:
    before = torch.get_num_threads()
    wide = TorchLanes(MAX_LANES + 3)
    try:
        together = threading.Barrier(MAX_LANES)

        def one() -> np.ndarray:
            together.wait(10.0)
            return number(torch.get_num_threads())

        shares = sorted(float(value[0]) for _, value in wide.run([one] * MAX_LANES))
        assert shares == [1.0] * (MAX_LANES - 3) + [2.0] * 3
    finally:
        wide.close()
        torch.set_num_threads(before)


def test_given_lanes_then_a_thread_that_comes_later_has_all_threads(lanes: TorchLanes) -> None:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [NUM_LANES]


def test_given_fewer_passes_than_lanes_then_they_run_here_with_all_threads(lanes: TorchLanes) -> None:
    seen: list[threading.Thread] = []

    def one() -> np.ndarray:
        seen.append(threading.current_thread())
        return number(torch.get_num_threads())

    assert [float(value[0]) for _, value in lanes.run([one, one])] == [NUM_LANES, NUM_LANES]
    assert set(seen) == {threading.current_thread()}


def test_given_few_tokens_then_they_are_not_divided(lanes: TorchLanes) -> None:
    assert lanes.count_for(NUM_LANES * LEAST_TOKENS - 1) == 1
    assert lanes.count_for(NUM_LANES * LEAST_TOKENS) == NUM_LANES


def test_given_many_tokens_then_each_lane_gets_several_parts_of_a_good_size(lanes: TorchLanes) -> None:
    assert lanes.count_for(NUM_LANES * GOOD_TOKENS * 5 // 4) == NUM_LANES
    assert lanes.count_for(NUM_LANES * GOOD_TOKENS * 7) == NUM_LANES * 7


def test_given_a_pass_that_fails_then_it_is_raised_when_nothing_runs_any_more(lanes: TorchLanes) -> None:
    running = threading.Semaphore(0)
    ended: list[int] = []

    def slow() -> np.ndarray:
        running.release()
        time.sleep(0.2)
        ended.append(1)
        return number(1)

    def failing() -> np.ndarray:
        running.acquire(timeout=10.0)
        running.acquire(timeout=10.0)
        raise MemoryError("no room")

    begun_later: list[int] = []

    def later() -> np.ndarray:
        begun_later.append(1)
        time.sleep(0.2)
        return number(2)

    with pytest.raises(MemoryError, match="no room"):
        list(lanes.run([slow, slow, failing, *[later] * 20]))
    assert len(ended) == 2
    count = len(begun_later)
    assert count < 20
    time.sleep(0.3)
    assert len(begun_later) == count


def test_given_a_reader_that_leaves_then_nothing_goes_on(lanes: TorchLanes) -> None:
    begun: list[int] = []

    def one() -> np.ndarray:
        begun.append(1)
        time.sleep(0.05)
        return number(1)

    results = lanes.run([one] * 30)
    next(iter(results))
    results.close()  # type: ignore[attr-defined]
    count = len(begun)
    assert count < 30
    time.sleep(0.2)
    assert len(begun) == count


def test_given_lanes_that_are_closed_then_passes_run_here(lanes: TorchLanes) -> None:
    lanes.close()
    assert [position for position, _ in lanes.run([lambda: number(1)] * NUM_LANES)] == [0, 1, 2]


def test_given_one_thread_or_a_compiled_module_then_there_is_one_lane() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert lanes_for(is_compiled=False).count_for(10**6) == 1
        torch.set_num_threads(2)
        assert lanes_for(is_compiled=True).count_for(10**6) == 1
    finally:
        torch.set_num_threads(before)
