"""A batch is no unit of failure, however its failures fall."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from muai_producers.errors import InferenceFailedError, OutOfMemoryError
from muai_producers.wire import InferenceRequest
from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.engines.isolate import BROKEN_AFTER_RUNS, IsolationReport, run_isolated

sizes = st.integers(min_value=1, max_value=64)


class Scripted:
    """An engine that fails as told, and counts how often each request was run and answered."""

    def __init__(self, bad: set[int], *, fits: int = 10**9, answers_before_failing: int = 0) -> None:
        self.bad = {str(index) for index in bad}
        self.fits = fits
        self.answers_before_failing = answers_before_failing
        self.answered: Counter[str] = Counter()
        self.errors: dict[str, Exception] = {}
        self.out_of_memory = 0

    def run(self, requests: Sequence[InferenceRequest]) -> Iterator[Completion]:
        assert not any(self.answered[request.id] for request in requests), "a completed request was run again"
        if len(requests) > self.fits:
            self.out_of_memory += 1
            raise OutOfMemoryError("too many")
        failing = [request for request in requests if request.id in self.bad]
        good = [request for request in requests if request.id not in self.bad]
        for request in good[: self.answers_before_failing] if failing else good:
            yield Completion(request.id, output=EngineOutput({"embedding": [1.0]}))
        if failing:
            raise ValueError(f"cannot run {failing[0].id}")

    def keep(self, completion: Completion) -> None:
        self.answered[completion.request_id] += 1
        if completion.error is not None:
            self.errors[completion.request_id] = completion.error


def isolate(engine: Scripted, size: int) -> IsolationReport:
    requests = [InferenceRequest(id=str(index), model="m", inputs={"text": "t"}) for index in range(size)]
    report = run_isolated(engine.run, requests, engine.keep)
    assert engine.answered == Counter({request.id: 1 for request in requests})
    return report


@given(size=sizes, data=st.data(), answers_before_failing=st.integers(0, 3))
def test_one_bad_request_fails_alone_within_the_depth_of_its_batch(
    size: int, data: st.DataObject, answers_before_failing: int
) -> None:
    bad = data.draw(st.integers(0, size - 1))
    engine = Scripted({bad}, answers_before_failing=answers_before_failing)
    report = isolate(engine, size)
    assert set(engine.errors) == {str(bad)}
    assert isinstance(engine.errors[str(bad)], InferenceFailedError)
    assert report.rounds <= math.ceil(math.log2(size)) + 1
    assert report.engine_failure is None


@given(size=sizes, data=st.data(), answers_before_failing=st.integers(0, 3))
def test_whoever_fails_every_request_is_answered_once(
    size: int, data: st.DataObject, answers_before_failing: int
) -> None:
    bad = data.draw(st.sets(st.integers(0, size - 1)))
    engine = Scripted(bad, answers_before_failing=answers_before_failing)
    report = isolate(engine, size)
    assert {str(index) for index in bad} <= set(engine.errors)
    if report.engine_failure is None:
        assert set(engine.errors) == {str(index) for index in bad}


@given(size=sizes)
def test_a_broken_engine_is_given_up_on(size: int) -> None:
    engine = Scripted(set(range(size)))
    report = isolate(engine, size)
    assert report.runs <= BROKEN_AFTER_RUNS
    assert len(engine.errors) == size
    if size >= BROKEN_AFTER_RUNS:
        assert report.engine_failure is not None


@given(size=sizes, fits=st.integers(1, 64))
def test_what_does_not_fit_is_halved_until_it_does(size: int, fits: int) -> None:
    engine = Scripted(set(), fits=fits)
    report = isolate(engine, size)
    assert engine.errors == {}
    # Each halving is paid for once: after it no larger piece is tried.
    assert engine.out_of_memory <= max(0, math.ceil(math.log2(size / fits)))
    assert report.engine_failure is None


@given(size=sizes, fits=st.integers(1, 64), data=st.data())
def test_memory_and_a_bad_request_at_once(size: int, fits: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, size - 1))
    engine = Scripted({bad}, fits=fits)
    isolate(engine, size)
    assert set(engine.errors) == {str(bad)}
