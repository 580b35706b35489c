"""Which processes an installation consists of, and how each is started. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from muai_workers.up.decisions import Role

MUAI = (sys.executable, "-m", "muai_producers")
"""Not the script `muai`, which need not be on the PATH."""


@dataclass(frozen=True)
class ProcessSpec:
    """One process to keep running."""

    name: str
    role: Role
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment."""
    worker: str = ""
    """The name under which it announces itself in the fleet, once it is ready; '' for what does not."""


def muai_command(command: str, *args: str, log_level: str) -> tuple[str, ...]:
    """The command line of one of our own processes."""
    return (*MUAI, "--log-level", log_level, command, *args)


def stack_specs(
    engines: Sequence[str],
    variables: Mapping[str, str],
    *,
    collectors: int = 1,
    gateway: bool = False,
    gateway_host: str | None = None,
    flower: bool = False,
    exporter: bool = False,
    exporter_host: str | None = None,
    log_level: str = "INFO",
    suffix: str = "",
    gpu_groups: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> list[ProcessSpec]:
    """The processes of an installation but for its Redis.

    Args:
        engines: those that run here, one worker each, or one for each of their `gpu_groups`.
        variables: lead the processes to broker and state store.
        gateway_host: where the gateway listens; None: where the configuration says.
        exporter_host: the same of the metrics page.
        suffix: makes the workers' names differ from those of other installations on the same broker.
        gpu_groups: by engine, the GPUs of each of its workers.
    """

    def own(name: str, role: Role, command: str, *args: str, worker: str = "") -> ProcessSpec:
        return ProcessSpec(name, role, muai_command(command, *args, log_level=log_level), variables, worker)

    def collector(number: int) -> ProcessSpec:
        name = "collector" if collectors == 1 else f"collector-{number}"
        return own(name, Role.COLLECTOR, "collector", "--name", f"{name}{suffix}")

    specs = [collector(number) for number in range(1, collectors + 1)]
    for engine in engines:
        groups = (gpu_groups or {}).get(engine)
        if groups:
            specs += [
                replace(spec, variables={**variables, **spec.variables})
                for spec in gpu_worker_specs(engine, groups, None, {}, suffix=suffix, log_level=log_level)
            ]
        else:
            name = f"{engine}{suffix}"
            specs.append(own(engine, Role.ENGINE, "worker", "--engine", engine, "--name", name, worker=name))
    specs.append(own("control", Role.CONTROL, "control", "--name", f"control{suffix}"))
    if flower:
        specs.append(own("flower", Role.FLOWER, "flower"))
    if exporter:
        specs.append(own("exporter", Role.EXPORTER, "exporter", *(("--host", exporter_host) if exporter_host else ())))
    if gateway:
        specs.append(own("gateway", Role.GATEWAY, "gateway", *(("--host", gateway_host) if gateway_host else ())))
    return specs


def gpu_worker_specs(
    engine: str,
    groups: Sequence[Sequence[str]],
    name: str | None,
    options: Mapping[str, int | None],
    *,
    log_level: str,
    suffix: str = "",
) -> list[ProcessSpec]:
    """One worker process for each group of GPUs.

    Args:
        name: what their names begin with; that of a single one is just this. None: the engine's.
        options: of `muai worker`, handed on where they are not None.
        suffix: what the names under which they announce themselves end with.
    """
    handed_on = [text for option, value in options.items() if value is not None for text in (option, str(value))]
    specs = []
    for group in groups:
        own_name = name if name and len(groups) == 1 else f"{name or engine}-gpu{'+'.join(group)}"
        worker = f"{own_name}{suffix}"
        command = muai_command("worker", "--engine", engine, "--name", worker, *handed_on, log_level=log_level)
        specs.append(ProcessSpec(own_name, Role.ENGINE, command, pinned_to(group), worker))
    return specs


def pinned_to(group: Sequence[str]) -> dict[str, str]:
    """Variables under which a process sees these GPUs alone: set before it starts, as torch looks at them once.

    CUDA counts the fastest first unless it is told to count as NVML and `--gpus` do. MUAI_GPUS is emptied: the group is
    settled, and must not be cut up again.
    """
    return {"CUDA_VISIBLE_DEVICES": ",".join(group), "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "MUAI_GPUS": ""}


def gpus_of(spec: ProcessSpec) -> tuple[str, ...]:
    """The GPUs that the process is pinned to; none where it sees all."""
    return tuple(gpu for gpu in spec.variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu)
