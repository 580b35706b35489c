"""`muai up`."""

from __future__ import annotations

import importlib.util
import sys

import click

from muai_config.engines import ALL_ENGINES
from muai_producers.cli.invocation import Invocation, home_folder, pass_invocation
from muai_producers.cli.registry import command_targets


def _engine_names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    unknown = [name for name in names if name not in ALL_ENGINES]
    if unknown:
        raise click.BadParameter(f"there is no engine {unknown[0]!r}; there are {', '.join(ALL_ENGINES)}")
    return names


@click.command()
@click.option("--broker", metavar="URL", help="The broker, redis:// or amqp://; by default one of its own.")
@click.option("--redis", metavar="URL", help="The Redis for results and state, where the broker is none.")
@click.option("--engines", callback=_engine_names, help="Such as onnx,pytorch; by default all that can run here.")
@click.option(
    "--gpus",
    envvar="MUAI_GPUS",
    help="0,1 or 0-3 or all: a worker of each engine for each GPU, or for each group where the engine is configured to "
    "use several; by default one worker of each engine, which sees them all.",
)
@click.option("--collectors", type=click.IntRange(1, 64), default=1, show_default=True, help="Batch collectors.")
@click.option("--gateway/--no-gateway", default=True, help="Whether the HTTP gateway runs, where it is installed.")
@click.option("--flower", is_flag=True, help="Run Flower as well.")
@click.option("--plain", is_flag=True, help="Plain lines instead of a live table.")
@pass_invocation
def up(
    invocation: Invocation,
    /,
    broker: str | None,
    redis: str | None,
    engines: tuple[str, ...],
    gpus: str | None,
    collectors: int,
    gateway: bool,
    flower: bool,
    plain: bool,
) -> None:
    """Run a whole installation on this machine, its own Redis included; Ctrl-C finishes what is accepted."""
    from muai_config.loading import resolve_file
    from muai_workers.cli.worker import gpu_groups
    from muai_workers.up.console import console_for
    from muai_workers.up.stack import Wanted, stack

    chosen, remarks = _choose_engines(invocation, engines)
    if gateway and not _has_gateway():
        gateway = False
        remarks.append("no gateway: it needs pip install 'muai[gateway]'")
    exporter = importlib.util.find_spec("prometheus_client") is not None
    if not exporter:
        remarks.append("no metrics page: it needs pip install 'muai[monitoring]'")
    settings = resolve_file(None, invocation.env).settings
    wanted = Wanted(
        broker=broker,
        redis=redis,
        engines=chosen,
        collectors=collectors,
        gateway=gateway,
        flower=flower,
        exporter=exporter,
        log_level=invocation.log_level,
        gpu_groups={engine: gpu_groups(settings, engine, gpus) for engine in chosen},
    )
    console = console_for(settings.monitoring.logs.format, plain=plain)
    try:
        for remark in remarks:
            console.line("muai", remark)
        with stack(wanted, home_folder(), console) as (supervisor, _):
            status = supervisor.run()
    finally:
        console.close()
    sys.exit(status)


def _has_gateway() -> bool:
    return "gateway" in command_targets() and all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))


def _choose_engines(invocation: Invocation, asked: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The engines to run and a remark on each that cannot; their libraries are not imported for it.

    Raises:
        EngineUnavailableError: none can run, or one that was asked for cannot.
    """
    from muai_config.loading import resolve_file
    from muai_producers.errors import EngineUnavailableError
    from muai_workers.engines.registry import ENGINE_NAMES, detect

    settings = resolve_file(None, invocation.env).settings
    found = {name: detect(name, settings) for name in asked or ENGINE_NAMES}
    reasons = [f"{name}: {one.reason}" for name, one in found.items() if not one.available]
    if (asked and reasons) or len(reasons) == len(found):
        raise EngineUnavailableError(f"cannot run here: {'; '.join(reasons)}")
    return tuple(name for name, one in found.items() if one.available), [f"not run: {reason}" for reason in reasons]
