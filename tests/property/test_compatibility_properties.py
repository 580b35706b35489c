"""The specification's properties 52 and 53: features go by the configuration, and what was there before goes on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muai_batching.collector import policy_from
from muai_config import Settings, build_settings
from muai_config.reference import all_settings
from muai_producers.errors import EnginesExhaustedError, InferenceFailedError, MuaiError
from muai_producers.workflows import ChatGenerateWorkflow, Orchestrator
from muai_workers.engines.base import EngineOutput
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.model_manager import ModelManager
from muai_workers.optimization_manager import OptimizationManager

ENGINES = ("vllm", "deepspeed", "onnx", "pytorch")
SWITCHES = [
    one.key
    for one in all_settings()
    if one.key.startswith(("optimization.", "monitoring.")) and isinstance(one.default, bool)
]
MODELS: dict[str, Any] = {
    "talker": {"task": "chat", "source": "hub:none"},
    "embedder": {"task": "embedding", "source": "hub:none"},
}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, value in values.items():
        *sections, key = path.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return document


def value_at(configured: Settings, path: str) -> Any:
    value: Any = configured
    for part in path.split("."):
        value = getattr(value, part)
    return value


# Property 52: Features are configuration-controlled
@pytest.mark.property(52)
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(SWITCHES), st.booleans()))
def test_given_any_switches_then_each_is_as_the_configuration_says_and_no_other_moves(chosen: dict[str, bool]) -> None:
    plain = build_settings({}, {})
    by_file = build_settings(nested(chosen), {})
    for path in SWITCHES:
        assert value_at(by_file, path) == chosen.get(path, value_at(plain, path))


@pytest.mark.property(52)
@settings(max_examples=200, deadline=None)
@given(
    enabled=st.fixed_dictionaries({name: st.booleans() for name in ENGINES}),
    optimized=st.booleans(),
    batching=st.booleans(),
    adaptive=st.booleans(),
    preferred=st.permutations(ENGINES),
)
def test_given_engines_and_batching_on_or_off_then_only_what_is_on_is_used(
    enabled: dict[str, bool], optimized: bool, batching: bool, adaptive: bool, preferred: list[str]
) -> None:
    configured = build_settings(
        {
            "models": {"talker": {**MODELS["talker"], "engines": preferred}},
            "optimization": {
                "enabled": optimized,
                "batcher": {"enabled": batching, "adaptive_batching": adaptive},
                **{name: {"enabled": is_on} for name, is_on in enabled.items()},
            },
        },
        {},
    )
    chain = configured.chain(configured.model("talker"))
    expected = tuple(name for name in preferred if enabled[name]) if optimized else ("pytorch",)
    assert chain == expected
    policy = policy_from(configured)
    assert policy.size_limit == (policy.max_batch_size if batching and optimized else 1)
    assert policy.adaptive == adaptive


@pytest.mark.property(52)
@settings(max_examples=50, deadline=None)
@given(fallback=st.booleans(), text=st.text("abc ", min_size=1).filter(str.strip))
def test_given_fallback_on_or_off_then_the_next_engine_is_asked_or_not(fallback: bool, text: str) -> None:
    configured = build_settings({"models": MODELS, "optimization": {"fallback_on_error": fallback}}, {})
    engines = {
        "onnx": FakeEngine(FakeOptions(poison_marker=text), name="onnx"),
        "pytorch": FakeEngine(name="pytorch"),
    }
    manager = OptimizationManager(configured, engines=engines)
    if fallback:
        assert manager.infer("embedder", {"text": text}).engine_used == "pytorch"
    else:
        with pytest.raises(MuaiError) as failed:
            manager.infer("embedder", {"text": text})
        assert isinstance(failed.value, InferenceFailedError | EnginesExhaustedError)
        assert not engines["pytorch"].runs


# Property 53: Existing APIs remain unchanged
@pytest.mark.property(53)
@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=4), optimized=st.booleans())
def test_given_optimisation_on_or_off_then_model_manager_and_workflows_answer_alike(
    turns: list[str], optimized: bool
) -> None:
    configured = build_settings({"models": MODELS, "optimization": {"enabled": optimized}}, {})
    manager = ModelManager(configured, FakeEngine(name="pytorch"))
    workflow = ChatGenerateWorkflow(manager, settings=configured)
    orchestrator = Orchestrator(configured, manager)
    told: list[str] = []
    for turn in turns:
        output = manager.infer("embedder", {"text": turn})
        assert isinstance(output, EngineOutput)
        assert len(output.outputs["embedding"]) == 8
        alone = workflow.execute({"message": turn}).outputs["answer"]
        assert alone == " ".join(reversed(turn.split()))
        in_turn = orchestrator.execute_workflow("chat", {"message": turn, "conversation_id": "c"}).outputs["answer"]
        told = [*told, *turn.split()]
        assert in_turn.split() == list(reversed(told))[:16]
        told = [*told, *in_turn.split()]
    assert set(manager.loaded_models()) == {"talker", "embedder"}
    assert manager.unload_model("talker")
