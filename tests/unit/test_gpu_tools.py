"""What runs on real GPUs only: it says so where there is none, and what it computes is right."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from benchmarks import gpu as gpu_bench
from benchmarks.results import Metric
from tests import models
from tests.gpu_support import SimulatedGpus

from muai_producers.errors import InferenceFailedError
from muai_workers.engines.fake import FakeEngine
from muai_workers.gpus import nvml, present

SPEC = models.model_spec("minilm", "embedding", "folder:/nowhere")


def test_given_no_gpu_then_nothing_is_measured_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_bench, "names", list)
    assert gpu_bench.main() == 0
    assert "no NVIDIA GPU at hand" in capsys.readouterr().out
    monkeypatch.setattr(present, "count_gpus", lambda: 0)
    monkeypatch.setattr(present, "names", list)
    assert present.main() == 1
    assert "no NVIDIA GPU at hand" in capsys.readouterr().out


def test_given_gpus_then_they_are_counted_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    simulated = SimulatedGpus(tmp_path / "nvml.json", 2)
    monkeypatch.setenv("MUAI_TEST_NVML", str(simulated.file))
    assert nvml.count_gpus() == 2
    assert present.main() == 0
    assert "GPU 1: Simulated GPU" in capsys.readouterr().out
    simulated.load_driver(False)
    assert nvml.count_gpus() == 0
    assert present.names() == []


def test_given_rates_then_the_best_batch_is_compared_with_one_at_a_time() -> None:
    measured = {1: Metric("sentences/s", (100.0, 90.0, 110.0)), 32: Metric("sentences/s", (1500.0, 1400.0, 1600.0))}
    kept = gpu_bench.figure("Some GPU", measured, datetime.now(UTC), 1.0)
    (goal,) = kept.goals
    assert (goal.value, goal.met) == (15.0, True)
    assert kept.machine["gpu"] == "Some GPU"
    assert "batches of 32" in goal.text


def test_given_an_engine_then_every_sentence_is_counted_and_a_failure_ends_the_measurement() -> None:
    engine = FakeEngine()
    assert gpu_bench.rate(engine, SPEC, 4, 0.01, 1) > 0
    assert {len(run) for run in engine.runs} == {4}

    class Broken(FakeEngine):
        def run(self, *_: object) -> object:  # type: ignore[override]
            raise InferenceFailedError("no")

    with pytest.raises(InferenceFailedError):
        gpu_bench.rate(Broken(), SPEC, 4, 0.01, 1)
