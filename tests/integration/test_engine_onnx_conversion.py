"""Conversions: checked before use, made once, rebuilt when damaged."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tests import models

from muai_producers.errors import ModelLoadError
from muai_workers.engines.base import Completion
from muai_workers.engines.onnx import ONNXEngine
from muai_workers.engines.onnx_session import open_session
from muai_workers.optimization_manager import OptimizationManager

pytestmark = pytest.mark.engine
OPINION = "what a wonderful film"


def classifier() -> Any:
    return models.folder_spec("tiny-classifier", "text-classification", models.classifier_folder())


def best_label(engine: ONNXEngine) -> str:
    (completion,) = engine.run(classifier(), "text-classification", [models.request("one", classifier(), OPINION)])
    assert completion.output is not None
    assert completion.output.extra["execution_provider"] == "CPUExecutionProvider"
    return str(completion.output.outputs["labels"][0]["label"])


def test_a_conversion_outside_the_tolerance_is_refused_and_pytorch_serves() -> None:
    settings = models.settings([classifier()], onnx={"tolerance": 1e-14})
    with pytest.raises(ModelLoadError, match="differs from the original by up to") as raised:
        ONNXEngine(settings).load(classifier())
    assert 0 < raised.value.details["max_difference"] < 1e-5
    result = OptimizationManager(settings).infer("tiny-classifier", {"text": OPINION}, "onnx")
    assert result.engine_used == "pytorch"
    assert result.metadata["attempts"][0]["engine"] == "onnx"
    assert "tolerance" in result.metadata["attempts"][0]["error"]["message"]


def test_a_quantized_model_is_smaller_and_still_right(tmp_path: Path) -> None:
    engine = ONNXEngine(models.settings(onnx={"enable_quantization": True, "cache_dir": str(tmp_path)}))
    graph = engine.convert_model(classifier())
    assert graph.stat().st_size < (graph.parent / "model.onnx").stat().st_size
    assert best_label(engine) == "POSITIVE"


def test_damaged_files_are_made_anew(tmp_path: Path) -> None:
    settings = models.settings(onnx={"cache_dir": str(tmp_path)})
    graph = ONNXEngine(settings).convert_model(classifier())
    whole = graph.read_bytes()
    graph.write_bytes(whole[:1000])
    engine = ONNXEngine(settings)
    assert best_label(engine) == "POSITIVE"
    assert graph.stat().st_size == pytest.approx(len(whole), rel=0.01)


def test_a_conversion_is_used_again_until_something_changes(tmp_path: Path) -> None:
    settings = models.settings(onnx={"cache_dir": str(tmp_path)})
    first = ONNXEngine(settings).convert_model(classifier())
    made_at_ns = first.stat().st_mtime_ns
    assert ONNXEngine(settings).convert_model(classifier()) == first
    assert first.stat().st_mtime_ns == made_at_ns
    other = models.folder_spec("tiny-classifier", "embedding", models.classifier_folder())
    assert ONNXEngine(settings).convert_model(other) != first


def test_a_quantized_model_that_is_too_far_off_gives_way_to_the_whole_one(tmp_path: Path) -> None:
    options = {"enable_quantization": True, "quantized_min_cosine": 1.0, "cache_dir": str(tmp_path)}
    engine = ONNXEngine(models.settings(onnx=options))
    assert engine.convert_model(classifier()).name == "model.onnx"
    (completion,) = engine.run(classifier(), "text-classification", [models.request("one", classifier(), OPINION)])
    assert completion.output is not None
    assert completion.output.extra["dtype"] == "fp32"
    (reason,) = completion.output.extra["degradations"]
    assert f"cosine of {completion.output.extra['quantized_cosine']:.4f}" in reason
    assert 0.9 < completion.output.extra["quantized_cosine"] <= 1.0  # rounded to six places


def test_quantized_generation_says_how_exact_it_is(tmp_path: Path) -> None:
    spec = models.folder_spec("tiny-causal", "text-generation", models.causal_folder())
    options = {"enable_quantization": True, "quantized_min_cosine": 0.9, "cache_dir": str(tmp_path)}
    engine = ONNXEngine(models.settings(onnx=options))
    (completion,) = engine.run(spec, spec.task, [models.request("one", spec, "The train leaves the city")])
    assert completion.output is not None
    assert completion.output.extra["dtype"] == "int8"
    assert 0.9 <= completion.output.extra["quantized_cosine"] <= 1.0
    assert completion.output.output_tokens > 1


def test_what_runs_the_graph_is_told_and_what_is_absent_named() -> None:
    wanted = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]
    here = set(onnxruntime.get_available_providers())
    absent = [provider for provider in wanted if provider not in here]
    engine = ONNXEngine(models.settings(onnx={"execution_providers": wanted}))
    availability = engine.availability()
    assert availability.available
    assert all(provider in availability.reason for provider in wanted)
    (completion,) = engine.run(classifier(), "text-classification", [models.request("one", classifier(), OPINION)])
    assert completion.output is not None
    assert completion.output.extra["execution_provider"] not in absent
    assert set(absent) <= set(completion.output.extra["absent_providers"])


@pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])
def test_every_optimization_level_gives_the_same_answer(level: str) -> None:
    engine = ONNXEngine(models.settings(onnx={"optimization_level": level}))
    assert best_label(engine) == "POSITIVE"


def test_what_cannot_be_converted_is_refused_before_it_is_loaded() -> None:
    engine = ONNXEngine(models.settings())
    summarizer = models.folder_spec("tiny-seq2seq", "summarization", models.seq2seq_folder())
    assert "encoder-decoder" in str(engine.refusal(summarizer))
    assert "bf16" in str(engine.refusal(models.encoder_spec(dtype="bf16")))
    with pytest.raises(ModelLoadError, match="encoder-decoder"):
        engine.load(summarizer)


def test_without_a_usable_execution_provider_the_engine_is_unavailable() -> None:
    engine = ONNXEngine(models.settings(onnx={"execution_providers": ["TensorrtExecutionProvider"]}))
    availability = engine.availability()
    assert not availability.available
    assert "TensorrtExecutionProvider" in availability.reason
    assert not engine.is_available()


def _open_and_count(folder: Path, barrier: Any, built: Any) -> None:
    from muai_workers.engines.onnx_store import ConversionStore

    def build(scratch: Path) -> dict[str, int]:
        with built.get_lock():
            built.value += 1
        (scratch / "model.onnx").write_bytes(b"graph" * 1000)
        return {"max_difference": 0}

    barrier.wait(timeout=60)
    conversion = ConversionStore(folder).open_or_build("key", build)
    assert (conversion.folder / "model.onnx").read_bytes() == b"graph" * 1000


def test_processes_that_want_one_conversion_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, built = context.Barrier(3), context.Value("i", 0)
    processes = [context.Process(target=_open_and_count, args=(tmp_path, barrier, built)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert built.value == 1


def test_lanes_have_a_thread_each_though_there_are_fewer_than_when_the_engine_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def noting(path: Path, options: Any, num_threads: int | None = None) -> Any:
        asked.append(num_threads)
        return open_session(path, options, num_threads)

    monkeypatch.setattr("muai_workers.engines.onnx.open_session", noting)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        engine = ONNXEngine(models.settings(onnx={"cache_dir": str(tmp_path)}))
        torch.set_num_threads(1)
        requests = [models.request(str(number), classifier(), OPINION) for number in range(64)]
        completions = list(engine.run(classifier(), "text-classification", requests))
        engine.close()
    finally:
        torch.set_num_threads(before)
    assert asked == [None, 1]
    assert [one.error for one in completions if isinstance(one, Completion)] == [None] * 64
