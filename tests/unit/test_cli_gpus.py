"""Which GPUs the processes of `muai worker` get."""

import os

import pytest
from click.testing import CliRunner

from muai_config import ConfigError, build_settings
from muai_workers.cli import worker as worker_cli
from muai_workers.cli.gpus import group_gpus, group_size, parse_gpus, with_tensor_parallel


def nobody() -> list[str]:
    raise AssertionError("asked for the visible GPUs")


@pytest.mark.parametrize(
    ("text", "gpus"),
    [("0", ("0",)), ("0,2", ("0", "2")), ("1-3,0", ("1", "2", "3", "0")), (" 4 , GPU-a1-b2 ", ("4", "GPU-a1-b2"))],
)
def test_Given_numbers_ranges_or_ids_Then_they_come_in_order(text: str, gpus: tuple[str, ...]) -> None:
    assert parse_gpus(text, nobody) == gpus


def test_Given_all_Then_the_visible_ones_are_taken() -> None:
    assert parse_gpus("all", lambda: ["0", "1"]) == ("0", "1")
    with pytest.raises(ValueError, match="no GPU is visible"):
        parse_gpus("all", list)


@pytest.mark.parametrize(
    ("text", "problem"), [("3-1", "downwards"), ("0,0-1", "twice"), ("a", "no GPU"), ("", "no GPU")]
)
def test_Given_nonsense_Then_it_is_refused_with_a_reason(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_gpus(text, nobody)


def test_Given_an_engine_over_several_gpus_Then_they_are_cut_into_its_groups() -> None:
    settings = build_settings({"optimization": {"vllm": {"tensor_parallel_size": 2}}}, {})
    assert group_size(settings, "onnx") == 1
    assert group_gpus(("0", "1", "2", "3"), group_size(settings, "vllm")) == [("0", "1"), ("2", "3")]
    with pytest.raises(ValueError, match="3 GPUs cannot be shared out in groups of 2"):
        group_gpus(("0", "1", "2"), 2)


def test_Given_tensor_parallel_on_the_command_line_Then_the_groups_are_that_large() -> None:
    settings = build_settings({}, {})
    for engine in ("vllm", "deepspeed"):
        assert group_size(with_tensor_parallel(settings, engine, 4), engine) == 4
        assert group_size(with_tensor_parallel(settings, engine, None), engine) == 1
    assert with_tensor_parallel(settings, "onnx", 1) is settings
    result = CliRunner().invoke(worker_cli.worker, ["--engine", "onnx", "--gpus", "0-1", "--tensor-parallel", "2"])
    assert result.exit_code == 2
    assert "onnx runs a model on one GPU" in " ".join(result.output.split())


def test_Given_one_gpu_and_no_watch_When_a_worker_starts_Then_the_process_is_pinned_before_the_engine_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import muai_workers.app

    seen = {}

    def run(settings: object, engine: str, name: str | None, *, log_level: str) -> None:
        seen.update(engine=engine, gpus=os.environ["CUDA_VISIBLE_DEVICES"], slots=settings.queue.worker_concurrency)  # type: ignore[attr-defined]

    monkeypatch.setattr(muai_workers.app, "run_engine_worker", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.setenv("MUAI_GPUS", "")
    monkeypatch.setenv("MUAI_MON_GPUS_ENABLED", "false")
    result = CliRunner().invoke(worker_cli.worker, ["--engine", "fake", "--gpus", "3", "--slots", "4"])
    assert (result.exit_code, seen) == (0, {"engine": "fake", "gpus": "3", "slots": 4})


def test_Given_prefork_Then_it_is_refused_with_the_reason() -> None:
    result = CliRunner().invoke(worker_cli.worker, ["--engine", "fake", "--pool", "prefork"])
    assert result.exit_code == 2
    assert "CUDA cannot be used" in result.output


def test_Given_a_hang_time_shorter_than_workers_tell_Then_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="hang_s"):
        build_settings({"monitoring": {"gpus": {"hang_s": 2.0}}}, {})
    assert build_settings({"monitoring": {"gpus": {"hang_s": None}}}, {}).monitoring.gpus.hang_s is None
