"""The chain, followed in process over engines that fail as they are told to."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import models

from muai_batching.routing import EngineState, next_attempt, resolve_chain
from muai_producers.errors import EnginesExhaustedError
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.engines.registry import availability_report, detect
from muai_workers.optimization_manager import OptimizationManager

NAMES = ("vllm", "deepspeed", "onnx", "pytorch")
SPEC = models.model_spec("writer", "text-generation", "folder:/nowhere")
CATALOG = models.settings([SPEC])

# How an engine fails: not installed, cannot load, refuses the model, raises in the run; or does not.
CONDITIONS = {
    "fine": FakeOptions(),
    "missing": FakeOptions(unavailable="not installed"),
    "no load": FakeOptions(fail_to_load=("writer",)),
    "refuses": FakeOptions(refuse=("writer",)),
    "raises": FakeOptions(poison_marker="hello"),
}
conditions = st.fixed_dictionaries({name: st.sampled_from(list(CONDITIONS)) for name in NAMES})
preferences = st.none() | st.sampled_from(NAMES) | st.permutations(NAMES)


def manager(condition_by_name: dict[str, str]) -> tuple[OptimizationManager, dict[str, FakeEngine]]:
    engines = {name: FakeEngine(CONDITIONS[condition], name=name) for name, condition in condition_by_name.items()}
    return OptimizationManager(CATALOG, engines=engines, now_s=lambda: 0.0), engines


# Property 1: Engine selection respects availability and preference
@pytest.mark.property(1)
@settings(deadline=None)
@given(condition_by_name=conditions, preferred=st.sampled_from(NAMES))
def test_a_preferred_engine_that_is_available_serves(condition_by_name: dict[str, str], preferred: str) -> None:
    optimization, engines = manager(condition_by_name | {preferred: "fine"})
    result = optimization.infer("writer", {"prompt": "hello there"}, preferred)
    assert result.engine_used == preferred
    assert result.metadata["attempts"] == []
    assert all(not engine.runs for name, engine in engines.items() if name != preferred)


# Property 2: Fallback chain is followed on engine failure
@pytest.mark.property(2)
@settings(deadline=None)
@given(condition_by_name=conditions, preference=preferences)
def test_the_first_engine_that_works_serves_and_the_others_are_named(
    condition_by_name: dict[str, str], preference: str | list[str] | None
) -> None:
    optimization, engines = manager(condition_by_name)
    first = [preference] if isinstance(preference, str) else list(preference or ())
    order = [*first, *(name for name in NAMES if name not in first)]
    working = [name for name in order if condition_by_name[name] == "fine"]
    expected_attempts = order[: order.index(working[0])] if working else order
    if working:
        result = optimization.infer("writer", {"prompt": "hello there"}, preference)
        assert result.engine_used == working[0]
        attempts = result.metadata["attempts"]
    else:
        with pytest.raises(EnginesExhaustedError) as raised:
            optimization.infer("writer", {"prompt": "hello there"}, preference)
        attempts = raised.value.attempts
    assert [attempt["engine"] for attempt in attempts] == expected_attempts
    assert all(attempt["error"]["message"] for attempt in attempts)
    assert all(len(engine.runs) <= 1 for engine in engines.values())


# Property 51: Missing libraries trigger fallback
@pytest.mark.property(51)
@settings(deadline=None)
@given(missing=st.sets(st.sampled_from(("vllm", "deepspeed", "onnxruntime", "onnx", "onnxscript"))))
def test_an_engine_whose_library_is_missing_is_unavailable_and_says_how_to_get_it(missing: set[str]) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> object:
        return None if name in missing else original(name, package)

    with mock.patch.object(importlib.util, "find_spec", find_spec):
        found = {name: detect(name, CATALOG) for name in NAMES}
    for name, libraries in {"vllm": {"vllm"}, "deepspeed": {"deepspeed"}}.items():
        if libraries & missing:
            assert not found[name].available
            assert "pip install" in found[name].reason
    absent = missing & {"onnxruntime", "onnx", "onnxscript"}
    if absent:
        assert not found["onnx"].available
        assert all(library in found["onnx"].reason for library in absent)
        assert "pip install 'muai[onnx]'" in found["onnx"].reason


# Property 51: Missing libraries trigger fallback
@pytest.mark.property(51)
@pytest.mark.engine
def test_without_onnxruntime_plain_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "onnxruntime" else original(name, package),
    )
    spec = models.folder_spec("tiny-classifier", "text-classification", models.classifier_folder())
    optimization = OptimizationManager(models.settings([spec]))
    result = optimization.infer("tiny-classifier", {"text": "what a wonderful film"})
    assert result.engine_used == "pytorch"
    assert result.outputs["labels"][0]["label"] == "POSITIVE"
    reasons = {attempt["engine"]: attempt["error"]["message"] for attempt in result.metadata["attempts"]}
    assert "onnxruntime is not installed here (pip install 'muai[onnx]')" in reasons["onnx"]
    assert availability_report(CATALOG)["onnx"].available is False


@given(
    preference=st.lists(st.sampled_from(NAMES)),
    configured=st.lists(st.sampled_from(NAMES), unique=True),
    states=st.dictionaries(
        st.sampled_from(NAMES), st.builds(EngineState, st.booleans(), st.just("why"), st.floats(0, 20))
    ),
    now_s=st.floats(0, 20),
)
def test_walking_a_chain_visits_each_engine_once_in_order(
    preference: list[str], configured: list[str], states: dict[str, EngineState], now_s: float
) -> None:
    chain = resolve_chain(preference, configured)
    visited: list[str] = []
    left: tuple[str, ...] = chain
    while True:
        decision = next_attempt(left, states, now_s)
        visited.extend(attempt.engine for attempt in decision.skipped)
        if decision.engine is None:
            break
        assert states[decision.engine].available
        assert states[decision.engine].cooling_until_s <= now_s
        visited.append(decision.engine)
        left = decision.rest
    assert tuple(visited) == chain
    assert len(set(visited)) == len(visited)
