"""`muai worker` and `muai control`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from muai_config.engines import ALL_ENGINES
from muai_producers.cli.invocation import Invocation, pass_invocation

if TYPE_CHECKING:
    from muai_config import Settings
    from muai_config.engines import EngineName

WHY_NOT_PREFORK = (
    "only --pool threads is possible: CUDA cannot be used in a process forked from one that has it, a batch must leave "
    "the main loop free to renew leases, and forked processes would each load the models again"
)


@click.command()
@click.option("--engine", envvar="MUAI_ENGINE", required=True, type=click.Choice(ALL_ENGINES), help="The engine.")
@click.option(
    "--gpus",
    envvar="MUAI_GPUS",
    help="0,1 or 0-3 or all: one process for each GPU, or for each group where the engine is configured to use "
    "several; by default one process that sees what CUDA_VISIBLE_DEVICES says.",
)
@click.option("--name", envvar="MUAI_WORKER_NAME", help="Its name in Flower, in logs and in results.")
@click.option(
    "--slots",
    type=click.IntRange(1, 1024),
    help="Batches that it runs at once: queue.worker_concurrency, queue.continuous_slots.",
)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1, 1024),
    help="GPUs that share each layer of a model, for vllm and deepspeed: the groups are that large.",
)
@click.option("--pool", default="threads", hidden=True)
@pass_invocation
def worker(
    invocation: Invocation,
    engine: EngineName,
    gpus: str | None,
    name: str | None,
    slots: int | None,
    tensor_parallel: int | None,
    pool: str,
) -> None:
    """Run the workers of one engine: one process, or one for each group of GPUs, watched."""
    if pool != "threads":
        raise click.UsageError(WHY_NOT_PREFORK)
    settings = _with_tensor_parallel(with_slots(invocation.settings, slots), engine, tensor_parallel)
    groups = gpu_groups(settings, engine, gpus)
    if len(groups) > 1 or (groups and settings.monitoring.gpus.enabled):
        options = {"--slots": slots, "--tensor-parallel": tensor_parallel}
        sys.exit(_supervise(invocation, engine, groups, name, options))
    if groups:
        from muai_workers.up.plan import pinned_to

        os.environ.update(pinned_to(groups[0]))
    from muai_workers.app import run_engine_worker

    run_engine_worker(settings, engine, name, log_level=invocation.log_level)


def with_slots(settings: Settings, slots: int | None) -> Settings:
    """The settings with as many slots for each worker as the command line says."""
    if slots is None:
        return settings
    changes = {"worker_concurrency": slots, "continuous_slots": slots}
    return settings.model_copy(update={"queue": settings.queue.model_copy(update=changes)})


def _with_tensor_parallel(settings: Settings, engine: str, size: int | None) -> Settings:
    from muai_workers.cli.gpus import with_tensor_parallel

    try:
        return with_tensor_parallel(settings, engine, size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tensor-parallel") from None


def gpu_groups(settings: Settings, engine: str, gpus: str | None) -> list[tuple[str, ...]]:
    """The GPUs of each worker of the engine, by what `--gpus` says; none where it says nothing.

    Raises:
        click.BadParameter: it says nothing that can be.
    """
    from muai_workers.cli.gpus import group_gpus, group_size, parse_gpus

    if gpus is None or not gpus.strip():
        return []
    try:
        return group_gpus(parse_gpus(gpus, _visible_gpus), group_size(settings, engine))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--gpus") from None


def _visible_gpus() -> Sequence[str]:
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return [part.strip() for part in limited.split(",") if part.strip()]
    from muai_workers.gpus.nvml import count_gpus

    return [str(number) for number in range(count_gpus())]


def _supervise(
    invocation: Invocation,
    engine: str,
    groups: list[tuple[str, ...]],
    name: str | None,
    options: dict[str, int | None],
) -> int:
    from muai_workers.up.console import console_for
    from muai_workers.up.plan import gpu_worker_specs, gpus_of
    from muai_workers.up.supervisor import Supervisor

    settings = invocation.settings
    grace_s = float(settings.monitoring.server.graceful_shutdown_timeout)
    specs = gpu_worker_specs(engine, groups, name, options, log_level=invocation.log_level)
    console = console_for(settings.monitoring.logs.format, plain=True)
    if not settings.monitoring.gpus.enabled:
        return Supervisor(specs, console, grace_s=grace_s).run()
    from muai_workers.gpus.watch import GpuWatch

    watch = GpuWatch(settings, {spec.name: gpus_of(spec) for spec in specs}, grace_s)
    supervisor = Supervisor(specs, console, grace_s=grace_s, warden=watch)
    watch.start(supervisor.standings)
    try:
        return supervisor.run()
    finally:
        watch.stop()


@click.command()
@click.option("--beat/--no-beat", default=True, show_default=True, help="One control worker of a fleet runs the clock.")
@click.option("--name", help="Its name in Flower and in logs.")
@pass_invocation
def control(invocation: Invocation, beat: bool, name: str | None) -> None:
    """Run a control worker: monitoring, alarms, tuning, reaping."""
    settings = invocation.settings
    from muai_workers.app import run_control

    run_control(settings, name, beat=beat, log_level=invocation.log_level)
