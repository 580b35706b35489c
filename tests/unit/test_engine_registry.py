"""Which engines there are, and why some are not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests import models

from muai_producers.errors import EngineUnavailableError
from muai_workers.engines.fake import FakeEngine
from muai_workers.engines.registry import ENGINE_NAMES, availability_report, create_engine, detect


def test_the_registry_itself_imports_no_engine_library() -> None:
    code = (
        "import sys, muai_workers.engines.registry, muai_workers.optimization_manager, muai_workers.engines.fake; "
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'vllm', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.engine
def test_the_report_names_all_four() -> None:
    report = availability_report(models.settings())
    assert tuple(report) == ENGINE_NAMES == ("vllm", "deepspeed", "onnx", "pytorch")
    assert "torch 2." in report["pytorch"].reason
    assert "CPUExecutionProvider" in report["onnx"].reason
    assert all(entry.reason for entry in report.values())


@pytest.mark.parametrize("name", ENGINE_NAMES)
def test_what_is_switched_off_is_unavailable_and_says_so(name: str) -> None:
    settings = models.settings(**{name: {"enabled": False}})
    assert detect(name, settings).reason == f"switched off by optimization.{name}.enabled: false"
    with pytest.raises(EngineUnavailableError, match="switched off"):
        create_engine(name, settings)


def test_with_optimization_off_pytorch_alone_is_left() -> None:
    settings = models.settings(enabled=False)
    assert [name for name in ENGINE_NAMES if detect(name, settings).available] == ["pytorch"]


def test_the_fake_engine_is_there_when_asked_for_by_name() -> None:
    assert isinstance(create_engine("fake", models.settings()), FakeEngine)
    assert "fake" not in ENGINE_NAMES


def test_an_unknown_engine_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(EngineUnavailableError, match="no engine 'tensorrt'; there are vllm, deepspeed, onnx, pytorch"):
        create_engine("tensorrt", models.settings())
