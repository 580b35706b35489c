"""The fake engine does as it is told."""

from __future__ import annotations

import multiprocessing
import signal

import pytest
from tests import models

from muai_producers.errors import (
    EngineUnavailableError,
    InferenceFailedError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryError,
)
from muai_workers.engines.fake import FakeEngine, FakeOptions

SPEC = models.model_spec("writer", "text-generation", "folder:/nowhere")


def run(engine: FakeEngine, *prompts: str) -> list[object]:
    requests = [models.request(str(index), SPEC, prompt) for index, prompt in enumerate(prompts)]
    return [one.error or one.output for one in engine.run(SPEC, "text-generation", requests)]


def test_options_come_from_json() -> None:
    options = FakeOptions.from_env_value('{"latency_per_batch_ms": 5, "fail_to_load": ["writer"]}')
    assert options == FakeOptions(latency_per_batch_ms=5.0, fail_to_load=("writer",))
    assert FakeOptions.from_env_value("") == FakeOptions()


@pytest.mark.parametrize("value", ['{"latency": 5}', "5", "{", '{"embedding_size": "8"}'])
def test_wrong_options_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="fake engine options"):
        FakeOptions.from_env_value(value)


def test_a_batch_takes_a_part_for_each_request_and_one_for_itself() -> None:
    slept: list[float] = []
    engine = FakeEngine(FakeOptions(latency_per_request_ms=2, latency_per_batch_ms=10), sleep=slept.append)
    run(engine, "a", "b", "c")
    assert slept == [pytest.approx(0.016)]


def test_poison_fails_the_batch_and_bad_fails_alone() -> None:
    engine = FakeEngine()
    with pytest.raises(InferenceFailedError):
        run(engine, "good", "POISON")
    good, bad = run(engine, "good", "BAD")
    assert isinstance(bad, InvalidRequestError)
    assert not isinstance(good, Exception)
    assert list(engine.runs) == [("0", "1"), ("0", "1")]


def test_memory_ends_above_the_given_size() -> None:
    engine = FakeEngine(FakeOptions(out_of_memory_above=2))
    assert len(run(engine, "a", "b")) == 2
    with pytest.raises(OutOfMemoryError):
        run(engine, "a", "b", "c")


def test_models_and_the_engine_itself_can_be_missing() -> None:
    with pytest.raises(ModelLoadError):
        FakeEngine(FakeOptions(fail_to_load=("writer",))).load(SPEC)
    absent = FakeEngine(FakeOptions(unavailable="on holiday"))
    assert absent.availability().reason == "on holiday"
    with pytest.raises(EngineUnavailableError):
        absent.load(SPEC)


def _run_killing() -> None:
    run(FakeEngine(), "KILL")


def test_kill_ends_the_process_as_a_crash_would() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_run_killing)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
