"""In-process inference: which engine, which models stay, what is answered."""

from __future__ import annotations

import itertools

import pytest
from tests import models

from muai_config import Settings
from muai_producers.errors import (
    EnginesExhaustedError,
    InferenceFailedError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    MuaiError,
)
from muai_producers.wire import InferenceResult
from muai_workers.engines.base import Engine
from muai_workers.engines.fake import FakeEngine, FakeOptions
from muai_workers.model_manager import ModelManager
from muai_workers.optimization_manager import OptimizationManager

WRITER = models.model_spec("writer", "text-generation", "folder:/nowhere")
SORTER = models.model_spec("sorter", "text-classification", "folder:/nowhere")
ENCODER = models.model_spec("encoder", "embedding", "folder:/nowhere", engines=["pytorch"])
SPECS = (WRITER, SORTER, ENCODER)


def engines(**options_by_name: FakeOptions) -> dict[str, FakeEngine]:
    return {name: FakeEngine(options_by_name.get(name), name=name) for name in ("vllm", "deepspeed", "onnx", "pytorch")}


def limited(max_cached: int) -> Settings:
    settings = models.settings(SPECS)
    return settings.model_copy(
        update={"model_cache": settings.model_cache.model_copy(update={"max_cached": max_cached})}
    )


def test_a_bad_request_among_many_is_answered_with_its_error() -> None:
    manager = OptimizationManager(models.settings(SPECS), engines=engines())
    answers = manager.infer_many("writer", [{"prompt": "one"}, {"prompt": ""}, {"prompt": "BAD"}, {"prompt": "two"}])
    assert [type(one) for one in answers] == [
        InferenceResult,
        InvalidRequestError,
        InvalidRequestError,
        InferenceResult,
    ]
    assert answers[0].batch_size == 3  # type: ignore[union-attr]


def test_a_poisonous_request_tries_the_chain_alone() -> None:
    fakes = engines()
    manager = OptimizationManager(models.settings(SPECS), engines=fakes)
    prompts = [{"prompt": f"prompt {index}"} for index in range(7)] + [{"prompt": "POISON"}]
    answers = manager.infer_many("writer", prompts, "onnx")
    assert [one.engine_used for one in answers if isinstance(one, InferenceResult)] == ["onnx"] * 7
    error = answers[-1]
    assert isinstance(error, EnginesExhaustedError)
    assert [one["engine"] for one in error.attempts] == ["onnx", "vllm", "deepspeed", "pytorch"]
    assert [len(run) for run in fakes["pytorch"].runs] == [1]


def test_without_fallback_the_engines_own_error_comes_back() -> None:
    fakes = engines(vllm=FakeOptions(fail_to_load=("writer",)))
    manager = OptimizationManager(models.settings(SPECS, fallback_on_error=False), engines=fakes)
    with pytest.raises(ModelLoadError):
        manager.infer("writer", {"prompt": "hello"})
    with pytest.raises(InferenceFailedError):
        manager.infer("writer", {"prompt": "POISON"}, "onnx")
    assert not fakes["pytorch"].runs


def test_without_fallback_an_absent_engine_is_still_passed_over() -> None:
    manager = OptimizationManager(
        models.settings(SPECS, fallback_on_error=False), engines=engines(vllm=FakeOptions(unavailable="not installed"))
    )
    assert manager.infer("writer", {"prompt": "hello"}).engine_used == "deepspeed"


def test_with_optimization_off_pytorch_serves() -> None:
    manager = OptimizationManager(models.settings(SPECS, enabled=False), engines=engines())
    result = manager.infer("writer", {"prompt": "hello"}, "onnx")
    assert result.engine_used == "pytorch"
    assert result.metadata["attempts"] == []


def test_an_engine_that_cannot_load_a_model_rests_for_that_model_alone() -> None:
    now = [100.0]
    options = FakeOptions(fail_to_load=("sorter",))
    fakes = engines(onnx=options)
    manager = OptimizationManager(models.settings(SPECS), engines=fakes, now_s=lambda: now[0])
    assert manager.infer("sorter", {"text": "x"}, "onnx").engine_used == "deepspeed"
    assert "onnx" not in manager.get_available_engines("sorter")
    assert "onnx" in manager.get_available_engines("writer")
    again = manager.infer("sorter", {"text": "x"}, "onnx")
    assert "passed over for" in again.metadata["attempts"][0]["error"]["message"]
    fakes["onnx"].options = FakeOptions()
    now[0] += models.settings().queue.engine_cooldown_s
    assert manager.infer("sorter", {"text": "x"}, "onnx").engine_used == "onnx"


def test_a_models_own_chain_is_not_left() -> None:
    manager = OptimizationManager(models.settings(SPECS), engines=engines())
    assert manager.get_available_engines("encoder") == ["pytorch"]
    assert manager.infer("encoder", {"text": "x"}, "onnx").engine_used == "pytorch"


def test_what_does_not_exist_is_named() -> None:
    manager = OptimizationManager(models.settings(SPECS), engines=engines())
    with pytest.raises(ModelNotFoundError, match="writer"):
        manager.infer("writter", {"prompt": "x"})
    with pytest.raises(InvalidRequestError, match="no engine 'onxx'"):
        manager.infer("writer", {"prompt": "x"}, "onxx")
    with pytest.raises(MuaiError, match="no task 'poetry'"):
        manager.infer("writer", {"prompt": "x"}, task="poetry")


def test_the_status_names_models_and_reasons() -> None:
    manager = OptimizationManager(
        models.settings(SPECS), engines=engines(vllm=FakeOptions(unavailable="not installed"))
    )
    manager.infer("writer", {"prompt": "x"})
    status = manager.get_engine_status()
    assert not status["vllm"].available
    assert status["vllm"].error_message == "not installed"
    assert status["deepspeed"].models_loaded == ["writer"]
    assert status["deepspeed"].error_message is None
    assert status["onnx"].last_check.tzinfo is not None


def test_the_result_carries_what_the_specification_names() -> None:
    result = OptimizationManager(models.settings(SPECS), engines=engines()).infer("writer", {"prompt": "hello there"})
    assert result.outputs == {"text": "there hello", "finish_reason": "stop"}
    assert result.batch_size == 1
    assert result.cache_hit is False
    assert result.latency_ms > 0
    assert result.metadata["usage"] == {"input_tokens": 2, "output_tokens": 2}


def test_the_model_least_recently_used_goes_first() -> None:
    engine = FakeEngine()
    manager = ModelManager(limited(2), engine)
    events: list[tuple[str, str, str]] = []
    manager.on_lifecycle(lambda *event: events.append(event))
    for name in ("writer", "sorter", "writer", "encoder"):
        manager.load_model(name)
    assert manager.loaded_models() == engine.loaded() == ("writer", "encoder")
    assert events == [
        ("loading", "writer", "fake"),
        ("loaded", "writer", "fake"),
        ("loading", "sorter", "fake"),
        ("loaded", "sorter", "fake"),
        ("loading", "encoder", "fake"),
        ("unloaded", "sorter", "fake"),
        ("loaded", "encoder", "fake"),
    ]


def test_a_model_in_use_stays() -> None:
    manager = ModelManager(limited(1), FakeEngine())
    with manager.keeping("writer"):
        manager.load_model("sorter")
        assert "writer" in manager.loaded_models()
    assert len(manager.loaded_models()) == 1


def test_a_manager_infers_and_unloads() -> None:
    manager = ModelManager(models.settings(SPECS), FakeEngine())
    assert manager.infer("writer", {"prompt": "b a"}).outputs["text"] == "a b"
    with pytest.raises(InvalidRequestError):
        manager.infer("writer", {"prompt": "BAD"})
    with pytest.raises(InferenceFailedError):
        manager.infer("writer", {"prompt": "POISON"})
    assert manager.unload_model("writer")
    assert not manager.unload_model("writer")
    with pytest.raises(ModelNotFoundError):
        manager.load_model("nobody")


def test_a_model_that_does_not_load_is_not_counted_as_loaded() -> None:
    manager = ModelManager(models.settings(SPECS), FakeEngine(FakeOptions(fail_to_load=("writer",))))
    with pytest.raises(ModelLoadError):
        manager.load_model("writer")
    assert manager.loaded_models() == ()


def test_fakes_fit_the_protocol_under_any_name() -> None:
    assert all(isinstance(engine, Engine) for engine in itertools.chain(engines().values(), [FakeEngine()]))
