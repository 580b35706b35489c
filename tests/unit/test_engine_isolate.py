"""Isolation: whose fault it is, and what a run may cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from muai_producers.errors import (
    EngineUnavailableError,
    InferenceFailedError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryError,
)
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.engines.isolate import run_isolated

OUTPUT = EngineOutput({"text": "done"})
Run = Callable[[Sequence[InferenceRequest]], Iterable[Completion]]


def requests(count: int) -> list[InferenceRequest]:
    return [InferenceRequest(id=str(index), model="m", inputs={"text": "t"}) for index in range(count)]


def collect(run: Run, count: int, **options: Callable[[], None]) -> dict[str, Completion]:
    kept: dict[str, Completion] = {}
    run_isolated(run, requests(count), lambda completion: kept.update({completion.request_id: completion}), **options)
    return kept


def test_one_bad_of_thirty_two_costs_six_rounds() -> None:
    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        if any(request.id == "13" for request in part):
            raise RuntimeError("thirteen")
        yield from (Completion(request.id, output=OUTPUT) for request in part)

    report = run_isolated(run, requests(32), lambda _: None)
    assert (report.rounds, report.runs) == (6, 11)


@pytest.mark.parametrize("error", [ModelLoadError("no weights"), EngineUnavailableError("no device")])
def test_a_model_that_cannot_be_loaded_is_tried_once(error: Exception) -> None:
    calls = []

    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        calls.append(len(part))
        raise error

    kept = collect(run, 8)
    assert calls == [8]
    assert {one.error for one in kept.values()} == {error}


def test_preparation_that_fails_answers_everybody_without_a_run() -> None:
    def prepare() -> None:
        raise MemoryError("no room for the weights")

    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        raise AssertionError("must not run")

    kept = collect(run, 4, prepare=prepare)
    assert [type(one.error) for one in kept.values()] == [OutOfMemoryError] * 4


def test_memory_is_relieved_before_the_halves_run() -> None:
    relieved = False

    def relieve() -> None:
        nonlocal relieved
        relieved = True

    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        if not relieved:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield from (Completion(request.id, output=OUTPUT) for request in part)

    assert all(one.output is OUTPUT for one in collect(run, 4, relieve=relieve).values())


def test_an_error_of_the_listener_is_not_taken_for_the_engines() -> None:
    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        yield from (Completion(request.id, output=OUTPUT) for request in part)

    def listener(_: Completion) -> None:
        raise ConnectionError("results cannot be written")

    with pytest.raises(ConnectionError):
        run_isolated(run, requests(4), listener)


def test_a_request_that_the_engine_forgets_is_answered_with_an_error() -> None:
    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        yield from (Completion(request.id, output=OUTPUT) for request in part if request.id != "2")

    kept = collect(run, 4)
    assert isinstance(kept["2"].error, InferenceFailedError)
    assert sum(one.output is OUTPUT for one in kept.values()) == 3


def test_an_error_of_the_request_itself_keeps_its_kind() -> None:
    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        if any(request.id == "1" for request in part):
            raise InvalidRequestError("one is wrong")
        yield from (Completion(request.id, output=OUTPUT) for request in part)

    kept = collect(run, 4)
    assert isinstance(kept["1"].error, InvalidRequestError)


def test_no_requests_no_run() -> None:
    report = run_isolated(lambda part: pytest.fail("must not run"), [], lambda _: None)
    assert report.runs == 0


def test_a_device_without_room_for_any_request_is_given_up_on() -> None:
    calls: list[int] = []

    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        calls.append(len(part))
        raise OutOfMemoryError("no room")

    kept = collect(run, 32)
    assert [type(one.error) for one in kept.values()] == [OutOfMemoryError] * 32
    assert len(calls) < 16


def test_a_request_error_raised_for_the_batch_falls_on_nobody_else() -> None:
    def run(part: Sequence[InferenceRequest]) -> Iterator[Completion]:
        if any(int(request.id) % 4 == 0 for request in part):
            raise InvalidRequestError("every fourth is wrong")
        yield from (Completion(request.id, output=OUTPUT) for request in part)

    kept = collect(run, 32)
    assert sorted(int(name) for name, one in kept.items() if one.error is not None) == list(range(0, 32, 4))
