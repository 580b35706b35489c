"""Which processes an installation consists of, and that the real command line takes what they are started with."""

import click
import pytest

from muai_producers.cli.main import LOG_LEVELS, muai
from muai_workers.up.decisions import Role
from muai_workers.up.plan import MUAI, ProcessSpec, gpu_worker_specs, gpus_of, stack_specs
from muai_workers.up.stack import Addresses


def parse(spec: ProcessSpec) -> click.Context:
    """The context of the command that a process would run; raises what the command line would refuse."""
    assert spec.command[: len(MUAI)] == MUAI
    option, level, name, *rest = spec.command[len(MUAI) :]
    assert (option, level in LOG_LEVELS) == ("--log-level", True)
    command = muai.get_command(click.Context(muai), name)
    assert command is not None
    return command.make_context(name, rest)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUAI_GPUS", "MUAI_ENGINE", "MUAI_WORKER_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_Given_an_installation_Then_the_command_line_takes_every_process_of_it() -> None:
    specs = stack_specs(["onnx", "pytorch"], {}, collectors=2, flower=True, log_level="DEBUG")
    assert [spec.name for spec in specs] == ["collector-1", "collector-2", "onnx", "pytorch", "control", "flower"]
    parsed = {spec.name: parse(spec) for spec in specs}
    assert parsed["onnx"].params["engine"] == "onnx"
    assert parsed["onnx"].params["name"] == "onnx"
    assert parsed["control"].params["beat"] is True


def test_Given_a_gateway_Then_it_is_started_as_one() -> None:
    spec = stack_specs([], {}, gateway=True)[-1]
    assert spec.role is Role.GATEWAY
    assert parse(spec).params["host"] is None
    assert parse(stack_specs([], {}, gateway=True, gateway_host="127.0.0.1")[-1]).params["host"] == "127.0.0.1"


def test_Given_a_shared_broker_Then_the_names_differ_from_those_of_other_machines() -> None:
    [_, worker, _] = stack_specs(["onnx"], {}, suffix="-here-7")
    assert worker.worker == "onnx-here-7"
    assert parse(worker).params["name"] == "onnx-here-7"


def test_Given_groups_of_gpus_Then_each_worker_sees_its_own_and_does_not_cut_them_up_again() -> None:
    options = {"--slots": 3, "--tensor-parallel": 2}
    specs = gpu_worker_specs("vllm", [("0", "1"), ("2", "3")], None, options, log_level="INFO")
    assert [spec.name for spec in specs] == ["vllm-gpu0+1", "vllm-gpu2+3"]
    assert [spec.variables["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["0,1", "2,3"]
    for spec in specs:
        assert spec.variables["MUAI_GPUS"] == ""
        assert spec.variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        params = parse(spec).params
        assert (params["gpus"], params["slots"], params["tensor_parallel"]) == (None, 3, 2)


def test_Given_gpus_for_an_installation_Then_each_engine_has_a_worker_for_each_group() -> None:
    groups = {"onnx": [("0",), ("1",)], "vllm": [("0", "1")], "pytorch": []}
    specs = stack_specs(["onnx", "vllm", "pytorch"], {"MUAI_X": "y"}, suffix="-here-7", gpu_groups=groups)
    engines = {spec.name: spec for spec in specs if spec.role is Role.ENGINE}
    assert {name: gpus_of(spec) for name, spec in engines.items()} == {
        "onnx-gpu0": ("0",),
        "onnx-gpu1": ("1",),
        "vllm-gpu0+1": ("0", "1"),
        "pytorch": (),
    }
    for name, spec in engines.items():
        assert parse(spec).params["name"] == spec.worker == f"{name}-here-7"
        assert spec.variables["MUAI_X"] == "y"


def test_Given_one_group_and_a_name_Then_the_worker_has_just_that_name() -> None:
    [spec] = gpu_worker_specs("onnx", [("5",)], "pod-7", {"--slots": None}, log_level="INFO")
    assert spec.name == parse(spec).params["name"] == "pod-7"
    [spec] = gpu_worker_specs("onnx", [("5",)], None, {"--slots": None}, log_level="INFO")
    assert spec.name == "onnx-gpu5"


@pytest.mark.parametrize(
    ("broker", "state", "needs_redis"),
    [
        (None, None, True),
        (None, "redis://state", True),
        ("redis://broker", None, False),
        ("rediss://broker", None, False),
        ("sentinel://broker", None, False),
        ("amqp://broker", None, True),
        ("amqp://broker", "redis://state", False),
    ],
)
def test_Given_addresses_Then_a_redis_is_embedded_only_where_one_is_missing(
    broker: str | None, state: str | None, needs_redis: bool
) -> None:
    assert Addresses(broker, state).needs_redis is needs_redis


def test_Given_rabbitmq_alone_Then_the_embedded_redis_keeps_the_state() -> None:
    variables = Addresses("amqp://broker", None).variables("redis://own")
    assert (variables["MUAI_BROKER_URL"], variables["MUAI_REDIS_URL"]) == ("amqp://broker", "redis://own")
    # Under their other names the settings would contradict these.
    assert (variables["MUAI_QUEUE_BROKER_URL"], variables["MUAI_QUEUE_REDIS_URL"]) == ("", "")
