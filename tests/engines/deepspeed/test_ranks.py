"""DeepSpeed over processes: what they compute together, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests import models

from muai_config import ModelSpec
from muai_producers.errors import EngineError, ModelLoadError
from muai_workers.engines.base import Completion, Piece
from muai_workers.engines.deepspeed import DeepSpeedEngine
from muai_workers.engines.pytorch import PyTorchEngine
from muai_workers.optimization_manager import OptimizationManager

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PROMPTS = ("The river is", "When one engine fails", "A", "Rain fell all night on the hills. In")
DEATH_S = 20


def causal(**fields: Any) -> ModelSpec:
    return models.folder_spec("tiny-causal", "text-generation", models.causal_folder(), **fields)


@contextmanager
def engine(**options: Any) -> Iterator[DeepSpeedEngine]:
    made = DeepSpeedEngine(models.settings(deepspeed={"dtype": "fp32", "replace_with_kernel_inject": False, **options}))
    try:
        yield made
    finally:
        made.close()


def completions(made: Any, spec: ModelSpec, prompts: tuple[str, ...], **parameters: Any) -> list[Completion]:
    requests = [models.request(str(index), spec, prompt, **parameters) for index, prompt in enumerate(prompts)]
    found = {one.request_id: one for one in made.run(spec, spec.task, requests) if isinstance(one, Completion)}
    return [found[request.id] for request in requests]


def outputs(made: Any, spec: ModelSpec, prompts: tuple[str, ...] = PROMPTS, **parameters: Any) -> list[Any]:
    return [one.output.outputs for one in completions(made, spec, prompts, max_tokens=20, **parameters)]  # type: ignore[union-attr]


@cache
def expected() -> list[Any]:
    return outputs(PyTorchEngine(models.settings()), causal())


def shared_memory() -> set[str]:
    return {file.name for file in Path("/dev/shm").glob("deepspeed_*")}


@pytest.fixture(scope="module")
def pair() -> Iterator[DeepSpeedEngine]:
    """An engine whose models lie in two ranks each."""
    with engine(tensor_parallel=2) as made:
        yield made


def test_two_ranks_say_what_one_and_pytorch_say(pair: DeepSpeedEngine) -> None:
    before = shared_memory()
    together = completions(pair, causal(), PROMPTS, max_tokens=20)
    assert [one.output.outputs for one in together] == expected()  # type: ignore[union-attr]
    extra = together[0].output.extra  # type: ignore[union-attr]
    assert (extra["tensor_parallel"], extra["dtype"], extra["device"]) == (2, "fp32", "cpu")
    assert "degradations" not in extra
    assert shared_memory() <= before, "nothing with a name is left in shared memory"
    with engine() as alone:
        assert outputs(alone, causal()) == expected()


def test_each_rank_holds_a_share_of_the_weights(pair: DeepSpeedEngine) -> None:
    pair.load(causal())
    shares = [ready.weights_bytes for ready in pair._ranks["tiny-causal"].ready]
    whole = pair.estimate_memory_bytes(causal())
    assert all(0.3 * whole < share < 0.75 * whole for share in shares)
    assert len(pair.rank_pids("tiny-causal")) == 2


def test_an_encoder_is_shared_out_and_answers_as_pytorch_does(pair: DeepSpeedEngine) -> None:
    spec = models.encoder_spec()
    (ours,) = completions(pair, spec, ("A cat sleeps.",))
    (theirs,) = completions(PyTorchEngine(models.settings()), spec, ("A cat sleeps.",))
    assert ours.output is not None
    assert theirs.output is not None
    assert ours.output.outputs["embedding"] == pytest.approx(theirs.output.outputs["embedding"], abs=1e-4)
    pair.unload(spec.name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero_inference_says_what_pytorch_says(ranks: int) -> None:
    with engine(zero_inference="always", tensor_parallel=ranks) as made:
        assert outputs(made, causal()) == expected()
        shares = [ready.weights_bytes for ready in made._ranks["tiny-causal"].ready]
        assert sum(shares) == pytest.approx(made.estimate_memory_bytes(causal()), rel=0.01)


def test_a_rank_that_dies_fails_its_batch_and_comes_back_with_the_next(pair: DeepSpeedEngine) -> None:
    request = models.request("1", causal(), "The river", max_tokens=60)
    events = pair.run(causal(), "text-generation", [msgspec.structs.replace(request, stream=True)])
    assert isinstance(next(iter(events)), Piece)
    processes = [psutil.Process(pid) for pid in pair.rank_pids("tiny-causal")]
    processes[1].send_signal(signal.SIGKILL)
    with pytest.raises(EngineError, match="rank 1 of tiny-causal died"):
        list(events)
    assert "tiny-causal" not in pair.loaded()
    psutil.wait_procs(processes, timeout=DEATH_S)
    assert not any(process.is_running() for process in processes)
    assert outputs(pair, causal()) == expected()


def test_a_rank_that_dies_between_batches_is_replaced_before_the_next(pair: DeepSpeedEngine) -> None:
    pair.load(causal())
    processes = [psutil.Process(pid) for pid in pair.rank_pids("tiny-causal")]
    processes[0].send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=DEATH_S)
    assert not any(process.is_running() for process in processes)
    assert outputs(pair, causal()) == expected()


def test_ranks_end_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tests.engines.deepspeed.test_ranks import DeepSpeedEngine, Path, models\n"
        "spec = models.folder_spec('tiny-causal', 'text-generation', Path(sys.argv[1]))\n"
        "engine = DeepSpeedEngine(models.settings(deepspeed={'tensor_parallel': 2}))\n"
        "engine.load(spec)\n"
        "print(list(engine.rank_pids(spec.name)), flush=True)\n"
        "sys.stdin.read()\n"
    )
    root = Path(__file__).parents[3]
    worker = subprocess.Popen(
        [sys.executable, "-c", script, str(models.causal_folder())],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        ranks = [psutil.Process(pid) for pid in json.loads(worker.stdout.readline())]
    finally:
        worker.kill()
        worker.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=DEATH_S)
    assert not alive
    assert not any(f"muai-{worker.pid}-" in name for name in shared_memory())


def test_a_model_that_the_ranks_cannot_load_leaves_no_process(tmp_path: Path) -> None:
    for file in models.causal_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    before = {child.pid for child in psutil.Process().children()}
    with engine() as made, pytest.raises(ModelLoadError, match="broken"):
        made.load(models.folder_spec("broken", "text-generation", tmp_path))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_what_the_cpu_cannot_do_is_told_in_the_result() -> None:
    with engine(dtype="fp16", replace_with_kernel_inject=True) as made:
        (completion,) = completions(made, causal(), PROMPTS[:1], max_tokens=4)
    assert completion.output is not None
    told = completion.output.extra["degradations"]
    assert completion.output.extra["dtype"] == "fp32"
    assert ["fp32 instead of fp16" in told[0], "kernels" in told[1]] == [True, True]


def test_with_pipeline_stages_the_next_engine_serves() -> None:
    settings = models.settings([causal()], deepspeed={"pipeline_parallel": 2})
    manager = OptimizationManager(settings)
    try:
        result = manager.infer("tiny-causal", {"prompt": "The river"}, "deepspeed")
    finally:
        manager.close()
    assert result.engine_used != "deepspeed"
    (attempt, *_) = result.metadata["attempts"]
    assert attempt["engine"] == "deepspeed"
    assert "pipeline_parallel is 2" in attempt["error"]["message"]
